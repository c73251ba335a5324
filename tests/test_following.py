"""The plan that training makes and follows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from onlay.errors import BaseModelError, RecipeError, SetupError
from onlay.hardware import Device
from onlay.planning.lengths import equal_rows
from onlay.planning.shapes import find_shape
from onlay.recipe import Recipe, parse_recipe
from onlay.records import ForecastCheck, ModelFacts, Plan, Run
from onlay.stages.following import follow_plan, follow_steps, plan_known, plan_run, with_forecast
from onlay.stages.lengths import KnownLengths, lengths_of, recall_lengths
from onlay.training.loop import StepReport

H200 = Device(name="NVIDIA H200", memory_bytes=143_771 * 2**20, compute_capability=(9, 0))
RTX3070 = Device(name="NVIDIA GeForce RTX 3070", memory_bytes=8192 * 2**20, compute_capability=(8, 6))
KNOWN = KnownLengths(lengths=equal_rows(500, 700), trained_share=0.5, held_out_rows=20)
LLAMA = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ONLAY_HOME", str(tmp_path / "home"))


def recipe_of(**sections: Any) -> Recipe:
    values: dict[str, Any] = {"model": {"base": "llama-3.1-8b"}, "data": {"train": "absent.jsonl"}}
    return parse_recipe({name: values.get(name, {}) | sections.get(name, {}) for name in {*values, *sections}})


def planned(recipe: Recipe, *, device: Device = H200, gpus: int = 1) -> Plan:
    return plan_known(recipe, find_shape(recipe.model.base), KNOWN, device=device, gpus=gpus)


class Split(list[int]):
    @property
    def lengths(self) -> Sequence[int]:
        return self


def prepared(folder: Path, *, model_type: str = "llama", recipe: Recipe | None = None) -> Any:
    (folder / "config.json").write_text(json.dumps(LLAMA | {"model_type": model_type}))
    facts = ModelFacts(
        name="tiny", path=str(folder), revision=None, licence=None, architecture="", model_type=model_type, num_parameters=0,
        weight_bytes=0, vocabulary_size=96, context_tokens=64, hidden_size=32, num_layers=2, linear_shapes={}, weight_fingerprint="",
    )  # fmt: skip
    splits = {
        "train": SimpleNamespace(tokens=140, trained_tokens=35, examples=10),
        "evaluation": SimpleNamespace(tokens=14, trained_tokens=3, examples=1),
    }
    return SimpleNamespace(
        source=SimpleNamespace(recipe=recipe or recipe_of(), facts=facts), split=lambda name: Split([10] * 6 + [20] * 4),
        dataset=SimpleNamespace(splits=splits),
    )  # fmt: skip


def test_a_run_is_planned_from_its_own_rows(tmp_path: Path) -> None:
    told: list[Any] = []
    made = plan_run(prepared(tmp_path), device=H200, gpus=1, report=told.append)
    assert made is not None and (made.rows, made.mean_tokens) == (10, 14.0) and made.settings.fast_path
    assert 5 <= len(told) <= 10 and "parameters train" in told[0]
    found = recall_lengths(recipe_of())
    assert found is not None and found.lengths.counts == {10: 6, 20: 4} and found.held_out_rows == 1


def test_without_a_gpu_or_a_closed_form_there_is_no_plan(tmp_path: Path) -> None:
    told: list[Any] = []
    assert plan_run(prepared(tmp_path), device=None, gpus=1, report=told.append) is None and told == []
    assert plan_run(prepared(tmp_path, model_type="unheard_of"), device=H200, gpus=1, report=told.append) is None
    assert told == ["no plan: there is no closed form for unheard_of"]
    with pytest.raises(BaseModelError, match="tokens go to experts"):
        planned(recipe_of(model={"base": "mixtral-8x7b"}))


def test_what_the_recipe_leaves_open_is_as_planned() -> None:
    recipe = recipe_of(adapter={"rank": 4})
    made = planned(recipe, device=RTX3070)
    followed = follow_plan(recipe, made)
    assert followed.model.storage == made.settings.storage == "nf4"
    assert followed.training.optimizer == made.settings.optimizer
    assert followed.training.micro_batch_tokens == made.settings.micro_batch_tokens >= 700
    assert followed.training.offload_activations == made.settings.offload_activations
    assert followed.adapter == recipe.adapter and followed.data == recipe.data
    assert len(made.settings.levels) == 32


def test_a_recipe_is_followed_or_not_begun() -> None:
    asked = {
        "model": {"storage": "nf4"},
        "training": {"optimizer": "adamw_8bit", "micro_batch_tokens": 1400, "recompute": 3},
    }
    recipe = recipe_of(**asked)
    followed = follow_plan(recipe, planned(recipe))
    assert followed == recipe
    with pytest.raises(RecipeError, match=r"model\.storage = bf16 does not fit RTX 3070"):
        planned(recipe_of(model={"storage": "bf16"}, training={"recompute": "none"}), device=RTX3070)


def test_nothing_is_planned_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    made = planned(recipe_of(), device=Device(name="NVIDIA L4", memory_bytes=23034 * 2**20, compute_capability=(8, 9)))
    assert (made.settings.storage, made.settings.optimizer) == ("bf16", "adamw")
    assert not any(rung.setting.startswith("nf4") or "8bit" in rung.setting for rung in made.rungs)
    with pytest.raises(SetupError, match="does not fit"):
        planned(recipe_of(), device=RTX3070)


def test_several_gpus_are_planned_for() -> None:
    one, two = planned(recipe_of()), planned(recipe_of(), gpus=2)
    assert two.gpus == 2 and two.time.training_seconds < one.time.training_seconds


def test_a_found_gpu_that_no_table_knows_has_anothers_rates() -> None:
    device = Device(name="NVIDIA Unheard Of", memory_bytes=40 * 2**30, compute_capability=(9, 0))
    made = planned(recipe_of(), device=device)
    assert made.gpu == "NVIDIA Unheard Of" and made.memory.device_bytes == 40 * 2**30 and not made.time.verified
    assert made.cost.usd is None and any("not in the table" in note for note in made.notes)


def test_the_run_holds_forecast_against_actual() -> None:
    made = planned(recipe_of())
    told: list[Any] = []
    report, watch = follow_steps(told.append, made)
    for number in range(1, 23):
        report(
            StepReport(
                step=number, total_steps=94, loss=1.0, learning_rate=1e-4, grad_norm=1.0, tokens=16 * 700, seconds=2.0, memory_bytes=1
            )
        )  # fmt: skip
    report("a line")
    words = [event for event in told if isinstance(event, str)]
    assert len(told) == 22 + 2 and words[0].startswith("after 20 steps: training will take") and words[1] == "a line"
    run = Run(path="r", status="finished", started="", seconds=190.0, steps=94, total_steps=94, examples=500, trained_tokens=1, peak_memory_bytes=7)  # fmt: skip
    found = with_forecast(run, watch).forecast
    assert isinstance(found, ForecastCheck)
    assert (found.peak_bytes, found.training_seconds, found.step_seconds) == (7, 190.0, 2.0)
    assert found.corrected_training_seconds == pytest.approx(2 * 94)
    broken = with_forecast(run.model_copy(update={"status": "interrupted"}), watch).forecast
    assert broken is not None and broken.training_seconds is None


def test_lengths_are_those_of_the_training_rows(tmp_path: Path) -> None:
    found = lengths_of(prepared(tmp_path))
    assert dict(found.lengths.counts) == {10: 6, 20: 4} and (found.trained_share, found.held_out_rows) == (0.25, 1)
