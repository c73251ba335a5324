from __future__ import annotations

import itertools
import math
import re
from typing import Any
from xml.etree import ElementTree

import pytest

from onlay.evaluation.plots import MOST_POINTS, bars, forest, losses
from onlay.pages.drawing import LABELS, NUMBERS, WIDTH
from tests.evaluation.reports import comparison, full_report, metrics
from tests.pages.parsing import SVG, drawn, texts, tree


def positions(element: ElementTree.Element) -> list[tuple[float, float]]:
    numbers = [float(number) for number in re.findall(r"-?[\d.]+", element.get("d") or "")]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def x_of(mark: ElementTree.Element) -> float:
    shape = mark.find(f"{SVG}path[@class='mark']")
    assert shape is not None
    return float(re.findall(r"translate\((\S+)", shape.get("transform") or "")[0])


def test_a_forest_has_a_mark_with_shape_colour_and_words_for_every_comparison() -> None:
    report = full_report()
    root = tree(forest(report.comparisons, name="a", title="t"))
    marks = {style: drawn(root, style) for style in ("better", "worse", "same")}
    assert [len(found) for found in marks.values()] == [2, 1, 2]
    shapes = {style: {mark.findall(f"{SVG}path")[-1].get("d") for mark in found} for style, found in marks.items()}
    assert len(set.union(*shapes.values())) == 3
    for mark in itertools.chain(*marks.values()):
        assert any(one.verdict in (mark.findtext(f"{SVG}title") or "") for one in report.comparisons)
    assert "+12.4  (+9.1 to +15.8)" in texts(root)


def test_marks_stand_where_their_numbers_say() -> None:
    given = [
        comparison(difference=0.1, low=0.05, high=0.2),
        comparison(difference=-0.1, low=-0.2, high=-0.05, p_value=0.01),
    ]
    root = tree(forest(given, name="a", title="t"))
    (zero,) = drawn(root, "zero")
    up, down = (x_of(mark) - float(zero.get("x1", "")) for mark in drawn(root, "better") + drawn(root, "worse"))
    assert up == pytest.approx(-down) and up > 0
    for interval in drawn(root, "interval"):
        left, right = re.findall(r"M (\S+) \S+ H (\S+)", interval.get("d") or "")[0]
        assert float(right) - float(left) == pytest.approx(1.5 * up, abs=0.2)
        assert float(left) >= LABELS and float(right) <= WIDTH - NUMBERS


def test_each_unit_has_its_own_axis() -> None:
    root = tree(forest(full_report().forgetting, name="a", title="t"))
    assert len(drawn(root, "zero")) == 2
    assert {"difference, nats", "difference, points"} <= set(texts(root))


def test_a_difference_of_nothing_at_all_can_be_drawn() -> None:
    root = tree(forest([comparison(difference=0, low=0, high=0, p_value=1.0)], name="a", title="t"))
    assert x_of(drawn(root, "same")[0]) == pytest.approx((LABELS + WIDTH - NUMBERS) / 2)


def test_bars_are_as_long_as_their_values() -> None:
    scores: dict[str, dict[str, float | None]] = {"base": {"exact_match": 0.25}, "adapter": {"exact_match": 0.5}, "x": {"exact_match": None}}  # fmt: skip
    root = tree(bars(scores, system="adapter", name="a", title="t"))
    widths = [float(rect.get("width", "")) for rect in root.iter(f"{SVG}rect")]
    assert widths == pytest.approx([(WIDTH - NUMBERS - LABELS) * share for share in (0.25, 0.5, 0)], abs=0.1)
    assert len(drawn(root, "ours")) == 1
    assert "– no row has what it needs" in texts(root)


def test_nothing_to_draw_is_none() -> None:
    assert forest([], name="a", title="t") is None
    assert bars({"base": {}}, system="base", name="a", title="t") is None
    assert losses([], name="a", title="t") is None
    bad = {"event": "step", "step": 1, "loss": math.nan, "learning_rate": 0.1}
    assert losses([bad], name="a", title="t") is None


def test_losses_show_every_step_and_evaluation() -> None:
    root = tree(losses(metrics(100), name="a", title="t"))
    train = next(element for element in drawn(root, "train") if element.tag == f"{SVG}path")
    assert len(positions(train)) == 100
    assert len([mark for mark in drawn(root, "held-out") if mark.tag == f"{SVG}g"]) == 4
    assert not drawn(root, "band")
    told = root.findtext(f"{SVG}desc") or ""
    assert "held-out loss 1.842 at step 0" in told and "at step 100" in told


def test_many_steps_become_means_of_groups_with_their_range() -> None:
    root = tree(losses(metrics(5000), name="a", title="t"))
    train = next(element for element in drawn(root, "train") if element.tag == f"{SVG}path")
    assert MOST_POINTS * 0.9 < len(positions(train)) <= MOST_POINTS
    assert len(drawn(root, "band")) == 1


def test_the_last_of_repeated_steps_counts_and_a_recovery_is_marked() -> None:
    def step(number: int, loss: float) -> dict[str, Any]:
        return {"event": "step", "step": number, "loss": loss, "learning_rate": 0.1}

    events = [step(1, 2.0), step(2, 900.0), {"event": "recovery", "step": 2, "reason": "loss_spike"}, step(2, 1.0)]
    root = tree(losses(events, name="a", title="t"))
    assert "1.000 at step 2" in (root.findtext(f"{SVG}desc") or "")
    assert len(drawn(root, "recovery")) == 1 and "loss spike" in texts(root)


def test_steps_without_a_finite_loss_are_counted() -> None:
    events = [*metrics(5), {"event": "step", "step": 6, "loss": math.inf, "learning_rate": 0.0}]
    root = tree(losses(events, name="a", title="t"))
    assert "1 steps without a finite loss are left out" in (root.findtext(f"{SVG}desc") or "")


def test_one_step_can_be_drawn() -> None:
    tree(losses([{"event": "step", "step": 1, "loss": 2.0, "learning_rate": 0.0}], name="a", title="t"))


def test_names_from_outside_are_escaped_cut_and_kept_whole_in_the_title() -> None:
    name = "<b>&\"'\x00]]>" + "long " * 30
    root = tree(bars({name: {"score<": 0.5}}, system=name, name="a", title=name))
    shown = next(element for element in root.iter(f"{SVG}text") if (element.text or "").startswith("<b>"))
    assert str(shown.text).endswith("…") and len(str(shown.text)) < 40
    assert shown.findtext(f"{SVG}title") == name.replace("\x00", "\ufffd")
    tree(forest([comparison(name, against=name, verdict=name)], name="a", title=name))
