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
from onlay.errors import DataError
from onlay.recipe import DataSection

DETECTION_ROWS = 20
ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "function_call": "assistant", "tool_call": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool", "function_response": "tool",
    "tool_response": "tool", "function_result": "tool",
}  # fmt: skip
CALL_ROLES = ("function_call", "tool_call")
ALPACA_INPUTS, ALPACA_OUTPUTS = ("input", "context"), ("output", "response")
PAIRS = {
    "prompt": ("completion", "response", "answer", "output"),
    "question": ("answer", "response", "output"),
    "query": ("response", "answer", "completion", "output"),
    "instruction": ("completion", "answer"),
    "input": ("output", "response", "answer", "completion"),
}
NEEDS = {
    "alpaca": "alpaca rows need `instruction` and `output`, and may have `input`",
    "prompt_completion": "prompt_completion rows need a prompt and an answer, such as `prompt` + `completion`",
    "messages": "messages rows need `messages`: a list of {role, content}, with at least one assistant turn",
    "sharegpt": "sharegpt rows need `conversations`: a list of {from, value}, with at least one gpt turn",
    "text": "text rows need `text`",
    "classification": "classification rows need `text` and `label` (or `label_text`)",
}
FIELDS_REMEDY = (
    "Name your columns with data.prompt_field and data.answer_field, data.messages_field, or data.text_field."
)


@dataclass(frozen=True, slots=True)
class ToolCall:
    name: str
    arguments: dict[str, Any]
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    role: str
    """system, user, assistant or tool."""
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning: str | None = None
    trained: bool = True
    """False where the data gives an assistant turn weight 0."""
    name: str | None = None
    tool_call_id: str | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    turns: tuple[Turn, ...]
    tools: tuple[dict[str, Any], ...] = ()
    place: str = ""


@dataclass(frozen=True, slots=True)
class Document:
    text: str
    place: str = ""


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
    columns = ", ".join(list(row.values)[:20]) or "none"
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
    for prompt, answers in PAIRS.items():
        if prompt in present and present & set(answers):
            return "prompt_completion"
    if "text" in present and ("label" in present or "label_text" in present):
        return "classification"
    if "text" in present:
        return "text"
    return None


def parse(row: Row, format: str, section: DataSection) -> Conversation | Document:
    """The row as a conversation or document.  Raises DataError that names file, row and field."""
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
        pairs = [
            name
            for name, answers in PAIRS.items()
            if section.answer_field or any(row.values.get(a) is not None for a in answers)
        ]
        prompt = _first_present(row, tuple(pairs) or tuple(PAIRS), format)
    answers = PAIRS.get(prompt) or tuple(dict.fromkeys(itertools.chain(*PAIRS.values())))
    answer = section.answer_field or _first_present(row, tuple(name for name in answers if name != prompt), format)
    asked, answered = row.values.get(prompt), row.values.get(answer)
    if isinstance(asked, list) or isinstance(answered, list):
        items = _turn_list(row, prompt, "user", format) + _turn_list(row, answer, "assistant", format)
        turns = tuple(_parse_turn(row, field, item, format) for field, item in items)
        return _checked(row, section, turns, format, answer)
    return _conversation(row, section, _text(row, prompt, format), _text(row, answer, format))


def _turn_list(row: Row, field: str, role: str, format: str) -> list[tuple[str, Any]]:
    value = row.values.get(field)
    if isinstance(value, list):
        return [(f"{field}[{i}]", item) for i, item in enumerate(value)]
    return [(field, {"role": role, "content": _text(row, field, format)})]


def _conversation(row: Row, section: DataSection, prompt: str, answer: str) -> Conversation:
    return Conversation(
        _with_system(row, section, (Turn("user", prompt), Turn("assistant", answer))), _tools(row), row.place
    )


