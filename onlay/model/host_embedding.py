"""A frozen input embedding in pinned host memory: a step reads a few thousand of its rows, so a GPU need not hold them all.

For Llama-3.1-8B these are 0.98 GiB.  The rows of a micro-batch, (T, D), are looked up on the host and copied over.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class HostEmbedding:
    """Moves one base's embedding out, and back with `put_back`.  Per instance; nothing else of the base changes."""

    def __init__(self, model: Any) -> None:
        """`model`: of transformers, with its parameters where the work is done."""
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        covered = type(embedding) is nn.Embedding and embedding.max_norm is None
        tied = covered and isinstance(head, nn.Linear) and head.weight is embedding.weight
        self._embedding = embedding if covered and not tied and not embedding.weight.requires_grad else None
        self._device: torch.device | None = None

    @property
    def is_out(self) -> bool:
        return self._device is not None

    def move_out(self) -> None:
        """Off the GPU; does nothing for an embedding that trains, that the output head shares, or that is on a CPU already."""
        embedding = self._embedding
        if embedding is None or self.is_out or not embedding.weight.is_cuda:
            return
        self._device = embedding.weight.device
        embedding.weight.data = embedding.weight.data.cpu().pin_memory()
        embedding.forward = partial(_look_up, embedding, self._device)

    def put_back(self) -> None:
        if self._embedding is not None and self._device is not None:
            del self._embedding.forward
            self._embedding.weight.data = self._embedding.weight.data.to(self._device)
            self._device = None


def _look_up(embedding: nn.Embedding, device: torch.device, ids: Tensor) -> Tensor:
    rows = functional.embedding(ids.cpu(), embedding.weight, embedding.padding_idx)
    return rows.pin_memory().to(device, non_blocking=True)
