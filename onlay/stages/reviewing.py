"""`review`: a person accepts, edits or rejects rows; decisions are kept, taken over from elsewhere, and applied."""

from __future__ import annotations

import difflib
import getpass
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onlay.errors import DataError, OnlayError, OutputError
from onlay.records import AuditedFile, Finding
from onlay.stages.events import Report, silent
from onlay.stages.synthesizing import bare_name, reading_section

if TYPE_CHECKING:
    from onlay.data.decisions import Decisions
    from onlay.data.review import Ask, Reviewed


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """Which rows of a file are reviewed: those of an audit's findings, a sample, or both; by default all."""

    findings: Path | None = None
    """What `onlay audit --json` printed."""
    only: tuple[str, ...] = ()
    """Codes of its findings; empty: all of them."""
    sample: int | None = None
    """At most so many rows, drawn at random."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Review:
    """What stands after a call."""

    file: str
    decisions_path: str
    decided: dict[str, int]
    """All decisions about the file kept so far by what they say: accept, edit, reject."""
    chosen: int | None = None
    """Rows to review; None: nobody was asked."""
    left: int | None = None
    """Of these, rows without a decision."""
    unreadable: int = 0
    """Rows that cannot be read, so not be shown."""
    taken_over: dict[str, int] | None = None
    """Of `--decisions`: taken, replaced, known, changed, missing, unusable."""
    output: str | None = None
    applied: dict[str, Any] | None = None
    """What became of the file's rows, in `output`."""

    def values(self) -> dict[str, Any]:
        return asdict(self)


def review(
    file: str,
    *,
    ask: Ask | None = None,
    chosen: Chosen | None = None,
    decisions: Path | None = None,
    log: Path | None = None,
    apply: Path | None = None,
    decided_only: bool = False,
    who: str | None = None,
    overrides: Sequence[str] = (),
    report: Report = silent,
) -> Review:
    """Asks about the chosen rows that have no decision yet; with `decisions` or `apply` nobody is asked.

    `decisions`: a file whose decisions are taken over; `log`: where they are kept (default: beside the file, under
    NAME.decisions.jsonl); `apply`: the new file, JSON lines; `decided_only`: without the rows that have no decision.
    `who`: default the user's name.  Raises OnlayError.
    """
    from onlay.data.decisions import Decisions
    from onlay.data.review import Reviewed, apply_decisions, take_over
    from onlay.data.sources import SUFFIXES

    section = reading_section(file, overrides)
    where = Path(file)
    if not where.exists() and where.suffix.lower() not in SUFFIXES and not where.parent.is_dir():
        raise DataError(
            f"There is no file at {file}.", "A data set of the hub has to be saved to a file to be reviewed."
        )
    if apply is not None and apply.suffix != ".jsonl":
        raise OutputError(f"--apply {apply} does not end in .jsonl.", "The rows are written as JSON lines.")
    reviewed = Reviewed.opened(file, section)
    path = log if log is not None else Path(file).with_name(f"{bare_name(file)}.decisions.jsonl")
    kept = Decisions(path)
    found: dict[str, Any] = {}
    if decisions is not None:
        found["taken_over"] = take_over(decisions, reviewed, kept, who=_who(who), when=_now())
    if apply is not None:
        if not kept.of(file):
            raise OutputError(f"There is no decision about {file} in {path}.", f"Make some: onlay review {file}")
        applied = apply_decisions(reviewed, kept, output=apply, decided_only=decided_only)
        found |= {"output": str(apply), "applied": asdict(applied)}
    if decisions is None and apply is None:
        found |= _session(reviewed, kept, ask, chosen or Chosen(), who=_who(who), report=report)
    decided = Counter(decision.decision for decision in kept.of(file))
    return Review(file=file, decisions_path=str(path), decided=dict(sorted(decided.items())), **found)


