"""Cross-entropy of logits and its gradient in place: against autograd in float64, the kernel against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from onlay.kernels import softmax_gradient as op
from tests.kernels.compare import assert_exact, assert_near, draw, in_each_place

SHAPES = [(1, 2), (5, 300), (4, 1), (3, 40000), (0, 7)]


def inputs(
    shape: tuple[int, int], *, scale: float, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Logits whose rows are farther apart than they are long, and classes: the first and the last among them."""
    logits = draw(shape[0], shape[1] + 3, seed=0, dtype=dtype, device=device, scale=scale)[:, :-3]
    targets = torch.randint(shape[1], (shape[0],), generator=torch.Generator().manual_seed(1))
    targets[:1], targets[1:2] = 0, shape[1] - 1
    return logits, targets.to(device)


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_is_autograd(shape: tuple[int, int], scale: float) -> None:
    logits, targets = inputs(shape, scale=scale)
    leaf = logits.clone().requires_grad_()
    expected = functional.cross_entropy(leaf, targets, reduction="none")
    [grad] = torch.autograd.grad(expected.sum(), leaf)
    before = logits.clone()
    assert_exact(op.softmax_gradient_(logits, targets, gradient=False), expected.detach())
    assert torch.equal(logits, before), "without a gradient they stay"
    assert_exact(op.softmax_gradient_(logits, targets), expected.detach())
    assert_exact(logits, grad)


@in_each_place
@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_errs_at_most_twice_as_much(
    shape: tuple[int, int], scale: float, device: str, dtype: torch.dtype
) -> None:
    from onlay.kernels.softmax_gradient_triton import softmax_gradient_

    logits, targets = inputs(shape, scale=scale, dtype=dtype, device=device)
    alone = logits.clone()
    without = softmax_gradient_(alone, targets, gradient=False)
    assert torch.equal(alone, logits), "without a gradient they stay"
    results = []
    for run, given in (
        (softmax_gradient_, logits.clone()),
        (op.reference_softmax_gradient_, logits.clone()),
        (op.reference_softmax_gradient_, logits.double()),
    ):
        results.append((run(given, targets, gradient=True), given))
    assert torch.equal(without, results[0][0])
    for ours, eager, exact in zip(*results, strict=True):
        assert_near(ours, eager, exact)


@in_each_place
def test_logits_that_overflow_a_naive_softmax(device: str, dtype: torch.dtype) -> None:
    from onlay.kernels.softmax_gradient_triton import softmax_gradient_

    logits = torch.tensor([[1e4, -1e4], [1e4, -1e4], [-float("inf"), 0.0]], dtype=dtype, device=device)
    nats = softmax_gradient_(logits, torch.tensor([1, 0, 1], device=device), gradient=True)
    spread = float(torch.tensor(1e4, dtype=dtype)) * 2
    assert nats.tolist() == [spread, 0.0, 0.0]
    assert logits.tolist() == [[1.0, -1.0], [0.0, 0.0], [0.0, 0.0]]


@in_each_place
def test_nothing_beyond_a_row_is_written(device: str, dtype: torch.dtype) -> None:
    from onlay.kernels.softmax_gradient_triton import softmax_gradient_

    whole = draw(3, 10, seed=0, dtype=dtype, device=device)
    before = whole.clone()
    softmax_gradient_(whole[:, :7], torch.tensor([0, 3, 6], device=device), gradient=True)
    assert torch.equal(whole[:, 7:], before[:, 7:])
    assert not torch.equal(whole[:, :7], before[:, :7])
