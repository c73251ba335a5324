"""Peak device memory and speed of training steps, on random bases made layer by layer: never whole in 16 bit.

    python bench/memory.py --shape 8b --storage nf4 --tokens 2048 --precision bf16 --optimizer paged_adamw_8bit \
        --recompute all --offload [--method lora] [--steps 10] [--out bench/results/memory.csv]

The steps go through onlay's own adapter, layout, loss, recomputation and optimizer; `torch.cuda.max_memory_allocated`
over all of them is the peak.  Each call measures one configuration in a process of its own and appends a row.
Speed and memory do not depend on the weights' values.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from onlay.data.pack import collate
from onlay.model.adapter import attach
from onlay.model.attention import choose_layout
from onlay.model.quantize import QuantizedLinear
from onlay.model.recompute import Recompute
from onlay.recipe import Recipe, parse_recipe
from onlay.training.loss import make_loss
from onlay.training.optimizer import make_optimizer

SHAPES = {  # layers, hidden, intermediate, query heads, key heads
    "1b": (16, 2048, 8192, 32, 8),
    "8b": (32, 4096, 14336, 32, 8),
    "70b": (80, 8192, 28672, 64, 8),
}
VOCABULARY = 128256


def make_base(shape: str, storage: str, *, double_quantization: bool) -> nn.Module:
    """A Llama with random frozen weights on the GPU; linear layers are quantized as soon as they are drawn."""
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, hidden, intermediate, heads, key_heads = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_heads, max_position_embeddings=131072, rope_theta=500000.0,
        tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        for key, parameter in list(module.named_parameters(recurse=False)):
            drawn = torch.empty(parameter.shape, dtype=torch.bfloat16, device="cuda")
            weight = drawn.normal_(0.0, 0.02) if drawn.ndim == 2 else drawn.fill_(1.0)
            if storage != "bf16" and isinstance(module, nn.Linear) and module is not head:
                quantized = QuantizedLinear.from_linear(
                    _holding(module, weight), storage=storage, double_quantization=double_quantization
                )
                model.set_submodule(name, quantized)
                del module.weight  # the list of modules still holds the layer
            else:
                setattr(module, key, nn.Parameter(weight, requires_grad=False))
    for module in model.modules():  # rotary frequencies are computed, not drawn
        if type(module).__name__ == "LlamaRotaryEmbedding":
            module.__init__(config=config, device="cuda")  # type: ignore[misc]
    model.requires_grad_(False)
    return model.eval()


def _holding(linear: nn.Linear, weight: torch.Tensor) -> nn.Linear:
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    recipe = recipe_of(arguments)
    device = torch.device("cuda")
    began = time.perf_counter()
    base = make_base(arguments.shape, arguments.storage, double_quantization=True)
    made = time.perf_counter() - began
    after_base = torch.cuda.memory_allocated()
    model, _ = attach(base, recipe.adapter, seed=0)  # type: ignore[arg-type]
    layout = choose_layout(base, packing="auto", device=device, compute_dtype=torch.bfloat16)  # type: ignore[arg-type]
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(trainable, recipe)
    loss = make_loss(model, layout, device=device, compute_dtype=torch.bfloat16)
    recompute = Recompute(base, offload=recipe.training.offload_activations)
    if recipe.training.recompute != "none":
        recompute.switch_on(None if recipe.training.recompute == "all" else int(recipe.training.recompute))
    generator = np.random.default_rng(0)
    rows = arguments.rows
    examples = [
        (generator.integers(0, VOCABULARY, arguments.tokens), np.ones(arguments.tokens, dtype=bool))
        for _ in range(rows)
    ]
    batch = collate(examples, packed=layout.packed, pad_token_id=0)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds, losses = [], []
    for _ in range(arguments.steps):
        began = time.perf_counter()
        value = loss(model, batch)
        (value / batch.num_trained).backward()
        torch.nn.utils.clip_grad_norm_(list(trainable.values()), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-4
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(value.detach()) / batch.num_trained)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    median = sorted(seconds[1:])[len(seconds[1:]) // 2]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "shape": arguments.shape, "storage": arguments.storage, "method": arguments.method, "rank": arguments.rank,
        "precision": arguments.precision, "optimizer": arguments.optimizer, "recompute": arguments.recompute,
        "offload": arguments.offload, "dropout": arguments.dropout, "rows": rows, "tokens_a_row": arguments.tokens,
        "steps": arguments.steps, "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3),
        "base_gib": round(after_base / 2**30, 3), "tokens_per_second": round(rows * arguments.tokens / median),
        "first_loss": round(losses[0], 4), "last_loss": round(losses[-1], 4), "make_seconds": round(made, 1),
        "attention": layout.attention, "loss": loss.note, "device": torch.cuda.get_device_name(), "torch": version("torch"),
        "transformers": version("transformers"), "commit": arguments.commit or commit.stdout.strip(),
    }  # fmt: skip


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    return parse_recipe({
        "model": {"base": "random", "storage": arguments.storage}, "data": {"train": "random"},
        "adapter": {"method": arguments.method, "rank": arguments.rank, "precision": arguments.precision, "dropout": arguments.dropout},
        "training": {
            "optimizer": arguments.optimizer, "offload_activations": arguments.offload,
            "recompute": int(arguments.recompute) if arguments.recompute.isdigit() else arguments.recompute,
        },
    })  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--storage", choices=["bf16", "nf4", "int8"], default="nf4")
    parser.add_argument("--method", choices=["lora", "rslora", "dora", "lora+"], default="lora")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--recompute", default="none", help="none, all, or the first k layers")
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=2048, help="in each row")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--commit", help="where git is not at hand")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    row = measure(arguments)
    print(
        {key: row[key] for key in ("shape", "storage", "method", "peak_gib", "tokens_per_second", "last_loss")},
        flush=True,
    )
    if arguments.out:
        new = not arguments.out.exists()
        with arguments.out.open("a", newline="", encoding="utf-8") as out:
            writer = csv.DictWriter(out, list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)


if __name__ == "__main__":
    main()
