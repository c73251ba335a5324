"""How examples are laid out for the base: packed in one row, or right-padded; and the proof that it keeps them apart.

Packing several examples into one row wastes nothing, but only some architectures keep the examples apart: recurrent
layers carry state over the border, ALiBi and some position schemes count positions along the row.  So nothing is
believed: two rows are run packed, padded and alone, and the first layout whose logits agree with `alone` is used.

On a CPU padded rows run through `kernels/block_attention.py`.  On CUDA in 16 bit, packed rows run through `torch.nn.attention.varlen` (flash attention with cumulative lengths), put in
as a transformers attention function; no mask is built and no shape compiles anew.  It is not used in float32, with
logit soft-capping, attention sinks or heads wider than 256, which that kernel does not have: there the padded layout
runs through SDPA.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.torch_version import TorchVersion

from onlay.errors import BaseModelError
from onlay.kernels.block_attention import causal_attention, fits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKED_ATTENTION = "onlay_packed"
BLOCK_ATTENTION = "onlay_blocks"
_WATCHED = "onlay_watched"
_EXTRAS = ("softcap", "s_aux", "position_bias")
"""What an attention may ask of its kernel beyond the usual."""
_KERNEL_GROUPS_HEADS = TorchVersion(torch.__version__) >= "2.13"
"""Before torch 2.13 the kernel wants as many key heads as query heads: they are repeated then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    packed: bool
    mask_padding: bool
    """Padded rows get an attention mask.  Causal models do not need one: no token sees what is to its right."""
    attention: str
    """Name of the transformers attention implementation in use."""
    reason: str
    """Why this layout, in words, for the Run."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each packed example.  query (1, H, T, D), key and value (1, G, T, D) -> (1, T, H, D).

    cu_seq_lens_q (N + 1,) int32 holds the borders.  Raises NotImplementedError for what the kernel does not have, which
    the probe below turns into the padded layout.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        raise NotImplementedError("packed attention needs the borders of the examples (cu_seq_lens_q)")
    _refuse_extras(module, attention_mask, dropout, kwargs)
    from torch.nn.attention.varlen import varlen_attn

    if torch.is_autocast_enabled(query.device.type):  # autocast knows SDPA, but not this kernel
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    groups = query.shape[1] // key.shape[1]
    options: dict[str, Any] = {}
    if groups > 1 and _KERNEL_GROUPS_HEADS:
        options["enable_gqa"] = True
    elif groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    # (W - 1, 0): the token itself and W - 1 to its left, as transformers' sliding_window means it.
    window = (sliding_window - 1, 0) if sliding_window else (-1, 0)
    out = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=window,
        **options,
    )
    assert isinstance(out, Tensor)
    return out[None], None


def block_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention on a CPU.  query (B, H, T, D), key and value (B, G, T, D) -> (B, T, H, D).

    Rows too long to keep their probabilities, and wide heads, go to SDPA.  Raises NotImplementedError for what the op does not have.
    """
    _refuse_extras(module, attention_mask, dropout, kwargs)
    # Under autocast its matrix products would turn to 16 bit inside.
    half = query.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled(query.device.type)
    if half or sliding_window is not None or query.shape[2] != key.shape[2]:
        raise NotImplementedError("block attention does not have windows, caches or 16-bit numbers")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rows, heads, tokens, width = query.shape
    groups = key.shape[1]
    if fits(query):
        out = causal_attention(
            query.reshape(rows * groups, heads // groups, tokens, width),
            key.reshape(rows * groups, tokens, width),
            value.reshape(rows * groups, tokens, value.shape[-1]),
            scale,
        )
        # (B x G, R, T, D) -> (B, T, H, D) by one copy
        return out.unflatten(0, (rows, groups)).permute(0, 3, 1, 2, 4).reshape(rows, tokens, heads, -1), None
    out = functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=heads != groups
    )
    return out.transpose(1, 2).contiguous(), None


