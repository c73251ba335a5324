"""Which layers are quantized while loading, in every architecture, and that transformers' bookkeeping leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from onlay.errors import BaseModelError, RecipeError, SetupError
from onlay.hardware import Device, Hardware
from onlay.model.facts import read_facts
from onlay.model.hf_quantizer import quantizable
from onlay.model.load import Base, load_base
from onlay.model.quantize import QuantizedLinear, round_trip
from onlay.recipe import ModelSection
from tests.builders import ARCHITECTURES, VOCABULARY, save_tiny_base, tiny_model

CPU = Hardware(devices=[], cpu_cores=2, host_memory_bytes=2**33, platform="test")
IDS = (torch.arange(2 * 9) * 37 % VOCABULARY).view(2, 9)
EXACT = {
    "bloom": {"dense", "dense_4h_to_h"},
    "mamba": {"out_proj", "dt_proj", "x_proj"},
    "falcon_h1": {"out_proj"},
}
"""Last names of the linear layers that stay as they are beside the head: the model's code reads their weights itself."""


def load(folder: Path, storage: str, *, compute: str = "auto", **options: Any) -> Base:
    section = ModelSection.model_validate({"base": str(folder), "storage": storage, "compute": compute})
    return load_base(read_facts(section), section, CPU, **options)


def fits_fp8(layer: nn.Linear) -> bool:
    return layer.in_features % 16 == layer.out_features % 16 == 0


@pytest.mark.parametrize("storage", ["nf4", "int8", "fp8"])
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "gpt2"])
def test_a_loaded_base_computes_with_what_was_stored(tmp_path: Path, name: str, storage: str) -> None:
    """The logits are exactly those of the base whose weights were replaced by what their quantized forms stand for."""
    save_tiny_base(tmp_path, name)
    seen: dict[str, Tensor] = {}

    def note(layer: str, weight: Tensor, module: QuantizedLinear) -> None:
        assert torch.equal(module.dequantize(), round_trip(weight, storage=storage))
        seen[layer] = weight.clone()

    base = load(tmp_path, storage, on_quantized=note)
    assert base.storage == storage
    plain = tiny_model(name)
    linears = {layer: module for layer, module in plain.named_modules() if type(module) is nn.Linear}
    exact = {layer for layer in linears if layer.rpartition(".")[2] in {"lm_head"} | EXACT.get(name, set())}
    unfit = {layer for layer in linears if storage == "fp8" and not fits_fp8(linears[layer])}
    assert linears.keys() - seen.keys() == exact | unfit
    for layer, weight in seen.items():
        loaded = base.model.get_submodule(layer)
        assert isinstance(loaded, QuantizedLinear)
        assert torch.equal(weight, linears[layer].weight)
        linears[layer].weight = nn.Parameter(loaded.dequantize(), requires_grad=False)
    with torch.no_grad():
        found, expected = base.model(input_ids=IDS).logits, plain(input_ids=IDS).logits
    assert torch.equal(found, expected)
    assert not any(tensor.is_meta for tensor in (*base.model.parameters(), *base.model.buffers()))
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_nothing_of_transformers_bookkeeping_is_left(tmp_path: Path) -> None:
    save_tiny_base(tmp_path)
    model: Any = load(tmp_path, "nf4").model
    assert not {"hf_quantizer", "quantization_method"} & vars(model).keys()
    assert not model.is_quantized
    assert "quantization_config" not in model.config.to_dict()
    assert model.config.name_or_path == model.name_or_path == str(tmp_path)


def test_tied_heads_and_fused_experts_are_not_quantized(tmp_path: Path) -> None:
    tied = tiny_model("llama", tie_word_embeddings=True)
    assert "lm_head" not in quantizable(tied, "nf4")
    assert len(quantizable(tied, "nf4")) == 14
    save_tiny_base(tmp_path, "mixtral")
    note = load(tmp_path, "nf4").notes["storage_16_bit"]
    assert "model.layers.*.mlp.experts.gate_up_proj (44.9% of the weights)" in note
    assert "lm_head" in note
    assert "q_proj" not in note


