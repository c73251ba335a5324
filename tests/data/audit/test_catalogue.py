"""Every code has words; the tally counts a row once, lists rows in order, worst findings first."""

from __future__ import annotations

import re

import pytest

from onlay.data.audit.catalogue import KINDS, Tally, finding, worst_first


@pytest.mark.parametrize("code", KINDS)
def test_messages_and_remedies_are_whole(code: str) -> None:
    kind = KINDS[code]
    assert re.fullmatch(r"[a-z_]+", code)
    assert kind.message and not kind.message.endswith(".")
    assert kind.remedy.endswith((".", ": " + kind.remedy.rsplit(": ", 1)[-1]))


def test_a_row_counts_once_for_a_code() -> None:
    tally = Tally()
    tally.add("refusals", source=0, number=3)
    tally.add("refusals", source=0, number=3)
    tally.add("refusals", source=1, number=3)
    assert tally.count("refusals") == 2
    assert tally.count("repetition") == 0


def test_rows_are_in_order_though_added_out_of_it() -> None:
    tally, later = Tally(), Tally()
    tally.add_many("not_text", sources=[1, 0], numbers=[5, 9])
    later.add_many("not_text", sources=[0], numbers=[2])
    tally.merge(later)
    assert tally.rows("not_text") == [(0, 2), (0, 9), (1, 5)]
    (found,) = tally.findings(["a", "b"], shown=2)
    assert (found.count, [row.place for row in found.rows]) == (3, ["a:2", "a:9"])
    assert len(tally.findings(["a", "b"], shown=None)[0].rows) == 3


def test_findings_are_worst_first_and_filled_in() -> None:
    tally = Tally()
    tally.add("length_outliers", source=0, number=1)
    tally.add_many("refusals", sources=[0, 0], numbers=[1, 2])
    tally.add("duplicates_near", source=0, number=1)
    tally.add("not_json", source=0, number=7)
    found = tally.findings(["f"], told={"duplicates_near": {"threshold": "0.8"}})
    assert [one.code for one in found] == ["not_json", "refusals", "duplicates_near", "length_outliers"]
    assert "at least 0.8" in found[2].message
    few = finding("few_rows", count=4, told={"least": 500, "method": "lora", "typical": "more"})
    assert worst_first([*found, few])[1].code == "few_rows"
    assert few.message == "training rows, fewer than 500; lora is usually given more"


def test_an_unknown_code_is_a_mistake() -> None:
    with pytest.raises(AssertionError):
        Tally().add("no_such_code", source=0, number=1)


def test_one_row_is_spoken_of_as_one() -> None:
    tally = Tally()
    tally.add("repetition", source=0, number=1)
    tally.add_many("placeholder_answer", sources=[0, 0], numbers=[1, 2])
    tally.add("known_by_base", source=0, number=1)
    found = {one.code: one.message for one in tally.findings(["f"], told={"known_by_base": {"scored": "1,000"}})}
    assert found["repetition"] == "answer that repeats itself"
    assert found["placeholder_answer"] == "answers that are placeholders or speak of being an AI"
    assert found["known_by_base"] == "row, of 1,000 looked at, whose answer the base gives already"
    few = finding("few_rows", count=1, told={"least": 500, "method": "a|b", "typical": "more"})
    assert few.message == "training row, fewer than 500; a|b is usually given more"


@pytest.mark.parametrize("code", KINDS)
def test_every_message_tells_one_from_many(code: str) -> None:
    one, many = KINDS[code].said_of(1), KINDS[code].said_of(3)
    assert many == KINDS[code].message
    assert re.match(r"(training )?(row|answer|conversation|place)\b", one), one
    assert re.match(r"(training )?(rows|answers|conversations|places)\b", many), many
    assert not re.search(r"[|_]", re.sub(r"\{.*?\}|max_tokens", "", one + many))