@contextmanager
def watch_attention(model: PreTrainedModel) -> Iterator[dict[nn.Module, dict[str, Any]]]:
    """While it is on: what each attention module tells its kernel, by module: scaling, sliding_window, and extras (names)."""
    from transformers import AttentionInterface

    told: dict[nn.Module, dict[str, Any]] = {}
    native = model.config._attn_implementation
    own = {PACKED_ATTENTION: packed_attention, BLOCK_ATTENTION: block_attention}.get(native)
    inner: Any = own if own is not None else AttentionInterface().get(native)

    def watched(module: nn.Module, query: Tensor, *args: Any, **given: Any) -> Any:
        extras = [name for name in _EXTRAS if given.get(name) is not None]
        scaling = given.get("scaling")
        told[module] = {
            "scaling": query.shape[-1] ** -0.5 if scaling is None else scaling,
            "sliding_window": given.get("sliding_window"), "extras": extras,
        }  # fmt: skip
        return inner(module, query, *args, **given)

    if inner is None:  # Eager attention is a function of each model's own file.
        yield told
        return
    AttentionInterface.register(_WATCHED, watched)
    model.set_attn_implementation(_WATCHED)  # type: ignore[operator]
    try:
        yield told
    finally:
        model.set_attn_implementation(native)  # type: ignore[operator]


def _refuse_extras(module: nn.Module, attention_mask: Tensor | None, dropout: float, extras: dict[str, Any]) -> None:
    """Raises NotImplementedError for what neither of the attentions above has."""
    refused = [name for name in _EXTRAS if extras.get(name) is not None]
    if refused or dropout or attention_mask is not None or not getattr(module, "is_causal", True):
        raise NotImplementedError(f"it does not have {', '.join(refused) or 'dropout, masks or bidirectionality'}")


def choose_layout(model: PreTrainedModel, *, packing: str, device: torch.device, compute_dtype: torch.dtype) -> Layout:
    """The layout to train with: `packing` is the recipe's auto, on or off.

    Raises BaseModelError when `on` was asked for and the base does not keep packed examples apart, or when no layout
    gives the logits of each example alone.
    """
    wants_packed = packing == "on" or (packing == "auto" and device.type == "cuda")
    why_not = (
        "padding by length is faster than packing on a CPU" if packing == "auto" else "packing is off in the recipe"
    )
    native = model.config._attn_implementation
    if wants_packed:
        candidates = []
        if device.type == "cuda" and compute_dtype in (torch.bfloat16, torch.float16):
            candidates.append(PACKED_ATTENTION)
        if packing == "on":  # with a mask of T x T: slower than padding, so only where it was asked for
            candidates.append(native)
        failures = [] if candidates else [f"there is no packed attention kernel for {compute_dtype} on {device.type}"]
        for attention in candidates:
            failure = _failure_of(model, packed=True, attention=attention, dtype=compute_dtype, mask=False)
            if failure is None:
                use_attention(model, attention)
                return Layout(
                    packed=True, mask_padding=False, attention=attention, reason=f"packed rows, {attention} attention"
                )
            failures.append(f"{attention}: {failure}")
        use_attention(model, native)
        why_not = "; ".join(failures)
        if packing == "on":
            raise BaseModelError(
                f"training.packing = on, but packed examples influence each other in this base ({why_not}).",
                "Set training.packing to auto: rows are then padded, with the same gradient.",
            )
    # Older architectures bring their own attention and never call a registered one.
    takes_ours = getattr(type(model), "_supports_attention_backend", False)
    blocks = [(BLOCK_ATTENTION, False)] if device.type == "cpu" and takes_ours else []
    for attention, mask in (*blocks, (native, False), (native, True)):
        failure = _failure_of(model, packed=False, attention=attention, dtype=compute_dtype, mask=mask)
        if failure is None:
            use_attention(model, attention)
            return Layout(
                packed=False,
                mask_padding=mask,
                attention=attention,
                reason=f"rows padded by length buckets, because {why_not}",
            )
    raise BaseModelError(
        f"Neither packed nor padded rows give this base the logits of each row alone ({failure}).",
        "Set training.batch_size to 1 with micro_batch_tokens 8, or report the architecture.",
    )


