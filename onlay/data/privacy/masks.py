"""Text of the data as it may be shown: with marks where personal data or secrets stand."""

from __future__ import annotations

from onlay.data.privacy.detect import find
from onlay.data.privacy.pseudonyms import LABELS


def mask(text: str) -> str:
    """With `[EMAIL]`, `[PERSON]` and the like, the marks of `data.anonymise: redact`, for every kind of span.

    Give it the whole text and cut afterwards: half an identifier has no form that could be found."""
    parts, end = [], 0
    for span in find(text):
        parts += [text[end : span.start], f"[{LABELS[span.kind]}]"]
        end = span.end
    return "".join([*parts, text[end:]])
