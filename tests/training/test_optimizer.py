"""AdamW by its equations, and the learning rate of every step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from onlay.recipe import TrainingSection
from onlay.training.optimizer import learning_rate_at, make_optimizer

PEAK = 3e-4


def rates(total_steps: int, **fields: Any) -> list[float]:
    """Of steps 1 to total_steps, and one after the last."""
    section = TrainingSection(**fields)
    return [
        learning_rate_at(step, peak=PEAK, total_steps=total_steps, section=section)
        for step in range(1, total_steps + 2)
    ]


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.33, 1.0])
@pytest.mark.parametrize("total_steps", [1, 2, 7, 100])
def test_every_schedule_rises_to_the_peak_and_never_stands_still_at_zero(
    scheduler: str, warmup: float, total_steps: int
) -> None:
    *found, after = rates(total_steps, scheduler=scheduler, warmup_fraction=warmup)
    warmup_steps = math.ceil(warmup * total_steps)
    assert found[0] > 0
    assert min(found) > 0
    assert max(found) == pytest.approx(PEAK)
    assert found[:warmup_steps] == pytest.approx([PEAK * (i + 1) / warmup_steps for i in range(warmup_steps)])
    rest = found[warmup_steps:]
    assert rest == sorted(rest, reverse=True)
    if scheduler == "constant":
        assert rest == [PEAK] * len(rest)
    elif rest:
        assert rest[0] == PEAK
        assert after == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("scheduler", "usual"), [("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup)]
)
def test_after_the_warm_up_rates_are_those_of_transformers(scheduler: str, usual: Any) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=PEAK)
    schedule = usual(optimizer, num_warmup_steps=5, num_training_steps=100)
    expected = []
    for _ in range(100):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates(100, scheduler=scheduler, warmup_fraction=0.05)[5:100] == pytest.approx(expected[5:])


def test_halfway_down_the_cosine_is_half_the_peak() -> None:
    assert rates(100, warmup_fraction=0.0)[50] == pytest.approx(PEAK / 2)
    assert rates(100, warmup_fraction=0.0)[25] == pytest.approx(PEAK * 0.5 * (1 + math.sqrt(0.5)))


def test_it_is_adamw_and_decays_matrices_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {name: nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for name, shape in
               {"A": (3, 4), "B": (4, 3), "bias": (4,), "experts": (2, 3, 4)}.items()}  # fmt: skip
    expected = {name: p.detach().clone() for name, p in weights.items()}
    first, second = ({name: torch.zeros_like(p) for name, p in expected.items()} for _ in range(2))
    optimizer = make_optimizer(weights, weight_decay=0.1)
    assert optimizer.param_groups[0]["lr"] == 0.0
    for step in range(1, 6):
        rate = PEAK * step
        for group in optimizer.param_groups:
            group["lr"] = rate
        for name, parameter in weights.items():
            grad = parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            first[name] = 0.9 * first[name] + 0.1 * grad
            second[name] = 0.999 * second[name] + 0.001 * grad**2
            decay = 0.0 if name == "bias" else 0.1
            moved = (first[name] / (1 - 0.9**step)) / ((second[name] / (1 - 0.999**step)).sqrt() + 1e-8)
            expected[name] = expected[name] * (1 - rate * decay) - rate * moved
        optimizer.step()
        for name, parameter in weights.items():
            assert torch.allclose(parameter.detach(), expected[name], rtol=1e-12, atol=1e-14)


def test_vectors_alone_or_matrices_alone_are_no_empty_group() -> None:
    for shape in ((3,), (3, 3)):
        optimizer = make_optimizer({"x": nn.Parameter(torch.zeros(shape))}, weight_decay=0.1)
        assert [len(group["params"]) for group in optimizer.param_groups] == [1]
