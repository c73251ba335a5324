"""Check digits of payment cards, bank accounts and national identity numbers.

Each function takes the number without separators, letters in capitals, and says whether its check digits are right.
A check of one digit passes one random number in ten; the detectors ask for a form or a word beside it.
Sources: the issuing bodies' published rules; docs/privacy.md lists what each number holds.
"""

from __future__ import annotations

import re
from datetime import date

IBAN_LENGTHS = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22, "BI": 27, "BR": 29,
    "BY": 28, "CH": 21, "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DJ": 27, "DK": 18, "DO": 28, "EE": 20, "EG": 29,
    "ES": 24, "FI": 18, "FK": 18, "FO": 18, "FR": 27, "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28,
    "HN": 28, "HR": 21, "HU": 28, "IE": 22, "IL": 23, "IQ": 23, "IS": 26, "IT": 27, "JO": 30, "KW": 30, "KZ": 20,
    "LB": 28, "LC": 32, "LI": 21, "LT": 20, "LU": 20, "LV": 21, "LY": 25, "MC": 27, "MD": 24, "ME": 22, "MK": 19,
    "MN": 20, "MR": 27, "MT": 31, "MU": 30, "NI": 28, "NL": 18, "NO": 15, "OM": 23, "PK": 24, "PL": 28, "PS": 29,
    "PT": 25, "QA": 29, "RO": 24, "RS": 22, "RU": 33, "SA": 24, "SC": 31, "SD": 18, "SE": 24, "SI": 19, "SK": 24,
    "SM": 27, "SO": 23, "ST": 25, "SV": 28, "TL": 23, "TN": 24, "TR": 26, "UA": 29, "VA": 22, "VG": 24, "XK": 20,
    "YE": 30,
}  # fmt: skip
"""Characters by country: the SWIFT IBAN registry."""
CARD_FORMS = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}|3[47]\d{13}"
    r"|3(?:0[0-5]|09|[689]\d)\d{11,16}|(?:6011|64[4-9]\d|65\d\d|60\d\d|62\d\d|8[12]\d\d)\d{12,15}"
    r"|35(?:2[89]|[3-8]\d)\d{12,15}|(?:2131|1800)\d{11}|(?:5[0678]|6\d)\d{10,17}|220[0-4]\d{12}|9792\d{12}"
)
"""Prefixes and lengths of issuers: Visa, Mastercard, American Express, Diners, Discover, RuPay, UnionPay, JCB, Maestro, Mir, Troy."""
VERHOEFF_PRODUCT = (
    "0123456789", "1234067895", "2340178956", "3401289567", "4012395678",
    "5987604321", "6598710432", "7659821043", "8765932104", "9876543210",
)  # fmt: skip
VERHOEFF_PERMUTATION = (
    "0123456789", "1576283094", "5803796142", "8916043527", "9453126870", "4286573901", "2793806415", "7046913258",
)  # fmt: skip
FISCAL_ODD = (1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16, 10, 22, 25, 24, 23)
FINNISH_CHECK = "0123456789ABCDEFHJKLMNPRSTUVWXY"
SPANISH_CHECK = "TRWAGMYFPDXBNJZSQVHLCKE"


def luhn(digits: str) -> bool:
    total = 0
    for index, character in enumerate(reversed(digits)):
        value = int(character)
        if index % 2:
            value = value * 2 - 9 if value > 4 else value * 2
        total += value
    return total % 10 == 0


def iban(text: str) -> bool:
    if IBAN_LENGTHS.get(text[:2]) != len(text):
        return False
    return int("".join(str(int(character, 36)) for character in text[4:] + text[:4])) % 97 == 1


def verhoeff(digits: str) -> bool:
    check = 0
    for index, character in enumerate(reversed(digits)):
        check = int(VERHOEFF_PRODUCT[check][int(VERHOEFF_PERMUTATION[index % 8][int(character)])])
    return check == 0


def mod_11_10(digits: str) -> bool:
    """ISO 7064, as in the German tax number and the Croatian OIB."""
    check = 10
    for character in digits[:-1]:
        check = (check + int(character)) % 10 or 10
        check = check * 2 % 11
    return (11 - check) % 10 == int(digits[-1])


def weighted(digits: str, weights: tuple[int, ...]) -> int:
    return sum(int(digit) * weight for digit, weight in zip(digits, weights, strict=False))


def is_date(day: str, month: str, year: str) -> bool:
    """`year` of two digits: of this century or the last."""
    years = (int(year),) if len(year) == 4 else (1900 + int(year), 2000 + int(year))
    for one in years:
        try:
            date(one, int(month), int(day))
        except ValueError:
            continue
        return True
    return False


# ------------------------------------------------------------------------------------------------- national numbers


def us_ssn(digits: str) -> bool:
    """Areas 000, 666 and 9xx, group 00 and serial 0000 are never given; nor are two numbers known from print."""
    if digits in ("078051120", "219099999"):
        return False
    return digits[:3] not in ("000", "666") and digits[0] != "9" and digits[3:5] != "00" and digits[5:] != "0000"


def us_itin(digits: str) -> bool:
    group = int(digits[3:5])
    return digits[0] == "9" and (50 <= group <= 65 or 70 <= group <= 88 or 90 <= group <= 92 or 94 <= group <= 99)


def uk_nino(text: str) -> bool:
    return text[:2] not in ("BG", "GB", "KN", "NK", "NT", "TN", "ZZ")


def uk_nhs(digits: str) -> bool:
    return (11 - weighted(digits[:9], (10, 9, 8, 7, 6, 5, 4, 3, 2)) % 11) % 11 == int(digits[9])


