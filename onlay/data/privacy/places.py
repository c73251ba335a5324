"""Postal addresses, by pattern: a house number and a street's word, in the order and words of several countries."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

from onlay.data.privacy.spans import Span, span_of

UP = "A-ZÀ-ÖØ-ÞĀ-ŽΑ-ΩА-Я"
LOW = "a-zß-öø-ÿā-žα-ωά-ώа-я"
WORD = rf"(?:[{UP}][{UP}{LOW}'’.-]*|\d{{1,3}}(?:st|nd|rd|th))"
STREET = (
    r"(?:Street|St|Avenue|Ave|Av|Road|Rd|Boulevard|Blvd|Lane|Ln|Drive|Dr|Court|Ct|Square|Sq|Terrace|Ter|Place|Pl|Way|Circle|Cir"
    r"|Highway|Hwy|Parkway|Pkwy|Crescent|Cres|Close|Grove|Gardens|Gdns|Mews|Trail|Row|Alley|Crossing|Loop|Walk|Hill|Quay|Wharf"
    r"|Plaza|Route|Turnpike|Streets|Squares|Avenues|Roads|Str)"
)
UNIT = r"(?:[,\s]{1,3}(?:[Aa]pt|[Aa]partment|[Ss]uite|[Ss]te|[Uu]nit|[Ff]lat|[Ff]loor|[Rr]oom|[Rr]m|#)\.?\s?#?\d{1,5}[A-Za-z]?\b)*"
PLACE = rf"(?:[,\s]{{1,4}}[{UP}][{UP}{LOW}'’.-]+(?: [{UP}][{UP}{LOW}'’.-]+){{0,3}})"
TOWN = rf"(?:{PLACE}?[,\s]{{1,4}}(?:[A-Z]{{2}}\s{{1,2}})?\d{{4,5}}(?:-\d{{4}})?\b)?"
ENGLISH = rf"(?<![\w.,$€£-])\d{{1,6}}[A-Za-z]? (?!The |Supreme )(?:(?:[NSEW]|North|South|East|West)\.? )?(?:{WORD} ){{1,4}}{STREET}\b\.?(?! of\b){UNIT}{TOWN}"
BOX = (
    rf"\b(?:P\. ?O\. ?|PO |P\.O |Post(?:al)? |Post Office )Box \d{{1,7}}\b{TOWN}|\b(?:PSC \d{{1,5}}, Box|Unit \d{{1,5}} Box|[A-Z]{{4}}, ?FPO) \d{{1,6}}\s+(?:[ADF]PO) A[AEP] \d{{5}}"
    r"|\bPost(?:box|fach|bus|boks) \d{1,6}\b"
)
COMPOUND = (
    rf"\b[{UP}][{LOW}-]{{1,24}}(?:straße|strasse|str\.|straat|weg|gasse|platz|allee|laan|plein|gracht|gatan|vägen|gata|gade|vej|veien|vegen|gate|katu|kuja|tie|utca)"
    rf" \d{{1,4}}(?: ?[A-Za-z])?\b{UNIT}(?:,? \d{{4,5}}(?: [A-Z]{{2}})? [{UP}][{UP}{LOW}-]+)?"
)
LEADING = (
    rf"(?=[RrAaBbCcQqPpVvTtu])\b(?:[Rr]ue|[Aa]venue|[Bb]oulevard|[Cc]hemin|[Qq]uai|[Cc]alle|[Aa]venida|[Pp]laza|[Pp]aseo|[Vv]ia|[Vv]iale|[Pp]iazza|[Cc]orso|[Rr]ua|[Tt]ravessa|ul\.|[Uu]lica|[Aa]l\.)"
    rf"(?: (?:de|du|des|del|della|dei|delle|da|do|dos|das|la|le|les|el|los|las|l'|d'))*(?: [{UP}][{UP}{LOW}'’.-]*){{1,4}} ?\d{{1,4}}\b"
    rf"|\b(?:[Cc]alle|[Aa]venida|[Vv]ia|[Vv]iale|[Pp]iazza|[Rr]ua)(?: (?:de|del|della|da|do|dos|la))*(?: [{UP}][{UP}{LOW}'’.-]*){{1,3}}, ?\d{{1,4}}\b"
    rf"|(?<![\w.,$€£-])\d{{1,4}}(?: ?bis| ?ter)?,? (?:rue|avenue|boulevard|chemin|quai|Rue|Boulevard)(?: (?:de|du|des|la|le|les|l'|d'))*(?: [{UP}d'][{UP}{LOW}'’.-]*){{1,4}}"
)
UK_POSTCODE = r"(?<![\w-])(?:GIR ?0AA|[A-Z]{1,2}\d[A-Z\d]? \d[ABD-HJLNP-UW-Z]{2})(?!\w)"
STATES = (
    "AL|AK|AZ|AR|CA|CO|CT|DE|FL|GA|HI|ID|IL|IN|IA|KS|KY|LA|ME|MD|MA|MI|MN|MS|MO|MT|NE|NV|NH|NJ|NM|NY|NC|ND|OH|OK|OR|PA|RI|SC|SD"
    "|TN|TX|UT|VT|VA|WA|WV|WI|WY|DC|PR"
)
STATE_ZIP = rf"\b[{UP}][{UP}{LOW}.'-]+(?: [{UP}][{UP}{LOW}.'-]+){{0,2}},\s+(?:{STATES})\s+\d{{5}}(?:-\d{{4}})?\b"
TOLD = (
    rf"(?i:\b(?:lives?|living|reside[sd]?|residing|moved?|located|ship(?:ped)?|deliver(?:ed)?|send it|address) (?:is |to |at |on |in ){{0,2}}at |\baddress(?: is|:)\s+)"
    rf"(?P<place>(?:\d{{1,5}}[A-Za-z]?,? (?:[{UP}][\w'’.-]*[ ,]*){{1,6}}|(?:[{UP}][\w'’.-]* ){{1,4}}\d{{1,5}}\b)(?:[,\s]+{PLACE}){{0,2}}{UNIT})"
)
SEPARATE = rf"\b(?:[{UP}][{UP}{LOW}'’.-]+ ){{1,2}}(?:Straße|Strasse|Str\.|Allee|Platz|Weg|Gasse|utca|u\.|út|tér|Street|St|Road|Avenue) \d{{1,4}}\b"
ROOM = r"\b(?:Apt|Suite|Apartment)\.? #?\d{1,5}[A-Za-z]?\b"
FORMS: tuple[tuple[str, float, tuple[str, ...] | re.Pattern[str]], ...] = (
    (ENGLISH, 0.7, ("St", "Av", "Road", "Rd", "Boulevard", "Blvd", "Lane", "Ln", "Dr", "Court", "Ct", "Sq", "Ter", "Pl", "Way", "Cir", "Highway", "Hwy", "Parkway", "Pkwy",
                    "Cres", "Close", "Grove", "Gardens", "Gdns", "Mews", "Trail", "Row", "Alley", "Crossing", "Loop", "Walk", "Hill", "Quay", "Wharf", "Route", "Turnpike")),
    (BOX, 0.8, ("Box", "Post", "FPO")),
    (COMPOUND, 0.7, ("str", "weg", "gasse", "platz", "allee", "laan", "plein", "gracht", "gat", "vägen", "gade", "vej", "veien", "vegen", "katu", "kuja", "tie", "utca")),
    (SEPARATE, 0.65, ("St", "Allee", "Platz", "Weg", "Gasse", "utca", "u.", "út", "tér", "Road", "Avenue")),
    (LEADING, 0.65, ("rue ", "Rue ", "venue ", "oulevard ", "hemin ", "uai ", "alle ", "venida ", "laza ", "aseo ", "via ", "Via ", "iale ", "iazza ", "orso ", "rua ", "Rua ", "ravessa ",
                     "lica ", "ul. ", "al. ", "Al. ")),
    (UK_POSTCODE, 0.6, re.compile(r"\d[A-Z]{2}")),
    (STATE_ZIP, 0.75, re.compile(r"[A-Z]{2}\s+\d{5}")),
    (ROOM, 0.6, ("Apt", "Suite", "Apartment")),
)  # fmt: skip
"""Form, score, and what a text with it must hold; a form is compiled for the first such text."""
TELLING = ("live", "living", "resid", "move", "located", "ship", "deliver", "send it", "ddress")
HEAD = re.compile(r"(?<![\w.,$€£-])\d{1,6}[A-Za-z]? $")
TAIL = rf"{UNIT}(?:[,\s>]{{1,4}}[{UP}][{UP}{LOW}'’.-]+(?: [{UP}][{UP}{LOW}'’.-]+){{0,2}}){{0,2}}[,\s>]{{1,4}}(?:[A-Z]{{2}}\s{{1,2}})?\d{{4,5}}(?:-\d{{4}})?(?!\w|[ .-]\d)|{UNIT}"


@cache
def _compiled(form: str) -> re.Pattern[str]:
    return re.compile(form)


def _may_hold(text: str, marks: tuple[str, ...] | re.Pattern[str]) -> bool:
    if isinstance(marks, re.Pattern):
        return marks.search(text) is not None
    return any(mark in text for mark in marks)


def addresses(text: str) -> Iterator[Span]:
    """The caller has seen a digit in the text: no form is without one.  What belongs to one address is one span."""
    found = [
        (one.start(), one.end(), score)
        for form, score, marks in FORMS
        if _may_hold(text, marks)
        for one in _compiled(form).finditer(text)
    ]
    for one in _compiled(TOLD).finditer(text) if _may_hold(text, TELLING) else ():
        found.append((one.start("place"), one.start("place") + len(one["place"].rstrip(" ,.\n")), 0.6))
    last: tuple[int, int, float] | None = None
    for start, end, score in sorted(_whole(text, *one) for one in found):
        if last and start <= last[1] + 2 and not text[last[1] : start].strip(" ,\n"):
            last = (last[0], max(last[1], end), max(last[2], score))
            continue
        if last:
            yield span_of("address", text, *last)
        last = (start, end, score)
    if last:
        yield span_of("address", text, *last)


def _whole(text: str, start: int, end: int, score: float) -> tuple[int, int, float]:
    """With the house number before it, and the room, town and postcode after it."""
    head = HEAD.search(text, max(0, start - 8), start)
    tail = _compiled(TAIL).match(text, end)
    return head.start() if head else start, tail.end() if tail else end, score
