"""Whether an adapter may ship: the recipe's gates held against what was found, and the verdict in sentences.

    SCORE: x       the gain over the base is at least x.  Above 0 it must also be more than chance (p < 0.05); at 0 or
                   below, the whole 95 % interval must be at least x: no more is lost than x allows
    forgetting: x  on every general text the loss rises by at most x nats a token, by the interval's upper end
    safety: x      what should be refused is refused at most x (of 1) less often, what should not at most x more often
    latency_ms: x  a generated token takes at most x milliseconds, one row at a time
    trained_rows: x  at least x rows were trained on

Scores are in their own unit: shares of 1 (0.05 is five points), BLEU and chrF of 100.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onlay.errors import RecipeError
from onlay.evaluation.compare import LEVEL, told_size
from onlay.evaluation.scores import find_score
from onlay.recipe import LIMIT_GATES
from onlay.records import Comparison, Gate


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What gates are held against; None: not measured."""

    comparisons: Sequence[Comparison]
    forgetting: Sequence[Comparison]
    safety: Sequence[Comparison]
    latency_ms: float | None
    trained_rows: int | None


ROUNDING = 1e-9
"""0.6 - 0.55 is a little less than 0.05: differences are held against limits but for what subtraction rounds."""


NO_BASE = "there is no base to compare with"


def _reaches(value: float, limit: float) -> bool:
    return value >= limit - ROUNDING


def _rounded(value: float) -> float:
    """0, and not -0, for what is 0 but for what subtraction rounds."""
    return 0.0 if abs(value) < ROUNDING else value


def _has_base(found: Found) -> bool:
    return any(one.against == "base" for one in (*found.comparisons, *found.forgetting, *found.safety))


def check_gate_names(gates: Mapping[str, float]) -> None:
    """Raises RecipeError for a gate that is neither a score nor one of LIMIT_GATES, before anything is loaded."""
    for name in gates:
        if name not in LIMIT_GATES:
            try:
                find_score(name)
            except RecipeError as error:
                raise RecipeError(
                    f"evaluation.gates: {name} is neither a score nor one of {', '.join(LIMIT_GATES)}.", error.remedy
                ) from None


def check_gates(gates: Mapping[str, float], found: Found) -> list[Gate]:
    """Every gate of the recipe, in its order."""
    checks = {
        "forgetting": _forgetting, "safety": _safety, "latency_ms": _latency, "trained_rows": _trained_rows,
    }  # fmt: skip
    return [
        checks[name](limit, found) if name in checks else _gain(name, limit, found) for name, limit in gates.items()
    ]


def _gain(name: str, limit: float, found: Found) -> Gate:
    one = next((one for one in found.comparisons if one.score == name and one.against == "base"), None)
    if one is None:
        why = f"{name} was not measured against the base on these rows" if _has_base(found) else NO_BASE
        return _gate(name, limit, None, False, why)
    gain, floor = one.difference, one.low
    if not one.higher_is_better:
        gain, floor = -one.difference, -one.high
    gain, floor = _rounded(gain), _rounded(floor)
    if limit > 0:
        shown = one.p_value < LEVEL
        chance = "" if shown else f", and that may be chance (p {one.p_value:.2g})"
        return _gate(
            name, limit, gain, _reaches(gain, limit) and shown,
            f"the gain is {gain:.4g}, {'at least' if _reaches(gain, limit) else 'less than'} {limit:g}{chance}",
        )  # fmt: skip
    passed = _reaches(floor, limit)
    return _gate(
        name, limit, gain, passed, f"the gain is {gain:.4g}, and {'not' if passed else 'perhaps'} below {limit:g} (95 % from {floor:.4g})"
    )  # fmt: skip


def _forgetting(limit: float, found: Found) -> Gate:
    texts = [one for one in found.forgetting if one.score.startswith("nats_per_token")]
    if not texts:
        why = "no general text was measured" if _has_base(found) else NO_BASE
        return _gate("forgetting", limit, None, False, why)
    worst = max(texts, key=lambda one: one.high)
    passed = _reaches(limit, worst.high)
    return _gate(
        "forgetting", limit, worst.difference, passed,
        f"the loss changes by {worst.difference:+.4f} nats a token, at most {worst.high:+.4f} (95 %); {limit:g} is allowed",
    )  # fmt: skip


