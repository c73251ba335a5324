"""Answers with a structure: JSON, JSON that fits a schema, tool calls, a pattern, a number."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from typing import Any

import regex  # type: ignore[import-untyped]

from onlay.errors import DataError, RecipeError

PATTERN_SECONDS = 5.0
"""A pattern that takes longer for one answer is refused: it backtracks without end."""
_NUMBER = (
    r"(?:(?<![\w.,)\]])(?P<sign>[-+]))?[$€£¥₹]?"
    r"(?P<number>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE](?P<power>[-+]?\d{1,3})(?!\d))?"
)
"""A sign belongs to the number where no word, number or bracket stands before it: in `10-3` it is subtraction."""
_ARGUMENTS = ("arguments", "parameters")


def json_of(text: str) -> Any:
    """The JSON value that `text` is, white space around it aside.  Raises ValueError: nothing else may stand beside it,
    and NaN and Infinity are no JSON."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def is_json(text: str) -> bool:
    """Whether `text` is a JSON object or list.  A number or a word in quotes is JSON too, but not what was asked for."""
    try:
        return isinstance(json_of(text), dict | list)
    except ValueError:
        return False


def same_value(first: Any, second: Any) -> bool:
    """Equality of JSON values: keys in any order, 1 equals 1.0, and true is not 1."""
    left = [(first, second)]  # Not by recursion: a looping model nests deeply.
    while left:
        one, other = left.pop()
        if isinstance(one, dict) and isinstance(other, dict):
            if one.keys() != other.keys():
                return False
            left += [(one[key], other[key]) for key in one]
        elif isinstance(one, list) and isinstance(other, list):
            if len(one) != len(other):
                return False
            left += zip(one, other, strict=True)
        elif isinstance(one, bool) != isinstance(other, bool) or one != other:
            return False
    return True


def json_equal(answer: str, expected: str) -> bool:
    """Whether the answer is JSON of the same value.  Raises ValueError where `expected` is no JSON."""
    right = json_of(expected)
    try:
        return same_value(json_of(answer), right)
    except ValueError:
        return False


def fits_schema(answer: str, schema: Mapping[str, Any], *, place: str = "") -> bool:
    """Whether the answer is JSON that the JSON schema allows.

    The draft is what `$schema` says, else the newest.  `format` only annotates, and nothing is fetched.  Raises DataError
    for a schema that is none, or that refers to another; it names `place`, the row's file and number.
    """
    from jsonschema.exceptions import SchemaError
    from referencing.exceptions import Unresolvable

    row = f"{place}: its" if place else "A"
    try:
        validator = _validator(json.dumps(schema, sort_keys=True))
    except SchemaError as error:
        where = "".join(f".{part}" for part in error.absolute_path)
        raise DataError(f"{row} JSON schema is not one, at ${where}: {error.message}.", "Correct the schema.") from None
    try:
        return bool(validator.is_valid(json_of(answer)))
    except (ValueError, RecursionError):
        return False
    except Unresolvable as error:
        raise DataError(
            f"{row} JSON schema refers to {error.ref!r}, which is not in it.", "Put it under $defs; nothing is fetched."
        ) from None


@lru_cache(maxsize=256)
def _validator(schema: str) -> Any:
    from jsonschema.validators import Draft202012Validator, validator_for
    from referencing import Registry

    decoded = json.loads(schema)
    kind = validator_for(decoded, default=Draft202012Validator)
    kind.check_schema(decoded)
    return kind(decoded, registry=Registry())  # An own registry: the default one would go to the network.


# -------------------------------------------------------------------------------------------------------- tool calls


@dataclass(frozen=True, slots=True)
class Call:
    name: str
    arguments: Any
    """A JSON object, as a rule; arguments that were written as JSON text are read."""


