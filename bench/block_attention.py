"""Block attention against SDPA's flash kernel on this CPU: CPU milliseconds of forward and backward, one thread.

    python bench/block_attention.py [--out bench/results/block_attention.json]

One thread and CPU time, so that other work on the machine hardly matters.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional

from onlay.kernels.block_attention import causal_attention

SHAPES = [(4, 4, 2, 510, 8), (8, 4, 2, 256, 8), (4, 4, 2, 510, 16), (4, 4, 2, 510, 32), (16, 2, 2, 128, 64)]
"""rows, key heads, query heads for each, tokens, width: the first two are stories260K's, the last is pocket's, which is too wide."""


def cpu_milliseconds(step: Callable[[], None], repeat: int = 15) -> float:
    step()
    times = []
    for _ in range(repeat):
        began = time.process_time()
        step()
        times.append(time.process_time() - began)
    return round(sorted(times)[repeat // 2] * 1e3, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = []
    for rows, groups, shared, tokens, width in SHAPES:
        query = torch.randn(rows, groups * shared, tokens, width, requires_grad=True)
        key, value = (torch.randn(rows, groups, tokens, width, requires_grad=True) for _ in range(2))
        grad = torch.randn_like(query)

        def flash(query=query, key=key, value=value, grad=grad) -> None:  # type: ignore[no-untyped-def]
            functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).backward(grad)

        def blocks(query=query, key=key, value=value, grad=grad) -> None:  # type: ignore[no-untyped-def]
            n, r, t, d = rows * groups, shared, tokens, width  # noqa: B023 - called before the next turn
            out = causal_attention(query.view(n, r, t, d), key.view(n, t, d), value.view(n, t, d), d**-0.5)
            out.view_as(query).backward(grad)

        table.append(
            {
                "shape": [rows, groups, shared, tokens, width],
                "flash_ms": cpu_milliseconds(flash),
                "blocks_ms": cpu_milliseconds(blocks),
            }
        )
        print(table[-1], flush=True)
    if arguments.out:
        result = {"command": "bench/block_attention.py", "torch": torch.__version__, "threads": 1, "table": table}
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
