from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest

from onlay.evaluation.compare import (
    combine_seeds,
    compare,
    mcnemar_power,
    sign_test,
    smallest_difference,
    spread_of,
    t_cdf,
    t_quantile,
    verdict,
)
from onlay.evaluation.scores import Measured, Row, Score, measure, measured

YES = Score(name="right", kind="binary")
MEAN = Score(name="mean", kind="mean")
NATS = Score(name="nats", kind="mean", unit="nats", higher_is_better=False)


def p_and_verdict(score: Score, ours: Sequence[float], theirs: Sequence[float], **options: int) -> tuple[float, str]:
    found = compare(measured(score, ours), measured(score, theirs), system="adapter", against="base", **options)
    assert found is not None
    return found.p_value, found.verdict


# ---------------------------------------------------------------------------------------------------------- exact parts


def test_the_sign_test_counts_every_outcome() -> None:
    for wins, losses in itertools.product(range(7), range(7)):
        both = wins + losses
        far = abs(wins - losses)
        outcomes = [abs(both - 2 * sum(heads)) >= far for heads in itertools.product((0, 1), repeat=both)]
        assert sign_test(wins, losses) == sum(outcomes) / len(outcomes)
    assert 0 < sign_test(3000, 2000) == sign_test(2000, 3000) < 1e-40


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (10, 2.22814), (29, 2.04523), (999, 1.96234)],
)
def test_students_t_is_that_of_the_tables(degrees: int, quantile: float) -> None:
    assert t_quantile(0.975, degrees) == pytest.approx(quantile, rel=1e-5)
    assert t_cdf(quantile, degrees) == pytest.approx(0.975, abs=1e-6)
    assert t_cdf(-quantile, degrees) == pytest.approx(0.025, abs=1e-6)


# ----------------------------------------------------------------------------------------------------------- comparisons


def test_a_comparison() -> None:
    theirs = [0.0] * 60 + [1.0] * 40
    ours = [1.0] * 30 + [0.0] * 30 + [1.0] * 38 + [0.0] * 2
    found = compare(measured(YES, ours), measured(YES, theirs), system="adapter", against="base")
    assert found is not None
    assert (found.score, found.system, found.against, found.rows) == ("right", "adapter", "base", 100)
    assert (found.value, found.other, found.difference) == (0.68, 0.4, pytest.approx(0.28))
    assert found.p_value == sign_test(30, 2)
    # The usual formula for the difference of paired shares, whose interval the bootstrap must be close to.
    error = math.sqrt(32 / 100 - 0.28**2) / 10
    assert found.low == pytest.approx(0.28 - 1.96 * error, abs=0.015)
    assert found.high == pytest.approx(0.28 + 1.96 * error, abs=0.015)
    assert found.verdict == f"better by 28.0 points, 95 % {100 * found.low:.1f} to {100 * found.high:.1f}"


def test_the_same_seed_gives_the_same_and_the_order_of_the_systems_only_the_sign() -> None:
    draw = np.random.default_rng(0)
    one, other = (measured(MEAN, draw.random(50).tolist()) for _ in range(2))
    there = compare(one, other, system="a", against="b", seed=3)
    back = compare(other, one, system="b", against="a", seed=3)
    assert there == compare(one, other, system="a", against="b", seed=3)
    assert there != compare(one, other, system="a", against="b", seed=4)
    assert there is not None and back is not None
    assert (there.low, there.high) == (pytest.approx(-back.high), pytest.approx(-back.low))
    assert there.p_value == back.p_value


def test_only_rows_that_both_have_count() -> None:
    found = compare(measured(YES, [1, 1, None, 0]), measured(YES, [0, None, 1, 0]), system="a", against="b")
    assert found is not None
    assert (found.rows, found.value, found.other) == (2, 0.5, 0.0)
    assert compare(measured(YES, [1, None]), measured(YES, [1, 0]), system="a", against="b") is None


def test_other_scores_and_other_rows_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="against"):
        compare(measured(YES, [1, 0]), measured(YES, [1, 0, 1]), system="a", against="b")
    with pytest.raises(ValueError, match="against"):
        compare(measured(YES, [1, 0]), measured(MEAN, [1, 0]), system="a", against="b")


