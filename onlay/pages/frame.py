"""A page that needs nothing but itself: one HTML file without script, font or address.

Its own policy forbids a browser to run or fetch anything, whatever a text in it holds.  All texts go through Jinja's autoescape.
frame.html.jinja is what pages extend, parts.html.jinja what they use, style.css what they share.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

if TYPE_CHECKING:
    from jinja2 import Environment

MOST_CHARACTERS = 12_000
"""Of one text.  What is longer is cut, with the number of characters that were left out."""
UNSEEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
"""Not shown by browsers, or not UTF-8."""


def environment(package: str, *, filters: Mapping[str, Callable[..., Any]] | None = None) -> Environment:
    """Templates of `package`'s folder and of this one; with the filters short, cut and tight, and the page's own."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=ChoiceLoader([PackageLoader(package, "."), PackageLoader("onlay.pages", ".")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update({"short": short, "cut": cut, "tight": tight} | dict(filters or {}))
    return made


def clean(html: str) -> str:
    """Without characters that no browser shows or that no file can hold."""
    return UNSEEN.sub("\ufffd", html)


def short(text: str, length: int) -> str:
    """The beginning, on one line."""
    line = " ".join(text[: 4 * length].split())
    return line if len(line) <= length and len(text) <= 4 * length else line[:length].rstrip() + " …"


def cut(text: Markup | str, where: str) -> Markup | str:
    """A text, cut where it is very long; `where` the rest is.  What has marks was short enough."""
    if isinstance(text, Markup) or len(text) <= MOST_CHARACTERS:
        return text
    return f"{text[:MOST_CHARACTERS]}\n… {len(text) - MOST_CHARACTERS:,} more characters are in {where}"


def tight(text: str) -> str:
    """A number and its % stay on one line."""
    return text.replace(" %", "\u00a0%")
