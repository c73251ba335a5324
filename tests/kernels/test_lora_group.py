"""Layers that share an input, with their adapters: what the products of a group are, and the way back, against autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from onlay.kernels.frozen import Stored
from onlay.kernels.lora_group import Factors, Group, draw_seed
from onlay.kernels.residual import reference_mask
from onlay.kernels.updates import Update
from tests.kernels.compare import assert_exact, draw

T, INPUTS, SIZES = 7, 40, (24, 16, 32)
SEED = 11
CASES: dict[str, dict[str, Any]] = {
    "all": {},
    "rank 1": {"ranks": (1, 1, 1)},
    "first and last": {"ranks": (3, 0, 2)},
    "middle": {"ranks": (0, 5, 0)},
    "none": {"ranks": (0, 0, 0)},
    "trained bias": {"trained_bias": True},
    "none, trained bias": {"ranks": (0, 0, 0), "trained_bias": True},
    "dropout": {"dropout": 0.4},
    "folded": {"ranks": (9, 1, 2)},
    "folded, first and last": {"ranks": (30, 0, 2), "trained_bias": True},
    "too much for folding, but dropped": {"ranks": (9, 1, 2), "dropout": 0.4},
}


def made(*, ranks: tuple[int, ...] = (3, 1, 2), dropout: float = 0.0, trained_bias: bool = False) -> Factors:
    scales = tuple(0.5 + number for number, rank in enumerate(ranks) if rank)
    group = Group(
        frozen=Stored(draw(sum(SIZES), INPUTS, seed=1), None), sizes=SIZES, ranks=ranks, scales=scales, dropout=dropout,
        trained_bias=trained_bias,
    )  # fmt: skip
    live = [(size, rank) for size, rank in zip(SIZES, ranks, strict=True) if rank]
    parameters = [draw(rank, INPUTS, seed=10 + i) for i, (_, rank) in enumerate(live)]
    parameters += [draw(size, rank, seed=20 + i) for i, (size, rank) in enumerate(live)]
    parameters += [draw(sum(SIZES), seed=30)] if trained_bias else []
    assert len(parameters) == group.count
    return Factors.of(group, parameters, torch.float64)


def plain(x: Tensor, factors: Factors, parameters: list[Tensor]) -> Tensor:
    """y (T, sum O) with the adapters' part: by definition."""
    group = factors.group
    y = x @ group.frozen.weight.t()  # type: ignore[attr-defined]
    if group.trained_bias:
        y = y + parameters[-1]
    into = x * reference_mask(x, seed=SEED, p=group.dropout) if group.dropout else x
    parts, number, count = [], 0, len(group.scales)
    for part, rank in zip(y.split(group.sizes, 1), group.ranks, strict=True):
        if rank:
            part = part + group.scales[number] * into @ parameters[number].t() @ parameters[count + number].t()
            number += 1
        parts.append(part)
    return torch.cat(parts, 1)


def applied(update: Update | None, size: int) -> Tensor:
    return torch.zeros(T, size, dtype=torch.float64) if update is None else update.hidden @ update.b


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_product_and_updates_are_the_layers_with_their_adapters(case: dict[str, Any]) -> None:
    factors, x = made(**case), draw(T, INPUTS, seed=2)
    expected = plain(x, factors, list(factors.parameters))
    hidden = factors.hidden_of(x, seed=SEED)
    found = factors.updates(hidden)
    apart = factors.folded is None
    assert [update is not None for update in found] == [apart and rank > 0 for rank in factors.group.ranks]
    y = factors.product(x) + torch.cat([applied(u, size) for u, size in zip(found, SIZES, strict=True)], 1)
    assert_exact(y, expected)


def test_updates_of_pieces_are_parts_of_those_of_layers() -> None:
    """gate and up in one layer, for example: the reader wants them apart."""
    factors, x = made(), draw(T, INPUTS, seed=2)
    hidden = factors.hidden_of(x, seed=0)
    pieces = (10, 14, 16, 20, 12)
    whole, parts = factors.updates(hidden), factors.updates(hidden, pieces)
    expected = torch.cat([applied(u, size) for u, size in zip(whole, SIZES, strict=True)], 1)
    assert_exact(torch.cat([applied(u, size) for u, size in zip(parts, pieces, strict=True)], 1), expected)


