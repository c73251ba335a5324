"""What the fused layers keep for the backward pass: as much as there is memory for, and the rest is computed again.

Keeping less costs work, unequally: of what a layer keeps, gate and up are more than half, and bringing them back is one product.  So
layers give up, one after another and from the first on,

    mlp      gate and up                                                     one product of a layer's four is done again
    blocks   all but the inputs of attention and MLP                         two of four, and the attention
    layer    all but the layer's input (torch.utils.checkpoint around it)    all of it
    tiles    and the MLP goes over the tokens in parts, so that the widest rows never exist for all of them

as far as it takes for a micro-batch to fit.  What is kept by a block is counted from its shapes (onlay/kernels/attention_block.py, mlp_block.py).
Source: selective recomputation (arXiv:2205.05198).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from onlay.kernels.attention_block import AttentionBlock
from onlay.kernels.lora_group import Group
from onlay.kernels.mlp_block import MlpBlock

Block = MlpBlock | AttentionBlock
LEVELS = ("none", "mlp", "blocks", "layer", "tiles")
WHOLE = ("layer", "tiles")
"""Those that recompute a layer as a whole."""
SAID = {
    "mlp": "gate and up", "blocks": "all but the inputs of attention and MLP", "layer": "all but its input",
    "tiles": "all but its input, the MLP in parts of its tokens",
}  # fmt: skip
TILE_TOKENS = 4096
WIDE_ROWS = 5
"""Rows as wide as gate that an MLP's backward has at once: gate, up, dp, p, and one product's scratch."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Bytes a token of one layer."""

    input: int
    attention: int
    mlp: int
    wide: int
    """Of gate and up, which are part of `mlp`."""


def shape_of(blocks: Sequence[Block], *, item_bytes: int) -> Shape:
    """What a layer's blocks keep at most."""
    row = item_bytes * blocks[0].inner.frozen.columns
    attention = mlp = wide = 0
    for block in blocks:
        small = row + 4 + item_bytes * (_ranks(block.inner) + _ranks(block.outer))
        if isinstance(block, MlpBlock):
            wide += item_bytes * block.inner.frozen.rows
            mlp += small + item_bytes * block.inner.frozen.rows
        else:
            heads = block.heads
            attention += small + item_bytes * (sum(heads.sizes) + heads.sizes[0]) + 4 * heads.queries
            if heads.q_norm is not None:
                attention += item_bytes * sum(heads.sizes) + 4 * (heads.queries + heads.groups)
    return Shape(row, attention, mlp, wide)


def kept_bytes(shape: Shape, level: str) -> int:
    """A token, by level."""
    return {
        "none": shape.attention + shape.mlp, "mlp": shape.attention + shape.mlp - shape.wide,
        "blocks": 2 * shape.input, "layer": shape.input, "tiles": shape.input,
    }[level]  # fmt: skip


def working_bytes(shape: Shape, level: str, *, tokens: int) -> int:
    """What one layer's backward needs besides, at its peak: of a layer that is computed again, all that it keeps then."""
    wide_tokens = min(tokens, TILE_TOKENS) if level == "tiles" else tokens
    again = shape.attention + shape.mlp - shape.wide if level in WHOLE else 0
    return WIDE_ROWS * shape.wide // 2 * wide_tokens + (again + 4 * shape.input) * tokens


def choose_levels(shapes: Sequence[Shape], *, tokens: int, room_bytes: int) -> list[str]:
    """A level for each layer: the least recomputation with which `tokens` fit into `room_bytes`, else the most there is."""
    levels = ["none"] * len(shapes)
    for level in LEVELS[1:]:
        for place in range(len(levels)):
            if needed_bytes(shapes, levels, tokens=tokens) <= room_bytes:
                return levels
            levels[place] = level
    return levels


def needed_bytes(shapes: Sequence[Shape], levels: Sequence[str], *, tokens: int) -> int:
    kept = sum(kept_bytes(shape, level) for shape, level in zip(shapes, levels, strict=True)) * tokens
    work = [working_bytes(shape, level, tokens=tokens) for shape, level in zip(shapes, levels, strict=True)]
    return kept + max(work, default=0)


def apply_level(blocks: Sequence[Block], level: str) -> None:
    for block in blocks:
        if isinstance(block, MlpBlock):
            block.keep = level not in ("mlp", "blocks")
            block.tile_tokens = TILE_TOKENS if level == "tiles" else None
        else:
            block.keep = level != "blocks"


def describe(levels: Sequence[str]) -> str:
    """In words, for the Run."""
    counts = Counter(levels)
    said = [f"{SAID[level]} of {counts[level]}" for level in LEVELS[1:] if counts[level]]
    return f"{'; '.join(said)} of {len(levels)} layers" if said else "no layer"


def _ranks(group: Group) -> int:
    return sum(group.ranks)
