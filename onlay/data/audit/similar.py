"""Which rows say nearly the same: MinHash fingerprints, candidates by banding, clusters.

    items ──fingerprint──▶ Fingerprints ──find_clusters──▶ the first row of each row's cluster
     (in workers)          (200 bytes a row)   (in the main process; re-reads only rows near the threshold)

**Similar** means: Jaccard similarity of the sets of shingles (runs of three words, onlay/data/audit/words.py) of prompt
and answer together, without system turns and without the prompts' boilerplate; and the lists of tools are equal; and the
prompts have something in common (an estimated similarity of at least PROMPT_TRACE, or nothing left but boilerplate): `hi`
and `who are you?` with the same long answer are two rows, not one.

**Candidates** are found by banding, onlay/data/audit/candidates.py.

**Decision.** The share of equal slots estimates the similarity with a standard error of at most 0.044 (128 slots; 0.03
measured at 0.8).  Pairs above threshold + MARGIN are taken, below threshold - MARGIN left; those between are read again
and compared by their true shingles: exactly, up to SKETCH_SHINGLES shingles a row; longer rows by their SKETCH_SHINGLES
smallest hashes (a bottom-k sketch, standard error 0.0125 at 0.8), fewer where SKETCH_BYTES would not hold them.  Where
more than ROWS_READ_AGAIN rows would be read again, those nearest the threshold are, the others go by the estimate.

**Clusters.** Equal rows first, then pairs join clusters.  Two clusters join only where their first rows have an estimated
similarity of at least 2 * threshold - 1 (less half the MARGIN), which by the triangle inequality of the Jaccard distance
lets through every row two steps away: a chain of templated rows, each like the next, ends where it has left the first
row's neighbourhood.  A cluster is named by its first row.

Sources: Broder 1997 (MinHash); Dahlgaard, Knudsen, Thorup 2017 (Fast similarity sketching, which rensa builds on);
Li and König 2010 (b-bit minwise hashing); Cohen and Kaplan 2007 (Summarizing data using bottom-k sketches).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Self

import numpy as np

from onlay.data.audit.candidates import MARGIN, ROW_SLOTS, Pairs, estimate, similar_pairs
from onlay.data.audit.words import (
    Item,
    distinct,
    find_boilerplate,
    key_of,
    keys_of,
    loose_key,
    normalise,
    normalise_bytes,
    rows_of_texts,
    shingles_of,
    similarity,
    texts_of,
    tools_key,
)
from onlay.data.rows import RowTable

__all__ = [
    "Fingerprints", "Item", "ReadTexts", "find_boilerplate", "find_clusters", "fingerprint", "keys_of",
    "loose_key", "normalise", "similarity", "texts_of",
]  # fmt: skip

PROMPT_SLOTS, SEED = 64, 42
PROMPT_TRACE = 0.03
ROWS_READ_AGAIN = 200_000
SKETCH_SHINGLES, SKETCH_BYTES = 1024, 256 << 20
ROWS_AT_ONCE = 2048

ReadTexts = Callable[[np.ndarray], Iterator[tuple[int, str, str]]]
"""read_texts(sorted row indices) yields (index, prompt, answer) in that order, the texts as `texts_of` gives them."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Fingerprints:
    """What is kept of every row to find similar ones: the same rows, in the same order, as the RowTable."""

    rows: np.ndarray
    """(N, ROW_SLOTS) uint8: low bytes of the MinHash slots of prompt and answer."""
    prompts: np.ndarray
    """(N, PROMPT_SLOTS) uint8: the same of the prompt alone."""
    row_shingles: np.ndarray
    """(N,) uint32: how many the row was made of; a row of none is similar to nothing."""
    prompt_shingles: np.ndarray
    """(N,) uint32."""
    asked: np.ndarray
    """(N,) uint64: key of the normalised prompt without system turns."""
    tools: np.ndarray
    """(N,) uint64: tools_key."""
    boilerplate: np.ndarray
    """(B,) uint64: prompts' shingles that were left out."""

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """One of several, whose rows follow each other; all made with the same boilerplate."""
        assert all(np.array_equal(part.boilerplate, parts[0].boilerplate) for part in parts[1:])
        arrays = {
            field.name: np.concatenate([getattr(part, field.name) for part in parts])
            for field in fields(cls)
            if field.name != "boilerplate"
        }
        return cls(**arrays, boilerplate=parts[0].boilerplate)


