"""Layers that share an input as one frozen weight: what the fused blocks multiply by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from onlay.kernels.frozen import Fp8, Fp8FromNf4, Frozen, Rebuilt, Stored
from onlay.model.quantize import QuantizedLinear


def joined(
    layers: Sequence[nn.Linear], *, dtype: torch.dtype, keep_transposed: bool = False, bias: bool = True
) -> Frozen:
    """One Frozen over the concatenated outputs of `layers`: frozen, of one kind of storage, one device and one input size.

    dtype: of the work, and of plain weights.  `keep_transposed`: see `onlay.kernels.frozen.Fp8`.  Without `bias` the layers'
    biases are left out (for a caller that trains them); a layer that has none counts as one with zeros.
    Weights are joined without a second copy: a new tensor holds all of them and each layer's weight becomes a view of its
    rows, so checksums, merging and PEFT see what they saw.  Layers that were joined before are found so and not copied
    again.  It is to be done once the model is where it stays: moving or casting the model gives its layers memory of their
    own again, and what was made here goes on holding the old one.  In float64 nothing is multiplied in FP8.
    Raises ValueError where the layers cannot be joined.
    """
    first = layers[0]
    kinds = {_kind(layer) for layer in layers}
    if len(kinds) != 1 or len({(layer.in_features, layer.weight.device) for layer in layers}) != 1:
        raise ValueError(f"layers of different kinds cannot be joined: {', '.join(sorted(kinds))}")
    biases = _biases(layers) if bias else None
    if not isinstance(first, QuantizedLinear):
        if first.weight.dtype != dtype:
            raise ValueError(f"weights in {first.weight.dtype} for work in {dtype}")
        return Stored(_as_one([layer.weight for layer in layers]), biases)
    packed = [layer for layer in layers if isinstance(layer, QuantizedLinear)]
    if first.fp8_products and dtype != torch.float64:
        if first.storage == "nf4":
            return Fp8FromNf4(tuple(layer.packed for layer in packed), biases, dtype=dtype)
        numbers, scales = _join_fp8(packed)
        return Fp8(numbers, scales, biases, dtype=dtype, keep_transposed=keep_transposed)
    rows = sum(layer.out_features for layer in packed)

    def rebuild(dtype: torch.dtype) -> Tensor:
        out = torch.empty(rows, first.in_features, dtype=dtype, device=first.weight.device)
        for layer, part in zip(packed, out.split([layer.out_features for layer in packed]), strict=True):
            layer.dequantize_into(part)
        return out

    return Rebuilt(rebuild, biases, dtype, rows=rows, columns=first.in_features)


def _kind(layer: nn.Linear) -> str:
    if isinstance(layer, QuantizedLinear):
        return f"{layer.storage}{', products in FP8' if layer.fp8_products else ''}"
    return str(layer.weight.dtype)


def _biases(layers: Sequence[nn.Linear]) -> Tensor | None:
    """(sum O,), None if none of the layers has one."""
    if all(layer.bias is None for layer in layers):
        return None
    if len(layers) == 1:
        return layers[0].bias.detach()
    like = next(layer.bias for layer in layers if layer.bias is not None)
    return torch.cat(
        [like.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach() for layer in layers]
    )


def _join_fp8(layers: Sequence[QuantizedLinear]) -> tuple[Tensor, Tensor]:
    """Numbers (sum O, I) and scales (sum O,)."""
    weight = _as_one([layer.weight for layer in layers])
    scales = _as_one([layer.scales for layer in layers])
    return weight.view(torch.float8_e4m3fn), scales


def _as_one(parts: Sequence[Tensor]) -> Tensor:
    """The parts, contiguous, one below the other in one tensor, of which each becomes a view; as they are if they lie so."""
    first = parts[0].detach()
    if len(parts) == 1:
        return first
    place = first.storage_offset()
    together = first.is_contiguous()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        together = together and same and part.is_contiguous() and part.storage_offset() == place
        place += part.numel()
    sizes = [len(part) for part in parts]
    if together:
        return first.as_strided((sum(sizes), *first.shape[1:]), first.stride())
    whole = torch.cat([part.detach() for part in parts])
    for part, rows in zip(parts, whole.split(sizes), strict=True):
        part.data = rows
    return whole
