"""Every reply is kept as it comes in, so that a synthesis that was interrupted goes on where it stopped.

What is made is a function of the seeds, the settings and the replies.  So nothing else has to be kept: a second run goes
through the same rounds and asks only for what the file does not hold.  Its first line says what it was begun with.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from onlay.errors import OutputError


@dataclass(frozen=True, slots=True)
class Reply:
    text: str
    cut: bool
    """Whether it ended at the limit of tokens."""


Ask = Callable[[Sequence[str]], Iterable[tuple[int, Reply]]]
"""Prompts to (place of the prompt, reply), each once, in any order, as they come in."""
_HALF = re.compile("[\ud800-\udfff]")
"""JSON may hold half of a pair, which no file of text can."""


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
            key, prompt, text, cut = (values.get(name) for name in ("key", "prompt", "reply", "cut"))
            if not (
                isinstance(key, str) and isinstance(prompt, str) and isinstance(text, str) and isinstance(cut, bool)
            ):
                raise OutputError(f"{self.path}:{number} is no kept reply.", remedy)
            self._known[key] = prompt, Reply(text, cut)
        if whole != content:
            os.truncate(self.path, len(whole))

    def ask(self, prompts: Mapping[str, str], *, ask: Ask, done: Callable[[], None]) -> dict[str, Reply]:
        """The reply of each prompt, under the prompt's key; `done` is called after each.  Raises what `ask` raises."""
        found: dict[str, Reply] = {}
        for key, prompt in prompts.items():
            known = self._known.get(key)
            # A key whose prompt is another one now is asked again: what came before it has changed.
            if known is not None and known[0] == _digest(prompt):
                found[key] = known[1]
        self.kept += len(found)
        missing = [key for key in prompts if key not in found]
        for place, reply in ask([prompts[key] for key in missing]) if missing else ():
            key = missing[place]
            reply = Reply(_HALF.sub("\ufffd", reply.text), reply.cut)
            line = {"key": key, "prompt": _digest(prompts[key]), "reply": reply.text, "cut": reply.cut}
            if not self.path.exists():  # Only now: what goes wrong before the first reply leaves nothing behind.
                _append(self.path, {"settings": self._settings})
            _append(self.path, line)
            found[key] = reply
            self.asked[key.partition("/")[0]] += 1
            done()
        lost = [key for key in missing if key not in found]
        if lost:
            raise ValueError(f"{len(lost)} of {len(missing)} prompts were left without a reply")
        return {key: found[key] for key in prompts}


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
            f"{path} could not be written: {error.strerror}.", "Free disk space; the replies before are kept."
        ) from None
