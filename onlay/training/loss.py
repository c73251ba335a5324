"""The loss of a causal language model: nats of each trained token, summed.

Only hidden states at which a trained token follows go on to the output head.  From there two ways lead to the same number:
`kernels/chunked_loss.py`, which never holds all logits, where the model's logits are nothing but its head's product; else
the model's own forward, with transformers' `logits_to_keep`.  Which of the two is asked of the model, by running it once.
Cross-entropy is taken in float32 (float64 for a float64 model).
"""

from __future__ import annotations

import inspect
import math
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from onlay.data.pack import IGNORED, collate
from onlay.kernels.chunked_loss import linear_cross_entropy
from onlay.model.attention import Layout, packed_arguments

if TYPE_CHECKING:
    from onlay.data.pack import MicroBatch

IN_CHUNKS = "from hidden states by chunks of tokens, at trained tokens only"
ORDINARY = "from the model's logits, at trained tokens only"
PROBE_LENGTHS = (7, 12)
"""Tokens of the two rows that a model is asked with."""


class Loss:
    """(model, micro-batch) -> sum of nats over the trained tokens, a scalar that can be differentiated."""

    def __init__(self, model: nn.Module, layout: Layout, *, device: torch.device, compute_dtype: torch.dtype) -> None:
        base: Any = model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model  # type: ignore[operator]
        self._base = base
        self._layout = layout
        self._device = device
        self._compute_dtype = compute_dtype
        self._keeps_some = "logits_to_keep" in inspect.signature(base.forward).parameters
        self._ends: tuple[nn.Module, nn.Linear] | None = None
        reason = self._choose_ends(model)
        self.note = IN_CHUNKS if reason is None else f"{ORDINARY}, because {reason}"
        """How cross-entropy is computed, in words, for the Run."""

    def __call__(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        return self._ordinary(model, batch) if self._ends is None else self._in_chunks(*self._ends, batch)

    def _ordinary(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        targets = batch.targets.to(self._device, non_blocking=True)
        logits = self._logits(model, batch)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")

    def _logits(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        """(B, C, V): at the micro-batch's columns."""
        arguments = self._arguments(batch)
        columns = batch.columns.to(self._device, non_blocking=True)
        if self._keeps_some:
            arguments["logits_to_keep"] = columns
        with self._autocast():
            logits: Tensor = model(**arguments).logits
        return logits if self._keeps_some else logits[:, columns]

    def _in_chunks(self, decoder: nn.Module, head: nn.Linear, batch: MicroBatch) -> Tensor:
        # Picked on the host, where the targets are: on a GPU their number would have to be waited for.
        rows, places = (batch.targets != IGNORED).nonzero(as_tuple=True)
        positions = rows * batch.input_ids.shape[1] + batch.columns[places]
        with self._autocast():
            hidden = decoder(**self._arguments(batch)).last_hidden_state.flatten(0, 1)
        hidden = hidden.index_select(0, positions.to(hidden.device, non_blocking=True))
        weight = head.weight
        targets = batch.targets[rows, places].to(weight.device, non_blocking=True)
        return linear_cross_entropy(hidden.to(weight), weight, head.bias, targets).to(self._device)

    def _arguments(self, batch: MicroBatch) -> dict[str, Any]:
        def there(tensor: Tensor) -> Tensor:
            return tensor.to(self._device, non_blocking=True)

        arguments: dict[str, Any] = {"input_ids": there(batch.input_ids), "use_cache": False}
        if self._layout.packed:
            assert batch.position_ids is not None and batch.cu_seq_lens is not None
            arguments["position_ids"] = there(batch.position_ids)
            arguments |= packed_arguments(self._base, there(batch.cu_seq_lens), batch.max_length)
        elif self._layout.mask_padding and batch.attention_mask is not None:
            arguments["attention_mask"] = there(batch.attention_mask)
        return arguments

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._compute_dtype not in (torch.bfloat16, torch.float16):
            return nullcontext()
        return torch.autocast(self._device.type, dtype=self._compute_dtype)

    # ------------------------------------------------------------------------------------- which of the two ways

    def _choose_ends(self, model: nn.Module) -> str | None:
        """Sets decoder and head where they alone make the loss, and returns None; else returns why they do not."""
        from transformers import PreTrainedModel

        if not isinstance(self._base, PreTrainedModel):
            return f"{type(self._base).__name__} is no model of transformers"
        decoder, head = self._base.get_decoder(), self._base.get_output_embeddings()
        if decoder is self._base or type(head) is not nn.Linear:
            return f"its output head is a {type(head).__name__}" if head is not None else "it shows no output head"
        if any(parameter.requires_grad for parameter in head.parameters()):
            return "its output head is trained"
        if head.weight.is_meta or head.weight.dtype != self._compute_dtype:
            return f"its output head is kept as {head.weight.dtype} on {head.weight.device}"
        failure = self._failure_of(model, decoder, head)
        if failure is None:
            self._ends = decoder, head
        return failure

    @torch.no_grad()
    def _failure_of(self, model: nn.Module, decoder: nn.Module, head: nn.Linear) -> str | None:
        """None when this model's logits are its head's product with the last hidden states, bit for bit, and decoder and
        head by themselves give the loss of the whole to half of the digits (square root of the machine epsilon)."""
        batch = self._probe()
        heads: list[tuple[Tensor, Tensor]] = []
        decoders: list[Tensor] = []
        hooks = [
            head.register_forward_hook(lambda _module, given, out: heads.append((given[0], out))),
            decoder.register_forward_hook(lambda _module, _given, out: decoders.append(out.last_hidden_state)),
        ]
        was_training = model.training
        model.eval()
        try:
            logits = self._logits(model, batch)
            ordinary = float(self._ordinary(model, batch))
            chunked = float(self._in_chunks(decoder, head, batch))
        except (NotImplementedError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return f"its parts do not run by themselves ({type(error).__name__}: {str(error).splitlines()[0][:120]})"
        finally:
            for hook in hooks:
                hook.remove()
            model.train(was_training)
        if not heads or not decoders:
            return "it does not call its output head"
        given, out = heads[0]
        hidden, columns = decoders[0], batch.columns.to(self._device)
        if not self._keeps_some:
            given, out = given[:, columns], out[:, columns]
        if not torch.equal(given.to(self._device), hidden.to(given.dtype).to(self._device)[:, columns]):
            return "it changes hidden states before its output head"
        if not torch.equal(logits.to(out.dtype), out.to(logits.device)):
            return "it changes logits after its output head"
        if not abs(chunked - ordinary) <= math.sqrt(torch.finfo(self._compute_dtype).eps) * abs(ordinary):
            return f"decoder and head by themselves give {chunked:.6g} nats instead of {ordinary:.6g}"
        return None

    def _probe(self) -> MicroBatch:
        """Random tokens, each trained but the first of a row."""
        vocabulary = int(self._base.get_input_embeddings().weight.shape[0])
        draw = np.random.default_rng(0)
        rows = [(draw.integers(vocabulary, size=n), np.arange(n) > 0) for n in PROBE_LENGTHS]
        return collate(rows, packed=self._layout.packed, pad_token_id=0)


def make_loss(model: nn.Module, layout: Layout, *, device: torch.device, compute_dtype: torch.dtype) -> Loss:
    """The loss for this base; runs it on a few tokens to see which way is open."""
    return Loss(model, layout, device=device, compute_dtype=compute_dtype)
