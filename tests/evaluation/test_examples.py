from __future__ import annotations

from typing import Any

from onlay.evaluation.examples import choose, measure_of
from tests.evaluation.reports import answer_row, bare_report, comparison, full_report


def row(number: int, base: float | None, ours: float | None, score: str = "exact_match") -> dict[str, Any]:
    return answer_row(number, scores={"base": {score: base}, "adapter": {score: ours}})


def test_rows_are_sorted_by_the_first_yes_no_score_that_is_compared_against_the_base() -> None:
    report = full_report(comparisons=[comparison("rougeL", against="live"), comparison(against="base")])
    rows = [
        answer_row(
            0,
            answers={"base": "a", "adapter": "b", "live": "c"},
            scores={"adapter": {"rougeL": 0.4, "exact_match": 0.0}},
        )
    ]
    measure = measure_of(report, rows)
    assert measure is not None
    assert (measure.score, measure.system, measure.against, measure.yes_no) == ("exact_match", "adapter", "base", True)


def test_without_a_yes_no_score_rows_are_better_or_worse() -> None:
    rows = [row(0, 0.5, 0.7, "rougeL"), row(1, 0.5, 0.2, "rougeL"), row(2, 0.5, 0.5, "rougeL")]
    measure = measure_of(full_report(comparisons=[comparison("rougeL")]), rows)
    assert measure is not None and not measure.yes_no
    assert [measure.kind(one) for one in rows] == ["fixed", "broken", "neither"]


def test_where_lower_is_better_a_fall_is_a_gain() -> None:
    rows = [row(0, 1.0, 0.0, "no_stop"), row(1, 0.0, 0.0, "no_stop"), row(2, 1.0, 1.0, "no_stop")]
    measure = measure_of(full_report(comparisons=[comparison("no_stop", higher_is_better=False)]), rows)
    assert measure is not None
    assert [measure.kind(one) for one in rows] == ["fixed", "both", "neither"]


def test_one_system_is_right_or_wrong() -> None:
    rows = [
        answer_row(number, answers={"base": "a"}, scores={"base": {"exact_match": float(number)}}) for number in (0, 1)
    ]
    measure = measure_of(bare_report(), rows)
    assert measure is not None and measure.against is None
    assert [measure.kind(one) for one in rows] == ["neither", "both"]


def test_rows_without_scores_are_shown_and_counted() -> None:
    rows = [row(0, None, None), row(1, 0.0, 1.0)]
    chosen, counts = choose(rows, measure=measure_of(full_report(), rows), most=9)
    assert [(kind, one["row"]) for kind, one in chosen] == [("fixed", 1), ("unscored", 0)]
    assert counts == {"fixed": 1, "unscored": 1}
    assert measure_of(full_report(), rows[:1]) is None and measure_of(full_report(), []) is None
    assert choose(rows[:1], measure=None, most=9) == ([("unscored", rows[0])], {"unscored": 1})


def test_every_kind_has_its_share_and_everything_is_counted() -> None:
    rows = [row(number, 0.0, 1.0) for number in range(50)] + [row(50, 1.0, 0.0), row(51, 0.0, 0.0), row(52, 1.0, 1.0)]
    measure = measure_of(full_report(), rows)
    chosen, counts = choose(rows, measure=measure, most=5)
    assert [(kind, one["row"]) for kind, one in chosen] == [
        ("fixed", 0), ("broken", 50), ("neither", 51), ("fixed", 1), ("fixed", 2),
    ]  # fmt: skip
    assert counts == {"fixed": 50, "broken": 1, "neither": 1, "both": 1}
    chosen, _ = choose(rows, measure=measure, most=100)
    assert len(chosen) == 53 and chosen[-1][0] == "both"


def test_the_largest_changes_come_first() -> None:
    rows = [row(0, 0.5, 0.6, "rougeL"), row(1, 0.1, 0.9, "rougeL"), row(2, 0.1, 0.9, "rougeL")]
    chosen, _ = choose(rows, measure=measure_of(full_report(comparisons=[comparison("rougeL")]), rows), most=9)
    assert [one["row"] for _, one in chosen] == [1, 2, 0]
