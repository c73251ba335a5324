"""Pages read back: elements, texts, colours; and what must be true of every page."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

from markupsafe import Markup

SVG = "{http://www.w3.org/2000/svg}"
VOID = {"meta", "link", "input", "br", "img", "hr"}
EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'&"
ALLOWED = {
    "html", "head", "meta", "title", "style", "body", "main", "header", "section", "article", "p", "h1", "h2", "h3", "h4",
    "span", "strong", "code", "pre", "ul", "ol", "li", "dl", "div", "dt", "dd", "table", "caption", "thead", "tbody",
    "tr", "th", "td", "figure", "figcaption", "details", "summary", "ins", "del", "fieldset", "legend", "input",
    "label", "svg", "g", "path", "line", "text", "rect", "desc",
}  # fmt: skip
"""Elements of pages; none runs or fetches anything."""


class Parsed(HTMLParser):
    """Elements with attributes and their text; fails where tags are not nested."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[int, str]] = []
        self.open: list[int] = []
        self.parents: list[int | None] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.parents.append(self.open[-1] if self.open else None)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self.open[-1]][0] == tag
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else -1, data))

    def within(self, element: int | None, ancestor: int) -> bool:
        while element is not None and element != -1 and element != ancestor:
            element = self.parents[element]
        return element == ancestor

    def find(self, tag: str, **attributes: str) -> list[int]:
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return [
            place
            for place, (name, given) in enumerate(self.elements)
            if name == tag and all(value in (given.get(key) or "").split() for key, value in wanted.items())
        ]

    def text(self, element: int | None = None) -> str:
        """Of one element, or of the whole page without its styles."""
        kept = [
            text for place, text in self.texts
            if (element is None or self.within(place, element)) and (place < 0 or self.elements[place][0] != "style")
        ]  # fmt: skip
        return " ".join("".join(kept).split()).replace("\u00a0", " ")


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    """WCAG 2.2, contrast ratio."""
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def no_script_and_nothing_fetched(html: str) -> None:
    """Fails where a browser could run or fetch something."""
    found = Parsed(html)
    assert {tag for tag, _ in found.elements} <= ALLOWED
    for _, attributes in found.elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "href", "srcset", "style")]
    policy = [given["content"] for tag, given in found.elements if given.get("http-equiv") == "Content-Security-Policy"]
    assert policy and policy[0] is not None and policy[0].startswith("default-src 'none'; style-src 'unsafe-inline'")
    assert "url(" not in html and "@import" not in html


def readable_without_eyes(found: Parsed) -> None:
    """One heading, scopes of tables, ids used once, drawings and fields with names."""
    assert len(found.find("h1")) == 1 and found.elements[0] == ("html", {"lang": "en"})
    for place in found.find("th"):
        assert found.elements[place][1]["scope"] in ("row", "col")
    ids = [given["id"] for _, given in found.elements if "id" in given]
    assert len(ids) == len(set(ids))
    for place in found.find("svg"):
        given = found.elements[place][1]
        assert given["role"] == "img"
        assert {*str(given["aria-labelledby"]).split()} <= set(ids)
    labels = {found.elements[place][1]["for"] for place in found.find("label")}
    assert labels == {found.elements[place][1]["id"] for place in found.find("input")}


def themes_of(html: str) -> list[dict[str, str]]:
    """Colours by name: light, dark, print."""
    themes = [dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", html, re.S)]
    assert len(themes) == 3
    return themes


def tree(svg: Markup | None) -> ElementTree.Element:
    """A drawing, parsed as XML; fails where it would fetch something."""
    assert svg is not None
    assert "href" not in svg and "url(" not in svg and svg.count("http") == 1
    root = ElementTree.fromstring(svg)
    named = {element.get("id") for element in root.iter()} - {None}
    assert set(str(root.get("aria-labelledby")).split()) <= named
    return root


def drawn(root: ElementTree.Element, style: str) -> list[ElementTree.Element]:
    return [element for element in root.iter() if style in (element.get("class") or "").split()]


def texts(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter(f"{SVG}text")]