def tool_calls(text: str) -> list[Call]:
    """The calls in an answer, in order; empty where there are none.

    A call is a JSON object with `name` and `arguments` (or `parameters`, as Llama writes them), or with these under
    `function`, by itself, in a list, or with words and marks such as <tool_call> around it.  Mistral's newer
    `[TOOL_CALLS]name[ARGS]{...}` is read too.
    """
    calls: list[Call] = []
    for begin, value in _json_values(text):
        named = regex.search(r"\[TOOL_CALLS\]\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?\[ARGS\]\s*$", text[:begin])
        if named and isinstance(value, dict):
            calls.append(Call(named[1], value))
        else:
            found = [_call(item) for item in (value if isinstance(value, list) else [value])]
            calls += [call for call in found if call is not None]
    return calls


def same_calls(answer: str, expected: str) -> bool:
    """Whether the answer makes the expected calls, each with the same name and arguments, in any order, and no others."""
    ours, right = tool_calls(answer), tool_calls(expected)
    for call in right:
        match = next((c for c in ours if c.name == call.name and same_value(c.arguments, call.arguments)), None)
        if match is None:
            return False
        ours.remove(match)
    return not ours


def _call(value: Any) -> Call | None:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    key = next((key for key in _ARGUMENTS if key in value), None)
    if key is None:
        return None
    arguments = value[key]
    if isinstance(arguments, str):
        try:
            arguments = json_of(arguments)
        except ValueError:
            return None
    return Call(value["name"], arguments)


def _json_values(text: str) -> Iterator[tuple[int, Any]]:
    """Outermost JSON objects and lists anywhere in a text, each with where it begins."""
    decoder = json.JSONDecoder(parse_constant=_refuse_constant)
    at = 0
    while (begin := regex.search(r"[{\[]", text, pos=at)) is not None:
        try:
            value, at = decoder.raw_decode(text, begin.start())
        except (ValueError, RecursionError):
            at = begin.start() + 1
        else:
            yield begin.start(), value


# ----------------------------------------------------------------------------------------------- patterns and numbers


@lru_cache(maxsize=64)
def _pattern(pattern: str) -> Any:
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise RecipeError(
            f"The pattern {pattern!r} is not a regular expression: {error}.", "Correct it; the syntax is Python's."
        ) from None


def has_groups(pattern: str) -> bool:
    """Whether a pattern marks something to be compared.  Raises RecipeError for one that is no pattern."""
    return bool(_pattern(pattern).groups)


def last_match(text: str, pattern: str) -> tuple[str | None, ...] | None:
    """What the groups of the pattern caught where it is last found in `text`; None where it is not found.

    The last, because answers that think aloud end with what counts.  Raises RecipeError for one that is no pattern, or
    that takes longer than PATTERN_SECONDS.
    """
    try:
        found = list(_pattern(pattern).finditer(text, timeout=PATTERN_SECONDS))
    except TimeoutError:
        raise RecipeError(
            f"The pattern {pattern!r} took more than {PATTERN_SECONDS:g} s for one answer of {len(text):,} characters.",
            "Write it without nested repetitions such as (a+)+.",
        ) from None
    return tuple(found[-1].groups()) if found else None


def final_number(text: str) -> Decimal | None:
    """The number an answer comes to: the first after the last `####`, where GSM8K puts it, else the last; None without one.

    Commas between groups of three digits are left out; digits of any script count; units and `%` are not read. A
    decimal comma is not known: `1,5` is 1 and then 5.
    """
    # Arabic's own separators, and the minus sign that is no hyphen.
    plain = unicodedata.normalize("NFKC", text).translate({0x066B: ".", 0x066C: ",", 0x2212: "-"})
    _, marked, tail = plain.rpartition("####")
    numbers = list(regex.finditer(_NUMBER, tail))
    if not numbers:
        return None
    sign, number, power = numbers[0 if marked else -1].group("sign", "number", "power")
    return Decimal(f"{sign or ''}{number.replace(',', '')}e{power or 0}")
