"""What shows only of all rows together: duplicates, contradictions, leakage, balance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onlay.data.audit.balance import measure_clusters, measure_domains
from onlay.data.audit.engine import Examined
from onlay.data.audit.overlap import NGRAM_WORDS, find_contradictions, find_duplicates, find_leakage
from onlay.data.audit.similar import find_clusters
from onlay.data.audit.statistics import distribution_of
from onlay.data.audit.worker import Role
from onlay.records import Distribution, Group

PREFIXES: dict[Role, str] = {"evaluation": "leakage", "benchmark": "benchmark"}
"""What the codes of rows begin with that are also in the sources of a role."""
SHOWN_GROUPS = 20


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Compared:
    clusters: np.ndarray
    """(N,) int64: of each training row the first row of its cluster of duplicates; a row alone is its own."""
    groups: list[Group]
    distributions: list[Distribution]
    shares: dict[str, dict[str, int]]
    measures: dict[str, float]
    told: dict[str, dict[str, object]]
    """By code, what fills the {names} of the catalogue's messages."""


def compare_rows(
    examined: Examined, *, threshold: float, clusters: np.ndarray | None = None, by_words: bool = True
) -> Compared:
    """Compares all rows, and adds what it finds to `examined.tally`.

    `threshold`: the Jaccard similarity of near-duplicates, that of `Settings.near_threshold`; `clusters`: those of the
    training rows, where they were found before; `by_words`: rows without domains are clustered by their words, which makes
    no finding, only shares and measures.
    """
    table, fingerprints = examined.table, examined.fingerprints
    assert fingerprints is not None, "examined without fingerprints"
    train = examined.among("train")
    files = [file.path for file in examined.files]
    if clusters is None:
        clusters = find_clusters(fingerprints, table, threshold=threshold, among=train, read_texts=examined.read_texts)
    groups, sizes = find_duplicates(
        clusters, table, among=train, read_texts=examined.read_texts, files=files, tally=examined.tally,
        shown=SHOWN_GROUPS,
    )  # fmt: skip
    groups += find_contradictions(
        fingerprints, table, among=train, read_texts=examined.read_texts, files=files, tally=examined.tally,
        shown=SHOWN_GROUPS,
    )  # fmt: skip
    for role, known in examined.known.items():
        groups += find_leakage(
            fingerprints, table, train=train, held_out=examined.among(role), shared=examined.shared.get(role),
            known=known, threshold=threshold, read_texts=examined.read_texts, files=files, tally=examined.tally,
            prefix=PREFIXES[role], shown=SHOWN_GROUPS,
        )  # fmt: skip
    balance = measure_domains(table, among=train, tally=examined.tally)
    if balance is None and by_words:
        balance = measure_clusters(table, among=train, read_texts=examined.read_texts)
    without = _tell_sources_without_domain(examined, train)
    rows = int(train.sum())
    repeated = examined.tally.count("duplicates_exact") + examined.tally.count("duplicates_near")
    cluster_rows = distribution_of(sizes, name="cluster_rows", unit="rows")
    return Compared(
        clusters=clusters,
        groups=groups,
        distributions=[cluster_rows] if cluster_rows is not None else [],
        shares={balance.kind: balance.shares} if balance is not None else {},
        measures={
            "near_threshold": threshold,
            "duplicate_share": repeated / max(rows, 1),
            **(balance.measures if balance is not None else {}),
        },
        told={
            "duplicates_near": {"threshold": f"{threshold:g}"},
            "leakage_ngrams": {"ngram": NGRAM_WORDS},
            "benchmark_ngrams": {"ngram": NGRAM_WORDS},
            **(balance.told if balance is not None else {}),
            **without,
        },
    )


def _tell_sources_without_domain(examined: Examined, train: np.ndarray) -> dict[str, dict[str, object]]:
    """Adds the rows of training sources in which data.domain_field is nowhere, though others have it."""
    field, table = examined.section.domain_field, examined.table
    if field is None:
        return {}
    lacking = [
        number
        for number in np.unique(table.source[train]).tolist()
        if not (table.domain[table.source == number] >= 0).any()
    ]
    rows = np.flatnonzero(np.isin(table.source, lacking))
    examined.tally.add_many("no_domain", sources=table.source[rows], numbers=table.number[rows])
    return {"no_domain": {"field": field, "files": ", ".join(examined.files[number].path for number in lacking)}}
