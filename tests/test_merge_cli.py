"""`onlay merge` as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from onlay import stages
from onlay.recipe import Recipe
from tests.builders import recipe_for, save_tiny_base, write_rows
from tests.test_cli import call


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    recipe: Recipe = recipe_for(save_tiny_base(Path("base")), write_rows(Path("rows.jsonl"), 12),
                                training={"output": "run", "max_steps": 3, "learning_rate": 0.01})  # fmt: skip
    stages.train(recipe)
    return tmp_path


def test_a_trained_run_is_merged(trained: Path) -> None:
    done = call("merge", "run", "merged", "--rows", "4", "--json", cwd=trained)
    merge = json.loads(done.stdout)
    found = merge["verification"]
    assert (merge["status"], merge["path"], merge["into"], found["rows"]) == ("merged", "merged", "original", 4)
    assert 0 < found["mean_logit_difference"] <= found["limit"]
    assert set(found) >= {"max_logit_difference", "top1_agreement"}
    assert set(found["perplexity"]) == {"adapter", "merged", "base"}
    assert "Traceback" not in done.stderr
    shown = json.loads(call("show", merge["digest"][:12], "--json", cwd=trained).stdout)
    assert {link["kind"] for link in shown["chain"]} == {"run", "recipe", "model", "dataset"}

    again = call("merge", "run", "merged", "--json", cwd=trained, code=2)
    assert "exists already" in json.loads(again.stdout)["error"]


def test_a_merge_that_is_not_proven_fails(trained: Path) -> None:
    failed = call("merge", "run", "merged", "--max-difference", "0", cwd=trained, code=1)
    problem, remedy = failed.stderr.strip().splitlines()[-2:]
    assert "--max-difference is 0" in problem
    assert "merged.rejected" in remedy
    table = call("merge", "run", "other", cwd=trained).stdout
    assert "same likeliest token" in table
    assert "proven" in table
