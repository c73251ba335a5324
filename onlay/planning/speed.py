"""Seconds of one optimizer step: what its products, its attention and its traffic take on a GPU of these rates.

    products    a frozen weight costs 2 FLOPs a token forward and 2 for the gradient of its input; once more forward where
                the layer is computed again; 2 for its own gradient where it trains
    attention   2 S Q FLOPs a token forward, 5 S Q backward, S the tokens that a token can see on average; and its rows
    traffic     everything else is read and written once or a few times: norms, activation, the adapters' thin products,
                quantization, weights that are rebuilt; bytes over bandwidth
    waiting     what a GPU waits for the host: so much a layer

Rates are those of the data sheet times what was reached on the one class that was measured; the constants below are those
shares and the page docs/planning.md says what each was fitted to.  Other classes are computed with the same shares, and are
unverified.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from onlay.planning.devices import Gpu
from onlay.planning.layers import Layer
from onlay.planning.memory import WHOLE, Load, Setting

MEASURED_CLASSES = ("hopper",)
PRODUCT_SHARE = 0.728
"""Of the data sheet's TFLOP/s in 16 bit, under load."""
FP8_SHARE = 0.733
CUDNN_SHARE, FLASH_SHARE = 0.577, 0.329
"""Attention's, for examples of one length and for others."""
CUDNN_TRAFFIC, FLASH_TRAFFIC = 0.40, 0.25
"""Share of the bandwidth with which attention goes over its rows besides."""
TRAFFIC_SHARE = 0.52
"""Of the bandwidth, in everything that is no large product."""
ORDINARY_TRAFFIC = 3.9
"""On the ordinary path: rows are read and written so many times as often."""
LAYER_SECONDS = 0.12e-3
"""Of a micro-batch in a layer, that the GPU waits."""
STEP_SECONDS = 3e-3
"""Of a step: optimizer, clipping, the rows' way to the GPU."""
ORDINARY_HOST_SECONDS = 9e-3
"""Of a micro-batch in a layer, that the host needs on the ordinary path; the GPU may be busy longer."""
FORWARD_SHARE = 0.4
"""Of a training step's time, that a forward pass alone takes."""
GRADIENT_BYTES_A_SECOND = 20e9
"""Summed over GPUs: what PCIe gives; NVLink is faster."""
RANGE = {True: (0.90, 1.12), False: (0.65, 1.60)}
"""Of the likely time: on a class that was measured, and on others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Lengths of the examples that one forward pass takes."""

    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def seen(self) -> float:
        """Tokens that a token sees on average: half of its example."""
        return sum(length * length for length in self.lengths) / (2 * max(1, self.tokens))

    @property
    def is_even(self) -> bool:
        return len(set(self.lengths)) == 1


def is_measured(gpu: Gpu) -> bool:
    return gpu.efficiency_class in MEASURED_CLASSES


def step_seconds(load: Load, setting: Setting, gpu: Gpu, batches: list[MicroBatch]) -> float:
    """Of one optimizer step of these micro-batches on one GPU."""
    layer = load.layer
    return STEP_SECONDS + sum(micro_batch_seconds(load, setting, gpu, batch, layer=layer) for batch in batches)


def micro_batch_seconds(load: Load, setting: Setting, gpu: Gpu, batch: MicroBatch, *, layer: Layer) -> float:
    """Forward and backward."""
    again = {level: setting.levels.count(level) for level in ("mlp", "blocks", "layer", "tiles")}
    whole = again["layer"] + again["tiles"]
    passes = _passes(load, layer)
    products = batch.tokens * (
        passes * layer.count * layer.weights
        + 2 * (again["mlp"] + again["blocks"]) * layer.inner_weights
        + 2 * again["blocks"] * (layer.attention_weights - layer.hidden * layer.queries)
        + 2 * whole * layer.weights
    )
    seconds = products / _product_rate(setting, gpu) + _adapter_seconds(load, gpu, batch.tokens)
    seconds += _head_seconds(load, gpu, batch)
    attention_again = (again["blocks"] + whole) / layer.count
    rest = layer.count * _attention_seconds(layer, setting, gpu, batch) * (1 + 2 / 7 * attention_again)
    traffic = (
        batch.tokens
        * row_bytes(layer, load, setting)
        * (layer.count + (again["mlp"] + again["blocks"]) / 6 + whole / 3)
    )
    inner = layer.inner_weights / layer.weights
    traffic += rebuilt_bytes(layer, setting) * (2 * layer.count + whole + (again["mlp"] + again["blocks"]) * inner)
    rest += traffic / (TRAFFIC_SHARE * gpu.bandwidth_gb_s * 1e9)
    # Under a head the body runs forward alone.
    seconds += FORWARD_SHARE * rest if load.section.method == "head" else rest
    if setting.fast_path:
        return seconds + LAYER_SECONDS * layer.count
    return max(seconds, ORDINARY_HOST_SECONDS * (layer.count + whole / 3))


