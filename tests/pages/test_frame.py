from __future__ import annotations

import pytest
from markupsafe import Markup

from onlay.pages.frame import MOST_CHARACTERS, clean, cut, environment, short, tight
from tests.pages.parsing import EVIL, Parsed, contrast, no_script_and_nothing_fetched, readable_without_eyes, themes_of

PAGE = """{% extends "frame.html.jinja" %}
{% import "parts.html.jinja" as parts %}
{% block title %}{{ said }}{% endblock %}
{% block style %}.own { color: var(--ink); }{% endblock %}
{% block main %}
<h1>{{ said }}</h1>
{{ parts.text(said, "elsewhere.jsonl") }}
{% endblock %}
"""


def made(said: str) -> str:
    return clean(environment("onlay.pages").from_string(PAGE).render(said=said))


def test_a_frame_lets_nothing_run_and_shows_texts_as_texts() -> None:
    html = made(EVIL)
    no_script_and_nothing_fetched(html)
    found = Parsed(html)
    readable_without_eyes(found)
    assert found.text().count(EVIL.replace("\n", " ")) == 3 and ".own" in html


@pytest.mark.parametrize("length", [600, 601, MOST_CHARACTERS, MOST_CHARACTERS + 7])
def test_long_texts_fold_and_very_long_ones_are_cut_and_counted(length: int) -> None:
    found = Parsed(made("x" * length))
    assert len(found.find("details", class_="long")) == (length > 600)
    assert ("7 more characters are in elsewhere.jsonl" in found.text()) == (length > MOST_CHARACTERS)


def test_contrast_of_every_text_colour_in_light_dark_and_print() -> None:
    for theme in themes_of(made("x")):
        for ink in ("ink", "muted", "better", "worse", "same", "warn", "accent"):
            assert min(contrast(theme[ink], theme[ground]) for ground in ("page", "panel")) >= 4.5
        assert min(contrast(theme["ink"], theme[ground]) for ground in ("ins", "del")) >= 7
        assert contrast(theme["bar"], theme["page"]) > 1.5


def test_small_manners() -> None:
    assert clean("a\x00\ud800\n") == "a\ufffd\ufffd\n"
    assert short("a\n b", 5) == "a b" and short("word " * 9, 7) == "word wo …"
    marks = Markup("<ins>a</ins>") * MOST_CHARACTERS
    assert cut(marks, "x") is marks
    assert tight("3 %") == "3\u00a0%"


def test_a_value_that_is_missing_is_no_empty_place() -> None:
    with pytest.raises(Exception, match="said"):
        environment("onlay.pages").from_string(PAGE).render()
