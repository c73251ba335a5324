"""What is recognised as a form, and what is not: told by children, shapes and tried functions, never by names of models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from onlay.model.forms import attention_form, children_of, layer_form, mlp_form
from tests.builders import tiny_model
from tests.model.fused import another_base


def layer_of(name: str) -> tuple[Any, Any]:
    """The first layer of a base, and its config."""
    model = another_base(name, torch.float32)
    return model.get_decoder().layers[0], model.config


class Gated(nn.Module):
    def __init__(self, act: nn.Module, *, joined: bool = False) -> None:
        super().__init__()
        if joined:
            self.gate_up_proj = nn.Linear(4, 12)
        else:
            self.gate_proj, self.up_proj = nn.Linear(4, 6), nn.Linear(4, 6)
        self.down_proj = nn.Linear(6, 4)
        self.act_fn = act


def function(call: Any) -> nn.Module:
    class Function(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return call(x)

    return Function()


ACTIVATIONS: dict[str, tuple[nn.Module, str | None]] = {
    "silu": (nn.SiLU(), "silu"),
    "silu written out": (function(lambda x: x / (1 + (-x).exp())), "silu"),
    "gelu": (nn.GELU(), "gelu"),
    "gelu_tanh": (nn.GELU(approximate="tanh"), "gelu_tanh"),
    "relu": (nn.ReLU(), None),
    "quick gelu": (function(lambda x: x * torch.sigmoid(1.702 * x)), None),
    "nearly silu": (function(lambda x: functional.silu(x) + 1e-4), None),
}


@pytest.mark.parametrize(("act", "kind"), ACTIVATIONS.values(), ids=ACTIVATIONS.keys())
def test_an_activation_is_what_it_computes(act: nn.Module, kind: str | None) -> None:
    form = mlp_form(Gated(act))
    assert (form.activation if form is not None else None) == kind


def test_the_projections_of_an_mlp_may_be_apart_or_one() -> None:
    apart, one = Gated(nn.SiLU()), Gated(nn.SiLU(), joined=True)
    found, joined = mlp_form(apart), mlp_form(one)
    assert found is not None and joined is not None
    assert (found.inner, found.outer) == ((apart.gate_proj, apart.up_proj), apart.down_proj)
    assert (joined.inner, joined.outer) == ((one.gate_up_proj,), one.down_proj)


def test_what_else_an_mlp_holds_makes_it_another() -> None:
    mlp = Gated(nn.SiLU())
    mlp.idle, mlp.drop = nn.Identity(), nn.Dropout(0.0)
    assert mlp_form(mlp) is not None, "these do nothing"
    mlp.drop = nn.Dropout(0.1)
    assert mlp_form(mlp) is None
    mlp.drop, mlp.norm = nn.Dropout(0.0), nn.LayerNorm(6)
    assert mlp_form(mlp) is None
    del mlp.norm, mlp.gate_proj
    assert mlp_form(mlp) is None
    assert mlp_form(nn.Linear(4, 4)) is None


def test_children_that_do_nothing_are_none() -> None:
    module = nn.Sequential(nn.Identity(), nn.Dropout(0.0), nn.Dropout(0.5), nn.Linear(2, 2))
    assert list(children_of(module)) == ["2", "3"]


@pytest.mark.parametrize(("name", "inner", "norms"), [
    ("llama", 3, False), ("phi3", 1, False), ("qwen3", 3, True), ("gemma3", 3, True), ("gemma2", 3, False), ("qwen2", 3, False),
    ("mixtral", 3, False), ("opt", 3, False),
])  # fmt: skip
def test_attentions(name: str, inner: int, norms: bool) -> None:
    layer, config = layer_of(name)
    form = attention_form(layer.self_attn, config)
    assert form is not None
    assert (form.queries, form.width, len(form.inner)) == (4, 8, inner)
    assert form.groups == (4 if name == "opt" else 2)
    assert (form.q_norm is not None, form.k_norm is not None) == (norms, norms)
    if form.q_norm is not None:
        assert form.q_norm.weight is layer.self_attn.q_norm.weight
        assert form.q_norm.offset == (1.0 if name == "gemma3" else 0.0)
    assert form.outer in layer.self_attn.children()


def test_attentions_of_other_shapes_are_none() -> None:
    layer, config = layer_of("qwen3")
    attention = layer.self_attn
    config.num_attention_heads = 8
    assert attention_form(attention, config) is None, "heads that its projections do not have"
    config.num_attention_heads = 4
    attention.k_norm.weight.requires_grad_(True)
    assert attention_form(attention, config) is None, "a norm that trains, of one of two"
    attention.k_norm.weight.requires_grad_(False)
    assert attention_form(attention, config) is not None
    wide = type(attention.q_norm)(32)
    wide.requires_grad_(False)
    own, attention.q_norm = attention.q_norm, wide
    assert attention_form(attention, config) is None, "normalised over all heads together"
    attention.q_norm, attention.gate_proj = own, nn.Linear(32, 32)
    assert attention_form(attention, config) is None, "one projection more"


def test_layers_before_and_around() -> None:
    llama, _ = layer_of("llama")
    form = layer_form(llama)
    assert form is not None
    assert (form.attention, form.mlp, form.mlp_norm) == (llama.self_attn, llama.mlp, llama.post_attention_layernorm)
    assert form.before_attention.weight is llama.input_layernorm.weight
    assert form.after_attention is form.after_mlp is None
    gemma, _ = layer_of("gemma3")
    form = layer_form(gemma)
    assert form is not None
    assert form.before_mlp.weight is gemma.pre_feedforward_layernorm.weight
    assert form.before_mlp.offset == 1.0
    assert form.after_attention is gemma.post_attention_layernorm
    assert form.after_mlp is gemma.post_feedforward_layernorm


def test_layers_of_another_form_are_none() -> None:
    llama, _ = layer_of("llama")
    llama.extra = nn.Linear(2, 2)
    assert layer_form(llama) is None
    del llama.extra
    llama.input_layernorm.weight.requires_grad_(True)
    assert layer_form(llama) is None, "a norm that trains"
    phi3, _ = layer_of("phi3")
    assert layer_form(phi3) is not None
    phi3.resid_attn_dropout = nn.Dropout(0.1)
    assert layer_form(phi3) is None
    for name in ("opt", "falcon_h1"):
        assert all(layer_form(module) is None for module in tiny_model(name).modules())
