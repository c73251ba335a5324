from __future__ import annotations

import random

import pytest

from onlay.evaluation.overlap import (
    corpus_scores,
    corpus_statistics,
    ends_in_loop,
    longest_common,
    repetition,
    rouge_l,
    rouge_n,
    sentence_score,
    token_f1,
)


def test_values_by_hand() -> None:
    # Two of three words against two of four.
    assert token_f1("cat sat here", "the cat sat down now") == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert rouge_n("a b c", "a b d", n=1) == pytest.approx(2 / 3)
    assert rouge_n("a b c", "a b d", n=2) == pytest.approx(1 / 2)
    assert rouge_l("a x b", "a b y") == pytest.approx(2 / 3)
    assert rouge_l("b a", "a b") == pytest.approx(1 / 2)


def test_identical_texts_of_any_script_are_equal() -> None:
    for text in ("नमस्ते दुनिया", "你好世界", "مرحبا بالعالم", "👍 👎"):
        assert token_f1(text, text) == rouge_n(text, text, n=1) == rouge_l(text, text) == 1.0


def test_empty_texts() -> None:
    assert token_f1("", "") == 1.0 and token_f1("a b", "") == 0.0 and token_f1("", "word") == 0.0
    assert rouge_n("", "", n=1) == rouge_l("", "") == rouge_n("a", "a", n=2) == 0.0
    assert sentence_score("", "words here", metric="bleu") == 0.0


def test_the_longest_common_subsequence_is_that_of_the_table() -> None:
    draw = random.Random(0)
    for _ in range(200):
        first, second = (draw.choices("abcd", k=draw.randint(0, 70)) for _ in range(2))
        table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
        for i, one in enumerate(first):
            for j, other in enumerate(second):
                table[i + 1][j + 1] = table[i][j] + 1 if one == other else max(table[i][j + 1], table[i + 1][j])
        assert longest_common(first, second) == table[-1][-1]


@pytest.mark.parametrize("metric", ["bleu", "chrf"])
def test_statistics_of_rows_add_up_to_the_corpus(metric: str) -> None:
    statistics = corpus_statistics(
        ["the cat sat on the mat", "a dog"], ["the cat sat on a mat", "a dog"], metric=metric
    )
    both, first = corpus_scores(statistics.cumsum(0)[::-1], metric=metric)
    assert 0 < first < both < 100
    assert corpus_scores(statistics[1:], metric="chrf")[0] == 100 if metric == "chrf" else True


def test_repetition_is_the_share_of_four_grams_seen_before() -> None:
    assert repetition("one two three four five") == 0.0
    assert repetition("one two") == repetition("") == 0.0
    assert repetition("a b c d a b c d") == pytest.approx(1 - 4 / 5)
    assert repetition("!" * 103) == pytest.approx(0.99)


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ("It is. " + "I am sorry. " * 3, True),
        ("It is. " + "I am sorry. " * 2, False),
        ("I am sorry. " * 6 + "Goodbye, and thank you.", False),  # it came out of it
        ("Well, I like to eat, to eat, to eat, to eat, to", True),  # the last time cut off
        ("!" * 40, True),
        ("...", False),
        ("no, no, no!", False),
        ("", False),
        ("[[[[[[[[[[[[[[", True),
        ('{"a": 1, "b": [2, 3]}', False),
        ("你好" * 6, True),
    ],
)
def test_loops_at_the_end(text: str, loops: bool) -> None:
    assert ends_in_loop(text) is loops


def test_a_loop_is_found_wherever_it_begins_and_however_long_its_phrase_is() -> None:
    draw = random.Random(1)
    for _ in range(100):
        phrase = [f"w{draw.randrange(10**6)}" for _ in range(draw.randint(4, 30))]
        lead = [f"v{draw.randrange(10**6)}" for _ in range(draw.randint(0, 40))]
        cut = draw.randrange(len(phrase))
        assert ends_in_loop(" ".join(lead + phrase * 3 + phrase[:cut]))
        assert not ends_in_loop(" ".join(lead + phrase * 2 + phrase[:cut]))
