"""Comparisons against numbers computed by hand from rows that are written down here."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from onlay.data.read import ToolCall, Turn
from onlay.errors import RecipeError
from onlay.evaluation.findings import Asked, Findings, find
from onlay.evaluation.general import Check, Checked
from onlay.evaluation.harness import TaskScores
from onlay.evaluation.likelihood import RowNats
from onlay.evaluation.measuring import Material, Measurements
from onlay.evaluation.safety import SafetyPrompt
from onlay.evaluation.systems import Question, Said
from onlay.generation.engine import Sampling
from onlay.records import Comparison

REFUSAL = "I cannot help with that."


def asked(*expected: str) -> list[Question]:
    return [
        Question(turns=(Turn("user", f"{i}?"),), expected=text, place=f"rows:{i + 1}") for i, text in enumerate(expected)
    ]  # fmt: skip


def material(**changes: Any) -> Material:
    return Material(**({"questions": [], "held_out": [], "sampling": Sampling()} | changes))


def said(*texts: str, stopped: bool = True) -> list[Said]:
    return [Said(text, len(text), stopped) for text in texts]


def answered(expected: list[str], scores: list[str] | None = None, **answers: list[str]) -> Findings:
    spoken = {name: said(*texts) for name, texts in answers.items()}
    return find(
        material(questions=asked(*expected)), Measurements(said=spoken), judged="adapter", asked=Asked(scores=scores)
    )


def one(comparisons: list[Comparison], score: str, against: str = "base") -> Comparison:
    [found] = [row for row in comparisons if row.score == score and row.against == against]
    return found


def nats(values: list[float], tokens: list[int]) -> RowNats:
    counts = np.array(tokens, dtype=np.int64)
    return RowNats(np.array(values), counts, 2 * counts, np.zeros(len(values), dtype=bool), "how")


# -------------------------------------------------------------------------------------------------------------- answers


def test_paired_yes_or_no_scores_by_hand() -> None:
    expected = [f"answer {i} and so on" for i in range(10)]
    ours = [*expected[:8], "no", "no"]  # Right: 0 to 7.
    theirs = ["no", "no", *["no"] * 6, expected[8], "no"]  # Right: 8.
    found = answered(expected, ["exact_match"], adapter=ours, base=theirs)
    gain = one(found.comparisons, "exact_match")
    assert (gain.value, gain.other, gain.rows) == (0.8, 0.1, 10)
    assert gain.difference == pytest.approx(0.7)
    # Eight rows one way and one the other: 2 (C(9,0) + C(9,1)) / 2^9.
    assert gain.p_value == pytest.approx(2 * (1 + 9) / 2**9)
    assert gain.low < 0.7 < gain.high
    assert found.scores["adapter"]["exact_match"] == 0.8
    assert found.main == "exact_match"
    assert [row["scores"]["adapter"]["exact_match"] for row in found.answers] == [1.0] * 8 + [0.0] * 2
    assert [row["scores"]["base"]["exact_match"] for row in found.answers] == [0.0] * 8 + [1.0, 0.0]


def test_means_by_hand() -> None:
    # Both words; one of two said, and all of one expected: F1 = 2/3; none.
    answers = {"adapter": ["boats river", "river boats", "rain"], "base": ["boats", "river", "stone"]}
    found = answered(["river boats", "river", "stone"], ["token_f1"], **answers)
    gain = one(found.comparisons, "token_f1")
    values = [[row["scores"][name]["token_f1"] for row in found.answers] for name in ("adapter", "base")]
    assert values == [pytest.approx([1.0, 2 / 3, 0.0]), pytest.approx([2 / 3, 1.0, 1.0])]
    assert (gain.value, gain.other) == (pytest.approx(5 / 9), pytest.approx(8 / 9))
    assert gain.difference == pytest.approx(-1 / 3)


def test_every_other_system_is_compared_with_the_judged_one_alone() -> None:
    found = answered(["x"] * 4, ["exact_match"], adapter=["x"] * 4, base=["y"] * 4, prompt=["x", "x", "y", "y"])
    assert {(row.system, row.against) for row in found.comparisons} == {("adapter", "base"), ("adapter", "prompt")}
    assert one(found.comparisons, "exact_match", "prompt").difference == 0.5
    assert {row.score for row in found.comparisons} == {"exact_match", "repetition", "loop", "no_stop"}


def test_a_single_system_has_scores_and_nothing_to_compare() -> None:
    questions = asked("x", "y")
    found = find(
        material(questions=questions),
        Measurements(said={"base": said("x", "z")}),
        judged="base",
        asked=Asked(scores=None),
    )
    assert found.scores["base"]["exact_match"] == 0.5
    assert (found.comparisons, found.smallest_difference, found.forgetting) == ([], {}, [])


def test_rows_without_what_a_score_needs_are_counted() -> None:
    expected = ['{"a": 1}', '{"a": 2}', "words", "other words"]
    found = answered(expected, ["json_equal"], adapter=expected, base=["no"] * 4)
    gain = one(found.comparisons, "json_equal")
    assert (gain.rows, gain.value) == (2, 1.0)
    assert found.notes[-1] == "json_equal counts 2 of 4 rows: the others lack what it needs."
    assert found.answers[2]["scores"]["adapter"]["json_equal"] is None


def test_rows_that_are_too_few_to_show_any_difference_say_so() -> None:
    # By Student's t, two rows would show a mean difference of 677 points: there is none.
    found = answered(["a b", "c d"], ["token_f1"], adapter=["a b", "c"], base=["a", "c"])
    assert found.smallest_difference == {}
    assert found.notes == ["These rows are too few to show any difference of token_f1."]
    enough = answered(["a b"] * 40, ["token_f1"], adapter=["a b"] * 38 + ["a"] * 2, base=["a"] * 40)
    assert 0 < enough.smallest_difference["token_f1"] < 1
    assert enough.notes == []


def test_a_score_no_row_can_have_is_none_and_not_compared() -> None:
    found = answered(["x", "y"], ["tool_call_match", "exact_match"], adapter=["x", "y"], base=["x", "z"])
    assert found.scores["adapter"]["tool_call_match"] is None
    assert not [row for row in found.comparisons if row.score == "tool_call_match"]
    assert "tool_call_match counts 0 of 2 rows: the others lack what it needs." in found.notes


def test_gated_scores_are_measured_beside_the_others() -> None:
    measurements = Measurements(said={"adapter": said("a b", "c d"), "base": said("a", "c")})
    how = Asked(scores=["exact_match"], gated=["rouge1", "exact_match", "no_stop"])
    found = find(material(questions=asked("a b", "c d")), measurements, judged="adapter", asked=how)
    assert one(found.comparisons, "rouge1").value == 1.0
    assert [row.score for row in found.comparisons].count("no_stop") == 1


@pytest.mark.parametrize(("scores", "main"), [
    (["no_stop", "rouge1"], "rouge1"), (["rouge1", "exact_match"], "rouge1"), (["no_stop"], "exact_match"),
])  # fmt: skip
def test_failures_go_by_the_first_score_of_which_more_is_better(scores: list[str], main: str) -> None:
    found = answered(["a b"] * 2, scores, adapter=["a b"] * 2, base=["a"] * 2)
    assert (found.main, found.main_score.name) == (main, main)
    assert main in found.answers[0]["scores"]["adapter"]


def test_an_unknown_score_is_an_error() -> None:
    with pytest.raises(RecipeError, match="exact_mach is not a score"):
        answered(["x"], ["exact_mach"], adapter=["x"], base=["x"])


def test_what_the_rows_could_show_depends_on_how_often_systems_differ() -> None:
    expected = ["x"] * 40
    few = answered(expected, ["exact_match"], adapter=expected, base=["y"] * 4 + ["x"] * 36)
    many = answered(expected, ["exact_match"], adapter=expected, base=["y"] * 20 + ["x"] * 20)
    assert 0 < few.smallest_difference["exact_match"] < many.smallest_difference["exact_match"] < 1


def test_rows_of_answers_hold_messages_and_tools() -> None:
    call = Turn("assistant", "", (ToolCall("boats", {"on": 1}, "c"),))
    question = Question(turns=(Turn("user", "?"), call), tools=({"name": "boats"},), expected="x", place="rows:9")
    found = find(
        material(questions=[question]), Measurements(said={"base": said("x", stopped=False)}), judged="base",
        asked=Asked(scores=["no_stop"]),
    )  # fmt: skip
    [row] = found.answers
    assert row["prompt"][1]["tool_calls"] == [{"id": "c", "name": "boats", "arguments": {"on": 1}}]
    assert (row["row"], row["place"], row["tools"], row["answers"]) == (0, "rows:9", [{"name": "boats"}], {"base": "x"})
    assert row["scores"]["base"]["no_stop"] == 1.0


# ---------------------------------------------------------------------------------------------------------- likelihoods


def test_losses_are_weighted_by_tokens() -> None:
    measurements = Measurements(
        held_out={"adapter": nats([2.0, 30.0], [2, 10]), "base": nats([8.0, 40.0], [2, 10])},
        texts={"general": {"adapter": nats([5.0, 6.0], [5, 5]), "base": nats([5.0, 5.0], [5, 5])}},
    )
    found = find(material(), measurements, judged="adapter", asked=Asked(scores=None))
    assert [(row.text, row.system, row.tokens) for row in found.likelihood] == [
        ("held_out", "adapter", 12), ("held_out", "base", 12), ("general", "adapter", 10), ("general", "base", 10)
    ]  # fmt: skip
    first = found.likelihood[0]
    assert first.nats_per_token == pytest.approx(32 / 12)
    assert first.perplexity == pytest.approx(math.exp(32 / 12))
    assert first.bits_per_byte == pytest.approx(32 / math.log(2) / 24)
    assert one(found.comparisons, "nats_per_token").difference == pytest.approx((32 - 48) / 12)
    assert one(found.forgetting, "nats_per_token").difference == pytest.approx(0.1)
    assert not found.comparisons[0].higher_is_better


def test_several_texts_are_named() -> None:
    rows = {"adapter": nats([5.0, 6.0], [5, 5]), "base": nats([5.0, 5.0], [5, 5])}
    found = find(
        material(), Measurements(texts={"general": rows, "own.txt": rows}), judged="adapter", asked=Asked(scores=None)
    )
    assert [row.score for row in found.forgetting] == ["nats_per_token (general)", "nats_per_token (own.txt)"]


# ------------------------------------------------------------------------------------------------------ checks and tasks


def answers_right(*right: bool) -> list[Checked]:
    return [Checked((0.0, -1.0), 0, value, 0, value) for value in right]


def test_checks_are_compared_question_by_question() -> None:
    checks = [Check(f"{i}?", ("a", "b"), 0, "", f"c:{i}") for i in range(4)]
    given = {"adapter": answers_right(True, False, False, False), "base": answers_right(True, True, True, False)}
    found = find(
        material(checks={"general checks": checks}), Measurements(checks={"general checks": given}), judged="adapter",
        asked=Asked(scores=None),
    )  # fmt: skip
    lost = one(found.forgetting, "accuracy")
    assert (lost.value, lost.other, lost.difference, lost.p_value) == (0.25, 0.75, -0.5, 0.5)


def test_tasks_are_compared_row_by_row_and_may_be_better_when_lower() -> None:
    def scored(acc: list[float], bits: list[float]) -> TaskScores:
        return TaskScores("own", len(acc), {}, {"acc": True, "bits": False}, {"acc,none": acc, "bits,none": bits}, "1")

    tasks = {"adapter": {"own": scored([1.0, 0.0], [2.5, 1.5])}, "base": {"own": scored([0.0, 0.0], [1.0, 1.0])}}
    found = find(material(), Measurements(tasks=tasks), judged="adapter", asked=Asked(scores=None))
    assert one(found.forgetting, "own acc").difference == 0.5
    bits = one(found.forgetting, "own bits")
    assert (bits.difference, bits.higher_is_better) == (1.0, False)


# --------------------------------------------------------------------------------------------------------------- safety


def refusals(*, harmful: int, harmless: int, of: int = 4) -> list[Said]:
    def answers(refused: int) -> list[str]:
        return [REFUSAL] * refused + ["Here are the seven boats you asked for."] * (of - refused)

    return said(*answers(harmful), *answers(harmless))


PROMPTS = [SafetyPrompt(f"{i}?", i < 4, "", f"s:{i}") for i in range(8)]


def test_refusals_of_both_kinds() -> None:
    given = {"adapter": refusals(harmful=2, harmless=1), "base": refusals(harmful=4, harmless=0)}
    found = find(material(prompts=PROMPTS), Measurements(refusals=given), judged="adapter", asked=Asked(scores=None))
    harmful, harmless = one(found.safety, "refused_harmful"), one(found.safety, "refused_harmless")
    assert (harmful.value, harmful.other, harmful.rows, harmful.higher_is_better) == (0.5, 1.0, 4, True)
    assert (harmless.value, harmless.other, harmless.rows, harmless.higher_is_better) == (0.25, 0.0, 4, False)
    assert found.scores["adapter"] == {"refused_harmful": 0.5, "refused_harmless": 0.25}
    assert found.notes == []


def test_no_answer_and_a_base_that_refuses_nothing_are_told() -> None:
    given = {
        "adapter": [*refusals(harmful=0, harmless=0)[:6], *said("", "...")],
        "base": refusals(harmful=0, harmless=1),
    }
    found = find(material(prompts=PROMPTS), Measurements(refusals=given), judged="adapter", asked=Asked(scores=None))
    assert found.notes == [
        "2 of 8 safety prompts got no answer at all; none counts as a refusal.",
        "The base refuses none of the harmful prompts, so the safety comparison cannot show a loss.",
    ]
    # The base by itself is compared with nothing.
    alone = Measurements(refusals={"base": given["base"]})
    assert find(material(prompts=PROMPTS), alone, judged="base", asked=Asked(scores=None)).notes == []
