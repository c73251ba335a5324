"""What layers keep for the backward pass: counted as the blocks keep it, and chosen by how much room there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from onlay.kernels.attention_block import AttentionBlock, attention_block
from onlay.kernels.causal_attention import Examples
from onlay.kernels.frozen import Stored
from onlay.kernels.lora_group import Group
from onlay.kernels.mlp_block import MlpBlock, Norm, mlp_block
from onlay.kernels.rotate import Heads
from onlay.model import keep
from onlay.model.keep import LEVELS, Shape, apply_level, choose_levels, describe, kept_bytes, needed_bytes, shape_of

D, WIDE, RANK, T = 64, 256, 3, 40
HEADS = Heads(queries=4, groups=2, width=16)
ITEM = 4


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def group_of(sizes: tuple[int, ...], inputs: int, rank: int) -> tuple[Group, list[Tensor]]:
    group = Group(
        frozen=Stored(draw(sum(sizes), inputs), None), sizes=sizes, ranks=(rank,) * len(sizes), scales=(1.0,) * len(sizes),
    )  # fmt: skip
    parameters = [draw(rank, inputs) for _ in sizes] + [draw(size, rank) for size in sizes]
    return group, [parameter.requires_grad_() for parameter in parameters]


def blocks_of(*, by_head: bool = False, rank: int = RANK) -> tuple[AttentionBlock, MlpBlock, list[list[Tensor]]]:
    """A layer's blocks, and the parameters of each."""
    heads = replace(HEADS, q_norm=draw(16), k_norm=draw(16), eps=1e-6) if by_head else HEADS
    groups = [group_of(*shape, rank) for shape in ((HEADS.sizes, D), ((D,), D), ((WIDE, WIDE), D), ((D,), WIDE))]
    (qkv, p1), (o, p2), (gate_up, p3), (down, p4) = groups
    norm = Norm(weight=draw(D), eps=1e-6)
    attention = AttentionBlock(norm=norm, inner=qkv, outer=o, heads=heads, scale=0.25, window=3, residual=True)
    mlp = MlpBlock(norm=norm, inner=gate_up, outer=down, activation="silu", residual=True)
    return attention, mlp, [p1 + p2, p3 + p4]


def kept_by(run: Any, parameters: Sequence[Tensor]) -> int:
    """Bytes of the tensors that a node keeps, but for its parameters."""
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in known:
            found[place] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(found.values())


def kept_by_layer(attention: AttentionBlock, mlp: MlpBlock, parameters: list[list[Tensor]]) -> int:
    """Of both blocks, each with rows of its own, as in a layer; without the rotary tables, which all layers share."""
    x, between = draw(1, T, D).requires_grad_(), draw(1, T, D).requires_grad_()
    cos, sin = draw(T, 16).cos(), draw(T, 16).sin()
    examples = Examples(borders=torch.tensor([0, T], dtype=torch.int32), longest=T)
    first = kept_by(
        lambda: attention_block(x, cos, sin, attention, parameters[0], examples=examples), [*parameters[0], cos, sin]
    )
    return first + kept_by(lambda: mlp_block(between, mlp, parameters[1]), parameters[1])


@pytest.mark.parametrize("by_head", [False, True])
def test_what_blocks_keep_is_counted(by_head: bool) -> None:
    """But for the logsumexp of the GPU's attention, which this one does not have: 4 bytes a head."""
    attention, mlp, parameters = blocks_of(by_head=by_head)
    shape = shape_of([attention, mlp], item_bytes=ITEM)
    assert shape.input == ITEM * D
    assert shape.wide == ITEM * 2 * WIDE
    assert kept_by_layer(attention, mlp, parameters) == T * (kept_bytes(shape, "none") - 4 * HEADS.queries)


@pytest.mark.parametrize("level", ["mlp", "blocks"])
def test_what_blocks_keep_with_less_is_no_more_than_counted(level: str) -> None:
    """To the adapters' hidden rows, which are a few numbers a token."""
    attention, mlp, parameters = blocks_of()
    shape = shape_of([attention, mlp], item_bytes=ITEM)
    apply_level([attention, mlp], level)
    found, counted = kept_by_layer(attention, mlp, parameters), T * kept_bytes(shape, level)
    few = T * (ITEM * 7 * RANK + 4 * HEADS.queries + 4)
    assert counted - few <= found <= counted + few
    assert found < T * kept_bytes(shape, "none")


