from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from onlay.data.privacy import checksums as check

# Published examples, or numbers made by the issuers' own rules.
VALID = [
    (check.luhn, "4111111111111111"), (check.luhn, "046454286"), (check.iban, "GB82WEST12345698765432"),
    (check.iban, "DE89370400440532013000"), (check.iban, "NO9386011117947"), (check.iban, "MT84MALT011000012345MTLCAST001S"),
    (check.verhoeff, "2363"), (check.us_ssn, "536904399"), (check.us_itin, "912903456"), (check.uk_nino, "AB123456C"),
    (check.uk_nhs, "9434765870"), (check.german_tax, "36574261809"), (check.french_nir, "295109912611193"),
    (check.spanish_dni, "54362315K"), (check.spanish_dni, "X2482300W"), (check.italian_fiscal, "RCCMNL83S18D969H"),
    (check.dutch_bsn, "111222333"), (check.polish_pesel, "44051401359"), (check.swedish_number, "8803200016"),
    (check.finnish_number, "131052308T"), (check.norwegian_number, "15108695088"), (check.belgian_number, "85073003328"),
    (check.swiss_ahv, "7569217076985"), (check.brazilian_cpf, "39053344705"), (check.chilean_rut, "125319092"),
    (check.mexican_curp, "BOXW310820HNERXN09"), (check.australian_tfn, "123456782"), (check.chinese_id, "360426199101010071"),
    (check.korean_rrn, "9710139019902"), (check.singapore_nric, "S1234567D"), (check.turkish_number, "17291716060"),
    (check.south_african_id, "7503305044089"), (check.czech_number, "7103192745"), (check.mod_11_10, "33392005961"),
]  # fmt: skip
WEAK = (check.us_ssn, check.us_itin, check.uk_nino)
"""Rules, without a check digit."""


@pytest.mark.parametrize(("rule", "number"), VALID, ids=lambda value: getattr(value, "__name__", value))
def test_known_numbers_are_valid(rule: Callable[[str], bool], number: str) -> None:
    assert rule(number)


@pytest.mark.parametrize(
    ("rule", "number"),
    [one for one in VALID if one[0] not in WEAK],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_changed_digit_of_the_number_is_noticed(rule: Callable[[str], bool], number: str) -> None:
    place = max(index for index, character in enumerate(number[:-1]) if character.isdigit())
    others = [number[:place] + digit + number[place + 1 :] for digit in "0123456789" if digit != number[place]]
    # Checks of two moduli, and letters that stand for several values, let one in nine pass at most.
    assert sum(map(rule, others)) <= 1


def test_numbers_that_are_never_given() -> None:
    for number in ("000123456", "666123456", "900123456", "123004567", "123450000", "078051120"):
        assert not check.us_ssn(number)
    assert not check.us_itin("912933456") and not check.uk_nino("GB123456A") and not check.brazilian_cpf("1" * 11)
    assert not check.polish_pesel("44133101358") and not check.iban("GB82WEST1234569876543")


def test_checks_let_one_random_number_in_ten_pass() -> None:
    draw = random.Random(0)
    numbers = ["".join(draw.choices("0123456789", k=12)) for _ in range(4000)]
    for rule in (check.luhn, check.verhoeff):
        assert 320 < sum(map(rule, numbers)) < 480


def test_dates() -> None:
    assert check.is_date("29", "2", "00") and check.is_date("31", "12", "1999")
    assert (
        not check.is_date("29", "2", "1999")
        and not check.is_date("0", "1", "50")
        and not check.is_date("1", "13", "50")
    )
