"""Whether the rows of a base can be slots: tried, not believed.

Two rows are computed alone without a cache, and as slots: one padded beside the other, one admitted late, both moved.
Logits must agree; else the base answers in fixed groups.  The fused steps (fused.py) are tried first, also at the end of the
context, where they must agree with the base's own modules; then its own modules alone.
"""

from __future__ import annotations

import inspect
import math
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from onlay.generation.adapters import base_of, switched
from onlay.generation.fused import FusedDecoding
from onlay.generation.slots import SLOT_ATTENTION, MaskForm, Slots, attention
from onlay.kernels.decode import has_kernels, why_not


@dataclass(frozen=True, slots=True)
class Proven:
    failure: str | None
    """Why rows cannot be slots; None when they can."""
    _: KW_ONLY
    attention: str | None
    """Attention to decode with; None: the base's own."""
    bytes_a_token: int
    """Of keys and values in all layers."""
    pads: bool
    """Without slots: whether padding leaves a row as it is.  A recurrent state runs through it in some bases."""
    fused: str | None
    """Why steps do not run on the fused kernels; None when they do."""
    steps: FusedDecoding | None
    """The fused steps, where they do."""
    alone_over: int | None
    """Rows longer than this change what the others of their batch are computed with; None: never."""


def prove_slots(model: nn.Module, *, context_tokens: int | None) -> Proven:
    """How this base's rows can be decoded.  The model is left as it was."""
    base = base_of(model)
    alone_over = _frequencies_change_over(base.config)
    pads = not getattr(base, "_is_stateful", False)
    failure = _structure(base)
    fused: str | None = failure
    if failure is None:
        takes_ours = getattr(type(base), "_supports_attention_backend", False)
        steps, fused = _fused(base) if takes_ours else (None, "it does not take other attentions")
        ways = [(name, fuses) for name in ([SLOT_ATTENTION] if takes_ours else []) for fuses in (True, False)]
        for name, fuses in [*ways, (None, False)]:
            if fuses and steps is None:
                continue
            was_training = model.training
            model.eval()
            try:
                with torch.inference_mode(), switched(model, None):
                    failure, bytes_a_token = _try(
                        base, name, context_tokens, steps=steps if fuses else None, alone_over=alone_over
                    )
            finally:
                model.train(was_training)
            if failure is None:
                return Proven(
                    None, attention=name, bytes_a_token=bytes_a_token, pads=pads, fused=fused, steps=steps if fuses else None,
                    alone_over=alone_over,
                )  # fmt: skip
            if fuses:
                fused = failure
    return Proven(
        failure, attention=None, bytes_a_token=0, pads=pads, fused=fused, steps=None, alone_over=alone_over
    )  # fmt: skip


def _fused(base: Any) -> tuple[FusedDecoding | None, str | None]:
    """The fused steps of a base, or why there are none."""
    embedding = base.get_input_embeddings().weight
    if not has_kernels(embedding.device):
        return None, "the kernels need a GPU and Triton"
    steps = FusedDecoding(base)
    if not steps.found:
        return None, "its blocks have another form"
    for width in steps.widths:
        reason = why_not(width=width, dtype=embedding.dtype, device=embedding.device)
        if reason is not None:
            return None, reason
    return steps, None


def _structure(base: Any) -> str | None:
    """What can be seen without computing anything."""
    if len(set((getattr(base, "hf_device_map", None) or {"": 0}).values())) > 1:
        return "it is spread over several devices"
    if getattr(base, "_is_stateful", False) or base.config.is_encoder_decoder:
        return "it carries a state that is not keys and values"
    if "position_ids" not in inspect.signature(base.forward).parameters:
        return "it takes no positions"
    odd = [
        type(layer).__name__
        for layer in DynamicCache(config=base.config).layers
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer)
    ]
    return f"its cache has a {odd[0]}" if odd else MaskForm.failure(base.config)


def _frequencies_change_over(config: Any) -> int | None:
    config = config.get_text_config()
    rope: Any = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    if not any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds):
        return None
    limits = [kind.get("original_max_position_embeddings") for kind in kinds]
    limits.append(getattr(config, "original_max_position_embeddings", None))
    return int(min([limit for limit in limits if limit] or [config.max_position_embeddings]))


