"""Payment cards, bank accounts and national identity numbers: a form, a checksum, and a word beside it where both are weak."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

from onlay.data.privacy import checksums as check
from onlay.data.privacy.spans import Span, is_near, span_of

CARD = re.compile(r"(?<![\w.+-])(?<!\d[ ])\d(?:[ -]?\d){11,18}(?![\w-])(?![.,]\d)")
CARD_WORDS = re.compile(r"(?i)\b(?:card|cc|visa|master ?card|maestro|amex|credit|debit|karte|carte|tarjeta)\b")
IBAN = re.compile(
    r"(?<![A-Za-z0-9])[A-Za-z]{2}\d{2}(?:[ -]?[A-Za-z0-9]{4}){2,7}(?:[ -]?[A-Za-z0-9]{1,3})?(?![A-Za-z0-9])"
)
IBAN_PLAIN = re.compile(r"[A-Za-z]{2}\d{2}[A-Za-z0-9 -]{11,42}")
SEPARATORS = re.compile(r"[ ./()-]")
IDENTITY = r"\bid(?:entity|entification)?(?: ?(?:card|number|no\b))|national (?:id|number|insurance)|personal (?:id|number|code)"


@dataclass(frozen=True, slots=True)
class Number:
    """One country's number."""

    name: str
    form: re.Pattern[str]
    valid: Callable[[str], bool] | None
    """Of the number without separators, in capitals."""
    words: re.Pattern[str] | None = None
    """One of them must stand beside it; None: form and checksum are enough."""


def cards(text: str) -> Iterator[Span]:
    for found in CARD.finditer(text):
        digits = SEPARATORS.sub("", found[0])
        if len(set(digits)) == 1 or not check.luhn(digits):
            continue
        told = is_near(CARD_WORDS, text, found.start(), found.end())
        known = len(digits) > 12 and check.CARD_FORMS.fullmatch(digits) is not None
        if told or (known and _is_grouped(found[0])):
            yield span_of("card", text, found.start(), found.end(), 0.99 if told and known else 0.9)


def _is_grouped(written: str) -> bool:
    """In one piece, or in the groups that are printed on a card: never 10-digit numbers in a row of numbers."""
    groups = [len(group) for group in re.split("[ -]", written)]
    return len(groups) == 1 or set(groups[:-1]) == {4} or groups in ([4, 6, 5], [4, 6, 4])


def ibans(text: str) -> Iterator[Span]:
    position = 0
    while found := IBAN_PLAIN.search(text, position):
        position = found.start() + 2
        if found.start() and text[found.start() - 1].isalnum():
            continue
        length = check.IBAN_LENGTHS.get(found[0][:2].upper())
        end = _end_of(found[0], length) if length else None
        if end is None or (found.start() + end < len(text) and text[found.start() + end].isalnum()):
            continue
        compact = re.sub("[ -]", "", found[0][:end]).upper()
        if check.iban(compact):
            yield span_of("iban", text, found.start(), found.start() + end, 0.99)
            position = found.start() + end


def _end_of(written: str, characters: int) -> int | None:
    """Where the given number of letters and digits ends."""
    count = 0
    for index, character in enumerate(written):
        count += character not in " -"
        if count == characters:
            return index + 1
    return None


def national_ids(text: str, first: int, last: int) -> Iterator[Span]:
    """Those that lie in `text[first:last]`, which must cut no number."""
    for number in numbers():
        for found in number.form.finditer(text, first, last):
            if not found[0].isascii():  # Digits of another script.
                continue
            if number.words is not None and not is_near(number.words, text, found.start(), found.end()):
                continue
            if number.valid is None or number.valid(SEPARATORS.sub("", found[0]).upper()):
                yield span_of("national_id", text, found.start(), found.end(), 0.9 if number.valid else 0.6)


