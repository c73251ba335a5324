"""The kernels of onlay/kernels/fp8.py, where the equations are.  Imported where they run: it needs Triton."""

# ruff: noqa: N803  (compile-time constants are written in capitals)

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from onlay.kernels import nf4
from onlay.kernels.fp8_rows import FP8, LARGEST, LEAST_AMAX, Fp8Rows

WIDEST_ROW = 16384
"""Numbers of a row that one program of four warps holds in registers; of longer rows each number is read twice, the second time
from a cache, PIECE numbers at a time by 16 warps: what was fastest (docs/log.md)."""
PIECE = 4096
TILE = 128
"""Rows and columns, bytes each, that a program transposes."""
NF4_TILE = (16, 8)
"""Rows and blocks of 64 that a program turns to FP8: 512 bytes in a row."""
NF4_TRANSPOSED_TILE = (128, 1)
"""The same where it writes columns."""


@triton.jit
def _divided(x, scale, inverse):
    """x / scale, rounded to the nearest as a division is, for the price of three products (Markstein)."""
    q = x * inverse
    return tl.fma(tl.fma(-q, scale, x), inverse, q)


@triton.jit
def _row_part(x, columns, within, K: tl.constexpr, COLUMNS: tl.constexpr):
    v = tl.load(x + within, mask=within < K, other=0.0).to(tl.float32)
    if COLUMNS:
        v *= tl.load(columns + within, mask=within < K, other=0.0).to(tl.float32)
    return v


