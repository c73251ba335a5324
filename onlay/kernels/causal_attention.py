"""Causal attention of packed rows, forward and backward by itself, without an autograd graph of its own.

What and why.  A block that is one autograd node (onlay/kernels/attention_block.py) needs both halves as functions.  Queries, keys and values
stay where the rotation wrote them, (T, heads, D), and keys are not repeated for the heads that share them.

    o = softmax(q k^T scale + causal mask within each example) v

Ways, by device and by what the rows are like; measured on an H200 with 32 query and 8 key heads of 128, 16,384 tokens, forward + backward (docs/log.md):
    cudnn     all examples equally long, no window:             8 x 2,048: 2.2 ms, 1 x 16,384: 14.0 ms
    flash     by cumulative lengths, any window:                8 x 2,048: 3.8 ms, 1 x 16,384: 24.0 ms, GSM8K rows 1.5 ms
    blocks    on a CPU, examples equally long, narrow heads: onlay/kernels/block_attention.py
    host      on a CPU, examples equally long, heads of any width: PyTorch's kernel for CPUs
    reference by definition, example by example: everything else, and float64 on a GPU
Layout.  q (T, H, D), k and v (T, G, D), contiguous; borders (N + 1,) int32.
Precision.  The kernels': products in the dtype of the input, softmax and sums in float32.
Kept for the backward.  q, k, v, o and the logsumexp.
When it is *not* used.  With soft-capping, sinks or other masks, which neither kernel has: then the base's own attention runs.
Sources.  FlashAttention-2 (arXiv:2307.08691); PyTorch's own operators for both kernels.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from onlay.kernels.block_attention import attend_in_blocks, attend_in_blocks_backward
from onlay.kernels.block_attention import fits as narrow

WIDEST_CUDNN = 128
WIDEST_FLASH = 256
LEAST_CUDNN, EVEN_CUDNN = 128, 64
"""Tokens of an example: shorter ones gain nothing, and odd lengths not every version of cuDNN has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Examples:
    """How T tokens are divided."""

    borders: Tensor
    """(N + 1,) int32 on the device of the work."""
    longest: int
    equal: int | None = None
    """Tokens of each example, where all have as many."""


@dataclass(frozen=True, slots=True)
class Attended:
    o: Tensor
    """(T, H, D)"""
    kept: tuple[Tensor, ...]
    """Beside q, k, v and o, for the backward."""
    way: str


def attend(q: Tensor, k: Tensor, v: Tensor, examples: Examples, *, scale: float, window: int | None = None) -> Attended:
    """o (T, H, D).  window: tokens that a token sees, itself among them; None: all before it."""
    way = choose(q, examples, window=window, groups=k.shape[1])
    if way == "cudnn":
        rows = [_rows(x, examples) for x in (q, k, v)]
        out, lse, *_, seed, offset, _ = torch.ops.aten._cudnn_attention_forward(
            *rows, None, None, None, examples.longest, examples.longest, True, 0.0, True, False, scale=scale
        )
        return Attended(_tokens(out), (lse, seed, offset), way)
    if way == "flash":
        out, lse, seed, unused, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, examples.borders, examples.borders, examples.longest, examples.longest, 0.0, True, False,
            scale=scale, **_window(window),
        )  # fmt: skip
        return Attended(out, (lse, seed, unused), way)
    if way == "blocks":
        out, kept = attend_in_blocks(
            _grouped(q, k, examples), _rows(k, examples).flatten(0, 1), _rows(v, examples).flatten(0, 1), scale
        )
        return Attended(_ungrouped(out, q, examples), kept, way)
    if way == "host":
        rows = [_rows(x, examples) for x in (q, _repeated(k, q), _repeated(v, q))]
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*rows, 0.0, True, scale=scale)
        return Attended(_tokens(out), (lse,), way)
    return Attended(reference(q, k, v, examples, scale=scale, window=window), (), way)


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, attended: Attended, examples: Examples, *, scale: float,
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq (T, H, D), dk and dv (T, G, D) of grad (T, H, D)."""
    way = attended.way
    if way == "cudnn":
        lse, seed, offset = attended.kept
        grad, q, k, v, out = (_rows(x, examples) for x in (grad, q, k, v, attended.o))
        found = torch.ops.aten._cudnn_attention_backward(
            grad, q, k, v, out, lse, seed, offset, None, None, None, examples.longest, examples.longest, 0.0, True, scale=scale
        )  # fmt: skip
        dq, dk, dv = (_tokens(x) for x in found)
        return dq, dk, dv
    if way == "flash":
        lse, seed, unused = attended.kept
        flash: Any = torch.ops.aten._flash_attention_backward(
            grad, q, k, v, attended.o, lse, examples.borders, examples.borders, examples.longest, examples.longest, 0.0,
            True, seed, unused, scale=scale, **_window(window),
        )  # fmt: skip
        return flash[0], flash[1], flash[2]
    if way == "blocks":
        found = attend_in_blocks_backward(_grouped(grad, k, examples), attended.kept, scale)
        dk, dv = (x.unflatten(0, (-1, k.shape[1])) for x in found[1:])
        return _ungrouped(found[0], q, examples), _tokens(dk), _tokens(dv)
    if way == "host":
        rows = [_rows(x, examples) for x in (grad, q, _repeated(k, q), _repeated(v, q), attended.o)]
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *rows, attended.kept[0], 0.0, True, scale=scale
        )  # fmt: skip
        dq, dk, dv = (_tokens(x) for x in found)
        return dq, _summed(dk, k), _summed(dv, v)
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        out = reference(q, k, v, examples, scale=scale, window=window)
        dq, dk, dv = torch.autograd.grad(out, [q, k, v], grad)
    return dq, dk, dv


def choose(q: Tensor, examples: Examples, *, window: int | None, groups: int) -> str:
    """One of the ways above."""
    if q.device.type == "cpu":
        if examples.equal is None or window is not None or q.dtype not in (torch.float32, torch.float64):
            return "reference"
        return "blocks" if narrow(_rows(q, examples)) else "host"
    if not has_kernel(q.shape[-1], device=q.device, dtype=q.dtype):
        return "reference"
    even = examples.equal is not None and examples.equal >= LEAST_CUDNN and examples.equal % EVEN_CUDNN == 0
    if not even or window is not None or q.shape[-1] > WIDEST_CUDNN:
        return "flash"
    return "cudnn" if has_cudnn(q.shape[-1], q.shape[1], groups, device=q.device, dtype=q.dtype) else "flash"


def describe_kernel(
    width: int, queries: int, groups: int, *, window: int | None, device: torch.device, dtype: torch.dtype
) -> str:
    """Which of a GPU's kernels such heads get, in words, for the Run."""
    if window is not None:
        return "flash, as there is a window"
    if width > WIDEST_CUDNN or not has_cudnn(width, queries, groups, device=device, dtype=dtype):
        return f"flash, as cuDNN has none for heads of {width} here"
    return "cudnn for examples of one length, flash for others"


