"""Groups examples into micro-batches and lays each out as tensors.

Packed: examples one after another in one row, positions starting again at each, boundaries in `cu_seq_lens`.
Padded: one example a row, filled up on the right.  In both, `columns` are the positions at which a logit is needed, so
that the language-model head runs on those alone.

torch is imported by `collate` only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

IGNORED = -100
"""Target where no logit is needed."""


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """One forward pass.  B rows, S positions, N examples, C columns; on the CPU."""

    input_ids: torch.Tensor
    """(B, S) int64; packed: B = 1."""
    attention_mask: torch.Tensor | None
    """(B, S) int64, 1 at real tokens; None when packed, or when nothing is padded."""
    position_ids: torch.Tensor | None
    """(1, S) int64 starting again at each example; packed only."""
    cu_seq_lens: torch.Tensor | None
    """(N + 1,) int32: where examples begin and the last one ends; packed only."""
    max_length: int
    """Longest example."""
    columns: torch.Tensor
    """(C,) int64, ascending: positions p where in some row token p + 1 is a target."""
    targets: torch.Tensor
    """(B, C) int64: token p + 1, or -100 where that row needs no logit at p."""
    num_trained: int
    """Targets that are not -100."""
    num_tokens: int
    """Real tokens, padding left out."""


def plan_micro_batches(
    lengths: Sequence[int], *, budget_tokens: int, packed: bool, piece_tokens: int | None = None
) -> list[list[int]]:
    """Indices of `lengths` in as few groups as `budget_tokens` allows; each group ascending, the longest group first.

    Packed, a group's lengths sum to at most the budget (first fit, longest first); padded, rows times the longest is at
    most the budget.  An example longer than the budget goes alone.  `piece_tokens` is what one more group costs, counted
    in tokens: where it is given, padded rows are cut into more groups if that saves more padding than it costs.
    """
    if budget_tokens < 1:
        raise ValueError(f"budget_tokens = {budget_tokens} must be at least 1")
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    groups: list[list[int]] = []
    if packed:
        room: list[int] = []
        for i in order:
            at = next((g for g, free in enumerate(room) if lengths[i] <= free), None)
            if at is None:
                groups.append([i])
                room.append(budget_tokens - lengths[i])
            else:
                groups[at].append(i)
                room[at] -= lengths[i]
    elif piece_tokens is not None:
        groups = _cheapest(order, lengths, budget_tokens, piece_tokens)
    else:
        at = 0
        while at < len(order):
            rows = max(1, budget_tokens // max(1, lengths[order[at]]))
            groups.append(order[at : at + rows])
            at += rows
    return [sorted(group) for group in groups]


def _cheapest(order: list[int], lengths: Sequence[int], budget_tokens: int, piece_tokens: int) -> list[list[int]]:
    """Cuts `order` (longest first) where rows x longest + piece_tokens, summed over the groups, is least."""
    costs, starts = [0], [0]
    for end in range(1, len(order) + 1):
        best, begin = costs[end - 1] + lengths[order[end - 1]] + piece_tokens, end - 1
        for start in range(end - 2, -1, -1):
            padded = (end - start) * lengths[order[start]]
            if padded > budget_tokens:
                break
            if costs[start] + padded + piece_tokens < best:
                best, begin = costs[start] + padded + piece_tokens, start
        costs.append(best)
        starts.append(begin)
    groups: list[list[int]] = []
    end = len(order)
    while end:
        groups.append(order[starts[end] : end])
        end = starts[end]
    return groups[::-1]


def collate(examples: Sequence[tuple[np.ndarray, np.ndarray]], *, packed: bool, pad_token_id: int) -> MicroBatch:
    """Tensors of a group of examples, each (token ids, trained flags).

    `trained[i]` makes token i a target, predicted at i - 1; an example's first token never is one.
    """
    import torch

    lengths = np.array([len(ids) for ids, _ in examples], dtype=np.int64)
    if len(lengths) == 0 or lengths.min() == 0:
        raise ValueError("a micro-batch needs at least one example, and none may be empty")
    longest, total = int(lengths.max()), int(lengths.sum())
    rows = 1 if packed else len(examples)
    width = total if packed else longest
    ids = np.full((rows, width), pad_token_id, dtype=np.int64)
    wanted = np.full((rows, width), IGNORED, dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)]) if packed else np.zeros(len(examples) + 1, dtype=np.int64)
    for i, (tokens, trained) in enumerate(examples):
        row, begin = (0, int(starts[i])) if packed else (i, 0)
        end = begin + len(tokens)
        ids[row, begin:end] = tokens
        following = np.asarray(tokens[1:], dtype=np.int64)
        wanted[row, begin : end - 1] = np.where(np.asarray(trained[1:], dtype=bool), following, IGNORED)
    columns = np.flatnonzero((wanted != IGNORED).any(axis=0))
    targets = np.ascontiguousarray(wanted[:, columns])
    mask = None
    if not packed and total < rows * width:
        mask = torch.from_numpy((np.arange(width)[None, :] < lengths[:, None]).astype(np.int64))
    positions = np.concatenate([np.arange(n, dtype=np.int64) for n in lengths])[None, :] if packed else None
    return MicroBatch(
        input_ids=torch.from_numpy(ids),
        attention_mask=mask,
        position_ids=None if positions is None else torch.from_numpy(positions),
        cu_seq_lens=torch.from_numpy(starts.astype(np.int32)) if packed else None,
        max_length=longest,
        columns=torch.from_numpy(columns.astype(np.int64)),
        targets=torch.from_numpy(targets),
        num_trained=int((targets != IGNORED).sum()),
        num_tokens=total,
    )
