"""Frozen weights, however kept: forward and backward are those of one weight; the autograd node has its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from onlay.kernels import nf4
from onlay.kernels.fp8 import quantize_rows
from onlay.kernels.fp8_rows import Fp8Rows
from onlay.kernels.frozen import Fp8, Fp8FromNf4, Frozen, Rebuilt, Stored, frozen_product, grad_rows

OUTPUTS, INPUTS, TOKENS = (32, 16), 64, 5
F32 = torch.float32
EPS = torch.finfo(F32).eps


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(kind: str, *, bias: Tensor | None) -> tuple[Frozen, Tensor]:
    """A frozen weight and what it stands for, (48, 64) float64."""
    weight = drawn(sum(OUTPUTS), INPUTS)
    if kind == "stored":
        return Stored(weight, bias), weight.double()
    if kind == "rebuilt":
        return Rebuilt(weight.to, bias, F32, rows=len(weight), columns=INPUTS), weight.double()
    if kind.startswith("fp8"):
        rows = quantize_rows(weight)
        kept = kind == "fp8 kept transposed"
        return Fp8(rows.numbers, rows.scales, bias, dtype=F32, keep_transposed=kept), rows.wide(torch.float64)
    packed = tuple(nf4.quantize(part, double_quantization=True) for part in weight.split(OUTPUTS))
    rows = quantize_rows(torch.cat([nf4.dequantize(part, F32) for part in packed]))
    return Fp8FromNf4(packed, bias, dtype=F32), rows.wide(torch.float64)


KINDS = ["stored", "rebuilt", "fp8", "fp8 kept transposed", "nf4"]
kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
@pytest.mark.parametrize("has_bias", [False, True])
def test_both_products_are_of_the_same_weight(kind: str, has_bias: bool) -> None:
    bias = drawn(sum(OUTPUTS), seed=1) if has_bias else None
    frozen, weight = make(kind, bias=bias)
    assert (frozen.rows, frozen.columns, frozen.fp8) == (sum(OUTPUTS), INPUTS, kind not in ("stored", "rebuilt"))
    x, dy = drawn(TOKENS, INPUTS, seed=2), drawn(TOKENS, sum(OUTPUTS), seed=3)
    seen, came = x.double(), dy.double()
    if frozen.fp8:
        assert frozen.grad_columns is not None
        seen = quantize_rows(x).wide(torch.float64)
        came = quantize_rows(dy * frozen.grad_columns).wide(torch.float64) / frozen.grad_columns.double()
    else:
        assert frozen.grad_columns is None
    for found, left, right, more in (
        (frozen.product(x), seen, weight.T, 0 if bias is None else bias.double()),
        (frozen.back_product(dy), came, weight, 0),
    ):
        assert found.dtype == F32
        bound = 2 * (INPUTS + 2) * EPS * (left.abs() @ right.abs() + abs(more))
        assert bool(((found.double() - (left @ right + more)).abs() <= bound).all())


@pytest.mark.parametrize("kind", ["fp8", "fp8 kept transposed", "nf4"])
def test_rows_that_are_quantized_already_give_the_same(kind: str) -> None:
    frozen, _ = make(kind, bias=drawn(sum(OUTPUTS), seed=1))
    x, dy = drawn(TOKENS, INPUTS, seed=2), drawn(TOKENS, sum(OUTPUTS), seed=3)
    assert torch.equal(frozen.product(quantize_rows(x)), frozen.product(x))
    rows = grad_rows(frozen, dy)
    assert isinstance(rows, Fp8Rows)
    assert torch.equal(frozen.back_product(rows), frozen.back_product(dy))
    assert grad_rows(frozen, rows) is rows


@pytest.mark.parametrize("kind", ["stored", "rebuilt"])
def test_quantized_rows_are_for_fp8_alone(kind: str) -> None:
    frozen, _ = make(kind, bias=None)
    with pytest.raises(AssertionError, match="multiply in FP8"):
        frozen.product(quantize_rows(drawn(TOKENS, INPUTS)))


@kinds
def test_no_rows_at_all(kind: str) -> None:
    frozen, _ = make(kind, bias=drawn(sum(OUTPUTS), seed=1))
    assert frozen.product(torch.zeros(0, INPUTS)).shape == (0, frozen.rows)
    assert frozen.back_product(torch.zeros(0, frozen.rows)).shape == (0, INPUTS)


@kinds
@pytest.mark.parametrize("shape", [(TOKENS,), (2, 3), (), (0,)], ids=str)
def test_the_node_has_both_products_as_its_own(kind: str, shape: tuple[int, ...]) -> None:
    frozen, _ = make(kind, bias=None)
    x, dy = drawn(*shape, INPUTS, seed=2).requires_grad_(), drawn(*shape, frozen.rows, seed=3)
    bias = drawn(frozen.rows, seed=1).requires_grad_()
    out = frozen_product(x, frozen, bias)
    assert torch.equal(out, (frozen.product(x.detach().reshape(-1, INPUTS)) + bias).view_as(dy))
    out.backward(dy)
    assert x.grad is not None
    assert bias.grad is not None
    assert torch.equal(x.grad, frozen.back_product(dy.reshape(-1, frozen.rows)).view_as(x))
    assert torch.allclose(bias.grad, dy.reshape(-1, frozen.rows).sum(0))
    with torch.no_grad():
        assert torch.equal(frozen_product(x, frozen, None), frozen.product(x.reshape(-1, INPUTS)).view_as(dy))


def test_only_the_gradients_that_are_wanted_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen, _ = make("fp8", bias=None)
    calls: list[Any] = []
    monkeypatch.setattr(frozen, "back_product", calls.append)
    bias = torch.zeros(frozen.rows, requires_grad=True)
    frozen_product(drawn(TOKENS, INPUTS), frozen, bias).sum().backward()
    assert calls == []
    assert bias.grad is not None


def test_under_autocast_the_input_is_cast() -> None:
    rows = quantize_rows(drawn(32, INPUTS))
    frozen = Fp8(rows.numbers, rows.scales, None, dtype=torch.bfloat16)
    x = drawn(TOKENS, INPUTS, seed=2).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = frozen_product(x, frozen, None)
        out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, frozen.product(x.detach().bfloat16()))
    assert x.grad is not None
    assert x.grad.dtype == F32
