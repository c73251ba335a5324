"""Personal data and secrets in a text: `find`.

A cheap look first: no detector runs over a text that lacks the character or word that everything it finds must hold.
"""

from __future__ import annotations

import re

from onlay.data.privacy.contact import emails, ips, phones, urls
from onlay.data.privacy.disguised import disguised_emails
from onlay.data.privacy.identifiers import cards, ibans, national_ids
from onlay.data.privacy.keys import keys
from onlay.data.privacy.names import Names
from onlay.data.privacy.people import people
from onlay.data.privacy.places import UP, addresses
from onlay.data.privacy.spans import KINDS, Span, resolve
from onlay.errors import DataError

THRESHOLD = 0.5
ALL = frozenset(KINDS)
DIGIT = re.compile(r"\d")
MANY_DIGITS = re.compile(r"\d(?:[ ./()+-]{0,2}\d){6,}")
LETTERED = re.compile(
    r"\d\d(?:(?<=[A-Za-z]{2}\d\d) ?[A-Za-z\d]{4}| ?\d\d ?\d\d ?[A-D]|[A-Za-z]\d\d[A-Za-z]|\d\d(?<=[A-Z]{5}\d{4})[A-Z])"
)
"""What a bank account or a national number of letters and digits holds."""
DOTTED = re.compile(r"\d\.\d{1,3}\.\d|[0-9A-Fa-f]:[0-9A-Fa-f]{1,4}:|::[0-9A-Fa-f]")
PLACED = re.compile(rf"\d(?:[A-Za-z]?,? [{UP}]|(?:st|nd|rd|th) | (?:rue|boulevard|quai|chemin) |(?<=[A-Z]\d))")
PLACED_AFTER = re.compile(rf"[{UP}][\w'’.-]*,? \d")
"""A number beside a word with a capital, as in every address."""


def find(
    text: str, *, kinds: frozenset[str] | None = None, names: Names | None = None, threshold: float = THRESHOLD
) -> list[Span]:
    """Personal data and secrets of the given kinds (None: all), without overlaps, in order.

    `names` finds persons by a model, beside the rules.  Spans with a score below `threshold` are left out.
    Raises DataError for an unknown kind.
    """
    wanted = ALL if kinds is None else kinds
    if not wanted <= ALL:
        raise DataError(
            f"{', '.join(sorted(wanted - ALL))} is no kind of personal data.", f"Known kinds: {', '.join(KINDS)}."
        )
    spans: list[Span] = []
    if "@" in text:
        spans += emails(text)
    spans += disguised_emails(text)
    if "://" in text or "www." in text or "WWW." in text or "Www." in text:
        spans += urls(text)
    if DIGIT.search(text):
        spans += _numbers(text)
    elif "::" in text and DOTTED.search(text):
        spans += ips(text)
    spans += keys(text)
    if "name" in wanted:
        spans += people(text)
        if names is not None:
            spans += names.find_names(text)
    if not spans:
        return spans
    # Resolved before the kinds are chosen: what is part of a web address is no name, whether or not addresses are wanted.
    return [span for span in resolve(spans) if span.kind in wanted and span.score >= threshold]


def _numbers(text: str) -> list[Span]:
    spans: list[Span] = []
    lettered = LETTERED.search(text) is not None
    runs = [found.span() for found in MANY_DIGITS.finditer(text)]
    if runs:
        spans += cards(text)
        for start, end in runs:
            spans += phones(text, max(0, start - 8), _word_end(text, end + 8))
    if lettered:
        spans += ibans(text)
        spans += national_ids(text, 0, len(text))
    else:
        for start, end in runs:
            spans += national_ids(text, max(0, start - 8), _word_end(text, end + 4))
    if (text.count(".") > 2 or text.count(":") > 1) and DOTTED.search(text):
        spans += ips(text)
    if PLACED.search(text) or PLACED_AFTER.search(text):
        spans += addresses(text)
    return spans


def _word_end(text: str, position: int) -> int:
    """The next place at which no word is cut."""
    while position < len(text) and (text[position].isalnum() or text[position] in ".-"):
        position += 1
    return position
