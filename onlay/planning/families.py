"""What a family's modules are, from the numbers of its config.json alone: closed forms, no torch, no weights.

Only families whose rule was held against the real model on torch's meta device are here (tests/planning), with the same
defaults as transformers has for a field that config.json leaves out.  A config that a rule does not cover, such as one
that lacks a number or switches on a variant, has no outline: it is then built on the meta device instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from onlay.errors import BaseModelError


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    """The linear layers of one name and one shape in a base, usually one in each layer.  y (..., O) = x (..., I) W' + b."""

    name: str
    """What follows the number of the layer: self_attn.q_proj."""
    names: tuple[str, ...]
    """Each one's full name, as in the model (or, read from files, in those): model.layers.0.self_attn.q_proj."""
    inputs: int
    outputs: int
    bias: bool = False
    experts: int | None = None
    """Number of experts E whose matrices are one weight of three dimensions; None: a layer of its own."""

    @property
    def count(self) -> int:
        """How many modules of this name the whole base has."""
        return len(self.names)

    @property
    def is_expert(self) -> bool:
        return self.experts is not None

    @property
    def matrices(self) -> int:
        """Matrices O x I of one module."""
        return 1 if self.experts is None else self.experts

    @property
    def num_parameters(self) -> int:
        """Weights of all of them, without biases."""
        return self.count * self.matrices * self.inputs * self.outputs


@dataclass(frozen=True, kw_only=True, slots=True)
class Outline:
    """What a rule gives: sizes of the attention, linear layers, and how many parameters everything else has."""

    hidden_size: int
    num_heads: int
    num_key_heads: int
    head_width: int
    linears: tuple[Linear, ...]
    num_layers: int
    vocabulary_size: int
    tied_head: bool
    embedding_parameters: int
    """Of tokens and of positions."""
    other_parameters: int
    """Weights of norms and routers."""
    norm_biases: int = 0
    head_biases: int = 0


class NotCoveredError(Exception):
    """A config that a rule does not cover; says which field."""


