"""Queries, keys and values: the reference by hand and against autograd in float64, the kernels against the reference."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from onlay.kernels import rotate as op
from tests.kernels.compare import assert_exact, assert_near, draw, in_each_place, updates, widened

SHAPES = [(5, 4, 2, 32, 32), (1, 2, 1, 80, 40), (37, 2, 1, 128, 128), (3, 1, 1, 12, 4), (0, 2, 1, 16, 16)]
"""(tokens T, heads H, groups G, width D, turned W): odd ones, and heads that are turned in part."""
RANKS = [(0, 0, 0), (1, 0, 5), (16, 20, 70)]


def heads_of(
    queries: int, groups: int, width: int, *, norms: bool, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> op.Heads:
    """Norms by head with a weight each, where asked for."""
    q_norm, k_norm = (draw(width, seed=seed, dtype=dtype, device=device) if norms else None for seed in (20, 21))
    return op.Heads(queries=queries, groups=groups, width=width, q_norm=q_norm, k_norm=k_norm, eps=1e-3, offset=1.0)


def angles(
    tokens: int, turned: int, *, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """cos and sin, of other angles on the left than on the right: the op is more general than models are."""
    drawn = draw(tokens, turned, seed=22)
    return drawn.cos().to(dtype).to(device), drawn.sin().to(dtype).to(device)


def projected(tokens: int, heads: op.Heads, *, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    """y, whose rows are farther apart than they are long."""
    return draw(tokens, sum(heads.sizes) + 3, seed=23, dtype=dtype, device=device)[:, 1:-2]


def gradients(
    tokens: int, heads: op.Heads, *, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> tuple[Tensor, ...]:
    """dq, dk and dv as attention leaves them: head by head."""
    counts = (heads.queries, heads.groups, heads.groups)
    return tuple(
        draw(count, tokens, heads.width, seed=24 + i, dtype=dtype, device=device).transpose(0, 1)
        for i, count in enumerate(counts)
    )


@pytest.mark.parametrize("norms", [False, True])
def test_the_reference_is_the_definition(norms: bool) -> None:
    """Row by row and head by head, with numbers turned in the plane of (x_i, x_{i + W/2})."""
    tokens, queries, groups, width, turned = 3, 4, 2, 10, 6
    heads = heads_of(queries, groups, width, norms=norms)
    y, given = projected(tokens, heads), updates(tokens, (2, 0, 3), heads.sizes, seed=1)
    angle = draw(tokens, turned // 2, seed=22)
    cos, sin = (torch.cat([half, half], 1) for half in (angle.cos(), angle.sin()))
    found = op.rotate(y, cos, sin, heads=heads, updates=given)
    start = 0
    for name, size, update, norm in zip("qkv", heads.sizes, given, (heads.q_norm, heads.k_norm, None), strict=True):
        z = y[:, start : start + size] + (0 if update is None else update.hidden @ update.b)
        start += size
        for token in range(tokens):
            for head in range(size // width):
                x = z[token, head * width : (head + 1) * width].clone()
                if norm is not None:
                    x = x / math.sqrt(float((x * x).mean()) + heads.eps) * (norm + heads.offset)
                expected = x.clone()
                for i in range(turned // 2 if name != "v" else 0):
                    a, j = float(angle[token, i]), i + turned // 2
                    expected[i] = x[i] * math.cos(a) - x[j] * math.sin(a)
                    expected[j] = x[j] * math.cos(a) + x[i] * math.sin(a)
                assert_exact(getattr(found, name)[token, head], expected)
    assert (found.r is not None) == norms


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_of_the_backward_is_autograd(
    shape: tuple[int, int, int, int, int], ranks: tuple[int, int, int], norms: bool
) -> None:
    tokens, queries, groups, width, turned = shape
    heads = heads_of(queries, groups, width, norms=norms)
    cos, sin = angles(tokens, turned)
    y, given = projected(tokens, heads).requires_grad_(), updates(tokens, ranks, heads.sizes, seed=1)
    rotated = op.reference_rotate(y, cos, sin, heads=heads, updates=given)
    grads = gradients(tokens, heads)
    [expected] = torch.autograd.grad([rotated.q, rotated.k, rotated.v], y, grads)
    r = None if rotated.r is None else rotated.r.detach()
    kept = {"y": y.detach(), "r": r, "updates": given} if norms else {}
    assert_exact(op.rotate_backward(*grads, cos, sin, heads=heads, **kept), expected)


@in_each_place
@pytest.mark.parametrize(("ranks", "norms"), [(RANKS[0], False), (RANKS[0], True), (RANKS[1], True), (RANKS[2], False)])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernels_err_at_most_twice_as_much(
    shape: tuple[int, int, int, int, int], ranks: tuple[int, int, int], norms: bool, device: str, dtype: torch.dtype
) -> None:
    from onlay.kernels import rotate_triton

    def fast_rotate(*given: Tensor, heads: op.Heads, updates: op.Updates) -> op.Rotated:
        return op.Rotated(*rotate_triton.rotate(*given, heads=heads, updates=updates))

    tokens, queries, groups, width, turned = shape
    heads = heads_of(queries, groups, width, norms=norms, dtype=dtype, device=device)
    wide_heads = replace(heads, q_norm=widened(heads.q_norm), k_norm=widened(heads.k_norm))
    cos, sin = angles(tokens, turned, dtype=dtype, device=device)
    y = projected(tokens, heads, dtype=dtype, device=device)
    given = updates(tokens, ranks, heads.sizes, seed=1, dtype=dtype, device=device)
    grads = gradients(tokens, heads, dtype=dtype, device=device)
    results = []
    for forward, backward, form in (
        (fast_rotate, rotate_triton.rotate_backward, lambda value: value),
        (op.reference_rotate, op.reference_rotate_backward, lambda value: value),
        (op.reference_rotate, op.reference_rotate_backward, widened),
    ):
        of = wide_heads if form is widened else heads
        turns = form(cos), form(sin)
        found = forward(form(y), *turns, heads=of, updates=form(given))
        kept = {"y": form(y), "r": found.r, "updates": form(given)}
        if not norms:
            kept = {"y": None, "r": None, "updates": (None, None, None)}
        dy = backward(*form(grads), *turns, heads=of, **kept)
        results.append((found.q, found.k, found.v, dy, *([found.r] if norms else [])))
    for ours, eager, exact in zip(*results, strict=True):
        assert ours.is_contiguous()
        assert_near(ours, eager, exact)
