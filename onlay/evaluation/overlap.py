"""What an answer has in common with the expected one: token F1, ROUGE, BLEU, chrF; and with itself: repetition.

    precision = common / of the answer,  recall = common / of the expected,  F = 2 precision recall / (precision + recall)

ROUGE-N counts n-grams, as often as both have them; ROUGE-L the longest common subsequence.  Both are rouge-score's, given
the words of `text.words` (its own tokenizer knows a-z and 0-9 alone, so two equal Hindi texts score 0).  BLEU and chrF
are sacrebleu's, from its own statistics of each row: summed over rows they give its corpus score, over resampled rows
the corpus score of the resample.  BLEU's tokenizer is 13a, sacrebleu's default, which leaves Chinese, Japanese and Thai
uncut: there chrF is the one to read.

Sources.  ROUGE: Lin 2004; rouge-score 0.1.2.  LCS by bit vectors: Hyyrö 2004, "Bit-parallel LCS-length computation
revisited".  BLEU: Papineni et al. 2002; chrF: Popović 2015; both by sacrebleu (Post 2018, arXiv:1804.08771).  Token F1:
Rajpurkar et al. 2018 (arXiv:1806.03822), and Lewis et al. 2019 (MLQA, arXiv:1910.07475) beyond English.  Repeated
4-grams: seq-rep-4 of Welleck et al. 2019 (arXiv:1908.04319).  A loop at the end: after Holtzman et al. 2019
(arXiv:1904.09751), three times the same phrase.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from onlay.evaluation.text import f1_words, pieces, words

REPEATED_WORDS = 4
LOOP_TIMES = 3
LOOP_PIECES = 12
"""A loop fills at least so many pieces: an ellipsis or `no, no, no!` is none."""


def token_f1(answer: str, expected: str) -> float:
    """SQuAD 2's F1 over the words of both; two texts without words are equal."""
    ours, right = f1_words(answer), f1_words(expected)
    if not ours or not right:
        return float(ours == right)
    return _f(_common(ours, right), len(ours), len(right))


def rouge_n(answer: str, expected: str, *, n: int) -> float:
    """ROUGE-N's F; 0 where either has no n words."""
    ours, right = _ngrams(words(answer), n), _ngrams(words(expected), n)
    return _f(_common(ours, right), len(ours), len(right))


def rouge_l(answer: str, expected: str) -> float:
    """ROUGE-L's F over the whole texts, not by sentence."""
    ours, right = words(answer), words(expected)
    return _f(longest_common(ours, right), len(ours), len(right))


def _f(common: int, ours: int, right: int) -> float:
    if not common:
        return 0.0
    precision, recall = common / ours, common / right
    return 2 * precision * recall / (precision + recall)


def _common(ours: Sequence[Any], right: Sequence[Any]) -> int:
    return (Counter(ours) & Counter(right)).total()


def _ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence.

    One column of the usual table is one integer, a zero bit wherever the length grows; a token of `second` moves the whole
    column in a few operations on it.
    """
    places: dict[str, int] = {}
    for i, token in enumerate(first):
        places[token] = places.get(token, 0) | 1 << i
    all_ones = (1 << len(first)) - 1
    column = all_ones
    for token in second:
        matched = column & places.get(token, 0)
        column = ((column + matched) | (column - matched)) & all_ones
    return len(first) - column.bit_count()


# --------------------------------------------------------------------------------------------------------- sacrebleu


@cache
def _metric(name: str) -> Any:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    if name == "chrf":
        return CHRF()
    # Each sentence by itself has too few n-grams for BLEU's four orders, hence effective_order there and only there.
    return BLEU(effective_order=name == "sentence_bleu")


def sentence_score(answer: str, expected: str, *, metric: str) -> float:
    """sacrebleu's sentence score, 0 to 100; `metric` is bleu or chrf."""
    scorer = _metric("sentence_bleu" if metric == "bleu" else metric)
    return float(scorer.sentence_score(answer, [expected]).score)


def corpus_statistics(answers: Sequence[str], expected: Sequence[str], *, metric: str) -> np.ndarray:
    """(rows, S) float64 whole numbers: what sacrebleu sums over the rows of a corpus."""
    found = _metric(metric)._extract_corpus_statistics(list(answers), [list(expected)])
    return np.array(found, dtype=np.float64).reshape(len(answers), -1)


def corpus_scores(sums: np.ndarray, *, metric: str) -> np.ndarray:
    """(K,) corpus scores, 0 to 100, of K sums (K, S) of rows' statistics."""
    score = _metric(metric)._compute_score_from_stats
    return np.array([score(row).score for row in sums.astype(np.int64).tolist()], dtype=np.float64)


# -------------------------------------------------------------------------------------------------------- repetition


def repetition(answer: str) -> float:
    """Share of the answer's 4-grams of pieces that it had before: 1 - different / all; 0 for fewer than 4 pieces."""
    grams = _ngrams(pieces(answer), REPEATED_WORDS)
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def ends_in_loop(answer: str) -> bool:
    """Whether the answer's end is one phrase at least LOOP_TIMES in a row, the last time perhaps cut off, over at least
    LOOP_PIECES pieces."""
    reverse = pieces(answer)[::-1]
    same = _lengths_of_own_prefix(reverse)
    # What agrees with itself moved by `period` for m pieces has that period over m + period pieces.
    return any(
        same[period] + period >= max(LOOP_TIMES * period, LOOP_PIECES)
        for period in range(1, len(reverse) // LOOP_TIMES + 1)
    )


def _lengths_of_own_prefix(sequence: Sequence[str]) -> list[int]:
    """For every i how many tokens from i on agree with the beginning (the Z function), in linear time."""
    lengths = [0] * len(sequence)
    begin = end = 0
    for i in range(1, len(sequence)):
        length = min(end - i, lengths[i - begin]) if i < end else 0
        while i + length < len(sequence) and sequence[length] == sequence[i + length]:
            length += 1
        if i + length > end:
            begin, end = i, i + length
        lengths[i] = length
    return lengths
