"""The production checklist: what must hold before an adapter goes live, each item with its state and its evidence.

Nothing is ticked by hand.  Every state is computed from records and files, so two who check the same run read the same:

    passed               the evidence shows it
    failed               the evidence shows the opposite
    not done             there is no evidence: it was not done, not recorded, or not decided
    not yet applicable   it needs something that comes later; it holds nothing up

Items of deployment never block registering.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from onlay.release import release_checks as after
from onlay.release import training_checks as before
from onlay.release.evidence import Evidence, Outcome, State

Phase = Literal["before training", "during training", "after training", "deployment"]

CHECKS: dict[Phase, dict[str, Callable[[Evidence], Outcome]]] = {
    "before training": {
        "data quality": before.data_quality,
        "trained rows": before.trained_rows,
        "licence of the base": before.base_licence,
        "licence of the data": before.data_licence,
        "separate evaluation set": before.evaluation_set,
        "memory": before.memory,
    },
    "during training": {
        "training": before.training,
        "records": before.records,
        "losses": before.losses,
        "gradient norms": before.gradient_norms,
        "checkpoints": before.checkpoints,
        "early stopping": before.early_stopping,
        "recoveries": before.recoveries,
        "proofs": before.proofs,
    },
    "after training": {
        "domain scores": after.domain_scores,
        "general abilities": after.general_abilities,
        "safety": after.safety,
        "gates": after.gates,
        "answers stop and do not repeat": after.answers_end,
        "failures looked at": after.failures_seen,
        "merge or serve decided": after.merge_or_serve,
        "serving compatibility": after.serving_compatibility,
    },
    "deployment": {
        "registered version": after.registered_version,
        "rollback target": after.rollback_target,
        "version map": after.version_map,
        "A/B test": after.ab_test,
        "monitoring": after.monitoring,
    },
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    name: str
    phase: Phase
    state: State
    evidence: str
    """In words."""
    details: list[str]
    """What else the evidence says, a line each."""
    commands: dict[str, str]
    """Server to the command that serves it."""
    record: str | None
    """Kind of the record that is the evidence."""
    digest: str | None
    """Of that record; `onlay show` prints it."""
    remedy: str | None
    """What to do; None where it is passed."""


def walk(seen: Evidence) -> list[Item]:
    """Every item, in the order of the work."""
    found = [(phase, name, check(seen)) for phase, checks in CHECKS.items() for name, check in checks.items()]
    return [
        Item(
            name=name, phase=phase, state=one.state, evidence=one.evidence, details=list(one.details),
            commands=dict(one.commands), record=one.record, digest=one.digest, remedy=one.remedy,
        )
        for phase, name, one in found
    ]  # fmt: skip


def states(items: list[Item]) -> Counter[State]:
    """How many items before deployment are in each state."""
    return Counter(item.state for item in items if item.phase != "deployment")


def is_ready(items: list[Item]) -> bool:
    """Nothing before deployment failed or is left to do."""
    count = states(items)
    return not count["failed"] and not count["not done"]


def has_failed(items: list[Item]) -> bool:
    """Something before deployment failed."""
    return bool(states(items)["failed"])