@triton.jit
def _quantize_rows(
    x, columns, numbers, scales, stride,
    K: tl.constexpr, LARGEST: tl.constexpr, LEAST: tl.constexpr, COLUMNS: tl.constexpr, ONCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x += row * stride
    numbers += row * K
    within = tl.arange(0, BLOCK)
    v = _row_part(x, columns, within, K, COLUMNS)
    largest = tl.max(tl.abs(v), 0)
    if not ONCE:
        for start in range(BLOCK, K, BLOCK):
            largest = tl.maximum(largest, tl.max(tl.abs(_row_part(x, columns, start + within, K, COLUMNS)), 0))
    scale = tl.div_rn(tl.maximum(largest, LEAST), LARGEST)
    inverse = tl.div_rn(1.0, scale)
    tl.store(scales + row, scale)
    tl.store(numbers + within, _divided(v, scale, inverse).to(tl.float8e4nv), mask=within < K)
    if not ONCE:
        for start in range(BLOCK, K, BLOCK):
            v = _row_part(x, columns, start + within, K, COLUMNS)
            tl.store(
                numbers + start + within, _divided(v, scale, inverse).to(tl.float8e4nv), mask=start + within < K
            )  # fmt: skip


@triton.jit
def _transpose(numbers, out, O, I, BLOCK: tl.constexpr):  # noqa: E741
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = (rows < O)[:, None] & (columns < I)[None, :]
    tile = tl.load(numbers + rows[:, None] * I + columns[None, :], mask=there, other=0)
    there = (columns < I)[:, None] & (rows < O)[None, :]
    tl.store(out + columns[:, None] * O + rows[None, :], tl.trans(tile), mask=there)


@triton.jit
def _from_nf4(
    codes, scales, scale_scales, scale_mean, levels, map_, row_scales, out, O, blocks, distance,  # noqa: E741
    DOUBLE: tl.constexpr, TRANSPOSED: tl.constexpr, SCALE_BLOCK: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * BLOCKS
    block = first + tl.arange(0, BLOCKS)
    there = (rows < O)[:, None] & (block < blocks)[None, :]
    at = rows[:, None] * blocks + block[None, :]
    if DOUBLE:
        number = tl.load(scales + at, mask=there, other=0).to(tl.int32)
        spread = tl.load(scale_scales + at // SCALE_BLOCK, mask=there, other=0.0)
        own = tl.load(map_ + number) * spread + tl.load(scale_mean)
    else:
        own = tl.load(scales + at, mask=there, other=0.0)
    own = own[:, :, None]
    scale = tl.load(row_scales + rows, mask=rows < O, other=1.0)
    inverse = tl.div_rn(1.0, scale)[:, None, None]
    scale = scale[:, None, None]
    pairs = tl.load(
        codes + at[:, :, None] * 32 + tl.arange(0, 32)[None, None, :], mask=there[:, :, None], other=0
    ).to(tl.int32)  # fmt: skip
    left = _divided(tl.load(levels + (pairs >> 4)) * own, scale, inverse).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    right = _divided(tl.load(levels + (pairs & 15)) * own, scale, inverse).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    tile = tl.reshape(tl.join(left, right), (ROWS, BLOCKS * 64))
    column = first.to(tl.int64) * 64 + tl.arange(0, BLOCKS * 64)
    if TRANSPOSED:
        there = (column < blocks * 64)[:, None] & (rows < O)[None, :]
        tl.store(out + column[:, None] * distance + rows[None, :], tl.trans(tile), mask=there)
    else:
        there = (rows < O)[:, None] & (column < blocks * 64)[None, :]
        tl.store(out + rows[:, None] * distance + column[None, :], tile, mask=there)


def quantize_rows(x: Tensor, *, columns: Tensor | None) -> Fp8Rows:
    """As in onlay/kernels/fp8.py; x is not empty."""
    rows, width = x.shape
    x = x if x.stride(1) == 1 or width == 1 else x.contiguous()
    numbers = torch.empty(rows, width, dtype=FP8, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    whole = triton.next_power_of_2(width)
    block = whole if whole <= WIDEST_ROW else PIECE
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(x):
        launch: Any = _quantize_rows[(rows,)]
        launch(
            x, x if columns is None else columns.contiguous(), numbers, scales, x.stride(0),
            K=width, LARGEST=LARGEST, LEAST=LEAST_AMAX, COLUMNS=columns is not None, ONCE=whole == block, BLOCK=block,
            num_warps=min(4, max(1, block // 512)) if whole <= WIDEST_ROW else 16,
        )  # fmt: skip
    return Fp8Rows(numbers, scales)


def transpose(numbers: Tensor) -> Tensor:
    """As in onlay/kernels/fp8.py; not empty."""
    rows, columns = numbers.shape
    out = torch.empty(columns, rows, dtype=numbers.dtype, device=numbers.device)
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(out):
        launch: Any = _transpose[(triton.cdiv(rows, TILE), triton.cdiv(columns, TILE))]
        launch(
            numbers.contiguous().view(torch.uint8), out.view(torch.uint8), rows, columns, BLOCK=TILE, num_warps=8
        )  # fmt: skip
    return out


def from_nf4(packed: nf4.Nf4, row_scales: Tensor, out: Tensor, *, transposed: bool) -> None:
    """Writes the numbers of `packed` (O, I) into out (O, I), or (I, O) if transposed: contiguous rows at any distance."""
    rows, width = packed.shape
    assert out.stride(1) == 1 and width % nf4.BLOCK == 0
    blocks = width // nf4.BLOCK
    tall, wide = NF4_TRANSPOSED_TILE if transposed else NF4_TILE
    double = packed.scale_scales is not None
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(out):
        launch: Any = _from_nf4[(triton.cdiv(rows, tall), triton.cdiv(blocks, wide))]
        launch(
            packed.codes, packed.scales, packed.scale_scales if double else packed.scales,
            packed.scale_mean if double else packed.scales, _levels(out.device), nf4.dynamic_map(out.device), row_scales,
            out.view(torch.uint8), rows, blocks, out.stride(0),
            DOUBLE=double, TRANSPOSED=transposed, SCALE_BLOCK=nf4.SCALE_BLOCK, ROWS=tall, BLOCKS=wide, num_warps=8,
            # Scales are a product and a sum, each rounded, as in nf4.block_scales: row scales were made from the same.
            enable_fp_fusion=False,
        )  # fmt: skip


@cache
def _levels(device: torch.device) -> Tensor:
    return torch.tensor(nf4.CODE, dtype=torch.float32, device=device)
