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

from onlay.kernels import nf4
from onlay.kernels.fp8 import quantize_rows
from onlay.kernels.fp8_rows import FP8, Fp8Rows
from onlay.model.adapter import attach
from onlay.model.load import weight_checksums
from onlay.model.quantize import QuantizedLinear, round_trip
from onlay.model.storage import bytes_per_weight
from onlay.recipe import LoraAdapter
from tests.builders import VOCABULARY, AllFloat64, shake, tiny_model

FORMS = [("nf4", True), ("nf4", False), ("int8", False), ("fp8", False)]
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


def test_fp8_is_the_nearest_e4m3_number_to_each_rows_448th() -> None:
    weight = linear(33, 50, dtype=torch.float32).weight.detach().clone()
    weight[4] = 0
    layer = QuantizedLinear(50, 33, False, storage="fp8", double_quantization=False, dtype=torch.float32)
    layer.pack(weight)
    assert (layer.weight.dtype, layer.numbers.dtype, layer.weight.shape) == (torch.uint8, FP8, weight.shape)
    assert layer.numbers.data_ptr() == layer.weight.data_ptr()
    expected = quantize_rows(weight)
    assert torch.equal(layer.scales, expected.scales)
    assert torch.equal(layer.weight, expected.numbers.view(torch.uint8))
    assert torch.equal(layer.dequantize(), expected.wide())
    error = (layer.dequantize(torch.float64) - weight.double()).abs()
    # Half a unit in the last place of three bits, and of the smallest numbers half of e4m3's least.
    bound = torch.maximum(2.0**-4 * weight.abs(), 2.0**-10 * layer.scales[:, None])
    assert bool((error <= bound * (1 + 8 * torch.finfo(torch.float32).eps)).all())
    assert not layer.dequantize()[4].any()


@forms
def test_weights_may_be_rebuilt_into_a_tensor_that_is_there(storage: str, double_quantization: bool) -> None:
    layer = quantized(storage, double_quantization)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        whole = torch.zeros(96 + 2, 80, dtype=dtype)
        assert layer.dequantize_into(whole[1:-1]).data_ptr() == whole[1:].data_ptr()
        assert torch.equal(whole[1:-1], layer.dequantize(dtype))
        assert not whole[0].any()
        assert not whole[-1].any()


@forms
def test_bytes_in_memory_are_those_that_are_reckoned_with(storage: str, double_quantization: bool) -> None:
    layer = quantized(storage, double_quantization, outputs=512, inputs=1024)
    stored = [layer.weight, *layer.buffers()]
    found = sum(tensor.numel() * tensor.element_size() for tensor in stored)
    # The scales of int8 and fp8 and nf4's one mean are not counted.
    apart = 4 * 512 if storage in ("int8", "fp8") else 4 * double_quantization
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


# ----------------------------------------------------------------------------------------------------- products in FP8

PRODUCTS = [("nf4", True), ("nf4", False), ("fp8", False)]
products = pytest.mark.parametrize(("storage", "double_quantization"), PRODUCTS)


def meant_by(layer: QuantizedLinear) -> Fp8Rows:
    """The numbers that a layer multiplies with: its own, or those that NF4's weights become."""
    if layer.storage == "fp8":
        return Fp8Rows(layer.numbers, layer.scales)
    return quantize_rows(nf4.dequantize(layer.packed, torch.float32))


