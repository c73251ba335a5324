"""The loss of a causal language model: nats of each trained token, summed.

Logits are computed only where a trained token follows, through the `logits_to_keep` of transformers' models; what is
left out of the sum costs neither memory nor time.  Cross-entropy is taken in float32 (float64 for a float64 model).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from onlay.model.attention import Layout, packed_arguments

if TYPE_CHECKING:
    from onlay.data.pack import MicroBatch


def make_loss(
    model: nn.Module, layout: Layout, *, device: torch.device, compute_dtype: torch.dtype
) -> Callable[[nn.Module, MicroBatch], Tensor]:
    """A function (model, micro-batch) -> sum of nats, for this base."""
    base: Any = model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model  # type: ignore[operator]
    keeps_some = "logits_to_keep" in inspect.signature(base.forward).parameters
    mixed = compute_dtype in (torch.bfloat16, torch.float16)

    def loss(model: nn.Module, batch: MicroBatch) -> Tensor:
        columns = batch.columns.to(device, non_blocking=True)
        targets = batch.targets.to(device, non_blocking=True)
        arguments: dict[str, Any] = {"input_ids": batch.input_ids.to(device, non_blocking=True), "use_cache": False}
        if layout.packed:
            assert batch.position_ids is not None and batch.cu_seq_lens is not None
            arguments["position_ids"] = batch.position_ids.to(device, non_blocking=True)
            arguments |= packed_arguments(base, batch.cu_seq_lens.to(device, non_blocking=True), batch.max_length)
        elif layout.mask_padding and batch.attention_mask is not None:
            arguments["attention_mask"] = batch.attention_mask.to(device, non_blocking=True)
        if keeps_some:
            arguments["logits_to_keep"] = columns
        with torch.autocast(device.type, dtype=compute_dtype) if mixed else nullcontext():
            logits = model(**arguments).logits
        if not keeps_some:
            logits = logits[:, columns]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")

    return loss