@cache
def has_cudnn(width: int, queries: int, groups: int, *, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether cuDNN has a kernel for such heads on this GPU, forward and backward: tried on one short example."""
    if not (torch.backends.cudnn.is_available() and torch.backends.cuda.cudnn_sdp_enabled()):
        return False
    q, k, v = (
        torch.zeros(1, heads, LEAST_CUDNN, width, device=device, dtype=dtype) for heads in (queries, groups, groups)
    )
    try:
        out, lse, *_, seed, offset, _ = torch.ops.aten._cudnn_attention_forward(
            q, k, v, None, None, None, LEAST_CUDNN, LEAST_CUDNN, True, 0.0, True, False, scale=1.0
        )
        torch.ops.aten._cudnn_attention_backward(
            out, q, k, v, out, lse, seed, offset, None, None, None, LEAST_CUDNN, LEAST_CUDNN, 0.0, True, scale=1.0
        )  # fmt: skip
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return False
    return True


def has_kernel(width: int, *, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether heads of this width have a way of their own here, and not the reference alone."""
    if device.type == "cpu":
        return (
            True  # In 16 bit the reference: nobody trains so there, but what is compared there is then what a GPU does.
        )
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and fits(width, device)


def fits(width: int, device: torch.device) -> bool:
    """Whether the kernels take heads of this width on this GPU."""
    return width <= WIDEST_FLASH and width % 8 == 0 and torch.cuda.get_device_capability(device) >= (8, 0)


def reference(q: Tensor, k: Tensor, v: Tensor, examples: Examples, *, scale: float, window: int | None) -> Tensor:
    """By definition, example by example."""
    borders = examples.borders.tolist()
    out = []
    for start, end in itertools.pairwise(borders):
        one_q, one_k, one_v = (x[start:end].transpose(0, 1) for x in (q, k, v))
        place = torch.arange(end - start, device=q.device)
        seen = place[:, None] >= place
        if window is not None:
            seen &= place[:, None] - place < window
        out.append(
            functional.scaled_dot_product_attention(
                one_q, one_k, one_v, attn_mask=seen, scale=scale, enable_gqa=True
            ).transpose(0, 1)
        )
    return torch.cat(out) if out else q.clone()


def _grouped(q: Tensor, k: Tensor, examples: Examples) -> Tensor:
    """(T, H, D) -> (N G, H / G, S, D)"""
    assert examples.equal is not None
    parts = q.view(-1, examples.equal, k.shape[1], q.shape[1] // k.shape[1], q.shape[2])
    out: Tensor = parts.permute(0, 2, 3, 1, 4).flatten(0, 1)
    return out


def _ungrouped(x: Tensor, q: Tensor, examples: Examples) -> Tensor:
    """(N G, H / G, S, D) -> (T, H, D)"""
    out: Tensor = x.unflatten(0, (len(q) // x.shape[2], -1)).permute(0, 3, 1, 2, 4).reshape(q.shape)
    return out


def _repeated(k: Tensor, q: Tensor) -> Tensor:
    """Keys for each query head, as the kernel for CPUs wants them."""
    times = q.shape[1] // k.shape[1]
    return k if times == 1 else k.repeat_interleave(times, 1)


def _summed(d: Tensor, k: Tensor) -> Tensor:
    return d if d.shape == k.shape else d.unflatten(1, (k.shape[1], -1)).sum(2)


def _window(window: int | None) -> dict[str, int]:
    # The token itself and window - 1 to its left.
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


def _rows(x: Tensor, examples: Examples) -> Tensor:
    """(T, heads, D) -> (N, heads, S, D), the same memory."""
    assert examples.equal is not None
    return x.view(-1, examples.equal, *x.shape[1:]).transpose(1, 2)


def _tokens(x: Tensor) -> Tensor:
    """(N, heads, S, D) -> (T, heads, D): the same memory where the kernel kept the order of its inputs, as it does."""
    return x.transpose(1, 2).flatten(0, 1).contiguous()
