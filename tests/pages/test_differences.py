from __future__ import annotations

import pytest

from onlay.pages.differences import MOST_WORDS, differs_in_white_space_alone, marked


@pytest.mark.parametrize(
    ("answer", "expected", "told"),
    [
        ("the red door", "the red door", "the red door"),
        ("the blue door", "the red door", "the <del>red</del> <ins>blue</ins> door"),
        ("the door", "the red door", "the <del>red</del> door"),
        ("the big red door", "the red door", "the <ins>big</ins> red door"),
        ("the  red\ndoor", "the red door", "the  red\ndoor"),
        ("quite another thing", "the red door", "quite another thing"),
        ('{"a": 1}', '{"a": 2}', "{&#34;a&#34;: <del>2</del><ins>1</ins>}"),
        ("<b>x</b> & y", "<b>x</b> & z", "&lt;b&gt;x&lt;/b&gt; &amp; <del>z</del><ins>y</ins>"),
        ("我喜欢红茶", "我喜欢绿茶", "我喜欢<del>绿</del><ins>红</ins>茶"),
        ("yes\n\nit is", "yes!\n\nit is", "yes\n\n<del>!</del> it is"),
        ("", "the red door", ""),
        ("the red door", "", "the red door"),
        ("  indented", "indented", "  indented"),
    ],
)
def test_words_that_differ_are_marked(answer: str, expected: str, told: str) -> None:
    assert marked(answer, expected=expected) == told


def test_very_long_texts_are_not_compared() -> None:
    long = "word " * (MOST_WORDS + 1)
    assert marked(long, expected="word " * 9) == long


def test_white_space_alone() -> None:
    assert differs_in_white_space_alone("a  b", expected="a b")
    assert not differs_in_white_space_alone(" a b ", expected="a b")
    assert not differs_in_white_space_alone("a c", expected="a b")
