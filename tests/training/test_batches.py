"""Which examples a step takes: exactly as many as asked, each once an epoch, the same however many ranks there are."""

from __future__ import annotations

import numpy as np
import pytest

from onlay.data.pack import MicroBatch
from onlay.training.batches import Batches
from tests.builders import ListExamples, batches_for, random_examples

EXAMPLES = random_examples(23, seed=4)


def make(
    examples: ListExamples = EXAMPLES,
    *,
    batch_size: int = 5,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    packed: bool = False,
) -> Batches:
    return batches_for(examples, packed=packed, batch_size=batch_size, seed=seed, rank=rank, world=world)


def tokens_of(batches: list[MicroBatch]) -> list[int]:
    """Targets of all examples, sorted: what was trained, whatever the layout."""
    return sorted(int(t) for batch in batches for t in batch.targets[batch.targets != -100])


@pytest.mark.parametrize("batch_size", [1, 5, 23, 60])
def test_a_step_takes_exactly_batch_size_examples_and_an_epoch_each_example_once(batch_size: int) -> None:
    batches = make(batch_size=batch_size)
    steps = [batches.indices(step) for step in range(1, 70)]
    assert all(len(indices) == batch_size for indices in steps)
    taken = np.concatenate(steps)
    for epoch in range(len(taken) // len(EXAMPLES)):
        assert sorted(taken[epoch * 23 : (epoch + 1) * 23]) == list(range(23))


def test_every_epoch_and_seed_has_its_own_order() -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        return tuple(make(batch_size=23, seed=seed).indices(epoch + 1))

    assert len({order(seed, epoch) for seed in range(3) for epoch in range(3)}) == 9
    assert order(1, 2) == order(1, 2)


def test_a_step_depends_on_nothing_that_came_before() -> None:
    used = make()
    for step in (9, 2, 5, 1):
        used.indices(step)
    for step in range(1, 12):
        assert np.array_equal(used.indices(step), make().indices(step))


@pytest.mark.parametrize(
    ("epochs", "batch_size", "steps"), [(1, 5, 5), (3, 5, 14), (0.5, 5, 3), (0.01, 5, 1), (2, 23, 2), (1, 100, 1)]
)
def test_steps_of_some_epochs(epochs: float, batch_size: int, steps: int) -> None:
    assert make(batch_size=batch_size).steps_for(epochs) == steps


def test_counts_are_those_of_the_micro_batches() -> None:
    batches = make()
    for step in range(1, 8):
        made = list(batches.micro_batches(step, 60))
        assert batches.trained_tokens(step) == sum(batch.num_trained for batch in made)
        assert batches.tokens(step) == sum(batch.num_tokens for batch in made)
        assert batches.longest(step) == max(batch.max_length for batch in made)


@pytest.mark.parametrize("packed", [True, False])
def test_no_budget_changes_what_a_step_trains(packed: bool) -> None:
    batches = make(packed=packed)
    whole = list(batches.micro_batches(3, 10_000))
    assert len(whole) == 1
    for budget in (1, 40, 80):
        cut = list(batches.micro_batches(3, budget))
        assert tokens_of(cut) == tokens_of(whole)
        assert all(batch.input_ids.numel() <= budget or batch.num_tokens == batch.max_length for batch in cut)


@pytest.mark.parametrize("world", [2, 3, 8])
def test_ranks_share_a_step_without_gap_or_overlap(world: int) -> None:
    alone = make()
    for step in range(1, 8):
        ranks = [make(rank=rank, world=world) for rank in range(world)]
        shares = [list(rank.micro_batches(step, 60)) for rank in ranks]
        assert tokens_of([batch for share in shares for batch in share]) == tokens_of(
            list(alone.micro_batches(step, 60))
        )
        assert {rank.trained_tokens(step) for rank in ranks} == {alone.trained_tokens(step)}
        sizes = [sum(int((batch.targets != -100).any(1).sum()) for batch in share) for share in shares]
        assert max(sizes) - min(sizes) <= 1
        assert sum(sizes) == 5


def test_evaluation_covers_the_chosen_examples_once_over_all_ranks() -> None:
    chosen = [3, 7, 1, 22, 8]
    expected = sorted(int(token) for i in chosen for token, flag in zip(*EXAMPLES.example(i), strict=True) if flag)
    for world in (1, 2, 7):
        shares = [list(make(rank=rank, world=world).all_micro_batches(chosen, 70)) for rank in range(world)]
        assert tokens_of([batch for share in shares for batch in share]) == expected
