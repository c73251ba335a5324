"""Quantized layers: what they stand for, what stays when they are moved, and a QLoRA step against float64."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from onlay.model.adapter import attach
from onlay.model.load import weight_checksums
from onlay.model.quantize import QuantizedLinear, round_trip
from onlay.model.storage import bytes_per_weight
from onlay.recipe import LoraAdapter
from tests.builders import VOCABULARY, AllFloat64, shake, tiny_model

FORMS = [("nf4", True), ("nf4", False), ("int8", False)]
IDS = (torch.arange(2 * 24) * 37 % VOCABULARY).view(2, 24)
forms = pytest.mark.parametrize(("storage", "double_quantization"), FORMS)


def linear(outputs: int = 96, inputs: int = 80, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(inputs, outputs, dtype=dtype).requires_grad_(False)


def quantized(storage: str, double_quantization: bool, **shape: Any) -> QuantizedLinear:
    return QuantizedLinear.from_linear(linear(**shape), storage=storage, double_quantization=double_quantization)


@pytest.mark.parametrize("shape", [(96, 80), (128, 96), (3, 5), (1, 7), (64, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@forms
def test_what_a_layer_stands_for(
    storage: str, double_quantization: bool, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    plain = linear(*shape, dtype=dtype)
    layer = QuantizedLinear.from_linear(plain, storage=storage, double_quantization=double_quantization)
    meant = layer.dequantize()
    assert meant.dtype == torch.float32
    assert meant.shape == plain.weight.shape
    assert torch.equal(meant, round_trip(plain.weight, storage=storage, double_quantization=double_quantization))
    assert torch.equal(layer.dequantize(torch.bfloat16), meant.bfloat16())
    assert torch.equal(layer.dequantize(torch.float64).float(), meant)
    assert not layer.weight.is_floating_point()
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    x = torch.randn(2, 3, shape[1], dtype=torch.float64)
    assert plain.bias is not None
    expected = x @ layer.dequantize(torch.float64).T + plain.bias.double()
    assert float((layer(x) - expected).norm()) <= 1e2 * torch.finfo(torch.float64).eps * float(expected.norm())


def test_int8_is_the_nearest_of_127_steps_of_each_row() -> None:
    weight = linear(33, 50, dtype=torch.float32).weight.detach().clone()
    weight[4] = 0
    layer = QuantizedLinear(50, 33, False, storage="int8", double_quantization=False, dtype=torch.float32)
    layer.pack(weight)
    exact = weight.double()
    scales = exact.abs().amax(1) / 127
    assert torch.equal(layer.scales, scales.float())
    assert layer.weight.dtype == torch.int8
    assert layer.weight.shape == weight.shape
    eps = torch.finfo(torch.float32).eps
    error = (layer.weight.double() * scales[:, None] - exact).abs()
    assert bool((error <= scales[:, None] * (0.5 + 127 * eps)).all())
    assert not layer.weight[4].any()
    assert bool((layer.weight.abs().amax(1)[torch.arange(33) != 4] == 127).all())


@forms
def test_bytes_in_memory_are_those_that_are_reckoned_with(storage: str, double_quantization: bool) -> None:
    layer = quantized(storage, double_quantization, outputs=512, inputs=1024)
    stored = [layer.weight, *layer.buffers()]
    found = sum(tensor.numel() * tensor.element_size() for tensor in stored)
    # int8's scales and nf4's one mean are not counted.
    apart = 4 * 512 if storage == "int8" else 4 * double_quantization
    assert found == 512 * 1024 * bytes_per_weight(storage, double_quantization) + apart


CASTS: list[Callable[[nn.Module], nn.Module]] = [
    nn.Module.half, nn.Module.bfloat16, nn.Module.double, nn.Module.float, nn.Module.cpu,
    lambda module: module.to(torch.float16), lambda module: module.to("cpu", torch.float64),
    copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)),
]  # fmt: skip


@pytest.mark.parametrize("cast", CASTS)
@forms
def test_no_cast_reaches_the_stored_weight(storage: str, double_quantization: bool, cast: Any) -> None:
    model = nn.Sequential(quantized(storage, double_quantization))
    before = model[0].dequantize(torch.float64)
    state = {name: (buffer.dtype, buffer.clone()) for name, buffer in model.named_buffers()}
    after = cast(model)
    assert torch.equal(after[0].dequantize(torch.float64), before)
    for name, buffer in after.named_buffers():
        dtype, value = state[name]
        assert buffer.dtype == dtype
        assert torch.equal(buffer, value)


@forms
def test_everything_moves_with_the_module(storage: str, double_quantization: bool) -> None:
    layer = quantized(storage, double_quantization)
    moved = copy.deepcopy(layer).to("meta")
    assert {tensor.device.type for tensor in (*moved.parameters(), *moved.buffers())} == {"meta"}
    again = QuantizedLinear(
        80, 96, True, storage=storage, double_quantization=double_quantization, dtype=torch.bfloat16
    )
    again.pack(torch.zeros(96, 80))
    again.bias = nn.Parameter(torch.empty(96, dtype=torch.bfloat16), requires_grad=False)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.dequantize(), layer.dequantize())


@forms
def test_checksums_see_every_stored_bit(storage: str, double_quantization: bool) -> None:
    model = nn.Sequential(quantized(storage, double_quantization))
    original = weight_checksums(model)
    assert original.keys() == {f"0.{name}" for name in model[0].state_dict()}
    for name, tensor in model.state_dict().items():
        bits = tensor.view(-1).view(torch.uint8)
        bits[-1] ^= 1
        changed = weight_checksums(model)
        assert {key for key in original if changed[key] != original[key]} == {name}
        bits[-1] ^= 1
    assert weight_checksums(model) == original


def test_a_weight_of_another_shape_is_refused() -> None:
    layer = QuantizedLinear(80, 96, True, storage="int8", double_quantization=False, dtype=torch.float32)
    assert not layer.is_packed
    with pytest.raises(ValueError, match="80 inputs"):
        layer.pack(torch.zeros(80, 96))


# --------------------------------------------------------------------------------------------------------- QLoRA steps


def quantize_layers(model: nn.Module, storage: str, double_quantization: bool) -> None:
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            layer = QuantizedLinear.from_linear(module, storage=storage, double_quantization=double_quantization)
            model.set_submodule(name, layer)


def dequantize_layers(model: nn.Module, dtype: torch.dtype) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            plain = nn.Linear(module.in_features, module.out_features, module.bias is not None, dtype=dtype)
            plain.weight = nn.Parameter(module.dequantize(dtype), requires_grad=False)
            if module.bias is not None:
                plain.bias = nn.Parameter(module.bias.to(dtype), requires_grad=False)
            model.set_submodule(name, plain)


def base(storage: str, double_quantization: bool, *, stored: bool, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same tiny base, quantized (`stored`) or holding in `dtype` what the quantized one stands for."""
    model = tiny_model("llama")
    quantize_layers(model, storage, double_quantization)
    if not stored:
        dequantize_layers(model, dtype)
    return model.to(dtype)


