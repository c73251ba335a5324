"""A model behind an OpenAI-compatible endpoint: POST {base_url}/chat/completions, by the standard library alone.

The key is read from an environment variable when a request is made; it is in no record, error or representation, and
redirects are not followed, since they would carry it to another host.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from queue import Empty, SimpleQueue
from threading import Event, Lock, Thread, Timer
from typing import Any, Self
from urllib.parse import urlsplit

from onlay.errors import OnlayError, SetupError

RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)
"""HTTP statuses that may pass; every other one stops the asking at once."""
OF_THE_PROMPT = (400, 413, 422)
"""HTTP statuses that may be about one prompt, such as a content filter's or a context's that is too short."""
FIRST_DELAY_SECONDS = 1.0
LONGEST_DELAY_SECONDS = 60.0
REPLY_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class Completion:
    """One reply."""

    text: str
    cut: bool
    """Whether it ended at `max_tokens`, by the server's word."""
    refused: int | None = None
    """The HTTP status where the server refused the prompt: there is no text then."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


class _Line(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """One request's connection: ended from another thread at its deadline, or when nobody waits for the reply any more."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.late = self._ended = False
        self._socket: socket.socket | None = None
        self._timer = Timer(seconds, self._run_late)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def _run_late(self) -> None:
        self.late = True
        self.end()

    def end(self) -> None:
        """Whoever reads from it gets to its end at once."""
        self._ended = True
        if self._socket is not None:
            with contextlib.suppress(OSError):  # It is closed already.
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # Past TLS, which would wait for the other side.

    def http_open(self, request: urllib.request.Request) -> HTTPResponse:
        return self.do_open(self._connection(HTTPConnection), request)

    def https_open(self, request: urllib.request.Request) -> HTTPResponse:
        return self.do_open(self._connection(HTTPSConnection), request)

    def _connection(self, kind: type[HTTPConnection]) -> Any:
        def connect(connection: HTTPConnection) -> None:
            kind.connect(connection)
            self._socket = connection.sock
            if self._ended:
                self.end()

        return type("Connection", (kind,), {"connect": connect})


