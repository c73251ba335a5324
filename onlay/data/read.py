"""Turns rows into conversations or documents, by the format they are in.  Raises DataError.

Row ──detect_format──▶ format ──parse──▶ Conversation (turns, tools) | Document (text)
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from onlay.data.sources import Row, read_rows, source_digest, type_name
from onlay.data.turns import (
    NEEDS,
    Conversation,
    Document,
    ToolCall,
    Turn,
    parse_turn,
    tools_of,
    whole,
    wrong,
)  # fmt: skip
from onlay.errors import DataError
from onlay.recipe import DataSection

__all__ = [
    "ALPACA_INPUTS", "DETECTION_ROWS", "Conversation", "Document", "Scan", "ToolCall", "Turn", "detect_format", "parse",
    "prompt_key", "read_items", "scan",
]  # fmt: skip

DETECTION_ROWS = 20
ALPACA_INPUTS, ALPACA_OUTPUTS = ("input", "context"), ("output", "response")
PAIRS = {
    "prompt": ("completion", "response", "answer", "output"),
    "question": ("answer", "response", "output"),
    "query": ("response", "answer", "completion", "output"),
    "instruction": ("completion", "answer"),
    "input": ("output", "response", "answer", "completion"),
}
FIELDS_REMEDY = (
    "Name your columns with data.prompt_field and data.answer_field, data.messages_field, or data.text_field."
)


@dataclass(frozen=True, slots=True, eq=False)
class Scan:
    """What one pass over a source found."""

    source: str
    format: str
    rows: int
    digest: str
    """SHA-256 of the file's bytes; of the fingerprint for a hub data set."""
    prompt_keys: np.ndarray
    """uint64, one for each row, in order: equal where everything before the last answer is equal."""


# ---------------------------------------------------------------------------------------------------------- formats


def detect_format(first_rows: list[Row], section: DataSection) -> str:
    """The format of a source by its first rows, or `data.format` where it is set.  Raises DataError."""
    if section.format != "auto":
        return section.format
    if section.messages_field:
        turns = _as_list(first_rows[0].values.get(section.messages_field)) if first_rows else None
        return "sharegpt" if turns and isinstance(turns[0], dict) and "from" in turns[0] else "messages"
    if section.text_field:
        return "text"
    if section.prompt_field or section.answer_field:
        return "prompt_completion"
    for row in first_rows:
        found = _format_of(row.values)
        if found:
            return found
    row = first_rows[0]
    columns = _columns(row, 20) or "none"
    raise DataError(
        f"{row.place}: no known format has these columns: {columns}. Known: instruction + output; prompt + completion; "
        "question + answer; messages; conversations; text; text + label.",
        FIELDS_REMEDY,
    )


def _format_of(values: dict[str, Any]) -> str | None:
    present = {name for name, value in values.items() if value is not None}
    for name in ("messages", "conversations", "conversation"):
        turns = _as_list(values.get(name))
        if turns and isinstance(turns[0], dict):
            return "sharegpt" if "from" in turns[0] else "messages"
    if "instruction" in present and present & set(ALPACA_OUTPUTS):
        return "alpaca"
    if _pair_of(present) is not None:
        return "prompt_completion"
    if "text" in present and ("label" in present or "label_text" in present):
        return "classification"
    if "text" in present:
        return "text"
    return None


def _pair_of(present: set[str]) -> tuple[str, str] | None:
    """Which of these columns are a prompt and its answer."""
    for prompt, answers in PAIRS.items():
        answer = next((name for name in answers if name in present), None)
        if prompt in present and answer is not None:
            return prompt, answer
    return None


def parse(row: Row, format: str, section: DataSection) -> Conversation | Document:
    """The row as a conversation or document.  Raises DataError that names file, row and field, and has a code."""
    _refuse_other_format(row, format, section)
    if format == "text":
        return Document(_text(row, section.text_field or "text", format), row.place)
    if format in ("messages", "sharegpt"):
        return _parse_messages(row, format, section)
    if format == "classification":
        prompt, answer = section.prompt_field or section.text_field or "text", section.answer_field
        label = _first_present(row, ("label_text", "label"), format) if answer is None else answer
        return _conversation(row, section, _text(row, prompt, format), _label(row, label))
    if format == "alpaca":
        instruction = _text(row, section.prompt_field or "instruction", format)
        extra = next((name for name in ALPACA_INPUTS if row.values.get(name) is not None), None)
        if extra is not None:
            given = _text(row, extra, format, blank=True)
            instruction = f"{instruction}\n\n{given}" if given.strip() else instruction
        return _conversation(
            row,
            section,
            instruction,
            _text(row, section.answer_field or _first_present(row, ALPACA_OUTPUTS, format), format),
        )
    return _parse_pair(row, section)


