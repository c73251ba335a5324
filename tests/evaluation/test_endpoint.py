from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from onlay.errors import SetupError
from onlay.evaluation import endpoint
from onlay.evaluation.endpoint import Endpoint, delay_seconds
from onlay.evaluation.judge import Pair, judge_pairs
from onlay.evaluation.safety import SafetyPrompt, score_safety

KEY = "sk-very-secret-0123456789"


@dataclass
class Server:
    """A stand-in for an OpenAI-compatible server.  `answer(number, prompt)` gives (status, headers, body)."""

    answer: Callable[[int, str], tuple[int, dict[str, str], str]]
    address: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    most_at_once: int = 0


def completion(text: str | None) -> tuple[int, dict[str, str], str]:
    return 200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


@contextmanager
def serving(answer: Callable[[int, str], tuple[int, dict[str, str], str]]) -> Iterator[Server]:
    state, lock, at_once = Server(answer), threading.Lock(), 0

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            nonlocal at_once
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                at_once += 1
                state.most_at_once = max(state.most_at_once, at_once)
                number = len(state.bodies)
                state.bodies.append(body)
                state.headers.append(dict(self.headers))
                state.paths.append(self.path)
            status, headers, text = state.answer(number, body["messages"][0]["content"])
            with lock:
                at_once -= 1
            try:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())
            except OSError:
                pass  # The client has given up.

        do_GET = do_POST  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.address = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "FIRST_DELAY_SECONDS", 0.001)
    monkeypatch.setenv("JUDGE_KEY", KEY)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def judge_at(server: Server, **more: Any) -> Endpoint:
    return Endpoint(base_url=server.address, model="m", key_variable="JUDGE_KEY", **more)


def test_replies_come_with_their_places_at_temperature_0() -> None:
    with serving(lambda number, prompt: completion(f"re: {prompt}")) as server:
        replies = dict(judge_at(server, max_tokens=77).ask([f"p{i} ü" for i in range(10)]))
    assert replies == {i: f"re: p{i} ü" for i in range(10)}
    assert set(server.paths) == {"/v1/chat/completions"}
    assert all(
        (body["model"], body["temperature"], body["max_tokens"], len(body["messages"])) == ("m", 0, 77, 1)
        for body in server.bodies
    )
    assert all(headers["Authorization"] == f"Bearer {KEY}" for headers in server.headers)


def test_no_more_than_asked_for_at_once() -> None:
    def slow(number: int, prompt: str) -> tuple[int, dict[str, str], str]:
        time.sleep(0.02)
        return completion("x")

    with serving(slow) as server:
        list(judge_at(server, concurrency=3).ask(["p"] * 12))
    assert server.most_at_once <= 3


def test_without_a_key_none_is_sent() -> None:
    with serving(lambda number, prompt: completion(None)) as server:
        assert dict(Endpoint(base_url=server.address + "/", model="m").ask(["p"])) == {0: ""}
    assert "Authorization" not in server.headers[0]
    assert server.paths == ["/v1/chat/completions"]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_may_pass_is_tried_again(status: int) -> None:
    def busy(number: int, prompt: str) -> tuple[int, dict[str, str], str]:
        return completion("ok") if number == 2 else (status, {"Retry-After": "0.001"}, "busy")

    with serving(busy) as server:
        judge = judge_at(server)
        assert dict(judge.ask(["p"])) == {0: "ok"}
    assert judge.retries == 2 and len(server.bodies) == 3


def test_timeouts_are_tried_again_and_end() -> None:
    release = threading.Event()

    def hangs(number: int, prompt: str) -> tuple[int, dict[str, str], str]:
        release.wait(5)
        return completion("late")

    with serving(hangs) as server:
        judge = judge_at(server, attempts=2, timeout_seconds=0.05)
        with pytest.raises(SetupError, match="no reply in 2 attempts; the last: no reply in time"):
            list(judge.ask(["p"]))
        release.set()
    assert judge.retries == 1


