"""Two ranks on one machine: the same sums, steps and adapter as one rank, and only the first writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from onlay import ledger, stages
from onlay.records import Run
from onlay.training.devices import find_devices
from onlay.training.metrics_log import read_metrics
from tests.builders import proofs_of, recipe_for, save_tiny_base, write_rows
from tests.training import two_ranks

ROOT = Path(__file__).parents[2]


def launch(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    """`torch.distributed.run` with two processes, talking over gloo on this machine."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_PORT")
    }
    environment |= {"ONLAY_HOME": str(home), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_two_ranks_agree_and_add_up(tmp_path: Path) -> None:
    launch("-m", "tests.training.two_ranks", str(tmp_path / "found.json"), home=tmp_path)
    found: dict[str, Any] = json.loads((tmp_path / "found.json").read_text())
    assert found["sum"] == 4.0
    assert found["largest"] == 7
    assert found["gradients"] == [[3.0] * 5, [11.0] * 4, [43.0] * 3, [63.0] * 2]
    one = find_devices(folder=tmp_path)
    for name, batch_size in (("uneven", 3), ("fewer_than_ranks", 1), ("out_of_memory", 9)):
        alone = two_ranks.step(one, batch_size=batch_size)
        for key in ("loss", "norm", "first"):
            assert found[name][key] == pytest.approx(alone[key], rel=1e-6), name
    assert found["uneven"]["recoveries"] == found["fewer_than_ranks"]["recoveries"] == 0
    # Rank 0 had memory enough, and halved with the other.
    assert found["out_of_memory"]["recoveries"] > 0
    assert found["out_of_memory"]["budget_tokens"] <= 100


def test_two_ranks_train_the_adapter_that_one_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONLAY_HOME", str(tmp_path / "home-1"))
    base, rows = save_tiny_base(tmp_path / "base"), write_rows(tmp_path / "rows.jsonl", 14)

    def recipe(output: str) -> Any:
        training = {
            "output": str(tmp_path / output),
            "batch_size": 3,
            "epochs": 2,
            "micro_batch_tokens": 100,
            "checkpoint_steps": 4,
        }
        return recipe_for(base, rows, training=training, evaluation={"split": 0.2})

    one = stages.train(recipe("one"))
    (tmp_path / "two.yaml").write_text(recipe("two").to_yaml())
    done = launch("-m", "onlay.cli", "train", str(tmp_path / "two.yaml"), "--json", home=tmp_path / "home-2")
    two = Run.load(tmp_path / "two")
    assert json.loads(done.stdout)["path"] == str(tmp_path / "two")  # One object: one rank speaks.
    assert two.status == one.status == "finished"
    assert two.environment["devices"] == "2"
    assert two.steps == one.steps == two.total_steps == 8
    assert two.trained_tokens == one.trained_tokens
    assert proofs_of(two) == proofs_of(one)
    assert two.evaluation_loss == pytest.approx(one.evaluation_loss, rel=1e-6)
    expected, found = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("one", "two"))
    assert expected.keys() == found.keys()
    furthest = max(float((found[name] - expected[name]).abs().max()) for name in expected)
    assert furthest < 1e-6
    assert all(bool(torch.isfinite(weight).all()) for weight in found.values())
    events = [
        [(e["event"], e["step"]) for e in read_metrics(tmp_path / run / "metrics.jsonl")] for run in ("one", "two")
    ]
    assert events[0] == events[1]
    losses = [[e["loss"] for e in read_metrics(tmp_path / run / "metrics.jsonl")] for run in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    files = [
        sorted(str(path.relative_to(tmp_path / run)) for path in (tmp_path / run).rglob("*")) for run in ("one", "two")
    ]
    assert files[0] == files[1]
    monkeypatch.setenv("ONLAY_HOME", str(tmp_path / "home-2"))
    assert [row.path for row in ledger.runs()] == [two.path]
