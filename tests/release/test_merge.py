"""Merging: exact in float64 for every kind of update, the base's files kept, wrong merges found out, memory bounded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GptOssConfig

from onlay import ledger, stages
from onlay.errors import BaseModelError, OutputError, ProofError
from onlay.hardware import find_hardware
from onlay.model.adapter import attach, load_adapter, save_adapter
from onlay.model.facts import read_facts
from onlay.model.load import load_base
from onlay.model.stored_names import find_places, model_without_weights
from onlay.model.updates import Updates
from onlay.model.weight_files import read_tensors
from onlay.recipe import LoraAdapter, ModelSection, Recipe, read_recipe
from onlay.records import Dataset, Merge, ModelFacts, Run
from onlay.release import shards
from onlay.release.shards import Change, write_shards
from onlay.release.verify import RATIO, Logits, choose_rows, difference, logits_of, round_again
from tests.builders import (
    VOCABULARY,
    AllFloat64,
    random_examples,
    recipe_for,
    save_tiny_base,
    shake,
    tiny_model,
    tiny_tokenizer,
    write_rows,
)


def quiet(*_: Any) -> None:
    pass


# ------------------------------------------------------------------------------------------------- exact, in float64


def save_base_float64(folder: Path, name: str, **changes: Any) -> ModelFacts:
    if name == "gpt_oss":  # Its files hold fused experts, transposed, as one tensor.
        config = GptOssConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2, initializer_range=0.2,
            pad_token_id=None, eos_token_id=257, **changes,
        )  # fmt: skip
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config).double()
    else:
        model = tiny_model(name, dtype=torch.float64, **changes)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return read_facts(ModelSection(base=str(folder)))


def load_float64(folder: Path) -> Any:
    options = {"dtype": torch.float64, "experts_implementation": "eager", "attn_implementation": "eager"}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
    return model.eval()


def shake_adapter(adapted: nn.Module, *, scale: float = 0.1) -> None:
    """As `shake`, but DoRA's magnitudes stay about what they are: near zero they would hide the rest."""
    before = {name: p.detach().clone() for name, p in adapted.named_parameters() if "magnitude" in name}
    shake(adapted, scale=scale)
    for name, p in adapted.named_parameters():
        if name in before:
            p.data.add_(before[name])


def save_shaken_adapter(model: nn.Module, section: LoraAdapter, folder: Path, facts: ModelFacts) -> None:
    adapted, _ = attach(model, section, seed=0)
    shake_adapter(adapted)
    save_adapter(adapted, folder, facts=facts, extra={})


def write_merged(facts: ModelFacts, adapter: Path, out: Path) -> list[str]:
    """Merges without a proof; returns the parameters that changed."""
    tensors = read_tensors(Path(facts.path), facts.name)
    updates = Updates(model_without_weights(facts), adapter)
    places = find_places(model_without_weights(facts), tensors, updates.parameters)
    out.mkdir()
    changes = {name: Change(place=place, updated=True) for name, place in places.items()}
    write_shards(tensors, changes, updates, out, progress=quiet)
    shutil.copyfile(Path(facts.path) / "config.json", out / "config.json")
    return updates.parameters


def logits64(model: nn.Module) -> Logits:
    batches = choose_rows(random_examples(6), rows=6, vocabulary_size=VOCABULARY, seed=0)
    with AllFloat64():
        return logits_of(model, batches, compute_dtype=torch.float64, progress=quiet)


CASES = [
    ("llama", {}, {}),
    ("llama", {"alpha": 3.0, "method": "rslora"}, {}),
    ("llama", {"method": "dora"}, {}),
    ("llama", {"method": "pissa"}, {}),
    ("llama", {"targets": ["q_proj", "down_proj"]}, {"tie_word_embeddings": True}),
    ("qwen3", {"method": "rslora"}, {}),
    ("gpt2", {}, {}),
    ("gpt2", {"method": "dora"}, {}),
    ("gpt2", {"bias": "all"}, {}),
    ("opt", {"bias": "lora_only"}, {}),
    ("phi3", {"rank": 1}, {}),
    ("gemma3", {"method": "dora"}, {}),
    ("mixtral", {}, {}),
    ("qwen3_moe", {"method": "rslora"}, {}),
    ("gpt_oss", {"rank": 3}, {}),
    ("falcon_h1", {}, {}),
]


