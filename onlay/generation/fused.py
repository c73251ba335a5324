"""Decoding steps with fewer kernels: layers, attentions and MLPs of the usual form, and RMSNorms, one token a row.

transformers' modules stay where they are and are asked for everything else (prompts, other forms, other devices); each
instance that is recognised gets a forward of its own, which is taken off on leaving.  What is recognised is tried before it is
believed: onlay/generation/prove.py compares the logits of a walk over slots with those of each row alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from onlay.generation.adapters import RowAdapters
from onlay.generation.slots import SlotCache, slot_attention
from onlay.kernels.decode import add_residual, fits, rotate_and_store, swiglu
from onlay.kernels.updates import HeadNorm, Update
from onlay.model.norms import eps_of, is_rms_norm

_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj"}
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_TOLD = {
    "self",
    "hidden_states",
    "position_embeddings",
    "attention_mask",
    "past_key_values",
    "cache_position",
    "kwargs",
}
"""What a usual attention's forward is told; one that asks for more computes more (from positions, for example)."""
_ODD = ("attn_logit_softcapping", "sinks", "attention_chunk_size", "clip_qkv", "qk_layernorm", "residual_multiplier")
"""Attributes of attentions and layers that do more than the usual."""


class FusedDecoding:
    """A context manager: while it is on, steps over a SlotCache run on the fused kernels where the model has the form."""

    def __init__(self, base: Any) -> None:
        """base: without PEFT's wrapper, its layers may be PEFT's."""
        config = base.config.get_text_config()
        plain = {id(m) for m in base.modules() if is_rms_norm(m)}
        self._attentions = [m for m in base.modules() if _is_attention(m, config, plain)]
        self._mlps = [m for m in base.modules() if _is_mlp(m)]
        heads = {id(norm) for m in self._attentions for norm in (_norm_of(m, "q_norm"), _norm_of(m, "k_norm"))}
        self._norms = [m for m in base.modules() if id(m) in plain - heads]
        whole = {id(m) for m in (*self._attentions, *self._mlps)}
        self._layers = [m for m in base.modules() if _is_layer(m, config, whole, plain)]
        self._replaced: list[nn.Module] = []
        self._adapters: RowAdapters | None = None

    @property
    def found(self) -> bool:
        return bool(self._attentions or self._mlps)

    @property
    def widths(self) -> list[int]:
        """Of the heads that are rotated by the kernel."""
        return sorted({int(m.head_dim) for m in self._attentions})

    @property
    def groups(self) -> list[tuple[nn.Module, ...]]:
        """Layers that share an input: what RowAdapters is told."""
        found: list[tuple[nn.Module, ...]] = [(m.q_proj, m.k_proj, m.v_proj) for m in self._attentions]
        return found + [(m.gate_proj, m.up_proj) for m in self._mlps]

    def use(self, adapters: RowAdapters | None) -> FusedDecoding:
        """The adapters of the rows; None: the layers' own forwards are asked."""
        self._adapters = adapters
        return self

    def __enter__(self) -> FusedDecoding:
        for modules, forward in (
            (self._layers, self._pass), (self._attentions, self._attend), (self._mlps, self._feed), (self._norms, _normalise),
        ):  # fmt: skip
            for module in modules:
                if "forward" in vars(module):
                    continue  # Another's; it is asked as it is.
                module.forward = partial(forward, module)
                self._replaced.append(module)
        return self

    def __exit__(self, *exception: object) -> None:
        for module in self._replaced:
            del module.forward
        self._replaced = []

    def _project(self, layers: Sequence[Any], x: Tensor) -> list[tuple[Tensor, Update | None]]:
        if self._adapters is None:
            return [(layer(x), None) for layer in layers]
        return self._adapters.project(layers, x)

    def _pass(
        self, module: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any,
        past_key_values: Any = None, position_embeddings: tuple[Tensor, Tensor] | None = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """A layer: x + attention(norm(x)), and x + mlp(norm(x)) of that."""
        if args or not _is_step(hidden_states, past_key_values) or position_embeddings is None:
            own: Tensor = type(module).forward(
                module, hidden_states, attention_mask, *args, past_key_values=past_key_values,
                position_embeddings=position_embeddings, **kwargs,
            )  # fmt: skip
            return own
        x = hidden_states[:, 0]
        found = self._found(
            module.self_attn, module.input_layernorm(x), position_embeddings, attention_mask, past_key_values
        )
        [(y, update)] = self._project((module.self_attn.o_proj,), found)
        x = add_residual(x, y, update=update)
        [(y, update)] = self._project(
            (module.mlp.down_proj,), self._fed(module.mlp, module.post_attention_layernorm(x))
        )
        return add_residual(x, y, update=update)[:, None]

    def _attend(
        self,
        module: Any,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if not _is_step(hidden_states, past_key_values) or position_embeddings is None:
            own: tuple[Tensor, None] = type(module).forward(
                module, hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask,
                past_key_values=past_key_values, **kwargs,
            )  # fmt: skip
            return own
        found = self._found(module, hidden_states[:, 0], position_embeddings, attention_mask, past_key_values)
        projected: Tensor = module.o_proj(found[:, None])
        return projected, None

    def _feed(self, module: Any, x: Tensor) -> Tensor:
        if x.dim() != 3 or x.shape[1] != 1:
            own: Tensor = type(module).forward(module, x)
            return own
        out: Tensor = module.down_proj(self._fed(module, x[:, 0])[:, None])
        return out

    def _found(
        self, module: Any, x: Tensor, position_embeddings: tuple[Tensor, Tensor], mask: Tensor | None, cache: SlotCache
    ) -> Tensor:
        """What an attention finds, before its output projection: x (N, D) -> (N, heads * width)."""
        cos, sin = (table.expand(len(x), -1, -1)[:, 0] for table in position_embeddings)
        (q, q_more), (k, k_more), (v, v_more) = self._project((module.q_proj, module.k_proj, module.v_proj), x)
        keys, values = cache.keys[module.layer_idx], cache.values[module.layer_idx]
        queries = rotate_and_store(
            q, k, v, cos=cos, sin=sin, keys=keys, values=values, column=cache.column, updates=(q_more, k_more, v_more),
            norms=_head_norms(module),
        )  # fmt: skip
        keys, values = keys[:, :, : cache.end], values[:, :, : cache.end]
        out, _ = slot_attention(module, queries[:, :, None], keys, values, mask, scaling=module.scaling)
        return out.flatten(1)

    def _fed(self, module: Any, x: Tensor) -> Tensor:
        """The product inside an MLP: x (N, D) -> (N, I)."""
        (gate, gate_more), (up, up_more) = self._project((module.gate_proj, module.up_proj), x)
        return swiglu(gate, up, updates=(gate_more, up_more))


def _is_step(hidden_states: Tensor, cache: Any) -> bool:
    return hidden_states.dim() == 3 and hidden_states.shape[1] == 1 and isinstance(cache, SlotCache)


def _is_layer(module: Any, config: Any, whole: set[int], plain: set[int]) -> bool:
    """Whether it is the usual pre-norm layer around an attention and an MLP that were recognised."""
    children = dict(module.named_children())
    if set(children) != _LAYER or not {id(children["self_attn"]), id(children["mlp"])} <= whole:
        return False
    if _is_odd(module, config):
        return False
    return {id(children[name]) for name in ("input_layernorm", "post_attention_layernorm")} <= plain


def _is_attention(module: Any, config: Any, plain: set[int]) -> bool:
    """`plain`: ids of the RMSNorms of the usual form."""
    children = dict(module.named_children())
    names = set(children)
    if not names >= _ATTENTION or names - _ATTENTION - _HEAD_NORMS or names & _HEAD_NORMS not in (set(), _HEAD_NORMS):
        return False
    if set(inspect.signature(type(module).forward).parameters) - _TOLD or not getattr(module, "is_causal", False):
        return False
    width = getattr(module, "head_dim", None)
    if width is None or not fits(width) or not hasattr(module, "scaling") or not hasattr(module, "layer_idx"):
        return False
    rope: Any = getattr(config, "rope_parameters", None) or {}
    if _is_odd(module, config) or (rope.get("partial_rotary_factor") or 1.0) != 1.0:
        return False
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    outputs = [module.q_proj.out_features, module.k_proj.out_features, module.v_proj.out_features]
    if outputs != [heads * width, groups * width, groups * width]:
        return False
    norms = [children[name] for name in names & _HEAD_NORMS]
    return all(id(norm) in plain and tuple(norm.weight.shape) == (width,) for norm in norms)


def _is_odd(module: Any, config: Any) -> bool:
    return any(getattr(owner, name, None) is not None for owner in (module, config) for name in _ODD)


def _is_mlp(module: Any) -> bool:
    names = {name for name, _ in module.named_children()}
    return _MLP <= names <= _MLP | {"act_fn"} and _is_silu(getattr(module, "act_fn", None))


def _is_silu(function: Any) -> bool:
    if function is None:
        return False
    x = torch.linspace(-4, 4, 33)
    return bool(torch.allclose(function(x), functional.silu(x)))


def _norm_of(module: Any, name: str) -> Any:
    return dict(module.named_children()).get(name)


def _normalise(module: Any, hidden_states: Tensor) -> Tensor:
    eps = eps_of(module)
    assert eps is not None
    if module.weight.dtype != hidden_states.dtype:
        own: Tensor = type(module).forward(module, hidden_states)
        return own
    return functional.rms_norm(hidden_states, (hidden_states.shape[-1],), module.weight, eps)


def _head_norms(module: Any) -> tuple[HeadNorm, HeadNorm] | None:
    norms = [_norm_of(module, name) for name in ("q_norm", "k_norm")]
    if norms[0] is None:
        return None
    q, k = (HeadNorm(weight=norm.weight, eps=eps_of(norm) or 0.0) for norm in norms)
    return q, k
