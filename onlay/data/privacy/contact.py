"""E-mail and web addresses, IP addresses and telephone numbers."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator

from onlay.data.privacy.spans import Span, span_of

EMAIL = re.compile(
    r"(?<![\w.+%-])[\w+][\w!#$%&'*+/=?^~-]*(?:\.[\w!#$%&'*+/=?^~-]+)*@(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.)+[^\W\d_]{2,24}(?![\w])"
)
URL = re.compile(
    r"(?i)(?:(?:(?<![A-Za-z0-9+.-])(?![a-z0-9]+https?:)[a-z][a-z0-9+.-]{1,15}|https?)://[^\s<>\"'`{}|\\^]+|(?<![A-Za-z0-9+.-])www\.[a-z0-9-]+(?:\.[a-z0-9-]+)+(?:/[^\s<>\"'`{}|\\^]*)?)"
)
"""A word that stands before http without a space, as in texts taken from pages, is no part of the address."""
CREDENTIALS = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]*://([^/?#@\s:]*):([^/?#\s]+)@[^/?#@\s]+")
PASSWORD_QUERY = re.compile(
    r"(?i)[?&;](?:password|passwd|pwd|access_token|api_?key|secret|sig|signature|auth_token)=[^&\s#]{4,}"
)
STANDS_FOR_ONE = re.compile(r"(?i)^(?:\*+|x+|\.{3}|pass(?:word|wd)?|pwd|secret|token|your[-_]?\w*|<.*|\$.*|\[.*|%.*%)$")
CLOSING = ".,;:!?)]}*_"

IPV4 = re.compile(
    r"(?<![\w.-])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\w-])(?!\.\d)(?!/(?:[12]?\d|3[01])(?!\d))"
)
IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}(?:[0-9A-Fa-f]{1,4}|(?:\d{1,3}\.){3}\d{1,3})?(?![\w:])")
VERSION_WORDS = re.compile(r"(?i)\b(?:version|ver|release|firmware|build|v|section|chapter|clause)\.?\s*$")

EXTENSION = r"(?:\s?(?:x|ext\.?|extension)\s?\d{1,6})?"
NUMBER_START, NUMBER_END = r"(?<![\w./$€£¥#=*+<>-])(?<!\d[ (,])", r"(?![\w/%=*^+])(?!-\d)(?![.,:]\d)"
INTERNATIONAL = re.compile(
    r"(?<![\w+])(?<![\d)=*/] )(?<!\d)(?:\+ ?[1-9]|00[1-9](?=\d{0,2}[ .-])|001-?(?=\d))\d{0,2}(?:[ .-]?\(\d{1,4}\))?(?:[ .-]{0,1}\d{1,5}){1,6}"
    + EXTENSION
    + r"(?![\w=*^])(?![.,]\d)"
)
NORTH_AMERICAN = re.compile(
    NUMBER_START
    + r"(?:1[ .-])?(?:\([2-9]\d\d\) ?|[2-9]\d\d(?P<by>[-. ]))[2-9]\d\d(?:(?P=by)|-)\d{4}"
    + EXTENSION
    + NUMBER_END
)
NORTH_AMERICAN_LOOSE = re.compile(NUMBER_START + r"(?:\(\d{3}\) ?|\d{3}[-.])\d{3}[-.]\d{4}" + EXTENSION + NUMBER_END)
TRUNK = re.compile(NUMBER_START + r"0[1-9]\d{0,3}(?P<by>[ .-])\d{2,8}(?:(?P=by)\d{2,4}){0,4}" + EXTENSION + NUMBER_END)
AREA = re.compile(NUMBER_START + r"\(0?\d{1,4}\)[ -]?\d{2,5}(?:[ -]\d{2,5}){1,3}" + EXTENSION + NUMBER_END)
ANY = re.compile(NUMBER_START + r"\(?\d{1,12}\)?(?:[ .-]\(?\d{2,8}\)?){0,5}" + EXTENSION + NUMBER_END)
TOLD_BEFORE = re.compile(
    r"(?i)\b(?:tele ?phones?|phones?|tel|mobile|cell|cellular|fax|desk|office|whats ?app|hotline|sms|landline|pager"
    r"|numéro|téléphone|telefon|telefono|teléfono|telefone|handy|rufnummer|puhelin|contact number)\b"
    r"|\b(?:call(?:ing)?|text|ring|dial|reach)(?: (?:me|us|him|her|them|you|back|at|on|to)){1,3}(?: the number)?\W{0,3}$"
    r"|\b(?:answering|registered|message[sd]?|messages|calls?|dial|call)(?: (?:at|on|to|from|number))?\W{0,3}$"
)
TOLD_AFTER = re.compile(r"(?i)\W{0,3}(?:office|fax|mobile|cell|home|work|phone)\b")
OTHER_WORDS = re.compile(
    r"(?i)\b(?:order|invoice|account|acct|ticket|tracking|reference|ref|case|serial|isbn|issn|sku|part|model|version|policy"
    r"|customer|patent|article|page|pages|zip|code|id|date|born|between|lot|product|item|booking|confirmation)"
    r"(?: (?:number|no|nr|id|code))?\.?\s*(?:is|was|[:#=]|of)?\s*#?\s*$"
)
DATE = re.compile(
    r"(?:19|20)\d\d([-/. ])[01]?\d\1[0-3]?\d|[0-3]?\d([-/. ])[0-3]?\d\2(?:19|20)?\d\d|(?:1[5-9]|20)\d\d ?[-–] ?(?:1[5-9]|20)\d\d"
)
SHAPES_OF_OTHERS = ([3, 2, 4], [5, 4], [4, 4, 4, 4])
"""US SSN, ZIP+4, cards."""


def emails(text: str) -> Iterator[Span]:
    for found in EMAIL.finditer(text):
        yield span_of("email", text, found.start(), found.end(), 0.95)


def urls(text: str) -> Iterator[Span]:
    """Kinds url and url_credentials."""
    for found in URL.finditer(text):
        end = found.end()
        while end > found.start() and text[end - 1] in CLOSING:
            if text[end - 1] == ")" and text.count("(", found.start(), end) >= text.count(")", found.start(), end):
                break
            end -= 1
        address = text[found.start() : end]
        if address.endswith("://"):
            continue
        held = CREDENTIALS.match(address)
        if (held and not STANDS_FOR_ONE.match(held[2])) or PASSWORD_QUERY.search(address):
            yield span_of("url_credentials", text, found.start(), end, 0.95)
        elif "." in address or "localhost" in address:
            # Above an e-mail address's: what stands before the host of user:password@host is none.
            yield span_of("url", text, found.start(), end, 0.96)


def ips(text: str) -> Iterator[Span]:
    """Not the unspecified, loopback and broadcast addresses, nor ranges such as 10.0.0.0/8: they belong to nobody."""
    for found in IPV4.finditer(text):
        before = text[max(0, found.start() - 12) : found.start()]
        if not VERSION_WORDS.search(before) and _names_a_host(found[0]):
            yield span_of("ip", text, found.start(), found.end(), 0.9)
    if text.count(":") > 1:
        for found in IPV6.finditer(text):
            if _names_a_host(found[0]) and (found[0].count(":") == 7 or "::" in found[0]) and len(found[0]) > 4:
                yield span_of("ip", text, found.start(), found.end(), 0.9)


def _names_a_host(written: str) -> bool:
    try:
        address = ipaddress.ip_address(written)
    except ValueError:
        return False
    return not (address.is_unspecified or address.is_loopback or written == "255.255.255.255")


def phones(text: str, first: int, last: int) -> Iterator[Span]:
    """Those in `text[first:last]`, which must cut no number.

    By form: international, North American, a trunk 0 in groups, a bracketed area.  Any other grouping needs a word beside
    it that speaks of telephones; a word that speaks of orders, pages or dates takes the weaker forms back."""
    for form, score in (
        (INTERNATIONAL, 0.9),
        (NORTH_AMERICAN, 0.85),
        (NORTH_AMERICAN_LOOSE, 0.7),
        (TRUNK, 0.65),
        (AREA, 0.65),
    ):
        for found in form.finditer(text, first, last):
            if _is_phone(found, least=9 if form is TRUNK else 8) and not (
                form is not INTERNATIONAL and _speaks_of_others(text, found)
            ):
                yield span_of("phone", text, found.start(), found.end(), score)
    for found in ANY.finditer(text, first, last):
        if _is_phone(found, least=7) and _is_told(text, found) and not _speaks_of_others(text, found):
            yield span_of("phone", text, found.start(), found.end(), 0.6)


def _is_phone(found: re.Match[str], *, least: int) -> bool:
    written = re.split(r"(?i)\s?(?:x|ext)", found[0])[0]
    groups = re.findall(r"\d+", written)
    digits = sum(map(len, groups))
    return (
        least <= digits <= 15
        and not DATE.fullmatch(written)
        and [len(group) for group in groups] not in SHAPES_OF_OTHERS
        and len(set("".join(groups))) > 2
    )


def _is_told(text: str, found: re.Match[str]) -> bool:
    """By a word on the number's own line; or on the line before, where the number begins its line."""
    line = text[max(0, found.start() - 40) : found.start()].rstrip().rpartition("\n")[2]
    return bool(TOLD_BEFORE.search(line) or TOLD_AFTER.match(text, found.end()))


def _speaks_of_others(text: str, found: re.Match[str]) -> bool:
    return bool(OTHER_WORDS.search(text[max(0, found.start() - 30) : found.start()]))
