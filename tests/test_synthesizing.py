"""`onlay synthesize`: over HTTP with a stand-in server, and with a base on this machine."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onlay import cli
from onlay.data.read import scan
from onlay.data.synthesis.prompts import Written, answer_prompt, tasks_prompt
from onlay.data.synthesis.rounds import Settings
from onlay.data.synthesis.seeds import read_seeds
from onlay.errors import BaseModelError, OutputError, RecipeError, SetupError
from onlay.evaluation import endpoint
from onlay.recipe import DataSection, parse_recipe
from onlay.stages import Speaker, synthesize, train
from onlay.stages.synthesizing import bare_name
from tests.builders import save_tiny_base
from tests.data.synthesis.test_rounds import good_reply
from tests.evaluation.test_endpoint import Server, serving

KEY = "sk-very-secret-0123456789"
SEEDS = [
    {"prompt": f"Tell me what a {noun} was for.", "completion": f"For {noun}s."} for noun in ("boat", "bridge", "lamp")
]


def answer(number: int, prompt: str) -> tuple[int, dict[str, str], str]:
    reply = good_reply(prompt)
    body = {
        "choices": [{"message": {"content": reply.text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10},
    }
    return 200, {}, json.dumps(body)


@pytest.fixture
def seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("MODEL_KEY", KEY)
    monkeypatch.setattr(endpoint, "FIRST_DELAY_SECONDS", 0.001)
    Path("seeds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SEEDS))
    return "seeds.jsonl"


def speaker(server: Server, **more: Any) -> Speaker:
    return Speaker(model="m", endpoint=server.address, key_variable="MODEL_KEY", **more)


def test_over_http(seeds: str) -> None:
    with serving(answer) as server:
        made = synthesize(seeds, model=speaker(server, concurrency=3), rows=20, prices=(1.0, 10.0))
    assert (made.rows, made.asked, made.stopped, made.seeds) == (20, 20, None, 3)
    assert made.requests["tasks"] == 8 * made.rounds and made.kept_replies == 0
    assert sum(made.requests.values()) == len(server.bodies)
    assert (made.prompt_tokens, made.answer_tokens) == (100 * len(server.bodies), 10 * len(server.bodies))
    assert made.usd == pytest.approx((100 + 10 * 10) * len(server.bodies) / 1e6)
    assert {body["temperature"] for body in server.bodies} == {0.7, 0.0}
    assert {body["max_tokens"] for body in server.bodies} == {1024}
    assert server.most_at_once <= 3
    rows = [json.loads(line) for line in Path(made.path).read_text().splitlines()]
    assert {row["source"] for row in rows} == {f"synthetic:m at {server.address.split('/')[2]}"}
    found = scan(made.path, DataSection(train=made.path))
    assert (found.format, found.rows) == ("alpaca", 20)
    assert all(KEY not in path.read_text() for path in Path.cwd().iterdir())


def test_a_server_that_fails_costs_no_reply(seeds: str) -> None:
    def tired(number: int, prompt: str) -> tuple[int, dict[str, str], str]:
        return answer(number, prompt) if number < 11 else (403, {}, "no more")

    with serving(tired) as server:
        begun = Speaker(model="m", endpoint=server.address, concurrency=1)
        with pytest.raises(SetupError, match=r"The model m at .* answered HTTP 403"):
            synthesize(seeds, model=begun, rows=20)
        server.answer = answer
        made = synthesize(seeds, model=begun, rows=20)
        assert (made.rows, made.kept_replies) == (20, 11)
        # And what is there needs nobody.
        asked = len(server.bodies)
        again = synthesize(seeds, model=begun, rows=20)
    assert (
        len(server.bodies) == asked
        and again.requests == {}
        and again.kept_replies == made.kept_replies + sum(made.requests.values())
    )


def test_a_prompt_that_is_refused_is_left_out(seeds: str) -> None:
    def filtered(number: int, prompt: str) -> tuple[int, dict[str, str], str]:
        # After some that are answered, every fifth is not: of tasks, of answers and of grades.
        return (422, {}, "content filter") if number > 2 and number % 5 == 0 else answer(number, prompt)

    with serving(filtered) as server:
        who = speaker(server, concurrency=1)
        made = synthesize(seeds, model=who, judge=who, rows=20)
        assert made.rows == 20 and made.rejected["refused_by_server"] == len(
            [i for i in range(3, len(server.bodies)) if i % 5 == 0]
        )
        server.answer = lambda number, prompt: (400, {}, "no such model")
        with pytest.raises(SetupError, match="Every one of 8 requests for tasks was refused: HTTP 400"):
            synthesize(seeds, model=who, rows=20, output="new.jsonl")
    assert not list(Path.cwd().glob("new*"))


def test_what_is_read_of_the_seeds_belongs_to_what_was_begun(seeds: str) -> None:
    with serving(answer) as server:
        synthesize(seeds, model=speaker(server), rows=3, overrides=["data.max_rows=2"])
        asked = len(server.bodies)
        for overrides, told in (
            ((), "data.max_rows = 2, not None"),
            (("data.max_rows=3",), "data.max_rows = 2, not 3"),
        ):
            with pytest.raises(OutputError, match=f"was begun with {told}"):
                synthesize(seeds, model=speaker(server), rows=3, overrides=overrides)
        assert len(server.bodies) == asked
        synthesize(seeds, model=speaker(server), rows=3, overrides=["data.max_rows=2"])


def test_files_whose_names_begin_alike_have_outputs_of_their_own() -> None:
    names = ("d.v1.jsonl", "x/d.v2.jsonl", "d.v1.JSONL.gz", "d.csv", "d", "d.v1", ".jsonl")
    assert [bare_name(name) for name in names] == ["d.v1", "d.v2", "d.v1", "d", "d", "d.v1", ".jsonl"]


@pytest.mark.parametrize("prices", [(float("nan"), 1.0), (1.0, -1.0), (float("inf"), 1.0)])
def test_prices_are_numbers_of_dollars(seeds: str, prices: tuple[float, float]) -> None:
    with pytest.raises(SetupError, match="are not two prices"):
        synthesize(seeds, model=Speaker(model="m", endpoint="http://127.0.0.1:1/v1"), prices=prices)


def test_an_output_that_cannot_be_written_costs_no_request(seeds: str) -> None:
    with serving(answer) as server:
        with pytest.raises(OutputError, match=r"seeds\.jsonl/out\.jsonl cannot be written") as error:
            synthesize(seeds, model=speaker(server), output="seeds.jsonl/out.jsonl")
        assert server.bodies == [] and "another place with --output" in error.value.remedy


def test_a_server_that_is_not_there_yet_is_told(seeds: str) -> None:
    told: list[Any] = []
    with pytest.raises(SetupError, match="gave no reply in 5 attempts; the last: ConnectionRefusedError"):
        synthesize(seeds, model=Speaker(model="m", endpoint="http://127.0.0.1:1/v1"), report=told.append)
    assert [text.partition("; ")[2].partition(" in ")[0] for text in told if "127.0.0.1" in str(text)] == [
        f"attempt {number} of 5" for number in (2, 3, 4, 5)
    ]


def test_ctrl_c_waits_for_no_reply_and_keeps_those_that_came(seeds: str) -> None:
    release, hang = threading.Event(), threading.Event()

    def slow(number: int, prompt: str) -> tuple[int, dict[str, str], str]:
        if number >= 3:
            hang.set()
            release.wait(60)
        return answer(number, prompt)

    with serving(slow) as server:
        command = [sys.executable, "-m", "onlay.cli", "synthesize", seeds, "--model", "m", "--endpoint", server.address]
        process = subprocess.Popen(
            [*command, "--concurrency", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            assert hang.wait(60)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=30)
        finally:
            process.kill()
            release.set()
    assert process.returncode == 130 and "Traceback" not in err
    assert len(Path("seeds-synthetic.replies.jsonl").read_text().splitlines()) == 1 + 3


def test_a_judge_elsewhere(seeds: str) -> None:
    def grade(number: int, prompt: str) -> tuple[int, dict[str, str], str]:
        assert prompt.startswith("You grade")
        return 200, {}, json.dumps({"choices": [{"message": {"content": json.dumps({"score": 3 + number % 2})}}]})

    with serving(answer) as server, serving(grade) as other:
        judge = Speaker(model="j", endpoint=other.address)
        made = synthesize(seeds, model=speaker(server), judge=judge, rows=10)
    assert made.judge is not None and made.judge.startswith("j at ")
    assert made.requests["judge"] == len(other.bodies) == 10 + made.rejected["judged_low"]
    assert "Authorization" not in other.headers[0]


def test_cut_replies_are_known_by_the_servers_word(seeds: str) -> None:
    def cut(number: int, prompt: str) -> tuple[int, dict[str, str], str]:
        status, headers, text = answer(number, prompt)
        return status, headers, text.replace('"stop"', '"length"')

    with serving(cut) as server:
        made = synthesize(seeds, model=speaker(server), rows=5)
    assert made.rows == 0 and made.stopped is not None
    assert made.rejected["cut_off"] == 8 * made.rounds and made.rejected["answer_cut_off"] > 0


def test_what_is_wrong_is_told_and_nothing_is_written(seeds: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there = Speaker(model="m", endpoint="http://127.0.0.1:1/v1")
    before = sorted(Path.cwd().iterdir())
    for call, kind, problem in (
        (lambda: synthesize(seeds, model=Speaker(model="./nothing")), BaseModelError, "there is no such folder"),
        (lambda: synthesize(seeds, model=Speaker(model="pocket", key_variable="X")), SetupError, "X is named for the key, but the model pocket"),
        (lambda: synthesize(seeds, model=Speaker(model="m", endpoint="host")), SetupError, "The model's base_url is no http"),
        (lambda: synthesize(seeds, model=there, judge=Speaker(model="j", endpoint="host")), SetupError, "The judge's base_url is no http"),
        (lambda: synthesize(seeds, model=there, output="out.csv"), OutputError, "does not end in .jsonl"),
        (lambda: synthesize(seeds, model=there, overrides=["training.seed=1"]), RecipeError, "is not about reading a file"),
        (lambda: synthesize(seeds, model=Speaker(model="m", endpoint=there.endpoint, key_variable="NO_KEY")), SetupError, "the model's API key is read"),
    ):  # fmt: skip
        with pytest.raises(kind, match=problem):
            call()
    assert sorted(Path.cwd().iterdir()) == before
    Path("seeds-synthetic.jsonl").write_text("mine")
    with pytest.raises(OutputError, match=r"seeds-synthetic\.jsonl exists already"):
        synthesize(seeds, model=there)
    assert Path("seeds-synthetic.jsonl").read_text() == "mine"


def test_fewer_rows_than_there_are_is_refused(seeds: str) -> None:
    with serving(answer) as server:
        synthesize(seeds, model=speaker(server), rows=8)
        with pytest.raises(OutputError, match="holds 8 rows already, more than the 5 asked for"):
            synthesize(seeds, model=speaker(server), rows=5)


def test_the_bundled_base_is_asked_and_goes_on(seeds: str) -> None:
    """It is too small to write tasks: what is tested is the way, and that every reply is accounted for."""
    settings = Settings(max_new_tokens=12, shown=2)
    made = synthesize(seeds, model=Speaker(model="pocket"), rows=3, settings=settings)
    assert made.requests["tasks"] == 8 * made.rounds
    assert made.answer_tokens > 0 and made.prompt_tokens > made.answer_tokens
    rejected = [json.loads(line) for line in Path(made.rejected_path).read_text().splitlines()]
    assert len(rejected) == sum(made.rejected.values()) > 0
    assert (made.stopped is None) == (made.rows == 3)
    # A second call asks for nothing, so loads nothing but the tokenizer's counts of room.
    again = synthesize(seeds, model=Speaker(model="pocket"), rows=3, settings=settings)
    assert again.requests == {} and (again.rows, again.rejected) == (made.rows, made.rejected)


def test_an_adapter_that_knows_the_form_makes_a_row(seeds: str) -> None:
    """A tiny base that was trained to say one task, whatever it is asked: so the task, then an answer, then duplicates."""
    shown = read_seeds(seeds, DataSection(train=seeds)).tasks
    prompts = [tasks_prompt(shown[i % 3 : i % 3 + 2]) for i in range(20)]
    prompts += [answer_prompt(Written(f"{i} boats now please", ""), shown=shown) for i in range(20)]
    rows = [{"prompt": prompt, "completion": "Task: b b b b"} for prompt in prompts]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_tiny_base(Path("base"), max_position_embeddings=4096)
    train(parse_recipe({
        "model": {"base": "base"}, "adapter": {"rank": 8}, "data": {"train": "rows.jsonl", "max_tokens": 2048},
        "training": {"output": "run", "max_steps": 60, "batch_size": 4, "learning_rate": 0.01}, "evaluation": {"split": None},
    }))  # fmt: skip
    settings = Settings(max_new_tokens=20, shown=2, temperature=0.0)
    made = synthesize(seeds, model=Speaker(model="run"), rows=1, settings=settings)
    [row] = [json.loads(line) for line in Path(made.path).read_text().splitlines()]
    assert (row["instruction"], row["input"], row["source"]) == ("b b b b", "", "synthetic:run")
    assert made.requests == {"tasks": 8, "answers": 1}
    # The base without the adapter knows nothing of tasks.
    plain = synthesize(seeds, model=Speaker(model="base"), rows=1, settings=settings, output="plain.jsonl")
    assert plain.rows == 0 and plain.rejected == {"unreadable_reply": 24}


# -------------------------------------------------------------------------------------------------------- as typed


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """Runs `onlay ARGUMENTS`; (standard output, standard error), the exit code compared."""

    def run(*arguments: str, code: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["onlay", *arguments])
        found = 0
        try:
            cli.main()
        except SystemExit as exit:
            found = int(exit.code or 0)
        out, err = capsys.readouterr()
        assert found == code, err
        return out, err

    return run


def test_as_typed(seeds: str, say: Callable[..., tuple[str, str]]) -> None:
    with serving(answer) as server:
        more = ("--model", "m", "--endpoint", server.address, "--key-variable", "MODEL_KEY", "--concurrency", "2")
        out, _ = say("synthesize", seeds, *more, "--rows", "5", "--prices", "1", "10", "--shown", "2")
        assert out.startswith("seeds-synthetic.jsonl: 5 rows by m at 127.0.0.1:")
        assert "Requests: 8 for tasks, " in out and " USD." in out
        assert "Next: onlay review seeds-synthetic.jsonl --sample 50" in out
        # Another setting for the same output.
        _, err = say("synthesize", seeds, *more, "--rows", "5", "--seed", "3", "--shown", "2", code=2)
        assert "seeds-synthetic.replies.jsonl was begun with seed = 0, not 3." in err and len(err.splitlines()) == 2
        out, _ = say("synthesize", seeds, *more, "--rows", "6", "-o", "o.jsonl", "--json", "--judge", "m",
                     "--judge-endpoint", server.address, "--least-score", "5")  # fmt: skip
        told = json.loads(out)
    assert (told["path"], told["rows"], told["requests"]["judge"]) == ("o.jsonl", 6, 6)


def test_fewer_rows_than_asked_for_exit_with_1(seeds: str, say: Callable[..., tuple[str, str]]) -> None:
    with serving(lambda number, prompt: (200, {}, '{"choices": [{"message": {"content": "no"}}]}')) as server:
        out, _ = say("synthesize", seeds, "--model", "m", "--endpoint", server.address, "--rows", "5", code=1)
    assert "Fewer than the 5 asked for: 3 rounds in a row brought no new row." in out
    assert "refused     24  replies that hold no task in the form asked for" in out
    assert "onlay review" not in out


@pytest.mark.parametrize(("arguments", "problem"), [
    (("seed.jsonl", "--model", "m"), "There is no data file at seed.jsonl."),
    (("seeds.jsonl",), "Missing option '--model'"),
    (("seeds.jsonl", "--model", "m", "--judge-endpoint", "http://h/v1"), "--judge-endpoint and --judge-key-variable say where a judge is"),
    (("seeds.jsonl", "--model", "m", "--endpoint", "host"), "The model's base_url is no http or https address."),
    (("seeds.jsonl", "--model", "m", "--endpoint", "http://h/v1", "--key-variable", "NONE_SUCH"), "The environment variable NONE_SUCH is not set"),
    (("seeds.jsonl", "--model", "m", "--rows", "0"), "Invalid value for '--rows'"),
])  # fmt: skip
def test_errors_are_two_lines_and_exit_code_2(
    seeds: str, say: Callable[..., tuple[str, str]], arguments: tuple[str, ...], problem: str
) -> None:
    before = sorted(Path.cwd().iterdir())
    out, err = say("synthesize", *arguments, code=2)
    lines = err.splitlines()
    assert (out, len(lines)) == ("", 2) and lines[0].startswith(problem)
    out, _ = say("synthesize", *arguments, "--json", code=2)
    assert json.loads(out) == {"error": lines[0], "remedy": lines[1]}
    assert sorted(Path.cwd().iterdir()) == before
