"""Every reply is kept as it comes in, so that a synthesis that was interrupted goes on where it stopped.

What is made is a function of the seeds, the settings and the replies.  So nothing else has to be kept: a second run goes
through the same rounds and asks only for what the file does not hold.  Its first line says what it was begun with.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from onlay.errors import OutputError, SetupError


@dataclass(frozen=True, slots=True)
class Reply:
    text: str
    cut: bool
    """Whether it ended at the limit of tokens."""
    refused: str | None = None
    """Why the server gave no reply to this prompt, such as HTTP 400; there is no text then."""


Ask = Callable[[Sequence[str]], Iterable[tuple[int, Reply]]]
"""Prompts to (place of the prompt, reply), each once, in any order, as they come in."""
_HALF = re.compile("[\ud800-\udfff]")
"""JSON may hold half of a pair, which no file of text can."""
REFUSALS_THAT_STOP = 8
"""So many refused prompts of a kind, and none that was answered: it is not the prompts."""


class Voice(Protocol):
    """A model that is asked, handed down."""

    @property
    def name(self) -> str:
        """For provenance."""

    def ask(self, temperature: float) -> Ask:
        """0 is greedy."""

    def fits(self, prompt: str) -> bool:
        """Whether the prompt leaves room for its reply, as far as that is known."""


class Replies:
    """A file of replies: one for each key, which names a step of the synthesis."""

    def __init__(self, path: Path, *, settings: Mapping[str, Any]) -> None:
        """`settings`: what the replies depend on.  Raises OutputError for a file that was begun with others, or that is no
        file of replies."""
        self.path, self._settings = path, dict(settings)
        self._known: dict[str, tuple[str, Reply]] = {}
        self.asked: Counter[str] = Counter()
        """Requests made now, by kind: the key up to its first slash."""
        self.kept = 0
        """Replies that did not have to be asked for."""
        if path.exists():
            self._read()

    def _read(self) -> None:
        remedy = f"Go on with the same settings, or choose another output (or delete {self.path} to begin anew)."
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise OutputError(f"{self.path} cannot be read: {error.strerror}.", "Check its permissions.") from None
        # What follows the last line end was being written when the program was killed.
        whole = content[: content.rfind(b"\n") + 1]
        lines = [_object(line) for line in whole.splitlines()]
        begun = lines[0].get("settings") if lines and lines[0] is not None else None
        if not isinstance(begun, dict):
            raise OutputError(f"{self.path} is no file of kept replies.", "Choose another output, or move it away.")
        settings = self._settings
        changed = [name for name in sorted(begun.keys() | settings.keys()) if begun.get(name) != settings.get(name)]
        if changed:
            told = ", ".join(f"{name} = {begun.get(name)!r}, not {settings.get(name)!r}" for name in changed)
            raise OutputError(f"{self.path} was begun with {told}.", remedy)
        for number, line in enumerate(lines[1:], 2):
            values = line or {}
            key, prompt, text, cut, why = (values.get(name) for name in ("key", "prompt", "reply", "cut", "refused"))
            if not (
                isinstance(key, str) and isinstance(prompt, str) and isinstance(text, str) and isinstance(cut, bool)
                and isinstance(why, str | None)
            ):  # fmt: skip
                raise OutputError(f"{self.path}:{number} is no kept reply.", remedy)
            self._known[key] = prompt, Reply(text, cut, why)
        if whole != content:
            os.truncate(self.path, len(whole))

    def ask(self, prompts: Mapping[str, str], *, ask: Ask, done: Callable[[], None]) -> dict[str, Reply]:
        """The reply of each prompt, under the prompt's key; `done` is called after each.  Raises what `ask` raises, and
        SetupError where prompts of a kind are refused and none is answered: these refusals are not kept."""
        found: dict[str, Reply] = {}
        for key, prompt in prompts.items():
            known = self._known.get(key)
            # A key whose prompt is another one now is asked again: what came before it has changed.
            if known is not None and known[0] == _digest(prompt):
                found[key] = known[1]
        self.kept += len(found)
        missing = [key for key in prompts if key not in found]
        refused: list[str] = []
        for place, reply in ask([prompts[key] for key in missing]) if missing else ():
            key = missing[place]
            found[key] = Reply(_HALF.sub("\ufffd", reply.text), reply.cut, reply.refused)
            self.asked[_kind(key)] += 1
            if reply.refused is not None:
                refused.append(key)
            else:
                self._keep(key, prompts[key], found[key])
            done()
        self._check_refusals(refused, found)
        for key in refused:
            self._keep(key, prompts[key], found[key])
        lost = [key for key in missing if key not in found]
        if lost:
            raise ValueError(f"{len(lost)} of {len(missing)} prompts were left without a reply")
        return {key: found[key] for key in prompts}

    def _keep(self, key: str, prompt: str, reply: Reply) -> None:
        line = {"key": key, "prompt": _digest(prompt), "reply": reply.text, "cut": reply.cut}
        if reply.refused is not None:
            line["refused"] = reply.refused
        if not self.path.exists():  # Only now: what goes wrong before the first reply leaves nothing behind.
            _append(self.path, {"settings": self._settings})
        _append(self.path, line)
        self._known[key] = _digest(prompt), reply

    def _check_refusals(self, refused: Sequence[str], found: Mapping[str, Reply]) -> None:
        if not refused:
            return
        kind = _kind(refused[0])
        of_kind = {key: reply for key, (_, reply) in self._known.items() if _kind(key) == kind} | dict(found)
        if len(of_kind) >= REFUSALS_THAT_STOP and all(reply.refused is not None for reply in of_kind.values()):
            raise SetupError(
                f"Every one of {len(of_kind)} requests for {KINDS[kind]} was refused: {found[refused[0]].refused}.",
                "Check the model's name and its base_url, and that prompt and reply fit its context (--shown, --max-new-tokens).",
            )


KINDS = {"tasks": "tasks", "answers": "answers", "judge": "grades"}
"""What the steps of a synthesis ask for, by the key up to its first slash."""


def _kind(key: str) -> str:
    return key.partition("/")[0]


def _digest(prompt: str) -> str:
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _append(path: Path, values: Mapping[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(json.dumps(values).encode() + b"\n")
    except OSError as error:
        raise OutputError(
            f"{path} could not be written: {error.strerror}.",
            "Free disk space, or make it writable; the same command goes on with the replies that are kept.",
        ) from None


def check_writable(*paths: Path) -> None:
    """Raises OutputError before anything is asked for, and paid for, that could not be kept."""
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path.parent):
                pass
            if path.exists():
                path.open("ab").close()
        except OSError as error:
            raise OutputError(
                f"{path} cannot be written: {error.strerror}.",
                "Choose another place with --output, or make this one a file in a folder that you may write to.",
            ) from None
