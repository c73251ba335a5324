"""Drawings as SVG: written by hand, so that colours follow the page's light or dark, every mark says what it is when pointed
at, and nothing is drawn, fetched or measured by another program.

The class names are those of style.css and of the pages' own style sheets.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

WIDTH = 760
"""Of a plot over the whole page, in pixels at its natural size."""
HALF = 368
"""Of a plot that shares the page's width with another."""
LABELS = 200
"""Width of the column of names on the left."""
NUMBERS = 176
"""Width of the column of numbers on the right."""
ROW = 26
"""Height of one row of a plot of rows."""
CHARACTER = 6.7
"""Width of a character, on the generous side: the font is the reader's."""
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
"""What XML does not allow, even escaped."""
MARKS = {"better": "M 0 -6 L 6 5 L -6 5 Z", "worse": "M 0 6 L 6 -5 L -6 -5 Z", "same": "M -5 0 A 5 5 0 1 1 5 0 A 5 5 0 1 1 -5 0 Z"}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """Maps values low..high to pixels start..end."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def ticks(low: float, high: float, *, most: int = 6) -> list[float]:
    """At most `most` round numbers (1, 2 or 5 times a power of ten apart) within low..high.  low < high."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if (high - low) / (power * factor) <= most - 1)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


@dataclass(kw_only=True)
class Drawing:
    """Parts of one SVG.  Everything that comes from outside is escaped by Markup.format."""

    name: str
    """Its ids begin with this; one page holds many."""
    width: int = WIDTH
    height: float = 0
    parts: list[Markup] = field(default_factory=list)

    def text(
        self, x: float, y: float, content: str, *, style: str = "", anchor: str = "start", most: float = 0
    ) -> None:
        """`most`: pixels that it may take; a longer one is cut, and whole when pointed at."""
        room = int(most / CHARACTER)
        cut = Markup("")
        if most and len(content) > room:
            cut = Markup("<title>{}</title>").format(content)
            content = content[: room - 1] + "…"
        form = '<text x="{:.1f}" y="{:.1f}" class="{}" text-anchor="{}">{}{}</text>'
        self.parts.append(Markup(form).format(x, y, style, anchor, content, cut))

    def line(self, x1: float, y1: float, x2: float, y2: float, *, style: str) -> None:
        form = '<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" class="{}"/>'
        self.parts.append(Markup(form).format(x1, y1, x2, y2, style))

    def path(self, points: Sequence[tuple[float, float]], *, style: str) -> None:
        drawn = " L ".join(f"{x:.1f} {y:.1f}" for x, y in points)
        self.parts.append(Markup('<path d="M {}" class="{}"/>').format(drawn, style))

    def mark(self, x: float, y: float, *, shape: str, style: str, told: str, around: str = "") -> None:
        """A point; `told` is what it says when pointed at, `around` what is drawn with it."""
        form = '<g class="{}"><title>{}</title>{}<path class="mark" d="{}" transform="translate({:.1f} {:.1f})"/></g>'
        self.parts.append(Markup(form).format(style, told, around, MARKS[shape], x, y))

    def svg(self, title: str, description: str) -> Markup:
        form = (
            '<svg xmlns="http://www.w3.org/2000/svg" class="plot{half}" viewBox="0 0 {width} {height:.0f}" width="{width}" '
            'height="{height:.0f}" role="img" aria-labelledby="{name}-title {name}-told"><title id="{name}-title">{title}'
            '</title><desc id="{name}-told">{told}</desc>{body}</svg>'
        )
        values = {"width": self.width, "height": self.height, "name": self.name, "title": title, "told": description}
        half = " half" if self.width < WIDTH else ""
        drawn = Markup(form).format(half=half, body=Markup("").join(self.parts), **values)
        return Markup(UNPRINTABLE.sub("\ufffd", drawn))


def axis(drawing: Drawing, scale: Scale, *, top: float, bottom: float) -> None:
    """Numbers below, thin lines up from them."""
    marks = ticks(scale.low, scale.high)
    digits = decimals(marks)
    for value in marks:
        drawing.line(scale(value), top - 6, scale(value), bottom, style="grid")
        told = f"{value:.{digits}f}".replace("-", "−") if abs(value) > 1e-12 else "0"
        drawing.text(scale(value), bottom + 16, told, style="muted", anchor="middle")


def decimals(values: Sequence[float]) -> int:
    """Decimals that tell neighbouring ticks apart."""
    step = min((b - a for a, b in itertools.pairwise(values)), default=1.0)
    return max(0, math.ceil(-math.log10(step) - 1e-9))
