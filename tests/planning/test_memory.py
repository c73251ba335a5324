"""Peak memory in closed form: against measured steps, against what the fused blocks keep, and against published tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from onlay.errors import BaseModelError
from onlay.model import keep
from onlay.model.fuse import fuse
from onlay.planning import memory
from onlay.planning.layers import FAST_FAMILIES, layer_of, why_ordinary
from onlay.planning.memory import LEVELS, MemoryForecast, Setting, forecast_memory, load_of
from onlay.planning.shapes import BaseShape, find_shape, read_shape
from onlay.recipe import FullTuning, HeadAdapter, LoraAdapter
from tests.builders import AllFloat64
from tests.model.fused import PADDED, adapted

GIB = 2**30
H200_BYTES = 143_771 * 2**20


def forecast(
    base: str | BaseShape, section: Any = None, *, storage: str = "bf16", tokens: int = 16384, level: str = "none", fp8: bool = False,
    optimizer: str = "adamw", offload: bool = False, fast: bool = True, accumulates: bool = False, share: float = 1.0,
) -> MemoryForecast:  # fmt: skip
    shape = find_shape(base) if isinstance(base, str) else base
    labels = 2 if isinstance(section, HeadAdapter) else None
    load = load_of(shape, section or LoraAdapter(), device_bytes=H200_BYTES, num_labels=labels, trained_share=share)
    setting = Setting(
        storage=storage, fp8_products=fp8, micro_tokens=tokens, levels=(level,) * shape.num_layers, optimizer=optimizer,
        offload=offload, fast_path=fast,
    )  # fmt: skip
    return forecast_memory(load, setting, accumulates=accumulates)


# -------------------------------------------------------------------------------------------------------- measured

B8, B70 = "llama-3.1-8b", "llama-3.1-70b"
BF16_ADAPTER = LoraAdapter(precision="bf16")
MEASURED: list[tuple[str, dict[str, Any], float]] = [
    (B8, {}, 62.6),
    (B8, {"storage": "nf4"}, 53.0),
    (B8, {"storage": "nf4", "level": "mlp"}, 25.57),
    (B8, {"storage": "nf4", "level": "blocks"}, 15.43),
    (B8, {"storage": "nf4", "level": "layer"}, 12.05),
    (B8, {"storage": "fp8", "fp8": True}, 62.6),
    (B8, {"tokens": 2048}, 21.88),
    (B8, {"section": LoraAdapter(targets="qv")}, 62.09),
    (B8, {"fast": False}, 129.688),
    (B8, {"fast": False, "storage": "nf4"}, 120.042),
    (B8, {"fast": False, "storage": "int8"}, 123.194),
    (B8, {"fast": False, "storage": "nf4", "level": "layer"}, 15.296),
    (B8, {"fast": False, "storage": "nf4", "level": "layer", "tokens": 2048, "section": BF16_ADAPTER,
          "optimizer": "paged_adamw_8bit", "offload": True}, 5.165),
    (B70, {"fast": False, "storage": "nf4", "level": "layer", "tokens": 4096, "section": BF16_ADAPTER,
           "optimizer": "adamw_8bit", "offload": True}, 38.433),
    (B70, {"fast": False, "storage": "nf4", "level": "layer", "tokens": 4096, "section": BF16_ADAPTER,
           "optimizer": "adamw_8bit"}, 44.921),
]  # fmt: skip
"""Peak GiB that torch's allocator gave on an H200: docs/planning.md."""


@pytest.mark.parametrize(("base", "what", "peak_gib"), MEASURED)
def test_forecasts_are_what_was_measured(base: str, what: dict[str, Any], peak_gib: float) -> None:
    found = forecast(base, **what)
    limit = 0.012 if what.get("fast", True) else 0.035
    assert found.peak_bytes / GIB == pytest.approx(peak_gib, rel=limit)
    assert found.low_bytes / GIB < peak_gib < found.high_bytes / GIB


