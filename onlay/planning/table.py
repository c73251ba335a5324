"""The hardware table of the guides, computed: the least memory of full tuning, LoRA and QLoRA, and the GPU that has it."""

from __future__ import annotations

from dataclasses import dataclass

from onlay.planning.devices import read_gpus
from onlay.planning.memory import Setting, forecast_memory, load_of, room_bytes
from onlay.planning.parameters import AdapterSection
from onlay.planning.shapes import find_shape
from onlay.recipe import FullTuning, LoraAdapter

BASES = (
    "llama-3.2-1b", "llama-3.2-3b", "llama-2-7b", "llama-3.1-8b", "llama-2-13b", "qwen2.5-32b", "llama-3.1-70b",
)  # fmt: skip
TOKENS = 2048
RANK = 16
ASSUMPTIONS = (
    f"one row of {TOKENS:,} tokens at a time, which any batch size can be made of",
    f"LoRA: rank {RANK} on all linear layers, adapter and AdamW's state in float32; QLoRA: the base in NF4 with double quantization",
    "every layer computed again in the backward pass; kept: nothing but its input",
    "full tuning: weights, gradients and AdamW's two averages in float32, work in 16 bit; logits whole, because the head trains",
    "what a GPU must have is the forecast's high end and CUDA's own; onlay leaves another 4 % of the GPU free",
)
"""What the table goes by, in words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    base: str
    parameters: int
    method: str
    """full, lora, qlora."""
    trainable: int
    needed_bytes: int
    """Of one GPU."""
    gpu: str | None
    """The smallest of the table that has as much; None: none has."""


def hardware_table() -> list[Row]:
    """From the smallest base to the largest, three methods each."""
    gpus = list(read_gpus().values())
    rows = []
    for name in BASES:
        shape = find_shape(name)
        methods: tuple[tuple[str, AdapterSection, str], ...] = (
            ("full", FullTuning(method="full"), "bf16"),
            ("lora", LoraAdapter(rank=RANK), "bf16"),
            ("qlora", LoraAdapter(rank=RANK), "nf4"),
        )
        for method, section, storage in methods:
            load = load_of(shape, section)
            setting = Setting(
                storage=storage, micro_tokens=TOKENS, levels=("layer",) * shape.num_layers, fast_path=method != "full"
            )
            needed = forecast_memory(load, setting).device_bytes
            fitting = next((gpu.name for gpu in gpus if room_bytes(gpu.memory_bytes) >= needed), None)
            rows.append(
                Row(
                    base=name, parameters=shape.num_parameters, method=method, trainable=load.count.trainable,
                    needed_bytes=needed, gpu=fitting,
                )
            )  # fmt: skip
    return rows
