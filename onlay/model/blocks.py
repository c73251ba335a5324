"""A base's modules as the fused blocks of onlay/kernels: which weights, which adapters, which arguments.

Each block here stands for one instance.  It is called with what transformers gives that instance, and steps aside (`serves` is
False) whenever it is asked for something else: a cache, a mask, an adapter that is off, another precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from onlay.kernels.attention_block import AttentionBlock, attention_block
from onlay.kernels.causal_attention import Examples
from onlay.kernels.lora_group import Group
from onlay.kernels.mlp_block import MlpBlock, Norm, mlp_block
from onlay.kernels.rotate import Heads
from onlay.model.forms import AttentionForm, MlpForm
from onlay.model.joined import joined
from onlay.model.quantize import QuantizedLinear


@dataclass(frozen=True, slots=True)
class Adapted:
    """A group of layers that share an input, with PEFT's layers around them, if any."""

    group: Group
    layers: tuple[Any, ...]

    @property
    def adapters(self) -> list[Any]:
        return [layer for layer in self.layers if hasattr(layer, "lora_A")]

    def is_plain(self) -> bool:
        """Whether every layer's one adapter is in use, and none is merged."""
        return all(
            not layer.disable_adapters
            and not layer.merged
            and len(layer.lora_A) == 1
            and set(layer.lora_A) <= set(layer.active_adapters)
            for layer in self.adapters
        )

    def parameters(self) -> list[Tensor]:
        """As the blocks take them."""
        names = [(layer, next(iter(layer.lora_A))) for layer in self.adapters]
        found = [layer.lora_A[name].weight for layer, name in names] + [
            layer.lora_B[name].weight for layer, name in names
        ]
        if self.group.trained_bias:
            bases = [base_of(layer) for layer in self.layers]
            like = next(base.bias for base in bases if base.bias is not None)
            zeros = [like.new_zeros(base.out_features) if base.bias is None else base.bias for base in bases]
            found.append(torch.cat(zeros) if len(zeros) > 1 else zeros[0])
        return found


def base_of(layer: Any) -> Any:
    return layer.base_layer if hasattr(layer, "lora_A") else layer


def why_not(layer: Any, dtype: torch.dtype) -> str | None:
    """Why this layer cannot be part of a group that works in `dtype`."""
    from peft.tuners.lora import Linear, LoraLayer

    base = base_of(layer)
    if type(base) not in (nn.Linear, QuantizedLinear):
        # Experts have a wrapper for each of their parameters, one inside the other.
        inmost = layer.get_base_layer() if isinstance(layer, LoraLayer) else base
        return f"adapters on {type(inmost).__name__}"
    if base.weight.requires_grad:
        return "a base layer that trains"
    if not isinstance(base, QuantizedLinear) and base.weight.dtype != dtype:
        return f"weights in {_name(base.weight.dtype)} for work in {_name(dtype)}"
    if not isinstance(layer, LoraLayer):
        return None
    adapted: Any = layer
    if type(adapted) is not Linear or adapted.fan_in_fan_out:
        return f"adapters on {type(base).__name__}"
    if len(adapted.lora_A) != 1:
        return "several adapters"
    [name] = adapted.lora_A
    if name in adapted.lora_variant:
        return "DoRA"
    if adapted.lora_bias[name]:
        return "a bias in the adapter"
    return None


def adapted_group(layers: Sequence[Any], *, dtype: torch.dtype, keep_transposed: bool) -> Adapted | str:
    """The layers as a group, or why they are none."""
    reason = next((reason for layer in layers if (reason := why_not(layer, dtype))), None)
    if reason is not None:
        return reason
    with_adapter = [layer for layer in layers if hasattr(layer, "lora_A")]
    dropouts = {_dropout(layer) for layer in with_adapter}
    if len(dropouts) > 1:
        return "adapters with different dropout share an input"
    bases = [base_of(layer) for layer in layers]
    trained_bias = any(base.bias is not None and base.bias.requires_grad for base in bases)
    try:
        frozen = joined(bases, dtype=dtype, keep_transposed=keep_transposed, bias=not trained_bias)
    except ValueError as error:
        return str(error)
    group = Group(
        frozen=frozen, sizes=tuple(base.out_features for base in bases),
        ranks=tuple(len(_first(layer).weight) if hasattr(layer, "lora_A") else 0 for layer in layers),
        scales=tuple(float(next(iter(layer.scaling.values()))) for layer in with_adapter),
        dropout=dropouts.pop() if dropouts else 0.0, trained_bias=trained_bias,
    )  # fmt: skip
    return Adapted(group, tuple(layers))