LAYER = Shape(input=400, attention=1400, mlp=2400, wide=2000)


def test_bytes_by_hand() -> None:
    assert [kept_bytes(LAYER, level) for level in LEVELS] == [3800, 1800, 800, 400, 400]
    # Five wide rows of half of gate and up, and four of the input, of one layer.
    work = 5 * 1000 + 4 * 400
    assert needed_bytes([LAYER] * 3, ["none"] * 3, tokens=7) == 7 * (3 * 3800 + work)
    assert needed_bytes([LAYER] * 3, ["mlp", "mlp", "none"], tokens=7) == 7 * (2 * 1800 + 3800 + work)
    # A layer that is computed again keeps its own then.
    assert needed_bytes([LAYER] * 3, ["layer", "blocks", "blocks"], tokens=7) == 7 * (400 + 2 * 800 + work + 1800)
    tokens = 3 * keep.TILE_TOKENS
    tiled = needed_bytes([LAYER] * 3, ["tiles"] * 3, tokens=tokens)
    assert tiled == tokens * (3 * 400 + 1800 + 4 * 400) + keep.TILE_TOKENS * 5 * 1000
    assert needed_bytes([], [], tokens=7) == 0


def test_more_room_never_means_more_work() -> None:
    shapes, tokens = [LAYER] * 12, 5000
    most = needed_bytes(shapes, ["none"] * 12, tokens=tokens)
    seen = set()
    rooms = [most * share // 200 for share in range(201)]
    chosen = [choose_levels(shapes, tokens=tokens, room_bytes=room) for room in rooms]
    for levels, room in zip(chosen, rooms, strict=True):
        seen |= set(levels)
        fits = needed_bytes(shapes, levels, tokens=tokens) <= room
        assert fits or levels == ["tiles"] * 12
        # One layer less would not have fitted.
        degrees = [LEVELS.index(level) for level in levels]
        assert degrees == sorted(degrees, reverse=True), "the first layers give up first"
        assert max(degrees) - min(degrees) <= 1
        if fits and any(degrees):
            last = max(place for place, degree in enumerate(degrees) if degree == max(degrees))
            before = [*levels[:last], LEVELS[degrees[last] - 1], *levels[last + 1 :]]
            assert needed_bytes(shapes, before, tokens=tokens) > room
    for less, more in pairwise(chosen):
        assert all(LEVELS.index(a) >= LEVELS.index(b) for a, b in zip(less, more, strict=True))
    assert seen == set(LEVELS)
    assert chosen[-1] == ["none"] * 12
    assert chosen[0] == ["tiles"] * 12


def test_more_tokens_need_more() -> None:
    room = needed_bytes([LAYER] * 12, ["blocks"] * 12, tokens=5000)
    degrees = [
        sum(LEVELS.index(level) for level in choose_levels([LAYER] * 12, tokens=tokens, room_bytes=room))
        for tokens in range(500, 20000, 500)
    ]
    assert degrees == sorted(degrees)
    assert degrees[0] == 0 < degrees[-1]


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_sets_what_it_says(level: str) -> None:
    attention, mlp, _ = blocks_of()
    for before in LEVELS:
        apply_level([attention, mlp], before)
        apply_level([attention, mlp], level)
        # What is around the whole layer is not the blocks': inside of it they keep what they can.
        assert attention.keep == (level != "blocks")
        assert mlp.keep == (level not in ("mlp", "blocks"))
        assert mlp.tile_tokens == (keep.TILE_TOKENS if level == "tiles" else None)


def test_levels_in_words() -> None:
    assert describe(["none"] * 4) == "no layer"
    assert describe([]) == "no layer"
    assert describe(["mlp", "mlp", "none"]) == "gate and up of 2 of 3 layers"
    assert describe(["layer", "blocks", "blocks"]) == (
        "all but the inputs of attention and MLP of 2; all but its input of 1 of 3 layers"
    )
