"""A model behind an OpenAI-compatible endpoint: POST {base_url}/chat/completions, by the standard library alone.

The key is read from an environment variable when a request is made; it is in no record, error or representation, and
redirects are not followed, since they would carry it to another host.
"""

from __future__ import annotations

import json
import math
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from http.client import HTTPException
from threading import Event, Lock
from typing import Any
from urllib.parse import urlsplit

from onlay.errors import OnlayError, SetupError

RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)
"""HTTP statuses that may pass; every other one stops the judging at once."""
FIRST_DELAY_SECONDS = 1.0
LONGEST_DELAY_SECONDS = 60.0
REPLY_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class Completion:
    """One reply."""

    text: str
    cut: bool
    """Whether it ended at `max_tokens`, by the server's word."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


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
    """Of one attempt, between two parts of a reply."""
    attempts: int = 5
    """Of one request, the first included; waits of 1, 2, 4, ... seconds between them, or what Retry-After asks for."""
    concurrency: int = 4
    temperature: float = 0.0
    part: str = "judge"
    """What errors call it: the judge's, the model's."""
    retries: int = field(default=0, init=False)
    """Attempts after the first, over all requests so far."""
    prompt_tokens: int = field(default=0, init=False)
    """Of all replies so far, as the server counts them in `usage`; 0 where it does not."""
    answer_tokens: int = field(default=0, init=False)
    _lock: Any = field(default_factory=Lock, init=False, repr=False)

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
        then is still handed out, and nothing new is begun.
        """
        key = self._key()
        failure: OnlayError | None = None
        stop = Event()
        pool = ThreadPoolExecutor(max_workers=self.concurrency)
        try:
            places = {pool.submit(self._reply, prompt, key, stop): place for place, prompt in enumerate(prompts)}
            for future in as_completed(places):
                problem = future.exception()
                if isinstance(problem, OnlayError):
                    failure = failure or problem
                elif problem is not None:
                    raise problem
                elif (reply := future.result()) is not None:
                    yield places[future], reply
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
        if failure is not None:
            raise failure

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

    def _reply(self, prompt: str, key: str | None, stop: Event) -> Completion | None:
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
            except OnlayError:
                stop.set()
                raise
            except urllib.error.HTTPError as error:
                why = f"HTTP {error.code}"
                asked = error.headers.get("Retry-After")
                error.close()
                if error.code not in RETRIED:
                    stop.set()
                    raise self._refused(error.code) from None
            except (TimeoutError, urllib.error.URLError, HTTPException, ConnectionError) as error:
                reason = error.reason if isinstance(error, urllib.error.URLError) else error
                why = "no reply in time" if isinstance(reason, TimeoutError) else type(reason).__name__
            if attempt + 1 < self.attempts:
                stop.wait(delay_seconds(attempt, retry_after=asked))
        stop.set()
        raise SetupError(
            f"The {self.part} {self.name} gave no reply in {self.attempts} attempts; the last: {why}.",
            "Try again later: replies that are kept in a file are not asked for again. Or lower the concurrency.",
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
        opener = urllib.request.build_opener(_NoRedirect)
        with opener.open(request, timeout=self.timeout_seconds) as response:
            content: bytes = response.read(REPLY_BYTES)
            return content

    def _text(self, content: bytes, key: str | None) -> Completion:
        """The reply's words.  A server that echoes the key does not get it into a file."""
        try:
            value = json.loads(content)
            choice = value["choices"][0]
            text = choice["message"]["content"] or ""
            if not isinstance(text, str):
                raise TypeError
        except (ValueError, LookupError, TypeError):
            raise SetupError(
                f"The {self.part} {self.name} answered with something that is not an OpenAI chat completion.",
                f"Check the {self.part}'s base_url; it usually ends in /v1.",
            ) from None
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


def delay_seconds(attempt: int, *, retry_after: str | None) -> float:
    """How long to wait after a failed attempt, counted from 0: what Retry-After says in seconds (a date there is not
    read), else 1, 2, 4, ...; never over a minute."""
    try:
        asked = float(retry_after or "")
    except ValueError:
        asked = math.nan
    wait = asked if math.isfinite(asked) and asked > 0 else FIRST_DELAY_SECONDS * 2**attempt
    return min(wait, LONGEST_DELAY_SECONDS)
