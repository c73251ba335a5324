"""What is refused of what a model wrote, and why.  The limits are Self-Instruct's (Wang et al. 2022, arXiv 2212.10560,
section 2.2), widened to what the seed tasks themselves do."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

from onlay.data.synthesis.prompts import Written
from onlay.data.synthesis.seeds import Task

REASONS = {
    "refused_by_server": "prompts that the server refuses (a content filter's, or too long for it)",
    "unreadable_reply": "replies that hold no task in the form asked for",
    "cut_off": "last tasks of replies that ended at the limit of tokens",
    "too_short": "instructions of fewer words than any seed's, and fewer than 4",
    "too_long": "instructions of more words than any seed's, and more than 150",
    "starts_oddly": "instructions that begin with neither a letter, a digit nor a quotation mark",
    "beyond_text": "instructions that speak of pictures, sound or drawing, as no seed does",
    "duplicate": "tasks equal to a seed or an earlier one, up to case, punctuation and white space",
    "not_novel": "instructions too like a seed's or an earlier one's (ROUGE-L)",
    "no_room": "tasks so long that the context has no room for an answer, or for a grade",
    "empty_answer": "answers without a word",
    "answer_cut_off": "answers that ended at the limit of tokens",
    "answer_is_prompt": "answers that say the instruction or the input again",
    "placeholder_answer": "answers that are placeholders or speak of being an AI",
    "repetition": "answers that repeat themselves",
    "refusals": "answers that refuse",
    "broken_encoding": "rows with broken characters",
    "judged_low": "rows that the judge graded below the limit",
    "judge_unreadable": "rows whose grade could not be read",
}
OF_THE_AUDIT = ("broken_encoding", "placeholder_answer", "repetition", "refusals")
"""Codes of `onlay.data.audit.texts` for which a made row is refused."""
LEAST_WORDS, MOST_WORDS = 4, 150
BEYOND_TEXT = frozenset(
    ("image", "images", "picture", "pictures", "photo", "photos", "graph", "graphs", "chart", "charts", "diagram", "diagrams",
     "map", "maps", "draw", "plot", "video", "videos", "audio", "music")
)  # fmt: skip
_MARKS = re.compile(r"[\W_]+")

Words = Callable[[str], list[str]]
LongestCommon = Callable[[Sequence[str], Sequence[str]], int]
"""Length of the longest common subsequence of two lists of words."""


class Filter:
    """Holds what the seeds and the tasks made so far say, and refuses what is like it."""

    def __init__(
        self, seeds: Sequence[Task], *, words: Words, longest_common: LongestCommon, most_alike: float
    ) -> None:
        """`most_alike`: ROUGE-L's F from which on a task is no new one; 0 to 1."""
        self._words, self._longest_common, self.most_alike = words, longest_common, most_alike
        self._known: list[tuple[list[str], str]] = []
        self._said: set[tuple[str, str]] = set()
        for seed in seeds:
            self.add(Written(seed.instruction, seed.input), place=seed.place)
        lengths = [len(known) for known, _ in self._known]
        self.least_words, self.most_words = min(LEAST_WORDS, *lengths), max(MOST_WORDS, *lengths)
        self._beyond = BEYOND_TEXT.difference(*(known for known, _ in self._known))

    def add(self, written: Written, *, place: str) -> None:
        self._known.append((self._words(written.instruction), place))
        self._said.add(_key(written))

    def refusal(self, written: Written) -> tuple[str | None, dict[str, Any]]:
        """Why a task is refused, or None; and the nearest task: {"alike": ROUGE-L's F, "nearest": its place}."""
        if "\ufffd" in written.instruction + written.input:
            return "broken_encoding", {}
        words = self._words(written.instruction)
        if len(words) < self.least_words:
            return "too_short", {}
        if len(words) > self.most_words:
            return "too_long", {}
        if unicodedata.category(written.instruction[0]) not in _BEGINNINGS and written.instruction[0] not in "\"'¿¡":
            return "starts_oddly", {}
        if self._beyond.intersection(words):
            return "beyond_text", {}
        if _key(written) in self._said:
            return "duplicate", {}
        alike, nearest = self.nearest(written.instruction)
        found = {"alike": round(alike, 4), "nearest": nearest}
        return ("not_novel" if alike >= self.most_alike else None), found

    def nearest(self, instruction: str) -> tuple[float, str]:
        """The largest ROUGE-L F with any task, F = 2 common / (words of both), and that task's place."""
        words = self._words(instruction)
        best, where = 0.0, ""
        for known, place in self._known:
            both = len(words) + len(known)
            if not both or 2 * min(len(words), len(known)) <= best * both:
                continue  # Even if the shorter were wholly in the longer.
            alike = 2 * self._longest_common(words, known) / both
            if alike > best:
                best, where = alike, place
        return best, where


_BEGINNINGS = frozenset(("Lu", "Ll", "Lt", "Lm", "Lo", "Nd", "Pi", "Ps"))
"""Unicode's letters, digits, opening quotation marks and brackets."""


def _key(written: Written) -> tuple[str, str]:
    return _plain(written.instruction), _plain(written.input)


def _plain(text: str) -> str:
    return _MARKS.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()


def answer_refusal(written: Written, answer: str, *, cut: bool, codes: Sequence[str]) -> str | None:
    """Why an answer is refused, or None.  `codes`: what the audit says of the row."""
    if not _plain(answer) and not any(unicodedata.category(mark).startswith("S") for mark in answer):
        return "empty_answer"
    if cut:
        return "answer_cut_off"
    if _plain(answer) and _plain(answer) in (_plain(written.instruction), _plain(written.input)):
        return "answer_is_prompt"
    return next((code for code in OF_THE_AUDIT if code in codes), None)
