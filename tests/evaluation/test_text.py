from __future__ import annotations

import pytest

from onlay.evaluation.text import f1_words, label_of, pieces, words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't stop_here: x2!", ["don", "t", "stop", "here", "x2"]),
        ("हिन्दी में", ["हिन्दी", "में"]),  # vowel signs stay with their letters
        ("日本語abc 2人", ["日", "本", "語", "abc", "2", "人"]),
        ("カナー", ["カ", "ナ", "ー"]),
        ("مرحبا بالعالم، ١٢", ["مرحبا", "بالعالم", "١٢"]),
        ("สวัสดี", ["ส", "วั", "ส", "ดี"]),
        ("안녕 세계", ["안녕", "세계"]),
        ("👍🏽 ok ❤️", ["👍", "ok", "❤"]),
        ("ｆｕｌｌ １２", ["full", "12"]),
        ("soft­hyphen", ["softhyphen"]),
        ("", []),
        ("?!", []),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_composed_and_decomposed_letters_are_the_same() -> None:
    assert words("caf\u00e9") == words("cafe\u0301")
    assert f1_words("caf\u00e9") == f1_words("cafe\u0301") == ["caf\u00e9"]


def test_pieces_lose_nothing_but_white_space() -> None:
    assert pieces("A b,\n{x}!!") == ["A", "b", ",", "{", "x", "}", "!", "!"]


def test_f1_words_leave_out_punctuation_and_articles() -> None:
    assert f1_words("The cat, an $5 dog; don't a!") == ["cat", "5", "dog", "dont"]
    assert f1_words("“Ja”, sagte der Mann…") == ["ja", "sagte", "der", "mann"]
    assert f1_words("我在北京。OK") == ["我", "在", "北", "京", "ok"]
    assert f1_words("👍 ok") == ["👍", "ok"]
    assert f1_words("the") == []


def test_labels() -> None:
    assert label_of(' "Card  Lost".\n') == label_of("card lost") == "card lost"
    assert label_of("transfer_money") != label_of("transfer money")
    assert label_of("?") == "?"  # nothing but marks is still something