def _first(layer: Any) -> Any:
    return next(iter(layer.lora_A.values()))


def _dropout(layer: Any) -> float:
    [dropout] = layer.lora_dropout.values()
    return 0.0 if isinstance(dropout, nn.Identity) else float(dropout.p)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class FusedMlp:
    def __init__(self, inner: Adapted, outer: Adapted, block: MlpBlock) -> None:
        self._inner, self._outer, self.block = inner, outer, block

    @classmethod
    def of(
        cls, form: MlpForm, *, norm: Norm | None, residual: bool, dtype: torch.dtype, keep_transposed: bool
    ) -> FusedMlp | str:
        inner = adapted_group(form.inner, dtype=dtype, keep_transposed=keep_transposed)
        outer = adapted_group([form.outer], dtype=dtype, keep_transposed=keep_transposed)
        if isinstance(inner, str) or isinstance(outer, str):
            return inner if isinstance(inner, str) else str(outer)
        block = MlpBlock(norm=norm, inner=inner.group, outer=outer.group, activation=form.activation, residual=residual)
        return cls(inner, outer, block)

    def serves(self) -> bool:
        return self._inner.is_plain() and self._outer.is_plain()

    def __call__(self, x: Tensor, *, training: bool) -> Tensor:
        return mlp_block(x, _in_mode(self.block, training), [*self._inner.parameters(), *self._outer.parameters()])


class FusedAttention:
    def __init__(self, inner: Adapted, outer: Adapted, block: AttentionBlock) -> None:
        self._inner, self._outer, self.block = inner, outer, block

    @classmethod
    def of(
        cls, form: AttentionForm, *, norm: Norm | None, residual: bool, scale: float, window: int | None, dtype: torch.dtype,
        keep_transposed: bool,
    ) -> FusedAttention | str:  # fmt: skip
        inner = adapted_group(form.inner, dtype=dtype, keep_transposed=keep_transposed)
        outer = adapted_group([form.outer], dtype=dtype, keep_transposed=keep_transposed)
        if isinstance(inner, str) or isinstance(outer, str):
            return inner if isinstance(inner, str) else str(outer)
        q, k = form.q_norm, form.k_norm
        if q is not None and k is not None and (q.eps, q.offset) != (k.eps, k.offset):
            return "queries and keys are normalised differently"
        heads = Heads(
            queries=form.queries, groups=form.groups, width=form.width,
            q_norm=None if q is None else q.weight, k_norm=None if k is None else k.weight,
            eps=0.0 if q is None else q.eps, offset=0.0 if q is None else q.offset,
        )  # fmt: skip
        block = AttentionBlock(
            norm=norm, inner=inner.group, outer=outer.group, heads=heads, scale=scale, window=window, residual=residual
        )
        return cls(inner, outer, block)

    def serves(self) -> bool:
        return self._inner.is_plain() and self._outer.is_plain()

    def __call__(
        self, x: Tensor, position_embeddings: tuple[Tensor, Tensor], examples: Examples, *, training: bool
    ) -> Tensor:
        cos, sin = (_table(table, x) for table in position_embeddings)
        parameters = [*self._inner.parameters(), *self._outer.parameters()]
        return attention_block(x, cos, sin, _in_mode(self.block, training), parameters, examples=examples)


def _table(table: Tensor, x: Tensor) -> Tensor:
    """(T, W) of a rotary table (B or 1, S, W)."""
    return table.expand(len(x), -1, -1).reshape(-1, table.shape[-1])


def _in_mode(block: Any, training: bool) -> Any:
    """Without dropout where nothing is trained."""
    from dataclasses import replace

    if training or not (block.inner.dropout or block.outer.dropout):
        return block
    return replace(block, inner=replace(block.inner, dropout=0.0), outer=replace(block.outer, dropout=0.0))


def examples_of(x: Tensor, told: dict[str, Any]) -> Examples:
    """How the tokens of x (B, S, D) are divided: as packed attention is told, else each row is an example."""
    borders, longest = told.get("cu_seq_lens_q"), told.get("max_length_q")
    if borders is not None and longest is not None:
        equal = int(longest) * (len(borders) - 1) == x.shape[1]
        return Examples(borders=borders, longest=int(longest), equal=int(longest) if equal else None)
    rows, tokens = x.shape[:2]
    borders = torch.arange(0, (rows + 1) * tokens, max(1, tokens), dtype=torch.int32, device=x.device)[: rows + 1]
    return Examples(borders=borders, longest=tokens, equal=tokens)
