from __future__ import annotations

from dataclasses import replace

import pytest

from onlay.evaluation.causes import Evidence, likely_causes

SOUND = Evidence(
    end_tokens_trained=100, trained_examples=100, epochs=3.0, held_out_losses=(1.0, 0.9), duplicate_share=0.0, most_repeats=1,
    dropout=0.05, temperature=0.7, repetition_penalty=1.1, max_new_tokens=64, longest_expected_tokens=40,
)  # fmt: skip
ORDER = ["end token untrained", "too many epochs", "duplicate rows", "dropout", "sampling", "length limit"]


def named(lines: list[str]) -> list[tuple[str, str]]:
    return [(line.split(": ")[0], line.split(": ")[1]) for line in lines[1:]]


@pytest.mark.parametrize(("loop", "no_stop", "told"), [
    (0.05, 0.05, False), (0.051, 0.0, True), (0.0, 0.051, True), (None, None, False),
])  # fmt: skip
def test_causes_are_told_where_more_than_a_few_answers_are_bad(
    loop: float | None, no_stop: float | None, told: bool
) -> None:
    assert bool(likely_causes({"loop": loop, "no_stop": no_stop}, SOUND)) is told


def test_nothing_likely_is_told_as_such_in_the_order_to_look_at() -> None:
    lines = likely_causes({"loop": 0.1, "no_stop": 0.2}, SOUND)
    assert lines[0] == "10% of the answers end in a loop, 20% do not stop by themselves."
    assert named(lines) == [("not likely", cause) for cause in ORDER]


@pytest.mark.parametrize(("cause", "changes", "evidence"), [
    ("end token untrained", {"end_tokens_trained": 99}, "99% of the trained examples have a trained end token"),
    ("too many epochs", {"epochs": 4.10172}, "4.1 passes over the rows"),
    ("too many epochs", {"most_repeats": 2}, "3.0 passes over the rows, 6.0 over those that weights or the general share repeat;"),
    ("too many epochs", {"held_out_losses": (1.0, 0.8, 0.9)}, "the last held-out loss is 12% above the best"),
    ("duplicate rows", {"duplicate_share": 0.051}, "5.1% of the training rows repeat another"),
    ("dropout", {"dropout": 0.21}, "dropout is 0.21"),
    ("sampling", {"temperature": 0.0, "repetition_penalty": 1.0}, "greedy, without a repetition penalty"),
    ("sampling", {"temperature": 1.1}, "temperature 1.1"),
    ("length limit", {"longest_expected_tokens": 65}, "64 new tokens are allowed, the longest expected answer has 65"),
])  # fmt: skip
def test_each_cause_is_likely_by_its_own_evidence(cause: str, changes: dict[str, object], evidence: str) -> None:
    lines = likely_causes({"loop": 0.2, "no_stop": 0.2}, replace(SOUND, **changes))  # type: ignore[arg-type]
    likely = [line for line in lines if line.startswith("likely: ")]
    assert likely == lines[1:2]
    assert likely[0].startswith(f"likely: {cause}: ")
    assert evidence in likely[0]


def test_a_short_limit_makes_no_loops_and_greedy_answers_still_stop() -> None:
    short = replace(SOUND, longest_expected_tokens=65, temperature=0.0, repetition_penalty=1.0)
    assert [what for kind, what in named(likely_causes({"loop": 0.2}, short)) if kind == "likely"] == ["sampling"]
    assert [what for kind, what in named(likely_causes({"no_stop": 0.2}, short)) if kind == "likely"] == [
        "length limit"
    ]


def test_what_is_not_known_is_not_told() -> None:
    unknown = replace(
        SOUND, end_tokens_trained=None, trained_examples=None, epochs=None, duplicate_share=None, dropout=None
    )
    assert [what for _, what in named(likely_causes({"loop": 0.2}, unknown))] == ["sampling", "length limit"]