@pytest.mark.parametrize(
    ("name", "options"),
    [("llama", {}), ("llama", {"targets": "qv"}), ("llama", {"targets": ["o_proj", "down_proj"]}), ("qwen2", {}), ("phi3", {}), ("qwen3", {})],
)  # fmt: skip
def test_what_layers_keep_is_what_their_blocks_keep(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """onlay/model/keep.py counts the same from the blocks themselves."""
    with AllFloat64():
        model = adapted(name, rank=3, **options)
        fused = fuse(model, layout=PADDED, dtype=next(model.parameters()).dtype)
    config = model.get_base_model().config.to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    load = load_of(read_shape(tmp_path), LoraAdapter(rank=3, **options))
    setting = Setting(storage="bf16", micro_tokens=1, levels=("none",) * load.layer.count)
    assert len(fused.layers) == load.layer.count
    for blocks in fused.layers.values():
        shape = keep.shape_of(blocks, item_bytes=2)
        for level in LEVELS:
            mine = memory._kept_bytes(load.layer, load, level, setting)
            theirs = keep.kept_bytes(shape, level)
            # What is small stays out of theirs with `blocks`, and r, h of the MLP in it with `mlp`.
            assert mine == pytest.approx(theirs, abs=2 * load.layer.ranks + 8), level


def test_levels_are_those_of_training() -> None:
    assert LEVELS == keep.LEVELS
    assert memory.TILE_TOKENS == keep.TILE_TOKENS


# ------------------------------------------------------------------------------------------------------- published


def with_logits(found: MemoryForecast, *, vocabulary: int, tokens: int) -> float:
    """The same with all logits at once, as the published stacks have them, in bytes."""
    eager = memory.EAGER_LOGIT_BYTES * vocabulary * tokens
    kept = found.peak_bytes - found.working_bytes - found.loss_bytes - found.gradient_bytes
    return max(found.peak_bytes, kept + eager)


@pytest.mark.parametrize(
    ("tokens", "gb"), [(256, 20.1), (512, 20.4), (1024, 21.5), (2048, 23.8), (4096, 29.7), (8192, 36.6)]
)
def test_qwen_7b_on_an_a100(tokens: int, gb: float, tmp_path: Path) -> None:
    """QwenLM/Qwen's README: LoRA rank 64 with recomputation and all logits; its numbers hold what CUDA takes (1.5 GB)."""
    config = {
        "model_type": "llama", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = forecast(read_shape(tmp_path), LoraAdapter(rank=64), tokens=tokens, level="layer", fast=False)
    assert (with_logits(found, vocabulary=151936, tokens=tokens) + 1.5e9) / 1e9 == pytest.approx(gb, rel=0.10)


@pytest.mark.parametrize(
    ("section", "gib"),
    [(LoraAdapter(rank=32, targets="qv"), 20.76), (LoraAdapter(rank=10, targets="mlp"), 23.00)],
)
def test_pefts_benchmark_on_an_l40s(section: LoraAdapter, gib: float) -> None:
    """PEFT's MetaMathQA results: Llama-3.2-3B, 4 rows of at most 768 tokens, all logits."""
    found = forecast("llama-3.2-3b", section, tokens=4 * 768, fast=False)
    assert with_logits(found, vocabulary=128256, tokens=4 * 768) / GIB == pytest.approx(gib, rel=0.10)


@pytest.mark.parametrize(("storage", "gib"), [("bf16", 16.2), ("nf4", 7.4)])
def test_torchtune_on_a_4090(storage: str, gib: float) -> None:
    """torchtune's README: Llama-3-8B, 2 rows of 2,048 tokens, recomputed, logits in chunks."""
    found = forecast("llama-3-8b", LoraAdapter(rank=8, precision="bf16"), storage=storage, tokens=4096, level="layer", fast=False)  # fmt: skip
    assert found.peak_bytes / GIB == pytest.approx(gib, rel=0.10)


def test_long_contexts_of_the_fast_path() -> None:
    """70B in NF4 with 12,106 tokens in one row, and 8B with 78,475, which a peer claims for 48 and 24 GB."""
    frugal: dict[str, Any] = {"storage": "nf4", "level": "tiles", "optimizer": "paged_adamw_8bit", "offload": True}
    section = LoraAdapter(rank=32, precision="bf16")
    assert forecast(B70, section, tokens=12_106, **frugal).peak_bytes < 43.5 * GIB
    assert forecast(B8, section, tokens=78_475, **frugal).peak_bytes < 23.4 * GIB


# ------------------------------------------------------------------------------------------------------- structure


def test_components_sum_to_the_peak() -> None:
    found = forecast(B8, storage="nf4", accumulates=True)
    assert sum(found.components.values()) == found.peak_bytes
    assert set(found.components) == {f"{name}_bytes" for name in ("weights", "adapter", "gradient", "optimizer", "activation", "loss", "working")}  # fmt: skip
    assert found.device_bytes == found.high_bytes + memory.CONTEXT_BYTES


@pytest.mark.parametrize("fast", [True, False])
def test_each_level_keeps_less_than_the_one_before(fast: bool) -> None:
    levels = LEVELS if fast else ("none", "layer")
    peaks = [forecast(B8, storage="nf4", level=level, fast=fast, tokens=65536).peak_bytes for level in levels]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == len(peaks)


def test_more_of_anything_takes_more() -> None:
    plain = forecast(B8, tokens=4096).peak_bytes
    assert forecast(B8, tokens=8192).peak_bytes > plain
    assert forecast(B8, LoraAdapter(rank=128), tokens=4096).peak_bytes > plain
    assert forecast(B8, LoraAdapter(dropout=0.05), tokens=4096).peak_bytes == plain  # Drawn again from its seed.
    assert forecast(B8, LoraAdapter(dropout=0.05), tokens=4096, fast=False).peak_bytes > forecast(B8, tokens=4096, fast=False).peak_bytes  # fmt: skip
    assert forecast(B8, tokens=4096, accumulates=True).gradient_bytes == 41_943_040 * 4
    assert forecast(B8, tokens=16384, share=0.1).loss_bytes < forecast(B8, tokens=16384).loss_bytes
    states = [forecast(B8, optimizer=kind).optimizer_bytes for kind in ("adamw", "adamw_8bit", "paged_adamw_32bit")]
    assert states == [41_943_040 * 8, round(41_943_040 * memory.SMALL_STATE), 0]


def test_some_layers_that_keep_everything_come_last() -> None:
    """Those that give up come first: what the first one needs to compute it again is there when the others' is gone."""
    load = load_of(find_shape(B8), LoraAdapter())
    setting = Setting(storage="bf16", micro_tokens=16384, levels=("layer",) + ("none",) * 31)
    one, none = forecast_memory(load, setting), forecast_memory(load, replace(setting, levels=("none",) * 32))
    assert one.peak_bytes < none.peak_bytes and one.loss_bytes == none.loss_bytes > 0


def test_storage_by_kind() -> None:
    sizes = {
        kind: forecast(B8, storage=kind, fp8=kind == "fp8").weights_bytes / GIB for kind in ("bf16", "int8", "nf4")
    }
    assert sizes == {"bf16": pytest.approx(14.958, abs=0.01), "int8": pytest.approx(8.463, abs=0.01), "nf4": pytest.approx(5.311, abs=0.01)}  # fmt: skip
    load = load_of(find_shape(B70), LoraAdapter(), device_bytes=H200_BYTES)
    setting = Setting(storage="fp8", fp8_products=True, micro_tokens=16, levels=("layer",) * 80)
    assert memory.weights_bytes(load, setting) == pytest.approx(72.6e9, rel=0.01)  # Too large to be kept twice.


def test_full_tuning_keeps_four_numbers_a_weight_and_a_copy() -> None:
    found = forecast("llama-3.2-1b", FullTuning(method="full"), tokens=2048, level="layer", fast=False)
    state = found.weights_bytes + found.optimizer_bytes
    assert state == 1_235_814_400 * (4 + 2 + 8)
    assert found.adapter_bytes == 0 and found.peak_bytes > state


def test_a_head_keeps_nothing_of_its_body() -> None:
    found = forecast(B8, HeadAdapter(method="head"), fast=False)
    assert (found.activation_bytes, found.loss_bytes) == (0, 0)
    assert found.peak_bytes < 1.02 * found.weights_bytes


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("llama-3.1-8b", {}, None),
        ("llama-3.1-8b", {"capability": (7, 5)}, "compute capability 7.5"),
        ("llama-3.1-8b", {"compute": "fp32"}, "compute fp32"),
        ("gpt2", {}, "gpt2 is not among"),
    ],
)
def test_why_the_fast_path_is_not_taken(name: str, options: dict[str, Any], reason: str | None) -> None:
    found = why_ordinary(find_shape(name), LoraAdapter(), **({"capability": (9, 0), "compute": "bf16"} | options))
    assert found is None if reason is None else found is not None and found.startswith(reason)
    assert why_ordinary(find_shape(name), LoraAdapter(method="dora"), capability=(9, 0), compute="bf16") == "DoRA"


def test_families_on_the_fast_path_have_gated_layers() -> None:
    for name in ("llama-3.1-8b", "mistral-7b", "qwen2.5-7b", "qwen3-8b", "phi-3-mini", "gemma-3-1b"):
        shape = find_shape(name)
        layer = layer_of(shape, LoraAdapter())
        assert shape.architecture in FAST_FAMILIES and layer.gated
        assert layer.weights * layer.count == shape.linear_parameters


def test_experts_have_no_closed_form() -> None:
    with pytest.raises(BaseModelError, match="tokens go to experts"):
        layer_of(find_shape("mixtral-8x7b"), LoraAdapter())
