"""A gated MLP with its norm, its adapters and the residual around it, as one autograd node.

    n = norm(x);   p = act(n W_g^T + ..) (n W_u^T + ..);   out = x + p W_d^T + ..        .. what the adapters add (onlay/kernels/lora_group.py)

What and why.  Autograd would keep every result on this way, gate and up each several times, and read and write them for each small
op.  Here what is cheap is computed again from what is kept, and each wide row is touched as few times as its products allow:
onlay/kernels/normalise.py and gated.py.  norm and residual may be missing, where a layer has another form around its MLP.
Kept for the backward.  x and one number a row, gate and up as the base computed them, and h of each group; with `keep = False`
x and h of the last group alone, and the first product is done once more.
Tokens in tiles.  Rows do not depend on one another: with `tile_tokens` the node goes over them part by part, keeps x alone, and the
widest rows never exist for more than a tile.
Precision.  That of the ops it is made of: matrix products in the dtype of x, sums and everything between in float32.
When it is *not* used.  For MLPs of another form; onlay/model/fuse.py tries what it recognises.
Sources.  LoRA (arXiv:2106.09685), GLU variants (arXiv:2002.05202), selective recomputation (arXiv:2205.05198), tiled MLP (arXiv:2506.13996).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from onlay.kernels.fp8 import quantize_rows
from onlay.kernels.fp8_rows import Fp8Rows
from onlay.kernels.gated import Activation, gated, gated_backward
from onlay.kernels.lora_group import Factors, Group, draw_seed
from onlay.kernels.normalise import normalise, normalise_backward
from onlay.kernels.residual import add_update


@dataclass(frozen=True, kw_only=True, slots=True)
class Norm:
    weight: Tensor
    eps: float
    offset: float = 0.0


@dataclass(kw_only=True, slots=True)
class MlpBlock:
    norm: Norm | None
    inner: Group
    """gate and up, in this order; one layer may be both."""
    outer: Group
    """down"""
    activation: Activation
    residual: bool
    keep: bool = True
    tile_tokens: int | None = None


def mlp_block(x: Tensor, block: MlpBlock, parameters: list[Tensor]) -> Tensor:
    """x (..., D) -> (..., D).  parameters: those of `inner`, then those of `outer`.  Can be differentiated once."""
    out: Tensor = _MlpBlock.apply(x, block, *parameters)
    return out


@dataclass(slots=True)
class _Kept:
    r: Tensor | None
    joined: Tensor | None
    """gate and up (T, 2 I)"""
    hidden: Tensor | None
    hidden_out: Tensor | None


def entered(x: Tensor, norm: Norm | None, *, fp8: bool) -> tuple[Tensor, Tensor | Fp8Rows, Tensor | None]:
    """norm(x), or x: as the adapters are given it, as the frozen weights are given it, and r of the norm."""
    if norm is None:
        return x, quantize_rows(x) if fp8 else x, None
    normed = normalise(x, norm.weight, eps=norm.eps, offset=norm.offset, quantize=fp8)
    assert normed.y is not None
    return normed.y, normed.y if normed.rows is None else normed.rows, normed.r


def _through(x: Tensor, block: MlpBlock, inner: Factors, *, seed: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """gate and up (T, 2 I), h, and r of the norm."""
    plain, given, r = entered(x, block.norm, fp8=block.inner.frozen.fp8)
    return inner.product(given), inner.hidden_of(plain, seed=seed), r


def _forward(
    x: Tensor, block: MlpBlock, inner: Factors, outer: Factors, seeds: tuple[int, int]
) -> tuple[Tensor, _Kept]:
    joined, hidden, r = _through(x, block, inner, seed=seeds[0])
    gate, up = joined.chunk(2, 1)
    more = inner.updates(hidden, [gate.shape[1]] * 2)
    p = gated(gate, up, activation=block.activation, gate_update=more[0], up_update=more[1])
    y = outer.product(quantize_rows(p) if block.outer.frozen.fp8 else p)
    hidden_out = outer.hidden_of(p, seed=seeds[1])
    out = add_update(y, update=outer.updates(hidden_out)[0], residual=x if block.residual else None)
    return out, _Kept(r, joined, hidden, hidden_out)


def _backward(
    x: Tensor, grad: Tensor, block: MlpBlock, inner: Factors, outer: Factors, seeds: tuple[int, int], kept: _Kept, *,
    needs_x: bool,
) -> tuple[Tensor | None, list[Tensor]]:  # fmt: skip
    """dx, and the gradients of the parameters.  Writes over what was kept."""
    if kept.joined is None:
        kept.joined, kept.hidden, kept.r = _through(x, block, inner, seed=seeds[0])
    gate, up = kept.joined.chunk(2, 1)
    more = inner.updates(kept.hidden, [gate.shape[1]] * 2)
    g_out = outer.hidden_grad(grad)
    dp = outer.back_product(grad)
    later = None if block.outer.dropout else outer.input_update(g_out)
    if later is None:
        dp = outer.add_input_grad(dp, g_out, seed=seeds[1])
    p = gated_backward(
        gate, up, dp, activation=block.activation, gate_update=more[0], up_update=more[1], grad_update=later
    )
    if kept.hidden_out is None:
        kept.hidden_out = outer.hidden_of(p, seed=seeds[1])
    found_outer = outer.gradients(p, grad, kept.hidden_out, g_out, seed=seeds[1])
    del p, dp
    g = inner.hidden_grad(kept.joined)
    found = gradients_through_norm(x, kept.joined, block.norm, kept.r, inner, kept.hidden, g, seed=seeds[0])
    dx = None
    if needs_x:
        residual = grad if block.residual else None
        dx = input_gradient(x, kept.joined, block.norm, kept.r, inner, g, seed=seeds[0], residual=residual)
    return dx, found + found_outer


def gradients_through_norm(
    x: Tensor, dy: Tensor, norm: Norm | None, r: Tensor | None, factors: Factors, hidden: Tensor | None, g: Tensor | None, *,
    seed: int,
) -> list[Tensor]:  # fmt: skip
    """A group's gradients where its input is norm(x), which is not kept: dA = diag(w) (g r)^T x."""
    if norm is None or r is None:
        return factors.gradients(x, dy, hidden, g, seed=seed)
    # In fp16 g r could leave the range, what is dropped is not known by x alone, and a folded weight's gradient has no g.
    if factors.group.dropout or factors.folded is not None or x.dtype == torch.float16:
        y = normalise(x, norm.weight, eps=norm.eps, offset=norm.offset).y
        assert y is not None
        return factors.gradients(y, dy, hidden, g, seed=seed)
    scaled = None if g is None else (g * r[:, None]).to(g.dtype)
    columns = norm.weight.to(r.dtype) + norm.offset
    return factors.gradients(x, dy, hidden, scaled, columns=columns, seed=seed)


