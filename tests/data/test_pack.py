"""Micro-batches: few, within the budget, and with the same targets however they are laid out."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from onlay.data.pack import IGNORED, collate, plan_micro_batches


def cost(lengths: list[int], group: list[int], packed: bool) -> int:
    chosen = [lengths[i] for i in group]
    return sum(chosen) if packed else len(chosen) * max(chosen)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("budget", [1, 16, 64, 500, 10_000])
def test_every_example_once_and_within_the_budget(packed: bool, budget: int) -> None:
    random.seed(budget)
    lengths = [random.randint(2, 120) for _ in range(97)]
    groups = plan_micro_batches(lengths, budget_tokens=budget, packed=packed)
    assert sorted(i for group in groups for i in group) == list(range(97))
    assert all(cost(lengths, group, packed) <= budget or len(group) == 1 for group in groups)
    assert groups == plan_micro_batches(lengths, budget_tokens=budget, packed=packed)
    if budget == 10_000 and packed:
        assert len(groups) == 1


def test_packing_is_tight() -> None:
    assert len(plan_micro_batches([5, 7, 5, 3, 4, 6], budget_tokens=10, packed=True)) == 3
    random.seed(0)
    lengths = [random.randint(1, 100) for _ in range(500)]
    groups = plan_micro_batches(lengths, budget_tokens=512, packed=True)
    assert len(groups) <= -(-sum(lengths) // 512) + 1


def test_padded_groups_are_as_few_as_possible() -> None:
    def fewest(lengths: list[int], budget: int) -> int:
        ordered = sorted(lengths)
        best = [0]
        for end in range(1, len(ordered) + 1):  # Ordered by length, some best grouping is made of runs.
            starts = [s for s in range(end) if (end - s) * ordered[end - 1] <= budget or end - s == 1]
            best.append(min(best[s] + 1 for s in starts))
        return best[-1]

    random.seed(1)
    for _ in range(50):
        lengths = [random.randint(1, 40) for _ in range(random.randint(1, 20))]
        assert len(plan_micro_batches(lengths, budget_tokens=64, packed=False)) == fewest(lengths, 64)


def test_no_examples_and_no_budget() -> None:
    assert plan_micro_batches([], budget_tokens=10, packed=True) == []
    with pytest.raises(ValueError, match="budget_tokens"):
        plan_micro_batches([1], budget_tokens=0, packed=True)


def example(ids: list[int], trained: list[int]) -> tuple[np.ndarray, np.ndarray]:
    return np.array(ids, dtype=np.int32), np.array(trained, dtype=bool)


EXAMPLES = [example([5, 6, 7, 8], [0, 0, 1, 1]), example([1, 2], [0, 1]), example([9, 8, 7], [0, 0, 0])]


def test_packed_layout() -> None:
    batch = collate(EXAMPLES, packed=True, pad_token_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 1, 2, 9, 8, 7]]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2]]
    assert batch.cu_seq_lens is not None
    assert batch.cu_seq_lens.tolist() == [0, 4, 6, 9]
    assert batch.cu_seq_lens.dtype == torch.int32
    assert batch.attention_mask is None
    assert batch.max_length == 4
    assert batch.columns.tolist() == [1, 2, 4]
    assert batch.targets.tolist() == [[7, 8, 2]]
    assert (batch.num_trained, batch.num_tokens) == (3, 9)


def test_padded_layout() -> None:
    batch = collate(EXAMPLES, packed=False, pad_token_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [1, 2, 0, 0], [9, 8, 7, 0]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [
        [1, 1, 1, 1],
        [1, 1, 0, 0],
        [1, 1, 1, 0],
    ]
    assert batch.position_ids is None
    assert batch.cu_seq_lens is None
    assert batch.columns.tolist() == [0, 1, 2]
    assert batch.targets.tolist() == [[IGNORED, 7, 8], [2, IGNORED, IGNORED], [IGNORED] * 3]
    assert (batch.num_trained, batch.num_tokens) == (3, 9)
    assert batch.input_ids.dtype == batch.targets.dtype == batch.columns.dtype == torch.int64


def test_equal_lengths_need_no_mask() -> None:
    batch = collate([EXAMPLES[0], EXAMPLES[0]], packed=False, pad_token_id=0)
    assert batch.attention_mask is None
    assert batch.num_trained == 4


def test_padding_with_the_end_token_makes_no_target() -> None:
    batch = collate([example([5, 6, 2], [0, 1, 1]), example([5, 2], [0, 1])], packed=False, pad_token_id=2)
    assert batch.targets.tolist() == [[6, 2], [2, IGNORED]]
    assert batch.num_trained == 3


def test_first_tokens_are_never_targets() -> None:
    batch = collate([example([5, 6], [1, 1]), example([7, 8], [1, 1])], packed=True, pad_token_id=0)
    assert batch.columns.tolist() == [0, 2]
    assert batch.targets.tolist() == [[6, 8]]


@pytest.mark.parametrize("packed", [True, False])
def test_nothing_trained(packed: bool) -> None:
    batch = collate([EXAMPLES[2], example([1], [0])], packed=packed, pad_token_id=0)
    assert batch.columns.shape == (0,)
    assert batch.targets.shape == ((1, 0) if packed else (2, 0))
    assert batch.num_trained == 0
    assert batch.num_tokens == 4


@pytest.mark.parametrize("packed", [True, False])
def test_empty_is_refused(packed: bool) -> None:
    with pytest.raises(ValueError):
        collate([], packed=packed, pad_token_id=0)
    with pytest.raises(ValueError):
        collate([example([], [])], packed=packed, pad_token_id=0)


def test_layouts_hold_the_same_targets() -> None:
    random.seed(3)
    examples = []
    for _ in range(20):
        length = random.randint(2, 30)
        ids = [random.randint(3, 99) for _ in range(length)]
        examples.append(example(ids, [0, *(random.random() < 0.5 for _ in range(length - 1))]))
    packed, padded = (collate(examples, packed=flag, pad_token_id=0) for flag in (True, False))
    assert packed.cu_seq_lens is not None

    def pairs(batch: torch.Tensor, columns: torch.Tensor, targets: torch.Tensor) -> list[tuple[int, int]]:
        return sorted(
            (int(batch[r, c]), int(targets[r, k]))
            for r in range(len(batch))
            for k, c in enumerate(columns)
            if targets[r, k] != IGNORED
        )

    assert pairs(packed.input_ids, packed.columns, packed.targets) == pairs(
        padded.input_ids, padded.columns, padded.targets
    )
    assert packed.num_trained == padded.num_trained == sum(int(trained[1:].sum()) for _, trained in examples)


def test_planning_loads_no_torch() -> None:
    use = "onlay.data.pack.plan_micro_batches([1], budget_tokens=1, packed=True)"
    code = f"import sys, onlay.data.pack; {use}; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {[p for p in sys.path if p]!r}; {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False"


def test_more_pieces_where_they_save_more_padding_than_they_cost() -> None:
    """Against every way to cut the sorted lengths."""

    def padded(groups: list[list[int]], lengths: list[int], piece: int) -> int:
        return sum(len(group) * max(lengths[i] for i in group) + piece for group in groups)

    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = [int(n) for n in rng.integers(1, 60, size=8)]
        order = sorted(range(8), key=lambda i: (-lengths[i], i))
        for budget, piece in ((100, 0), (100, 20), (500, 20), (500, 1000), (30, 5)):
            groups = plan_micro_batches(lengths, budget_tokens=budget, packed=False, piece_tokens=piece)
            assert sorted(i for group in groups for i in group) == list(range(8))
            every = []
            for cuts in range(2**7):
                parts = [[order[0]]]
                for position in range(1, 8):
                    if cuts >> (position - 1) & 1:
                        parts.append([])
                    parts[-1].append(order[position])
                if all(len(part) == 1 or len(part) * lengths[part[0]] <= budget for part in parts):
                    every.append(padded(parts, lengths, piece))
            assert padded(groups, lengths, piece) == min(every)
