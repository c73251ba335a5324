"""Peak device memory of one optimizer step, in closed form, by component.

A step has three moments that may be its peak: the loss, while everything is kept; the backward pass of a layer, while it and
those before it are kept; and the optimizer.  What is kept is counted from the blocks' own words ("Kept for the backward"
in onlay/kernels), what a backward needs besides from their code.  On the ordinary path it is what autograd keeps of
transformers' and PEFT's layers.  T tokens, D hidden, I inner, Q and K widths of queries and keys, V vocabulary.
Sources: docs/planning.md; activations of a layer (arXiv:2205.05198); NF4 (arXiv:2305.14314).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate

from onlay.model.storage import FP8_STEP, NOT_QUANTIZED, bytes_per_weight
from onlay.planning.layers import Layer, layer_of
from onlay.planning.parameters import AdapterSection, ParameterCount, count_parameters
from onlay.planning.shapes import BaseShape
from onlay.recipe import LoraAdapter

LEVELS = ("none", "mlp", "blocks", "layer", "tiles")
"""What layers keep, from everything to the least; as in onlay/model/keep.py."""
WHOLE = ("layer", "tiles")
TILE_TOKENS = 4096
CHUNK_BYTES = 512 * 2**20
"""Of a chunk of logits: onlay/kernels/chunked_loss.py."""
LOSS_ROWS = 4
"""Rows D wide for each trained token in the loss: last hidden states, normed, selected, their gradient."""
EAGER_LOGIT_BYTES = 14
"""A token and class where the head trains: logits in 16 bit, in float32, log-softmax and gradient, at their peak."""
WORKSPACE_BYTES = 64 * 2**20
"""cuBLAS's on two threads, from torch's allocator."""
CONTEXT_BYTES = 512 * 2**20
"""Of CUDA, beside the allocator."""
SPARE_SHARE = 0.04
"""Of a GPU's memory, left for what the allocator cannot use."""
OFFLOADED_LAYERS = 4
"""Whose inputs are on the device at a time: two leaving, one in use, one coming (onlay/model/recompute.py)."""
TRANSPOSED_SHARE = 0.25
"""FP8 weights are kept a second time, transposed, up to so much of the memory in use (onlay/model/fuse.py)."""
CAST_ROWS = 8.5
"""Bytes a token, in D: copies that autocast makes for adapters in float32 on the ordinary path."""
SMALL_STATE = 2 + 2 * 4 / 256
"""Bytes a weight of 8-bit AdamW: two averages, a float32 scale for each block of 256."""
RANGE = {True: (0.97, 1.03), False: (0.93, 1.08)}
"""Of the likely peak: on the fast path, and on the ordinary one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What the planner may choose."""

    storage: str
    """bf16 (not quantized), nf4, int8, fp8."""
    fp8_products: bool = False
    micro_tokens: int
    """In the largest micro-batch."""
    levels: tuple[str, ...]
    """Of each layer, one of LEVELS."""
    optimizer: str = "adamw"
    offload: bool = False
    fast_path: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What is trained; it does not change from setting to setting.  `load_of` makes it."""

    shape: BaseShape
    section: AdapterSection
    layer: Layer
    count: ParameterCount
    double_quantization: bool = True
    item_bytes: int = 2
    """Of the precision of the work."""
    trained_share: float = 1.0
    """Of the tokens."""
    device_bytes: int | None = None
    """Memory of the GPU; None: as much as it takes."""


def load_of(
    shape: BaseShape, section: AdapterSection, *, double_quantization: bool = True, item_bytes: int = 2,
    trained_share: float = 1.0, num_labels: int | None = None, device_bytes: int | None = None,
) -> Load:  # fmt: skip
    """num_labels: of method head.  Raises BaseModelError for a base without a closed form, RecipeError for unknown targets."""
    return Load(
        shape=shape, section=section, layer=layer_of(shape, section),
        count=count_parameters(shape, section, num_labels=num_labels), double_quantization=double_quantization,
        item_bytes=item_bytes, trained_share=trained_share, device_bytes=device_bytes,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryForecast:
    """Bytes on one GPU at the peak of an optimizer step, by component."""

    weights_bytes: int
    """Frozen base as stored, with quantization's scales and transposed FP8 copies."""
    adapter_bytes: int
    """What trains, where it is not the base itself."""
    gradient_bytes: int
    """That exist at the peak: a first micro-batch begins its backward pass without any."""
    optimizer_bytes: int
    activation_bytes: int
    """Kept between forward and backward."""
    loss_bytes: int
    """A chunk of logits and rows of hidden states; 0 where the peak is elsewhere."""
    working_bytes: int
    """Of the layer that is computed at the peak, and of matrix products."""
    low_share: float
    high_share: float

    @property
    def peak_bytes(self) -> int:
        """As torch.cuda.max_memory_allocated would tell, likely."""
        return sum(self.components.values())

    @property
    def components(self) -> dict[str, int]:
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name.endswith("_bytes")}

    @property
    def low_bytes(self) -> int:
        return int(self.low_share * self.peak_bytes)

    @property
    def high_bytes(self) -> int:
        return int(self.high_share * self.peak_bytes)

    @property
    def device_bytes(self) -> int:
        """What a GPU must have, less what is left unused: the high end and CUDA itself."""
        return self.high_bytes + CONTEXT_BYTES


