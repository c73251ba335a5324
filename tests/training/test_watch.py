"""What is a spike and what is noise; the good states that a run can go back to."""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from torch import nn

from onlay.training.watch import Snapshots, Watch, restore


def first_alarm(watch: Watch, losses: Iterable[float]) -> list[int] | None:
    """Steps of the first alarm; the first loss is of step 1."""
    for step, loss in enumerate(losses, start=1):
        if alarm := watch.judge(step, float(loss)):
            return alarm.steps
    return None


def falling(steps: int, *, start: float = 6.0, end: float = 1.0, over: float = 100.0) -> np.ndarray:
    return end + (start - end) * np.exp(-np.arange(steps) / over)


@pytest.mark.parametrize(
    ("batch_size", "spread"), [(1, 0.8), (1, 1.5), (2, 0.8), (4, 0.5), (8, 0.3), (16, 0.2), (64, 0.1)]
)
@pytest.mark.parametrize("seed", range(4))
def test_ordinary_noise_is_no_alarm(batch_size: int, spread: float, seed: int) -> None:
    noise = np.random.default_rng(seed).lognormal(0.0, spread, 3000)
    assert first_alarm(Watch(batch_size=batch_size), falling(3000) * noise) is None


@pytest.mark.parametrize("batch_size", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("hard_share", [0.02, 0.05, 0.1, 0.3, 0.5])
def test_examples_of_two_kinds_are_no_alarm(batch_size: int, hard_share: float) -> None:
    """Short answers that are nearly always right (0.02 nats) beside ones that never are (4 nats), from the first step on."""
    draw = np.random.default_rng(7)
    hard = draw.random((3000, batch_size)) < hard_share
    assert first_alarm(Watch(batch_size=batch_size), np.where(hard, 4.0, 0.02).mean(axis=1)) is None


def test_training_from_scratch_is_no_alarm() -> None:
    draw = np.random.default_rng(0)
    losses = falling(500, start=8.3, end=2.0, over=40.0) + draw.normal(0.0, 0.15, 500)
    losses[:3] += 0.4  # The first updates of a warm-up may hurt a little.
    assert first_alarm(Watch(batch_size=16), losses) is None


def test_one_hard_batch_is_no_alarm_and_two_in_a_row_are() -> None:
    calm = [2.0, 2.1, 1.9, 2.0] * 5
    assert first_alarm(Watch(batch_size=16), [*calm, 9.0, 2.0, 2.1, 9.0, 1.9, 2.0]) is None
    assert first_alarm(Watch(batch_size=16), [*calm, 9.0, 9.0]) == [21, 22]


@pytest.mark.parametrize(("batch_size", "in_a_row"), [(1, 16), (2, 8), (4, 4), (8, 2), (64, 2)])
def test_small_batches_take_more_steps_to_be_sure(batch_size: int, in_a_row: int) -> None:
    calm = [2.0, 2.1] * 40
    assert first_alarm(Watch(batch_size=batch_size), [*calm, *[30.0] * (in_a_row - 1), 2.0]) is None
    assert first_alarm(Watch(batch_size=batch_size), [*calm, *[30.0] * in_a_row]) == list(range(81, 81 + in_a_row))


def test_an_explosion_in_the_first_steps_is_a_spike() -> None:
    assert first_alarm(Watch(batch_size=16), [2.5, 2.6, 7.0, 11.0]) == [3, 4]


def test_a_rise_too_small_for_a_spike_is_an_alarm_when_it_stays() -> None:
    """What a rate that is too large from the start does to a trained base: the loss of guessing, from the second step on."""
    plateau = [2.5, 2.5, 4.0, *[4.9, 4.8] * 10]
    alarm = first_alarm(Watch(batch_size=16), plateau)
    assert alarm is not None
    assert alarm[0] in (3, 4)
    assert len(alarm) <= 2


def test_the_loss_that_alarms_is_told() -> None:
    watch = Watch(batch_size=16)
    alarms = [watch.judge(step, loss) for step, loss in enumerate([2.0] * 20 + [9.0, 9.5], start=1)]
    assert alarms[-1] is not None
    assert alarms[-1].detail == "the loss rose to 9.500, above the limit of 3.000"


def test_a_watch_goes_on_where_it_was_saved() -> None:
    losses = [*(falling(40) + np.random.default_rng(0).normal(0, 0.1, 40)), 15.0, 15.0]
    for cut in range(42):
        whole, first, second = (Watch(batch_size=16) for _ in range(3))
        expected = [whole.judge(step, float(loss)) for step, loss in enumerate(losses, start=1)]
        found = [first.judge(step, float(loss)) for step, loss in enumerate(losses[:cut], start=1)]
        second.load(json.loads(json.dumps(first.state())))
        found += [second.judge(step, float(loss)) for step, loss in enumerate(losses[cut:], start=cut + 1)]
        assert found == expected
    assert expected[-1] is not None


def trained(steps: int) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    torch.manual_seed(0)
    weights = {"a": nn.Parameter(torch.randn(3, 2)), "b": nn.Parameter(torch.randn(2))}
    optimizer = torch.optim.AdamW(weights.values(), lr=0.1)
    for _ in range(steps):
        update(weights, optimizer)
    return weights, optimizer


def update(weights: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    sum((p**2).sum() for p in weights.values()).backward()
    optimizer.step()


def test_a_restored_state_is_the_same_and_trains_the_same_more_than_once() -> None:
    weights, optimizer = trained(3)
    snapshots = Snapshots(every_steps=5)
    snapshots.take(3, trainable=weights, optimizer=optimizer, state={"watch": {}})
    update(weights, optimizer)
    expected = {name: p.detach().clone() for name, p in weights.items()}
    for _ in range(2):
        update(weights, optimizer)
        snapshot = snapshots.before(99)
        assert snapshot is not None
        restore(snapshot, trainable=weights, optimizer=optimizer)
        update(weights, optimizer)
        assert all(torch.equal(weights[name], expected[name]) for name in weights)


def test_a_state_before_the_first_update_empties_the_optimizer() -> None:
    weights, optimizer = trained(0)
    snapshots = Snapshots(every_steps=5)
    snapshots.take(0, trainable=weights, optimizer=optimizer, state={})
    update(weights, optimizer)
    snapshot = snapshots.before(0)
    assert snapshot is not None
    restore(snapshot, trainable=weights, optimizer=optimizer)
    assert not optimizer.state


def test_the_last_two_good_states_are_kept() -> None:
    weights, optimizer = trained(1)
    snapshots = Snapshots(every_steps=5)
    for step in (0, 5, 10, 15):
        snapshots.take(step, trainable=weights, optimizer=optimizer, state={})
    assert [getattr(snapshots.before(step), "step", None) for step in (99, 15, 14, 10, 3)] == [15, 15, 10, 10, 10]
    snapshots.forget_after(10)
    assert [getattr(snapshots.before(step), "step", None) for step in (99, 3)] == [10, 10]
    assert [stored["step"] for stored in snapshots.stored(11)] == [10]
    assert snapshots.stored(10) == []


def test_a_state_that_is_not_finite_is_no_good_state() -> None:
    weights, optimizer = trained(1)
    snapshots = Snapshots(every_steps=5)
    with torch.no_grad():
        weights["b"][0] = float("nan")
    snapshots.take(5, trainable=weights, optimizer=optimizer, state={})
    assert snapshots.before(5) is None