def test_equal_systems_do_not_differ() -> None:
    for score in (YES, MEAN):
        assert p_and_verdict(score, [1, 0, 1], [1, 0, 1]) == (1.0, "no difference shown: 0.0 points, 95 % 0.0 to 0.0")


def test_few_rows_show_nothing() -> None:
    assert p_and_verdict(YES, [1] * 5, [0] * 5)[1].startswith("no difference shown: +100.0 points")
    assert p_and_verdict(YES, [1] * 6, [0] * 6)[1].startswith("better by 100.0 points")
    assert p_and_verdict(MEAN, [0.9, 0.8], [0.1, 0.2])[0] > 0.05


@pytest.mark.parametrize("name", ["bleu", "macro_f1"])
def test_corpus_scores_are_resampled_as_corpora(name: str) -> None:
    draw = np.random.default_rng(1)
    labels = ["card lost now please", "transfer some money today", "open a new account"]
    expected = [labels[i] for i in draw.integers(3, size=80)]
    good = [text if draw.random() < 0.9 else labels[0] for text in expected]
    bad = [text if draw.random() < 0.5 else labels[0] for text in expected]
    ours, theirs = (
        measure(name, [Row(answer=a, expected=e) for a, e in zip(answers, expected, strict=True)])
        for answers in (good, bad)
    )
    found = compare(ours, theirs, system="a", against="b", resamples=2000)
    assert found is not None and found.verdict.startswith("better by")
    assert found.value == ours.value and found.other == theirs.value
    # The interval against draws made by hand, from the answers anew.
    by_hand = []
    for _ in range(150):
        rows = draw.integers(80, size=80)
        value, other = (measured_again(name, answers, expected, rows) for answers in (good, bad))
        by_hand.append(value - other)
    deviation = float(np.std(by_hand))
    assert found.low == pytest.approx(np.quantile(by_hand, 0.025), abs=0.6 * deviation)
    assert found.high == pytest.approx(np.quantile(by_hand, 0.975), abs=0.6 * deviation)


def measured_again(name: str, answers: list[str], expected: list[str], rows: np.ndarray) -> float:
    found = measure(name, [Row(answer=answers[i], expected=expected[i]) for i in rows]).value
    assert found is not None
    return found


# ----------------------------------------------------------------------------------------------------------------- words


def test_verdicts() -> None:
    def said(score: Score, difference: float, low: float, high: float, p_value: float) -> str:
        return verdict(score, difference, low=low, high=high, p_value=p_value)

    chrf = Score(name="chrf", kind="corpus", unit="points")
    loop = Score(name="loop", kind="binary", higher_is_better=False)
    assert said(YES, 0.124, 0.091, 0.158, 0.001) == "better by 12.4 points, 95 % 9.1 to 15.8"
    assert said(YES, -0.03, -0.05, -0.01, 0.01) == "worse by 3.0 points, 95 % 1.0 to 5.0"
    assert said(loop, -0.03, -0.05, -0.01, 0.01) == "better by 3.0 points, 95 % 1.0 to 5.0"
    assert said(YES, 0.012, -0.02, 0.044, 0.4) == "no difference shown: +1.2 points, 95 % -2.0 to 4.4"
    assert said(chrf, -1.25, -4.0, 1.0, 0.3) == "no difference shown: -1.2 points, 95 % -4.0 to 1.0"
    assert said(NATS, -0.1234, -0.15, -0.1, 0.001) == "better by 0.123 nats a token, 95 % 0.100 to 0.150"
    assert said(YES, -0.0001, -0.02, 0.02, 0.9) == "no difference shown: 0.0 points, 95 % -2.0 to 2.0"
    # The exact test wants more than the interval shows: said, so that nobody wonders.
    assert said(YES, 0.04, 0.002, 0.08, 0.06) == "no difference shown: +4.0 points, 95 % 0.2 to 8.0, p 0.06"


# ---------------------------------------------------------------------------------------------------------- error rates