@pytest.mark.parametrize(("name", "adapter", "base"), CASES, ids=[f"{c[0]} {c[1]}{c[2]}" for c in CASES])
def test_merged_equals_base_and_adapter_in_float64(
    tmp_path: Path, name: str, adapter: dict[str, Any], base: dict[str, Any]
) -> None:
    facts = save_base_float64(tmp_path / "base", name, **base)
    section = recipe_for("base", "rows", adapter=adapter).adapter
    assert isinstance(section, LoraAdapter)
    save_shaken_adapter(load_float64(tmp_path / "base"), section, tmp_path / "adapter", facts)
    plain = logits64(load_float64(tmp_path / "base"))
    together = load_adapter(load_float64(tmp_path / "base"), tmp_path / "adapter", facts=facts)
    adapted = logits64(together)

    parameters = write_merged(facts, tmp_path / "adapter", tmp_path / "merged")
    model = load_float64(tmp_path / "merged")
    merged = logits64(model)
    round_again(model, parameters, stored=torch.float64, seed=0)
    noise = difference(logits64(model), merged)

    assert difference(merged, adapted).mean <= RATIO * noise.mean
    assert difference(merged, plain).mean > 1e6 * noise.mean


def test_the_experts_of_one_parameter_do_not_change_places(tmp_path: Path) -> None:
    """A single expert is adapted: only its own stored tensors change."""
    facts = save_base_float64(tmp_path / "base", "mixtral", num_hidden_layers=1)
    save_shaken_adapter(
        load_float64(tmp_path / "base"), LoraAdapter(rank=2, targets="mlp"), tmp_path / "adapter", facts
    )
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    for key, weight in weights.items():
        if "experts" in key and key.endswith("lora_B.weight"):
            kept = weight.reshape(weight.shape[0], -1, 4)
            kept[:, :, [0, 1, 3]] = 0
            weights[key] = kept.reshape(weight.shape)
    save_file(weights, path)
    write_merged(facts, tmp_path / "adapter", tmp_path / "merged")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "merged"))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    experts = {key for key in changed if "experts" in key}
    assert experts == {key for key in before if ".experts.2." in key}
    assert len(experts) == 3


# --------------------------------------------------------------------------------------------------- a whole merge


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", 24)


def finished_run(folder: Path, recipe: Recipe, *, extra: dict[str, Any] | None = None, scale: float = 0.1) -> Path:
    """A run folder as training leaves it, with a drawn adapter instead of a trained one."""
    prepared = stages.prepare(recipe)
    facts = prepared.source.facts
    base = load_base(facts, recipe.model, find_hardware())
    assert isinstance(recipe.adapter, LoraAdapter)
    adapted, _ = attach(base.model, recipe.adapter, seed=0)
    shake_adapter(adapted, scale=scale)
    save_adapter(adapted, folder / "adapter", facts=facts, extra=extra or {})
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    facts.save(folder)
    prepared.dataset.save(folder)
    run = Run(
        sources={"recipe": recipe.digest, "model": facts.digest, "dataset": prepared.dataset.digest}, path=str(folder),
        status="finished", method=recipe.adapter.method, started="2026-11-01T00:00:00+00:00", seconds=1.0, steps=2,
        total_steps=2, examples=3, trained_tokens=4,
    )  # fmt: skip
    run.save(folder)
    return folder


@pytest.fixture
def run(tmp_path: Path, rows: Path) -> Path:
    base = save_tiny_base(tmp_path / "base")
    return finished_run(tmp_path / "run", recipe_for(base, rows, evaluation={"split": 0.3}))


