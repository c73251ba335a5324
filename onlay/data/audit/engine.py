"""One pass over all sources: every row is read, parsed and examined; numbers are kept, texts are not.

    sources ──read_rows──▶ chunks ──worker.work──▶ results ──merged here, in order──▶ Examined

Memory follows the number of rows (some hundred bytes each), not their length.  Texts that are to be shown, or compared
exactly, are read again (`Examined.read_texts`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from onlay.data.audit.catalogue import Tally
from onlay.data.audit.collection import Collection, judge, reason_groups
from onlay.data.audit.overlap import SharedNgrams, without_boilerplate
from onlay.data.audit.pool import Pool
from onlay.data.audit.similar import Fingerprints, find_boilerplate, texts_of
from onlay.data.audit.statistics import length_distributions
from onlay.data.audit.texts import read_terms
from onlay.data.audit.words import distinct
from onlay.data.audit.worker import Chunk, Role, Setup, work
from onlay.data.read import DETECTION_ROWS, Conversation, Document, detect_format, parse
from onlay.data.rows import RowTable
from onlay.data.sources import Reading, Row, read_rows, source_digest
from onlay.errors import DataError
from onlay.recipe import DataSection
from onlay.records import AuditedFile, Distribution, Group

CHUNK_ROWS = 512
CHUNK_CHARACTERS = 1 << 20
"""Rows are examined together up to whichever comes first."""
SAMPLE_ROWS = 2000
SAMPLE_CHARACTERS = 1 << 23
"""Training rows looked at beforehand, up to whichever comes first: what many of them share is a template's."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditSource:
    path: str
    """A data file or a hub data set."""
    role: Role
    limit: int | None = None
    """Only so many rows from the beginning."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    near_threshold: float | None = 0.8
    """Jaccard similarity of near-duplicates; None: no fingerprints and no n-grams are made."""
    texts: bool = True
    privacy: bool = True
    terms: str | None = None
    """A file of terms to flag."""
    workers: int | None = None
    """Processes for large inputs; None: one for each core."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Examined:
    """What one pass found.  N: readable rows of all sources, in order."""

    sources: tuple[AuditSource, ...]
    section: DataSection
    files: list[AuditedFile]
    table: RowTable
    fingerprints: Fingerprints | None
    tally: Tally
    groups: list[Group]
    """Reasons of what is wrong with the first rows of each shape code."""
    distributions: list[Distribution]
    shares: dict[str, dict[str, int]]
    known: dict[Role, np.ndarray]
    """By role: n-grams (uint64, sorted) of evaluation and benchmark rows."""
    shared: dict[Role, SharedNgrams]
    """By role: which training rows share such n-grams."""

    def among(self, role: Role) -> np.ndarray:
        """(N,) bool: rows of the sources with this role."""
        wanted = np.array([source.role == role for source in self.sources], dtype=bool)
        return np.asarray(wanted[self.table.source])

    def read_items(self, indices: np.ndarray) -> Iterator[tuple[int, Conversation | Document]]:
        """(index, item) of the rows at these sorted indices, read again."""
        for number, source in enumerate(self.sources):
            mine = indices[self.table.source[indices] == number]
            if not len(mine):
                continue
            index_of = dict(zip(self.table.number[mine].tolist(), mine.tolist(), strict=True))
            format = self.files[number].format
            for row in read_rows(source.path, self.section, on_bad=_pass_by, only=index_of):
                yield index_of[row.number], parse(row, format, self.section)
                del index_of[row.number]
                if not index_of:
                    break
            if index_of:
                raise DataError(
                    f"{source.path} changed while it was read: row {min(index_of)} is gone.", "Run it again."
                )

    def read_texts(self, indices: np.ndarray) -> Iterator[tuple[int, str, str]]:
        """(index, prompt, answer) of the rows at these sorted indices, read again."""
        for index, item in self.read_items(indices):
            yield index, *texts_of(item)


def _pass_by(_error: DataError) -> None:
    """It was counted when the row was read first."""


