"""The fused LoRA layer against PEFT's separate products on this CPU: CPU milliseconds of forward and backward, one thread.

    python bench/lora_linear.py [--out bench/results/lora_linear.json]

One thread and CPU time, so that other work on the machine hardly matters.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from onlay.kernels.lora_linear import folds, lora_linear, reference

SHAPES = [(840, 64, 64, 16), (840, 64, 172, 16), (840, 172, 64, 16), (1024, 256, 256, 16), (1024, 256, 768, 16)]
"""tokens, inputs, outputs, rank: the first three are stories260K's layers, the last two pocket's."""


def cpu_milliseconds(step: Callable[[], None], repeat: int = 31) -> float:
    step()
    times = []
    for _ in range(repeat):
        began = time.process_time()
        for _ in range(8):
            step()
        times.append((time.process_time() - began) / 8)
    return round(sorted(times)[repeat // 2] * 1e3, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = []
    for tokens, inputs, outputs, rank in SHAPES:
        x = torch.randn(tokens, inputs, requires_grad=True)
        weight, grad = torch.randn(outputs, inputs), torch.randn(tokens, outputs)
        a, b = torch.randn(rank, inputs, requires_grad=True), torch.randn(outputs, rank, requires_grad=True)
        times = {}
        for name, op in (("separate", reference), ("fused", lora_linear)):

            def step(op=op, x=x, weight=weight, a=a, b=b, grad=grad) -> None:  # type: ignore[no-untyped-def]
                op(x, weight, None, a, b, 2.0).backward(grad)

            times[f"{name}_ms"] = cpu_milliseconds(step)
        form = "folded" if folds(outputs, inputs, rank=rank) else "factored"
        table.append({"shape": [tokens, inputs, outputs, rank], "form": form} | times)
        print(table[-1], flush=True)
    if arguments.out:
        result = {"command": "bench/lora_linear.py", "torch": torch.__version__, "threads": 1, "rows": table}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