def fingerprint(
    items: Sequence[Item], *, texts: Sequence[bytes] | None = None, boilerplate: np.ndarray | None = None
) -> Fingerprints:
    """Fingerprints of these rows, in order; about 60 microseconds for a row of 300 characters.

    `texts`: rows_of_texts of the items, where they are known; `boilerplate`: find_boilerplate of a sample of the training rows, the same for all parts; None: off.
    """
    raw = [texts_of(item) for item in items]
    texts = rows_of_texts(items) if texts is None else texts
    shingles, text = shingles_of(texts, boilerplate=boilerplate, whole=_without_answer(raw))
    in_text = np.bincount(text, minlength=len(texts))
    of_row, of_prompt = in_text.reshape(-1, 2).sum(axis=1), in_text[::2]
    return Fingerprints(
        rows=_minhash(shingles, of_row, slots=ROW_SLOTS),
        prompts=_minhash(shingles[text % 2 == 0], of_prompt, slots=PROMPT_SLOTS),
        row_shingles=of_row.astype(np.uint32),
        prompt_shingles=of_prompt.astype(np.uint32),
        asked=np.array(
            [key_of(text) if text else loose_key(prompt) for text, (prompt, _) in zip(texts[::2], raw, strict=True)],
            dtype=np.uint64,
        ),
        tools=np.array([tools_key(item) for item in items], dtype=np.uint64),
        boilerplate=np.zeros(0, dtype=np.uint64) if boilerplate is None else boilerplate,
    )


def _without_answer(texts: Sequence[tuple[str, str]]) -> np.ndarray:
    """(N,) bool: which rows, given as (prompt, answer), are documents."""
    return np.array([not answer for _, answer in texts], dtype=bool)


def _minhash(shingles: np.ndarray, counts: np.ndarray, *, slots: int) -> np.ndarray:
    """(N, slots) uint8 of rows whose shingles follow each other, `counts` of each."""
    from rensa import RMinHash

    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(shingles, offsets, slots, SEED)
    return np.array(matrix.to_rows(), dtype=np.uint32).reshape(-1, slots).astype(np.uint8)


# --------------------------------------------------------------------------------------------------------- decisions


