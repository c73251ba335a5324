"""What a row becomes, and how one message becomes a turn.  Raises DataError that names file, row and field."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from onlay.data.sources import Row, type_name
from onlay.errors import DataError

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "function_call": "assistant", "tool_call": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool", "function_response": "tool",
    "tool_response": "tool", "function_result": "tool",
}  # fmt: skip
CALL_ROLES = ("function_call", "tool_call")
NEEDS = {
    "alpaca": "alpaca rows need `instruction` and `output`, and may have `input`",
    "prompt_completion": "prompt_completion rows need a prompt and an answer, such as `prompt` + `completion`",
    "messages": "messages rows need `messages`: a list of {role, content}, with at least one assistant turn",
    "sharegpt": "sharegpt rows need `conversations`: a list of {from, value}, with at least one gpt turn",
    "text": "text rows need `text`",
    "classification": "classification rows need `text` and `label` (or `label_text`)",
}


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


def whole(row: Row, field: str, text: str) -> str:
    """The text, if it can be written as UTF-8: JSON may hold half of an escaped pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{row.place}, field {field}: character {error.start + 1} is half of a surrogate pair, not text.",
            "Write the character whole, or delete it.",
            code="not_text",
            row=row.number,
        ) from None
    return text


def whole_values(row: Row, field: str, values: Any) -> None:
    """Raises DataError where nested values cannot be written as UTF-8, or not at all."""
    try:
        whole(row, field, json.dumps(values, ensure_ascii=False, default=str))
    except RecursionError:
        raise wrong(row, f"{field}: it is nested too deeply", "Keep it flat.") from None


def wrong(row: Row, what: str, remedy: str, *, code: str = "wrong_type") -> DataError:
    return DataError(f"{row.place}, field {what}.", remedy, code=code, row=row.number)


def parse_turn(row: Row, field: str, item: Any, format: str) -> Turn:
    """One message as a turn."""
    if not isinstance(item, dict):
        raise wrong(row, f"{field}: it is {type_name(item)}, not an object", f"{NEEDS[format]}.")
    role_key, content_key = ("from", "value") if "from" in item and "role" not in item else ("role", "content")
    given = item.get(role_key)
    if given is None:
        raise wrong(row, f"{field}.{role_key}: missing", f"{NEEDS[format]}.", code="missing_field")
    role = ROLES.get(given.lower()) if isinstance(given, str) else None
    if role is None:
        known = ", ".join(ROLES)
        raise wrong(
            row, f"{field}.{role_key}: {given!r} is not a known role", f"Known roles: {known}.", code="unknown_role"
        )
    value = item.get(content_key, item.get("value") if content_key == "content" else item.get("content"))
    content, reasoning, calls = _parse_content(row, f"{field}.{content_key}", value, format)
    calls += _parse_calls(row, f"{field}.tool_calls", item.get("tool_calls"))
    if given.lower() in CALL_ROLES and not calls:
        decoded = decoded_json(content)
        if isinstance(decoded, dict) or (isinstance(decoded, list) and decoded):
            calls, content = _parse_calls(row, f"{field}.{content_key}", decoded), ""
    if isinstance(item.get("function_call"), dict):
        calls += _parse_calls(row, f"{field}.function_call", item["function_call"])
    for key in ("reasoning_content", "reasoning", "thinking"):
        reasoning = reasoning or (item.get(key) if isinstance(item.get(key), str) else None) or None
    if value is None and not calls:
        raise wrong(row, f"{field}.{content_key}: missing", f"{NEEDS[format]}.", code="missing_field")
    trained = _weight(row, field, item) if role == "assistant" else False
    if role == "assistant" and trained and not content.strip() and not calls:
        raise wrong(
            row,
            f"{field}.{content_key}: the answer is empty",
            "An assistant turn needs text or tool calls. Fill it, give it weight 0, or delete the row.",
            code="empty_field",
        )
    name, call_id = item.get("name"), item.get("tool_call_id")
    for text in (reasoning, name, call_id):
        if isinstance(text, str):
            whole(row, field, text)
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
            raise wrong(
                row, f"{field}.{key}: {weight!r} is neither 0 nor 1", "Weight 0 leaves a turn untrained, 1 trains it."
            )
        return bool(weight)
    return True


def _parse_content(row: Row, field: str, value: Any, format: str) -> tuple[str, str | None, list[ToolCall]]:
    if value is None:
        return "", None, []
    if isinstance(value, str):
        return whole(row, field, value), None, []
    if not isinstance(value, list):
        raise wrong(row, f"{field}: it is {type_name(value)}, not text", f"{NEEDS[format]}.")
    texts: list[str] = []
    reasonings: list[str] = []
    calls: list[ToolCall] = []
    for index, part in enumerate(value):
        where = f"{field}[{index}]"
        kind = "text" if isinstance(part, str) else part.get("type", "text") if isinstance(part, dict) else None
        inner = (
            part
            if isinstance(part, str)
            else next((part[k] for k in (str(kind), "text", "value", "content") if part.get(k) is not None), None)
            if isinstance(part, dict)
            else None
        )
        if kind in ("text", "reasoning", "thinking") and isinstance(inner, str):
            (texts if kind == "text" else reasonings).append(whole(row, where, inner))
        elif kind in ("tool_call", "function", "function_call"):
            calls += _parse_calls(row, where, inner if inner is not None else part)
        else:
            raise wrong(
                row,
                f"{where}: a part of type {kind!r} cannot be trained on",
                "Content is text, or parts of type text, reasoning or tool_call.",
            )
    return "".join(texts), "".join(reasonings) or None, calls


def decoded_json(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value


def _parse_calls(row: Row, field: str, value: Any) -> list[ToolCall]:
    """Tool calls in OpenAI's shape, or bare {name, arguments}; arguments may be an object or its JSON text."""
    if value is None:
        return []
    remedy = 'A tool call is {"name": ..., "arguments": {...}}, or OpenAI\'s {"type": "function", "function": {...}}.'
    decoded = decoded_json(value)
    if isinstance(decoded, dict):
        decoded = [decoded]
    if not isinstance(decoded, list):
        raise wrong(row, f"{field}: it is not a tool call", remedy)
    calls = []
    for index, item in enumerate(decoded):
        where = f"{field}[{index}]"
        function = item.get("function", item) if isinstance(item, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(name, str):
            raise wrong(row, f"{where}: a tool call without a name", remedy)
        arguments = function.get("arguments", function.get("parameters", {}))
        arguments = decoded_json(arguments) if arguments not in (None, "") else {}
        if not isinstance(arguments, dict):
            raise wrong(row, f"{where}.arguments: not a JSON object", remedy)
        identity = item.get("id") if isinstance(item.get("id"), str) else None
        whole_values(row, where, [name, arguments, identity])
        calls.append(ToolCall(name, arguments, identity))
    return calls


def tools_of(row: Row) -> tuple[dict[str, Any], ...]:
    """The `tools` column, a list or its JSON text, each in OpenAI's shape."""
    value = row.values.get("tools")
    if value is None or value == "" or value == []:
        return ()
    tools = decoded_json(value)
    if isinstance(tools, dict):
        tools = [tools]
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise wrong(
            row,
            "tools: it is not a list of functions",
            "Give a list of {name, description, parameters}, or its JSON text.",
        )
    whole_values(row, "tools", tools)
    return tuple(
        tool if "function" in tool or "name" not in tool else {"type": "function", "function": tool} for tool in tools
    )
