"""One decoder layer as memory and time see it: its widths, what its adapters add, and whether the fast path takes it."""

from __future__ import annotations

from dataclasses import dataclass

from onlay.errors import BaseModelError
from onlay.planning.families import Linear
from onlay.planning.parameters import AdapterSection, choose_linears
from onlay.planning.shapes import BaseShape
from onlay.recipe import LoraAdapter, PissaAdapter

FAST_FAMILIES = ("gemma", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")
"""Whose layers the fused blocks cover whole (onlay/model/fuse.py tries every base; these are known to pass)."""
NORMED_HEADS = ("gemma3_text", "qwen3")
"""Queries and keys are normalised by head."""
NORMS_AFTER = ("gemma3_text",)
"""Two more norms a layer, behind attention and MLP."""
WIDEST_HEAD = 256
FAST_CAPABILITY = (8, 0)
ORDINARY_METHODS = {"dora": "DoRA", "head": "a classification head", "full": "weights that train"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """Widths in elements.  Ranks are sums over the adapters that share an input; 0 where there is none."""

    count: int
    """Of such layers in the base."""
    hidden: int
    queries: int
    keys: int
    """Of keys, and of values."""
    heads: int
    key_heads: int
    inner: int
    """Width of gate, or of the one inner layer."""
    gated: bool
    normed_heads: bool
    norms_after: int
    rank_qkv: int
    rank_output: int
    rank_inner: int
    rank_down: int
    attention_weights: int
    """Of q, k, v and the output projection."""
    mlp_weights: int

    @property
    def weights(self) -> int:
        return self.attention_weights + self.mlp_weights

    @property
    def inner_weights(self) -> int:
        """Of gate and up, or of the one inner layer."""
        return self.hidden * self.inner * (2 if self.gated else 1)

    @property
    def ranks(self) -> int:
        return self.rank_qkv + self.rank_output + self.rank_inner + self.rank_down


def layer_of(shape: BaseShape, section: AdapterSection) -> Layer:
    """The layer of a base under an adapter.  Raises BaseModelError where a closed form does not know it."""
    if shape.num_heads is None or shape.num_key_heads is None or shape.head_width is None or shape.how == "meta device":
        raise _unknown(shape, "its attention is of no known form")
    if any(linear.is_expert for linear in shape.linears):
        raise _unknown(shape, "its tokens go to experts")
    queries, keys = shape.num_heads * shape.head_width, shape.num_key_heads * shape.head_width
    inside = [linear for linear in shape.linears if linear.count >= shape.num_layers]
    attention = [linear for linear in inside if _is_attention(linear)]
    mlp = [linear for linear in inside if not _is_attention(linear)]
    down = next(
        (linear for linear in mlp if linear.outputs == shape.hidden_size and linear.inputs != linear.outputs), None
    )
    if down is None or not attention:
        raise _unknown(shape, "its layers are not all alike")
    into = [linear for linear in mlp if linear is not down]
    ranks = _ranks(shape, section)
    return Layer(
        count=shape.num_layers, hidden=shape.hidden_size, queries=queries, keys=keys, heads=shape.num_heads,
        key_heads=shape.num_key_heads, inner=down.inputs, gated=sum(linear.outputs for linear in into) == 2 * down.inputs,
        normed_heads=shape.architecture in NORMED_HEADS, norms_after=2 if shape.architecture in NORMS_AFTER else 0,
        rank_qkv=sum(ranks.get(one.name, 0) for one in attention if one is not _output(attention)),
        rank_output=ranks.get(_output(attention).name, 0), rank_inner=sum(ranks.get(one.name, 0) for one in into),
        rank_down=ranks.get(down.name, 0), attention_weights=sum(one.num_parameters for one in attention) // shape.num_layers,
        mlp_weights=sum(one.num_parameters for one in mlp) // shape.num_layers,
    )  # fmt: skip


def why_ordinary(shape: BaseShape, section: AdapterSection, *, capability: tuple[int, int], compute: str) -> str | None:
    """Why a base with this adapter would not train on the fast path; None where it does."""
    if section.method in ORDINARY_METHODS:
        return ORDINARY_METHODS[section.method]
    if shape.architecture not in FAST_FAMILIES:
        return f"{shape.architecture} is not among the families whose layers are known to be covered"
    if compute == "fp32":
        return "compute fp32"
    if capability < FAST_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]}"
    if shape.head_width is not None and (shape.head_width > WIDEST_HEAD or shape.head_width % 8):
        return f"heads {shape.head_width} wide"
    return None


def _is_attention(linear: Linear) -> bool:
    return any(word in linear.name.lower().rpartition(".")[0] for word in ("attn", "attention"))


def _output(attention: list[Linear]) -> Linear:
    """The projection back: the last of them in every family with a rule."""
    return attention[-1]


def _ranks(shape: BaseShape, section: AdapterSection) -> dict[str, int]:
    if not isinstance(section, LoraAdapter):
        return {}
    rank = section.rank * (2 if isinstance(section, PissaAdapter) else 1)
    return {linear.name: rank for linear in choose_linears(shape, section.targets)}


def _unknown(shape: BaseShape, why: str) -> BaseModelError:
    return BaseModelError(
        f"Memory and time of {shape.name} ({shape.architecture}) have no closed form: {why}.",
        "Train a few steps and read the peak that the run tells: --set training.max_steps=5",
    )
