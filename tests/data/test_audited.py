from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onlay.data import audited
from onlay.data.audited import ARRAYS, read_audited
from onlay.data.material import Material
from onlay.data.rows import RowTable
from onlay.errors import DataError, OutputError
from onlay.recipe import Recipe, parse_recipe


def rows(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    draw = np.random.default_rng(seed)
    words = ["river", "boat", "seven", "mast", "weather", "harbour", "stone", "lamp", "winter", "copper", "field"]
    return [
        {"prompt": f"{i}: {' '.join(draw.choice(words, 9))}?", "completion": " ".join(draw.choice(words, 9)), "domain": f"d{i % 3}"}
        for i in range(count)
    ]  # fmt: skip


def write(path: Path, content: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(one) + "\n" for one in content))
    return str(path)


@pytest.fixture
def recipe_of(tmp_path: Path) -> Callable[..., Recipe]:
    train = write(tmp_path / "a.jsonl", rows(20) + rows(1))
    general = write(tmp_path / "general.jsonl", rows(5, seed=1))
    held_out = write(tmp_path / "held_out.jsonl", rows(4, seed=2))

    def made(*, adapter: str = "lora", **data: Any) -> Recipe:
        values = {"train": train, "general": general} | data
        return parse_recipe({"model": {"base": "b"}, "data": values, "adapter": {"method": adapter}, "evaluation": {"file": held_out}})  # fmt: skip

    return made


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """The recipes whose rows were really read."""
    made: list[Recipe] = []
    read = audited.read_material

    def counting(recipe: Recipe, **options: Any) -> Material:
        made.append(recipe)
        return read(recipe, **options)

    monkeypatch.setattr(audited, "read_material", counting)
    return made


def same(one: Material, other: Material) -> bool:
    arrays = all(
        np.array_equal(getattr(one.table, name), getattr(other.table, name))
        and getattr(one.table, name).dtype == getattr(other.table, name).dtype
        for name in ARRAYS
    )
    rest = [(m.sources, m.files, m.findings, m.table.domains, m.clusters.tolist(), m.clusters.dtype) for m in (one, other)]  # fmt: skip
    return arrays and rest[0] == rest[1]


def test_every_array_of_the_table_is_kept() -> None:
    assert set(ARRAYS) == set(RowTable._arrays())


def test_the_second_start_reads_nothing(recipe_of: Callable[..., Recipe], reads: list[Recipe], tmp_path: Path) -> None:
    first = read_audited(recipe_of(), folder=tmp_path / "kept")
    assert first.findings and len(first.table) == 30 and first.table.domains
    again = read_audited(recipe_of(), folder=tmp_path / "kept")
    assert len(reads) == 1
    assert same(first, again)
    (path,) = (tmp_path / "kept").iterdir()
    assert b"harbour" not in path.read_bytes(), "no text of the rows"


def test_whatever_the_findings_depend_on_is_read_again(
    recipe_of: Callable[..., Recipe], reads: list[Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terms = tmp_path / "terms.txt"
    terms.write_text("harbour\n")

    def look(**fields: Any) -> Material:
        return read_audited(recipe_of(**fields), folder=tmp_path / "kept")

    look()
    look(near_threshold=0.9)
    look(max_rows=10)
    look(adapter="full")
    found = look(terms=str(terms))
    terms.write_text("harbour\nriver\n")
    more = look(terms=str(terms))
    assert found.findings != more.findings
    for name in ("a", "general", "held_out"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(path.read_text() + json.dumps(rows(40)[-1]) + "\n")
        look()
    monkeypatch.setattr(audited, "_code_digest", lambda: "other rules")
    look()
    assert len(reads) == 10
    terms.unlink()
    with pytest.raises(DataError, match=r"terms\.txt"):
        look(terms=str(terms))


@pytest.mark.parametrize("damage", ["empty", "cut", "changed", "other"])
def test_a_damaged_file_is_made_again(
    recipe_of: Callable[..., Recipe], reads: list[Recipe], tmp_path: Path, damage: str
) -> None:
    first = read_audited(recipe_of(), folder=tmp_path / "kept")
    (path,) = (tmp_path / "kept").iterdir()
    whole = path.read_bytes()
    at = whole.index(first.table.row_key.tobytes()) + 5
    path.write_bytes(
        {"empty": b"", "cut": whole[: len(whole) // 2], "other": b"no archive",
         "changed": whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]}[damage]
    )  # fmt: skip
    assert same(read_audited(recipe_of(), folder=tmp_path / "kept"), first)
    assert path.read_bytes() == whole
    read_audited(recipe_of(), folder=tmp_path / "kept")
    assert len(reads) == 2
    assert list((tmp_path / "kept").iterdir()) == [path]


def test_what_was_read_while_a_file_changed_is_not_kept(
    recipe_of: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = audited.read_material

    def changing(recipe: Recipe, **options: Any) -> Material:
        write(tmp_path / "a.jsonl", rows(25))
        return read(recipe, **options)

    monkeypatch.setattr(audited, "read_material", changing)
    assert len(read_audited(recipe_of(), folder=tmp_path / "kept").table) == 34
    assert not (tmp_path / "kept").exists()


def test_rows_at_fault_are_never_kept(recipe_of: Callable[..., Recipe], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{broken\n')
    for _ in range(2):
        with pytest.raises(DataError, match=r"a\.jsonl:2"):
            read_audited(recipe_of(), folder=tmp_path / "kept")


def test_a_folder_that_cannot_be_written_is_told(recipe_of: Callable[..., Recipe], tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("a file")
    with pytest.raises(OutputError, match="could not be written"):
        read_audited(recipe_of(), folder=tmp_path / "kept")
