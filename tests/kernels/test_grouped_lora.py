"""Stacked adapters with a mask against each row's own factors, in float64 and within what float32 rounds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from onlay.kernels.grouped_lora import grouped_lora_, reference, scale_base_

OWNERS: list[list[int | None]] = [[0, 1, None, 2, 1], [None, None], [2], [0, 0, 0]]
RANKS = (3, 1, 5)
SCALES = [2.0, 0.5, 1.25]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stacked(inputs: int, outputs: int, owners: list[int | None]) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor, Tensor]:  # fmt: skip
    a = [draw(rank, inputs, seed=rank) for rank in RANKS]
    b = [draw(outputs, rank, seed=10 + rank) for rank in RANKS]
    starts = [0, 3, 4]
    mask = torch.zeros(len(owners), sum(RANKS), dtype=torch.float64)
    for row, own in enumerate(owners):
        if own is not None:
            mask[row, starts[own] : starts[own] + RANKS[own]] = 1
    tall = torch.cat([scale * one.t() for scale, one in zip(SCALES, b, strict=True)])
    return a, b, torch.cat(a), tall, mask


@pytest.mark.parametrize("owners", OWNERS)
@pytest.mark.parametrize("tokens", [(), (1,), (4,), (2, 3), (0,)])
def test_it_is_each_rows_own_adapter(owners: list[int | None], tokens: tuple[int, ...]) -> None:
    a, b, wide, tall, mask = stacked(7, 9, owners)
    x, y = draw(len(owners), *tokens, 7, seed=1), draw(len(owners), *tokens, 9, seed=2)
    expected = reference(y, x, a=a, b=b, scales=SCALES, owners=owners)
    found = grouped_lora_(y.clone(), x, a=wide, b=tall, mask=mask)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    for row, own in enumerate(owners):
        if own is None:
            assert torch.equal(found[row], y[row]), "a row without an adapter is the base's, to the last bit"
        elif x.numel():
            assert not torch.equal(found[row], y[row])
    # float32 is no further from float64 than the definition in float32 is, twice over.
    narrow = grouped_lora_(y.float(), x.float(), a=wide.float(), b=tall.float(), mask=mask.float())
    eager = reference(
        y.float(), x.float(), a=[t.float() for t in a], b=[t.float() for t in b], scales=SCALES, owners=owners
    )
    ulp = torch.finfo(torch.float32).eps * float(expected.abs().max()) if expected.numel() else 0.0
    assert float((narrow - expected).norm()) <= 2 * float((eager - expected).norm()) + ulp


def test_without_a_mask_every_row_has_every_adapter() -> None:
    a, b, wide, tall, _ = stacked(7, 9, [0, 1])
    x, y = draw(2, 7, seed=1), draw(2, 9, seed=2)
    summed = y.clone()
    for own in range(3):
        summed = reference(summed, x, a=a, b=b, scales=SCALES, owners=[own, own])
    assert torch.allclose(grouped_lora_(y.clone(), x, a=wide, b=tall, mask=None), summed, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tokens", [(), (3,), (2, 2)])
def test_scaling_leaves_the_bias_alone(tokens: tuple[int, ...]) -> None:
    product, bias, gain = draw(2, *tokens, 5, seed=1), draw(5, seed=2), draw(2, 5, seed=3)
    found = scale_base_(product + bias, gain=gain, bias=bias)
    rows = torch.stack([gain[row] * product[row] + bias for row in range(2)])
    assert torch.allclose(found, rows, rtol=0, atol=1e-12)
    plain = torch.stack([gain[row] * product[row] for row in range(2)])
    assert torch.equal(scale_base_(product.clone(), gain=gain, bias=None), plain)
