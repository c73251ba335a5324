"""What goes around a block, and dropout by seed: by definition in float64, the kernels against the reference, and the masks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from onlay.kernels import residual as op
from onlay.kernels.dispatch import runs_fast
from tests.kernels.compare import CUDA, assert_exact, assert_near, draw, in_each_place, updates, widened

SHAPES = [(5, 40), (1, 64), (70, 150), (2, 1), (0, 16)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)] if CUDA else ["cpu"]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("rank", [0, 1, 7])
def test_the_reference_is_the_definition(rank: int, residual: bool) -> None:
    y, x = draw(6, 10, seed=0), draw(6, 10, seed=1) if residual else None
    [update] = updates(6, (rank,), (10,), seed=2)
    expected = y + (0 if update is None else update.hidden @ update.b) + (0 if x is None else x)
    assert_exact(op.add_update(y, update=update, residual=x), expected)


@in_each_place
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("rank", [0, 1, 17, 130])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_errs_at_most_twice_as_much(
    shape: tuple[int, int], rank: int, residual: bool, device: str, dtype: torch.dtype
) -> None:
    from onlay.kernels.residual_triton import add_update

    y = draw(*shape, seed=0, dtype=dtype, device=device)
    x = draw(*shape, seed=1, dtype=dtype, device=device) if residual else None
    kept = None if x is None else x.clone()
    [update] = updates(shape[0], (rank,), shape[1:], seed=2, dtype=dtype, device=device)
    exact = op.reference_add_update(widened(y), update=widened(update), residual=widened(x))
    eager = op.reference_add_update(y, update=update, residual=x)
    assert_near(add_update(y.clone(), update=update, residual=x), eager, exact)
    assert kept is None or torch.equal(x, kept), "what goes around is read alone"


def mask(shape: tuple[int, ...], *, seed: int, p: float, device: str) -> Tensor:
    """Where numbers stay."""
    return op.drop_rows(torch.ones(shape, device=device), seed=seed, p=p) != 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.9])
def test_a_share_of_p_is_dropped_and_the_rest_grows(p: float, device: str) -> None:
    x = draw(300, 301, seed=0, dtype=torch.float32, device=device)
    y = op.drop_rows(x, seed=7, p=p)
    kept = mask(x.shape, seed=7, p=p, device=device)
    assert torch.equal(y == 0, ~kept)
    assert_near(y[kept], x[kept] / (1 - p), x[kept].double() / (1 - p))
    # Five standard deviations of a binomial share.
    assert abs(float(kept.double().mean()) - (1 - p)) <= 5 * (p * (1 - p) / x.numel()) ** 0.5


@pytest.mark.parametrize("device", DEVICES)
def test_the_way_back_has_the_mask_of_the_way_there(device: str) -> None:
    y, u = (draw(33, 1000, seed=seed, dtype=torch.float32, device=device) for seed in (0, 1))
    there = op.drop_rows(u, seed=5, p=0.3)
    back = op.add_dropped(y.clone(), u, seed=5, p=0.3)
    assert_near(back, y + there, y.double() + there.double())
    assert torch.equal(op.drop_rows(u, seed=5, p=0.3), there)


@pytest.mark.parametrize("device", DEVICES)
def test_draws_depend_on_the_seed_and_on_the_place(device: str) -> None:
    """Shares of places kept by two masks, or by one and the same moved along, are those of independent draws."""
    shape, p = (64, 4096), 0.5
    first = mask(shape, seed=1, p=p, device=device)
    assert not torch.equal(first, mask(shape, seed=2, p=p, device=device))
    flat = first.flatten()
    for other in (mask(shape, seed=2, p=p, device=device).flatten(), *(flat.roll(by) for by in (1, 1024, 8192))):
        both = float((flat & other).double().mean())
        assert abs(both - 0.25) <= 5 * (0.25 * 0.75 / flat.numel()) ** 0.5


def test_an_interpreted_kernel_draws_other_masks_than_the_cpu_generator() -> None:
    """Else the tests above would not have run the kernel."""
    x = torch.ones(40, 50)
    same = torch.equal(mask((40, 50), seed=3, p=0.5, device="cpu"), op.reference_mask(x, seed=3, p=0.5) != 0)
    assert same != runs_fast(x)


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows_are_dropped_from_none(device: str) -> None:
    x = torch.empty(0, 8, device=device)
    assert op.drop_rows(x, seed=1, p=0.5).shape == (0, 8)
    assert op.add_dropped(x, x, seed=1, p=0.5).shape == (0, 8)
