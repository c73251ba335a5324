"""Rows in memory with what the audit keeps of them, for tests of what rows have to do with each other."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from onlay.data.audit.similar import Fingerprints, fingerprint, keys_of, texts_of
from onlay.data.audit.words import Item, normalise_bytes, shingles_of
from onlay.data.read import Conversation, Document, Turn
from onlay.data.rows import RowTable

WORDS = [f"w{number:x}" for number in range(4000)]


def conversation(prompt: str, answer: str, *, system: str | None = None) -> Conversation:
    turns = (Turn("user", prompt), Turn("assistant", answer))
    return Conversation((Turn("system", system), *turns) if system is not None else turns)


class Rows:
    """`rows`: items, or (prompt, answer) of conversations; `read` lists the rows whose texts were asked for."""

    def __init__(self, rows: Sequence[tuple[str, str] | Item], *, domains: Sequence[str | None] | None = None) -> None:
        self.items: list[Item] = [
            row if isinstance(row, Conversation | Document) else conversation(*row) for row in rows
        ]
        self.texts = [texts_of(item) for item in self.items]
        self.domains = domains
        self.read: list[int] = []

    def fingerprints(self, *, boilerplate: np.ndarray | None = None) -> Fingerprints:
        return fingerprint(self.items, boilerplate=boilerplate)

    def table(self) -> RowTable:
        rows = len(self.items)
        keys = np.array([keys_of(item) for item in self.items], dtype=np.uint64).reshape(-1, 3)
        given = self.domains or [None] * rows
        names = list(dict.fromkeys(name for name in given if name is not None))
        return RowTable(
            source=np.zeros(rows, dtype=np.uint16),
            number=np.arange(1, rows + 1),
            prompt_key=keys[:, 0],
            loose_prompt_key=keys[:, 0],
            answer_key=keys[:, 1],
            row_key=keys[:, 2],
            prompt_characters=np.array([len(prompt) for prompt, _ in self.texts], dtype=np.int32),
            answer_characters=np.array([len(answer) for _, answer in self.texts], dtype=np.int32),
            domain=np.array([-1 if name is None else names.index(name) for name in given], dtype=np.int32),
            domains=tuple(names),
        )

    def read_texts(self, rows: np.ndarray) -> Iterator[tuple[int, str, str]]:
        assert (np.diff(rows) > 0).all(), "rows are asked for in order, each once"
        for row in rows.tolist():
            self.read.append(row)
            yield (row, *self.texts[row])


def sentence(chance: random.Random, words: int) -> str:
    return " ".join(chance.choices(WORDS, k=words))


def edited(chance: random.Random, text: str, *, edits: int) -> str:
    words = text.split()
    for _ in range(edits):
        at = chance.randrange(len(words))
        kind = chance.random()
        if kind < 0.5:
            words[at] = chance.choice(WORDS)
        elif kind < 0.75:
            words.insert(at, chance.choice(WORDS))
        elif len(words) > 1:
            del words[at]
    return " ".join(words)


def many_rows(*, rows: int, words: tuple[int, int], edits: int, seed: int) -> Rows:
    """A third of the rows are edits of earlier ones."""
    chance = random.Random(seed)
    made: list[tuple[str, str]] = []
    for _ in range(rows):
        if made and chance.random() < 0.33:
            prompt, answer = chance.choice(made)
            made.append((edited(chance, prompt, edits=chance.randint(0, edits)), edited(chance, answer, edits=1)))
        else:
            made.append((sentence(chance, chance.randint(*words)), sentence(chance, chance.randint(*words))))
    return Rows(made)


def truly_similar(rows: Rows, threshold: float) -> set[tuple[int, int]]:
    """All pairs of at least this Jaccard similarity, by counting shared shingles."""
    sets = [
        set(shingles_of([normalise_bytes(text) for text in texts], boilerplate=None)[0].tolist())
        for texts in rows.texts
    ]
    holders: dict[int, list[int]] = defaultdict(list)
    shared: dict[tuple[int, int], int] = defaultdict(int)
    for row, shingles in enumerate(sets):
        for shingle in shingles:
            for other in holders[shingle]:
                shared[other, row] += 1
            holders[shingle].append(row)
    return {
        (one, two)
        for (one, two), common in shared.items()
        if common >= threshold * (len(sets[one]) + len(sets[two]) - common)
    }
