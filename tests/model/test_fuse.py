"""The fast path of adapted layers: the same function and gradients as PEFT's, and it steps aside where it must."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from onlay.kernels.lora_linear import folds
from onlay.model.adapter import adapted_modules, attach
from onlay.model.fuse import fuse, unfuse
from onlay.model.quantize import QuantizedLinear
from onlay.recipe import ADAPTERS, LoraAdapter
from tests.builders import VOCABULARY, AllFloat64, shake, tiny_model

IDS = (torch.arange(24) * 37 % VOCABULARY)[None]
EPSILON = torch.finfo(torch.float64).eps


def section_of(method: str, **fields: Any) -> LoraAdapter:
    for kind in ADAPTERS:
        if issubclass(kind, LoraAdapter) and method in str(kind.model_fields["method"].annotation):
            return kind(**{"method": method, "rank": 2, **fields})
    raise ValueError(method)


def adapted(name: str = "llama", method: str = "lora", dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    model, _ = attach(tiny_model(name, dtype=dtype), section_of(method, **fields), seed=0)
    shake(model)
    return model.eval()


def forward_and_gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logits = model(input_ids=IDS, use_cache=False).logits
    logits.square().mean().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def covered(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if "forward" in vars(module)}


@pytest.mark.parametrize("method", ["lora", "rslora", "lora+", "pissa"])
@pytest.mark.parametrize(("name", "rank"), [("llama", 1), ("llama", 4), ("llama", 40), ("opt", 4), ("phi3", 3)])
def test_logits_and_gradients_are_those_of_peft(method: str, name: str, rank: int) -> None:
    with AllFloat64():
        model = adapted(name, method, torch.float64, rank=rank)
        logits, gradients = forward_and_gradients(model)
        assert fuse(model) == {}
        assert covered(model) == set(adapted_modules(model))
        fast, fast_gradients = forward_and_gradients(model)
    assert float((fast - logits).norm()) <= 1e4 * EPSILON * float(logits.norm())
    assert fast_gradients.keys() == gradients.keys()
    for key, expected in gradients.items():
        assert float((fast_gradients[key] - expected).norm()) <= 1e4 * EPSILON * float(expected.norm()), key


def test_both_forms_are_among_those_ranks() -> None:
    assert folds(32, 32, rank=40)
    assert not folds(32, 32, rank=1)


def test_a_small_adapter_error_would_be_seen() -> None:
    """What the test above would find: one weight of one adapter off by a millionth."""
    with AllFloat64():
        model = adapted(dtype=torch.float64, rank=4)
        logits, _ = forward_and_gradients(model)
        fuse(model)
        with torch.no_grad():
            adapted_modules(model)["base_model.model.model.layers.0.mlp.up_proj"]["B"][0, 0] += 1e-6
        fast, _ = forward_and_gradients(model)
    assert float((fast - logits).norm()) > 1e4 * EPSILON * float(logits.norm())


def test_an_adapter_that_is_off_is_off() -> None:
    base = tiny_model("llama")
    expected = base(input_ids=IDS, use_cache=False).logits
    model = adapted()
    with_adapter = model(input_ids=IDS, use_cache=False).logits
    fuse(model)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS, use_cache=False).logits, expected)
    assert not torch.allclose(with_adapter, expected, atol=1e-2)
    assert torch.allclose(model(input_ids=IDS, use_cache=False).logits, with_adapter, atol=1e-4)
    model.merge_adapter()
    assert torch.allclose(model(input_ids=IDS, use_cache=False).logits, with_adapter, atol=1e-4)


def test_unfuse_puts_everything_back() -> None:
    model = adapted()
    expected = model(input_ids=IDS, use_cache=False).logits
    fuse(model)
    assert len(covered(model)) == 14
    unfuse(model)
    assert covered(model) == set()
    assert torch.equal(model(input_ids=IDS, use_cache=False).logits, expected)


def test_under_autocast_it_is_pefts() -> None:
    model = adapted()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(input_ids=IDS, use_cache=False).logits
        fuse(model)
        assert torch.equal(model(input_ids=IDS, use_cache=False).logits, expected)


def quantized(model: nn.Module) -> nn.Module:
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name.endswith("proj"):
            model.set_submodule(name, QuantizedLinear.from_linear(module, storage="int8"))
    return model


def training_bias(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("base_layer.bias"):
            parameter.requires_grad_(True)


REASONS: dict[str, tuple[Callable[[], Any], int]] = {
    "adapters on MixtralExperts": (lambda: adapted("mixtral"), 4),
    "adapters on Conv1D": (lambda: adapted("gpt2"), 8),
    "adapters on QuantizedLinear": (lambda: attach(quantized(tiny_model("llama")), section_of("lora"), seed=0)[0], 14),
    "DoRA": (lambda: adapted(method="dora"), 14),
    "dropout": (lambda: adapted(dropout=0.1), 14),
    "weights in bfloat16": (lambda: adapted(dtype=torch.bfloat16), 14),
    "an adapter in bfloat16 on weights in float32": (lambda: adapted(precision="bf16"), 14),
    "a base layer that trains": (lambda: adapted("opt", bias="all"), 12),
}


@pytest.mark.parametrize("reason", REASONS)
def test_what_is_not_covered_is_told_and_stays_as_it_is(reason: str) -> None:
    make, count = REASONS[reason]
    model = make()
    expected = copy.deepcopy(model).eval()(input_ids=IDS, use_cache=False).logits
    told = fuse(model)
    assert list(told) == [reason]
    assert told[reason].startswith(f"{count} layers, first base_model.model.")
    if reason == "adapters on MixtralExperts":
        assert len(covered(model)) == 8  # The attention is on the fast path.
    else:
        assert covered(model) == set()
        assert torch.equal(model.eval()(input_ids=IDS, use_cache=False).logits, expected)