@products
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_in_fp8_are_those_of_the_numbers(storage: str, double_quantization: bool, dtype: torch.dtype) -> None:
    """Forward and backward within float32's sums of the exact products, and those within e4m3's rounding of the wide ones."""
    layer = QuantizedLinear.from_linear(
        linear(dtype=dtype), storage=storage, double_quantization=double_quantization, fp8_products=True
    )
    x, dy = torch.randn(2, 3, 80, dtype=dtype, requires_grad=True), torch.randn(2, 3, 96, dtype=dtype)
    out = layer(x)
    out.backward(dy)
    assert x.grad is not None
    assert (out.dtype, out.shape, x.grad.dtype, x.grad.shape) == (dtype, (2, 3, 96), dtype, x.shape)
    rows, grads = x.detach().view(6, 80), dy.view(6, 96)
    weight = meant_by(layer)
    exact = weight.wide(torch.float64)
    came = quantize_rows(grads, columns=weight.scales)
    assert layer.bias is not None
    eps, sums = torch.finfo(dtype).eps, 96 * torch.finfo(torch.float32).eps
    for found, left, right, wide, most in (
        (out.detach() - layer.bias, quantize_rows(rows).wide(torch.float64), exact.T, rows.double(), None),
        (x.grad, came.wide(torch.float64) / weight.scales.double(), exact, grads.double(), weight.scales.double()),
    ):
        size = left.abs() @ right.abs()
        error = (found.double().view(size.shape) - left @ right).abs()
        assert bool((error <= sums * size + 3 * eps * (size + 1)).all())
        # A number of e4m3 is off by a sixteenth of itself, the smallest ones by 2^-10 of a scale.
        scaled = wide if most is None else wide * most
        step = 2.0**-10 / 448 * scaled.abs().amax(1, keepdim=True) / (1 if most is None else most)
        off = torch.maximum(2.0**-4 * wide.abs(), step)
        assert bool(((left @ right - wide @ right).abs() <= (off @ right.abs()) * (1 + 1e-6)).all())


@products
def test_products_in_fp8_are_not_taken_in_float64_or_for_other_sizes(storage: str, double_quantization: bool) -> None:
    made = QuantizedLinear.from_linear(
        linear(), storage=storage, double_quantization=double_quantization, fp8_products=True
    )
    rebuilt = quantized(storage, double_quantization)
    x = torch.randn(4, 80)
    assert made.fp8_products
    assert torch.equal(made(x.double()), rebuilt(x.double()))
    assert not torch.equal(made(x), rebuilt(x))
    odd = QuantizedLinear.from_linear(
        linear(88, 80), storage=storage, double_quantization=double_quantization, fp8_products=True
    )
    assert not odd.fp8_products
    assert torch.equal(odd(x), quantized(storage, double_quantization, outputs=88)(x))


def test_int8_has_no_products_in_fp8() -> None:
    with pytest.raises(AssertionError):
        QuantizedLinear.from_linear(linear(), storage="int8", fp8_products=True)


@products
@pytest.mark.parametrize("cast", CASTS)
def test_products_in_fp8_stay_what_they_are(storage: str, double_quantization: bool, cast: Any) -> None:
    layer = QuantizedLinear.from_linear(
        linear(), storage=storage, double_quantization=double_quantization, fp8_products=True
    )
    x = torch.randn(4, 80)
    before = layer(x) - layer.bias
    after = cast(layer)
    assert torch.equal(after(x) - after.bias, before)


@products
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_step_with_products_in_fp8_goes_the_same_way(storage: str, double_quantization: bool, method: str) -> None:
    """Some percent of noise on the gradient of the very same weights; without it the test would compare nothing."""
    model = base(storage, double_quantization, stored=True)
    meant = {
        name: meant_by(module).wide() for name, module in model.named_modules() if isinstance(module, QuantizedLinear)
    }
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.fp8_products = True
    found = gradient(adapted(model, method))
    plain = tiny_model("llama")
    for name, weight in meant.items():
        plain.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)  # type: ignore[assignment]
    exact = gradient(adapted(plain, method))
    size = sum(float(value.norm()) ** 2 for value in exact.values()) ** 0.5
    assert 1e-3 * size < distance(found, exact) < 0.5 * size


def test_doras_first_output_is_the_bases() -> None:
    model = base("nf4", True, stored=True)
    with torch.no_grad():
        alone = model(input_ids=IDS).logits
        wrapped, _ = attach(model, LoraAdapter.model_validate({"method": "dora", "rank": 4}), seed=0)
        first = wrapped(input_ids=IDS).logits
    assert float((first - alone).norm()) <= torch.finfo(torch.float32).eps ** 0.5 * float(alone.norm())
