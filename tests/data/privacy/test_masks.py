from __future__ import annotations

import pytest

from onlay.data.privacy.masks import mask
from onlay.data.privacy.pseudonyms import REDACTED


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Nothing here.", "Nothing here."),
        ("Write to ann@harbour-mail.org, or see https://a.org.", "Write to [EMAIL], or see [URL]."),
        ("postgres://ann:Qx7_pL2@db.a.org is it", "[URL_CREDENTIALS] is it"),
        ("My name is Maria Qorvin.", "My name is [PERSON]."),
    ],
)
def test_marks_stand_where_personal_data_stood(text: str, masked: str) -> None:
    assert mask(text) == masked
    assert masked.count("[") == len(REDACTED.findall(masked)), "the marks of data.anonymise: redact"