def room_bytes(memory_bytes: int) -> int:
    """Of a GPU's memory, what a plan may take up."""
    return int((1 - SPARE_SHARE) * memory_bytes)


def forecast_memory(load: Load, setting: Setting, *, accumulates: bool = False) -> MemoryForecast:
    """`accumulates`: a step has several micro-batches, so gradients exist throughout."""
    layer, count = load.layer, load.count
    full = load.section.method == "full"
    weights = _weights_bytes(load, setting, full=full)
    each = 2 if isinstance(load.section, LoraAdapter) and load.section.precision == "bf16" else 4
    added = 0 if full else count.trainable * each
    gradients = count.trainable * each
    of_level = {level: _kept_bytes(layer, load, level, setting) * setting.micro_tokens for level in set(setting.levels)}
    kept = [of_level[level] for level in setting.levels]
    if setting.offload:
        kept = _on_device(kept, setting.levels)
    work = {level: _working_bytes(layer, load, level, setting) for level in of_level}
    working = [work[level] for level in setting.levels]
    moments = [
        *_backward_moments(kept, working, gradients, accumulates=accumulates),
        (sum(kept), _loss_bytes(load, setting, full=full), 0, gradients * accumulates),
        (0, 0, 0, gradients),
    ]
    at_peak = max(moments, key=sum)
    low, high = RANGE[setting.fast_path]
    return MemoryForecast(
        weights_bytes=weights, adapter_bytes=added, gradient_bytes=at_peak[3],
        optimizer_bytes=_optimizer_bytes(setting.optimizer, count.trainable, each), activation_bytes=at_peak[0],
        loss_bytes=at_peak[1], working_bytes=at_peak[2] + WORKSPACE_BYTES, low_share=low, high_share=high,
    )  # fmt: skip


