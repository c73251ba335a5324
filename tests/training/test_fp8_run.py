"""A base in FP8, from recipe to merged model: it learns as its wide twin does, resumes to the bit, answers and is merged."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from onlay import stages
from onlay.model.quantize import QuantizedLinear, round_trip
from onlay.recipe import Recipe
from onlay.records import Run
from onlay.training.loop import StepReport
from tests.builders import proofs_of, recipe_for

STEPS = 10
CASES: dict[str, tuple[dict[str, str], str]] = {
    "wide": ({"storage": "bf16"}, "lora"),
    "rebuilt": ({"storage": "fp8"}, "lora"),
    "fp8": ({"storage": "fp8", "compute": "fp8"}, "lora"),
    "fp8-dora": ({"storage": "fp8", "compute": "fp8"}, "dora"),
    "nf4": ({"storage": "nf4"}, "lora"),
    "nf4-fp8": ({"storage": "nf4", "compute": "fp8"}, "lora"),
}
IN_FP8 = [name for name, (model, _) in CASES.items() if model.get("compute") == "fp8"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    texts = ["".join(chr(ord("b") + (start * 5 + i) % 12) for i in range(10 + start % 9)) for start in range(40)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def recipe_of(trained_base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Recipe]:
    folder = tmp_path_factory.mktemp("runs")

    def recipe(name: str, output: str) -> Recipe:
        model, method = CASES[name]
        training: dict[str, Any] = {"max_steps": STEPS, "learning_rate": 5e-3, "checkpoint_steps": 3, "batch_size": 4}
        return recipe_for(
            trained_base, rows, adapter={"method": method}, model=model,
            training=training | {"output": str(folder / f"{name}-{output}")},
            evaluation={"split": 0.2, "select": "last", "every_steps": 5},
        )  # fmt: skip

    return recipe


@pytest.fixture(scope="module")
def runs(recipe_of: Callable[[str, str], Recipe], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONLAY_HOME", str(tmp_path_factory.mktemp("home")))
        return {name: stages.train(recipe_of(name, "whole")) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_ten_steps_learn_something(name: str, runs: dict[str, Run]) -> None:
    run = runs[name]
    assert (run.status, run.steps, run.storage) == ("finished", STEPS, CASES[name][0]["storage"])
    assert run.base_evaluation_loss is not None
    assert run.evaluation_loss is not None
    assert run.evaluation_loss < run.base_evaluation_loss
    assert run.proofs["base_unchanged"]
    assert run.proofs["movement"] == {"moved_modules": 14, "modules_without_tokens": []}
    assert run.fast_paths.get("products", "").startswith("14 layers multiply in FP8" if name in IN_FP8 else "")
    assert ("products" in run.fast_paths) == (name in IN_FP8)
    notes = json.loads((Path(run.path) / "adapter" / "onlay.json").read_text())
    assert notes["storage"] == run.storage


@pytest.mark.parametrize(
    ("name", "twin"), [("rebuilt", "wide"), ("fp8", "wide"), ("fp8", "rebuilt"), ("nf4-fp8", "nf4")]
)
def test_it_learns_as_its_wide_twin_does(name: str, twin: str, runs: dict[str, Run]) -> None:
    """What ten steps gain differs by less than a tenth of itself; the losses are others, or nothing was compared."""
    [found, wide] = [(run.base_evaluation_loss, run.evaluation_loss) for run in (runs[name], runs[twin])]
    assert found[0] is not None and found[1] is not None and wide[0] is not None and wide[1] is not None
    assert found != wide
    assert abs((found[0] - found[1]) - (wide[0] - wide[1])) < 0.1 * (wide[0] - wide[1])


@pytest.mark.parametrize("name", IN_FP8)
def test_an_interrupted_run_ends_as_the_whole_one(
    name: str, runs: dict[str, Run], recipe_of: Callable[[str, str], Recipe]
) -> None:
    def report(event: Any) -> None:
        if isinstance(event, StepReport) and event.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    run = stages.train(recipe_of(name, "broken"), report=report)
    assert (run.status, run.steps) == ("interrupted", 5)
    run = stages.train(resume=run.path)
    assert (run.status, run.steps) == ("finished", STEPS)
    assert run.evaluation_loss == runs[name].evaluation_loss
    assert proofs_of(run) == proofs_of(runs[name])
    weights, whole = (load_file(Path(r.path) / "adapter" / "adapter_model.safetensors") for r in (run, runs[name]))
    assert weights.keys() == whole.keys()
    assert all(torch.equal(weights[key], whole[key]) for key in whole)


@pytest.mark.parametrize("name", IN_FP8)
def test_its_answers_come_from_the_same_products(name: str, runs: dict[str, Run]) -> None:
    model = stages.open_run(runs[name].path).model
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert len(layers) == 14
    assert all(layer.fp8_products and layer.storage == runs[name].storage for layer in layers)
    [answer] = stages.generate(runs[name].path, ["bcd"])
    assert answer["answer"]


@pytest.mark.parametrize("name", ["rebuilt", "fp8", "nf4-fp8"])
def test_it_is_merged_with_proof(name: str, runs: dict[str, Run], tmp_path: Path, trained_base: Path) -> None:
    merge = stages.merge(runs[name].path, tmp_path / "merged")
    assert (merge.status, merge.into, merge.storage) == ("merged", "quantized", runs[name].storage)
    assert merge.verification.passed
    assert merge.verification.proven_mean_difference is not None
    assert merge.verification.base_mean_logit_difference is not None
    assert 1e3 * merge.verification.proven_mean_difference < merge.verification.base_mean_logit_difference
    before, after = (load_file(folder / "model.safetensors") for folder in (trained_base, tmp_path / "merged"))
    weights = load_file(Path(runs[name].path) / "adapter" / "adapter_model.safetensors")
    module = "model.layers.1.mlp.down_proj"
    a, b = (weights[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB")
    expected = round_trip(before[f"{module}.weight"].float(), storage=runs[name].storage) + 2.0 * b @ a
    error = (after[f"{module}.weight"].float() - expected).abs().max()
    assert error <= 2 * torch.finfo(after[f"{module}.weight"].dtype).eps * expected.abs().max()


def test_it_is_evaluated_and_registered_as_it_was_trained(runs: dict[str, Run], tmp_path: Path) -> None:
    """Likelihood on the held-out rows is the run's own: where float32 differs in its last bit, a number of FP8 may in a step."""
    for name in ("fp8", "nf4-fp8"):
        report = stages.evaluate(runs[name].path, overrides=["evaluation.max_new_tokens=4", "evaluation.general=[]"])
        found = {row.system: row.nats_per_token for row in report.likelihood if row.text == "held_out"}
        assert found["adapter"] == pytest.approx(runs[name].evaluation_loss, rel=1e-3)
        assert found["base"] == pytest.approx(runs[name].base_evaluation_loss, rel=1e-3)
        version = stages.register(runs[name].path, name=name).version
        assert version.storage == runs[name].storage
        layers = [m for m in stages.open_run(f"{name}@1").model.modules() if isinstance(m, QuantizedLinear)]
        assert len(layers) == 14
        assert all(layer.fp8_products for layer in layers)
