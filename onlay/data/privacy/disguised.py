"""E-mail addresses that are written so that a machine should not see them:

with characters that nobody sees within, or with full-width letters and signs
ada [at] example [dot] org    with brackets of any kind; the dot also as it is
ada at example dot org        as it is said aloud: whole, and with a common last part
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import cache

from onlay.data.privacy.contact import EMAIL
from onlay.data.privacy.spans import Span, span_of

UNSEEN = "\u00ad\u200b\u200c\u200d\u2060\ufeff"
"""Soft hyphen, zero-width space, joiners and no-break spaces."""
ODD = re.compile(f"[{UNSEEN}\uff0b-\uff5a\ufe6b]")
AT_SIGNS = "@\uff20\ufe6b"
BRACKETED = re.compile(r"(?i)[\[({<]\s?at\s?[\])}>]")
SAID = ("com", "org", "net", "edu", "gov", "mil", "info", "biz", "io", "ai", "app", "dev", "eu", "uk", "de", "fr", "es", "nl", "ch", "pl", "se", "dk", "fi", "cz", "pt",
        "gr", "hu", "ro", "ie", "ca", "au", "nz", "br", "mx", "jp", "cn", "kr", "ru", "za")  # fmt: skip
"""Last parts that are no word of a sentence, as `in` and `it` are."""
NO_NAMES = ("me", "us", "him", "her", "it", "them", "you", "look", "looking", "visit", "online", "site", "website", "web", "page", "here", "is", "are", "was", "and", "or",
            "available", "found", "hosted", "more", "shop", "store", "app", "service")  # fmt: skip
"""Before an address of the web, as it is said aloud."""


def disguised_emails(text: str) -> Iterator[Span]:
    plain: str = text
    places: list[int] | None = None
    if not text.isascii() and ODD.search(text) and any(sign in text for sign in AT_SIGNS):
        plain, places = _plain(text)
        for found in EMAIL.finditer(plain) if "@" in plain else ():
            yield _span(text, found, places, 0.95)
    for form in _forms(plain):
        for found in form.finditer(plain):
            yield _span(text, found, places, 0.9)


def _forms(text: str) -> Iterator[re.Pattern[str]]:
    if BRACKETED.search(text):
        yield _bracketed()
    if "dot " in text or "DOT " in text or "Dot " in text:
        yield _said()


@cache
def _bracketed() -> re.Pattern[str]:
    dot = r"(?:\.|\s?[\[({<]\s?dot\s?[\])}>]\s?|\sdot\s)"
    return re.compile(
        rf"(?i)(?<![\w.+%-])[\w+][\w+-]{{0,63}}(?:{dot}[\w+-]{{1,63}}){{0,4}}\s?[\[({{<]\s?at\s?[\])}}>]\s?(?:[^\W_][\w-]{{0,62}}{dot}){{1,4}}[^\W\d_]{{2,24}}(?!\w)"
    )


@cache
def _said() -> re.Pattern[str]:
    return re.compile(
        rf"(?i)(?<![\w.+%-])(?!(?:{'|'.join(NO_NAMES)})\s)[\w+][\w.+-]{{0,63}}(?: dot [\w+-]{{1,63}}){{0,4}} at (?:[^\W_][\w-]{{0,62}} dot ){{1,4}}(?:{'|'.join(SAID)})(?!\w)"
    )


def _plain(text: str) -> tuple[str, list[int]]:
    """Without what nobody sees, each character in its plain form (NFKC); and where each was."""
    parts: list[str] = []
    places: list[int] = []
    for place, character in enumerate(text):
        if character in UNSEEN:
            continue
        form = character if character.isascii() else unicodedata.normalize("NFKC", character)
        parts.append(form)
        places += [place] * len(form)
    return "".join(parts), places


def _span(text: str, found: re.Match[str], places: list[int] | None, score: float) -> Span:
    start, end = found.span()
    if places is not None:
        start, end = places[start], places[end - 1] + 1
    return span_of("email", text, start, end, score)
