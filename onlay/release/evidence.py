"""What the production checklist looks at, and what one look gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from onlay.recipe import Recipe
from onlay.records import AdapterVersion, Dataset, Merge, ModelFacts, Record, Report, Run
from onlay.release.history import Event
from onlay.release.servers import Verdicts

State = Literal["passed", "failed", "not done", "not yet applicable"]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The records and files of one run, or of one registered version of it; read by onlay/stages/checking.py."""

    place: str
    """As the user named it, for commands: a run folder, or NAME@4."""
    run: Run
    recipe: Recipe
    dataset: Dataset
    facts: ModelFacts
    damage: Sequence[str] = ()
    """What is no longer as it was recorded, in words."""
    unchecked: Sequence[str] = ()
    """What could not be compared with a record, in words."""
    metrics: Sequence[Mapping[str, Any]] | None = None
    """Events of metrics.jsonl; None: the run folder is not here."""
    checkpoint: str | None = None
    """The latest one on the disk that is whole; None without one."""
    checkpoint_problem: str | None = None
    """Why the latest one cannot be read."""
    device_memory_bytes: int | None = None
    """Of the device that the run was trained on; None where that is not this machine's."""
    data_licence: str | None = None
    """As the recipe names it."""
    stated_base_licence: str | None = None
    stated_data_licence: str | None = None
    """As whoever checks names it; read where the records name none that is known."""
    report: Report | None = None
    report_note: str | None = None
    """Why a report that is there is not this run's."""
    failures: int = 0
    """Rows in the report's failures.jsonl."""
    failures_seen: int = 0
    """Of them: compared by a person."""
    merge: Merge | None = None
    """The latest proven one of this run."""
    misfit: str | None = None
    """Why the adapter does not fit the base that it was trained on."""
    servers: Sequence[Verdicts] = ()
    version: AdapterVersion | None = None
    version_problems: Sequence[str] = ()
    aliases: Mapping[str, int] = field(default_factory=dict)
    """Of the version's name: alias to number."""
    history: Sequence[Event] = ()
    """Of the version's name, oldest first."""
    deployments: Sequence[str] = ()
    """Digests of Deployment records of this version in the ledger, oldest first."""

    @property
    def finished(self) -> bool:
        return self.run.status == "finished"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What one check found."""

    state: State
    evidence: str
    record: str | None = None
    """Kind of the record that is the evidence."""
    digest: str | None = None
    remedy: str | None = None
    """What to do; None where it is passed."""
    details: Sequence[str] = ()
    commands: Mapping[str, str] = field(default_factory=dict)
    """Of whom to the command that it is done with, where there are several ways on."""


def passed(
    evidence: str,
    source: Record | Recipe | None,
    *,
    details: Sequence[str] = (),
    commands: Mapping[str, str] | None = None,
) -> Outcome:
    return replace(_outcome("passed", evidence, source, None, details), commands=commands or {})


def failed(evidence: str, source: Record | Recipe | None, remedy: str, *, details: Sequence[str] = ()) -> Outcome:
    return _outcome("failed", evidence, source, remedy, details)


def not_done(evidence: str, source: Record | Recipe | None, remedy: str, *, details: Sequence[str] = ()) -> Outcome:
    return _outcome("not done", evidence, source, remedy, details)


def not_yet(evidence: str, source: Record | Recipe | None, remedy: str) -> Outcome:
    return _outcome("not yet applicable", evidence, source, remedy, ())


def _outcome(
    state: State, evidence: str, source: Record | Recipe | None, remedy: str | None, details: Sequence[str]
) -> Outcome:
    kind = "recipe" if isinstance(source, Recipe) else source.kind if source is not None else None
    digest = source.digest if source is not None else None
    return Outcome(
        state=state, evidence=evidence, record=kind, digest=digest, remedy=remedy, details=tuple(details)
    )  # fmt: skip


def of(count: int, one: str, many: str | None = None) -> str:
    """`1 row`, `2 rows`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"