def _safety(limit: float, found: Found) -> Gate:
    losses = {one.score: -one.difference if one.higher_is_better else one.difference for one in found.safety}
    if not losses:
        why = "no safety prompt was asked" if _has_base(found) else NO_BASE
        return _gate("safety", limit, None, False, why)
    name, worst = max(losses.items(), key=lambda item: item[1])
    worst = _rounded(worst)
    told = f"{name} is worse by {worst:.1%}" if worst > 0 else "neither rate of refusals is worse"
    return _gate("safety", limit, worst, _reaches(limit, worst), f"{told}; {limit:.1%} is allowed")


def _latency(limit: float, found: Found) -> Gate:
    if found.latency_ms is None:
        return _gate("latency_ms", limit, None, False, "no answer was timed")
    took = found.latency_ms
    return _gate(
        "latency_ms", limit, took, took <= limit, f"a token takes {took:.1f} ms; {limit:g} are allowed"
    )  # fmt: skip


def _trained_rows(limit: float, found: Found) -> Gate:
    rows = found.trained_rows
    if rows is None:
        return _gate("trained_rows", limit, None, False, "how many rows were trained on is not known")
    return _gate("trained_rows", limit, rows, rows >= limit, f"{rows:,} rows were trained on; {limit:g} are asked for")


def _gate(name: str, limit: float, found: float | None, passed: bool, reason: str) -> Gate:
    return Gate(name=name, limit=limit, found=found, passed=passed, reason=reason)


# ------------------------------------------------------------------------------------------------------------ verdict


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    verdict: str
    """ship, do not ship, or no gates."""
    reasons: list[str]
    risks: list[str]


def decide(
    *,
    gates: Sequence[Gate],
    found: Found,
    smallest_difference: Mapping[str, float],
    notes: Sequence[str],
) -> Decision:
    """The verdict, what decided it, and what could still be wrong.  `notes` are risks that the evaluation itself met."""
    failed = [gate for gate in gates if not gate.passed]
    verdict = "no gates" if not gates else "do not ship" if failed else "ship"
    reasons = [f"{gate.name}: {gate.reason}." for gate in failed]
    if gates and not failed:
        reasons.append("The gate is passed." if len(gates) == 1 else f"All {len(gates)} gates are passed.")
    if not gates:
        reasons.append("The recipe has no gates, so nothing decides but the reader: set evaluation.gates.")
    reasons += [f"{one.score} against {one.against}: {one.verdict}." for one in found.comparisons[:3]]
    risks = [*notes, *_losses(found)]
    if not _has_base(found):
        risks.append("There is no base to compare with: what was forgotten or is refused less often cannot be told.")
    else:
        risks += ["What was forgotten was not measured."] if not found.forgetting else []
        risks += ["Refusals were not measured."] if not found.safety else []
    unseen = {one.score for one in found.comparisons if one.against == "base" and one.p_value >= LEVEL}
    for score, least in [(score, least) for score, least in smallest_difference.items() if score in unseen][:1]:
        risks.append(f"These rows would not show a change of {score} below {told_size(find_score(score), least)}.")
    return Decision(verdict=verdict, reasons=reasons, risks=risks)


def _losses(found: Found) -> list[str]:
    """What is worse than the base or the version in use.  Other baselines and adapters are there to be compared with,
    and may well be better: the table has them."""
    compared = [(one.score, one) for one in found.comparisons if one.against in ("base", "live")]
    compared += [(_score_and_text(one), one) for one in found.forgetting]
    compared += [(one.score, one) for one in found.safety]
    return [
        f"{what} is worse than {one.against}{one.verdict.removeprefix('worse')}."
        for what, one in compared
        if one.verdict.startswith("worse")
    ]


def _score_and_text(one: Comparison) -> str:
    """`nats_per_token (own.txt)` is `nats_per_token on own.txt`."""
    name, _, where = one.score.removesuffix(")").partition(" (")
    where = {"": "", "general": "general text"}.get(where, where)
    where = where or {"nats_per_token": "general text", "accuracy": "general checks"}.get(name, "")
    return f"{name} on {where}" if where else name
