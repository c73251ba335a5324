"""The fused blocks against the same written out in plain torch and differentiated by autograd, in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from onlay.kernels.attention_block import AttentionBlock, attention_block
from onlay.kernels.causal_attention import Examples, reference
from onlay.kernels.frozen import Stored
from onlay.kernels.linear_block import linear_block
from onlay.kernels.lora_group import Group
from onlay.kernels.mlp_block import MlpBlock, Norm, mlp_block
from onlay.kernels.norm_block import norm_block
from onlay.kernels.normalise import normalise
from onlay.kernels.residual import reference_mask
from onlay.kernels.rotate import Heads

D, INNER, LENGTHS = 12, 20, (5, 1, 7)
T = sum(LENGTHS)
HEADS = {"queries": 4, "groups": 2, "width": 6}
SIZES = (24, 12, 12)


@pytest.fixture(autouse=True, params=["folded", "apart"])
def folding(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters of layers as small as these are folded into the weight on a CPU; both ways are tried."""
    if request.param == "apart":
        monkeypatch.setattr("onlay.kernels.lora_group.folds", lambda *_args, **_options: False)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def group_of(
    sizes: tuple[int, ...], inputs: int, ranks: tuple[int, ...], *, seed: int, dropout: float = 0.0, bias: str = "none"
) -> tuple[Group, list[Tensor]]:
    """A group with its parameters: A of each adapter, B of each, and the bias where it trains."""
    weight = draw(sum(sizes), inputs, seed=seed) / inputs**0.5
    frozen_bias = draw(sum(sizes), seed=seed + 1) if bias == "frozen" else None
    scales = tuple(0.5 + number for number, rank in enumerate(ranks) if rank)
    group = Group(
        frozen=Stored(weight, frozen_bias), sizes=sizes, ranks=ranks, scales=scales, dropout=dropout, trained_bias=bias == "trained",
    )  # fmt: skip
    live = [(size, rank) for size, rank in zip(sizes, ranks, strict=True) if rank]
    parameters = [draw(rank, inputs, seed=seed + 10 + i) / inputs**0.5 for i, (_, rank) in enumerate(live)]
    parameters += [draw(size, rank, seed=seed + 20 + i) for i, (size, rank) in enumerate(live)]
    parameters += [draw(sum(sizes), seed=seed + 30)] if bias == "trained" else []
    return group, [parameter.requires_grad_() for parameter in parameters]


def plain_group(x: Tensor, group: Group, parameters: list[Tensor], mask: Tensor | None = None) -> Tensor:
    y = functional.linear(x, group.frozen.weight, group.frozen.bias)  # type: ignore[attr-defined]
    if group.trained_bias:
        y = y + parameters[-1]
    count, number, parts = len(group.scales), 0, []
    for part, rank in zip(y.split(group.sizes, -1), group.ranks, strict=True):
        if rank:
            dropped = x if mask is None else x * mask
            a, b = parameters[number], parameters[count + number]
            part = part + group.scales[number] * (dropped @ a.t()) @ b.t()
            number += 1
        parts.append(part)
    return torch.cat(parts, -1)


def plain_norm(x: Tensor, norm: Norm | None) -> Tensor:
    if norm is None:
        return x
    return x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * (norm.weight + norm.offset)


def masks(monkeypatch: pytest.MonkeyPatch, *groups: Group) -> list[Any]:
    """Fixes the seeds that blocks draw, and gives the mask of each seed for rows of a width."""
    seeds = iter(range(100, 200))
    drawn = {id(group): next(seeds) for group in groups}
    for module in ("mlp_block", "attention_block", "linear_block"):
        monkeypatch.setattr(f"onlay.kernels.{module}.draw_seed", lambda group: drawn[id(group)])
    return [
        (lambda x, g=group: reference_mask(x, seed=drawn[id(g)], p=g.dropout)) if group.dropout else None
        for group in groups
    ]


def agree(found: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    """Values, and gradients of one random direction with respect to all inputs."""
    assert_close(found, expected)
    direction = draw(*expected.shape, seed=99)
    ours = torch.autograd.grad(found, inputs, direction)
    theirs = torch.autograd.grad(expected, inputs, direction)
    for one, other in zip(ours, theirs, strict=True):
        assert float(other.norm()) > 0
        assert_close(one, other)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).detach().norm()) <= 1e-12 * float(expected.detach().norm())