def test_on_a_cpu_adapters_are_folded_where_that_is_less_work() -> None:
    assert {name for name, case in CASES.items() if made(**case).folded is not None} == {
        "folded", "folded, first and last",
    }  # fmt: skip
    base = made(ranks=(9, 1, 2)).group.frozen.weight  # type: ignore[attr-defined]
    assert torch.equal(base, draw(sum(SIZES), INPUTS, seed=1)), "into a copy"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_way_back_is_autograds(case: dict[str, Any]) -> None:
    factors, x, dy = made(**case), draw(T, INPUTS, seed=2), draw(T, sum(SIZES), seed=3)
    leaves = [parameter.clone().requires_grad_() for parameter in factors.parameters]
    x_leaf = x.clone().requires_grad_()
    expected_x, *expected = torch.autograd.grad(plain(x_leaf, factors, leaves), [x_leaf, *leaves], dy)
    hidden, g = factors.hidden_of(x, seed=SEED), factors.hidden_grad(dy)
    found = factors.gradients(x, dy, hidden, g, seed=SEED)
    assert len(found) == len(expected) == factors.group.count
    for one, other in zip(found, expected, strict=True):
        assert_exact(one, other)
    assert_exact(factors.add_input_grad(factors.back_product(dy), g, seed=SEED), expected_x)
    if not factors.group.dropout:
        later = factors.input_update(g)
        assert (later is None) == (factors.a is None) == (factors.folded is not None or not any(factors.group.ranks))
        assert_exact(factors.back_product(dy) + applied(later, INPUTS), expected_x)


def test_the_input_may_be_without_its_columns_factor() -> None:
    """As where it is a norm's result, of which only the input is kept."""
    factors, rows, dy = made(), draw(T, INPUTS, seed=2), draw(T, sum(SIZES), seed=3)
    columns = draw(INPUTS, seed=4)
    hidden, g = factors.hidden_of(rows * columns, seed=0), factors.hidden_grad(dy)
    expected = factors.gradients(rows * columns, dy, hidden, g, seed=0)
    found = factors.gradients(rows, dy, hidden, g, columns=columns, seed=0)
    for one, other in zip(found, expected, strict=True):
        assert_exact(one, other)


def test_factors_are_rounded_once_and_gradients_are_not() -> None:
    exact = made()
    wide = [parameter.float() for parameter in exact.parameters]
    factors = Factors.of(exact.group, wide, torch.bfloat16)
    scaled = torch.cat([a * s for a, s in zip(wide, exact.group.scales, strict=False)])
    assert factors.a is not None
    assert torch.equal(factors.a, scaled.bfloat16())
    assert all(torch.equal(b, second.bfloat16()) for b, second in zip(factors.b, wide[3:], strict=True))
    x, dy = draw(T, INPUTS, seed=2, dtype=torch.bfloat16), draw(T, sum(SIZES), seed=3, dtype=torch.bfloat16)
    hidden, g = factors.hidden_of(x, seed=0), factors.hidden_grad(dy)
    assert hidden is not None and g is not None
    assert hidden.dtype == g.dtype == torch.bfloat16
    assert {found.dtype for found in factors.gradients(x, dy, hidden, g, seed=0)} == {torch.float32}


def test_a_seed_is_drawn_where_something_is_dropped() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = torch.get_rng_state()
        assert draw_seed(made().group) == draw_seed(made(ranks=(0, 0, 0), dropout=0.4).group) == 0
        assert torch.equal(torch.get_rng_state(), state), "a run without dropout draws as before"
        drawn = [draw_seed(made(dropout=0.4).group) for _ in range(3)]
        torch.manual_seed(0)
        assert drawn == [draw_seed(made(dropout=0.4).group) for _ in range(3)]
    assert len(set(drawn)) == 3