def test_a_merge_is_proven_recorded_and_a_plain_model(run: Path, tmp_path: Path) -> None:
    events: list[Any] = []
    merge = stages.merge(run, tmp_path / "merged", report=events.append)
    found = merge.verification
    assert (merge.status, merge.into, merge.storage, merge.candidates) == ("merged", "original", "bf16", {})
    assert found.passed
    assert None not in (found.max_logit_difference, found.mean_logit_difference, found.limit)
    assert found.split == "evaluation"
    assert found.max_logit_difference >= found.mean_logit_difference > 0
    assert found.mean_logit_difference == found.proven_mean_difference <= found.limit
    assert found.base_mean_logit_difference > 100 * found.mean_logit_difference
    assert found.top1_agreement == pytest.approx(1.0, abs=1 / found.tokens)
    assert found.perplexity["merged"] == pytest.approx(found.perplexity["adapter"], rel=1e-4)
    assert found.perplexity["base"] != pytest.approx(found.perplexity["adapter"], rel=1e-2)

    assert Merge.load(tmp_path / "merged") == merge
    assert ledger.Ledger().rows("merge")[0].digest == merge.digest
    assert {"writing shards", "asking the merged model (original)"} <= {
        event.what for event in events if isinstance(event, stages.Loading)
    }
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(model).__name__ == "LlamaForCausalLM"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    turns = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == tiny_tokenizer().apply_chat_template(
        turns, tokenize=False
    )
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "same likeliest token" in card
    assert recipe_text(run) in card
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "merged", "rows.jsonl", "run"]


def recipe_text(run: Path) -> str:
    return (run / "recipe.yaml").read_text().strip()


@pytest.mark.parametrize("name", ["mixtral", "gpt2"])
def test_fused_experts_and_transposed_layers_are_proven_too(tmp_path: Path, rows: Path, name: str) -> None:
    run = finished_run(tmp_path / "run", recipe_for(save_tiny_base(tmp_path / "base", name), rows))
    merge = stages.merge(run, tmp_path / "merged")
    experts = 2 * 4 * 3
    assert merge.changed_tensors == {"mixtral": 8 + experts, "gpt2": 8}[name]
    assert merge.verification.passed


def test_the_adapter_folder_may_be_named_too(run: Path, tmp_path: Path) -> None:
    assert stages.merge(run / "adapter", tmp_path / "merged").status == "merged"


def test_without_held_out_rows_training_rows_are_compared(tmp_path: Path, rows: Path) -> None:
    run = finished_run(tmp_path / "run", recipe_for(save_tiny_base(tmp_path / "base"), rows))
    found = stages.merge(run, tmp_path / "merged", rows=3).verification
    assert (found.split, found.rows) == ("train", 3)


def test_answers_end_where_training_ended_them_and_the_template_goes_along(tmp_path: Path, rows: Path) -> None:
    recipe = recipe_for(save_tiny_base(tmp_path / "base"), rows)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"template": "plain"})})
    run = finished_run(tmp_path / "run", recipe)
    stages.merge(run, tmp_path / "merged")
    stops = Dataset.load(run).stop_token_ids
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ends = model.generation_config.eos_token_id
    assert set(stops) <= set(ends if isinstance(ends, list) else [ends])
    told = AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    assert told == (tmp_path / "merged" / "chat_template.jinja").read_text()
    assert told != tiny_tokenizer().chat_template