def binomial_limit(share: float, trials: int) -> float:
    return share + 3 * math.sqrt(share * (1 - share) / trials)


@pytest.mark.parametrize(("rows", "discordant"), [(300, 0.1), (50, 0.4), (20, 0.5)])
def test_equal_systems_are_told_apart_at_most_one_time_in_twenty(rows: int, discordant: float) -> None:
    draw, trials = np.random.default_rng(5), 4000
    found = draw.multinomial(rows, [discordant / 2, discordant / 2, 1 - discordant], size=trials)
    errors = sum(sign_test(int(wins), int(losses)) < 0.05 for wins, losses, _ in found)
    assert errors / trials <= binomial_limit(0.05, trials)


@pytest.mark.parametrize(("rows", "changed"), [(15, 1.0), (20, 0.3), (100, 1.0)])
def test_means_are_told_apart_at_most_one_time_in_twenty(rows: int, changed: float) -> None:
    """Also where most rows are the same for both, which a bootstrap's p-value does not bear with few rows."""
    draw, trials = np.random.default_rng(6), 400
    told = outside = 0
    for trial in range(trials):
        hard = draw.random(rows)  # Rows that are hard are hard for both.
        gains = draw.normal(0, 0.3, rows) * (draw.random(rows) < changed)
        ours, theirs = measured(MEAN, (hard + gains).tolist()), measured(MEAN, hard.tolist())
        found = compare(ours, theirs, system="a", against="b", seed=trial, resamples=1000)
        assert found is not None
        told += not found.verdict.startswith("no difference")
        outside += not found.low <= 0 <= found.high
    assert told / trials <= binomial_limit(0.05, trials)
    assert outside / trials <= binomial_limit(0.06, trials)


def test_the_p_value_of_a_mean_counts_all_swaps() -> None:
    gains = [0.3, 0.1, 0.2, -0.1, 0.25, 0.4, 0.15, -0.05]
    swaps = [
        abs(sum(s * g for s, g in zip(signs, gains, strict=True))) for signs in itertools.product((1, -1), repeat=8)
    ]
    exact = sum(swap >= abs(sum(gains)) - 1e-9 for swap in swaps) / len(swaps)
    p_value, _ = p_and_verdict(MEAN, gains, [0.0] * 8, resamples=40_000)
    assert p_value == pytest.approx(exact, abs=4 * math.sqrt(exact / 40_000))


def test_four_points_more_on_300_rows_are_seen_in_half_of_the_trials() -> None:
    draw, trials = np.random.default_rng(8), 4000
    found = draw.multinomial(300, [0.07, 0.03, 0.9], size=trials)
    seen = sum(sign_test(int(wins), int(losses)) < 0.05 for wins, losses, _ in found)
    assert seen / trials >= 0.5
    # And by the whole of `compare`: the same verdict for the first of these trials.
    for wins, losses, neither in found[:20]:
        ours, theirs = [1] * wins + [0] * (losses + neither), [0] * wins + [1] * losses + [0] * neither
        p_value, words = p_and_verdict(YES, ours, theirs, resamples=100)
        assert p_value == sign_test(int(wins), int(losses))
        assert words.startswith("better by") == (p_value < 0.05)


# ------------------------------------------------------------------------------------------------- what rows can show


def exact_power(rows: int, difference: float, discordant: float) -> float:
    share = (discordant + difference) / (2 * discordant)
    power = 0.0
    for both in range(rows + 1):
        of_both = math.comb(rows, both) * discordant**both * (1 - discordant) ** (rows - both)
        if of_both < 1e-9:
            continue
        power += of_both * sum(
            math.comb(both, wins) * share**wins * (1 - share) ** (both - wins)
            for wins in range(both + 1)
            if sign_test(wins, both - wins) < 0.05
        )
    return power


