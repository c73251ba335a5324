from __future__ import annotations

import pytest

from onlay.pages.drawing import HALF, WIDTH, Drawing, decimals, ticks
from tests.pages.parsing import texts, tree


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (-5.6, 16.5, [-5, 0, 5, 10, 15]),
        (0.0, 2e-4, [0, 5e-5, 1e-4, 1.5e-4, 2e-4]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize("width", [1e-9, 0.37, 3.0, 9.99, 10.0, 12345.6])
def test_ticks_are_few_within_and_evenly_apart(width: float) -> None:
    for low in (-width / 3, 0.0, 17.3):
        found = ticks(low, low + width)
        assert 2 <= len(found) <= 6 and low - 1e-9 <= found[0] and found[-1] <= low + width + 1e-9


@pytest.mark.parametrize(("values", "expected"), [([0, 0.2, 0.4], 1), ([0, 5, 10], 0), ([0, 0.25, 0.5], 1), ([7], 0)])
def test_decimals_tell_neighbours_apart(values: list[float], expected: int) -> None:
    assert decimals(values) == expected


@pytest.mark.parametrize(("width", "style"), [(WIDTH, "plot"), (HALF, "plot half")])
def test_a_drawing_has_a_name_a_description_and_escaped_texts(width: int, style: str) -> None:
    drawing = Drawing(name="one", width=width, height=20)
    drawing.text(0, 10, "<b>&\x00 and more", most=60)
    root = tree(drawing.svg("a <title>", "what it \x01 shows"))
    assert root.get("class") == style and root.get("viewBox") == f"0 0 {width} 20"
    assert [element.text for element in root][:2] == ["a <title>", "what it \ufffd shows"]
    assert texts(root) == ["<b>&\ufffd a…"]
