"""Names of persons without a model: titles, introductions, known given names, and what surrounds them.

What a list and a handful of cues cannot know stays unfound; docs/privacy.md has the recall.  A model's names come from names.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from onlay.data.privacy.name_words import AMBIGUOUS, GIVEN_NAMES, NOT_NAMES, THINGS
from onlay.data.privacy.spans import Span, resolve, span_of

UP, LOW = (
    "A-ZÀ-ÖØ-ÞĀĂĄĆĈĊČĎĐĒĔĖĘĚĜĞĠĢĤĦĨĪĬĮİĲĴĶĹĻĽĿŁŃŅŇŊŌŎŐŒŔŖŘŚŜŞŠŢŤŦŨŪŬŮŰŲŴŶŸŹŻŽȘȚΑ-ΩА-ЯЁ",
    "a-zà-öø-ÿāăąćĉċčďđēĕėęěĝğġģĥħĩīĭįıĳĵķĺļľŀłńņňŋōŏőœŕŗřśŝşšţťŧũūŭůűųŵŷźżžșțά-ώα-ωа-яё",
)
CAPITALISED = rf"[{UP}](?:[{LOW}]+|['’][{UP}][{LOW}]+|[{LOW}]*[{UP}][{LOW}]+)(?:-[{UP}][{LOW}]+)*"
# A pattern that begins with a set of characters is searched for far faster than one that begins by looking back.
WORD = re.compile(rf"(?=[{UP}])(?<![\w'’-]){CAPITALISED}(?!\w)")
PARTICLE = r"(?:van der|van den|van de|van|von der|von|zu|de la|de los|de|del|della|di|da|dos|do|le|la|al|el|bin|ibn|ter|ten|af|av)"
INITIAL = rf"(?:[{UP}]\.? )"
NAME = rf"{CAPITALISED}(?: {INITIAL}{{1,2}}(?={CAPITALISED})| {PARTICLE}(?= {CAPITALISED}))*(?: {CAPITALISED}){{0,3}}"
FOLLOWING = re.compile(
    rf"(?: {INITIAL}{{1,2}}(?=[{UP}][{LOW}])| )?(?:{PARTICLE} )?{CAPITALISED}(?:[ -]{CAPITALISED}){{0,2}}(?!\w)"
)
TITLE_CUES = ("Mr", "Ms", "Mx", "Miss", "Dr", "Prof", "Doctor", "Sir", "Madam", "Lady", "Lord", "Judge", "Captain", "Sergeant", "Officer", "Senator", "Rev",
              "Father", "Sister", "Herr", "Frau", "Fräulein", "Monsieur", "Mme", "Mlle", "Señor", "Sr", "Don", "Doña", "Sig")  # fmt: skip
STRONG_CUES = ("name", "call me", "calls me", "called", "call h", "customer:", "patient:", "contact:", "sender:", "recipient:", "client:", "signed", "signature", "author:", "attn", "attention:", "directed by",
               "ich hei", "je m", "me llamo", "mi chiamo", "jag heter", "jeg he")  # fmt: skip
LOWER_CUES = ("my name", "call me", "m called")
WEAK_CUES = ("i'm ", "i’m ", "i am ", "this is ", "hi ", "hi,", "hey ", "hey,", "hello", "dear ", "thanks", "thank,", "regards", "sincerely", "cheers", "best,", "yours,",
             "love,", "meet ", "asked for ", "speak ", "my ")  # fmt: skip
TOWN = re.compile(r"\b(?:San|Santa|Santo|São|Saint|St\.?|Fort|Port|Lake|Mount) $")
"""San Francisco is no person."""
ACTS_BEFORE = re.compile(
    r"\b(?:said|says|asked|replied|told|married|by|starring|singer|actor|actress|player|producer|director|author|professor|president|founder) $"
)
ACTS_AFTER = re.compile(
    r",? (?:said|says|asked|told|replied|wrote|writes|shouted|lives|lived|was born|is a \d|explained|died|married)\b"
    r"|['’]s (?:wife|husband|son|daughter|mother|father|address|phone|house|account)\b"
)

SURE = 0.55
"""A whole name with a greater score tells its parts."""


# Compiled when the first text has a word that they need: that takes longer than to read some hundred rows.


@cache
def _titled() -> re.Pattern[str]:
    return re.compile(
        rf"(?=[MDPSLJCORFH])(?<!\w)(?:Mr|Mrs|Ms|Mx|Miss|Dr|Prof|Professor|Doctor|Sir|Madam|Lady|Lord|Judge|Captain|Sergeant|Officer|Senator|Rev|Reverend|Father|Sister|Herr|Frau"
        rf"|Fräulein|Monsieur|Madame|Mme|Mlle|Señor|Señora|Sr|Sra|Don|Doña|Signor|Signora|Sig)\.? (?P<name>{INITIAL}?{NAME})"
    )


@cache
def _strong() -> re.Pattern[str]:
    return re.compile(
        rf"(?:(?i:\bmy (?:full |first |last |maiden |middle )?name(?:['’]s| is)|\b(?:his|her|their|maiden|last|first|partner['’]s|customer['’]s|wife['’]s|husband['’]s) name(?: is|['’]s)"
        rf"|\bcall(?:ed|s)? (?:me|him|her)|\b(?:is|was|are) (?:called|named)|\b(?:person|man|woman|boy|girl|friend|son|daughter|child|kid|guy|student|neighbou?r) named|\bnamed (?:him|her)"
        rf"|\b(?:full |first |last |sur|customer |patient |account |contact |sender |recipient |employee )?name ?:|\b(?:customer|patient|contact|sender|recipient|client|signed|signature|author|attn|attention|directed by) ?:"
        rf"|\b(?:ich hei(?:ß|ss)e|mein name ist|je m['’]appelle|me llamo|mi chiamo|meu nome é|mi nombre es|jag heter|jeg hedder|jeg heter))\s{{1,5}})(?P<name>{INITIAL}?{NAME})"
    )


@cache
def _strong_lower() -> re.Pattern[str]:
    return re.compile(rf"(?i:\bmy name(?:['’]s| is)|\bcall me|\bi['’]?m called) (?P<name>[{LOW}]+)\b")


@cache
def _weak() -> re.Pattern[str]:
    return re.compile(
        rf"(?:(?i:\bI['’]m|\bI am|\bthis is|\bhi|\bhey|\bhello|\bdear|\bthanks?,|\bregards,|\bsincerely,|\bcheers,|\bbest,|\byours,|\blove,|\bmeet|\basked for|\bspeak (?:to|with)|\bmy (?:wife|husband|son|daughter|brother|sister|friend|boss|colleague|kid|child|partner|manager|mother|father)),?"
        rf"\s{{1,3}})(?P<name>{NAME})"
    )


@cache
def _asked() -> re.Pattern[str]:
    return re.compile(rf"(?i:\bname\b[^.!?\n]{{0,30}}\?\s*(?:\w+: ?)?)(?P<name>{NAME})")


@cache
def _whole_names() -> re.Pattern[str]:
    return re.compile(
        rf"(?=[{UP}])(?<![\w'’.-]){CAPITALISED}(?: (?P<initial>{INITIAL}{{1,2}})?{CAPITALISED}){{1,2}}(?!\w)"
    )


@dataclass(frozen=True, slots=True)
class Words:
    given: frozenset[str]
    plain: frozenset[str]
    """Given names that are names without a cue."""
    small: frozenset[str]
    """The same in small letters."""
    not_names: frozenset[str]
    things: frozenset[str]


@cache
def words() -> Words:
    every, ambiguous = frozenset(GIVEN_NAMES.split()), frozenset(AMBIGUOUS.split())
    plain = every - ambiguous
    small = frozenset(name.lower() for name in plain)
    return Words(every | ambiguous, plain, small, frozenset(NOT_NAMES.split()), frozenset(THINGS.split()))


def people(text: str) -> Iterator[Span]:
    known = words()
    found: list[tuple[int, int, float]] = []
    capitalised = WORD.findall(text)
    if capitalised:
        if any(cue in text for cue in TITLE_CUES):
            found += [(*_trimmed(one, "name"), 0.85) for one in _titled().finditer(text)]
        if not known.given.isdisjoint(capitalised):
            found += _given(text, known)
        if len(capitalised) > 1:
            found += _whole(text)
    lowered = text.lower()
    if any(cue in lowered for cue in STRONG_CUES):
        if capitalised:
            found += [(*_trimmed(one, "name"), 0.8) for one in _strong().finditer(text)]
        if capitalised and "name" in lowered and "?" in text:
            found += [(*_trimmed(one, "name"), 0.8) for one in _asked().finditer(text)]
        for one in _strong_lower().finditer(text) if any(cue in lowered for cue in LOWER_CUES) else ():
            if one["name"] in known.small:
                found.append((*one.span("name"), 0.7))
    if capitalised and any(cue in lowered for cue in WEAK_CUES):
        for one in _weak().finditer(text):
            start, end = _trimmed(one, "name")
            if " " in text[start:end] or text[start:end] in known.given:
                found.append((start, end, 0.6))
    kept = resolve(span_of("name", text, start, end, score) for start, end, score in found if start < end)
    yield from kept
    yield from _repeated(text, kept)


def _trimmed(found: re.Match[str], group: str | int) -> tuple[int, int]:
    """The words of a name up to the first that is none; empty where that is the first, or where it is a thing's name."""
    start = position = found.start(group)
    for word in re.finditer(r"\S+", found[group]):
        bare = word[0].rstrip(".,'’")
        if bare in words().things:
            return start, start
        if bare in words().not_names and len(bare) > 1:
            break
        position = start + word.end()
    return start, position


