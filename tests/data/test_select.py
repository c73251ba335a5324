"""What becomes of every row: nothing is lost uncounted, nothing hangs on the order, every number is exact."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from onlay.data.select import REASONS, Selection, keep_longest, select_rows
from onlay.errors import DataError
from onlay.recipe import Recipe, parse_recipe
from tests.data.tables import Made, material_of, singles, table_of


def recipe_of(*, split: float | None = None, seed: int = 0, file: str | None = None, **data: Any) -> Recipe:
    values = {"train": "a.jsonl", **data}
    return parse_recipe(
        {
            "model": {"base": "x"},
            "data": values,
            "evaluation": {"split": split, "file": file},
            "training": {"seed": seed},
        }
    )


def selected(
    rows: list[Made], uses: tuple[str, ...] = ("train",), weights: tuple[float, ...] = (), **fields: Any
) -> Selection:
    return select_rows(material_of(rows, uses, weights), recipe_of(**fields))


def why(selection: Selection) -> list[str]:
    return [REASONS[number] for number in selection.reason.tolist()]


def counts(selection: Selection) -> dict[str, int]:
    return {finding.code: finding.count for finding in selection.findings}


def busy_rows() -> list[Made]:
    """Duplicates, near-duplicates, domains of several sizes, three sources and general rows."""
    rows = [
        Made(f"question {i // 2}", f"answer {i % 5}", domain="abc"[i % 7 % 3], near=f"n{i}" if i % 9 else "near")
        for i in range(180)
    ]
    rows += [Made(f"other {i}", f"answer {i}", domain="c", source=1) for i in range(60)]
    rows += [Made(f"general {i}" if i % 10 else f"question {i}", f"hm {i}", source=2) for i in range(100)]
    return rows


BUSY: dict[str, Any] = {
    "split": 0.1, "general": "c.jsonl", "general_share": 0.2, "duplicates": "drop_near", "balance": "cap", "domain_cap": 0.4,
}  # fmt: skip
USES = ("train", "train", "general")


# ------------------------------------------------------------------------------------------------------------ no row lost


@pytest.mark.parametrize("seed", [0, 3])
def test_every_row_trains_or_is_held_out_or_is_left_out_and_counted(seed: int) -> None:
    rows = busy_rows()
    selection = selected(rows, USES, seed=seed, **BUSY)
    states = np.stack([selection.times > 0, selection.held_out, selection.reason > 0])
    assert (states.sum(axis=0) == 1).all()
    found = counts(selection)
    for number, code in enumerate(REASONS):
        if code:
            assert found.get(code, 0) == (selection.reason == number).sum()
    assert {"duplicates_dropped", "balanced_away", "mixed_in", "general_held_out", "general_not_drawn"} <= found.keys()
    assert not selection.held_out[240:].any(), "general rows are never measured on"
    assert abs(selection.times[240:].sum() / selection.times.sum() - 0.2) < 0.01


def test_the_order_of_the_rows_does_not_matter() -> None:
    rows = busy_rows()
    want = selected(rows, USES, **BUSY)
    for seed in range(4):
        random = np.random.default_rng(seed)
        order = np.concatenate([random.permutation(180), 180 + random.permutation(60), 240 + random.permutation(100)])
        found = selected([rows[i] for i in order], USES, **BUSY)
        assert (found.times == want.times[order]).all()
        assert (found.held_out == want.held_out[order]).all()
        assert why(found) == [why(want)[i] for i in order]


def test_the_seed_changes_what_is_drawn() -> None:
    rows = busy_rows()
    first, second = selected(rows, USES, **BUSY), selected(rows, USES, seed=1, **BUSY)
    assert first.digest != second.digest
    assert (first.held_out != second.held_out).any()
    assert first.digest == selected(rows, USES, **BUSY).digest


def test_nothing_is_asked_for_nothing_happens() -> None:
    selection = selected([*singles(5), *singles(5)])
    assert selection.times.tolist() == [1] * 10
    assert not selection.held_out.any()
    assert selection.findings == ()


# ------------------------------------------------------------------------------------------------------------ duplicates


def test_exact_duplicates_go_and_the_longest_answer_stays() -> None:
    rows = [
        Made("q", "yes"),
        Made("Q", "YES"),
        Made("q", "no"),
        Made("p", "yes", near="x"),
        Made("r", "yes!", near="x"),
    ]
    selection = selected(rows, duplicates="drop_exact")
    assert why(selection).count("duplicates_dropped") == 1
    assert selection.times.tolist()[2:] == [1, 1, 1], "another answer, or a near-duplicate, is no exact one"
    near = selected(rows, duplicates="drop_near")
    assert near.times.tolist()[3:] == [0, 1]
    assert near.kept.tolist()[3:] == [4, 4]
    assert counts(near) == {"duplicates_dropped": 2}
    assert [row.place for row in near.findings[0].rows][-1] == "a.jsonl:4"


def test_the_row_that_stays_does_not_hang_on_the_order() -> None:
    rows = [Made(f"q{i}", "a" * (i % 4), near="one") for i in range(12)]
    table = table_of(rows)
    same, precedence = np.zeros(12), np.zeros(12)
    stays = keep_longest(table, same, precedence=precedence)
    assert len(set(stays.tolist())) == 1
    assert len(rows[stays[0]].answer) == 3
    order = np.random.default_rng(1).permutation(12)
    again = keep_longest(table.taken(order), same, precedence=precedence)
    assert order[again[0]] == stays[0]


def test_a_training_row_that_repeats_an_evaluation_row_goes() -> None:
    rows = [Made("q", "a longer answer", near="x"), Made("p"), Made("Q?", "short", near="x", source=1)]
    fields: dict[str, Any] = {"file": "b.jsonl", "duplicates": "drop_near"}
    selection = selected(rows, ("train", "evaluation"), **fields)
    assert (selection.times.tolist(), selection.held_out.tolist()) == ([0, 1, 0], [False, False, True])
    assert selection.kept.tolist() == [2, 1, 2]


def test_a_source_that_only_repeats_the_evaluation_file_is_refused() -> None:
    rows = [*singles(3), *singles(2, source=1), *singles(4, source=2)]
    with pytest.raises(DataError) as caught:
        selected(rows, ("train", "train", "evaluation"), file="c.jsonl", duplicates="drop_exact")
    assert caught.value.problem.startswith("a.jsonl: each of its 3 rows repeats a row of evaluation.file")
    rows[0] = Made("another")
    with pytest.raises(DataError, match=r"b\.jsonl: each of its 2 rows repeats"):
        selected(rows, ("train", "train", "evaluation"), file="c.jsonl", duplicates="drop_exact")


@pytest.mark.parametrize("use", ["train", "general"])
@pytest.mark.parametrize("duplicates", ["keep", "drop_exact"])
def test_the_evaluation_file_is_no_source_of_training_rows(use: str, duplicates: str) -> None:
    rows = [*singles(3), *[Made(f"p {i}", source=1) for i in range(3)], *[Made(f"p {i}", source=2) for i in range(3)]]
    material = material_of(rows, ("train", use, "evaluation"))
    same = tuple(
        file.model_copy(update={"digest": file.digest.replace("c.jsonl", "b.jsonl")}) for file in material.files
    )
    general = {"general": "b.jsonl"} if use == "general" else {}
    with pytest.raises(DataError) as caught:
        select_rows(replace(material, files=same), recipe_of(file="c.jsonl", duplicates=duplicates, **general))
    assert "b.jsonl is named as training rows and as evaluation.file (c.jsonl holds the same)" in caught.value.problem
    assert f"data.{use}" in caught.value.remedy


def test_shared_prompts_are_refused() -> None:
    rows = [*singles(3), Made("question 1", "another", source=1)]
    with pytest.raises(DataError) as caught:
        selected(rows, ("train", "evaluation"), file="b.jsonl")
    assert "1 of 1 evaluation rows have a prompt that is also in a.jsonl: b.jsonl:1." in caught.value.problem
    with pytest.raises(DataError, match="1 of 1 evaluation rows"):  # Another answer is no duplicate.
        selected(rows, ("train", "evaluation"), file="b.jsonl", duplicates="drop_exact")


# --------------------------------------------------------------------------------------------------------------- weights


def test_weights_are_exact() -> None:
    rows = [
        *singles(40),
        *[Made(f"b {i}", source=1) for i in range(30)],
        *[Made(f"c {i}", source=2) for i in range(20)],
    ]
    selection = selected(rows, ("train",) * 3, (1.0, 2.5, 0.25))
    times = selection.times
    assert (times[:40] == 1).all()
    assert (times[40:70].sum(), times[40:70].min(), times[40:70].max()) == (75, 2, 3)
    assert (times[70:].sum(), times[70:].max()) == (5, 1)
    assert counts(selection) == {"thinned": 15, "repeated": 45}


@pytest.mark.parametrize("general", [{}, {"general": "c.jsonl"}])
def test_a_weight_that_leaves_no_example_is_refused(general: dict[str, str]) -> None:
    rows = [
        *singles(270),
        *[Made(f"b {i}", source=1) for i in range(10)],
        *[Made(f"c {i}", source=2) for i in range(9)],
    ]
    uses = ("train", "train", "general" if general else "train")
    with pytest.raises(DataError) as caught:
        selected(rows, uses, (0.001, 1.0), **general)
    assert caught.value.problem == "a.jsonl: weight 0.001 leaves 0 examples of its 270 rows that could train."
    assert "0.0037 or more" in caught.value.remedy
    assert selected(rows, uses, (0.0037, 1.0), **general).times[:270].sum() == 1


def test_the_same_rows_are_held_out_whatever_the_weights() -> None:
    rows = [*singles(40), *[Made(f"b {i}", source=1) for i in range(40)]]
    plain = selected(rows, ("train",) * 2, split=0.2)
    weighted = selected(rows, ("train",) * 2, (0.5, 3.0), split=0.2)
    assert (plain.held_out == weighted.held_out).all()
    assert weighted.times[weighted.held_out].sum() == 0
    kept = ~plain.held_out[40:]
    assert (weighted.times[40:][kept] == 3).all()


# --------------------------------------------------------------------------------------------------------------- general


def test_general_rows_repeat_only_when_there_are_too_few() -> None:
    rows = [*singles(95), *[Made(f"g {i}", source=1) for i in range(2)]]
    fields: dict[str, Any] = {"general": "b.jsonl"}
    selection = selected(rows, ("train", "general"), **fields)
    assert sorted(selection.times[95:].tolist()) == [2, 3]
    assert counts(selection) == {"mixed_in": 5}
    many = [*singles(95), *[Made(f"g {i}", source=1) for i in range(50)]]
    assert counts(selected(many, ("train", "general"), **fields)) == {"mixed_in": 5, "general_not_drawn": 45}


def test_general_rows_that_are_all_held_out_are_refused() -> None:
    rows = [*singles(10), *[Made(f"question {i}", "hm", source=1) for i in range(10)]]
    selection = selected(rows, ("train", "general"), split=0.5, general="b.jsonl")
    assert counts(selection)["general_held_out"] == 5
    held = [Made("h", source=2), Made("H", "hm", source=1), Made("q")]
    with pytest.raises(DataError, match="all of its 1 rows are held out or repeat others"):
        selected(
            sorted(held, key=lambda row: row.source),
            ("train", "general", "evaluation"),
            file="c.jsonl",
            general="b.jsonl",
        )


# --------------------------------------------------------------------------------------------------------------- balance


def test_balance_is_of_what_trains() -> None:
    rows = [Made(f"q {i}", domain="large" if i % 4 else "small") for i in range(200)]
    selection = selected(rows, split=0.2, balance="equal")
    small = np.array([row.domain == "small" for row in rows])
    assert (selection.times[small].sum(), selection.times[~small].sum()) == (40, 40)
    assert selection.held_out.sum() == 40, "held-out rows are not balanced: they measure what will be asked"
    assert counts(selection) == {"balanced_away": 80}


def test_balance_says_which_rows_stay_and_weights_how_often_they_train() -> None:
    rows = [Made(f"q {i}", domain="large" if i % 4 else "small") for i in range(200)]
    rows += [Made(f"b {i}", domain="large", source=1) for i in range(100)]
    plain = selected(rows, ("train", "train"), balance="equal")
    weighted = selected(rows, ("train", "train"), (3.0, 0.5), balance="equal")
    balanced_away = REASONS.index("balanced_away")
    assert ((plain.reason == balanced_away) == (weighted.reason == balanced_away)).all()
    assert weighted.times[:200].sum() == 3 * plain.times[:200].sum()
    assert weighted.times[200:].sum() == round(0.5 * plain.times[200:].sum())
    assert 0 < plain.times[200:].sum() < 100


# ----------------------------------------------------------------------------------------------------------------- split


def test_a_divided_cluster_is_told() -> None:
    rows = [Made(f"convert {i} miles", near="template") for i in range(90)] + singles(10)
    selection = selected(rows, split=0.1)
    (finding,) = selection.findings
    assert (finding.code, finding.count, finding.severity) == ("split_by_prompt", 90, "warning")
    assert selection.held_out.sum() == 10


def test_one_prompt_cannot_be_split() -> None:
    with pytest.raises(DataError, match=r"a\.jsonl has 9 rows with one prompt, so no rows are left for evaluation"):
        selected([Made("q", f"a{i}") for i in range(9)], split=0.1)
    with pytest.raises(DataError, match=r"a\.jsonl has 1 row, so no rows"):
        selected([Made("q")], split=0.1)
