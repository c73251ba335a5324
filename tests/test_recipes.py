"""Every recipe that comes with the project is one."""

from __future__ import annotations

from pathlib import Path

import pytest

from onlay.data.sources import SUFFIXES
from onlay.recipe import read_recipe

ROOT = Path(__file__).parent.parent
RECIPES = sorted([*(ROOT / "recipes").rglob("*.yaml"), *(ROOT / "onlay" / "examples").rglob("*.yaml")])


def test_there_are_recipes() -> None:
    names = {path.name for path in RECIPES}
    assert {"gsm8k.yaml", "demo.yaml", "text.yaml", "instruct.yaml"} <= names


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_it_parses_and_says_what_it_is_for(path: Path, tmp_path: Path) -> None:
    recipe = read_recipe(path)
    assert Path(recipe.data.train).suffix in SUFFIXES
    assert path.read_text().startswith("# ")
    again = tmp_path / "again.yaml"
    again.write_text(recipe.to_yaml())
    assert read_recipe(again).digest == recipe.digest


def test_gsm8k_reads_the_real_rows(data_folder: Path) -> None:
    from onlay.data.read import scan

    train = data_folder / "gsm8k" / "train.jsonl"
    recipe = read_recipe(ROOT / "recipes" / "gsm8k.yaml", [f"data.train={train}"])
    found = scan(recipe.data.train, recipe.data, limit=50)
    assert (found.format, found.rows) == ("prompt_completion", 50)