def _whole(text: str) -> Iterator[tuple[int, int, float]]:
    """Two or three words with capitals: with an initial among them, or beside a word for what persons do."""
    for one in _whole_names().finditer(text):
        before = max(0, one.start() - 12)
        if one["initial"] or ACTS_AFTER.match(text, one.end()) or ACTS_BEFORE.search(text, before, one.start()):
            yield *_trimmed(one, 0), 0.6


def _given(text: str, known: Words) -> Iterator[tuple[int, int, float]]:
    """A given name, with the surname that follows."""
    last = 0
    for word in WORD.finditer(text):
        if (
            word[0] not in known.given
            or word.start() < last
            or TOWN.search(text, max(0, word.start() - 6), word.start())
        ):
            continue
        after = FOLLOWING.match(text, word.end())
        parts = after[0].split() if after else []
        if after and not known.things.isdisjoint(parts):
            last = after.end()
        elif after and known.not_names.isdisjoint(parts):
            last = after.end()
            yield word.start(), last, 0.75 if word[0] in known.plain else 0.55
        elif word[0] in known.plain:
            yield word.start(), word.end(), 0.5


def _repeated(text: str, kept: list[Span]) -> Iterator[Span]:
    """A part of a whole name standing alone elsewhere in the text."""
    parts = {
        word
        for one in kept
        if " " in one.text and one.score > SURE
        for word in re.findall(CAPITALISED, one.text)
        if len(word) > 3
    }
    parts -= words().not_names
    if parts:
        for word in WORD.finditer(text):
            if word[0] in parts:
                yield span_of("name", text, word.start(), word.end(), 0.55)
