from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from onlay.errors import DataError
from onlay.hardware import Device, Hardware
from onlay.recipe import DataSection, field_paths, parse_recipe, read_recipe
from onlay.starter import CANDIDATES, MOST_ROWS, choose_base, look_at, propose

FIELD = re.compile(r"^  #(?=\w+: )", re.MULTILINE)


def hardware(gibibytes: float | None) -> Hardware:
    devices = []
    if gibibytes is not None:
        devices = [Device(name="Some GPU", memory_bytes=int(gibibytes * 2**30), compute_capability=(9, 0))]
    return Hardware(devices=devices, cpu_cores=2, host_memory_bytes=2**34, platform="Linux x86_64")


def rows_file(folder: Path, count: int) -> Path:
    path = folder / "support.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{n}", "completion": "four"}) + "\n" for n in range(count)))
    return path


@pytest.mark.parametrize("count", [1, 9, 60, 700, 6_000, 25_000])
def test_the_text_is_a_recipe_with_and_without_its_commented_fields(tmp_path: Path, count: int) -> None:
    data = rows_file(tmp_path, count)
    text, summary = propose(data, hardware(None))
    path = tmp_path / "support.yaml"
    path.write_text(text)
    active = read_recipe(path)
    assert active.data.train == str(data)
    assert active.data.format == "prompt_completion"
    assert f"{count:,} rows" in summary[0]
    path.write_text(FIELD.sub("  ", text))
    whole = read_recipe(path)
    assert whole == active
    assert whole.digest == active.digest
    # Held-out rows exist where the split is on.
    assert active.evaluation.split is None or active.evaluation.split * count >= 1


def test_every_field_is_there_once_with_its_default_and_words(tmp_path: Path) -> None:
    text, _ = propose(rows_file(tmp_path, 700), hardware(None))
    lines = text.splitlines()
    section, found = "", {}
    for before, line in zip(["", *lines], lines, strict=False):
        if re.match(r"^\w+:$", line):
            section = line[:-1]
        elif match := re.match(r"^  (#?)(\w+): (.*)$", line):
            key = f"{section}.{match[2]}"
            assert key not in found
            assert before.startswith("  # "), f"{key} has no words"
            found[key] = (match[1] == "#", yaml.safe_load(match[3]))
    of_other_methods = {"adapter.learning_rate_ratio", "adapter.svd_iterations"}
    assert set(found) == set(field_paths()) - of_other_methods
    base = parse_recipe({"model": {"base": "x"}, "data": {"train": "y"}})
    for key, (commented, value) in found.items():
        part, field = key.split(".")
        if commented:
            assert getattr(getattr(base, part), field) == value, key
    assert len(max(lines, key=len)) <= 120 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("gibibytes", "expected"),
    [
        (None, "HuggingFaceTB/SmolLM2-135M-Instruct"),
        (0.2, "HuggingFaceTB/SmolLM2-135M-Instruct"),
        (1, "HuggingFaceTB/SmolLM2-360M-Instruct"),
        (4, "Qwen/Qwen3-0.6B"),
        (8, "Qwen/Qwen3-1.7B"),
        (15, "Qwen/Qwen3-4B"),
        (24, "Qwen/Qwen3-8B"),
        (40, "Qwen/Qwen3-14B"),
        (141, "Qwen/Qwen3-32B"),
    ],
)
def test_the_base_fits_the_device(gibibytes: float | None, expected: str) -> None:
    assert choose_base(hardware(gibibytes)).name == expected


def test_the_table_goes_from_small_to_large() -> None:
    assert [one.num_parameters for one in CANDIDATES] == sorted(one.num_parameters for one in CANDIDATES)
    assert {one.licence for one in CANDIDATES} == {"Apache-2.0"}


def test_what_the_user_said_about_the_data_is_active(tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text(json.dumps({"frage": "a: b", "antwort": "c"}) + "\n")
    with pytest.raises(DataError, match="no known format"):
        propose(path, hardware(None))
    section = DataSection.model_validate({"train": str(path), "prompt_field": "frage", "answer_field": "antwort"})
    text, _ = propose(path, hardware(None), section=section, base="pocket")
    recipe = parse_recipe(yaml.safe_load(text))
    assert (recipe.data.prompt_field, recipe.data.answer_field, recipe.model.base) == ("frage", "antwort", "pocket")


def test_paths_and_names_that_yaml_would_misread_are_quoted(tmp_path: Path) -> None:
    folder = tmp_path / "a: b # c"
    folder.mkdir()
    data = rows_file(folder, 3)
    text, _ = propose(data, hardware(None))
    assert parse_recipe(yaml.safe_load(text)).data.train == str(data)


def test_an_empty_file_is_an_error_and_long_files_are_not_read_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError):
        propose(rows_file(tmp_path, 0), hardware(None))
    monkeypatch.setattr("onlay.starter.MOST_ROWS", 25)
    path = rows_file(tmp_path, 100)
    look = look_at(str(path), DataSection.model_validate({"train": str(path)}))
    assert (look.rows, look.all_rows) == (25, False)
    assert look.words.startswith("more than 25 rows")
    assert MOST_ROWS == 200_000


def test_strings_are_counted_wherever_they_are(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "defg"}]
    path.write_text(json.dumps({"messages": turns}) + "\n")
    look = look_at(str(path), DataSection.model_validate({"train": str(path)}))
    assert look.format == "messages"
    assert look.mean_characters == len("userabcassistantdefg")
