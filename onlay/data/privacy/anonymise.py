"""Personal data in conversations and documents replaced, by pseudonyms or by what kind it was; and looked for again.

item ──find──▶ spans ──one person named whole and in part──▶ identities ──token or [EMAIL]──▶ item ──find──▶ what remains

Prompts, answers, reasoning, names of participants, the texts in tool calls and in the descriptions of tools are replaced.  Keys of JSON objects
and names of functions are not, since they are the program's; `remaining` looks at them too.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from onlay.data.privacy.detect import THRESHOLD, find
from onlay.data.privacy.key import Key
from onlay.data.privacy.names import Names
from onlay.data.privacy.pseudonyms import LABELS, REDACTED, TOKEN, Pseudonyms, Vault, normalised
from onlay.data.privacy.spans import KINDS, Span
from onlay.data.read import Conversation, Document, ToolCall, Turn
from onlay.errors import DataError, SetupError
from onlay.recipe import digest_of

REPLACED = frozenset(KINDS) - {"url"}
"""A web address without a password names a site, seldom a person; it is replaced where it is asked for."""
VERSION = 2
"""Raise it when the rules would replace other spans of the same text."""
Mode = Literal["pseudonyms", "redact"]
FILLER = "\ufdd0"
"""Stands in for tokens while a text is searched: neither word nor space, and never a character of text.  Places stay as they are."""


class Anonymiser:
    """`counts` (replaced spans by kind) and `pseudonyms.texts` grow with every item; a worker's are sent back with `taken`
    and added with `merge`.  What an item becomes depends on the item, the key and the settings alone."""

    def __init__(
        self, mode: Mode, *, key: Key | None = None, kinds: frozenset[str] | None = None, names: Names | None = None,
        threshold: float = THRESHOLD,
    ) -> None:  # fmt: skip
        """`kinds`: what is replaced, None for all but `url`; `threshold`: least score of a span that is.
        Raises DataError for an unknown mode or kind, SetupError for pseudonyms without a key."""
        if mode not in ("pseudonyms", "redact"):
            raise DataError(f"data.anonymise = {mode!r} is not known.", "Known: off, pseudonyms, redact.")
        self.kinds = REPLACED if kinds is None else kinds
        if not self.kinds <= set(KINDS):
            raise DataError(
                f"{', '.join(sorted(self.kinds - set(KINDS)))} is no kind of personal data.",
                f"Known kinds: {', '.join(KINDS)}.",
            )
        if mode == "pseudonyms" and key is None:
            raise SetupError("Pseudonyms need a key.", "Set data.anonymise_key to a file, or to env:NAME; or redact.")
        self.mode: Mode = mode
        self.names = names
        self.threshold = threshold
        self.counts: Counter[str] = Counter()
        self.pseudonyms = Pseudonyms(key) if mode == "pseudonyms" and key is not None else None

    @property
    def digest(self) -> str:
        """Of everything that decides what an item becomes; of the key only its fingerprint."""
        key = None if self.pseudonyms is None else self.pseudonyms.key.fingerprint
        names = None if self.names is None else self.names.description
        return digest_of([VERSION, self.mode, sorted(self.kinds), self.threshold, names, key])

    def anonymise(self, item: Conversation | Document) -> Conversation | Document:
        """The item with everything replaced that `find` sees; an item with nothing to replace is returned as it is."""
        while True:
            # Once is nearly always enough.  A text may show something new when what stood beside it is gone; every round takes
            # at least one span away and adds none.
            found = {text: spans for text in set(texts_of(item)) if (spans := self._find(text))}
            if not found:
                return item
            whole = _persons(span for spans in found.values() for span in spans)
            replaced = {text: self._replaced(text, spans, whole) for text, spans in found.items()}
            for text in texts_of(item):
                self.counts.update(span.kind for span in found.get(text, ()))
            item = _mapped(item, lambda text: replaced.get(text, text))  # noqa: B023

    def remaining(self, item: Conversation | Document) -> list[Span]:
        """What would have to be replaced still, wherever in the item; empty after `anonymise`, but for what stands in keys of
        JSON objects and names of functions."""
        return [span for text in (*texts_of(item), *_kept(item)) for span in self._find(text)]

    def taken(self) -> tuple[Counter[str], dict[str, str]]:
        """Counts and pseudonyms since the last call, to be sent to another process and merged there."""
        taken = self.counts, {} if self.pseudonyms is None else self.pseudonyms.texts
        self.counts = Counter()
        if self.pseudonyms is not None:
            self.pseudonyms.texts = {}
        return taken

    def merge(self, counts: Mapping[str, int], texts: Mapping[str, str]) -> None:
        self.counts.update(counts)
        if self.pseudonyms is not None:
            self.pseudonyms.add(texts)

    def _find(self, text: str) -> list[Span]:
        tokens = (
            [found.span() for marks in (TOKEN, REDACTED) for found in marks.finditer(text)]
            if text.count("_") or "[" in text
            else []
        )
        searched = text
        for start, end in tokens:
            searched = searched[:start] + FILLER * (end - start) + searched[end:]
        spans = find(searched, kinds=self.kinds, names=self.names, threshold=self.threshold)
        return [span for span in spans if all(span.end <= start or end <= span.start for start, end in tokens)]

    def _replaced(self, text: str, spans: list[Span], whole: Mapping[str, str]) -> str:
        parts, last = [], 0
        for span in spans:
            parts += [text[last : span.start], self._token(span, whole)]
            last = span.end
        return "".join([*parts, text[last:]])

    def _token(self, span: Span, whole: Mapping[str, str]) -> str:
        if self.pseudonyms is None:
            return f"[{LABELS[span.kind]}]"
        identity = whole.get(normalised("name", span.text)) if span.kind == "name" else None
        return self.pseudonyms.token(span.kind, span.text, identity=identity)


def restore_item(item: Conversation | Document, vault: Vault) -> Conversation | Document:
    """The item as it was before `anonymise` with pseudonyms.  Raises SetupError as `Vault.restore` does."""
    return _mapped(item, vault.restore)


def _persons(spans: Iterator[Span]) -> dict[str, str]:
    """First and last words of names to the whole name, where the item has only one person whom they fit."""
    names = {normalised("name", span.text) for span in spans if span.kind == "name"}
    whole: dict[str, set[str]] = {}
    for name in names:
        words = name.split(" ")
        for part in {words[0], words[-1]} if len(words) > 1 else ():
            whole.setdefault(part, set()).add(name)
    return {part: of.pop() for part, of in whole.items() if len(of) == 1}


# -------------------------------------------------------------------------------------------------------- texts of an item


def texts_of(item: Conversation | Document) -> Iterator[str]:
    """Every text in which personal data is looked for and replaced."""
    seen: list[str] = []

    def look(text: str) -> str:
        seen.append(text)
        return text

    _mapped(item, look)
    yield from seen


def _mapped(item: Conversation | Document, change: Callable[[str], str]) -> Conversation | Document:
    if isinstance(item, Document):
        return dataclasses.replace(item, text=change(item.text))
    tools = tuple(_mapped_tool(tool, change) for tool in item.tools)
    return dataclasses.replace(item, turns=tuple(_mapped_turn(turn, change) for turn in item.turns), tools=tools)


def _mapped_turn(turn: Turn, change: Callable[[str], str]) -> Turn:
    calls = tuple(ToolCall(call.name, _mapped_json(call.arguments, change), call.id) for call in turn.tool_calls)
    return dataclasses.replace(
        turn, content=change(turn.content), tool_calls=calls, reasoning=change(turn.reasoning) if turn.reasoning else turn.reasoning,
        # The name of a tool's turn is the function's.
        name=change(turn.name) if turn.name and turn.role != "tool" else turn.name,
    )  # fmt: skip


def _mapped_json(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped_json(inner, change) for key, inner in value.items()}
    if isinstance(value, list):
        return [_mapped_json(inner, change) for inner in value]
    return value


def _mapped_tool(tool: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """All texts of a tool's description, but the names of functions."""
    mapped: dict[str, Any] = {}
    for key, value in tool.items():
        mapped[key] = (
            value
            if key == "name" and isinstance(value, str)
            else _mapped_tool(value, change)
            if isinstance(value, dict)
            else _mapped_json(value, change)
        )
    return mapped


def _kept(item: Conversation | Document) -> Iterator[str]:
    """Texts that are never replaced."""
    if isinstance(item, Document):
        return
    for turn in item.turns:
        if turn.role == "tool" and turn.name:
            yield turn.name
        for call in turn.tool_calls:
            yield call.name
            yield from _keys(call.arguments)
    for tool in item.tools:
        yield from _keys(tool)
        yield from _function_names(tool)


def _keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _keys(inner)


def _function_names(tool: dict[str, Any]) -> Iterator[str]:
    for key, value in tool.items():
        if key == "name" and isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            yield from _function_names(value)