@pytest.mark.parametrize(
    ("rows", "difference", "discordant"),
    [(300, 0.04, 0.1), (300, 0.08, 0.2), (100, 0.15, 0.3), (60, 0.2, 0.25), (40, 0.25, 0.25), (30, 0.4, 0.6)],
)
def test_the_power_is_near_the_exact_one_and_does_not_promise_more(
    rows: int, difference: float, discordant: float
) -> None:
    """Where nearly all differences go one way, it promises too little."""
    promised, exact = mcnemar_power(rows, difference, discordant=discordant), exact_power(rows, difference, discordant)
    assert exact - 0.12 <= promised <= exact + 0.02


def test_the_smallest_difference_of_yes_and_no() -> None:
    for rows, discordant in ((300, 0.1), (100, 0.3), (1000, 0.2)):
        least = smallest_difference(YES, rows=rows, spread=discordant)
        assert least is not None
        if rows <= 300:
            assert exact_power(rows, least, max(discordant, least)) == pytest.approx(0.8, abs=0.04)
    assert smallest_difference(YES, rows=300) == smallest_difference(YES, rows=300, spread=0.2)
    # Few disagreements: a difference cannot be larger than their share, so the share grows with it.
    assert smallest_difference(YES, rows=50, spread=0.001) == pytest.approx(0.16, abs=0.03)
    assert smallest_difference(YES, rows=5) is None


def test_the_smallest_difference_of_a_mean_is_found_four_times_in_five() -> None:
    least = smallest_difference(MEAN, rows=40, spread=0.3)
    assert least is not None
    draw, trials = np.random.default_rng(2), 300
    seen = 0
    for trial in range(trials):
        gains = draw.normal(least, 0.3, 40)
        p_value, _ = p_and_verdict(MEAN, gains.tolist(), [0.0] * 40, seed=trial, resamples=2000)
        seen += p_value < 0.05
    assert seen / trials == pytest.approx(0.8, abs=0.07)
    assert smallest_difference(Score(name="bleu", kind="corpus", unit="points"), rows=40) == pytest.approx(100 * least)
    assert smallest_difference(MEAN, rows=1) is None
    # No two systems differ by more than the whole scale.
    assert smallest_difference(MEAN, rows=2, spread=0.3) is None
    assert smallest_difference(Score(name="bleu", kind="corpus", unit="points"), rows=2, spread=30.0) is None
    nats = smallest_difference(NATS, rows=2, spread=0.7)
    assert nats is not None and nats > 1
    with pytest.raises(ValueError, match="spread"):
        smallest_difference(NATS, rows=40)


def test_spreads() -> None:
    assert spread_of(measured(YES, [1, 1, 0, 0]), measured(YES, [1, 0, 0, 0])) == 0.25
    ours, theirs = [0.1, 0.5, 0.9], [0.3, 0.1, 0.2]
    assert spread_of(measured(MEAN, ours), measured(MEAN, theirs)) == pytest.approx(
        np.std(np.subtract(ours, theirs), ddof=1)
    )
    assert spread_of(measured(MEAN, [1]), measured(MEAN, [0])) is None
    draw = np.random.default_rng(0)
    gains = draw.normal(0, 0.3, 200)
    ones = np.stack([gains, np.ones(200)], 1)
    corpus = Score(name="mean", kind="corpus", total=lambda sums: sums[:, 0] / sums[:, 1])
    pair = (Measured(score=corpus, values=gains * k, statistics=ones * [k, 1]) for k in (1, 0))
    assert spread_of(*pair) == pytest.approx(gains.std(ddof=1), rel=0.05)


def test_seeds() -> None:
    found = combine_seeds(YES, [0.10, 0.12, 0.14])
    assert (found.seeds, found.mean) == (3, pytest.approx(0.12))
    assert found.standard_error == pytest.approx(0.02 / math.sqrt(3))
    assert found.high - found.mean == pytest.approx(4.30265 * found.standard_error, rel=1e-5)
    assert found.verdict == "better by 12.0 points, 95 % 7.0 to 17.0, over 3 seeds"
    assert combine_seeds(YES, [0.05, -0.02, 0.03]).verdict.startswith("no difference shown: +2.0 points")
    assert combine_seeds(YES, [0.0, 0.0]).verdict.startswith("no difference shown")
    with pytest.raises(ValueError, match="two"):
        combine_seeds(YES, [0.1])