@dataclass(kw_only=True, slots=True)
class Endpoint:
    """`ask` is what `onlay.evaluation.judge.judge_pairs` and `onlay.evaluation.safety.score_safety` take."""

    base_url: str
    """Such as https://host/v1."""
    model: str
    key_variable: str | None = None
    """Name of the environment variable that holds the API key; None: no key is sent."""
    max_tokens: int = 512
    timeout_seconds: float = 60.0
    """Of one attempt, until its reply is there as a whole."""
    attempts: int = 5
    """Of one request, the first included; waits of 1, 2, 4, ... seconds between them, or what Retry-After asks for."""
    concurrency: int = 4
    temperature: float = 0.0
    part: str = "judge"
    """What errors call it: the judge's, the model's."""
    keep_refusals: bool = False
    """Whether a prompt that the server refuses by a status of OF_THE_PROMPT has a reply that says so; else it is an error."""
    tell: Callable[[str], None] | None = None
    """Told, in the caller's thread, that a server of which nothing was read yet is tried again."""
    retries: int = field(default=0, init=False)
    """Attempts after the first, over all requests so far."""
    prompt_tokens: int = field(default=0, init=False)
    """Of all replies so far, as the server counts them in `usage`; 0 where it does not."""
    answer_tokens: int = field(default=0, init=False)
    _answered: bool = field(default=False, init=False, repr=False)
    _lock: Any = field(default_factory=Lock, init=False, repr=False)
    _lines: set[_Line] = field(default_factory=set, init=False, repr=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        # The address itself is not told: it may hold a password.
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SetupError(
                f"The {self.part}'s base_url is no http or https address.", "Give one such as https://host/v1."
            )
        if parts.username or parts.password or parts.query or parts.fragment:
            raise SetupError(
                f"The {self.part}'s base_url at {parts.hostname} holds a user, a password, a query or a fragment.",
                "Give the plain address, and the name of an environment variable for the key.",
            )
        for name in ("attempts", "concurrency", "max_tokens"):
            if getattr(self, name) < 1:
                raise SetupError(f"The {self.part}'s {name} is {getattr(self, name)}, below 1.", "Give 1 or more.")

    @property
    def name(self) -> str:
        """Which model, where: for records and cache keys."""
        return f"{self.model} at {urlsplit(self.base_url).netloc}"

    def ask(self, prompts: Sequence[str]) -> Iterator[tuple[int, str]]:
        """(place, the reply's text) of each prompt: see `complete`."""
        return ((place, reply.text) for place, reply in self.complete(prompts))

    def complete(self, prompts: Sequence[str]) -> Iterator[tuple[int, Completion]]:
        """(place, reply) of each prompt as it comes in, at most `concurrency` at once.

        Raises SetupError for a missing key, a refused request, or one that failed `attempts` times; what is under way
        then is still handed out, and nothing new is begun.  A KeyboardInterrupt waits for nothing: what came in before it
        is handed out, and what is under way is given up.
        """
        key = self._key()
        failure: OnlayError | None = None
        stop = Event()
        to_ask: SimpleQueue[tuple[int, str]] = SimpleQueue()
        for one in enumerate(prompts):
            to_ask.put(one)
        came: SimpleQueue[_Came] = SimpleQueue()
        # Not an executor's threads, for which the interpreter would wait at its end.
        threads = [
            Thread(target=self._work, args=(to_ask, came, key, stop), daemon=True)
            for _ in range(min(self.concurrency, len(prompts)))
        ]
        told = replies = 0
        try:
            for thread in threads:
                thread.start()
            running = len(threads)
            while running:
                what = came.get()
                if what is None:
                    running -= 1
                elif isinstance(what, _Retry):
                    if self.tell is not None and what.attempt > told and not self._answered:
                        told = what.attempt
                        self.tell(
                            f"{self.name}: {what.why}; attempt {told + 1} of {self.attempts} in {what.seconds:.0f} s"
                        )
                elif isinstance(what, OnlayError):
                    failure = failure or what
                else:
                    replies += 1
                    yield what
        except KeyboardInterrupt:
            while True:
                try:
                    what = came.get_nowait()
                except Empty:
                    break
                if isinstance(what, tuple):
                    yield what
            raise
        finally:
            stop.set()
            with self._lock:
                lines = list(self._lines)
            for line in lines:
                line.end()
        if failure is not None:
            raise failure
        if replies < len(prompts):  # A thread ended by an error that is none of a server's, and printed it.
            raise RuntimeError(f"{len(prompts) - replies} of {len(prompts)} prompts were left without a reply")

    def _work(
        self, to_ask: SimpleQueue[tuple[int, str]], came: SimpleQueue[_Came], key: str | None, stop: Event
    ) -> None:
        """One thread's part; None says that it has ended."""
        try:
            while not stop.is_set():
                place, prompt = to_ask.get_nowait()
                reply = self._reply(prompt, key, stop, came)
                if reply is not None:
                    came.put((place, reply))
        except Empty:
            pass
        except OnlayError as error:
            stop.set()
            came.put(error)
        finally:
            came.put(None)

    def _key(self) -> str | None:
        if self.key_variable is None:
            return None
        key = os.environ.get(self.key_variable, "").strip()
        if not key:
            raise SetupError(
                f"The environment variable {self.key_variable} is not set; the {self.part}'s API key is read from it.",
                f"export {self.key_variable}=... first.",
            )
        if not key.isascii() or not key.isprintable():
            raise SetupError(
                f"The environment variable {self.key_variable} holds characters that no API key has.", "Set it again."
            )
        return key

    def _reply(self, prompt: str, key: str | None, stop: Event, came: SimpleQueue[_Came]) -> Completion | None:
        """None once another request has failed for good: then nothing is begun or tried again."""
        why = ""
        for attempt in range(self.attempts):
            if stop.is_set():
                return None
            if attempt:
                with self._lock:
                    self.retries += 1
            asked = None
            try:
                return self._text(self._post(prompt, key), key)
            except urllib.error.HTTPError as error:
                why = f"HTTP {error.code}"
                asked = error.headers.get("Retry-After")
                error.close()
                if self.keep_refusals and error.code in OF_THE_PROMPT:
                    return Completion("", False, error.code)
                if error.code not in RETRIED:
                    raise self._refused(error.code) from None
            except _NoCompletionError:
                why = "something that is not an OpenAI chat completion"
            except (OSError, HTTPException) as error:
                reason = error.reason if isinstance(error, urllib.error.URLError) else error
                why = "no reply in time" if isinstance(reason, TimeoutError) else type(reason).__name__
            if attempt + 1 < self.attempts:
                seconds = delay_seconds(attempt, retry_after=asked)
                came.put(_Retry(attempt + 1, why, seconds))
                stop.wait(seconds)
        if self._answered:
            remedy = (
                "Try again later: replies that are kept in a file are not asked for again. Or lower the concurrency."
            )
        else:
            remedy = f"Nothing was read from it: check the {self.part}'s base_url (it usually ends in /v1), and that the server runs."
        raise SetupError(
            f"The {self.part} {self.name} gave no reply in {self.attempts} attempts; the last: {why}.", remedy
        )

    def _post(self, prompt: str, key: str | None) -> bytes:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        address = self.base_url.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(address, data=json.dumps(body).encode(), headers=headers)
        with _Line(self.timeout_seconds) as line:
            with self._lock:
                self._lines.add(line)
            try:
                opener = urllib.request.build_opener(_NoRedirect, line)
                with opener.open(request, timeout=self.timeout_seconds) as response:
                    content: bytes = response.read(REPLY_BYTES)
            except (OSError, HTTPException):
                if line.late:
                    raise TimeoutError from None
                raise
            finally:
                with self._lock:
                    self._lines.discard(line)
            if line.late:  # What was read is but a part.
                raise TimeoutError
            return content

    def _text(self, content: bytes, key: str | None) -> Completion:
        """The reply's words.  A server that echoes the key does not get it into a file."""
        try:
            value = json.loads(content)
            choice = value["choices"][0]
            text = choice["message"]["content"] or ""
            if not isinstance(text, str):
                raise TypeError
        except (ValueError, LookupError, TypeError, RecursionError):
            raise _NoCompletionError from None
        self._answered = True
        self._count(value.get("usage"))
        return Completion(text.replace(key, "[key]") if key else text, choice.get("finish_reason") == "length")

    def _count(self, usage: Any) -> None:
        counts = [
            usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")
        ]
        prompt, answer = (count if isinstance(count, int) else 0 for count in counts)
        with self._lock:
            self.prompt_tokens += prompt
            self.answer_tokens += answer

    def _refused(self, status: int) -> SetupError:
        # The body is not told: servers repeat parts of the key in it.
        remedies = {
            401: f"Check the key in {self.key_variable or 'key_variable (none is sent now)'}.",
            403: f"Check what the key in {self.key_variable or 'key_variable (none is sent now)'} may do.",
            404: f"Check the {self.part}'s base_url (it usually ends in /v1) and its model.",
        }
        what = "a redirect, which is not followed" if 300 <= status < 400 else "refused"
        return SetupError(
            f"The {self.part} {self.name} answered HTTP {status}: {what}.",
            remedies.get(status, f"Check the {self.part}'s base_url and model, and that the prompts fit its context."),
        )


class _NoCompletionError(Exception):
    """A reply with status 200 that is something else: what stands before a server answers so while it starts or fails."""


@dataclass(frozen=True, slots=True)
class _Retry:
    attempt: int
    """Those that have failed."""
    why: str
    seconds: float


_Came = tuple[int, Completion] | OnlayError | _Retry | None


def delay_seconds(attempt: int, *, retry_after: str | None) -> float:
    """How long to wait after a failed attempt, counted from 0: what Retry-After says in seconds (a date there is not
    read), else 1, 2, 4, ...; never over a minute."""
    try:
        asked = float(retry_after or "")
    except ValueError:
        asked = math.nan
    wait = asked if math.isfinite(asked) and asked > 0 else FIRST_DELAY_SECONDS * 2**attempt
    return min(wait, LONGEST_DELAY_SECONDS)
