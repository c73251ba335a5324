"""Which layers are quantized while loading, in every architecture, and that transformers' bookkeeping leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from onlay.errors import BaseModelError, RecipeError
from onlay.hardware import Hardware
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


def load(folder: Path, storage: str, **options: Any) -> Base:
    section = ModelSection.model_validate({"base": str(folder), "storage": storage})
    return load_base(read_facts(section), section, CPU, **options)


@pytest.mark.parametrize("storage", ["nf4", "int8"])
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
    assert {layer.rpartition(".")[2] for layer in linears.keys() - seen.keys()} == {"lm_head"} | EXACT.get(name, set())
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
    assert "lm_head" not in quantizable(tied)
    assert len(quantizable(tied)) == 14
    save_tiny_base(tmp_path, "mixtral")
    note = load(tmp_path, "nf4").notes["storage_16_bit"]
    assert "model.layers.*.mlp.experts.gate_up_proj (44.9% of the weights)" in note
    assert "lm_head" in note
    assert "q_proj" not in note


class ReadsItsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.asked = (nn.Linear(2, 2) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.asked(self.called(x).to(self.asked.weight.dtype)) @ self.read.weight


def test_layers_whose_weight_is_read_are_found_in_the_code() -> None:
    model = tiny_model("llama")
    model.model.layers[0].extra = ReadsItsWeight()
    found = {name for name in quantizable(model) if "extra" in name}
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


@pytest.mark.parametrize("storage", ["nf4", "int8"])
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
