"""Causal attention on a CPU for short rows and narrow heads, by blocks of queries.

What and why.  Very small bases have heads of 8 numbers; there attention is most of a step, and SDPA's flash kernel
spends it on computing the scores again for the backward and on matrix products with narrow results.  Here blocks of
queries skip the keys to their right, the probabilities are kept, and narrow results are computed transposed:
bench/block_attention.py measures both.

    forward    S = scale Q K^T (causal), P = softmax(S), O = P V
    backward   dV = P^T dO, dS = P * (dO V^T - rowsum(P * dO V^T)), dQ = scale dS K, dK = scale dS^T Q

Layout.  Queries (N, R, T, D): R query heads share the keys and values (N, T, D) of their group, so N = rows x key heads;
they go into one product of R x block queries, and keys are never repeated.
Precision.  Everything in the dtype of the input (float32 or float64).
Kept for the backward.  Q, K, V and P: N R T^2 / 2 numbers, which is why it is for short rows.
When it is *not* used.  Off the CPU; with heads wider than WIDEST_HEAD, where SDPA is faster; in 16 bit; with attention masks, windows, dropout, soft-capping or sinks; when P would
pass MOST_PROBABILITY_BYTES: `fits` tells, and SDPA does the work.
Sources.  The blocks are those of FlashAttention (arXiv:2205.14135) without its recomputation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_QUERIES = 64
PIECE_NUMBERS = 2**20
"""Probabilities of one piece: 4 MiB in float32, which a few cores find in their caches."""
MOST_PROBABILITY_BYTES = 64 * 2**20
WIDEST_HEAD = 8


def fits(query: Tensor) -> bool:
    """Whether query (..., T, D) has narrow heads, and probabilities small enough to keep."""
    if query.shape[-1] > WIDEST_HEAD:
        return False
    return query.numel() // query.shape[-1] * query.shape[-2] // 2 * query.element_size() <= MOST_PROBABILITY_BYTES


def reference(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The same by definition: query (N, R, T, D), key and value (N, T, D) -> (N, R, T, D)."""
    scores = scale * query @ key[:, None].transpose(-1, -2)
    above = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(above, -torch.inf).softmax(-1) @ value[:, None]


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """query (N, R, T, D), key and value (N, T, D) -> (N, R, T, D); can be differentiated once."""
    out: Tensor = _BlockAttention.apply(query, key, value, scale)
    return out


def _pieces(groups: int, shared: int, tokens: int) -> Iterator[tuple[slice, int, int]]:
    """(groups, first query, end of queries) of each piece of the scores, in a fixed order."""
    for start in range(0, tokens, BLOCK_QUERIES):
        end = min(start + BLOCK_QUERIES, tokens)
        step = max(1, PIECE_NUMBERS // (shared * (end - start) * end))
        for first in range(0, groups, step):
            yield slice(first, min(first + step, groups)), start, end


def attend_in_blocks(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`causal_attention` by itself, and what `attend_in_blocks_backward` needs of it.

    Products whose result is only D wide are computed transposed, (D, ...) from (D, ...): a CPU's matrix product is
    three times as fast with a wide result as with a narrow one.
    """
    groups, shared, tokens, width = query.shape
    query, key, value = query * scale, key.transpose(1, 2).contiguous(), value.transpose(1, 2).contiguous()
    out = query.new_empty((groups, value.shape[1], shared, tokens))
    kept: list[Tensor] = []
    for which, start, end in _pieces(groups, shared, tokens):
        size = end - start
        rows = query[which, :, start:end].reshape(-1, shared * size, width)
        # The mask is what the product is added to: a pass over the scores less than filling them.
        scores = torch.baddbmm(_mask(query, shared, start, end), rows, key[which, :, :end])
        probabilities = torch.softmax(scores, -1, out=scores)
        found = torch.bmm(value[which, :, :end], probabilities.transpose(1, 2))
        out[which, :, :, start:end] = found.unflatten(2, (shared, size))
        kept.append(probabilities)
    return out.permute(0, 2, 3, 1), (query, key, value, *kept)


def attend_in_blocks_backward(grad: Tensor, kept: Sequence[Tensor], scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    query, key, value, *pieces = kept  # the query holds the scale already, so dK needs none
    groups, shared, tokens, _ = query.shape
    query, grad = query.permute(0, 3, 1, 2).contiguous(), grad.permute(0, 3, 1, 2).contiguous()
    grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    for (which, start, end), probabilities in zip(_pieces(groups, shared, tokens), pieces, strict=True):
        size = end - start
        grad_out = grad[which, ..., start:end].flatten(2)
        grad_value[which, :, :end] += torch.bmm(grad_out, probabilities)
        grad_scores = torch.ops.aten._softmax_backward_data(
            torch.bmm(grad_out.transpose(1, 2), value[which, :, :end]), probabilities, -1, probabilities.dtype
        )
        grad_key[which, :, :end] += torch.bmm(query[which, ..., start:end].flatten(2), grad_scores)
        found = torch.bmm(key[which, :, :end], grad_scores.transpose(1, 2))
        grad_query[which, ..., start:end] = found.unflatten(2, (shared, size))
    return grad_query.mul_(scale).permute(0, 2, 3, 1), grad_key.transpose(1, 2), grad_value.transpose(1, 2)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        out, kept = attend_in_blocks(query, key, value, scale)
        ctx.save_for_backward(*kept)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        return *attend_in_blocks_backward(grad, ctx.saved_tensors, ctx.scale), None


def _mask(like: Tensor, shared: int, start: int, end: int) -> Tensor:
    """(1, R x queries, keys): minus infinity where a key of this block of queries is to the right of the query."""
    mask = like.new_zeros((shared, end - start, end))
    mask[..., start:] = mask.new_full((end - start, end - start), -torch.inf).triu_(1)
    return mask.view(1, -1, end)