MLP_CASES = {
    "all": {},
    "without a norm": {"norm": False},
    "without the residual": {"residual": False},
    "offset": {"offset": 1.0},
    "gelu": {"activation": "gelu"},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "gate and up in one layer": {"sizes": (2 * INNER,), "ranks": (3,)},
    "gate alone": {"ranks": (3, 0), "out_rank": 0},
    "down alone": {"ranks": (0, 0), "out_rank": 2},
    "rank 1": {"ranks": (1, 1), "out_rank": 1},
    "dropout": {"dropout": 0.3},
    "dropout without a norm": {"dropout": 0.3, "norm": False},
    "frozen bias": {"bias": "frozen"},
    "trained bias": {"bias": "trained"},
    "computed again": {"keep": False},
    "computed again, dropout": {"keep": False, "dropout": 0.3},
    "in tiles": {"tile_tokens": 4},
    "one tile": {"tile_tokens": 64},
}


@pytest.mark.parametrize("case", MLP_CASES.values(), ids=MLP_CASES.keys())
def test_mlp_block_is_what_it_says(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    options = {
        "norm": True,
        "residual": True,
        "offset": 0.0,
        "activation": "silu",
        "ranks": (3, 2),
        "out_rank": 4,
    } | case
    common = {"dropout": options.get("dropout", 0.0), "bias": options.get("bias", "none")}
    inner, inner_parameters = group_of(options.get("sizes", (INNER, INNER)), D, options["ranks"], seed=1, **common)
    outer, outer_parameters = group_of((D,), INNER, (options["out_rank"],), seed=2, **common)
    norm = Norm(weight=draw(D, seed=3), eps=1e-6, offset=options["offset"]) if options["norm"] else None
    block = MlpBlock(
        norm=norm, inner=inner, outer=outer, activation=options["activation"], residual=options["residual"],
        keep=options.get("keep", True), tile_tokens=options.get("tile_tokens"),
    )  # fmt: skip
    x = draw(2, T, D, seed=4).requires_grad_()
    rows = x.flatten(0, 1)
    first, second = masks(monkeypatch, inner, outer)
    n = plain_norm(rows, norm)
    gate, up = plain_group(n, inner, inner_parameters, None if first is None else first(n)).chunk(2, -1)
    act = {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda z: functional.gelu(z, approximate="tanh"),
    }
    p = act[options["activation"]](gate) * up
    expected = plain_group(p, outer, outer_parameters, None if second is None else second(p))
    expected = (expected + rows if options["residual"] else expected).view_as(x)
    parameters = [*inner_parameters, *outer_parameters]
    agree(mlp_block(x, block, parameters), expected, [x, *parameters])


def test_mlp_block_goes_backward_once() -> None:
    inner, first = group_of((INNER, INNER), D, (1, 1), seed=1)
    outer, second = group_of((D,), INNER, (1,), seed=2)
    block = MlpBlock(norm=None, inner=inner, outer=outer, activation="silu", residual=False)
    out = mlp_block(draw(3, D, seed=4), block, [*first, *second]).sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward runs once"):
        out.backward()


ATTENTION_CASES = {
    "all": {},
    "without a norm": {"norm": False},
    "without the residual": {"residual": False},
    "norms by head": {"head_norms": True},
    "norms by head, offset": {"head_norms": True, "offset": 1.0},
    "window": {"window": 3},
    "partial rotation": {"rotated": 4},
    "q, k and v in one layer": {"sizes": (48,), "ranks": (3,)},
    "q and v": {"ranks": (3, 0, 2), "out_rank": 0},
    "none but o": {"ranks": (0, 0, 0), "out_rank": 2},
    "dropout": {"dropout": 0.3},
    "frozen bias": {"bias": "frozen"},
    "trained bias": {"bias": "trained"},
    "computed again": {"keep": False},
    "computed again, norms by head, dropout": {"keep": False, "head_norms": True, "dropout": 0.3},
}


@pytest.mark.parametrize("case", ATTENTION_CASES.values(), ids=ATTENTION_CASES.keys())
def test_attention_block_is_what_it_says(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"norm": True, "residual": True, "ranks": (3, 1, 2), "out_rank": 2, "rotated": 6, "window": None} | case
    common = {"dropout": options.get("dropout", 0.0), "bias": options.get("bias", "none")}
    inner, inner_parameters = group_of(options.get("sizes", SIZES), D, options["ranks"], seed=1, **common)
    outer, outer_parameters = group_of((D,), SIZES[0], (options["out_rank"],), seed=2, **common)
    heads = Heads(**HEADS)
    if options.get("head_norms"):
        heads = replace(
            heads, q_norm=draw(6, seed=5), k_norm=draw(6, seed=6), eps=1e-6, offset=options.get("offset", 0.0)
        )
    norm = Norm(weight=draw(D, seed=3), eps=1e-6, offset=options.get("offset", 0.0)) if options["norm"] else None
    block = AttentionBlock(
        norm=norm, inner=inner, outer=outer, heads=heads, scale=0.4, window=options["window"],
        residual=options["residual"], keep=options.get("keep", True),
    )  # fmt: skip
    borders = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    examples = Examples(borders=borders, longest=max(LENGTHS))
    angle = draw(T, options["rotated"] // 2, seed=7).repeat(1, 2)
    x = draw(1, T, D, seed=4).requires_grad_()
    first, second = masks(monkeypatch, inner, outer)
    n = plain_norm(x[0], norm)
    parts = plain_group(n, inner, inner_parameters, None if first is None else first(n)).split(SIZES, -1)
    q, k, v = (part.unflatten(-1, (-1, 6)) for part in parts)
    if heads.q_norm is not None:
        q, k = (
            plain_norm(z, Norm(weight=w, eps=heads.eps, offset=heads.offset))  # type: ignore[arg-type]
            for z, w in ((q, heads.q_norm), (k, heads.k_norm))
        )
    q, k = (_turned(z, angle) for z in (q, k))
    o = reference(q, k, v, examples, scale=0.4, window=options["window"]).flatten(1)
    expected = plain_group(o, outer, outer_parameters, None if second is None else second(o))
    expected = (expected + x[0] if options["residual"] else expected)[None]
    parameters = [*inner_parameters, *outer_parameters]
    found = attention_block(x, angle.cos(), angle.sin(), block, parameters, examples=examples)
    agree(found, expected, [x, *parameters])


def _turned(z: Tensor, angle: Tensor) -> Tensor:
    width = angle.shape[-1]
    part, rest = z[..., :width], z[..., width:]
    left, right = part.chunk(2, -1)
    return torch.cat([part * angle.cos()[:, None] + torch.cat([-right, left], -1) * angle.sin()[:, None], rest], -1)


@pytest.mark.parametrize("bias", ["none", "frozen", "trained"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_linear_block_is_what_it_says(bias: str, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    group, parameters = group_of((INNER,), D, (3,), seed=1, dropout=dropout, bias=bias)
    x = draw(2, 5, D, seed=4).requires_grad_()
    [mask] = masks(monkeypatch, group)
    rows = x.flatten(0, 1)
    expected = plain_group(rows, group, parameters, None if mask is None else mask(rows)).view(2, 5, INNER)
    agree(linear_block(x, group, parameters), expected, [x, *parameters])


def test_a_first_block_has_no_gradient_for_its_input() -> None:
    inner, first = group_of((INNER, INNER), D, (1, 1), seed=1)
    outer, second = group_of((D,), INNER, (1,), seed=2)
    norm = Norm(weight=draw(D, seed=3), eps=1e-6)
    block = MlpBlock(norm=norm, inner=inner, outer=outer, activation="silu", residual=True)
    x = draw(3, D, seed=4)
    mlp_block(x, block, [*first, *second]).sum().backward()
    with_input = [parameter.detach().clone().requires_grad_() for parameter in (*first, *second)]
    mlp_block(x.clone().requires_grad_(), block, with_input).sum().backward()
    for parameter, other in zip((*first, *second), with_input, strict=True):
        assert torch.equal(parameter.grad, other.grad)  # type: ignore[arg-type]


def test_a_norm_of_some_columns_is_given_whole_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """As DeepSeek's norm of compressed keys is: a kernel wants its rows without gaps."""
    given: list[bool] = []

    def watched(x: Tensor, weight: Tensor, **options: Any) -> Any:
        given.append(x.is_contiguous())
        return normalise(x, weight, **options)

    monkeypatch.setattr("onlay.kernels.norm_block.normalise", watched)
    norm = Norm(weight=draw(5, seed=1), eps=1e-6)
    x = draw(2, 3, 9, seed=2).requires_grad_()
    agree(norm_block(x[..., :5], norm), plain_norm(x[..., :5], norm), [x])
    assert given == [True]
