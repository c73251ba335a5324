"""What a detector returns, and what becomes of detections that overlap."""

from __future__ import annotations

import re
from bisect import bisect
from collections.abc import Iterable
from dataclasses import dataclass

KINDS = (
    "email", "phone", "card", "iban", "national_id", "ip", "url", "url_credentials", "key", "address", "name",
)  # fmt: skip
RANK = {
    "key": 0, "url_credentials": 1, "email": 2, "iban": 3, "card": 4, "ip": 5, "national_id": 6, "url": 7, "phone": 8,
    "address": 9, "name": 10,
}  # fmt: skip
"""Of two detections that overlap with equal scores, the one with the lower rank stays: the more specific pattern."""
BEFORE, AFTER = 40, 20
"""Characters around a number in which a word may tell what it is."""


@dataclass(frozen=True, slots=True)
class Span:
    """`text[start:end]` of what was searched."""

    kind: str
    start: int
    end: int
    text: str
    score: float
    """0 to 1, by the kind of evidence: 0.9 and more a checksum or a form that nothing else has, 0.7 a form and its
    surroundings, 0.5 a word that may be something else."""


def span_of(kind: str, text: str, start: int, end: int, score: float) -> Span:
    return Span(kind, start, end, text[start:end], score)


def resolve(spans: Iterable[Span]) -> list[Span]:
    """Without overlaps, in order: secrets first, then the likelier, then the longer."""
    kept: list[Span] = []
    starts: list[int] = []
    for span in sorted(spans, key=lambda one: (RANK[one.kind] > 1, -one.score, RANK[one.kind], one.start - one.end)):
        place = bisect(starts, span.start)
        if (place == 0 or kept[place - 1].end <= span.start) and (place == len(kept) or span.end <= kept[place].start):
            starts.insert(place, span.start)
            kept.insert(place, span)
    return kept


def is_near(words: re.Pattern[str], text: str, start: int, end: int) -> bool:
    """Whether one of the words is shortly before `start`, or after `end`."""
    return bool(words.search(text, max(0, start - BEFORE), start) or words.search(text, end, end + AFTER))