class Fields:
    """The numbers of a config.json, by name or by the older names that transformers still reads; null means left out."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    def get(self, *keys: str) -> Any:
        return next((self.config[key] for key in keys if self.config.get(key) is not None), None)

    def size(self, *keys: str, default: int | None = None) -> int:
        """A positive whole number.  Raises NotCoveredError where it is left out without a default, BaseModelError otherwise."""
        value = self.get(*keys)
        value = default if value is None else value
        if value is None:
            raise NotCoveredError(keys[0])
        if type(value) is not int or value < 1:
            raise BaseModelError(
                f"config.json: {keys[0]} = {value!r} is not a positive whole number.",
                "Download the base's config again.",
            )
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        value = default if value is None else value
        if type(value) is not bool:
            raise BaseModelError(
                f"config.json: {key} = {value!r} is neither true nor false.", "Download the base's config again."
            )
        return value

    def must_be_off(self, *keys: str) -> None:
        """Variants that a rule does not cover."""
        for key in keys:
            if self.get(key):
                raise NotCoveredError(key)


def outline(model_type: str, config: Mapping[str, Any]) -> Outline | None:
    """The outline of a base by its family's rule; None: the family has no rule, or this config is not covered by it.

    Raises BaseModelError for a field that is not of the kind that its name asks for.
    """
    try:
        if model_type in _styles():
            return _llama_like(Fields(config), _styles()[model_type])
        if model_type in _RULES:
            return _RULES[model_type](Fields(config))
    except NotCoveredError:
        return None
    return None


def _linear(stem: str, layers: int, name: str, inputs: int, outputs: int, *, bias: bool = False, experts: int | None = None) -> Linear:  # fmt: skip
    names = tuple(f"{stem}.{number}.{name}" for number in range(layers))
    return Linear(name=name, names=names, inputs=inputs, outputs=outputs, bias=bias, experts=experts)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Style:
    """In what the families that are built as Llama is differ from it.  A bias given as text is that field of the config."""

    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    tied: bool = False
    head_width: int | None = None
    """Where config.json has no head_dim; None: hidden_size / heads."""
    key_heads_required: bool = True
    """False: left out, there are as many as heads."""
    norms: int = 2
    """Norms as wide as the hidden size in each layer."""
    norm_bias: bool = False
    head_bias: bool = False
    normed: str = ""
    """Queries and keys: "" not normed, "head" with weights for one head, "whole" with weights for all heads."""
    mlp: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    """Names of the feed-forward layers; the last one leads back to the hidden size."""
    fused: bool = False
    """q, k and v in one layer, gate and up in one."""
    output: str = "self_attn.o_proj"
    expert_width: str | None = None
    """Field that holds the width of an expert; None: no experts."""
    without: tuple[str, ...] = ()
    """Fields of variants that are not covered."""


@cache
def _styles() -> dict[str, _Style]:
    llama = _Style(
        qkv_bias="attention_bias", output_bias="attention_bias", mlp_bias="mlp_bias", key_heads_required=False
    )
    return {
        "llama": llama,
        "granite": llama,
        "smollm3": _Style(qkv_bias="attention_bias", output_bias="attention_bias", mlp_bias="mlp_bias", tied=True),
        "mistral": _Style(),
        "mixtral": _Style(expert_width="intermediate_size"),
        "qwen2": _Style(qkv_bias=True),
        "qwen3": _Style(qkv_bias="attention_bias", output_bias="attention_bias", head_width=128, normed="head"),
        "qwen3_moe": _Style(
            qkv_bias="attention_bias", output_bias="attention_bias", normed="head",
            expert_width="moe_intermediate_size", without=("mlp_only_layers",),
        ),
        "gemma": _Style(qkv_bias="attention_bias", output_bias="attention_bias", head_width=256, tied=True),
        "gemma2": _Style(qkv_bias="attention_bias", output_bias="attention_bias", head_width=256, tied=True, norms=4),
        "gemma3_text": _Style(qkv_bias="attention_bias", output_bias="attention_bias", head_width=256, tied=True, norms=4, normed="head"),
        "olmo2": _Style(qkv_bias="attention_bias", output_bias="attention_bias", key_heads_required=False, normed="whole"),
        "stablelm": _Style(qkv_bias="use_qkv_bias", norm_bias=True, without=("qk_layernorm", "use_parallel_residual")),
        "phi": _Style(
            qkv_bias=True, output_bias=True, mlp_bias=True, key_heads_required=False, norms=1, norm_bias=True,
            head_bias=True, mlp=("mlp.fc1", "mlp.fc2"), output="self_attn.dense", without=("qk_layernorm",),
        ),
        "phi3": _Style(key_heads_required=False, fused=True, mlp=("mlp.gate_up_proj", "mlp.down_proj")),
        "starcoder2": _Style(
            qkv_bias="use_bias", output_bias="use_bias", mlp_bias="use_bias", tied=True, norm_bias=True,
            mlp=("mlp.c_fc", "mlp.c_proj"),
        ),
    }  # fmt: skip


_ON_UNLESS_SAID = ("use_bias",)
"""Biases that a config which leaves the field out has."""


def _llama_like(fields: Fields, style: _Style) -> Outline:
    fields.must_be_off(*style.without)
    layers, hidden = fields.size("num_hidden_layers"), fields.size("hidden_size")
    heads, vocabulary = fields.size("num_attention_heads"), fields.size("vocab_size")
    said = not style.key_heads_required or "num_key_value_heads" in fields.config
    key_heads = fields.size("num_key_value_heads", default=heads if said else None)
    width = fields.size("head_dim", default=style.head_width or hidden // heads)
    queries, keys = heads * width, key_heads * width
    attention_bias = _is_on(fields, style.qkv_bias)
    stem = "model.layers"
    linears = []
    if style.fused:
        linears.append(_linear(stem, layers, "self_attn.qkv_proj", hidden, queries + 2 * keys, bias=attention_bias))
    else:
        for name, outputs in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            linears.append(_linear(stem, layers, f"self_attn.{name}", hidden, outputs, bias=attention_bias))
    linears.append(_linear(stem, layers, style.output, queries, hidden, bias=_is_on(fields, style.output_bias)))
    routers = 0
    if style.expert_width is not None:
        if fields.size("decoder_sparse_step", default=1) != 1:
            raise NotCoveredError("decoder_sparse_step")
        experts, inner = fields.size("num_local_experts", "num_experts"), fields.size(style.expert_width)
        linears.append(_linear(stem, layers, "mlp.experts.gate_up_proj", hidden, 2 * inner, experts=experts))
        linears.append(_linear(stem, layers, "mlp.experts.down_proj", inner, hidden, experts=experts))
        routers = layers * experts * hidden
    else:
        inner, bias = fields.size("intermediate_size"), _is_on(fields, style.mlp_bias)
        *inward, outward = style.mlp
        wide = 2 * inner if style.fused else inner
        linears += [_linear(stem, layers, name, hidden, wide, bias=bias) for name in inward]
        linears.append(_linear(stem, layers, outward, inner, hidden, bias=bias))
    head_norms = {"": 0, "head": 2 * width, "whole": queries + keys}[style.normed]
    norms = (layers * style.norms + 1) * hidden
    return Outline(
        hidden_size=hidden, num_heads=heads, num_key_heads=key_heads, head_width=width, linears=tuple(linears),
        num_layers=layers, vocabulary_size=vocabulary, tied_head=fields.flag("tie_word_embeddings", style.tied),
        embedding_parameters=vocabulary * hidden, other_parameters=norms + layers * head_norms + routers,
        norm_biases=norms * style.norm_bias, head_biases=vocabulary * style.head_bias,
    )  # fmt: skip


def _is_on(fields: Fields, bias: bool | str) -> bool:
    return fields.flag(bias, bias in _ON_UNLESS_SAID) if isinstance(bias, str) else bias


def _gpt_like(
    fields: Fields, stem: str, linears: Sequence[tuple[str, int, int, bool]], *,
    layers: int, hidden: int, heads: int, key_heads: int | None = None, norms: int = 2, extra_norms: int = 1,
    norm_bias: bool = True, positions: int = 0, tied: bool = True, head_bias: bool = False,
) -> Outline:  # fmt: skip
    """linears: name, inputs, outputs, has a bias; norms are LayerNorms in each layer, extra_norms those outside."""
    vocabulary = fields.size("vocab_size")
    norm_weights = (layers * norms + extra_norms) * hidden
    return Outline(
        hidden_size=hidden, num_heads=heads, num_key_heads=key_heads or heads, head_width=hidden // heads,
        linears=tuple(_linear(stem, layers, name, i, o, bias=bias) for name, i, o, bias in linears),
        num_layers=layers, vocabulary_size=vocabulary, tied_head=fields.flag("tie_word_embeddings", tied),
        embedding_parameters=(vocabulary + positions) * hidden, other_parameters=norm_weights,
        norm_biases=norm_weights * norm_bias, head_biases=vocabulary * head_bias,
    )  # fmt: skip


def _gpt2(fields: Fields, *, key_width: int | None = None) -> Outline:
    fields.must_be_off("add_cross_attention")
    layers, hidden = fields.size("n_layer", "num_hidden_layers"), fields.size("n_embd", "hidden_size")
    heads, inner = fields.size("n_head", "num_attention_heads"), fields.size("n_inner", default=4 * hidden)
    keys = key_width or hidden
    linears = [
        ("attn.c_attn", hidden, hidden + 2 * keys, True),
        ("attn.c_proj", hidden, hidden, True),
        ("mlp.c_fc", hidden, inner, True),
        ("mlp.c_proj", inner, hidden, True),
    ]
    return _gpt_like(
        fields, "transformer.h", linears, layers=layers, hidden=hidden, heads=heads,
        key_heads=keys * heads // hidden, positions=fields.size("n_positions", "max_position_embeddings"),
    )  # fmt: skip


def _gpt_bigcode(fields: Fields) -> Outline:
    heads, hidden = fields.size("n_head", "num_attention_heads"), fields.size("n_embd", "hidden_size")
    return _gpt2(fields, key_width=hidden // heads if fields.flag("multi_query", True) else hidden)


def _gpt_neo(fields: Fields) -> Outline:
    layers, hidden = fields.size("num_layers", "num_hidden_layers"), fields.size("hidden_size")
    inner = fields.size("intermediate_size", default=4 * hidden)
    linears = [(f"attn.attention.{name}", hidden, hidden, False) for name in ("q_proj", "k_proj", "v_proj")]
    linears += [
        ("attn.attention.out_proj", hidden, hidden, True),
        ("mlp.c_fc", hidden, inner, True),
        ("mlp.c_proj", inner, hidden, True),
    ]
    return _gpt_like(
        fields, "transformer.h", linears, layers=layers, hidden=hidden,
        heads=fields.size("num_heads", "num_attention_heads"), positions=fields.size("max_position_embeddings"),
    )  # fmt: skip


def _gptj(fields: Fields, *, fused: bool = False) -> Outline:
    layers, hidden = fields.size("n_layer", "num_hidden_layers"), fields.size("n_embd", "hidden_size")
    inner = fields.size("n_inner", default=4 * hidden)
    separate = [(f"attn.{name}", hidden, hidden, False) for name in ("q_proj", "k_proj", "v_proj")]
    linears = [("attn.qkv_proj", hidden, 3 * hidden, False)] if fused else separate
    linears += [("attn.out_proj", hidden, hidden, False), ("mlp.fc_in", hidden, inner, True), ("mlp.fc_out", inner, hidden, True)]  # fmt: skip
    return _gpt_like(
        fields, "transformer.h", linears, layers=layers, hidden=hidden, norms=1, tied=False, head_bias=True,
        heads=fields.size("n_head", "num_attention_heads"),
    )  # fmt: skip


def _codegen(fields: Fields) -> Outline:
    return _gptj(fields, fused=True)


def _gpt_neox(fields: Fields) -> Outline:
    layers, hidden = fields.size("num_hidden_layers"), fields.size("hidden_size")
    inner, bias = fields.size("intermediate_size"), fields.flag("attention_bias", True)
    linears = [
        ("attention.query_key_value", hidden, 3 * hidden, bias),
        ("attention.dense", hidden, hidden, bias),
        ("mlp.dense_h_to_4h", hidden, inner, True),
        ("mlp.dense_4h_to_h", inner, hidden, True),
    ]
    heads = fields.size("num_attention_heads")
    return _gpt_like(fields, "gpt_neox.layers", linears, layers=layers, hidden=hidden, heads=heads, tied=False)


def _bloom(fields: Fields) -> Outline:
    layers, hidden = fields.size("n_layer", "num_hidden_layers"), fields.size("n_embed", "hidden_size")
    linears = [
        ("self_attention.query_key_value", hidden, 3 * hidden, True),
        ("self_attention.dense", hidden, hidden, True),
        ("mlp.dense_h_to_4h", hidden, 4 * hidden, True),
        ("mlp.dense_4h_to_h", 4 * hidden, hidden, True),
    ]
    heads = fields.size("n_head", "num_attention_heads")
    return _gpt_like(fields, "transformer.h", linears, layers=layers, hidden=hidden, heads=heads, extra_norms=2)


def _falcon(fields: Fields) -> Outline:
    layers, hidden = fields.size("num_hidden_layers", "n_layer"), fields.size("n_embed", "hidden_size")
    heads, bias = fields.size("num_attention_heads", "n_head"), fields.flag("bias", False)
    inner = fields.size("ffn_hidden_size", default=4 * hidden)
    grouped, parallel = fields.flag("new_decoder_architecture", False), fields.flag("parallel_attn", True)
    if grouped:
        key_heads, norms = fields.size("num_kv_heads", default=heads), fields.size("num_ln_in_parallel_attn", default=2)
    else:
        key_heads, norms = 1 if fields.flag("multi_query", True) else heads, 1 if parallel else 2
    linears = [
        ("self_attention.query_key_value", hidden, hidden + 2 * key_heads * (hidden // heads), bias),
        ("self_attention.dense", hidden, hidden, bias),
        ("mlp.dense_h_to_4h", hidden, inner, bias),
        ("mlp.dense_4h_to_h", inner, hidden, bias),
    ]
    return _gpt_like(
        fields, "transformer.h", linears, layers=layers, hidden=hidden, heads=heads, key_heads=key_heads, norms=norms
    )


def _opt(fields: Fields) -> Outline:
    fields.must_be_off("_remove_final_layer_norm")
    layers, hidden = fields.size("num_hidden_layers"), fields.size("hidden_size")
    inner, bias = fields.size("ffn_dim"), fields.flag("enable_bias", True)
    if fields.size("word_embed_proj_dim", default=hidden) != hidden:
        raise NotCoveredError("word_embed_proj_dim")
    if not fields.flag("layer_norm_elementwise_affine", True):
        raise NotCoveredError("layer_norm_elementwise_affine")
    linears = [(f"self_attn.{name}", hidden, hidden, bias) for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
    linears += [("fc1", hidden, inner, bias), ("fc2", inner, hidden, bias)]
    return _gpt_like(
        fields, "model.decoder.layers", linears, layers=layers, hidden=hidden,
        heads=fields.size("num_attention_heads"), extra_norms=int(fields.flag("do_layer_norm_before", True)),
        positions=fields.size("max_position_embeddings") + 2,
    )  # fmt: skip


def _mpt(fields: Fields) -> Outline:
    layers, hidden = fields.size("n_layers", "num_hidden_layers"), fields.size("d_model", "hidden_size")
    linears = [
        ("attn.Wqkv", hidden, 3 * hidden, False),
        ("attn.out_proj", hidden, hidden, False),
        ("ffn.up_proj", hidden, 4 * hidden, False),
        ("ffn.down_proj", 4 * hidden, hidden, False),
    ]
    heads = fields.size("n_heads", "num_attention_heads")
    return _gpt_like(fields, "transformer.blocks", linears, layers=layers, hidden=hidden, heads=heads, norm_bias=False)


_RULES: dict[str, Callable[[Fields], Outline]] = {
    "gpt2": _gpt2, "gpt_bigcode": _gpt_bigcode, "gpt_neo": _gpt_neo, "gptj": _gptj, "codegen": _codegen,
    "gpt_neox": _gpt_neox, "bloom": _bloom, "falcon": _falcon, "opt": _opt, "mpt": _mpt,
}  # fmt: skip


def ruled_families() -> tuple[str, ...]:
    """Values of model_type that have a rule here."""
    return (*_styles(), *_RULES)
