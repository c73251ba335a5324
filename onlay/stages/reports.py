"""Which Report speaks for a run: where it lies, and whether it measured what the run is now."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from onlay import ledger
from onlay.errors import OutputError, ProofError
from onlay.records import Dataset, Report, Run
from onlay.stages.places import WEIGHTS

REPORT_FOLDER = "report"


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    report: Report | None = None
    folder: Path | None = None
    damage: list[str] = field(default_factory=list)
    """Which is no longer what evaluation left."""
    notes: list[str] = field(default_factory=list)
    """Why one that is there does not count."""


def find_report(folder: Path, run: Run) -> Found:
    """The Report in RUN/report; else the newest that the ledger knows, of this run, on its own held-out rows.

    One that measured other weights than the run has now does not count, and one that was changed is damage.
    """
    weights = weights_of(folder)
    latest = {row.path: row for row in ledger.Ledger().rows("report")}
    damage, notes = [], []
    own = folder / REPORT_FOLDER
    others = [
        Path(row.path)
        for row in sorted(latest.values(), key=lambda row: row.id, reverse=True)
        if row.path != str(own.absolute()) and row.values.get("sources", {}).get("run") == run.digest
    ]
    for place in (own, *others):
        if not (place / "report.json").is_file():
            continue
        report, row = Report.load(place), latest.get(str(place.absolute()))
        of_run = run.digest in (report.sources.get("run"), row.values.get("sources", {}).get("run") if row else None)
        if not of_run:
            notes += [f"the one in {place} is on another record of the run"] if place == own else []
        elif row is not None and report.digest != row.digest:
            damage.append(f"{place / 'report.json'} is not the record that evaluation left in the ledger")
        elif report.sources.get("weights", weights) != weights:
            notes.append(f"the one in {place} measured other weights than the run has now")
        elif place == own or report.data_digest == Dataset.load(folder).digest:
            return Found(report=report, folder=place, damage=damage, notes=notes)
        else:
            notes.append(f"the one in {place} is on other rows than the run held out")
    return Found(damage=damage, notes=notes)


def check_report(given: Path, folder: Path, run: Run) -> None:
    """Refuses a Report that a user named and that is not on this run and its weights.  Raises OnlayError."""
    report = Report.load(given)
    if report.sources.get("run") != run.digest:
        raise OutputError(
            f"The Report in {given} is on another run than {folder}: it says {report.systems.get(report.system, report.system)}.",
            f"onlay evaluate {folder}",
        )
    weights = weights_of(folder)
    if report.sources.get("weights", weights) != weights:
        raise ProofError(
            f"The Report in {given} measured other weights than {folder} has now.", f"onlay evaluate {folder}"
        )


def weights_of(folder: Path) -> str | None:
    """SHA-256 of the weights of a run folder's adapter; None where it has none, as a base tuned in full."""
    from onlay.release.store import file_digest

    path = folder / "adapter" / WEIGHTS["adapter"]
    return file_digest(path) if path.is_file() else None
