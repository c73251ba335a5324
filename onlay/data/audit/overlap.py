"""Rows that repeat or contradict each other, and training rows that the evaluation or a benchmark holds too.

**Contradictions.** Rows whose prompts are equal once normalised, system turns and tools included, and whose last answers
differ.
Answers that are numbers are compared as numbers (`4`, `4.0`, `$4`; the number after the last `####` or in the last
`\\boxed{}` where an answer ends in one); all others normalised.  The same, at the level of a note, for prompts of
similarity PROMPT_THRESHOLD and above whose numbers and tools are equal: prompts with other numbers ask something else.

**Leakage**, a training row under its worst tier only:

1. exact: its prompt, without system turns and tools, is a held-out row's (up to case, punctuation and white space);
2. near: its prompt, or prompt and answer together, has a Jaccard similarity of at least the threshold with a held-out
   row's;
3. n-grams: it shares NGRAM_WORDS words in a row, in prompt or answer, with a held-out row.  Symbols are no words here,
   and most words of an n-gram must have letters: sums and tables are alike everywhere.  13 as for GPT-3: runs of 8 are
   common phrases, and shorter rows are what the first two tiers are for.  Only held-out n-grams are kept; training rows
   stream.

Instructions that many rows share are no leakage.  A run of TEMPLATE_WORDS words in at least TEMPLATE_ROWS and at least
TEMPLATE_SHARE of a sample of training rows is a template's, and an n-gram that holds one tells nothing; the rows that the
third tier found are read again and judged without such n-grams.

Sources: Brown et al. 2020 (GPT-3, appendix C: 13-grams; those of more than 10 documents are left out); Lee et al. 2022
(Deduplicating training data makes language models better).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Self

import numpy as np

from onlay.data.audit.candidates import similar_across, similar_pairs
from onlay.data.audit.catalogue import Tally
from onlay.data.audit.similar import Fingerprints, ReadTexts, confirm
from onlay.data.audit.words import (
    LETTERS,
    SYMBOL,
    Item,
    distinct,
    hash_runs,
    hash_words,
    is_in,
    key_of,
    loose_key,
    normalise_bytes,
    often,
    rows_of_texts,
    text_of,
)
from onlay.data.rows import RowTable
from onlay.records import Group, RowAt

NGRAM_WORDS = 13
TEMPLATE_WORDS, TEMPLATE_ROWS, TEMPLATE_SHARE = 8, 10, 0.01
SAMPLE_ROWS = 2000
PROMPT_THRESHOLD = 0.9
SIDE_BY_SIDE = 4
"""Most rows of a group that are shown."""

# ------------------------------------------------------------------------------------------------------------ n-grams


@dataclass(frozen=True, slots=True, eq=False)
class SharedNgrams:
    """Which training rows share n-grams with held-out ones, templates not yet looked at."""

    rows: np.ndarray
    """(N,) bool, in the order of the training rows."""

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """One of several, whose rows follow each other; all made with the same `known`."""
        return cls(np.concatenate([part.rows for part in parts]))


def _runs(texts: Sequence[bytes], *, words: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Runs of so many words in normalised texts: hashes (R,) uint64, (R,) int64 the text and (R,) int64 the place of each.

    A run is of words with a letter or a digit, most of them with a letter.
    """
    hashes, kinds, offsets = hash_words(texts)
    spoken = kinds > SYMBOL
    before = np.concatenate([[0], np.cumsum(spoken)])
    hashes, kinds, offsets = hashes[spoken], kinds[spoken], before[offsets]
    runs, first = hash_runs(hashes, offsets, length=words, short=False)
    lettered = np.concatenate([[0], np.cumsum(kinds == LETTERS)])
    telling = 2 * (lettered[first + words] - lettered[first]) > words
    return runs[telling], text_of(first, offsets)[telling], first[telling]


def ngrams_of(items: Sequence[Item]) -> np.ndarray:
    """(G,) uint64, sorted, each once: runs of NGRAM_WORDS words in the prompts or answers of held-out rows."""
    return distinct(_runs(rows_of_texts(items), words=NGRAM_WORDS)[0])


