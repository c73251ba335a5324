"""Secrets: API keys and tokens by their issuers' prefixes, private keys, and values that are assigned to a telling name."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator

from onlay.data.privacy.spans import Span, span_of

ISSUED = {
    "AKIA": r"\bAKIA[A-Z0-9]{16}\b", "ASIA": r"\bASIA[A-Z0-9]{16}\b",  # AWS
    "AIza": r"\bAIza[\w-]{35}(?![\w-])", "GOCSPX-": r"\bGOCSPX-[\w-]{28}(?![\w-])", "ya29.": r"\bya29\.[\w-]{20,}",  # Google
    "ghp_": r"\bghp_[A-Za-z0-9]{36,}", "gho_": r"\bgho_[A-Za-z0-9]{36,}", "ghu_": r"\bghu_[A-Za-z0-9]{36,}",
    "ghs_": r"\bghs_[A-Za-z0-9]{36,}", "ghr_": r"\bghr_[A-Za-z0-9]{36,}", "github_pat_": r"\bgithub_pat_\w{36,}",
    "glpat-": r"\bglpat-[\w-]{20,}",
    "xox": r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}", "xapp-": r"\bxapp-\d-[A-Za-z0-9-]{10,}",  # Slack
    "hooks.slack.com": r"\bhooks\.slack\.com/services/[\w/]{20,}",
    "_live_": r"\b(?:sk|rk|pk)_live_[A-Za-z0-9]{16,}", "_test_": r"\b(?:sk|rk)_test_[A-Za-z0-9]{16,}",  # Stripe
    "whsec_": r"\bwhsec_[A-Za-z0-9+/=]{24,}",
    "sk-": r"\bsk-(?:(?:proj|svcacct|admin|ant|or)-)?[A-Za-z0-9](?=[\w-]*\d)[\w-]{19,}",  # OpenAI, Anthropic and the like
    "hf_": r"\bhf_[A-Za-z0-9]{30,}", "npm_": r"\bnpm_[A-Za-z0-9]{36}\b", "pypi-": r"\bpypi-AgE[\w-]{50,}",
    "SG.": r"\bSG\.[\w-]{20,24}\.[\w-]{39,50}",  # SendGrid
    "dop_v1_": r"\bdop_v1_[0-9a-f]{64}\b", "shpat_": r"\bshpat_[0-9a-fA-F]{32}\b", "nvapi-": r"\bnvapi-[\w-]{40,}",
    "AccountKey=": r"\bAccountKey=[A-Za-z0-9+/]{60,}={0,2}",  # Azure storage
    ":AA": r"\b\d{8,10}:AA[\w-]{33}(?![\w-])",  # Telegram
    "eyJ": r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}",  # JSON web token
    "-----BEGIN": r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----(?:[\s\S]*?-----END (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----|[\s\S]*)",
}  # fmt: skip
"""A text that every such key holds, and its form.  Looking for the plain text first costs next to nothing."""
ASSIGNED = re.compile(
    r"(?i)(?:api[_ -]?key|access[_ -]?key|secret(?:[_ -]?key)?|auth[_ -]?token|access[_ -]?token|client[_ -]?secret|private[_ -]?key"
    r"|encryption[_ -]?key|\btoken|bearer|password|passwd|\bpwd|passphrase)[\"'`]?(?: is)?\s{0,3}(?:[:=]>?|:=)?\s{0,3}[\"'`]?"
    r"(?P<value>[^\s\"'`,;<>(){}\[\]]{8,200})"
)
SIGN = re.compile(r"[:=]|\b(?:is|bearer)\b", re.IGNORECASE)
TELLING = ("key", "token", "ecret", "passw", "pwd", "earer", "passphrase", "KEY", "TOKEN", "SECRET", "PASSW", "PWD")
MADE_UP = re.compile(
    r"(?i)your|example|placeholder|changeme|dummy|redacted|xxxx|\*\*\*|\.\.\.|1234567890$|^\$|^%|^env|process\.env|os\.environ|getenv"
)
LEAST_BITS = 3.0
"""Entropy a character.  Words of English have about 3 or fewer in 16 letters, and no digits."""


def keys(text: str) -> Iterator[Span]:
    for held, form in ISSUED.items():
        if held in text:
            for found in re.finditer(form, text):
                yield span_of("key", text, found.start(), found.end(), 0.95)
    if any(word in text for word in TELLING):
        for found in ASSIGNED.finditer(text):
            if SIGN.search(text, found.start(), found.start("value")) and _is_secret(found):
                yield span_of("key", text, found.start("value"), _end_of(found), 0.8)


def _end_of(found: re.Match[str]) -> int:
    return found.end("value") - (len(found["value"]) - len(found["value"].rstrip(".!?:")))


def _is_secret(found: re.Match[str]) -> bool:
    value = found["value"].rstrip(".!?:")
    if len(value) < 8 or MADE_UP.search(value) or "://" in value:
        return False
    digits = any(character.isdigit() for character in value)
    letters = any(character.isalpha() for character in value)
    if found[0][:2].lower() == "pa" or found[0][:3].lower() == "pwd":  # A password is short; letters alone are a word.
        return digits and letters
    return len(value) >= 16 and digits and letters and bits_a_character(value) >= LEAST_BITS


def bits_a_character(text: str) -> float:
    """Entropy of the text's own characters."""
    counts = Counter(text)
    return -sum(count / len(text) * math.log2(count / len(text)) for count in counts.values())
