"""Findings that the recipe takes care of already: they say so, in place of what to set."""

from __future__ import annotations

from collections.abc import Iterable

from onlay.data.privacy.anonymise import REPLACED
from onlay.recipe import DataSection
from onlay.records import Finding

PRIVACY = ("personal_", "secret_")
STILL_KNOWN = frozenset({"key", "url_credentials"})
"""Secrets that have to be changed even where no row holds them any more."""


def tell_handled(findings: Iterable[Finding], data: DataSection) -> list[Finding]:
    """The findings, in order; where a field of `data` takes care of one, that is its remedy."""
    return [_told(one, data) for one in findings]


def _told(finding: Finding, data: DataSection) -> Finding:
    handled = _handled(finding.code, data)
    return finding if handled is None else finding.model_copy(update={"remedy": handled})


def _handled(code: str, data: DataSection) -> str | None:
    if code == "duplicates_exact" and data.duplicates != "keep":
        return f"data.duplicates: {data.duplicates} leaves them out."
    if code == "duplicates_near" and data.duplicates == "drop_near":
        return "data.duplicates: drop_near leaves them out."
    if code == "domain_imbalance" and data.balance != "none":
        return f"data.balance: {data.balance} evens the domains out."
    if code.startswith(PRIVACY) and data.anonymise != "off":
        kind = code.partition("_")[2]
        if kind in (REPLACED if data.anonymise_kinds is None else data.anonymise_kinds):
            told = f"data.anonymise: {data.anonymise} replaces them."
            return f"{told} Change them all the same: they are known now." if kind in STILL_KNOWN else told
    return None
