"""The same numbers as the libraries that published results are computed with, on 1,000 pairs of many scripts."""

from __future__ import annotations

import random
import re
import string
import unicodedata
from collections import Counter

import numpy as np
import pytest
from rouge_score import rouge_scorer
from rouge_score.tokenizers import DefaultTokenizer, Tokenizer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from onlay.evaluation.overlap import corpus_scores, corpus_statistics, rouge_l, rouge_n, sentence_score, token_f1
from onlay.evaluation.scores import Row, measure
from onlay.evaluation.text import words

VOCABULARIES = {
    "English": [
        "the",
        "a",
        "an",
        "cat's",
        "sat,",
        "on;",
        "mat.",
        "(why?)",
        "It's",
        "$5",
        "x-ray",
        "don't",
        "42",
        "The",
        "end_of",
        "and",
    ],
    "Hindi": ["नमस्ते", "दुनिया,", "हिन्दी", "में", "लिखा", "है।", "यह", "एक", "परीक्षा", "है", "१२३"],
    "Chinese": ["今天", "天气", "很好。", "我们", "去", "北京", "吗？", "ABC", "3"],
    "Arabic": ["مرحبا", "بالعالم،", "هذا", "اختبار", "قصير؟", "السلام", "عليكم", "١٢"],
    "emoji": ["👍", "👍🏽", "❤️", "ok", "👨‍👩‍👧", "🎉!", "no"],
}


def pairs(number: int, *languages: str) -> list[tuple[str, str]]:
    """Answer and expected text: of one language or two, empty ones, equal ones, ones that differ by a few words."""
    draw = random.Random(7)
    found = []
    for i in range(number):
        vocabulary = [word for _ in range(2) for word in VOCABULARIES[draw.choice(languages)]]
        space = draw.choice([" ", " ", " ", "", "\n"])
        expected = draw.choices(vocabulary, k=draw.randint(0, 25) if i % 20 else 0)
        answer = (
            [word for word in expected if draw.random() < 0.8]
            if i % 3
            else draw.choices(vocabulary, k=draw.randint(0, 25))
        )
        if i % 7 == 0:
            answer = list(expected)
        elif i % 3 == 1:
            draw.shuffle(answer)
        found.append((space.join(answer), space.join(expected)))
    assert any(not answer for answer, _ in found) and any(answer == expected != "" for answer, expected in found)
    return found


ALL = tuple(VOCABULARIES)


class OurWords(Tokenizer):  # type: ignore[misc]
    def tokenize(self, text: str) -> list[str]:
        return words(text)


def test_rouge_is_that_of_rouge_score_given_our_words() -> None:
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=OurWords())
    some = pairs(1000, *ALL)
    for answer, expected in some:
        theirs = scorer.score(target=expected, prediction=answer)
        assert rouge_n(answer, expected, n=1) == pytest.approx(theirs["rouge1"].fmeasure, abs=1e-12)
        assert rouge_n(answer, expected, n=2) == pytest.approx(theirs["rouge2"].fmeasure, abs=1e-12)
        assert rouge_l(answer, expected) == pytest.approx(theirs["rougeL"].fmeasure, abs=1e-12)


def test_words_of_ascii_text_are_those_of_rouge_score() -> None:
    theirs, draw = DefaultTokenizer(), random.Random(3)
    for _ in range(1000):
        text = "".join(draw.choices(string.printable, k=40))
        assert words(text) == theirs.tokenize(text)


# ---------------------------------------------------------------- SQuAD 2.0's evaluate-v2.0.py and MLQA's mlqa_evaluation_v1.py


def squad_words(text: str) -> list[str]:
    text = "".join(character for character in text.lower() if character not in set(string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


MLQA_PUNCTUATION = {chr(i) for i in range(0x110000) if unicodedata.category(chr(i)).startswith("P")} | set(
    string.punctuation
)


def mlqa_words(text: str) -> list[str]:
    """English articles, and Chinese cut as MLQA cuts it: every character of U+4E00..U+9FA5 is a word."""
    text = "".join(character for character in text.lower() if character not in MLQA_PUNCTUATION)
    text = re.sub(r"\b(a|an|the)\b", " ", text)
    return re.sub("([\u4e00-\u9fa5])", r" \1 ", text).split()


def squad_f1(ours: list[str], right: list[str]) -> float:
    common = sum((Counter(ours) & Counter(right)).values())
    if not ours or not right:
        return float(ours == right)
    if common == 0:
        return 0.0
    precision, recall = common / len(ours), common / len(right)
    return 2 * precision * recall / (precision + recall)


def test_token_f1_is_squads_on_english() -> None:
    for answer, expected in pairs(1000, "English"):
        assert token_f1(answer, expected) == pytest.approx(
            squad_f1(squad_words(answer), squad_words(expected)), abs=1e-12
        )


def test_token_f1_is_mlqas_on_all_scripts() -> None:
    for answer, expected in pairs(1000, *ALL):
        assert token_f1(answer, expected) == pytest.approx(
            squad_f1(mlqa_words(answer), mlqa_words(expected)), abs=1e-12
        )


# --------------------------------------------------------------------------------------------------------- sacrebleu


@pytest.mark.parametrize(("metric", "theirs"), [("bleu", BLEU), ("chrf", CHRF)])
def test_bleu_and_chrf_are_sacrebleus(metric: str, theirs: type) -> None:
    some = pairs(1000, *ALL)
    rows = [Row(answer=answer, expected=expected) for answer, expected in some]
    kept = [(answer, expected) for answer, expected in some if expected.strip()]  # The others have nothing to be like.
    assert 900 < len(kept) < 1000
    corpus = theirs().corpus_score([answer for answer, _ in kept], [[expected for _, expected in kept]]).score
    assert measure(metric, rows).value == pytest.approx(corpus, abs=1e-12)
    alone = BLEU(effective_order=True) if metric == "bleu" else CHRF()
    for answer, expected in kept[:200]:
        assert sentence_score(answer, expected, metric=metric) == alone.sentence_score(answer, [expected]).score


@pytest.mark.parametrize(("metric", "theirs"), [("bleu", BLEU), ("chrf", CHRF)])
def test_a_resample_is_scored_as_the_corpus_that_it_is(metric: str, theirs: type) -> None:
    some = [pair for pair in pairs(200, *ALL) if pair[1].strip()]
    statistics = corpus_statistics([answer for answer, _ in some], [expected for _, expected in some], metric=metric)
    draw = np.random.default_rng(0)
    for _ in range(5):
        taken = draw.integers(len(some), size=len(some))
        corpus = theirs().corpus_score([some[i][0] for i in taken], [[some[i][1] for i in taken]]).score
        assert corpus_scores(statistics[taken].sum(0)[None], metric=metric)[0] == pytest.approx(corpus, abs=1e-12)