def input_gradient(
    x: Tensor, dy: Tensor, norm: Norm | None, r: Tensor | None, factors: Factors, g: Tensor | None, *, seed: int,
    residual: Tensor | None,
) -> Tensor:  # fmt: skip
    """dx (T, D) of a group whose input is norm(x), or x: with what goes around it."""
    dn = factors.back_product(dy)
    update = None if factors.group.dropout else factors.input_update(g)
    if update is None:
        dn = factors.add_input_grad(dn, g, seed=seed)
    if norm is None or r is None:
        return add_update(dn, update=update, residual=residual)
    return normalise_backward(dn, x, norm.weight, r, offset=norm.offset, update=update, residual=residual)


class _MlpBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, block: MlpBlock, *parameters: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, x.shape[-1]).contiguous()
            inner, outer = _factors(block, parameters, x.dtype)
            seeds = draw_seed(block.inner), draw_seed(block.outer)
            tile = block.tile_tokens
            ctx.tile = tile if tile is not None and tile < len(rows) else None
            ctx.block, ctx.seeds, ctx.shape, ctx.spent = block, seeds, x.shape, False
            # The rounded factors are small: kept where anything is.
            ctx.factors = (inner, outer) if block.keep and ctx.tile is None else None
            if ctx.tile is not None:
                out = torch.empty_like(rows)
                for number, (some, part) in enumerate(zip(rows.split(ctx.tile), out.split(ctx.tile), strict=True)):
                    part.copy_(_forward(some, block, inner, outer, _of_tile(seeds, number))[0])
                ctx.save_for_backward(rows, *parameters)
                return out.view(x.shape)
            out, kept = _forward(rows, block, inner, outer, seeds)
            keep = block.keep
            tensors = (
                (kept.r, kept.joined, kept.hidden, kept.hidden_out) if keep else (None, None, None, kept.hidden_out)
            )
            ctx.keep = keep
            ctx.save_for_backward(rows, *parameters, *tensors)
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        block: MlpBlock = ctx.block
        count = block.inner.count + block.outer.count
        if ctx.spent:
            raise RuntimeError("the gradients of an MLP block are written over what it kept: backward runs once")
        ctx.spent = True
        rows, *rest = ctx.saved_tensors
        needs_x = ctx.needs_input_grad[0]
        with torch.autocast(grad.device.type, enabled=False):
            grad = grad.reshape(rows.shape).contiguous()
            inner, outer = ctx.factors or _factors(block, rest[:count], rows.dtype)
            if ctx.tile is None:
                kept = _Kept(*rest[count:])
                dx, found = _backward(rows, grad, block, inner, outer, ctx.seeds, kept, needs_x=needs_x)
            else:
                dx, found = _backward_in_tiles(ctx, rows, grad, inner, outer, needs_x=needs_x)
        return None if dx is None else dx.view(ctx.shape), None, *found


def _backward_in_tiles(
    ctx: Any, rows: Tensor, grad: Tensor, inner: Factors, outer: Factors, *, needs_x: bool
) -> tuple[Tensor | None, list[Tensor]]:
    dx = torch.empty_like(rows) if needs_x else None
    sums: list[Tensor] = []
    for number, some in enumerate(rows.split(ctx.tile)):
        place = slice(number * ctx.tile, number * ctx.tile + len(some))
        part, found = _backward(
            some, grad[place], ctx.block, inner, outer, _of_tile(ctx.seeds, number), _Kept(None, None, None, None), needs_x=needs_x
        )  # fmt: skip
        if dx is not None and part is not None:
            dx[place] = part
        if sums:
            torch._foreach_add_(sums, found)
        else:
            sums = found
    return dx, sums


def _of_tile(seeds: tuple[int, int], number: int) -> tuple[int, int]:
    return (seeds[0] + number) % 2**31, (seeds[1] + number) % 2**31


def _factors(block: MlpBlock, parameters: Any, dtype: torch.dtype) -> tuple[Factors, Factors]:
    middle = block.inner.count
    return Factors.of(block.inner, parameters[:middle], dtype), Factors.of(block.outer, parameters[middle:], dtype)