@cache
def numbers() -> tuple[Number, ...]:
    """Where several may be meant, the first that fits; a span is a national_id whatever the country."""
    return (
        Number("US SSN", re.compile(r"(?<![\w-])\d{3}-\d{2}-\d{4}(?![\w-])"), check.us_ssn),
        Number("US SSN", re.compile(r"(?<![\w-])\d{3} ?\d{2} ?\d{4}(?![\w-])"), check.us_ssn, re.compile(r"(?i)\bssn\b|social security")),
        Number("US ITIN", re.compile(r"(?<![\w-])9\d{2}-\d{2}-\d{4}(?![\w-])"), check.us_itin),
        Number("UK NINO", re.compile(r"(?<!\w)[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?\d{2} ?\d{2} ?\d{2} ?[A-D](?!\w)"), check.uk_nino),
        Number("UK NHS", re.compile(r"(?<![\w-])\d{3}[ -]?\d{3}[ -]?\d{4}(?![\w-])"), check.uk_nhs, re.compile(r"\bNHS\b")),
        Number("DE tax", re.compile(r"(?<![\w-])\d{2} ?\d{3} ?\d{3} ?\d{3}(?![\w-])"), check.german_tax, re.compile(r"(?i)steuer|\btax\b|\bt?idnr\b|\btin\b")),
        Number("FR NIR", re.compile(r"(?<![\w-])[12] ?\d{2} ?(?:0[1-9]|1[0-2]|[2-9]\d) ?(?:\d{2}|2[ABab]) ?\d{3} ?\d{3} ?\d{2}(?![\w-])"), check.french_nir),
        Number("ES DNI, NIE", re.compile(r"(?<![\w-])(?:\d{8}|\d{2}\.\d{3}\.\d{3}|[XYZxyz]-?\d{7})-?[A-HJ-NP-TV-Za-hj-np-tv-z](?!\w)"), check.spanish_dni),
        Number("IT codice fiscale", re.compile(r"(?<!\w)[A-Za-z]{6}\d{2}[A-EHLMPRSTa-ehlmprst]\d{2}[A-Za-z]\d{3}[A-Za-z](?!\w)"), check.italian_fiscal),
        Number("NL BSN", re.compile(r"(?<![\w-])\d{4}[. ]?\d{2}[. ]?\d{3}(?![\w-])"), check.dutch_bsn, re.compile(r"(?i)\bbsn\b|burgerservice|sofi-?num|citizen service")),
        Number("PL PESEL", re.compile(r"(?<![\w-])\d{11}(?![\w-])"), check.polish_pesel, re.compile(rf"(?i)pesel|{IDENTITY}")),
        Number("SE personnummer", re.compile(r"(?<![\w-])(?:19|20)?\d{6}[-+]\d{4}(?![\w-])"), check.swedish_number),
        Number("FI henkilötunnus", re.compile(r"(?<![\w-])\d{6}[-+ABCDEFUVWXY]\d{3}[0-9A-FHJ-NPR-Y](?![\w-])"), check.finnish_number),
        Number("NO fødselsnummer", re.compile(r"(?<![\w-])\d{6} ?\d{5}(?![\w-])"), check.norwegian_number),
        Number("DK CPR", re.compile(r"(?<![\w-])\d{6}-?\d{4}(?![\w-])"), None, re.compile(r"(?i)\bcpr\b|personnummer")),
        Number("BE rijksregister", re.compile(r"(?<![\w-])\d{2}\.\d{2}\.\d{2}-\d{3}[.-]\d{2}(?![\w-])"), check.belgian_number),
        Number("CH AHV", re.compile(r"(?<![\w-])756\.\d{4}\.\d{4}\.\d{2}(?![\w-])"), check.swiss_ahv),
        Number("BR CPF", re.compile(r"(?<![\w-])\d{3}\.\d{3}\.\d{3}-\d{2}(?![\w-])"), check.brazilian_cpf),
        Number("BR CPF", re.compile(r"(?<![\w-])\d{11}(?![\w-])"), check.brazilian_cpf, re.compile(r"(?i)\bcpf\b")),
        Number("IN Aadhaar", re.compile(r"(?<![\w-])(?<!\d )[2-9]\d{3}[ -]?\d{4}[ -]?\d{4}(?![\w-])(?! \d)"), check.verhoeff, re.compile(r"(?i)aadh?aar|\buid(?:ai)?\b")),
        Number("IN PAN", re.compile(r"(?<!\w)[A-Z]{3}[ABCFGHJLPT][A-Z]\d{4}[A-Z](?!\w)"), None),
        Number("CA SIN", re.compile(r"(?<![\w-])\d{3}[ -]?\d{3}[ -]?\d{3}(?![\w-])"), check.luhn, re.compile(r"\bSIN\b|(?i:social insurance)")),
        Number("AU TFN", re.compile(r"(?<![\w-])\d{3} ?\d{3} ?\d{3}(?![\w-])"), check.australian_tfn, re.compile(r"\bTFN\b|(?i:tax file)")),
        Number("CL RUT", re.compile(r"(?<![\w.-])\d{1,2}\.\d{3}\.\d{3}-[\dKk](?![\w-])"), check.chilean_rut),
        Number("MX CURP", re.compile(r"(?<!\w)[A-Z][AEIOUX][A-Z]{2}\d{6}[HMX][A-Z]{2}[B-DF-HJ-NP-TV-Z]{3}[0-9A-Z]\d(?!\w)"), check.mexican_curp),
        Number("CN resident", re.compile(r"(?<![\w-])[1-8]\d{5}(?:18|19|20)\d{2}(?:0[1-9]|1[0-2])\d{5}[\dXx](?![\w-])"), check.chinese_id),
        Number("KR RRN", re.compile(r"(?<![\w-])\d{6}-[1-8]\d{6}(?![\w-])"), check.korean_rrn),
        Number("SG NRIC", re.compile(r"(?<!\w)[STFG]\d{7}[A-Z](?!\w)"), check.singapore_nric),
        Number("TR kimlik", re.compile(r"(?<![\w-])[1-9]\d{10}(?![\w-])"), check.turkish_number, re.compile(rf"(?i)kimlik|\bt\.?c\.?(?=\W|$)|{IDENTITY}")),
        Number("ZA ID", re.compile(r"(?<![\w-])\d{6} ?\d{4} ?[01]8\d(?![\w-])"), check.south_african_id, re.compile(rf"\bRSA\b|(?i:{IDENTITY})")),
        Number("CZ, SK rodné číslo", re.compile(r"(?<![\w/-])\d{6}/\d{4}(?![\w/-])"), check.czech_number),
        Number("HR OIB", re.compile(r"(?<![\w-])\d{11}(?![\w-])"), check.mod_11_10, re.compile(r"\bOIB\b")),
    )  # fmt: skip