def german_tax(digits: str) -> bool:
    """Of the first ten digits one or two occur more than once; one digit may stand three times, never three in a row."""
    counts = [digits[:10].count(digit) for digit in set(digits[:10])]
    repeated = [count for count in counts if count > 1]
    return digits[0] != "0" and len(repeated) == 1 and repeated[0] in (2, 3) and mod_11_10(digits)


def french_nir(text: str) -> bool:
    number = text[:13].replace("2A", "19").replace("2B", "18") if text[5:7] in ("2A", "2B") else text[:13]
    return number.isdigit() and 97 - int(number) % 97 == int(text[13:])


def spanish_dni(text: str) -> bool:
    """DNI: eight digits and a letter; NIE: X, Y or Z for the first digit."""
    number = {"X": "0", "Y": "1", "Z": "2"}.get(text[0], text[0]) + text[1:-1]
    return SPANISH_CHECK[int(number) % 23] == text[-1]


def italian_fiscal(text: str) -> bool:
    values = [int(character, 36) - 10 if character.isalpha() else int(character) for character in text[:15]]
    total = sum(FISCAL_ODD[value] if index % 2 == 0 else value for index, value in enumerate(values))
    return total % 26 == int(text[15], 36) - 10


def dutch_bsn(digits: str) -> bool:
    return digits != "0" * 9 and (weighted(digits, (9, 8, 7, 6, 5, 4, 3, 2)) - int(digits[8])) % 11 == 0


def polish_pesel(digits: str) -> bool:
    month, century = int(digits[2:4]) % 20, {0: 1900, 1: 2000, 2: 2100, 3: 2200, 4: 1800}[int(digits[2:4]) // 20]
    if not is_date(digits[4:6], str(month), str(century + int(digits[:2]))):
        return False
    return (10 - weighted(digits[:10], (1, 3, 7, 9, 1, 3, 7, 9, 1, 3)) % 10) % 10 == int(digits[10])


def swedish_number(digits: str) -> bool:
    digits = digits.replace("+", "")[-10:]
    return is_date(str(int(digits[4:6]) % 60), digits[2:4], digits[:2]) and luhn(digits)


def finnish_number(text: str) -> bool:
    number = int(text[:6] + text[-4:-1])
    return is_date(text[:2], text[2:4], text[4:6]) and FINNISH_CHECK[number % 31] == text[-1]


def norwegian_number(digits: str) -> bool:
    day = str(int(digits[:2]) % 40)
    first = (11 - weighted(digits, (3, 7, 6, 1, 8, 9, 4, 5, 2)) % 11) % 11
    second = (11 - weighted(digits, (5, 4, 3, 2, 7, 6, 5, 4, 3, 2)) % 11) % 11
    return is_date(day, digits[2:4], digits[4:6]) and [first, second] == [int(digits[9]), int(digits[10])]


def belgian_number(digits: str) -> bool:
    number, check = int(digits[:9]), int(digits[9:])
    return check in (97 - number % 97, 97 - (2_000_000_000 + number) % 97)


def swiss_ahv(digits: str) -> bool:
    return (10 - weighted(digits[:12], (1, 3) * 6) % 10) % 10 == int(digits[12])


def brazilian_cpf(digits: str) -> bool:
    if len(set(digits)) == 1:
        return False
    first = weighted(digits, tuple(range(10, 1, -1))) * 10 % 11 % 10
    second = weighted(digits, tuple(range(11, 1, -1))) * 10 % 11 % 10
    return [first, second] == [int(digits[9]), int(digits[10])]


def chilean_rut(text: str) -> bool:
    total = sum(int(digit) * (2 + index % 6) for index, digit in enumerate(reversed(text[:-1])))
    return "0123456789K0"[(11 - total % 11) % 11] == text[-1]


def mexican_curp(text: str) -> bool:
    alphabet = "0123456789ABCDEFGHIJKLMNÑOPQRSTUVWXYZ"
    total = sum(alphabet.index(character) * (18 - index) for index, character in enumerate(text[:17]))
    return is_date(text[8:10], text[6:8], text[4:6]) and str((10 - total % 10) % 10) == text[17]


def australian_tfn(digits: str) -> bool:
    return weighted(digits, (1, 4, 3, 7, 5, 8, 6, 9, 10)) % 11 == 0


def chinese_id(text: str) -> bool:
    weights = tuple(2 ** (17 - index) % 11 for index in range(17))
    return (
        is_date(text[12:14], text[10:12], text[6:10]) and "10X98765432"[weighted(text[:17], weights) % 11] == text[17]
    )


def korean_rrn(digits: str) -> bool:
    """Numbers given since October 2020 have no check digit and are not told apart from others."""
    total = weighted(digits[:12], (2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5))
    return is_date(digits[4:6], digits[2:4], digits[:2]) and (11 - total % 11) % 10 == int(digits[12])


def singapore_nric(text: str) -> bool:
    total = weighted(text[1:8], (2, 7, 6, 5, 4, 3, 2)) + (4 if text[0] in "TG" else 0)
    return ("JZIHGFEDCBA" if text[0] in "ST" else "XWUTRQPNMLK")[total % 11] == text[8]


def turkish_number(digits: str) -> bool:
    odd, even = sum(map(int, digits[0:9:2])), sum(map(int, digits[1:8:2]))
    return (odd * 7 - even) % 10 == int(digits[9]) and sum(map(int, digits[:10])) % 10 == int(digits[10])


def south_african_id(digits: str) -> bool:
    return is_date(digits[4:6], digits[2:4], digits[:2]) and luhn(digits)


def czech_number(digits: str) -> bool:
    month = int(digits[2:4]) % 50 % 20
    return is_date(digits[4:6], str(month), digits[:2]) and int(digits[:9]) % 11 % 10 == int(digits[9])