def test_shards_keep_their_layout_and_what_is_not_adapted_its_bytes(tmp_path: Path, rows: Path) -> None:
    base = save_tiny_base(tmp_path / "base")
    shutil.rmtree(base)
    tiny_model("llama", dtype=torch.bfloat16).save_pretrained(base, max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(base)
    files = sorted(base.glob("*.safetensors"))
    assert len(files) > 3
    run = finished_run(tmp_path / "run", recipe_for(base, rows, adapter={"targets": ["v_proj"]}))
    merge = stages.merge(run, tmp_path / "merged")
    assert merge.changed_tensors == 2
    changed = set()
    for path in files:
        before, after = path.read_bytes(), (tmp_path / "merged" / path.name).read_bytes()
        assert len(before) == len(after)
        header = 8 + int.from_bytes(before[:8], "little")
        assert before[:header] == after[:header]
        old, new = load_file(path), load_file(tmp_path / "merged" / path.name)
        changed |= {name for name in old if not torch.equal(old[name].view(torch.int16), new[name].view(torch.int16))}
    assert changed == {f"model.layers.{layer}.self_attn.v_proj.weight" for layer in (0, 1)}
    index = "model.safetensors.index.json"
    assert (base / index).read_bytes() == (tmp_path / "merged" / index).read_bytes()


# ------------------------------------------------------------------------------------------------ quantized bases


@pytest.fixture
def quantized_run(tmp_path: Path, rows: Path, request: pytest.FixtureRequest) -> Path:
    storage, method = request.param
    base = save_tiny_base(tmp_path / "base", "qwen3")
    recipe = recipe_for(base, rows, model={"storage": storage}, adapter={"rank": 4, "method": method})
    return finished_run(tmp_path / "run", recipe, extra={"storage": storage})


KINDS = [("nf4", "lora"), ("nf4", "dora"), ("int8", "lora")]


@pytest.mark.parametrize("quantized_run", KINDS, indirect=True, ids=str)
def test_both_ways_are_measured_and_the_nearer_is_taken(quantized_run: Path, tmp_path: Path) -> None:
    merge = stages.merge(quantized_run, tmp_path / "merged")
    assert set(merge.candidates) == {"original", "quantized"}
    near, far = merge.candidates["quantized"], merge.candidates["original"]
    assert merge.into == "quantized"
    assert merge.verification == near
    assert near.passed
    assert near.max_logit_difference == near.proven_max_difference
    # What quantization does is far more than what rounding does, and no fault of the merge: that is proven on its own.
    assert far.passed
    assert far.mean_logit_difference is not None
    assert far.proven_mean_difference is not None
    assert near.mean_logit_difference is not None
    assert far.mean_logit_difference > 100 * far.proven_mean_difference
    assert far.mean_logit_difference > 100 * near.mean_logit_difference
    assert merge.changed_tensors == 14
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "merged", "rows.jsonl", "run"]


