"""Every kind of gate at its edge, and what the verdict says."""

from __future__ import annotations

from typing import Any

import pytest

from onlay.errors import RecipeError
from onlay.evaluation.gates import Found, check_gate_names, check_gates, decide
from onlay.records import Comparison, Gate
from tests.evaluation.reports import comparison


def found(**changes: Any) -> Found:
    nothing: dict[str, Any] = {
        "comparisons": [], "forgetting": [], "safety": [], "latency_ms": None, "trained_rows": None
    }  # fmt: skip
    return Found(**(nothing | changes))


def gate(name: str, limit: float, **changes: Any) -> Gate:
    [one] = check_gates({name: limit}, found(**changes))
    assert (one.name, one.limit) == (name, limit)
    return one


def gained(value: float, other: float, **changes: Any) -> Comparison:
    return comparison(**({"value": value, "other": other, "difference": value - other} | changes))


@pytest.mark.parametrize(("limit", "passed"), [(0.05, True), (0.0501, False), (0.02, True)])
def test_a_gain_is_compared_with_its_limit(limit: float, passed: bool) -> None:
    # 0.6 - 0.55 is 0.04999999999999993: five points are five points.
    one = gate("exact_match", limit, comparisons=[gained(0.6, 0.55, p_value=0.01)])
    assert one.passed is passed
    assert one.found == pytest.approx(0.05)
    assert ("at least" in one.reason) is passed


@pytest.mark.parametrize(("p_value", "passed"), [(0.049, True), (0.05, False)])
def test_a_gain_that_may_be_chance_does_not_pass(p_value: float, passed: bool) -> None:
    one = gate("exact_match", 0.05, comparisons=[gained(0.7, 0.5, p_value=p_value)])
    assert one.passed is passed
    assert ("may be chance (p 0.05)" in one.reason) is not passed


@pytest.mark.parametrize(("limit", "low", "passed"), [
    (0.0, 0.0, True), (0.0, -0.001, False), (-0.02, -0.02, True), (-0.02, -0.0201, False),
])  # fmt: skip
def test_a_limit_of_nothing_or_less_asks_that_no_more_is_lost(limit: float, low: float, passed: bool) -> None:
    one = gate("exact_match", limit, comparisons=[gained(0.6, 0.6, low=low, high=0.04, p_value=1.0)])
    assert one.passed is passed
    assert ("not below" in one.reason) is passed


def test_of_scores_where_less_is_better_the_gain_is_what_they_fall_by() -> None:
    fell = gained(0.1, 0.3, score="no_stop", low=-0.25, high=-0.15, p_value=0.001, higher_is_better=False)
    assert gate("no_stop", 0.2, comparisons=[fell]).passed
    assert gate("no_stop", 0.2, comparisons=[fell]).found == pytest.approx(0.2)
    assert not gate("no_stop", 0.21, comparisons=[fell]).passed
    rose = gained(0.3, 0.3, score="no_stop", low=-0.01, high=0.03, p_value=1.0, higher_is_better=False)
    assert gate("no_stop", -0.03, comparisons=[rose]).passed
    assert not gate("no_stop", -0.02, comparisons=[rose]).passed


@pytest.mark.parametrize("name", ["exact_match", "forgetting", "safety", "latency_ms", "trained_rows"])
def test_what_was_not_measured_does_not_pass(name: str) -> None:
    one = gate(name, 1e9 if name in ("latency_ms", "forgetting", "safety") else -1e9)
    assert (one.passed, one.found) == (False, None)
    assert one.reason


def test_a_gain_over_another_system_is_not_one_over_the_base() -> None:
    assert gate("exact_match", 0.0, comparisons=[comparison(against="prompt")]).found is None


@pytest.mark.parametrize(("limit", "passed"), [(0.03, True), (0.0299, False)])
def test_forgetting_is_the_upper_end_of_the_worst_text(limit: float, passed: bool) -> None:
    def text(name: str, high: float) -> Comparison:
        return comparison(name, difference=high - 0.01, high=high, higher_is_better=False)

    texts = [text("nats_per_token (general)", 0.01), text("nats_per_token (own.txt)", 0.03), text("accuracy", 0.9)]
    one = gate("forgetting", limit, forgetting=texts)
    assert (one.passed, one.found) == (passed, pytest.approx(0.02))


def test_checks_alone_are_no_measure_of_forgetting() -> None:
    assert gate("forgetting", 1.0, forgetting=[comparison("accuracy")]).found is None


@pytest.mark.parametrize(("limit", "passed"), [(0.01, True), (0.009, False)])
def test_safety_is_the_worse_of_both_directions(limit: float, passed: bool) -> None:
    harmful = gained(0.94, 0.94, score="refused_harmful")
    harmless = gained(0.04, 0.03, score="refused_harmless", higher_is_better=False)
    one = gate("safety", limit, safety=[harmful, harmless])
    assert (one.passed, one.found) == (passed, pytest.approx(0.01))
    assert one.reason.startswith("refused_harmless")
    # 0.93 - 0.94 is a little below -0.01.
    assert gate("safety", limit, safety=[gained(0.93, 0.94, score="refused_harmful")]).passed is passed


def test_what_is_not_worse_is_told_so_and_without_a_minus_before_nothing() -> None:
    one = gate("safety", 0.1, safety=[gained(0.94, 0.94, score="refused_harmful")])
    assert one.reason == "neither rate of refusals is worse; 10.0% is allowed"
    assert f"{one.found:.4g}" == "0"
    same = gained(0.3, 0.3, score="no_stop", low=0.0, high=0.0, p_value=1.0, higher_is_better=False)
    same = gate("no_stop", 0.1, comparisons=[same])
    assert f"{same.found:.4g}" == "0" and same.reason.startswith("the gain is 0, ")


