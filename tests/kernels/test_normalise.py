"""RMSNorm with what stands next to it: the reference against autograd in float64, the kernels against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from onlay.kernels import normalise as op
from onlay.kernels.fp8_rows import reference_quantize_rows
from tests.kernels.compare import assert_exact, assert_near, draw, fp8_rounds, in_each_place, updates, widened

__all__ = ["fp8_rounds"]

SHAPES = [(5, 40), (1, 64), (3, 600), (33, 130), (2, 1), (0, 16)]


def by_definition(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    return torch.stack([row / torch.sqrt((row**2).sum() / len(row) + eps) for row in x]) * (offset + weight)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", SHAPES[:-1])
def test_the_reference_is_the_definition(shape: tuple[int, int], offset: float) -> None:
    x, weight = draw(*shape, seed=0), draw(shape[1], seed=1)
    found = op.normalise(x, weight, eps=1e-3, offset=offset)
    assert_exact(found.y, by_definition(x, weight, 1e-3, offset))
    assert_exact(1 / found.r.square(), x.square().mean(1) + 1e-3)
    assert found.rows is None


@pytest.mark.parametrize("rank", [0, 1, 5])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", SHAPES[:-1])
def test_the_reference_of_the_backward_is_autograd(shape: tuple[int, int], rank: int, residual: bool) -> None:
    x, weight, grad = draw(*shape, seed=0).requires_grad_(), draw(shape[1], seed=1), draw(*shape, seed=2)
    [update] = updates(shape[0], (rank,), shape[1:], seed=3)
    around = draw(*shape, seed=4) if residual else None
    y = by_definition(x, weight, 1e-3, 1.0)
    whole = grad if update is None else grad + update.hidden @ update.b
    # What goes around the block reaches x with a factor of one.
    out = (y * whole).sum() + (0 if around is None else (x * around).sum())
    [expected] = torch.autograd.grad(out, x)
    r = op.normalise(x.detach(), weight, eps=1e-3, offset=1.0).r
    assert_exact(
        op.normalise_backward(grad, x.detach(), weight, r, offset=1.0, update=update, residual=around), expected
    )


@pytest.mark.usefixtures("fp8_rounds")
def test_only_what_is_asked_for_is_made() -> None:
    x, weight = draw(4, 16, seed=0, dtype=torch.float16), draw(16, seed=1, dtype=torch.float16)
    both = op.normalise(x, weight, eps=1e-6, quantize=True)
    assert both.y is not None and both.rows is not None
    of_y = reference_quantize_rows(both.y)
    assert torch.equal(both.rows.scales, of_y.scales)
    assert torch.equal(both.rows.numbers.float(), of_y.numbers.float())
    assert op.normalise(x, weight, eps=1e-6, plain=False, quantize=True).y is None


@in_each_place
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_errs_at_most_twice_as_much(
    shape: tuple[int, int], offset: float, device: str, dtype: torch.dtype
) -> None:
    from onlay.kernels.normalise_triton import normalise

    x = draw(*shape, seed=0, dtype=dtype, device=device)
    weight = draw(shape[1], seed=1, dtype=dtype, device=device)
    given = {"eps": 1e-5, "offset": offset, "plain": True, "quantize": False}
    ours, eager = op.Normed(*normalise(x, weight, **given)), op.reference_normalise(x, weight, **given)
    exact = op.reference_normalise(x.double(), weight.double(), **given)
    assert_near(ours.y, eager.y, exact.y)
    assert_near(ours.r, eager.r, exact.r)


@in_each_place
@pytest.mark.usefixtures("fp8_rounds")
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_quantizes_the_rows_that_it_writes(shape: tuple[int, int], device: str, dtype: torch.dtype) -> None:
    from onlay.kernels.normalise_triton import normalise

    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("a GPU without FP8")
    x = draw(*shape, seed=0, dtype=dtype, device=device)
    if len(x) > 1:
        x[1] = 0.0
    weight = draw(shape[1], seed=1, dtype=dtype, device=device)
    found = op.Normed(*normalise(x, weight, eps=1e-5, offset=0.0, plain=True, quantize=True))
    expected = reference_quantize_rows(found.y)
    assert torch.equal(found.rows.scales, expected.scales)
    assert torch.equal(found.rows.numbers.float(), expected.numbers.float())
    alone = op.Normed(*normalise(x, weight, eps=1e-5, offset=0.0, plain=False, quantize=True))
    assert alone.y is None
    assert torch.equal(alone.rows.numbers.float(), expected.numbers.float())


@in_each_place
@pytest.mark.parametrize(("rank", "residual"), [(0, False), (0, True), (1, True), (16, False), (70, True)])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_of_the_backward_errs_at_most_twice_as_much(
    shape: tuple[int, int], rank: int, residual: bool, device: str, dtype: torch.dtype
) -> None:
    from onlay.kernels.normalise_triton import normalise_backward

    x, grad = (draw(*shape, seed=seed, dtype=dtype, device=device) for seed in (0, 2))
    weight = draw(shape[1], seed=1, dtype=dtype, device=device)
    [update] = updates(shape[0], (rank,), shape[1:], seed=3, dtype=dtype, device=device)
    around = draw(*shape, seed=4, dtype=dtype, device=device) if residual else None
    kept = None if around is None else around.clone()
    r = op.reference_normalise(x, weight, eps=1e-5, offset=1.0, plain=True, quantize=False).r
    true_r = op.reference_normalise(x.double(), weight.double(), eps=1e-5, offset=1.0, plain=True, quantize=False).r
    exact = op.reference_normalise_backward(
        *map(widened, (grad, x, weight)), true_r, offset=1.0, update=widened(update), residual=widened(around)
    )
    eager = op.reference_normalise_backward(grad, x, weight, r, offset=1.0, update=update, residual=around)
    ours = normalise_backward(grad.clone(), x, weight, r, offset=1.0, update=update, residual=around)
    assert_near(ours, eager, exact)
    assert kept is None or torch.equal(around, kept), "what goes around is read alone"