class Shingles:
    """The shingles of some rows, read again: what pairs near the threshold are compared by.

    32 bits of each hash, as they need only tell the shingles of two rows apart; of more than `most` the smallest.
    """

    def __init__(self, rows: np.ndarray, *, read_texts: ReadTexts, boilerplate: np.ndarray, prompts: bool) -> None:
        """`rows`: sorted; `prompts`: of the prompt alone."""
        self.rows = rows
        self.most = min(SKETCH_SHINGLES, max(64, SKETCH_BYTES // (4 * max(1, len(rows)))))
        flats, counts = [np.zeros(0, dtype=np.uint32)], [np.zeros(1, dtype=np.int64)]
        texts = read_texts(rows)
        while chunk := list(itertools.islice(texts, ROWS_AT_ONCE)):
            normal = [
                normalise_bytes(text) for _, prompt, answer in chunk for text in (prompt, "" if prompts else answer)
            ]
            whole = _without_answer([(prompt, answer) for _, prompt, answer in chunk])
            found = shingles_of(normal, boilerplate=boilerplate, whole=whole)
            flat, count = _sketches(*found, rows=len(chunk), most=self.most)
            flats.append(flat)
            counts.append(count)
        self.flat, self.offsets = np.concatenate(flats), np.cumsum(np.concatenate(counts))

    def jaccard(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """(P,) float64: of each pair of rows; 0 where neither has any."""
        found = np.zeros(len(first))
        places = np.searchsorted(self.rows, np.stack([first, second]))
        sizes = np.diff(self.offsets)
        for at in range(0, len(first), ROWS_AT_ONCE):
            one, other = places[:, at : at + ROWS_AT_ONCE]
            found[at : at + ROWS_AT_ONCE] = self._jaccard(one, other, sizes)
        return found

    def _jaccard(self, one: np.ndarray, other: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Exact where both rows hold all their shingles; otherwise over the smallest `most` of the two together."""
        pair = np.arange(len(one), dtype=np.uint64) << np.uint64(32)
        keys = np.sort(np.concatenate([_gather(self.flat, self.offsets, rows, pair, sizes) for rows in (one, other)]))
        twice = np.append(keys[1:] == keys[:-1], False)[: len(keys)]
        distinct = np.append(True, ~twice[:-1])[: len(keys)]
        of_pair = (keys >> np.uint64(32)).astype(np.int64)
        total = np.bincount(of_pair[distinct], minlength=len(one))
        cut = (np.maximum(sizes[one], sizes[other]) >= self.most) & (total > self.most)
        rank = np.cumsum(distinct) - np.repeat(np.cumsum(total) - total, np.bincount(of_pair, minlength=len(one)))
        twice &= ~cut[of_pair] | (rank <= self.most)
        common = np.bincount(of_pair[twice], minlength=len(one))
        return common / np.maximum(np.where(cut, self.most, total), 1)


def _gather(flat: np.ndarray, offsets: np.ndarray, rows: np.ndarray, pair: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The shingles of these rows, the number of its pair in the upper half of each."""
    counts = sizes[rows]
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    keys: np.ndarray = np.repeat(pair, counts) | flat[np.repeat(offsets[rows], counts) + within].astype(np.uint64)
    return keys


def _sketches(shingles: np.ndarray, text: np.ndarray, *, rows: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The smallest `most` distinct shingles of each row, sorted, one row after the other; and how many of each."""
    keys = distinct((text // 2).astype(np.uint64) << np.uint64(32) | shingles >> np.uint64(32))
    row = (keys >> np.uint64(32)).astype(np.int64)
    counts = np.bincount(row, minlength=rows)
    rank = np.arange(len(keys)) - np.repeat(np.cumsum(counts) - counts, counts)
    return keys[rank < most].astype(np.uint32), np.minimum(counts, most)


def confirm(
    pairs: Pairs, *, threshold: float, prompts: bool, boilerplate: np.ndarray, read_texts: ReadTexts
) -> np.ndarray:
    """(P,) bool: which pairs are similar, by their `prompts` alone or as whole rows; see Decision at the top."""
    similar: np.ndarray = pairs.estimate >= threshold
    distance = np.abs(pairs.estimate - threshold)
    unsure = np.flatnonzero(distance < MARGIN)
    unsure = unsure[np.argsort(distance[unsure], kind="stable")]
    _, met = np.unique(np.stack([pairs.row[unsure], pairs.other[unsure]], axis=1), return_index=True)
    if len(met) > ROWS_READ_AGAIN:
        unsure = unsure[: int(np.sort(met)[ROWS_READ_AGAIN]) // 2]
    row, other = pairs.row[unsure], pairs.other[unsure]
    shingles = Shingles(
        distinct(np.concatenate([row, other])), read_texts=read_texts, boilerplate=boilerplate, prompts=prompts
    )
    similar[unsure] = shingles.jaccard(row, other) >= threshold
    return similar


# ---------------------------------------------------------------------------------------------------------- clusters


def find_clusters(
    fingerprints: Fingerprints,
    table: RowTable,
    *,
    threshold: float,
    among: np.ndarray | None = None,
    read_texts: ReadTexts,
) -> np.ndarray:
    """(N,) int64: the first row of each row's cluster of equal and similar rows; a row alone is its own.

    `threshold`: Jaccard similarity, 0.5 to 1; `among`: (N,) bool, the rows to compare (None: all); others stay alone.
    """
    members = np.arange(len(table)) if among is None else np.flatnonzero(among)
    cluster = np.arange(len(table))
    _, first, place = np.unique(table.row_key[members], return_index=True, return_inverse=True)
    cluster[members] = members[first[place]]
    heads = np.sort(members[first])
    heads = heads[fingerprints.row_shingles[heads] > 0]
    pairs = similar_pairs(fingerprints.rows, heads, threshold=threshold)
    pairs = pairs.where(fingerprints.tools[pairs.row] == fingerprints.tools[pairs.other])
    pairs = pairs.where(
        confirm(pairs, threshold=threshold, prompts=False, boilerplate=fingerprints.boilerplate, read_texts=read_texts)
    )
    pairs = pairs.where(_alike_in_prompt(pairs, fingerprints))
    moved = np.arange(len(table))
    for row, first_row in _join(pairs, fingerprints.rows, floor=2 * threshold - 1 - MARGIN / 2).items():
        moved[row] = first_row
    joined: np.ndarray = moved[cluster]
    return joined


def _alike_in_prompt(pairs: Pairs, fingerprints: Fingerprints) -> np.ndarray:
    """(P,) bool: whether the prompts have something in common, be it only that they have no shingles of their own."""
    counts = fingerprints.prompt_shingles
    empty = (counts[pairs.row] == 0) & (counts[pairs.other] == 0)
    similar: np.ndarray = empty | (estimate(fingerprints.prompts, pairs.row, pairs.other) >= PROMPT_TRACE)
    return similar


def _join(pairs: Pairs, slots: np.ndarray, *, floor: float) -> dict[int, int]:
    """Row to the first row of its cluster, for all rows of the pairs."""
    leader = {row: row for row in pairs.rows.tolist()}
    for row, other in zip(pairs.row.tolist(), pairs.other.tolist(), strict=True):
        one, two = sorted((_find(leader, row), _find(leader, other)))
        if one == two:
            continue
        if (two, one) == (row, other) or estimate(slots, np.array([one]), np.array([two]))[0] >= floor:
            leader[two] = one
    return {row: _find(leader, row) for row in leader}


def _find(leader: dict[int, int], row: int) -> int:
    """The first row of a row's cluster; shortens the way there."""
    while leader[row] != row:
        leader[row] = leader[leader[row]]
        row = leader[row]
    return row
