"""Layers that share an input as one weight: the same products, without a second copy, and nothing that the layers notice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from onlay.kernels import nf4
from onlay.kernels.fp8 import quantize_rows
from onlay.kernels.frozen import Fp8, Fp8FromNf4, Rebuilt, Stored
from onlay.model.joined import joined
from onlay.model.load import weight_checksums
from onlay.model.quantize import QuantizedLinear

F32 = torch.float32
SIZES = (32, 16, 48)
INPUTS = 64
FORMS: list[tuple[str | None, bool, type]] = [
    (None, False, Stored), ("nf4", False, Rebuilt), ("int8", False, Rebuilt), ("fp8", False, Rebuilt),
    ("nf4", True, Fp8FromNf4), ("fp8", True, Fp8),
]  # fmt: skip
forms = pytest.mark.parametrize(("storage", "fp8_products", "kind"), FORMS)


def layers(storage: str | None, fp8_products: bool, *, biases: tuple[bool, ...] = (True, False, True)) -> nn.ModuleList:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = [nn.Linear(INPUTS, size, bias=bias) for size, bias in zip(SIZES, biases, strict=False)]
    if storage is None:
        return nn.ModuleList(plain).requires_grad_(False)
    return nn.ModuleList(
        QuantizedLinear.from_linear(layer, storage=storage, fp8_products=fp8_products) for layer in plain
    ).requires_grad_(False)


def outputs(made: nn.ModuleList, x: Tensor) -> Tensor:
    return torch.cat([layer(x) for layer in made], 1)


def bytes_of(made: nn.ModuleList) -> int:
    stores = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*made.parameters(), *made.buffers())
    }
    return sum(stores.values())


@forms
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_product_is_that_of_the_layers(storage: str | None, fp8_products: bool, kind: type, count: int) -> None:
    made = layers(storage, fp8_products)[:count]
    x = torch.randn(5, INPUTS, generator=torch.Generator().manual_seed(1))
    before, sums, size = outputs(made, x), weight_checksums(made), bytes_of(made)
    for _ in range(2):  # The second time they are joined already.
        frozen = joined(made, dtype=F32)
        assert type(frozen) is kind
        assert (frozen.rows, frozen.columns) == (sum(SIZES[:count]), INPUTS)
        found = frozen.product(x)
        assert float((found - before).abs().max()) <= 1e2 * torch.finfo(F32).eps * float(before.abs().max())
        assert torch.equal(outputs(made, x), before)
        assert weight_checksums(made) == sums
        assert bytes_of(made) == size
    back = frozen.back_product(torch.eye(frozen.rows))
    weight = torch.cat([layer.dequantize() if isinstance(layer, QuantizedLinear) else layer.weight for layer in made])
    # Of NF4 in FP8 each number is another one, off by half a unit in its last place.
    rounding = 2.0**-4 if kind is Fp8FromNf4 else 0
    largest = weight.abs().amax(1, keepdim=True)
    bound = 4 * torch.finfo(F32).eps * largest + torch.maximum(rounding * weight.abs(), rounding / 64 / 448 * largest)
    assert bool(((back - weight).abs() <= bound).all())


@pytest.mark.parametrize(("storage", "fp8_products"), [(None, False), ("fp8", True)])
def test_plain_numbers_are_held_once(storage: str | None, fp8_products: bool) -> None:
    made = layers(storage, fp8_products)
    first = joined(made, dtype=F32)
    again = joined(made, dtype=F32)
    whole = first.weight if isinstance(first, Stored) else first.numbers  # type: ignore[attr-defined]
    other = again.weight if isinstance(again, Stored) else again.numbers  # type: ignore[attr-defined]
    assert whole.data_ptr() == other.data_ptr() == made[0].weight.data_ptr()
    bits, row = whole.view(torch.uint8), 0
    for layer in made:
        assert layer.weight.data_ptr() == bits[row:].data_ptr()
        row += layer.out_features
    alone = joined(made[1:2], dtype=F32)
    assert alone.rows == SIZES[1]
    assert (alone.weight if isinstance(alone, Stored) else alone.numbers).data_ptr() == made[1].weight.data_ptr()  # type: ignore[attr-defined]


def test_states_are_saved_and_loaded_as_before(tmp_path: Any) -> None:
    from safetensors.torch import load_file, save_file

    made, other = layers(None, False), layers(None, False)
    joined(made, dtype=F32)
    save_file(made.state_dict(), tmp_path / "layers.safetensors")
    for layer in other:
        layer.weight.data.zero_()
    frozen = joined(other, dtype=F32)
    other.load_state_dict(load_file(tmp_path / "layers.safetensors"))
    x = torch.randn(3, INPUTS)
    assert torch.equal(frozen.product(x), joined(made, dtype=F32).product(x))


@forms
def test_biases(storage: str | None, fp8_products: bool, kind: type) -> None:
    made = layers(storage, fp8_products)
    nothing = torch.zeros(1, INPUTS)
    expected = torch.cat([made[0].bias, torch.zeros(SIZES[1]), made[2].bias])
    assert torch.equal(joined(made, dtype=F32).product(nothing)[0], expected)
    assert not joined(made, dtype=F32, bias=False).product(nothing).any()
    none = layers(storage, fp8_products, biases=(False, False, False))
    assert not joined(none, dtype=F32).product(nothing).any()


def test_the_transposed_copy_changes_nothing_but_memory() -> None:
    made = layers("fp8", True)
    dy = torch.randn(5, sum(SIZES))
    kept = joined(made, dtype=F32, keep_transposed=True)
    assert torch.equal(kept.back_product(dy), joined(made, dtype=F32).back_product(dy))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@forms
def test_on_a_gpu_both_products_are_of_one_weight(storage: str | None, fp8_products: bool, kind: type) -> None:
    if fp8_products and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no FP8")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = nn.ModuleList(nn.Linear(512, size, bias=size == 48) for size in (256, 48)).cuda().bfloat16()
    if storage is not None:
        made = nn.ModuleList(
            QuantizedLinear.from_linear(layer, storage=storage, fp8_products=fp8_products) for layer in made
        )
    made.requires_grad_(False)
    x, dy = torch.randn(130, 512).cuda().bfloat16(), torch.randn(130, 304).cuda().bfloat16()
    parts = []
    for layer in made:
        if isinstance(layer, nn.Linear) and not isinstance(layer, QuantizedLinear):
            parts.append(layer.weight.double())
        elif storage == "nf4" and fp8_products:
            parts.append(quantize_rows(nf4.dequantize(layer.packed, F32)).wide(torch.float64))
        else:
            parts.append(layer.dequantize(torch.float64 if fp8_products else torch.bfloat16).double())
    weight, bias = torch.cat(parts), torch.cat([torch.zeros(256).cuda(), made[1].bias]).double()
    for keep_transposed in (False, True):
        frozen = joined(made, dtype=torch.bfloat16, keep_transposed=keep_transposed)
        assert type(frozen) is kind
        seen, came = x.double(), dy.double()
        if frozen.grad_columns is not None:
            seen = quantize_rows(x).wide(torch.float64)
            came = quantize_rows(dy, columns=frozen.grad_columns).wide(torch.float64) / frozen.grad_columns.double()
        for found, exact, size in (
            (frozen.product(x), seen @ weight.T + bias, seen.abs() @ weight.abs().T + bias.abs()),
            (frozen.back_product(dy), came @ weight, came.abs() @ weight.abs()),
        ):
            # Tensor cores add 32 numbers of FP8 at a time to a sum of 13 bits; the rest is rounding to bfloat16.
            steps = 16 * 2.0**-13 + 2 * torch.finfo(torch.bfloat16).eps
            assert found.dtype == torch.bfloat16
            assert bool(((found.double() - exact).abs() <= steps * size).all())


@pytest.mark.parametrize("storage", ["nf4", "fp8"])
def test_in_float64_nothing_is_multiplied_in_fp8(storage: str) -> None:
    made = layers(storage, True)
    frozen = joined(made, dtype=torch.float64)
    assert type(frozen) is Rebuilt
    x = torch.randn(3, INPUTS, dtype=torch.float64)
    error = (frozen.product(x) - outputs(made, x)).abs()
    assert float(error.max()) <= 1e3 * torch.finfo(torch.float64).eps


def test_layers_that_do_not_belong_together_are_refused() -> None:
    mixed = [*layers(None, False)[:1], *layers("nf4", False)[:1]]
    with pytest.raises(ValueError, match=r"different kinds.*nf4"):
        joined(mixed, dtype=F32)
    with pytest.raises(ValueError, match="different kinds"):
        joined([*layers("nf4", True)[:1], *layers("nf4", False)[:1]], dtype=F32)
    with pytest.raises(ValueError, match="different kinds"):
        joined([nn.Linear(8, 4), nn.Linear(4, 4)], dtype=F32)
    with pytest.raises(ValueError, match="for work in"):
        joined(layers(None, False), dtype=torch.bfloat16)
