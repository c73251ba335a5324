"""Pairs of rows that may be similar, by the bands of their MinHash slots, not by comparing every row with every other.

rensa's R-MinHash gives 128 slots a row; the low byte of each is kept (equal by chance once in 256, which the estimate
takes out).  Slots are cut into bands, as long as they may be while two rows of similarity `threshold` share a band with a
probability of at least CANDIDATE_RECALL (0.8: 21 bands of 6 slots, 0.998).  Rows are sorted by band; a row meets the
WINDOW rows before it in its bucket and the bucket's earliest row, so a bucket of a million rows costs a few million
comparisons and not their square; of a row's pairs the BEST_PAIRS likeliest are kept.

Sources: Leskovec, Rajaraman, Ullman (Mining of massive datasets, chapter 3: banding); Li and König 2010 (b-bit minwise
hashing); Bawa, Condie, Ganesan 2005 (LSH forest: sorting inside a bucket).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from onlay.data.audit.words import distinct

ROW_SLOTS = 128
"""Most slots of a row."""
CANDIDATE_RECALL = 0.995
MARGIN = 0.12
"""How far an estimate may be from the truth: at least three standard errors, at all but the middle of the scale."""
WINDOW, BEST_PAIRS = 4, 4
MANY_PAIRS = 8
"""Where there are more a row, all but the likeliest are dropped before the next band."""
PAIRS_AT_ONCE = 1 << 16


def choose_bands(threshold: float, *, slots: int) -> tuple[int, int]:
    """(bands, slots a band): the longest bands that find a pair of similarity `threshold` with CANDIDATE_RECALL."""
    for length in range(slots, 1, -1):
        bands = slots // length
        if 1 - (1 - threshold**length) ** bands >= CANDIDATE_RECALL:
            return bands, length
    return slots, 1


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """Rows that may be similar to other rows, at most BEST_PAIRS others a row."""

    row: np.ndarray
    """(P,) int32, sorted."""
    other: np.ndarray
    """(P,) int32; of one row the likeliest first."""
    estimate: np.ndarray
    """(P,) float32: of their similarity."""

    def __len__(self) -> int:
        return len(self.row)

    @property
    def rows(self) -> np.ndarray:
        """All rows of the pairs, sorted, each once."""
        return distinct(np.concatenate([self.row, self.other]))

    @classmethod
    def none(cls) -> Self:
        return cls(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.float32))

    def where(self, kept: np.ndarray) -> Self:
        return type(self)(self.row[kept], self.other[kept], self.estimate[kept])

    def with_more(self, slots: np.ndarray, row: np.ndarray, other: np.ndarray, *, least: float) -> Self:
        """These and more pairs, those of them whose estimate is at least `least`."""
        more = estimate(slots, row, other)
        likely = more >= least
        return type(self)(
            np.concatenate([self.row, row[likely].astype(np.int32)]),
            np.concatenate([self.other, other[likely].astype(np.int32)]),
            np.concatenate([self.estimate, more[likely]]),
        )

    def pruned(self) -> Self:
        """Each pair once, and of each row the BEST_PAIRS likeliest; of equally likely ones the earliest."""
        row, other = self.row.astype(np.uint64), self.other.astype(np.uint64)
        found = self.where(np.argsort(row << np.uint64(32) | other, kind="stable"))
        repeated = (found.row[1:] == found.row[:-1]) & (found.other[1:] == found.other[:-1])
        found = found.where(np.append(True, ~repeated)[: len(found)])
        unlike = np.round((1 - found.estimate) * ROW_SLOTS).astype(np.int64)
        found = found.where(np.argsort(found.row.astype(np.int64) << 8 | unlike, kind="stable"))
        starts = np.searchsorted(found.row, found.row)
        return found.where(np.arange(len(found)) - starts < BEST_PAIRS)


def _band_keys(slots: np.ndarray, rows: np.ndarray, *, band: int, length: int) -> np.ndarray:
    """(len(rows),) uint64: the upper 48 bits name the bucket, the lower sort inside it by the two slots that follow."""
    keys = np.zeros(len(rows), dtype=np.uint64)
    for at in range(band * length, (band + 1) * length):
        keys = (keys ^ slots[rows, at]) * np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(32)
    keys &= np.uint64(0xFFFF_FFFF_FFFF_0000)
    width = slots.shape[1]
    keys |= slots[rows, (band + 1) * length % width].astype(np.uint64) << np.uint64(8)
    keys |= slots[rows, ((band + 1) * length + 1) % width]
    return keys


def estimate(slots: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(P,) float32: estimated similarity of each pair of rows."""
    equal = np.empty(len(first), dtype=np.float32)
    for at in range(0, len(first), PAIRS_AT_ONCE):
        here = slice(at, at + PAIRS_AT_ONCE)
        equal[here] = (slots[first[here]] == slots[second[here]]).mean(axis=1)
    return (equal - 1 / 256) / (255 / 256)


def similar_pairs(slots: np.ndarray, members: np.ndarray, *, threshold: float) -> Pairs:
    """Pairs of `members` (sorted row indices) that may be similar: each row with earlier ones."""
    bands, length = choose_bands(threshold, slots=slots.shape[1])
    found = Pairs.none()
    for band in range(bands):
        keys = _band_keys(slots, members, band=band, length=length)
        order = np.argsort(keys, kind="stable")
        bucket = keys[order] >> np.uint64(16)
        new = np.append(True, bucket[1:] != bucket[:-1])[: len(order)]
        starts = np.flatnonzero(new)
        if len(starts) == len(order):
            continue
        sizes = np.diff(np.append(starts, len(order)))
        hub = np.repeat(np.minimum.reduceat(order, starts), sizes)
        crowded = (np.repeat(sizes, sizes) > WINDOW + 1) & (hub != order)
        met = [(order[crowded], hub[crowded])]
        for step in range(1, min(WINDOW, len(order) - 1) + 1):
            same = bucket[step:] == bucket[:-step]
            met.append((order[step:][same], order[:-step][same]))
        for one, two in met:
            later, earlier = members[np.maximum(one, two)], members[np.minimum(one, two)]
            found = found.with_more(slots, later, earlier, least=threshold - MARGIN)
        if len(found) > MANY_PAIRS * len(members):
            found = found.pruned()
    return found.pruned()


def similar_across(slots: np.ndarray, members: np.ndarray, others: np.ndarray, *, threshold: float) -> Pairs:
    """Pairs of a row of `members` and one of `others` (row indices) that may be similar."""
    bands, length = choose_bands(threshold, slots=slots.shape[1])
    found = Pairs.none()
    if not len(others) or not len(members):
        return found
    for band in range(bands):
        keys, theirs = (_band_keys(slots, rows, band=band, length=length) for rows in (members, others))
        order = np.argsort(theirs, kind="stable")
        theirs = theirs[order]
        at = np.searchsorted(theirs, keys)
        for step in range(-WINDOW // 2, WINDOW // 2 + 1):
            place = np.clip(at + step, 0, len(order) - 1)
            same = np.flatnonzero(theirs[place] >> np.uint64(16) == keys >> np.uint64(16))
            found = found.with_more(slots, members[same], others[order[place[same]]], least=threshold - MARGIN)
        if len(found) > MANY_PAIRS * len(members):
            found = found.pruned()
    return found.pruned()