@pytest.mark.parametrize("quantized_run", [("nf4", "lora")], indirect=True, ids=str)
@pytest.mark.parametrize("into", ["original", "quantized"])
def test_the_weights_are_those_that_were_asked_for(quantized_run: Path, tmp_path: Path, into: str) -> None:
    from onlay.model.quantize import round_trip

    merge = stages.merge(quantized_run, tmp_path / "merged", into=into)
    assert (merge.into, merge.candidates) == (into, {})
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "merged"))
    weights = load_file(quantized_run / "adapter" / "adapter_model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    a, b = (weights[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    base = before[f"{name}.weight"]
    expected = (base if into == "original" else round_trip(base, storage="nf4")) + 2.0 * b @ a
    error = (after[f"{name}.weight"] - expected).abs().max()
    assert error <= 2 * torch.finfo(torch.float32).eps * expected.abs().max()
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


def test_layers_without_an_adapter_become_what_was_trained_against_too(tmp_path: Path, rows: Path) -> None:
    recipe = recipe_for(
        save_tiny_base(tmp_path / "base"), rows, model={"storage": "nf4"}, adapter={"rank": 4, "targets": "qv"}
    )
    run = finished_run(tmp_path / "run", recipe, extra={"storage": "nf4"})
    merge = stages.merge(run, tmp_path / "merged", into="quantized")
    assert merge.verification.passed
    assert merge.changed_tensors == 14  # 4 of them with an adapter.


def test_loftq_is_merged_into_the_quantized_weights_alone(tmp_path: Path, rows: Path) -> None:
    recipe = recipe_for(save_tiny_base(tmp_path / "base"), rows, model={"storage": "nf4"})
    run = finished_run(tmp_path / "run", recipe, extra={"storage": "nf4"})
    loftq = recipe_for(tmp_path / "base", rows, model={"storage": "nf4"}, adapter={"rank": 4, "method": "loftq"})
    (run / "recipe.yaml").write_text(loftq.to_yaml())
    assert "makes up for the rounding of nf4" in refused(run, tmp_path / "merged", into="original")
    merge = stages.merge(run, tmp_path / "merged")
    assert (merge.into, merge.candidates) == ("quantized", {})


# --------------------------------------------------------------------------------------------------- wrong merges


def nothing(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda self, weight, place: weight


def twice(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda self, weight, place: original(self, original(self, weight, place), place)


def one_module_left_out(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def apply(self: Updates, weight: Tensor, place: Any) -> Tensor:
        skipped = place.parameter == "model.layers.1.self_attn.k_proj.weight"
        return weight if skipped else original(self, weight, place)

    return apply


def not_a_number(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda self, weight, place: original(self, weight, place).mul_(1e30)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (nothing, "no different from the base"),
        (twice, "off in the mean"),
        (one_module_left_out, "off in the mean"),
        (not_a_number, "not finite"),
    ],
)
def test_a_wrong_merge_is_rejected_and_kept_under_another_name(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., Any], said: str
) -> None:
    monkeypatch.setattr(Updates, "apply", wrong(Updates.apply))
    with pytest.raises(ProofError) as caught:
        stages.merge(run, tmp_path / "merged")
    assert said in caught.value.problem
    assert caught.value.exit_code == 1
    assert not (tmp_path / "merged").exists()
    kept = Merge.load(tmp_path / "merged.rejected")
    assert kept.status == "rejected"
    assert said in str(kept.error)
    assert ledger.Ledger().rows("merge")[-1].digest == kept.digest
    with pytest.raises(ProofError):
        stages.merge(run, tmp_path / "merged")
    assert Merge.load(tmp_path / "merged.rejected-2").status == "rejected"


def test_a_limit_of_ones_own(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ProofError) as caught:
        stages.merge(run, tmp_path / "merged", max_difference=0.0)
    assert "--max-difference is 0" in caught.value.problem
    monkeypatch.setattr(Updates, "apply", one_module_left_out(Updates.apply))
    found = stages.merge(run, tmp_path / "merged", max_difference=100.0).verification
    assert found.limit == 100.0
    assert found.proven_mean_difference > RATIO * found.rounding_mean_difference


def test_what_does_not_fit_the_files_dtype_is_refused(
    tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_tiny_base(tmp_path / "base", dtype=torch.float16)
    run = finished_run(tmp_path / "run", recipe_for(base, rows))
    monkeypatch.setattr(Updates, "apply", lambda self, weight, place: weight.fill_(70_000.0))
    with pytest.raises(ProofError) as caught:
        stages.merge(run, tmp_path / "merged")
    assert "is not finite once the adapter is merged into its F16" in caught.value.problem
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "rows.jsonl", "run"]


# -------------------------------------------------------------------------------------------------------- refusals


def refused(run: Path, out: Path, error: type[Exception] = OutputError, **options: Any) -> str:
    before = sorted(out.parent.iterdir())
    with pytest.raises(error) as caught:
        stages.merge(run, out, **options)
    assert sorted(out.parent.iterdir()) == before
    return str(caught.value)


def test_a_folder_that_exists_is_not_touched(run: Path, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    assert "exists already" in refused(run, tmp_path / "merged")
    assert list((tmp_path / "merged").iterdir()) == []


def test_runs_without_an_adapter_are_refused(run: Path, tmp_path: Path) -> None:
    done = Run.load(run)
    done.model_copy(update={"status": "interrupted"}).save(run)
    assert "--resume" in refused(run, tmp_path / "merged")
    done.save(run)
    assert "not quantized" in refused(run, tmp_path / "merged", into="quantized")
    assert "none of" in refused(run, tmp_path / "merged", into="both")
    recipe = read_recipe(run / "recipe.yaml")
    full = recipe.model_copy(update={"adapter": Recipe.model_validate(
        {"model": {"base": "pocket"}, "data": {"train": "x"}, "adapter": {"method": "full"}}).adapter})  # fmt: skip
    (run / "recipe.yaml").write_text(full.to_yaml())
    assert "the whole model" in refused(run, tmp_path / "merged")


def test_another_base_is_refused(run: Path, tmp_path: Path) -> None:
    save_tiny_base(tmp_path / "base", seed=1)
    assert "other weights" in refused(run, tmp_path / "merged", BaseModelError)


def test_what_cannot_be_merged_is_refused_with_its_name(run: Path, tmp_path: Path) -> None:
    path = run / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    weights["base_model.model.model.norm.weight"] = torch.ones(32)
    save_file(weights, path)
    assert "model.norm.weight" in refused(run, tmp_path / "merged")


def test_a_weight_that_is_another_one_too_is_refused(tmp_path: Path, rows: Path) -> None:
    base = save_tiny_base(tmp_path / "base", tie_word_embeddings=True)
    run = finished_run(tmp_path / "run", recipe_for(base, rows))
    config = run / "adapter" / "adapter_config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"target_modules": ["q_proj", "lm_head"]}))
    path = run / "adapter" / "adapter_model.safetensors"
    head = "base_model.model.lm_head.lora_"
    kept = {name: weight for name, weight in load_file(path).items() if "q_proj" in name}
    save_file(kept | {f"{head}A.weight": torch.ones(4, 32), f"{head}B.weight": torch.ones(VOCABULARY, 4)}, path)
    assert "the same weight as model.embed_tokens.weight" in refused(run, tmp_path / "merged")


def test_a_full_disk_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Iterator[Tensor]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "_merged_blocks", full)
    assert "the disk is full" in refused(run, tmp_path / "merged")


def test_too_little_space_is_told_before_anything_is_loaded(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))  # type: ignore[attr-defined]
    assert "0.0 GB are free" in refused(run, tmp_path / "merged")


# ---------------------------------------------------------------------------------------------------------- memory

MEASURE = """
import sys
from pathlib import Path
from onlay.model.facts import read_facts
from onlay.model.stored_names import find_places, model_without_weights
from onlay.model.updates import Updates
from onlay.model.weight_files import read_tensors
from onlay.recipe import ModelSection
from onlay.release.shards import Change, write_shards

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

place = Path(sys.argv[1])
facts = read_facts(ModelSection(base=str(place / "base")))
tensors = read_tensors(place / "base", "base")
updates = Updates(model_without_weights(facts), place / "adapter")
places = find_places(model_without_weights(facts), tensors, updates.parameters)
changes = {name: Change(place=place, updated=True) for name, place in places.items()}
(place / "merged").mkdir()
open("/proc/self/clear_refs", "w").write("5")  # The peak starts again from what is in use now.
peaks = []
write_shards(tensors, changes, updates, place / "merged", progress=lambda done, total: peaks.append(peak()))
print(peaks[-1] - peaks[len(peaks) // 3])
"""


def test_memory_is_that_of_one_matrix_not_of_the_model(tmp_path: Path) -> None:
    """192 MiB of weights, the largest matrix 8 MiB: after a third of them nothing comes to what that one takes."""
    base, layers, hidden, inner = tmp_path / "base", 6, 1024, 4096
    model = model_config(base, layers=layers, hidden=hidden, inner=inner)
    weights = {name: torch.zeros(p.shape, dtype=torch.bfloat16) for name, p in model.named_parameters()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    del weights
    facts = read_facts(ModelSection(base=str(base)))
    tiny, _ = attach(
        model_config(tmp_path / "other", layers=layers, hidden=hidden, inner=inner), LoraAdapter(rank=2), seed=0
    )
    tiny.to_empty(device="cpu")
    for weight in tiny.parameters():
        if weight.requires_grad:
            weight.data.fill_(0.01)
    save_adapter(tiny, tmp_path / "adapter", facts=facts, extra={})
    del tiny, model
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, timeout=120,
        # What is freed goes back at once: the peak is then what was asked for, not what the allocator kept.
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    largest = 2 * hidden * inner
    # One copy as read, one in float32 of twice its size, one as written: room for what the allocator does.
    assert int(done.stdout) < (1 + 2 + 1) * largest < facts.weight_bytes / 3


def model_config(folder: Path, *, layers: int, hidden: int, inner: int) -> Any:
    from tests.builders import tiny_config

    config = tiny_config(
        "llama", num_hidden_layers=layers, hidden_size=hidden, intermediate_size=inner, num_attention_heads=8
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)
