"""Which examples each optimizer step takes, and how one device sees them.

The order is a function of (seed, step) alone, so a resumed or repeated step takes the same examples; and every rank can
compute the trained tokens of all ranks, so the loss is scaled right without a message.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from onlay.data.pack import MicroBatch


class Examples(Protocol):
    """Token sequences with their masks: `onlay.data.split.Split`, or a list of them in tests."""

    @property
    def lengths(self) -> np.ndarray: ...

    @property
    def trained_counts(self) -> np.ndarray: ...

    def __len__(self) -> int: ...

    def example(self, index: int) -> tuple[np.ndarray, np.ndarray]: ...


class Batches:
    """Exactly `batch_size` examples for every step, shuffled anew each epoch; an epoch's end runs on into the next."""

    def __init__(
        self,
        examples: Examples,
        *,
        batch_size: int,
        seed: int,
        plan: Callable[[Sequence[int], int], list[list[int]]],
        collate: Callable[[list[tuple[np.ndarray, np.ndarray]]], MicroBatch],
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """`plan(lengths, budget_tokens)` groups examples into micro-batches; `collate` makes tensors of one group."""
        self.examples = examples
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world = world
        self.left_out: frozenset[int] = frozenset()
        """Examples that no step takes any more; steps that would have are smaller."""
        self._plan = plan
        self._collate = collate
        self._order: tuple[int, np.ndarray] | None = None

    def steps_for(self, epochs: float) -> int:
        return max(1, math.ceil(epochs * len(self.examples) / self.batch_size))

    def indices(self, step: int) -> np.ndarray:
        """Examples of optimizer step `step` (1 is the first), over all ranks."""
        positions = np.arange((step - 1) * self.batch_size, step * self.batch_size)
        epochs, offsets = np.divmod(positions, len(self.examples))
        taken = [int(self._permutation(int(epoch))[offset]) for epoch, offset in zip(epochs, offsets, strict=True)]
        return np.array([index for index in taken if index not in self.left_out], dtype=np.int64)

    def trained_tokens(self, step: int) -> int:
        """Tokens with a loss in this step, over all ranks.  The first token of an example never has one."""
        return int(self.examples.trained_counts[self.indices(step)].sum())

    def tokens(self, step: int) -> int:
        return int(self.examples.lengths[self.indices(step)].sum())

    def longest(self, step: int) -> int:
        """Tokens of the longest example of this step: below this no budget can split it."""
        return int(self.examples.lengths[self.indices(step)].max())

    def micro_batches(self, step: int, budget_tokens: int) -> Iterator[MicroBatch]:
        """This rank's share of the step, in as few pieces as the budget allows."""
        mine = self.indices(step)[self.rank :: self.world]
        if not len(mine):
            return
        for group in self._plan([int(n) for n in self.examples.lengths[mine]], budget_tokens):
            yield self._collate([self.examples.example(int(mine[i])) for i in group])

    def all_micro_batches(self, indices: Sequence[int], budget_tokens: int) -> Iterator[MicroBatch]:
        """Any examples, for evaluation: this rank's share."""
        mine = list(indices)[self.rank :: self.world]
        if not mine:
            return
        for group in self._plan([int(self.examples.lengths[i]) for i in mine], budget_tokens):
            yield self._collate([self.examples.example(mine[i]) for i in group])

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.examples))
            self._order = (epoch, order)
        return self._order[1]