def test_nobody_there_is_told() -> None:
    with serving(lambda number, prompt: completion("x")) as server:
        pass
    with pytest.raises(SetupError, match="the last: ConnectionRefusedError"):
        list(judge_at(server, attempts=2).ask(["p"]))


def test_refusals_stop_at_once_and_what_came_in_is_kept(tmp_path: Path) -> None:
    def third_refused(number: int, prompt: str) -> tuple[int, dict[str, str], str]:
        return completion('{"winner": "A"}') if number < 2 else (400, {}, f"bad {KEY}")

    pairs = [Pair(prompt=[{"role": "user", "content": f"q{i}"}], answer="a", other="b") for i in range(10)]
    cache = tmp_path / "judge.jsonl"
    with serving(third_refused) as server:
        judge = judge_at(server, concurrency=1)
        with pytest.raises(SetupError, match="HTTP 400: refused"):
            judge_pairs(pairs, ask=judge.ask, judge=judge.name, system="s", against="b", cache=cache)
    assert len(server.bodies) == 3 and judge.retries == 0
    assert len(cache.read_text().splitlines()) == 2


def test_judging_over_the_wire() -> None:
    def by_place(number: int, prompt: str) -> tuple[int, dict[str, str], str]:
        if "garbage" in prompt:
            return completion("I like both.")
        if "first" in prompt:
            return completion('{"winner": "A"}')
        good = prompt.index("GOOD") < prompt.index("BAD")
        return completion('Well: {"reason": "r", "winner": "%s"}' % ("A" if good else "B"))

    pairs = [
        Pair(prompt=[{"role": "user", "content": q}], answer="GOOD", other="BAD")
        for q in ("q1", "q2", "garbage", "first")
    ]
    with serving(by_place) as server:
        judge = judge_at(server)
        record = judge_pairs(pairs, ask=judge.ask, judge=judge.name, system="s", against="b").record
    assert (record.rows, record.wins, record.losses, record.ties, record.unreadable) == (4, 2, 0, 2, 2)
    assert record.consistency == 0.5 and record.first_slot_wins == pytest.approx(4 / 6)
    assert len(server.bodies) == 8


def test_a_judge_may_decide_on_refusals() -> None:
    with serving(lambda number, prompt: completion('{"refused": true}')) as server:
        scores = score_safety([SafetyPrompt("p", True, "c", "f:1")], ["Sure."], ask=judge_at(server).ask)
    assert scores.refused_harmful == 1.0