def exchange_seconds(load: Load, gpus: int) -> float:
    """Of one optimizer step: gradients of 4 bytes go to the other GPUs and their sum comes back."""
    return 2 * load.count.trainable * 4 / GRADIENT_BYTES_A_SECOND if gpus > 1 else 0.0


def forward_seconds(load: Load, setting: Setting, gpu: Gpu, batches: list[MicroBatch]) -> float:
    """Of an evaluation: a forward pass over these micro-batches."""
    layer = load.layer
    plain = replace(setting, levels=("none",) * layer.count)
    return FORWARD_SHARE * sum(micro_batch_seconds(load, plain, gpu, batch, layer=layer) for batch in batches)


def flops_a_token(load: Load, setting: Setting, *, seen: float) -> float:
    """Of training, as the products' sizes have it."""
    layer = load.layer
    whole = sum(level in WHOLE for level in setting.levels)
    mlp = sum(level in ("mlp", "blocks") for level in setting.levels)
    attention = layer.count * 14 * seen * layer.queries
    adapters = 6 * load.count.trainable if layer.ranks else 0
    return (
        _passes(load, layer) * layer.count * layer.weights + 2 * whole * layer.weights + 2 * mlp * layer.inner_weights
        + attention + adapters + _head_passes(load) * load.trained_share * load.shape.vocabulary_size * layer.hidden
    )  # fmt: skip


def _passes(load: Load, layer: Layer) -> int:
    return {"full": 6, "head": 2}.get(load.section.method, 4)


def _head_passes(load: Load) -> int:
    return {"full": 6, "head": 0}.get(load.section.method, 4)


def _product_rate(setting: Setting, gpu: Gpu) -> float:
    """FLOP/s."""
    if setting.fp8_products and gpu.fp8_tflops is not None:
        return FP8_SHARE * gpu.fp8_tflops * 1e12
    return PRODUCT_SHARE * gpu.tflops * 1e12


def _adapter_seconds(load: Load, gpu: Gpu, tokens: int) -> float:
    """Of the adapters' own products, in 16 bit whatever the base's are in: forward, and back to input and weights."""
    added = load.count.trainable if load.layer.ranks else 0
    return 6 * added * tokens / (PRODUCT_SHARE * gpu.tflops * 1e12)


def _head_seconds(load: Load, gpu: Gpu, batch: MicroBatch) -> float:
    flops = _head_passes(load) * load.trained_share * batch.tokens * load.shape.vocabulary_size * load.shape.hidden_size
    return flops / (PRODUCT_SHARE * gpu.tflops * 1e12)


def _attention_seconds(layer: Layer, setting: Setting, gpu: Gpu, batch: MicroBatch) -> float:
    """Of one layer, forward and backward."""
    even = batch.is_even and setting.fast_path
    rate = (CUDNN_SHARE if even else FLASH_SHARE) * gpu.tflops * 1e12
    rows = 2 * (7 * layer.queries + 7 * layer.keys) * batch.tokens
    share = CUDNN_TRAFFIC if even else FLASH_TRAFFIC
    return 14 * batch.seen * layer.queries * batch.tokens / rate + rows / (share * gpu.bandwidth_gb_s * 1e9)


def row_bytes(layer: Layer, load: Load, setting: Setting) -> float:
    """A token of one layer, forward and backward: what is read and written beside large products and attention's kernel."""
    adapted = 1.0 if layer.ranks else 0.0
    i, d, qkv = layer.inner * (2 if layer.gated else 1), layer.hidden, layer.queries + 2 * layer.keys
    # The MLP's wide rows: its activation forward (3/2 i read and written) and back (3 i), and what its adapters read: p twice,
    # and the gradients of gate and up once for g, once for dB.
    wide = (3 / 2 + 3) * i + adapted * (1 + 2) * i
    narrow = 26 * d + adapted * 14 * d
    turned = 4 * qkv + adapted * (2 * qkv + 2 * layer.queries)
    elements = wide + narrow + turned
    if setting.fp8_products:
        elements += (3 / 2 + 1 / 2) * i + 3 * d  # Quantized once forward and once back: read in 16 bit, written in 8.
    return 2 * elements * (1.0 if setting.fast_path else ORDINARY_TRAFFIC)


def rebuilt_bytes(layer: Layer, setting: Setting) -> float:
    """Of one layer, each time that its weights are multiplied: packed weights are read, and written wide and read again."""
    packed = {"nf4": 0.5, "int8": 1.0, "fp8": 1.0}.get(setting.storage)
    if packed is None or (setting.storage == "fp8" and setting.fp8_products):
        return 0.0
    return layer.weights * (packed + (1 if setting.fp8_products else 2))
