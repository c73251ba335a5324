"""The rows that a recipe names, read once: what they are chosen by, and what an audit finds in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from onlay.data.audit.catalogue import worst_first
from onlay.data.audit.comparison import compare_rows
from onlay.data.audit.engine import AuditSource, Examined, Settings, examine
from onlay.data.audit.handled import tell_handled
from onlay.data.audit.similar import find_clusters
from onlay.data.rows import RowTable
from onlay.errors import DataError
from onlay.recipe import DataSection, Recipe
from onlay.records import AuditedFile, Finding, RowAt

Use = Literal["train", "general", "evaluation"]
Progress = Callable[[int, int], None]
SHOWN_ROWS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class RowSource:
    """A source that a recipe names, and what its rows are for."""

    path: str
    use: Use
    weight: float = 1.0
    """How often each of its rows trains in an epoch, on average."""
    limit: int | None = None
    """Most rows that are read; None: all."""


def sources_of(recipe: Recipe) -> tuple[RowSource, ...]:
    """In the order in which their rows follow each other: those of data.train, data.general, evaluation.file."""
    data, file = recipe.data, recipe.evaluation.file
    train = [
        RowSource(path=one.file, use="train", weight=one.weight, limit=data.max_rows) for one in data.train_sources
    ]
    general = [RowSource(path=data.general, use="general")] if data.general is not None else []
    held_out = [RowSource(path=file, use="evaluation")] if file is not None else []
    return (*train, *general, *held_out)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Material:
    """Everything that a recipe's rows are chosen by, read in one pass."""

    sources: tuple[RowSource, ...]
    files: tuple[AuditedFile, ...]
    """What was found of each source: format, digest, rows."""
    table: RowTable
    clusters: np.ndarray
    """(N,) int64: each row's cluster of near-duplicates, by the index of its first row; a row alone is its own."""
    findings: tuple[Finding, ...] = ()
    """Of the audit."""

    def rows_for(self, use: Use) -> np.ndarray:
        """(N,) bool: the rows of all sources of that use."""
        of_source = np.array([source.use == use for source in self.sources], dtype=bool)
        return np.asarray(of_source[self.table.source])

    def files_for(self, use: Use) -> list[AuditedFile]:
        return [file for source, file in zip(self.sources, self.files, strict=True) if source.use == use]

    def at(self, index: int) -> RowAt:
        """Where a row is."""
        return RowAt(file=self.sources[int(self.table.source[index])].path, row=int(self.table.number[index]))

    @property
    def train_told(self) -> str:
        """The training sources' names, for a sentence."""
        return ", ".join(file.path for file in self.files_for("train"))


def row_section(recipe: Recipe) -> DataSection:
    """How the rows are read: a head reads texts and labels, whatever else the columns could be taken for."""
    if recipe.adapter.method == "head":
        return recipe.data.model_copy(update={"format": "classification"})
    return recipe.data


def read_material(recipe: Recipe, *, audit: bool = True, progress: Progress | None = None) -> Material:
    """Reads every row of the recipe's sources once.  `progress(done, total)` counts rows; its total is an estimate.

    `audit` False: only what rows are chosen by, without what the audit finds.
    Raises DataError at the first row that cannot be used, and for a source that is not there or holds no rows.
    """
    data, sources = recipe.data, sources_of(recipe)
    asked = [
        AuditSource(path=one.path, role="evaluation" if one.use == "evaluation" else "train", limit=one.limit)
        for one in sources
    ]
    settings = Settings(
        near_threshold=data.near_threshold, texts=audit, privacy=audit, terms=data.terms if audit else None
    )
    examined = examine(asked, row_section(recipe), settings=settings, strict=True, progress=progress)
    clusters = _cluster(examined, recipe)
    return Material(
        sources=sources, files=tuple(examined.files), table=examined.table, clusters=clusters,
        findings=tuple(_compare(examined, clusters, recipe)) if audit else (),
    )  # fmt: skip


def _cluster(examined: Examined, recipe: Recipe) -> np.ndarray:
    assert examined.fingerprints is not None
    return find_clusters(
        examined.fingerprints, examined.table, threshold=recipe.data.near_threshold, read_texts=examined.read_texts
    )


def _compare(examined: Examined, clusters: np.ndarray, recipe: Recipe) -> list[Finding]:
    """What the audit finds in the rows and between them."""
    held_out = examined.among("evaluation")
    # Between training rows alone, where a row of evaluation.file is the first of its cluster.
    of_training = None if held_out.any() else clusters
    compared = compare_rows(examined, threshold=recipe.data.near_threshold, clusters=of_training, by_words=False)
    files = [file.path for file in examined.files]
    found = worst_first(examined.tally.findings(files, shown=SHOWN_ROWS, told=compared.told))
    return tell_handled(found, recipe.data)


def refuse_errors(material: Material, recipe: Recipe) -> None:
    """Rows that the audit finds at fault are not trained on.  Raises DataError for the first such finding.

    What `data.anonymise` replaces is no fault, and what is in training and evaluation rows alike is for the selection.
    """
    kinds = _replaced_kinds(recipe) if recipe.data.anonymise != "off" else frozenset()
    for finding in material.findings:
        replaced = finding.code.removeprefix("secret_") in kinds
        if finding.severity != "error" or replaced or finding.code.startswith("leakage_"):
            continue
        places = ", ".join(row.place for row in finding.rows)
        more = f" and {finding.count - len(finding.rows)} more" if finding.count > len(finding.rows) else ""
        raise DataError(
            f"{finding.count:,} {finding.message} ({finding.code}): {places}{more}.",
            f"{finding.remedy} `onlay audit` tells more.",
        )


def _replaced_kinds(recipe: Recipe) -> frozenset[str]:
    from onlay.data.privacy.anonymise import REPLACED

    return REPLACED if recipe.data.anonymise_kinds is None else frozenset(recipe.data.anonymise_kinds)
