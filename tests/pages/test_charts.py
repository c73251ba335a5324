from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from onlay.pages.charts import Bar, bar_rows, histogram
from onlay.pages.drawing import LABELS, NUMBERS, WIDTH, Drawing
from tests.pages.parsing import SVG, drawn, texts, tree


def rectangles(root: ElementTree.Element) -> list[dict[str, float]]:
    return [{name: float(rect.get(name, "")) for name in ("x", "width", "height")} for rect in root.iter(f"{SVG}rect")]


def test_rows_of_bars_are_as_long_as_their_values() -> None:
    drawing = Drawing(name="a")
    bars = [
        Bar(label=f"r{value}", value=value, told=str(value), said=f"said {value}") for value in (10.0, 5.0, -3.0, None)
    ]
    bar_rows(drawing, bars, most=10.0)
    root = tree(drawing.svg("t", "d"))
    full = WIDTH - NUMBERS - LABELS
    assert [one["width"] for one in rectangles(root)] == pytest.approx([full, full / 2, 0, 0], abs=0.1)
    assert (
        drawing.height == 80 and "r5.0" in texts(root) and drawn(root, "bar")[0].findtext(f"{SVG}title") == "said 10.0"
    )


def test_bars_of_a_histogram_are_as_high_as_their_counts_and_say_what_they_count() -> None:
    root = tree(histogram([0, 10, 20, 30], [40, 0, 10], name="a", title="t", told="d", unit="tokens"))
    first, second = rectangles(root)
    assert first["height"] == pytest.approx(4 * second["height"], abs=0.2)
    assert second["x"] - first["x"] == pytest.approx(2 * (first["width"] + 1), abs=0.2)
    assert [bar.findtext(f"{SVG}title") for bar in drawn(root, "bar")] == [
        "40 from 0 to 10 tokens",
        "10 from 20 to 30 tokens",
    ]
    assert {"0", "10", "20", "30", "tokens"} <= set(texts(root))


def test_a_count_of_one_among_many_can_be_seen() -> None:
    root = tree(histogram([0, 1, 2], [1_000_000, 1], name="a", title="t", told="d", unit="rows"))
    assert rectangles(root)[1]["height"] >= 1


@pytest.mark.parametrize(
    ("edges", "value", "share"),
    [([0, 10, 20, 30, 40], 10.0, 0.25), ([1, 10, 100, 1000, 10000], 55.0, 0.375), ([0, 10, 20, 30, 40], 99.0, 1.0)],
)
def test_a_mark_stands_at_its_value(edges: list[float], value: float, share: float) -> None:
    root = tree(histogram(edges, [1, 2, 3, 4], name="a", title="t", told="d", unit="u", marks={"median": value}))
    (line,) = drawn(root, "mark-line")
    axis = drawn(root, "axis")[-1]
    left, right = float(axis.get("x1", "")), float(axis.get("x2", ""))
    assert (float(line.get("x1", "")) - left) / (right - left) == pytest.approx(share, abs=0.005)
    assert f"median {value:g}" in texts(root)


def test_an_uneven_scale_is_named_and_has_its_own_edges() -> None:
    root = tree(histogram([1, 10, 100, 1000, 10000], [1, 2, 3, 4], name="a", title="t", told="d", unit="characters"))
    assert {"1", "10", "100", "1,000", "10,000", "characters, on a scale that is not even"} <= set(texts(root))


def test_shares_are_told_as_per_cent() -> None:
    root = tree(histogram([0, 0.25, 0.5, 0.75, 1], [1, 2, 3, 4], name="a", title="t", told="d", unit="% of a row", factor=100, marks={"median": 0.5}))  # fmt: skip
    assert {"0", "20", "100", "median 50"} <= set(texts(root))
    assert "4 from 75 to 100 % of a row" in str(ElementTree.tostring(root, encoding="unicode"))


@pytest.mark.parametrize("edges", [[5, 5], [5.0, 5.0, 5.0], [0, 0, 7]])
def test_one_value_can_be_drawn(edges: list[float]) -> None:
    drawing = histogram(edges, [3] * (len(edges) - 1), name="a", title="t", told="d", unit="u", marks={"median": 5})
    tree(drawing)
    assert not re.search(r"nan|inf", str(drawing))


def test_nothing_counted_is_none() -> None:
    assert histogram([0, 1], [0], name="a", title="t", told="d", unit="u") is None
