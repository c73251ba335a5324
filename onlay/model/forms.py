"""What the layers of a base are made of, told by their structure: which projections share an input, heads, norms, activation.

Nothing here knows a model by its name.  A form is a guess from names of children, shapes and a few tried functions; whether a layer
really computes it, is asked by running it (onlay/model/fuse.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from onlay.kernels.gated import Activation
from onlay.kernels.mlp_block import Norm
from onlay.model.norms import eps_of, offset_of

_SPLIT, _FUSED = ("q_proj", "k_proj", "v_proj"), ("qkv_proj",)
_OUT = ("o_proj", "dense", "out_proj")
_HEAD_NORMS = ("q_norm", "k_norm")
_ACTIVATIONS = ("act_fn", "activation_fn", "act")
BEFORE = ("input_layernorm", "post_attention_layernorm")
"""Norms of a layer that normalises what goes into its attention and into its MLP ..."""
AROUND = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
"""... and of one that also normalises what comes out."""


@dataclass(frozen=True, slots=True)
class MlpForm:
    inner: tuple[nn.Module, ...]
    """gate and up, or one layer that is both."""
    outer: nn.Module
    activation: Activation


@dataclass(frozen=True, slots=True)
class AttentionForm:
    inner: tuple[nn.Module, ...]
    """q, k and v, or one layer that is all three."""
    outer: nn.Module
    queries: int
    groups: int
    width: int
    q_norm: Norm | None
    k_norm: Norm | None


@dataclass(frozen=True, slots=True)
class LayerForm:
    attention: nn.Module
    mlp: nn.Module
    before_attention: Norm
    after_attention: nn.Module | None
    before_mlp: Norm
    after_mlp: nn.Module | None
    mlp_norm: nn.Module
    """The module of `before_mlp`, for an MLP of another form."""


def children_of(module: nn.Module) -> dict[str, nn.Module]:
    """Those that do something: not Identity, not a Dropout of nothing."""
    return {
        name: child
        for name, child in module.named_children()
        if not isinstance(child, nn.Identity) and not (isinstance(child, nn.Dropout) and child.p == 0.0)
    }


def mlp_form(module: nn.Module) -> MlpForm | None:
    children = children_of(module)
    activation = next((children.pop(name) for name in _ACTIVATIONS if name in children), None)
    if activation is None or set(children) not in (
        {"gate_proj", "up_proj", "down_proj"},
        {"gate_up_proj", "down_proj"},
    ):
        return None
    kind = _activation_of(activation)
    if kind is None:
        return None
    if set(children) == {"gate_proj", "up_proj", "down_proj"}:
        return MlpForm((children["gate_proj"], children["up_proj"]), children["down_proj"], kind)
    return MlpForm((children["gate_up_proj"],), children["down_proj"], kind)


def attention_form(module: Any, config: Any) -> AttentionForm | None:
    """config: the text config of the base, for how many heads there are."""
    children = children_of(module)
    out = next((name for name in _OUT if name in children), None)
    names = next((names for names in (_SPLIT, _FUSED) if set(names) <= set(children)), None)
    width = vars(module).get("head_dim")
    if out is None or names is None or not isinstance(width, int):
        return None
    named = [name for name in _HEAD_NORMS if name in children]
    norms = [norm_of(children.pop(name)) if name in named else None for name in _HEAD_NORMS]
    if len(named) != sum(norm is not None for norm in norms):
        return None
    if set(children) != {out, *names} or (norms[0] is None) != (norms[1] is None):
        return None
    if any(norm is not None and norm.weight.shape != (width,) for norm in norms):
        return None
    inner = tuple(children[name] for name in names)
    queries = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or queries
    if sum(layer.out_features for layer in inner) != (queries + 2 * groups) * width:  # type: ignore[misc]
        return None
    return AttentionForm(inner, children[out], queries, groups, width, norms[0], norms[1])


def layer_form(module: nn.Module) -> LayerForm | None:
    children = children_of(module)
    attention, mlp = children.pop("self_attn", None), children.pop("mlp", None)
    if attention is None or mlp is None or set(children) not in (set(BEFORE), set(AROUND)):
        return None
    around = len(children) == len(AROUND)
    mlp_norm = children["pre_feedforward_layernorm" if around else "post_attention_layernorm"]
    before_attention, before_mlp = norm_of(children["input_layernorm"]), norm_of(mlp_norm)
    if before_attention is None or before_mlp is None:
        return None
    return LayerForm(
        attention, mlp, before_attention, children["post_attention_layernorm"] if around else None,
        before_mlp, children["post_feedforward_layernorm"] if around else None, mlp_norm,
    )  # fmt: skip


def norm_of(module: Any) -> Norm | None:
    """A frozen RMSNorm of either kind."""
    offset, eps = offset_of(module), eps_of(module)
    if offset is None or eps is None or module.weight.requires_grad:
        return None
    return Norm(weight=module.weight, eps=eps, offset=offset)


def _activation_of(function: Any) -> Activation | None:
    if isinstance(function, nn.Module) and any(True for _ in (*function.parameters(), *function.buffers())):
        return None  # One that learns, or keeps numbers where the base is.
    x = torch.linspace(-4, 4, 33)
    known: dict[Activation, torch.Tensor] = {
        "silu": functional.silu(x), "gelu": functional.gelu(x), "gelu_tanh": functional.gelu(x, approximate="tanh"),
    }  # fmt: skip
    own = function(x)
    return next((name for name, values in known.items() if torch.allclose(own, values, rtol=1e-6, atol=1e-6)), None)
