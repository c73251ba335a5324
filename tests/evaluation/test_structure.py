from __future__ import annotations

from decimal import Decimal

import pytest

from onlay.errors import DataError, RecipeError
from onlay.evaluation import structure
from onlay.evaluation.structure import (
    Call,
    final_number,
    fits_schema,
    has_groups,
    is_json,
    json_equal,
    last_match,
    same_calls,
    tool_calls,
)

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}


def test_json() -> None:
    assert is_json(' {"a": [1]} ') and is_json("[]")
    for text in ("", "5", '"word"', "null", '{"a": 1} so', "```json\n{}\n```", '{"a": NaN}', "[" * 100_000):
        assert not is_json(text)


def test_json_is_compared_by_value() -> None:
    assert json_equal('{"b": 2.0, "a": [1, null]}', '{"a": [1, null], "b": 2}')
    for other in ('{"a": [null, 1], "b": 2}', '{"a": [1, null]}', '{"a": [1, null], "b": true}', "no JSON", ""):
        assert not json_equal(other, '{"a": [1, null], "b": 2}')
    assert not json_equal("[1]", "[true]") and not json_equal("[0]", "[false]") and not json_equal('["1"]', "[1]")
    with pytest.raises(ValueError):
        json_equal("{}", "no JSON")


def test_schemas() -> None:
    assert fits_schema('{"n": 3}', SCHEMA)
    for answer in ('{"n": "3"}', '{"n": 3, "m": 1}', "{}", "3", "so: {}", "[" * 100_000):
        assert not fits_schema(answer, SCHEMA)


def test_unusable_schemas_are_named() -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:7: its JSON schema is not one, at \$\.type"):
        fits_schema("{}", {"type": "objekt"}, place="rows.jsonl:7")
    with pytest.raises(DataError, match="which is not in it"):  # and nothing is fetched
        fits_schema("{}", {"$ref": "https://schemas.invalid/a.json"})


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "book", "arguments": {"day": "Monday", "n": 2}}',
        'Let me look.\n{"name": "book", "arguments": {"n": 2, "day": "Monday"}}',
        '<tool_call>\n{"name": "book", "arguments": {"day": "Monday", "n": 2.0}}\n</tool_call><|im_end|>',
        '<|python_tag|>{"name": "book", "parameters": {"day": "Monday", "n": 2}}',
        '[TOOL_CALLS] [{"name": "book", "arguments": {"day": "Monday", "n": 2}, "id": "call00000"}]',
        '[TOOL_CALLS]book[ARGS]{"day": "Monday", "n": 2}',
        '{"type": "function", "function": {"name": "book", "arguments": "{\\"day\\": \\"Monday\\", \\"n\\": 2}"}}',
    ],
)
def test_calls_are_read_as_templates_write_them(text: str) -> None:
    assert tool_calls(text) == [Call("book", {"day": "Monday", "n": 2})]
    assert same_calls(text, '{"name":"book","arguments":{"day":"Monday","n":2}}')


def test_what_is_no_call() -> None:
    for text in ("", "words", '{"name": "book"}', '{"arguments": {}}', '{"name": 3, "arguments": {}}', "[1, 2]",
                 '{"name": "book", "arguments": {"day": "Mon', '{"name": "book", "arguments": "not json"}'):  # fmt: skip
        assert tool_calls(text) == []


def test_calls_must_be_the_same_ones() -> None:
    one, two = '{"name": "a", "arguments": {"x": 1}}', '{"name": "b", "arguments": {}}'
    assert same_calls(f"{two}\n{one}", f"{one}\n{two}")
    assert not same_calls(one, f"{one}\n{two}")  # one is missing
    assert not same_calls(f"{one}\n{one}", one)  # one is too many
    assert not same_calls('{"name": "a", "arguments": {"x": true}}', one)
    assert not same_calls('{"name": "c", "arguments": {"x": 1}}', one)
    assert not same_calls("I did it.", one)


def test_patterns() -> None:
    assert last_match("Answer: A. No, Answer: B", r"Answer: (\w)") == ("B",)
    assert last_match("none", r"Answer: (\w)") is None
    assert last_match("ID-12", r"ID-\d+") == ()
    assert has_groups("(a)") and not has_groups("(?:a)")
    with pytest.raises(RecipeError, match="not a regular expression"):
        has_groups("(a")


def test_a_pattern_that_does_not_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structure, "PATTERN_SECONDS", 0.05)
    with pytest.raises(RecipeError, match="nested repetitions"):
        last_match("a" * 300 + "c b", r"(a*)(a*)(a*)(a*)(a*)\1\2c")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 5 + 3 = 8.\n#### 1,234", "1234"),
        ("#### 72 apples in 3 boxes", "72"),
        ("first 3, then 4.", "4"),
        ("it costs -$1,234.50!", "-1234.5"),
        ("$-5", "-5"),
        ("10-3", "3"),
        ("1,2,3", "3"),
        ("١٬٢٣٤٫٥", "1234.5"),
        ("−7", "-7"),
        (".5", "0.5"),
        ("2.5e-3", "0.0025"),
        ("12%", "12"),
    ],
)
def test_final_numbers(text: str, number: str) -> None:
    assert final_number(text) == Decimal(number)


def test_no_number() -> None:
    assert final_number("none") is None
    assert final_number("72 ####") is None
