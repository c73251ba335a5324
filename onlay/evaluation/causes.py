"""Why answers repeat themselves or do not stop: the likely causes in the order to look at them, each with its evidence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MANY = 0.05
"""Share of answers from which repetition or answers without an end are a problem of the system, not of a row."""
MANY_EPOCHS = 4.0
OVERFIT = 0.1
"""Share by which the last held-out loss lies above the best."""
DUPLICATES = 0.05
MUCH_DROPOUT = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What is known about a run; None where it is not."""

    end_tokens_trained: int | None
    """Trained tokens that end an answer, in the training rows."""
    trained_examples: int | None
    epochs: float | None
    held_out_losses: tuple[float, ...]
    duplicate_share: float | None
    """Training rows that repeat another row; a row that its weight repeats is one."""
    most_repeats: int | None
    """How often an epoch trains the row that it trains most often."""
    dropout: float | None
    temperature: float
    repetition_penalty: float
    max_new_tokens: int
    longest_expected_tokens: int


def is_problem(rates: Mapping[str, float | None]) -> bool:
    """Whether more than MANY of the answers loop or do not stop: only then is evidence worth gathering."""
    return any((rates.get(name) or 0.0) > MANY for name in ("loop", "no_stop"))


def likely_causes(rates: Mapping[str, float | None], evidence: Evidence) -> list[str]:
    """How many answers are concerned, then causes with their evidence, likely ones first; empty where no more than MANY of
    the answers loop or do not stop."""
    if not is_problem(rates):
        return []
    loops, endless = rates.get("loop") or 0.0, rates.get("no_stop") or 0.0
    told = [f"{loops:.0%} of the answers end in a loop, {endless:.0%} do not stop by themselves."]
    likely: list[str] = []
    unlikely: list[str] = []
    for name, is_likely, why in _causes(evidence, endless=endless, loops=loops):
        (likely if is_likely else unlikely).append(f"{name}: {why}")
    return [*told, *(f"likely: {cause}" for cause in likely), *(f"not likely: {cause}" for cause in unlikely)]


def _causes(evidence: Evidence, *, endless: float, loops: float) -> list[tuple[str, bool, str]]:
    found = []
    if evidence.end_tokens_trained is not None and evidence.trained_examples:
        share = evidence.end_tokens_trained / evidence.trained_examples
        found.append(
            ("end token untrained", share < 1, f"{share:.0%} of the trained examples have a trained end token")
        )
    if evidence.epochs is not None:
        losses = evidence.held_out_losses
        risen = losses[-1] / min(losses) - 1 if len(losses) > 1 and min(losses) > 0 else 0.0
        repeats = evidence.most_repeats or 1
        passes = f"{evidence.epochs:.1f} passes over the rows"
        if repeats > 1:
            passes += f", {evidence.epochs * repeats:.1f} over those that weights or the general share repeat"
        found.append(
            (
                "too many epochs",
                evidence.epochs * repeats > MANY_EPOCHS or risen > OVERFIT,
                f"{passes}; the last held-out loss is {risen:.0%} above the best",
            )
        )
    if evidence.duplicate_share is not None:
        found.append(
            (
                "duplicate rows",
                evidence.duplicate_share > DUPLICATES,
                f"{evidence.duplicate_share:.1%} of the training rows repeat another",
            )
        )
    if evidence.dropout is not None:
        found.append(("dropout", evidence.dropout > MUCH_DROPOUT, f"dropout is {evidence.dropout:g}"))
    greedy = evidence.temperature == 0 and evidence.repetition_penalty == 1
    found.append(
        (
            "sampling",
            loops > MANY and (greedy or evidence.temperature > 1),
            "greedy, without a repetition penalty" if greedy else f"temperature {evidence.temperature:g}",
        )
    )
    short = evidence.max_new_tokens < evidence.longest_expected_tokens
    found.append(
        (
            "length limit",
            endless > MANY and short,
            f"{evidence.max_new_tokens} new tokens are allowed, the longest expected answer has {evidence.longest_expected_tokens}",
        )
    )
    return found
