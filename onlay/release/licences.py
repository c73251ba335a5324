"""What known licences of bases and data say about commercial use, in a few words each.

Names are those of the hub's list of licences (huggingface.co/docs/hub/repositories-licenses) and SPDX's.  It is a table of
names and no legal advice: it finds what is plainly forbidden and what has to be read, and it says `unknown` for every name
that is not in it.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

Commercial = Literal["yes", "with conditions", "no", "unknown"]
STRICTEST: tuple[Commercial, ...] = ("unknown", "no", "with conditions", "yes")
"""Of several licences the first of these that one has: what is not known may be anything."""


class Terms(NamedTuple):
    commercial: Commercial
    condition: str


_NOTICE = "keep the licence's notices"
_SAME = "what is passed on must have the same licence"
_LLAMA = "not with more than 700 million users a month; Meta's use policy; "
_BUILT = "say `Built with Llama`; a model's name begins with Llama"
_RAIL = "the list of forbidden uses must be kept and passed on"
_RESEARCH = "for research and other non-commercial use only"

_TABLE: tuple[tuple[tuple[str, ...], Commercial, str], ...] = (
    (("own",), "yes", "the user's own"),
    (("cc0", "pddl", "unlicense", "wtfpl"), "yes", "no condition"),
    (("cc-by",), "yes", "name the author"),
    (("odc-by", "etalab"), "yes", "name the source"),
    (("apache", "mit", "bsd", "isc", "bsl", "afl", "artistic", "ecl", "ms-pl", "ncsa", "postgresql", "zlib"), "yes", _NOTICE),
    (("openmdw", "cdla-permissive"), "yes", _NOTICE),
    (("cc-by-sa", "odbl"), "with conditions", f"name the author; {_SAME}"),
    (("cdla-sharing", "gfdl", "gpl", "lgpl", "eupl"), "with conditions", _SAME),
    (("agpl", "osl"), "with conditions", f"{_SAME}, and serving it counts as passing it on"),
    (("mpl", "epl"), "with conditions", "changed files stay under it"),
    (("cc-by-nd",), "with conditions", "nothing changed may be passed on, which a trained model may be"),
    (("c-uda",), "with conditions", "for computation only; the rows themselves may be passed on for that alone"),
    (("openrail", "openrail++", "creativeml-openrail-m", "bigscience-openrail-m"), "with conditions", _RAIL),
    (("bigscience-bloom-rail", "bigcode-openrail-m", "deepseek", "gemma"), "with conditions", _RAIL),
    (("llama2",), "with conditions", _LLAMA + "not to improve other language models"),
    (("llama3",), "with conditions", _LLAMA + "say `Built with Meta Llama 3`; a model's name begins with Llama 3"),
    (("llama3.1", "llama3.3"), "with conditions", _LLAMA + _BUILT),
    (("llama3.2",), "with conditions", f"{_LLAMA}{_BUILT}; its vision models not in the EU"),
    (("llama4",), "with conditions", f"{_LLAMA}{_BUILT}; not in the EU"),
    (("qwen",), "with conditions", "not with more than 100 million users a month; say `Built with Qwen`"),
    (("tongyi-qianwen",), "with conditions", "not with more than 100 million users a month"),
    (("cc-by-nc", "cc-by-nc-sa", "cc-by-nc-nd"), "no", "non-commercial use only"),
    (("qwen-research", "tongyi-qianwen-research", "mistral-ai-research", "mrl", "mnpl"), "no", _RESEARCH),
    (("apple-amlr", "intel-research", "h-research", "deepfloyd-if", "fair-noncommercial-research"), "no", _RESEARCH),
)  # fmt: skip
"""Names without their versions, which tell terms apart in Llama's licences alone."""
_VERSION = re.compile(r"-v?\d+(\.\d+)*[a-z]?$")
_LLAMA_NAME = re.compile(r"^(?:meta-)?llama-?(\d(?:\.\d)?)(?:-community)?$")


def terms_of(licence: str | None) -> Terms:
    """What a licence says about commercial use.  Of several, separated by commas or AND, the strictest counts."""
    names = [name for name in re.split(r",|\band\b", (licence or "").strip("[] "), flags=re.I) if name.strip()]
    if not names:
        return Terms("unknown", "no licence is stated")
    found = [_terms_of_one(name) for name in names]
    return min(found, key=lambda terms: STRICTEST.index(terms.commercial))


def _terms_of_one(name: str) -> Terms:
    plain = re.sub(r"[^a-z0-9.+]+", "-", name.lower().strip("'\" ")).strip("-")
    plain = re.sub(r"-(only|or-later)$|-?(licen[cs]e|agreement)(?=-|$)", "", plain).strip("-")
    if match := _LLAMA_NAME.match(plain):
        plain = f"llama{match[1]}"
    for candidate in (plain, re.sub(r"-\d-clause(-[a-z]+)?$", "", plain), _VERSION.sub("", plain)):
        for known, commercial, condition in _TABLE:
            if candidate in known:
                return Terms(commercial, condition)
    return Terms("unknown", f"{name.strip()} is not in the table of known licences")