def _session(
    reviewed: Reviewed, kept: Decisions, ask: Ask | None, chosen: Chosen, *, who: str, report: Report
) -> dict[str, Any]:
    from onlay.data.review import draw_rows, review_rows

    if chosen.only and chosen.findings is None:
        raise OutputError(
            f"--only {' '.join(chosen.only)} names findings, and there is no audit.",
            f"onlay audit {reviewed.source} --rows all --json > audit.json, then add --findings audit.json.",
        )
    codes = _codes(reviewed, chosen, report) if chosen.findings is not None else None
    bad: list[DataError] = []
    numbers = draw_rows(reviewed, wanted=codes, sample=chosen.sample, seed=chosen.seed, on_bad=bad.append)
    if bad:
        report(f"{len(bad):,} rows cannot be read and are not shown; the first: {bad[0].problem}")
    if ask is None:
        raise OnlayError(
            "Nobody can be asked: there is no terminal.",
            f"Write decisions into a file, then: onlay review {reviewed.source} --decisions FILE",
        )
    left = review_rows(reviewed, numbers, decisions=kept, codes=codes or {}, ask=ask, who=who, now=_now)
    return {"chosen": len(numbers), "left": left, "unreadable": len(bad)}


def _codes(reviewed: Reviewed, chosen: Chosen, report: Report) -> Mapping[int, list[str]]:
    """Numbers of the rows that the chosen findings list, with the findings' codes."""
    assert chosen.findings is not None
    files, findings = _read_audit(chosen.findings)
    there = {finding.code for finding in findings}
    for code in chosen.only:
        if code not in there:
            near = difflib.get_close_matches(code, there, n=1)
            hint = f"Did you mean {near[0]}? " if near else ""
            raise OutputError(
                f"{chosen.findings} has no finding {code}.", f"{hint}There: {', '.join(sorted(there)) or 'none'}."
            )
    mine = [file for file in files if _same_file(file.path, reviewed.source)]
    if files and not mine:
        raise OutputError(
            f"{chosen.findings} is not about {reviewed.source}, but about {', '.join(file.path for file in files)}.",
            f"onlay audit {reviewed.source} --rows all --json > {chosen.findings}",
        )
    _check_unchanged(mine, reviewed, chosen.findings)
    found: dict[int, list[str]] = {}
    for finding in findings:
        if chosen.only and finding.code not in chosen.only:
            continue
        if 0 < len(finding.rows) < finding.count:  # One without rows is about the file.
            report(
                f"{finding.code}: {chosen.findings} lists {len(finding.rows):,} of {finding.count:,} rows; "
                "onlay audit --rows all lists every one"
            )
        for row in finding.rows:
            if _same_file(row.file, reviewed.source):
                found.setdefault(row.row, []).append(finding.code)
    return found


def _read_audit(path: Path) -> tuple[list[AuditedFile], list[Finding]]:
    from pydantic import ValidationError

    remedy = "Give what `onlay audit FILE --json` printed."
    try:
        values = json.loads(path.read_bytes())
        if not isinstance(values, dict) or not isinstance(values.get("findings"), list):
            raise OutputError(f"{path} holds no findings.", remedy)
        files = [AuditedFile.model_validate(one) for one in values.get("files", [])]
        return files, [Finding.model_validate(one) for one in values["findings"]]
    except OSError as error:
        raise OutputError(f"{path} cannot be read: {error.strerror}.", remedy) from None
    except ValidationError as error:
        raise OutputError(f"{path} is not an audit: {error.errors()[0]['msg']}.", remedy) from None
    except ValueError as error:
        raise OutputError(f"{path} is not JSON: {error}.", remedy) from None


def _check_unchanged(mine: Sequence[AuditedFile], reviewed: Reviewed, path: Path) -> None:
    from onlay.data.sources import source_digest

    digest = source_digest(reviewed.source, reviewed.section)
    if any(file.digest != digest for file in mine):
        raise OutputError(
            f"{reviewed.source} has changed since {path} was made: its rows may be others now.",
            f"onlay audit {reviewed.source} --rows all --json > {path}",
        )


def _same_file(first: str, second: str) -> bool:
    return first == second or Path(first).resolve() == Path(second).resolve()


def _who(given: str | None) -> str:
    if given:
        return given
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        raise OnlayError("Who decides is not known: this user has no name.", "Give it with --who NAME.") from None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