def _parse_pair(row: Row, section: DataSection) -> Conversation:
    format = "prompt_completion"
    prompt = section.prompt_field
    if prompt is None:
        present = {name for name, value in row.values.items() if value is not None}
        pairs = [name for name, answers in PAIRS.items() if section.answer_field or not present.isdisjoint(answers)]
        prompt = _first_present(row, tuple(pairs) or tuple(PAIRS), format)
    answers = PAIRS.get(prompt) or tuple(dict.fromkeys(itertools.chain(*PAIRS.values())))
    answer = section.answer_field or _first_present(row, tuple(name for name in answers if name != prompt), format)
    asked, answered = row.values.get(prompt), row.values.get(answer)
    if isinstance(asked, list) or isinstance(answered, list):
        items = _turn_list(row, prompt, "user", format) + _turn_list(row, answer, "assistant", format)
        turns = tuple(parse_turn(row, field, item, format) for field, item in items)
        return _checked(row, section, turns, format, answer)
    return _conversation(row, section, _text(row, prompt, format), _text(row, answer, format))


def _turn_list(row: Row, field: str, role: str, format: str) -> list[tuple[str, Any]]:
    value = row.values.get(field)
    if isinstance(value, list):
        return [(f"{field}[{i}]", item) for i, item in enumerate(value)]
    return [(field, {"role": role, "content": _text(row, field, format)})]


def _conversation(row: Row, section: DataSection, prompt: str, answer: str) -> Conversation:
    return Conversation(
        _with_system(row, section, (Turn("user", prompt), Turn("assistant", answer))), tools_of(row), row.place
    )