def _with_system(row: Row, section: DataSection, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    if any(turn.role == "system" for turn in turns):
        return turns
    system = row.values.get("system")
    if system is not None and not isinstance(system, str):
        raise DataError(
            f"{row.place}, field system: it is {type_name(system)}, not text.",
            "The system message is text; leave it out where there is none.",
        )
    system = system if system and system.strip() else section.system
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
            return _whole(row, field, value)
        raise DataError(
            f"{row.place}, field {field}: it is empty.",
            f"{NEEDS[format]}, none of them empty. Fill it, or delete the row.",
        )
    if value is None:
        raise _missing(row, field, format)
    raise DataError(
        f"{row.place}, field {field}: it is {type_name(value)}, not text.", f"{NEEDS[format]}, each of them text."
    )


def _whole(row: Row, field: str, text: str) -> str:
    """The text, if it can be written as UTF-8: JSON may hold half of an escaped pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{row.place}, field {field}: character {error.start + 1} is half of a surrogate pair, not text.",
            "Write the character whole, or delete it.",
        ) from None
    return text


def _missing(row: Row, field: str, format: str) -> DataError:
    other = _format_of(row.values)
    columns = ", ".join(list(row.values)[:12]) or "nothing"
    if other and other != format:
        return DataError(
            f"{row.place}, field {field}: missing; the format is {format}, this row looks like {other} ({columns}).",
            f"{NEEDS[format]}. Keep one format in a file, or set data.format.",
        )
    what = "null" if field in row.values else "missing"
    return DataError(
        f"{row.place}, field {field}: {what} (the row has {columns}).", f"{NEEDS[format]}. {FIELDS_REMEDY}"
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
        except ValueError:
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
        raise DataError(f"{row.place}, field {field}: it is {type_name(value)}, not a list.", f"{NEEDS[format]}.")
    turns = tuple(_parse_turn(row, f"{field}[{index}]", item, format) for index, item in enumerate(items))
    return _checked(row, section, turns, format, field)


def _checked(row: Row, section: DataSection, turns: tuple[Turn, ...], format: str, field: str) -> Conversation:
    if not any(turn.role == "assistant" for turn in turns):
        raise DataError(
            f"{row.place}, field {field}: it has no assistant turn, so nothing to learn.", f"{NEEDS[format]}."
        )
    return Conversation(_with_system(row, section, turns), _tools(row), row.place)


def _parse_turn(row: Row, field: str, item: Any, format: str) -> Turn:
    """One message as a turn."""
    if not isinstance(item, dict):
        raise DataError(f"{row.place}, field {field}: it is {type_name(item)}, not an object.", f"{NEEDS[format]}.")
    role_key, content_key = ("from", "value") if "from" in item and "role" not in item else ("role", "content")
    given = item.get(role_key)
    if given is None:
        raise DataError(f"{row.place}, field {field}.{role_key}: missing.", f"{NEEDS[format]}.")
    role = ROLES.get(given.lower()) if isinstance(given, str) else None
    if role is None:
        known = ", ".join(ROLES)
        raise DataError(
            f"{row.place}, field {field}.{role_key}: {given!r} is not a known role.", f"Known roles: {known}."
        )
    value = item.get(content_key, item.get("value") if content_key == "content" else item.get("content"))
    content, reasoning, calls = _parse_content(row, f"{field}.{content_key}", value, format)
    calls += _parse_calls(row, f"{field}.tool_calls", item.get("tool_calls"))
    if given.lower() in CALL_ROLES and not calls:
        decoded = _decoded(content)
        if isinstance(decoded, dict) or (isinstance(decoded, list) and decoded):
            calls, content = _parse_calls(row, f"{field}.{content_key}", decoded), ""
    if isinstance(item.get("function_call"), dict):
        calls += _parse_calls(row, f"{field}.function_call", item["function_call"])
    for key in ("reasoning_content", "reasoning", "thinking"):
        reasoning = reasoning or (item.get(key) if isinstance(item.get(key), str) else None) or None
    if value is None and not calls:
        raise DataError(f"{row.place}, field {field}.{content_key}: missing.", f"{NEEDS[format]}.")
    trained = _weight(row, field, item) if role == "assistant" else False
    if role == "assistant" and trained and not content.strip() and not calls:
        raise DataError(
            f"{row.place}, field {field}.{content_key}: the answer is empty.",
            "An assistant turn needs text or tool calls. Fill it, give it weight 0, or delete the row.",
        )
    name, call_id = item.get("name"), item.get("tool_call_id")
    return Turn(
        role,
        content,
        tuple(calls),
        reasoning,
        trained,
        name if isinstance(name, str) else None,
        call_id if isinstance(call_id, str) else None,
    )


def _weight(row: Row, field: str, item: dict[str, Any]) -> bool:
    for key in ("weight", "loss_weight"):
        weight = item.get(key)
        if weight is None:
            continue
        if weight not in (0, 1):
            raise DataError(
                f"{row.place}, field {field}.{key}: {weight!r} is neither 0 nor 1.",
                "Weight 0 leaves a turn untrained, 1 trains it.",
            )
        return bool(weight)
    return True


def _parse_content(row: Row, field: str, value: Any, format: str) -> tuple[str, str | None, list[ToolCall]]:
    if value is None:
        return "", None, []
    if isinstance(value, str):
        return _whole(row, field, value), None, []
    if not isinstance(value, list):
        raise DataError(f"{row.place}, field {field}: it is {type_name(value)}, not text.", f"{NEEDS[format]}.")
    texts: list[str] = []
    reasonings: list[str] = []
    calls: list[ToolCall] = []
    for index, part in enumerate(value):
        where = f"{field}[{index}]"
        kind = "text" if isinstance(part, str) else part.get("type", "text") if isinstance(part, dict) else None
        inner = (
            part
            if isinstance(part, str)
            else next((part[k] for k in (kind, "text", "value", "content") if part.get(k) is not None), None)
            if isinstance(part, dict)
            else None
        )
        if kind in ("text", "reasoning", "thinking") and isinstance(inner, str):
            (texts if kind == "text" else reasonings).append(_whole(row, where, inner))
        elif kind in ("tool_call", "function", "function_call"):
            calls += _parse_calls(row, where, inner if inner is not None else part)
        else:
            raise DataError(
                f"{row.place}, field {where}: a part of type {kind!r} cannot be trained on.",
                "Content is text, or parts of type text, reasoning or tool_call.",
            )
    return "".join(texts), "".join(reasonings) or None, calls


def _decoded(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError:
            return None
    return value


def _parse_calls(row: Row, field: str, value: Any) -> list[ToolCall]:
    """Tool calls in OpenAI's shape, or bare {name, arguments}; arguments may be an object or its JSON text."""
    if value is None:
        return []
    remedy = 'A tool call is {"name": ..., "arguments": {...}}, or OpenAI\'s {"type": "function", "function": {...}}.'
    decoded = _decoded(value)
    if isinstance(decoded, dict):
        decoded = [decoded]
    if not isinstance(decoded, list):
        raise DataError(f"{row.place}, field {field}: it is not a tool call.", remedy)
    calls = []
    for index, item in enumerate(decoded):
        where = f"{field}[{index}]"
        function = item.get("function", item) if isinstance(item, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(name, str):
            raise DataError(f"{row.place}, field {where}: a tool call without a name.", remedy)
        arguments = function.get("arguments", function.get("parameters", {}))
        arguments = _decoded(arguments) if arguments not in (None, "") else {}
        if not isinstance(arguments, dict):
            raise DataError(f"{row.place}, field {where}.arguments: not a JSON object.", remedy)
        identity = item.get("id") if isinstance(item.get("id"), str) else None
        calls.append(ToolCall(name, arguments, identity))
    return calls


def _tools(row: Row) -> tuple[dict[str, Any], ...]:
    """The `tools` column, a list or its JSON text, each in OpenAI's shape."""
    value = row.values.get("tools")
    if value is None or value == "" or value == []:
        return ()
    tools = _decoded(value)
    if isinstance(tools, dict):
        tools = [tools]
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(
            f"{row.place}, field tools: it is not a list of functions.",
            "Give a list of {name, description, parameters}, or its JSON text.",
        )
    return tuple(
        tool if "function" in tool or "name" not in tool else {"type": "function", "function": tool} for tool in tools
    )


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
            text += f"{call.name}\x00{json.dumps(call.arguments, sort_keys=True)}\x00"
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
