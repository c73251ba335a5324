"""Rows side by side: which ones to show, and what differs from the expected answer."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from onlay.records import Report

KINDS = {
    True: {"fixed": "fixed", "broken": "broken", "neither": "both wrong", "both": "both right"},
    False: {"fixed": "better", "broken": "worse", "neither": "the same"},
}
"""Names of the kinds of rows, for yes/no scores and for others."""
WORD = re.compile(r"([\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|\w+|[^\w\s])(\s*)")
"""A word and the white space behind it.  Chinese and Japanese have no spaces: a character is a word."""
MOST_WORDS = 800
"""Differences between longer texts are not looked for: that takes time as their lengths' product."""
LEAST_IN_COMMON = 0.3
"""With less in common nearly every word would be marked, which says nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """The score that sorts rows into kinds, and between which systems."""

    score: str
    system: str
    against: str | None
    """None when only one system answered."""
    higher_is_better: bool
    yes_no: bool
    """Every row's score is 0 or 1."""

    def kind(self, row: Mapping[str, Any]) -> str | None:
        """fixed, broken, neither or both; None for a row without the score."""
        ours, theirs = self._worth(row, self.system), self._worth(row, self.against or self.system)
        if ours is None or theirs is None:
            return None
        if ours != theirs:
            return "fixed" if ours > theirs else "broken"
        return "both" if self.yes_no and ours == (1.0 if self.higher_is_better else 0.0) else "neither"

    def gain(self, row: Mapping[str, Any]) -> float:
        """How much the row's answer gained or lost, of rows that have a kind."""
        ours, theirs = self._worth(row, self.system), self._worth(row, self.against or self.system)
        assert ours is not None and theirs is not None
        return abs(ours - theirs)

    def _worth(self, row: Mapping[str, Any], system: str) -> float | None:
        """The larger the better."""
        value = row["scores"].get(system, {}).get(self.score)
        return None if value is None else value if self.higher_is_better else -value


def measure_of(report: Report, rows: Sequence[Mapping[str, Any]]) -> Measure | None:
    """By the first yes/no score that the report compares, or else the first score; against the base where it answered."""
    answered = {system for row in rows for system in row["answers"]}
    if report.system not in answered:
        return None
    directions = {one.score: one.higher_is_better for one in report.comparisons}
    scores = list(directions) or list(report.scores.get(report.system, {}))
    values = {score: [given[score] for row in rows for given in row["scores"].values() if given.get(score) is not None] for score in scores}  # fmt: skip
    scores = [score for score in scores if values[score]]
    if not scores:
        return None
    yes_no = [score for score in scores if set(values[score]) <= {0.0, 1.0}]
    score = (yes_no or scores)[0]
    others = [one.against for one in report.comparisons if one.against in answered] or sorted(
        answered - {report.system}
    )
    against = "base" if "base" in others else next(iter(others), None)
    return Measure(
        score=score,
        system=report.system,
        against=against,
        higher_is_better=directions.get(score, True),
        yes_no=score in yes_no,
    )


def choose(
    rows: Sequence[Mapping[str, Any]], *, measure: Measure | None, most: int
) -> tuple[list[tuple[str, Mapping[str, Any]]], dict[str, int]]:
    """(kind, row) of at most `most` rows, and how many rows there are of each kind, shown or not.

    Fixed, broken and neither in turn, so that each has its share; those with the largest change first, then in the file's
    order.  Rows that both systems got right fill what is left, and those without the score stand last, of kind `unscored`.
    """
    found: dict[str, list[Mapping[str, Any]]] = {"fixed": [], "broken": [], "neither": [], "both": [], "unscored": []}
    for row in rows:
        found[(measure.kind(row) if measure else None) or "unscored"].append(row)
    counts = {kind: len(given) for kind, given in found.items() if given}
    for kind in ("fixed", "broken"):
        if measure is not None:
            found[kind].sort(key=measure.gain, reverse=True)
    told = ("fixed", "broken", "neither")
    turns = itertools.zip_longest(*([(kind, row) for row in found[kind]] for kind in told))
    first = [one for turn in turns for one in turn if one is not None]
    rest = [(kind, row) for kind in ("both", "unscored") for row in found[kind]]
    return (first + rest)[:most], counts


def marked(answer: str, *, expected: str) -> Markup:
    """The answer, escaped, with <ins> around words that are not in the expected one and <del> around those that are missing.

    White space is not compared.  Plain where either text is too long or has no words, or where less than LEAST_IN_COMMON of
    their characters are in common.
    """
    ours, theirs = WORD.findall(answer), WORD.findall(expected)
    if not ours or not theirs or max(len(ours), len(theirs)) > MOST_WORDS:
        return escape(answer)
    ours_words, their_words = [word for word, _ in ours], [word for word, _ in theirs]
    matcher = difflib.SequenceMatcher(None, their_words, ours_words, autojunk=False)
    blocks = matcher.get_matching_blocks()
    common = sum(len(word) for start, _, size in blocks for word in their_words[start : start + size])
    if 2 * common / sum(map(len, ours_words + their_words)) < LEAST_IN_COMMON:
        return escape(answer)
    parts = [escape(answer[: len(answer) - len(answer.lstrip())])]
    for change, from_start, from_end, to_start, to_end in matcher.get_opcodes():
        missing, said = (_joined(one) for one in (theirs[from_start:from_end], ours[to_start:to_end]))
        if change == "equal":
            parts.append(escape("".join(said)))
            continue
        for tag, (text, space) in (("del", missing), ("ins", said)):
            if text:
                parts.append(Markup("<{0}>{1}</{0}>{2}").format(tag, text, space))
    return Markup("").join(parts)


def _joined(words: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """Text of some words, and the white space behind the last."""
    text = "".join(word + space for word, space in words)
    return text.rstrip(), text[len(text.rstrip()) :]


def differs_in_white_space_alone(answer: str, *, expected: str) -> bool:
    return answer.strip() != expected.strip() and answer.split() == expected.split()