def _backward_moments(
    kept: list[int], working: list[int], gradients: int, *, accumulates: bool
) -> list[tuple[int, int, int, int]]:
    """For each layer: what it and those before it keep, nothing of the loss, its work, and the gradients of those after it."""
    count = len(kept)
    return [
        (so_far, 0, working[place], gradients if accumulates else gradients * (count - 1 - place) // count)
        for place, so_far in enumerate(accumulate(kept))
    ]


def weights_bytes(load: Load, setting: Setting) -> int:
    """Of the base alone."""
    return _weights_bytes(load, setting, full=load.section.method == "full")


def _weights_bytes(load: Load, setting: Setting, *, full: bool) -> int:
    shape = load.shape
    if full:
        # Kept in float32, and cast to 16 bit by autocast for the time of a pass.
        return shape.num_parameters * (4 + (load.item_bytes if load.item_bytes < 4 else 0))
    rest, packed, small = shape.num_parameters, 0, 0.0
    if setting.storage != NOT_QUANTIZED:
        linears = [
            one
            for one in shape.linears
            if setting.storage != "fp8" or not (one.inputs % FP8_STEP or one.outputs % FP8_STEP)
        ]
        packed = sum(one.num_parameters for one in linears if not one.is_expert)
        small = packed * bytes_per_weight(setting.storage, load.double_quantization)
        if setting.storage != "nf4" or setting.fp8_products:
            small += 4 * sum(one.count * one.outputs for one in linears)
    whole = round(small + load.item_bytes * (rest - packed))
    if setting.offload and not shape.tied_head:
        whole -= load.item_bytes * shape.vocabulary_size * shape.hidden_size
    if setting.storage == "fp8" and setting.fp8_products and setting.fast_path:
        spare = TRANSPOSED_SHARE * load.device_bytes - whole if load.device_bytes is not None else packed
        whole += round(max(0, min(packed, spare)))
    return whole


def _optimizer_bytes(optimizer: str, trainable: int, each: int) -> int:
    per = {"adamw": 2 * each, "adamw_8bit": SMALL_STATE, "paged_adamw_8bit": 0, "paged_adamw_32bit": 0}[optimizer]
    return round(trainable * per)


# ------------------------------------------------------------------------------------------------------------- kept


def _kept_bytes(layer: Layer, load: Load, level: str, setting: Setting) -> int:
    """A token of one layer, until its backward pass."""
    item = load.item_bytes
    if level in WHOLE:
        return item * layer.hidden
    if load.section.method == "head":
        return 0  # Its body runs without a gradient.
    if not setting.fast_path:
        return ordinary_bytes(layer, load)
    if level == "blocks":
        return 2 * item * layer.hidden + item * (layer.rank_output)
    kept = attention_bytes(layer, item) + item * layer.hidden * layer.norms_after
    if level == "mlp":
        return kept + item * layer.hidden
    return kept + mlp_bytes(layer, item)


def attention_bytes(layer: Layer, item: int) -> int:
    """onlay/kernels/attention_block.py: x and r, q, k, v, o and the logsumexp, h of both groups."""
    qkv = layer.queries + 2 * layer.keys
    kept = item * (layer.hidden + qkv + layer.queries + layer.rank_qkv + layer.rank_output) + 4 + 4 * layer.heads
    return kept + (item * qkv + 4 * (layer.heads + layer.key_heads) if layer.normed_heads else 0)


def mlp_bytes(layer: Layer, item: int) -> int:
    """onlay/kernels/mlp_block.py: x and r, gate and up, h of both groups."""
    return item * (layer.hidden + 2 * layer.inner + layer.rank_inner + layer.rank_down) + 4


def ordinary_bytes(layer: Layer, load: Load) -> int:
    """What autograd keeps of transformers' layer with PEFT's adapters, 16 bit: norms in float32, q, k, v (repeated for the heads
    that share them) and o, gate, up, their activation and product; each adapter its input, and copies where it is cast."""
    d, q, i = layer.hidden, layer.queries, layer.inner
    kept = 8 * d + 2 * 3 * q + 2 * q + (6 if layer.gated else 4) * i
    section = load.section
    if not isinstance(section, LoraAdapter):
        return kept + 4 * d + 2 * i
    inputs = {d: layer.rank_qkv > 0, -d: layer.rank_inner > 0}
    kept += 2 * d * sum(inputs.values()) + (2 * i if layer.rank_down else 0) + 2 * layer.ranks
    if section.precision == "fp32":
        kept += round(CAST_ROWS * d)
    if section.dropout:
        modules = {
            "qkv": (d, layer.rank_qkv),
            "o": (q, layer.rank_output),
            "in": (d, layer.rank_inner),
            "down": (i, layer.rank_down),
        }
        kept += sum(3 * width * (rank // section.rank) for width, rank in modules.values())
    return kept


def _on_device(kept: list[int], levels: Sequence[str]) -> list[int]:
    """With the inputs of recomputed layers in host memory, but for those on their way."""
    there = OFFLOADED_LAYERS
    found = []
    for bytes_, level in zip(kept, levels, strict=True):
        found.append(bytes_ if level not in WHOLE or there > 0 else 0)
        there -= level in WHOLE
    return found


# ------------------------------------------------------------------------------------------------------------- work


def _working_bytes(layer: Layer, load: Load, level: str, setting: Setting) -> int:
    """What the backward pass of one layer needs besides, at its peak."""
    if load.section.method == "head":
        return 0
    item, tokens = load.item_bytes, setting.micro_tokens
    if not setting.fast_path:
        again = ordinary_bytes(layer, load) if level in WHOLE else 0
        scratch = 4 * layer.inner + 2 * layer.hidden
        return tokens * (again + scratch + 3 * item * layer.hidden) + _rebuilt(
            setting, layer.inner_weights // (2 if layer.gated else 1)
        )
    wide = min(tokens, TILE_TOKENS) if level == "tiles" else tokens
    mlp = _mlp_work(layer, load, setting, tokens=tokens, wide=wide, joined=level != "none")
    attention = _attention_work(layer, item, tokens, again=level == "blocks")
    again = 0
    if level in WHOLE:
        # Computed again whole, and kept until its own backward: in tiles the MLP keeps its input alone.
        inside = attention_bytes(layer, item) + (item * layer.hidden if level == "tiles" else mlp_bytes(layer, item))
        again = tokens * inside  # Its own input is kept already; its output is there in its place.
        if level == "layer":
            mlp = _mlp_work(layer, load, setting, tokens=tokens, wide=tokens, joined=False)
    return again + max(mlp, attention)


def _mlp_work(layer: Layer, load: Load, setting: Setting, *, tokens: int, wide: int, joined: bool) -> int:
    """grad (T, D), then dp (T, I) beside the weight that it is multiplied by, or beside what was dropped of p; or dx beside
    gate's and up's."""
    eight, item = (1 if setting.fp8_products else 0), load.item_bytes
    down = layer.hidden * layer.inner
    first = item * layer.inner * wide + eight * layer.hidden * wide + _rebuilt(setting, down)
    second = 2 * item * layer.hidden * wide + eight * 2 * layer.inner * wide + _rebuilt(setting, layer.inner_weights)
    if isinstance(load.section, LoraAdapter) and load.section.dropout and layer.rank_down:
        first = max(first, 2 * item * layer.inner * wide)
    again = 2 * item * layer.inner * wide if joined else 0
    return item * layer.hidden * tokens + again + max(first, second)


def _attention_work(layer: Layer, item: int, tokens: int, *, again: bool) -> int:
    """grad, do, dq, dk, dv, joined once more, and dq's sums in float32."""
    qkv = layer.queries + 2 * layer.keys
    kept = item * (qkv + layer.queries) if again else 0
    return tokens * (item * (layer.hidden + layer.queries + 2 * qkv) + 4 * layer.queries + kept)


def _rebuilt(setting: Setting, weights: int) -> int:
    """A weight that is made for its product: of NF4 and INT8 in 16 bit, for FP8 products in 8, or FP8 transposed."""
    if setting.storage == NOT_QUANTIZED:
        return 0
    return weights * (1 if setting.fp8_products else 2)


def _loss_bytes(load: Load, setting: Setting, *, full: bool) -> int:
    """From hidden states by chunks of trained tokens; where the head trains, all logits at once."""
    if load.section.method == "head":
        return 0
    tokens = max(1, round(load.trained_share * setting.micro_tokens))
    rows = LOSS_ROWS * load.item_bytes * load.shape.hidden_size * tokens
    if full:
        return rows + EAGER_LOGIT_BYTES * load.shape.vocabulary_size * tokens
    logit = load.item_bytes if load.item_bytes == 2 else 3 * load.item_bytes
    one = logit * load.shape.vocabulary_size
    return rows + one * min(tokens, max(1, CHUNK_BYTES // one))