def shared_ngrams(items: Sequence[Item], known: np.ndarray) -> SharedNgrams:
    """Which of these training rows hold an n-gram of `known` (sorted)."""
    grams, text, _ = _runs(rows_of_texts(items), words=NGRAM_WORDS)
    found = np.zeros(len(items), dtype=bool)
    found[text[is_in(grams, known)] // 2] = True
    return SharedNgrams(found)


def without_boilerplate(known: np.ndarray, items: Sequence[Item]) -> np.ndarray:
    """`known` without the n-grams that a sample of training rows shows to be a template's: they need not be looked for."""
    kept: np.ndarray = known[~is_in(known, _often(rows_of_texts(items), words=NGRAM_WORDS))]
    return kept


def _often(texts: Sequence[bytes], *, words: int) -> np.ndarray:
    """(R,) uint64, sorted: runs of so many words in too many of these rows (two texts each) to tell anything."""
    runs, text, _ = _runs(texts, words=words)
    return often(runs, text // 2, least=max(TEMPLATE_ROWS, TEMPLATE_SHARE * (len(texts) // 2)))


# --------------------------------------------------------------------------------------------------------- duplicates


def find_duplicates(
    clusters: np.ndarray, table: RowTable, *, among: np.ndarray, read_texts: ReadTexts, files: Sequence[str], tally: Tally,
    shown: int = 20,
) -> tuple[list[Group], np.ndarray]:  # fmt: skip
    """Counts rows that repeat, exactly or nearly, an earlier row of `among` ((N,) bool).

    Returns the largest `shown` clusters as groups, and (C,) int64: the sizes of all clusters of two rows and more.
    A row that equals an earlier row counts as exact, any other row of a cluster but its first as near.
    """
    members = np.flatnonzero(among)
    _, first, place = np.unique(table.row_key[members], return_index=True, return_inverse=True)
    exact = members[first[place]] != members
    near = (clusters[members] != members) & ~exact
    _add(tally, "duplicates_exact", members[exact], table)
    _add(tally, "duplicates_near", members[near], table)
    heads, sizes = np.unique(clusters[members], return_counts=True)
    heads, sizes = heads[sizes > 1], sizes[sizes > 1]
    largest = heads[np.argsort(-sizes, kind="stable")][:shown]
    order = members[np.argsort(clusters[members], kind="stable")]
    ordered = clusters[order]
    picked = [order[slice(*np.searchsorted(ordered, [head, head + 1]))] for head in largest.tolist()]
    texts = _texts([rows[:SIDE_BY_SIDE] for rows in picked], read_texts)
    near_rows = set(members[near].tolist())
    groups = []
    for rows in picked:
        code = "duplicates_near" if near_rows.intersection(rows.tolist()) else "duplicates_exact"
        some = rows[:SIDE_BY_SIDE].tolist()
        groups.append(_group(code, len(rows), some, [_whole(texts[row]) for row in some], table, files))
    return groups, sizes


# ------------------------------------------------------------------------------------------------------ contradictions

_NUMBER = re.compile(r"[$€£¥]?\s*([-+]?\d[\d,]*(?:\.\d+)?)\s*%?\.?")
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_NUMERALS = re.compile(r"\d+(?:[.,]\d+)*")


def number_in(answer: str) -> Decimal | None:
    """The number that an answer is, or ends in after `####` or in `\\boxed{}`; None where it is none."""
    boxed = _BOXED.findall(answer)
    text = boxed[-1] if boxed else answer.rsplit("####", 1)[-1] if "####" in answer else answer
    found = _NUMBER.fullmatch(text.strip())
    return Decimal(found.group(1).replace(",", "")) if found else None


def _meaning(answer: str) -> int:
    """A uint64 that is equal for answers that say the same."""
    number = number_in(answer)
    return hash(number) % (1 << 64) if number is not None else loose_key(answer)


def find_contradictions(
    fingerprints: Fingerprints, table: RowTable, *, among: np.ndarray, read_texts: ReadTexts, files: Sequence[str],
    tally: Tally, shown: int = 20,
) -> list[Group]:  # fmt: skip
    """Counts rows of `among` ((N,) bool) whose (nearly) equal prompts are answered differently; the first as groups.

    Documents, which have no answers, are left out.
    """
    members = np.flatnonzero(among & (table.answer_key != 0))
    order = members[np.argsort(table.loose_prompt_key[members], kind="stable")]
    if not len(order):
        return []
    starts = _starts(table.loose_prompt_key[order])
    answers = table.answer_key[order]
    differ = np.minimum.reduceat(answers, starts) != np.maximum.reduceat(answers, starts)
    bounds = np.append(starts, len(order))
    suspects = [order[bounds[at] : bounds[at + 1]] for at in np.flatnonzero(differ).tolist()]
    suspects.sort(key=lambda rows: int(rows[0]))
    meanings = np.zeros(len(table), dtype=np.uint64)
    for index, _, answer in read_texts(np.sort(np.concatenate([*suspects, np.zeros(0, dtype=np.int64)]))):
        meanings[index] = _meaning(answer)
    true = [rows for rows in suspects if (meanings[rows] != meanings[rows[0]]).any()]
    contradicting = np.sort(np.concatenate([*true, np.zeros(0, dtype=np.int64)]))
    _add(tally, "contradictory_answers", contradicting, table)
    largest = sorted(true, key=len, reverse=True)[:shown]
    several = [_one_of_each(rows, meanings) for rows in largest]
    texts = _texts([np.array(rows) for rows in several], read_texts)
    groups = [
        _group(
            "contradictory_answers", len(rows), some, [texts[row][1] for row in some], table, files, texts[some[0]][0]
        )
        for rows, some in zip(largest, several, strict=True)
    ]
    firsts = np.sort(order[starts])
    return groups + _near_contradictions(
        firsts, fingerprints, table, read_texts=read_texts, files=files, tally=tally, shown=shown
    )


def _one_of_each(rows: np.ndarray, meanings: np.ndarray) -> list[int]:
    """The first rows of different answers, then more rows up to SIDE_BY_SIDE."""
    _, first = np.unique(meanings[rows], return_index=True)
    some = rows[np.sort(first)[:SIDE_BY_SIDE]]
    more = rows[: 2 * SIDE_BY_SIDE]
    more = more[~np.isin(more, some)][: SIDE_BY_SIDE - len(some)]
    return sorted([*some.tolist(), *more.tolist()])


def _near_contradictions(
    firsts: np.ndarray, fingerprints: Fingerprints, table: RowTable, *, read_texts: ReadTexts, files: Sequence[str],
    tally: Tally, shown: int,
) -> list[Group]:  # fmt: skip
    """`firsts`: the first row of each prompt, sorted."""
    compared = firsts[fingerprints.prompt_shingles[firsts] > 0]
    pairs = similar_pairs(fingerprints.prompts, compared, threshold=PROMPT_THRESHOLD)
    pairs = pairs.where(
        (table.answer_key[pairs.row] != table.answer_key[pairs.other])
        & (fingerprints.tools[pairs.row] == fingerprints.tools[pairs.other])
    )
    pairs = pairs.where(
        confirm(
            pairs, threshold=PROMPT_THRESHOLD, prompts=True, boilerplate=fingerprints.boilerplate, read_texts=read_texts
        )
    )
    if not len(pairs):
        return []
    numerals, meanings = np.zeros(len(table), dtype=np.uint64), np.zeros(len(table), dtype=np.uint64)
    for index, prompt, answer in read_texts(pairs.rows):
        numerals[index] = key_of(" ".join(_NUMERALS.findall(prompt)).encode())
        meanings[index] = _meaning(answer)
    pairs = pairs.where((numerals[pairs.row] == numerals[pairs.other]) & (meanings[pairs.row] != meanings[pairs.other]))
    _add(tally, "contradictory_answers_near", pairs.rows, table)
    some = np.stack([pairs.other, pairs.row], axis=1)[:shown]
    texts = _texts(list(some), read_texts)
    return [
        _group("contradictory_answers_near", 2, pair, [_whole(texts[row]) for row in pair], table, files)
        for pair in some.tolist()
    ]


# ------------------------------------------------------------------------------------------------------------ leakage


def find_leakage(
    fingerprints: Fingerprints, table: RowTable, *, train: np.ndarray, held_out: np.ndarray, shared: SharedNgrams | None,
    known: np.ndarray, threshold: float | None, read_texts: ReadTexts, files: Sequence[str], tally: Tally, prefix: str,
    shown: int = 20,
) -> list[Group]:  # fmt: skip
    """Counts training rows that are held out too, as `<prefix>_exact`, `_near` and `_ngrams`; some as groups.

    A group holds a training row and a held-out row, or, of the third tier, a training row and the words that it shares.

    `train`, `held_out`: (N,) bool; `shared`: over the rows of `train`, in order, found with `known` (None: no third tier);
    `threshold`: Jaccard similarity of the second tier (None: no second tier); `prefix`: leakage or benchmark.
    """
    rows, others = np.flatnonzero(train), np.flatnonzero(held_out)
    asked, first = np.unique(fingerprints.asked[others], return_index=True)
    exact = is_in(fingerprints.asked[rows], asked)
    met = others[first[np.searchsorted(asked, fingerprints.asked[rows[exact]])]]
    pairs = [np.stack([rows[exact], met], axis=1)]
    _add(tally, f"{prefix}_exact", rows[exact], table)
    rest = rows[~exact]
    if threshold is not None:
        near = _near(fingerprints, rest, others, threshold=threshold, read_texts=read_texts)
        _add(tally, f"{prefix}_near", near[:, 0], table)
        pairs.append(near)
        rest = rest[~is_in(rest, near[:, 0])]
    groups = []
    for tier, found in zip(("exact", "near"), pairs, strict=False):
        texts = _texts(list(found[:shown]), read_texts)
        groups += [
            _group(f"{prefix}_{tier}", 2, pair, [_whole(texts[row]) for row in pair], table, files)
            for pair in found[:shown].tolist()
        ]
    if shared is not None:
        passages = _passages(rest[is_in(rest, rows[shared.rows])], rows, known, read_texts)
        _add(tally, f"{prefix}_ngrams", np.fromiter(passages, dtype=np.int64), table)
        some = itertools.islice(passages.items(), shown)
        groups += [_group(f"{prefix}_ngrams", 1, [row], [passage], table, files) for row, passage in some]
    return groups


def _near(
    fingerprints: Fingerprints, rows: np.ndarray, others: np.ndarray, *, threshold: float, read_texts: ReadTexts
) -> np.ndarray:
    """(P, 2): training rows, sorted and each once, with the likeliest held-out row whose prompt or whole text is similar."""
    found = np.zeros((0, 2), dtype=np.int64)
    for slots, counts, prompts in (
        (fingerprints.prompts, fingerprints.prompt_shingles, True),
        (fingerprints.rows, fingerprints.row_shingles, False),
    ):
        left = rows[(counts[rows] > 0) & ~is_in(rows, found[:, 0])]
        pairs = similar_across(slots, left, others[counts[others] > 0], threshold=threshold)
        similar = confirm(
            pairs, threshold=threshold, prompts=prompts, boilerplate=fingerprints.boilerplate, read_texts=read_texts
        )
        found = np.concatenate([found, np.stack([pairs.row[similar], pairs.other[similar]], axis=1)])
    _, first = np.unique(found[:, 0], return_index=True)
    return found[first]


def _passages(candidates: np.ndarray, rows: np.ndarray, known: np.ndarray, read_texts: ReadTexts) -> dict[int, str]:
    """Of the candidates that share an n-gram that holds no template of the training `rows`: its words."""
    if not len(candidates):
        return {}
    places = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), SAMPLE_ROWS)).astype(np.int64))
    sample = [normalise_bytes(text) for _, *texts in read_texts(rows[places]) for text in texts]
    templates = _often(sample, words=TEMPLATE_WORDS)
    found = ((index, _passage(texts, known, templates)) for index, *texts in read_texts(candidates))
    return {index: passage for index, passage in found if passage is not None}