def examine(
    sources: Sequence[AuditSource],
    section: DataSection,
    *,
    settings: Settings | None = None,
    strict: bool = False,
    progress: Progress | None = None,
) -> Examined:
    """Reads and examines every row of all sources.

    Rows that cannot be read or parsed are counted; with `strict` the first of them raises its DataError.  A source that
    does not exist, holds no rows or is of no known format raises DataError either way.  `progress(done, total)` counts
    rows; `total` is an estimate until the end.  Raises WorkerError where a worker process dies.
    """
    run = _Examination(sources, section, settings=settings or Settings(), strict=strict, progress=progress)
    # Evaluation and benchmark rows first: what they hold is looked for in the training rows.
    order = sorted(range(len(sources)), key=lambda number: sources[number].role == "train")
    with Pool(run.settings.workers) as pool:
        for number in order:
            run.read(number, pool)
    return run.result()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Form:
    """How a source is read, by its first rows."""

    format: str
    domain_field: str | None


class _Flow:
    """Of one source, while it is read."""

    def __init__(self) -> None:
        self.reading = Reading()
        self.taken = 0
        """Rows handed out to be examined."""
        self.first_bad: DataError | None = None
        """Where nothing may be wrong: the first row that could not be read."""


class _Examination:
    def __init__(
        self,
        sources: Sequence[AuditSource],
        section: DataSection,
        *,
        settings: Settings,
        strict: bool,
        progress: Progress | None,
    ) -> None:
        self.sources, self.section, self.settings, self.strict = tuple(sources), section, settings, strict
        self.progress = progress
        train = sum(source.role == "train" for source in sources)
        first = [_first_rows(source, section, SAMPLE_ROWS // max(train, 1)) for source in sources]
        self.forms = [
            _form(source, section, rows[:DETECTION_ROWS]) for source, rows in zip(sources, first, strict=True)
        ]
        self.collections = [Collection(number, source.path) for number, source in enumerate(sources)]
        self.known: dict[Role, np.ndarray] = {}
        self.sample = self._sample(first)
        self.setup = Setup(
            section=section,
            near_threshold=settings.near_threshold,
            texts=settings.texts,
            privacy=settings.privacy,
            terms=read_terms(settings.terms) if settings.terms is not None else None,
            boilerplate=find_boilerplate(self.sample) if settings.near_threshold is not None else None,
        )
        self.rows_before = 0

    def _sample(self, first: list[list[Row]]) -> list[Conversation | Document]:
        """The first training rows, which tell what is a template's and not a row's own."""
        items = []
        for source, form, rows in zip(self.sources, self.forms, first, strict=True):
            for row in rows if source.role == "train" else ():
                try:
                    items.append(parse(row, form.format, self.section))
                except DataError:
                    continue  # It is counted when its turn comes.
        return items

    def read(self, number: int, pool: Pool) -> None:
        """Examines one source."""
        source, collection = self.sources[number], self.collections[number]
        if source.role == "train" and self.known and not self.setup.known:
            self.known = {role: without_boilerplate(grams, self.sample) for role, grams in self.known.items()}
            self.setup = replace(self.setup, known=self.known)
        flow = _Flow()
        done = 0
        for result in pool.map(self._chunks(number, flow), self.setup):
            if self.strict and result.bad:
                row, code, problem, remedy = result.bad[0]
                raise DataError(problem, remedy, code=code, row=row)
            collection.add(result)
            done += result.seen
            self._tell(done, flow)
        if flow.first_bad is not None:
            raise flow.first_bad
        if not collection.rows and not collection.unreadable:
            raise DataError(f"{source.path} holds no rows.", "Give a file with at least one example.")
        if not done:  # Arrays of no rows, but of the right kinds.
            collection.add(work(self._chunk(number, [], self.forms[number]), self.setup))
        self.rows_before += done
        if source.role != "train" and self.settings.near_threshold is not None:
            ngrams = collection.ngrams()
            known = self.known.get(source.role)
            self.known[source.role] = ngrams if known is None else distinct(np.concatenate([known, ngrams]))

    def _tell(self, done: int, flow: _Flow) -> None:
        """The rows of later sources are not known yet, so the bar is that of the source at hand."""
        if self.progress is not None:
            share = flow.reading.share
            total = max(flow.taken, round(flow.taken / share) if share else 0)
            self.progress(self.rows_before + done, self.rows_before + total)

    def _chunks(self, number: int, flow: _Flow) -> Iterator[Chunk]:
        """The rows of a source in chunks.  What cannot be read is counted, or ends it where nothing may be wrong."""
        source, form, collection = self.sources[number], self.forms[number], self.collections[number]

        def refuse(error: DataError) -> None:
            if error.code is None:
                raise error
            if self.strict:
                flow.first_bad = flow.first_bad or error
            else:
                collection.refuse(error)

        rows: list[Row] = []
        size = 0
        for row in read_rows(source.path, self.section, limit=source.limit, on_bad=refuse, reading=flow.reading):
            if flow.first_bad is not None:
                break  # The rows before it are examined yet: one of them may be wrong too, and comes first.
            rows.append(row)
            flow.taken += 1
            size += _characters(row.values)
            if len(rows) == CHUNK_ROWS or size > CHUNK_CHARACTERS:
                yield self._chunk(number, rows, form)
                rows, size = [], 0
        if rows:
            yield self._chunk(number, rows, form)

    def _chunk(self, number: int, rows: list[Row], form: _Form) -> Chunk:
        return Chunk(
            source=number, role=self.sources[number].role, format=form.format, domain_field=form.domain_field, rows=rows
        )

    def result(self) -> Examined:
        tally = Tally()
        for collection in self.collections:
            collection.count_into(tally)
        table = _joined_table(self.collections)
        self._refuse_unknown_domain(table)
        parts = [found for found in (one.fingerprints() for one in self.collections) if found is not None]
        trained = [one for one, source in zip(self.collections, self.sources, strict=True) if source.role == "train"]
        shared: dict[Role, list[SharedNgrams]] = {}
        for one in trained:
            for role, found in one.shared().items():
                shared.setdefault(role, []).append(found)
        is_train = np.array([source.role == "train" for source in self.sources], dtype=bool)[table.source]
        training_rows = table if is_train.all() else table.taken(np.flatnonzero(is_train))
        return Examined(
            sources=self.sources,
            section=self.section,
            files=[self._file(number) for number in range(len(self.sources))],
            table=table,
            fingerprints=Fingerprints.joined(parts) if parts else None,
            tally=tally,
            shares=judge(trained, training_rows, tally),
            groups=reason_groups(self.collections, tally),
            distributions=length_distributions(training_rows),
            known=self.known,
            shared={role: SharedNgrams.joined(found) for role, found in shared.items()},
        )

    def _refuse_unknown_domain(self, table: RowTable) -> None:
        """A field that is named and nowhere is a mistyped one: the rows would be balanced over nothing."""
        train = [number for number, source in enumerate(self.sources) if source.role == "train"]
        rows = np.isin(table.source, train)
        if self.section.domain_field is not None and rows.any() and not (table.domain[rows] >= 0).any():
            files = ", ".join(self.sources[number].path for number in train)
            raise DataError(
                f"data.domain_field = {self.section.domain_field}: no row of {files} has a domain in that field.",
                "Name a field that holds text of one line, at most 64 characters, or a whole number; or delete the line.",
            )

    def _file(self, number: int) -> AuditedFile:
        source, collection = self.sources[number], self.collections[number]
        return AuditedFile(
            path=source.path, digest=source_digest(source.path, self.section), format=self.forms[number].format,
            rows=collection.rows, unreadable=collection.unreadable, role=source.role,
        )  # fmt: skip


def _first_rows(source: AuditSource, section: DataSection, most: int) -> list[Row]:
    wanted = max(DETECTION_ROWS, most if source.role == "train" else 0)
    limit = wanted if source.limit is None else min(wanted, source.limit)
    rows: list[Row] = []
    size = 0
    for row in read_rows(source.path, section, limit=limit, on_bad=_pass_by):
        rows.append(row)
        size += _characters(row.values)
        if len(rows) >= DETECTION_ROWS and size > SAMPLE_CHARACTERS:
            break
    return rows


def _form(source: AuditSource, section: DataSection, first: list[Row]) -> _Form:
    if not first:  # Nothing is readable, or nothing is there: the pass will tell.
        return _Form(format=section.format, domain_field=None)
    format = detect_format(first, section)
    # The label of a classification is what its rows should be balanced over.
    domain = section.domain_field or (section.answer_field if format == "classification" else None)
    return _Form(format=format, domain_field=domain)


def _characters(value: Any) -> int:
    """About how much text a row holds."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 8


def _joined_table(collections: list[Collection]) -> RowTable:
    tables = [one.table() for one in collections]
    return RowTable.joined(tables) if len(tables) > 1 else tables[0]