def adapted(model: nn.Module, method: str = "lora") -> nn.Module:
    section = LoraAdapter.model_validate({"method": method, "rank": 4})
    wrapped, _ = attach(model, section, seed=0)
    shake(wrapped)
    return wrapped


def gradient(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    logits = model(input_ids=IDS, use_cache=False).logits
    logits = logits if logits.dtype == torch.float64 else logits.float()
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def distance(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    assert found.keys() == exact.keys() != set()
    return sum(float((found[name] - exact[name]).norm()) ** 2 for name in exact) ** 0.5


@contextmanager
def in_dtype(compute: torch.dtype) -> Iterator[None]:
    with torch.autocast("cpu", dtype=compute) if compute == torch.bfloat16 else nullcontext():
        yield


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["lora", "dora"])
@forms
def test_a_step_has_the_gradient_of_the_weights_it_stands_for(
    storage: str, double_quantization: bool, method: str, compute: torch.dtype
) -> None:
    """At most twice as far from float64 as the same step with plain layers that hold those weights in the same dtype."""
    reference = base(storage, double_quantization, stored=False, dtype=torch.float64)
    with AllFloat64():
        exact = gradient(adapted(reference, method))
    # bf16 compute: 16-bit weights, fp32 adapter, autocast, as on a GPU.
    packed = adapted(base(storage, double_quantization, stored=True, dtype=compute), method)
    plain = adapted(base(storage, double_quantization, stored=False, dtype=compute), method)
    with in_dtype(compute):
        found, eager = gradient(packed), gradient(plain)
    assert distance(found, exact) <= 2 * distance(eager, exact)
    size = sum(float(value.norm()) ** 2 for value in exact.values()) ** 0.5
    assert 0 < distance(eager, exact) < size


@forms
def test_the_base_it_was_quantized_from_gives_another_gradient(storage: str, double_quantization: bool) -> None:
    models = {
        "meant": base(storage, double_quantization, stored=False, dtype=torch.float64),
        "packed": base(storage, double_quantization, stored=True, dtype=torch.float64),
        "other": tiny_model("llama", dtype=torch.float64),
    }
    with AllFloat64():
        meant, packed, other = (gradient(adapted(model)) for model in models.values())
    assert distance(packed, meant) < 1e-6 * distance(other, meant)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
@forms
def test_evaluating_in_between_changes_nothing(storage: str, double_quantization: bool, compute: torch.dtype) -> None:
    """bitsandbytes' own layer packs its weight anew for CPUs when it is evaluated, and then has no gradient any more."""

    def steps(*, evaluates: bool) -> list[dict[str, Tensor]]:
        model = adapted(base(storage, double_quantization, stored=True, dtype=compute))
        gradients: list[dict[str, Tensor]] = []
        with in_dtype(compute):
            for _ in range(2):
                gradients.append(gradient(model.train()))
                if evaluates:
                    with torch.no_grad():
                        model.eval()(input_ids=IDS)
                    with torch.inference_mode():
                        model(input_ids=IDS)
        return gradients

    for found, expected in zip(steps(evaluates=True), steps(evaluates=False), strict=True):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert all(bool(value.any()) for value in found.values())


def test_doras_first_output_is_the_bases() -> None:
    model = base("nf4", True, stored=True)
    with torch.no_grad():
        alone = model(input_ids=IDS).logits
        wrapped, _ = attach(model, LoraAdapter.model_validate({"method": "dora", "rank": 4}), seed=0)
        first = wrapped(input_ids=IDS).logits
    assert float((first - alone).norm()) <= torch.finfo(torch.float32).eps ** 0.5 * float(alone.norm())