def _passage(texts: Sequence[str], known: np.ndarray, templates: np.ndarray) -> str | None:
    """The first n-gram of a row's texts that is in `known` and holds no template, as normalised words."""
    for text in texts:
        normal = normalise_bytes(text)
        grams, _, places = _runs([normal], words=NGRAM_WORDS)
        places = places[is_in(grams, known)]
        if not len(places):
            continue
        runs, _, starts = _runs([normal], words=TEMPLATE_WORDS)
        starts = starts[is_in(runs, templates)]
        last = places + NGRAM_WORDS - TEMPLATE_WORDS
        telling = places[np.searchsorted(starts, places) == np.searchsorted(starts, last, side="right")]
        if len(telling):
            _, kinds, _ = hash_words([normal])
            words = [word for word, kind in zip(normal.split(), kinds.tolist(), strict=True) if kind > SYMBOL]
            return b" ".join(words[telling[0] : telling[0] + NGRAM_WORDS]).decode()
    return None


# ------------------------------------------------------------------------------------------------------------- shared


def _add(tally: Tally, code: str, rows: np.ndarray, table: RowTable) -> None:
    tally.add_many(code, sources=table.source[rows], numbers=table.number[rows])


def _starts(ordered: np.ndarray) -> np.ndarray:
    """Where each run of equal values begins."""
    return np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))


def _texts(groups: Sequence[np.ndarray], read_texts: ReadTexts) -> dict[int, tuple[str, str]]:
    """(prompt, answer) of all rows of the groups."""
    if not groups:
        return {}
    texts: Iterator[tuple[int, str, str]] = read_texts(distinct(np.concatenate(groups)))
    return {index: (prompt, answer) for index, prompt, answer in texts}


def _whole(texts: tuple[str, str]) -> str:
    return "\n\n".join(text for text in texts if text)


def _group(
    code: str,
    count: int,
    rows: Sequence[int],
    texts: list[str],
    table: RowTable,
    files: Sequence[str],
    prompt: str = "",
) -> Group:
    places = [RowAt(file=files[int(table.source[row])], row=int(table.number[row])) for row in rows]
    return Group(code=code, count=count, prompt=prompt, rows=places, texts=texts)