def use_attention(model: PreTrainedModel, attention: str) -> None:
    own = {PACKED_ATTENTION: packed_attention, BLOCK_ATTENTION: block_attention}
    if attention in own:
        from transformers import AttentionInterface

        AttentionInterface.register(attention, own[attention])
    if model.config._attn_implementation != attention:
        model.set_attn_implementation(attention)  # type: ignore[operator]


@torch.no_grad()
def _failure_of(model: PreTrainedModel, *, packed: bool, attention: str, dtype: torch.dtype, mask: bool) -> str | None:
    """None when two rows laid out this way give the logits of each alone; else what differed.

    Half of the digits must agree (square root of the machine epsilon), or in 16 bit as many as in the model's own padded rows.  And replacing the first row must leave the second
    exactly as it was: the leak itself, free of the noise of another layout, however small it is in 16 bit.  Only where
    padded rows change too, because fused experts round by how many tokens they get, may packed rows change as much.
    """
    native = model.config._attn_implementation
    device = next(model.parameters()).device
    vocabulary = int(cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0])
    generator = torch.Generator().manual_seed(0)
    first, second, other = (torch.randint(vocabulary, (n,), generator=generator).to(device) for n in (37, 29, 37))
    was_training = model.training
    model.eval()
    try:
        alone = [_logits(model, row[None], dtype)[0] for row in (first, second)]
        native_rows = [_laid_out(model, [row, second], packed=False, mask=True, dtype=dtype) for row in (first, other)]
        padded = [rows[1] for rows in native_rows]
        use_attention(model, attention)
        together = _laid_out(model, [first, second], packed=packed, mask=mask, dtype=dtype)
        swapped = _laid_out(model, [other, second], packed=packed, mask=mask, dtype=dtype)
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    finally:
        use_attention(model, native)
        model.train(was_training)
    limits = [math.sqrt(torch.finfo(dtype).eps)] * 2
    if dtype in (torch.bfloat16, torch.float16):
        # Rounding adds up over the layers: in a deep base the model's own padded rows differ by more than half the digits.
        noise = [_difference(found, expected) for found, expected in zip(native_rows[0], alone, strict=True)]
        limits = [max(limit, 2 * one) for limit, one in zip(limits, noise, strict=True)]
    for name, found, expected, limit in (
        ("row 1", together[0], alone[0], limits[0]),
        ("row 2", together[1], alone[1], limits[1]),
        ("row 2 after row 1 changed", swapped[1], together[1], 2 * _difference(padded[1], padded[0])),
    ):
        difference = _difference(found, expected)
        if not difference <= limit:
            return f"logits of {name} differ by {difference:.1e}, allowed {limit:.1e}"
    return None


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def _laid_out(
    model: PreTrainedModel, rows: list[Tensor], *, packed: bool, mask: bool, dtype: torch.dtype
) -> list[Tensor]:
    lengths = [len(row) for row in rows]
    if packed:
        borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=rows[0].device)
        positions = torch.cat([torch.arange(n, device=rows[0].device) for n in lengths])[None]
        logits = _logits(
            model,
            torch.cat(rows)[None],
            dtype,
            position_ids=positions,
            **packed_arguments(model, borders, max(lengths)),
        )
        return list(logits[0].split(lengths))
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
    extra: dict[str, Any] = {}
    if mask:
        extra["attention_mask"] = torch.nn.utils.rnn.pad_sequence(
            [torch.ones_like(row) for row in rows], batch_first=True
        )
    logits = _logits(model, padded, dtype, **extra)
    return [logits[i, :n] for i, n in enumerate(lengths)]


def packed_arguments(model: PreTrainedModel, borders: Tensor, longest: int) -> dict[str, Any]:
    """What packed attention needs beside position_ids; other implementations find the borders in position_ids."""
    if model.config._attn_implementation != PACKED_ATTENTION:
        return {}
    return {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": longest, "max_length_k": longest}


def _logits(model: nn.Module, ids: Tensor, dtype: torch.dtype, **arguments: Any) -> Tensor:
    # The dtype of the work: the weights' own, or what autocast makes of it.
    with torch.autocast(ids.device.type, dtype=dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
        out = model(input_ids=ids, use_cache=False, **arguments)
    logits: Tensor = out.logits
    return logits.double() if dtype == torch.float64 else logits.float()