def test_sizes_that_fp8_cannot_multiply_stay_in_16_bit(tmp_path: Path) -> None:
    narrow = tiny_model("llama", num_key_value_heads=1)
    assert set(quantizable(narrow, "nf4")) - set(quantizable(narrow, "fp8")) == {
        f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "kv"
    }
    save_tiny_base(tmp_path, num_key_value_heads=1)
    base = load(tmp_path, "fp8")
    assert "model.layers.*.self_attn.k_proj" in base.notes["storage_16_bit"]
    assert "q_proj" not in base.notes["storage_16_bit"]
    assert "products" not in base.notes
    with torch.no_grad():
        mixed = load(tmp_path, "nf4", compute="fp8")
        mixed.model(input_ids=IDS)
    assert mixed.notes["products"].startswith(
        "10 layers multiply in FP8 (e4m3, a scale for each row), 4 in the precision"
    )


@pytest.mark.parametrize("storage", ["nf4", "fp8"])
def test_products_in_fp8_where_they_are_asked_for(tmp_path: Path, storage: str) -> None:
    save_tiny_base(tmp_path)
    plain, asked = load(tmp_path, storage), load(tmp_path, storage, compute="fp8")
    assert "products" not in plain.notes
    assert asked.notes["products"].startswith("14 layers multiply in FP8")
    assert "a CPU has no FP8" in asked.notes["products"]
    assert asked.compute_dtype == torch.float32
    for base, expected in ((plain, False), (asked, True)):
        layers = [module for module in base.model.modules() if isinstance(module, QuantizedLinear)]
        assert len(layers) == 14
        assert all(layer.fp8_products is expected for layer in layers)
    with torch.no_grad():
        wide, narrow = (base.model(input_ids=IDS).logits for base in (plain, asked))
    assert 0 < float((wide - narrow).norm()) < 0.5 * float(wide.norm())


def test_a_gpu_without_fp8_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    save_tiny_base(tmp_path)
    old = Device(name="NVIDIA A100", memory_bytes=2**36, compute_capability=(8, 0))
    hardware = CPU.model_copy(update={"devices": [old]})
    for model in ({"storage": "fp8"}, {"storage": "nf4", "compute": "fp8"}):
        section = ModelSection.model_validate({"base": str(tmp_path)} | model)
        with pytest.raises(SetupError, match=r"NVIDIA A100 has 8\.0") as caught:
            load_base(read_facts(section), section, hardware)
        assert len(str(caught.value).splitlines()) == 2
        assert load_base(read_facts(section), section, hardware, device="cpu").storage == model["storage"]


class ReadsItsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.asked = (nn.Linear(2, 2) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.asked(self.called(x).to(self.asked.weight.dtype)) @ self.read.weight


def test_layers_whose_weight_is_read_are_found_in_the_code() -> None:
    model = tiny_model("llama")
    model.model.layers[0].extra = ReadsItsWeight()
    found = {name for name in quantizable(model, "nf4") if "extra" in name}
    assert found == {"model.layers.0.extra.called", "model.layers.0.extra.asked"}


def test_a_base_without_linear_layers_cannot_be_quantized(tmp_path: Path) -> None:
    save_tiny_base(tmp_path, "gpt2")
    with pytest.raises(BaseModelError, match="no linear layer that can be quantized"):
        load(tmp_path, "nf4")


@pytest.mark.parametrize("error", [RecipeError("first", "second"), torch.OutOfMemoryError("full"), KeyError("odd")])
def test_errors_while_packing_come_out_as_they_are(tmp_path: Path, error: Exception) -> None:
    save_tiny_base(tmp_path)
    calls: list[str] = []

    def fail(name: str, weight: Tensor, module: QuantizedLinear) -> None:
        calls.append(name)
        raise error

    with pytest.raises(type(error) if isinstance(error, RecipeError) else BaseModelError) as caught:
        load(tmp_path, "nf4", on_quantized=fail)
    assert len(calls) == 1
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("storage", ["nf4", "int8", "fp8"])
@pytest.mark.parametrize("key", ["model.layers.1.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight"])
def test_shapes_that_do_not_belong_to_the_architecture(tmp_path: Path, storage: str, key: str) -> None:
    from safetensors.torch import load_file, save_file

    save_tiny_base(tmp_path)
    changes: list[tuple[Callable[[dict[str, Tensor]], Any], str]] = [
        (lambda tensors: tensors.update({key: tensors[key][..., :8].contiguous()}), f"{key} is stored as"),
        (lambda tensors: tensors.pop(key), f"{key} is missing"),
    ]
    stored = load_file(tmp_path / "model.safetensors")
    for change, words in changes:
        tensors = dict(stored)
        change(tensors)
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(BaseModelError, match=words.replace(".", r"\.")):
            load(tmp_path, storage)
