"""RMSNorm as one node: the gradient in float64, and rounding beside the reference in float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from onlay.kernels.rms_norm import reference, rms_norm

SHAPES = [(5, 8), (2, 3, 64), (1, 1), (0, 16), (7, 33)]


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_right(shape: tuple[int, ...]) -> None:
    x, weight = draw(*shape, seed=0).requires_grad_(), draw(shape[-1], seed=1)
    assert torch.allclose(rms_norm(x, weight, 1e-5), reference(x, weight, 1e-5), rtol=1e-13, atol=1e-13)
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, weight, 1e-5), x)


def test_rounding_is_no_worse_than_twice_that_of_the_operations_one_by_one() -> None:
    x, weight, grad = (
        draw(*shape, seed=i, dtype=torch.float32) for i, shape in enumerate([(300, 64), (64,), (300, 64)])
    )

    def both(function: object, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        given = x.to(dtype).requires_grad_()
        y = function(given, weight.to(dtype), 1e-5)  # type: ignore[operator]
        y.backward(grad.to(dtype))
        assert given.grad is not None
        return y.detach().double(), given.grad.double()

    exact = both(reference, torch.float64)
    for ours, eager, truth in zip(both(rms_norm, torch.float32), both(reference, torch.float32), exact, strict=True):
        assert float((ours - truth).norm()) <= 2 * float((eager - truth).norm())


def test_a_row_of_zeros_stays_finite() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    y = rms_norm(x, torch.ones(8), 1e-6)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(y, torch.zeros_like(y))
    assert torch.isfinite(x.grad).all()
