"""An attention with its norm, rotation, adapters and the residual around it, as one autograd node.

    n = norm(x);   q, k, v = rotate(n W^T + ..);   o = attend(q, k, v);   out = x + o W_o^T + ..      .. what the adapters add

What and why.  As onlay/kernels/mlp_block.py: what is cheap is computed again, and rows go through memory as few times as the products
allow.  Queries, keys and values before the rotation are not kept, and their gradients are written side by side for one product.
norm and residual may be missing, where a layer has another form around its attention.
Kept for the backward.  x and one number a row; q, k, v, o and what the attention keeps; h of each group.  Where queries and keys are
normalised by head, also the product before the rotation.  With `keep = False` x and h of the last group alone, and all but the output's product is done once more.
Precision.  That of the ops it is made of (normalise, rotate, causal_attention, lora_group).
When it is *not* used.  For attentions of another form; onlay/model/fuse.py tries what it recognises.
Sources.  As in the files of the ops.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from onlay.kernels.causal_attention import Attended, Examples, attend, attend_backward
from onlay.kernels.fp8 import quantize_rows
from onlay.kernels.lora_group import Factors, Group, draw_seed
from onlay.kernels.mlp_block import Norm, entered, gradients_through_norm, input_gradient
from onlay.kernels.residual import add_update
from onlay.kernels.rotate import Heads, Updates, rotate, rotate_backward


@dataclass(kw_only=True, slots=True)
class AttentionBlock:
    norm: Norm | None
    inner: Group
    """q, k and v, in this order; one layer may be all three."""
    outer: Group
    """The output projection."""
    heads: Heads
    scale: float
    window: int | None
    residual: bool
    keep: bool = True


def attention_block(
    x: Tensor, cos: Tensor, sin: Tensor, block: AttentionBlock, parameters: list[Tensor], *, examples: Examples
) -> Tensor:
    """x (..., D) -> (..., D), cos and sin (T, W) for the T rows of x.  parameters: those of `inner`, then those of `outer`."""
    out: Tensor = _AttentionBlock.apply(x, cos, sin, block, examples, *parameters)
    return out


@dataclass(slots=True)
class _Kept:
    r: Tensor | None
    q: Tensor
    k: Tensor
    v: Tensor
    attended: Attended
    hidden: Tensor | None
    y: Tensor | None
    """(T, (H + 2 G) D) before norms by head, where there are any."""
    head_r: Tensor | None


def _through(
    x: Tensor, cos: Tensor, sin: Tensor, block: AttentionBlock, inner: Factors, examples: Examples, *, seed: int
) -> _Kept:
    plain, given, r = entered(x, block.norm, fp8=block.inner.frozen.fp8)
    y = inner.product(given)
    hidden = inner.hidden_of(plain, seed=seed)
    turned = rotate(y, cos, sin, heads=block.heads, updates=_three(inner, hidden, block))
    attended = attend(turned.q, turned.k, turned.v, examples, scale=block.scale, window=block.window)
    again = block.heads.q_norm is not None
    return _Kept(r, turned.q, turned.k, turned.v, attended, hidden, y if again else None, turned.r)


def _three(factors: Factors, hidden: Tensor | None, block: AttentionBlock) -> Updates:
    q, k, v = factors.updates(hidden, block.heads.sizes)
    return q, k, v


class _AttentionBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, block: AttentionBlock, examples: Examples, *parameters: Tensor
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, x.shape[-1]).contiguous()
            inner, outer = _factors(block, parameters, x.dtype)
            seeds = draw_seed(block.inner), draw_seed(block.outer)
            kept = _through(rows, cos, sin, block, inner, examples, seed=seeds[0])
            o = kept.attended.o.flatten(1)
            y = outer.product(quantize_rows(o) if block.outer.frozen.fp8 else o)
            hidden_out = outer.hidden_of(o, seed=seeds[1])
            out = add_update(y, update=outer.updates(hidden_out)[0], residual=rows if block.residual else None)
        ctx.block, ctx.examples, ctx.seeds, ctx.shape, ctx.keep = block, examples, seeds, x.shape, block.keep
        ctx.way = kept.attended.way
        # The rounded factors are small: kept where anything is.
        ctx.factors = (inner, outer) if block.keep else None
        tensors: list[Tensor | None] = [rows, cos, sin, hidden_out, *parameters]
        if block.keep:
            tensors += [
                kept.r,
                kept.q,
                kept.k,
                kept.v,
                kept.hidden,
                kept.y,
                kept.head_r,
                kept.attended.o,
                *kept.attended.kept,
            ]
        ctx.save_for_backward(*tensors)
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        block: AttentionBlock = ctx.block
        count = block.inner.count + block.outer.count
        x, cos, sin, hidden_out, *rest = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            grad = grad.reshape(x.shape).contiguous()
            inner, outer = ctx.factors or _factors(block, rest[:count], x.dtype)
            kept = _unpacked(rest[count:], ctx.way) if ctx.keep else _through(
                x, cos, sin, block, inner, ctx.examples, seed=ctx.seeds[0]
            )  # fmt: skip
            o = kept.attended.o.flatten(1)
            g_out = outer.hidden_grad(grad)
            do = outer.add_input_grad(outer.back_product(grad), g_out, seed=ctx.seeds[1])
            found = outer.gradients(o, grad, hidden_out, g_out, seed=ctx.seeds[1])
            dq, dk, dv = attend_backward(
                do.view_as(kept.q), kept.q, kept.k, kept.v, kept.attended, ctx.examples, scale=block.scale, window=block.window
            )  # fmt: skip
            dy = rotate_backward(
                dq, dk, dv, cos, sin, heads=block.heads, y=kept.y, r=kept.head_r,
                updates=_three(inner, kept.hidden, block) if kept.y is not None else (None, None, None),
            )  # fmt: skip
            del dq, dk, dv, do
            g = inner.hidden_grad(dy)
            found = gradients_through_norm(x, dy, block.norm, kept.r, inner, kept.hidden, g, seed=ctx.seeds[0]) + found
            dx = None
            if ctx.needs_input_grad[0]:
                residual = grad if block.residual else None
                dx = input_gradient(x, dy, block.norm, kept.r, inner, g, seed=ctx.seeds[0], residual=residual)
        return None if dx is None else dx.view(ctx.shape), None, None, None, None, *found


def _unpacked(tensors: list[Any], way: str) -> _Kept:
    r, q, k, v, hidden, y, head_r, o, *more = tensors
    return _Kept(r, q, k, v, Attended(o, tuple(more), way), hidden, y, head_r)


def _factors(block: AttentionBlock, parameters: Any, dtype: torch.dtype) -> tuple[Factors, Factors]:
    middle = block.inner.count
    return Factors.of(block.inner, parameters[:middle], dtype), Factors.of(block.outer, parameters[middle:], dtype)