def _try(
    base: Any, name: str | None, context_tokens: int | None, *, steps: FusedDecoding | None, alone_over: int | None
) -> tuple[str | None, int]:
    """None when slots give the logits of each row alone, else what differed; and the bytes of a token's keys and values."""
    device = next(base.parameters()).device
    vocabulary = base.get_input_embeddings().weight.shape[0]
    draw = torch.Generator().manual_seed(0)
    first, second = (torch.randint(vocabulary, (n,), generator=draw).to(device) for n in (21, 29))
    if context_tokens is not None and context_tokens <= 30:
        return f"its context of {context_tokens} tokens is too short to try it", 0
    try:
        alone = [base(input_ids=row[None], use_cache=False).logits[0] for row in (first, second)]
        padded = torch.nn.functional.pad(first, (len(second) - len(first), 0))
        mask = torch.ones(2, len(second), dtype=torch.long, device=device)
        mask[0, : len(second) - len(first)] = 0
        own = base(
            input_ids=torch.stack([padded, second]), attention_mask=mask, use_cache=False,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        ).logits  # fmt: skip
        last = _last_position(base.config, context_tokens, alone_over)
        with attention(base, name):
            slots = Slots(base, rows=3, columns=36, longest=last + 1, piece_tokens=9, graphs=False)
            with steps or nullcontext():
                found = _walk(slots, first, second)
            far = None if steps is None else _far(slots, steps, position=last)
    except (NotImplementedError, RuntimeError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}", 0
    # Half of the digits (norms and rotary tables are float32 in a float64 base too); or what the base's own padding does
    # to them, where rounding adds up over many layers.
    limit = math.sqrt(max(torch.finfo(dtype).eps for dtype in (own.dtype, torch.float32)))
    if own.dtype in (torch.bfloat16, torch.float16):
        limit = max(limit, 2 * _difference(own[0, -len(first) :], alone[0]), 2 * _difference(own[1], alone[1]))
    if far is not None and not far <= limit:
        return f"logits at position {last:,} differ by {far:.1e} from the modules' own, allowed {limit:.1e}", 0
    for row, logits in enumerate(alone):
        difference = _difference(torch.stack([one for _, one in found[row]]), logits[[at for at, _ in found[row]]])
        if not difference <= limit:
            return f"logits of row {row + 1} differ by {difference:.1e}, allowed {limit:.1e}", 0
    return None, slots.bytes_a_token


def _last_position(config: Any, context_tokens: int | None, alone_over: int | None) -> int:
    """The last that rows of one batch come to; at least 29."""
    known = (context_tokens, getattr(config.get_text_config(), "max_position_embeddings", None), alone_over)
    return max(30, min([tokens for tokens in known if tokens] or [30])) - 1


def _far(slots: Slots, steps: FusedDecoding, *, position: int) -> float:
    """How far fused steps and the modules' own are apart at a late position: some scale queries by it."""
    ids = torch.arange(slots.rows, device=slots.device)
    active = list(range(slots.rows))
    own = slots.probe(ids, position=position, active=active)
    with steps:
        return _difference(slots.probe(ids, position=position, active=active), own)


def _walk(slots: Slots, first: Tensor, second: Tensor) -> list[list[tuple[int, Tensor]]]:
    """Positions and logits of both rows: the first is padded beside a short one, the second comes late and is longer."""
    rows, lengths = (first, second), [17, 24]
    found: list[list[tuple[int, Tensor]]] = [[], []]
    place: dict[int, int] = {}

    def admit(row: int, at: int, *others: tuple[int, list[int]]) -> None:
        prompts = [rows[row][: lengths[row]].tolist(), *(prompt for _, prompt in others)]
        logits = slots.admit([at, *(other for other, _ in others)], prompts, active=list(place.values()))
        place[row] = at
        found[row].append((lengths[row] - 1, logits[0]))

    def step() -> None:
        ids = torch.zeros(slots.rows, dtype=torch.long, device=first.device)
        going = [row for row in place if lengths[row] < len(rows[row])]
        for row in going:
            ids[place[row]] = rows[row][lengths[row]]
        logits = slots.step(ids, active=[place[row] for row in going])
        for row in going:
            found[row].append((lengths[row], logits[place[row]]))
            lengths[row] += 1

    admit(0, 1, (0, second[:5].tolist()))
    step()
    step()
    admit(1, 2)
    step()
    slots.keep([2, 1])
    place = {0: 1, 1: 0}
    while lengths[1] < len(second):
        step()
    return found


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))