def _with_system(row: Row, section: DataSection, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    if any(turn.role == "system" for turn in turns):
        return turns
    system = row.values.get("system")
    if system is not None and not isinstance(system, str):
        raise DataError(
            f"{row.place}, field system: it is {type_name(system)}, not text.",
            "The system message is text; leave it out where there is none.",
            code="wrong_type",
            row=row.number,
        )
    system = whole(row, "system", system) if system and system.strip() else section.system
    return (Turn("system", system), *turns) if system else turns


def _first_present(row: Row, names: tuple[str, ...], format: str) -> str:
    for name in names:
        if row.values.get(name) is not None:
            return name
    return next((name for name in names if name in row.values), names[0])


def _text(row: Row, field: str, format: str, *, blank: bool = False) -> str:
    value = row.values.get(field)
    if isinstance(value, str):
        if value.strip() or blank:
            return whole(row, field, value)
        raise DataError(
            f"{row.place}, field {field}: it is empty.",
            f"{NEEDS[format]}, none of them empty. Fill it, or delete the row.",
            code="empty_field",
            row=row.number,
        )
    if value is None:
        raise _missing(row, field, format)
    raise wrong(row, f"{field}: it is {type_name(value)}, not text", f"{NEEDS[format]}, each of them text.")


def _columns(row: Row, most: int) -> str:
    """Names of columns, for an error; a column's name may hold half a character too."""
    return ", ".join(list(row.values)[:most]).encode("utf-8", "backslashreplace").decode()


def _missing(row: Row, field: str, format: str) -> DataError:
    other = _format_of(row.values)
    columns = _columns(row, 12) or "nothing"
    if other and other != format:
        return DataError(
            f"{row.place}, field {field}: missing; the format is {format}, this row looks like {other} ({columns}).",
            f"{NEEDS[format]}. Keep one format in a file, or set data.format.",
            code="mixed_formats" if _is_mixed(row, other, format) else "missing_field",
            row=row.number,
        )
    what = "null" if field in row.values else "missing"
    return DataError(
        f"{row.place}, field {field}: {what} (the row has {columns}).",
        f"{NEEDS[format]}. {FIELDS_REMEDY}",
        code="missing_field",
        row=row.number,
    )


def _own_columns(format: str) -> set[str]:
    """By which a row of this format is still one when it lacks the others."""
    if format == "alpaca":
        return {"instruction", *ALPACA_INPUTS, *ALPACA_OUTPUTS}
    return {*PAIRS, *itertools.chain(*PAIRS.values())} if format == "prompt_completion" else set()


def _is_mixed(row: Row, other: str | None, format: str) -> bool:
    """Whether a row is of another format, and not one of its own that lacks a field."""
    if other is None or other == format or {other, format} in ({"messages", "sharegpt"}, {"text", "classification"}):
        return False
    present = {name for name, value in row.values.items() if value is not None}
    if other in ("text", "classification"):  # A column `text` beside the format's own is one more.
        return present.isdisjoint(_own_columns(format))
    if format == "alpaca" and other == "prompt_completion":  # Input and output of a row whose instruction is missing.
        pair = _pair_of(present)
        return pair is None or not (pair[0] in ALPACA_INPUTS and pair[1] in ALPACA_OUTPUTS)
    return True


def _refuse_other_format(row: Row, format: str, section: DataSection) -> None:
    """A row of another format may have the columns of this one too: read so, it would lose the rest in silence."""
    named = section.prompt_field or section.answer_field or section.messages_field or section.text_field
    if section.format != "auto" or named:
        return
    other = _format_of(row.values)
    if _is_mixed(row, other, format):
        columns = _columns(row, 12)
        raise DataError(
            f"{row.place}: the format is {format}, this row looks like {other} ({columns}).",
            f"{NEEDS[format]}. Keep one format in a file, or set data.format.",
            code="mixed_formats",
            row=row.number,
        )


def _label(row: Row, field: str) -> str:
    value = row.values.get(field)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _text(row, field, "classification")


def _as_list(value: Any) -> list[Any] | None:
    """A list, also where CSV or Parquet holds it as JSON text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, list) else None


def _parse_messages(row: Row, format: str, section: DataSection) -> Conversation:
    defaults = ("messages",) if format == "messages" else ()
    field = section.messages_field or _first_present(
        row, (*defaults, "conversations", "conversation", "messages"), format
    )
    value = row.values.get(field)
    items = _as_list(value)
    if items is None:
        if value is None:
            raise _missing(row, field, format)
        raise wrong(row, f"{field}: it is {type_name(value)}, not a list", f"{NEEDS[format]}.")
    turns = tuple(parse_turn(row, f"{field}[{index}]", item, format) for index, item in enumerate(items))
    return _checked(row, section, turns, format, field)


def _checked(row: Row, section: DataSection, turns: tuple[Turn, ...], format: str, field: str) -> Conversation:
    if not any(turn.role == "assistant" for turn in turns):
        raise wrong(
            row,
            f"{field}: it has no assistant turn, so nothing to learn",
            f"{NEEDS[format]}.",
            code="missing_field" if turns else "empty_field",
        )
    return Conversation(_with_system(row, section, turns), tools_of(row), row.place)


# ------------------------------------------------------------------------------------------------------------- scan


def prompt_key(item: Conversation | Document) -> bytes:
    """8 bytes that are equal where everything before the last assistant turn is equal up to white space."""
    digest = hashlib.blake2b(digest_size=8)
    if isinstance(item, Document):
        digest.update(" ".join(item.text.split()).encode("utf-8", "surrogatepass"))
        return digest.digest()
    last = max((i for i, turn in enumerate(item.turns) if turn.role == "assistant"), default=len(item.turns))
    for turn in item.turns[:last]:
        text = f"{turn.role}\x00{' '.join(turn.content.split())}\x00"
        for call in turn.tool_calls:
            text += f"{call.name}\x00{json.dumps(call.arguments, sort_keys=True, default=str)}\x00"
        digest.update(text.encode("utf-8", "surrogatepass"))
    return digest.digest()


def read_items(
    source: str, format: str, section: DataSection, *, limit: int | None = None
) -> Iterator[tuple[Row, Conversation | Document]]:
    """Every row and what it parses to.  Raises DataError at the first that is wrong."""
    for row in read_rows(source, section, limit=limit):
        yield row, parse(row, format, section)


def scan(source: str, section: DataSection, limit: int | None = None) -> Scan:
    """One pass that parses every row.  Raises DataError at the first that is wrong, or where there is none."""
    rows = read_rows(source, section, limit=limit)
    first = list(itertools.islice(rows, DETECTION_ROWS))
    if not first:
        raise DataError(f"{source} holds no rows.", "Give a file with at least one example.")
    format = detect_format(first, section)
    keys = bytearray()
    for row in itertools.chain(first, rows):
        keys += prompt_key(parse(row, format, section))
    prompt_keys = np.frombuffer(bytes(keys), dtype="<u8")
    return Scan(source, format, len(prompt_keys), source_digest(source, section), prompt_keys)