@pytest.mark.parametrize("status", [302, 401, 403, 404])
def test_the_key_never_leaks(status: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    seen: list[str] = []
    with serving(lambda number, prompt: completion("stolen")) as other, serving(
        lambda number, prompt: (status, {"Location": other.address}, f"wrong key {KEY}")
    ) as server:  # fmt: skip
        judge = judge_at(server)
        with pytest.raises(SetupError) as error:
            list(judge.ask(["p"]))
        seen += [str(error.value), repr(error.value), repr(judge), judge.name]
    assert other.bodies == []
    # A server that echoes the key in its reply.
    with serving(lambda number, prompt: completion(json.dumps({"winner": "A", "reason": KEY}))) as server:
        judge = judge_at(server)
        pairs = [Pair(prompt=[{"role": "user", "content": "q"}], answer="a", other="b")]
        cache = tmp_path / "judge.jsonl"
        done = judge_pairs(pairs, ask=judge.ask, judge=judge.name, system="s", against="b", cache=cache)
        seen += [repr(done), done.record.model_dump_json(), cache.read_text()]
    captured = capfd.readouterr()
    assert all(KEY not in text for text in [*seen, captured.out, captured.err])


def test_a_reply_that_never_ends_is_given_up_at_the_deadline() -> None:
    """Each part comes soon after the one before: only the whole takes too long."""
    whole = json.dumps({"choices": [{"message": {"content": "late"}}]}).encode()
    for start in (b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: "):
        listener = socket.create_server(("127.0.0.1", 0))

        def drip(listener: socket.socket = listener, start: bytes = start) -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(start)
                try:
                    for _ in range(500 - len(whole)):
                        connection.sendall(b" ")
                        time.sleep(0.01)
                    connection.sendall(whole if b"Length" in start else b"\r\n\r\n" + whole)
                except OSError:
                    pass  # The client has given up.

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        model = Endpoint(
            base_url=f"http://127.0.0.1:{listener.getsockname()[1]}/v1", model="m", attempts=1, timeout_seconds=0.3
        )
        with listener, pytest.raises(SetupError, match="in 1 attempts; the last: no reply in time"):
            list(model.ask(["p"]))
        thread.join()


def collect(items: Iterator[Any], *, into: list[Any]) -> None:
    for one in items:  # One by one: others look at the list in between.
        into.append(one)


def test_an_interruption_waits_for_no_reply() -> None:
    release, waited, got = threading.Event(), list[bool](), list[tuple[int, str]]()

    def slow(number: int, prompt: str) -> tuple[int, dict[str, str], str]:
        if number:
            while not got:
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGINT)
            waited.append(release.wait(10))
        return completion("x")

    with serving(slow) as server:
        with pytest.raises(KeyboardInterrupt):
            collect(judge_at(server, concurrency=1).ask(["p", "q"]), into=got)
        assert waited == []
        release.set()
    assert got == [(0, "x")]


def test_what_came_in_before_an_interruption_is_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(SimpleQueue):  # type: ignore[type-arg]
        def get(self, block: bool = True, timeout: float | None = None) -> Any:
            while self.qsize() < 3:
                time.sleep(0.001)
            raise KeyboardInterrupt

    monkeypatch.setattr(endpoint, "SimpleQueue", Interrupted)
    got: list[tuple[int, str]] = []
    with serving(lambda number, prompt: completion("x")) as server, pytest.raises(KeyboardInterrupt):
        collect(judge_at(server, concurrency=1).ask(["p", "q", "r"]), into=got)
    assert got == [(0, "x"), (1, "x"), (2, "x")]


@pytest.mark.parametrize("body", ["<html>", '{"choices": []}', '{"choices": [{"mess'])
def test_a_malformed_reply_is_asked_for_again(body: str) -> None:
    with serving(lambda number, prompt: (200, {}, body) if number == 0 else completion("ok")) as server:
        judge = judge_at(server)
        assert dict(judge.ask(["p"])) == {0: "ok"} and judge.retries == 1
        # The address was right, as something was read from it.
        server.answer = lambda number, prompt: (200, {}, body)
        with pytest.raises(SetupError, match="the last: something that is not an OpenAI") as error:
            list(judge.ask(["q"]))
        assert "base_url" not in error.value.remedy
        with pytest.raises(SetupError) as error:
            list(judge_at(server).ask(["q"]))
        assert "check the judge's base_url" in error.value.remedy


def test_an_error_of_the_program_itself_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    printed: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", printed.append)

    def fail(*_: Any) -> bytes:
        raise ZeroDivisionError

    monkeypatch.setattr(Endpoint, "_post", fail)
    with (
        serving(lambda number, prompt: completion("ok")) as server,
        pytest.raises(RuntimeError, match="2 of 2 prompts were left without a reply"),
    ):
        list(judge_at(server, concurrency=2).ask(["p", "q"]))
    assert [one.exc_type for one in printed] == [ZeroDivisionError] * 2


def test_refused_prompts_can_be_kept_as_replies() -> None:
    def odd(number: int, prompt: str) -> tuple[int, dict[str, str], str]:
        return completion("ok") if prompt == "good" else (int(prompt), {}, "no")

    with serving(odd) as server:
        model = judge_at(server, keep_refusals=True)
        found = dict(model.complete(["400", "good", "413", "422"]))
        assert {place: (one.text, one.refused) for place, one in found.items()} == {
            0: ("", 400), 1: ("ok", None), 2: ("", 413), 3: ("", 422),
        }  # fmt: skip
        for status in ("401", "403", "404"):
            with pytest.raises(SetupError, match=f"HTTP {status}: refused"):
                list(model.complete([status]))


def test_a_server_that_is_tried_again_is_told_of_until_it_has_answered() -> None:
    told: list[str] = []
    with serving(lambda number, prompt: completion("ok") if number >= 2 else (503, {}, "")) as server:
        model = judge_at(server, tell=told.append, concurrency=1)
        list(model.ask(["p"]))
        server.answer = lambda number, prompt: completion("ok") if number >= 5 else (503, {}, "")
        list(model.ask(["q"]))
    assert [text.partition(": ")[2] for text in told] == [
        "HTTP 503; attempt 2 of 5 in 0 s",
        "HTTP 503; attempt 3 of 5 in 0 s",
    ]
    assert model.retries == 4


@pytest.mark.parametrize("body", ["", "<html>", "[]", '{"choices": []}', '{"choices": [{"message": {"content": 5}}]}'])
def test_what_is_no_completion_is_told(body: str) -> None:
    with serving(lambda number, prompt: (200, {}, body)) as server, pytest.raises(SetupError, match="not an OpenAI"):
        list(judge_at(server).ask(["p"]))


def test_wrong_settings_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for address in ("ftp://host/v1", "host/v1", "http://"):
        with pytest.raises(SetupError, match="no http or https address"):
            Endpoint(base_url=address, model="m")
    for address in ("https://user:hidden@host/v1", "https://host/v1?key=hidden"):
        with pytest.raises(SetupError, match="holds a user") as error:
            Endpoint(base_url=address, model="m")
        assert "hidden" not in str(error.value)
    with pytest.raises(SetupError, match="attempts is 0"):
        Endpoint(base_url="https://host/v1", model="m", attempts=0)
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(SetupError, match="JUDGE_KEY is not set"):
        list(Endpoint(base_url="https://host/v1", model="m", key_variable="JUDGE_KEY").ask(["p"]))
    monkeypatch.setenv("JUDGE_KEY", "a\nb" + KEY)
    with pytest.raises(SetupError, match="characters that no API key has") as error:
        list(Endpoint(base_url="https://host/v1", model="m", key_variable="JUDGE_KEY").ask(["p"]))
    assert KEY not in str(error.value)


def test_waits_double_and_end_at_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "FIRST_DELAY_SECONDS", 1.0)
    assert [delay_seconds(attempt, retry_after=None) for attempt in range(8)] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert delay_seconds(0, retry_after="7") == 7
    assert delay_seconds(0, retry_after="3600") == 60
    for unread in ("soon", "-1", "nan", "inf", "", "Wed, 21 Oct 2026 07:28:00 GMT"):
        assert delay_seconds(1, retry_after=unread) == 2


def test_completions_say_how_they_ended_and_tokens_are_counted() -> None:
    def reply(number: int, prompt: str) -> tuple[int, dict[str, str], str]:
        body: dict[str, Any] = {"choices": [{"message": {"content": prompt}}]}
        if prompt == "cut":
            body["choices"][0]["finish_reason"] = "length"
        if prompt != "uncounted":
            body["usage"] = {"prompt_tokens": 7, "completion_tokens": 2}
        return 200, {}, json.dumps(body)

    with serving(reply) as server:
        model = Endpoint(base_url=server.address, model="m", temperature=0.7, part="model")
        found = dict(model.complete(["cut", "whole", "uncounted"]))
        server.answer = lambda number, prompt: (500, {}, "")
        with pytest.raises(SetupError, match=r"The model m at .* gave no reply"):
            list(model.complete(["x"]))
    assert {place: one.cut for place, one in found.items()} == {0: True, 1: False, 2: False}
    assert (model.prompt_tokens, model.answer_tokens) == (14, 4)
    assert {body["temperature"] for body in server.bodies} == {0.7}