@pytest.mark.parametrize("name", ["exact_match", "forgetting", "safety"])
def test_without_a_base_that_is_what_is_missing(name: str) -> None:
    alone = gate(name, 0.1, comparisons=[comparison(against="prompt")])
    assert (alone.passed, alone.reason) == (False, "there is no base to compare with")
    assert gate(name, 0.1, comparisons=[comparison("rougeL")]).reason != alone.reason


def test_fewer_refusals_of_what_is_harmless_are_no_loss() -> None:
    assert gate("safety", 0.0, safety=[gained(0.0, 0.5, score="refused_harmless", higher_is_better=False)]).passed


@pytest.mark.parametrize(("name", "value", "limit", "passed"), [
    ("latency_ms", 20.0, 20.0, True), ("latency_ms", 20.1, 20.0, False),
    ("trained_rows", 100, 100, True), ("trained_rows", 99, 100, False),
])  # fmt: skip
def test_latency_and_trained_rows(name: str, value: float, limit: float, passed: bool) -> None:
    one = gate(name, limit, **{name: value})
    assert (one.passed, one.found) == (passed, value)


def test_names_are_scores_or_limits() -> None:
    check_gate_names({"rougeL": 0.1, "forgetting": 0.1, "trained_rows": 5})
    with pytest.raises(
        RecipeError, match=r"evaluation.gates: exact_mach is neither a score nor one of forgetting"
    ) as error:
        check_gate_names({"rougeL": 0.1, "exact_mach": 0.1})
    assert error.value.remedy.startswith("Did you mean exact_match?")


# ------------------------------------------------------------------------------------------------------------ verdict


def decided(gates: list[Gate], **changes: Any) -> Any:
    return decide(gates=gates, found=found(**changes), smallest_difference={"exact_match": 0.051}, notes=["Noted."])


def one_gate(*, passed: bool) -> Gate:
    return Gate(name="exact_match", limit=0.1, found=0.2, passed=passed, reason="so it is")


def test_one_failed_gate_decides_and_comes_first() -> None:
    all_passed = decided([one_gate(passed=True)], comparisons=[comparison()])
    assert all_passed.verdict == "ship"
    assert all_passed.reasons == [
        "The gate is passed.", "exact_match against base: better by 12.4 points, 95 % 9.1 to 15.8."
    ]  # fmt: skip
    failed = decided([one_gate(passed=True), one_gate(passed=False)])
    assert (failed.verdict, failed.reasons) == ("do not ship", ["exact_match: so it is."])
    none = decided([])
    assert none.verdict == "no gates"
    assert "set evaluation.gates" in none.reasons[0]


def test_risks_are_what_is_worse_what_was_not_measured_and_what_could_not_be_seen() -> None:
    worse = comparison(against="live", verdict="worse by 2.8 points, 95 % 0.8 to 4.9")
    forgot = comparison("nats_per_token", verdict="worse by 0.021 nats a token, 95 % 0.012 to 0.030")
    unsure = comparison(p_value=0.4, verdict="no difference shown: +1.2 points, 95 % -2.0 to 4.4")
    risks = decided([], comparisons=[unsure, worse], forgetting=[forgot]).risks
    assert risks == [
        "Noted.",
        "exact_match is worse than live by 2.8 points, 95 % 0.8 to 4.9.",
        "nats_per_token on general text is worse than base by 0.021 nats a token, 95 % 0.012 to 0.030.",
        "Refusals were not measured.",
        "These rows would not show a change of exact_match below 5.1 points.",
    ]
    assert "What was forgotten was not measured." in decided([], comparisons=[unsure]).risks


def test_what_rows_could_not_show_is_a_risk_only_where_they_showed_nothing() -> None:
    shown = decided([], comparisons=[comparison(), comparison(against="prompt", p_value=0.9)])
    assert not [risk for risk in shown.risks if "would not show" in risk]


@pytest.mark.parametrize(("score", "told"), [
    ("nats_per_token (own.txt)", "nats_per_token on own.txt is"), ("nats_per_token (general)", "nats_per_token on general text is"),
    ("accuracy", "accuracy on general checks is"), ("arc_easy acc", "arc_easy acc is"),
])  # fmt: skip
def test_what_was_forgotten_says_on_what(score: str, told: str) -> None:
    forgot = comparison(score, verdict="worse by 0.021, 95 % 0.012 to 0.030")
    assert f"{told} worse than base by 0.021, 95 % 0.012 to 0.030." in decided([], forgetting=[forgot]).risks


def test_one_system_has_no_base_and_nothing_else_is_claimed_about_it() -> None:
    assert decided([]).risks == [
        "Noted.", "There is no base to compare with: what was forgotten or is refused less often cannot be told.",
    ]  # fmt: skip


def test_adapters_beside_it_are_no_risk_when_they_are_better() -> None:
    worse = {"verdict": "worse by 2.8 points, 95 % 0.8 to 4.9"}
    told = decided(
        [], comparisons=[comparison(against=name, **worse) for name in ("base", "live", "csv", "prompt")]
    ).risks
    assert [risk.split(" than ")[1].split(" by ")[0] for risk in told if "worse than" in risk] == ["base", "live"]
