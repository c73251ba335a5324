"""Loss and predictions of a classification head: one target a text, at its last token.

The micro-batches are those of the language-model methods (`onlay.data.pack`); the body runs without a gradient and
only the hidden states that a label belongs to reach the head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from onlay.data.pack import IGNORED
from onlay.model.attention import Layout, packed_arguments
from onlay.model.head import ClassificationHead
from onlay.training.batches import Examples

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from onlay.data.pack import MicroBatch

PLANNED_TOGETHER = 1024
"""Grouping takes time that grows faster than the number of examples."""


class HeadLoss:
    """(head, micro-batch) -> sum of nats: cross-entropy of the labels, in float32 (float64 for a float64 head)."""

    note = "of one label a text, at its last token; the body runs without a gradient and keeps no activation"
    """How cross-entropy is computed, in words, for the Run."""

    def __init__(self, base: PreTrainedModel, layout: Layout, *, device: torch.device) -> None:
        self._base = base
        self._layout = layout
        self._device = device

    def __call__(self, head: nn.Module, batch: MicroBatch) -> Tensor:
        logits, targets = self.logits(head, batch)
        return functional.cross_entropy(logits, targets, reduction="sum")

    def logits(self, head: nn.Module, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """(N, K) logits and (N,) targets of the N texts in the micro-batch, on the device."""
        # Found on the CPU, where the batch is: a GPU would have to be waited for.
        rows, places = (batch.targets != IGNORED).nonzero(as_tuple=True)
        targets, columns = self._there(batch.targets[rows, places]), self._there(batch.columns[places])
        arguments: dict[str, Any] = {"input_ids": self._there(batch.input_ids)}
        if self._layout.packed:
            assert batch.position_ids is not None and batch.cu_seq_lens is not None
            arguments["position_ids"] = self._there(batch.position_ids)
            arguments |= packed_arguments(self._base, self._there(batch.cu_seq_lens), batch.max_length)
        elif self._layout.mask_padding and batch.attention_mask is not None:
            arguments["attention_mask"] = self._there(batch.attention_mask)
        logits: Tensor = head(self._there(rows), columns, **arguments)
        return logits, targets

    def _there(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)


@torch.no_grad()
def predict(
    head: ClassificationHead,
    examples: Examples,
    *,
    loss: HeadLoss,
    plan: Callable[[Sequence[int]], list[list[int]]],
    collate: Callable[[list[tuple[np.ndarray, np.ndarray]]], MicroBatch],
) -> tuple[list[int], list[int]]:
    """The likeliest label's number and the right one for every example, pair by pair, in no given order.

    `plan` groups examples by their lengths into micro-batches; `collate` makes tensors of a group.
    """
    likeliest: list[int] = []
    right: list[int] = []
    for start in range(0, len(examples), PLANNED_TOGETHER):
        for group in plan([int(n) for n in examples.lengths[start : start + PLANNED_TOGETHER]]):
            logits, targets = loss.logits(head, collate([examples.example(start + i) for i in group]))
            likeliest += logits.argmax(-1).tolist()
            right += targets.tolist()
    return likeliest, right
