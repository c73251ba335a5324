"""Peak device memory and speed of training steps, on random bases made layer by layer: never whole in 16 bit.

    python bench/memory.py --shape 8b --storage nf4 --tokens 2048 --precision bf16 --optimizer paged_adamw_8bit \
        --recompute all --offload [--method lora] [--steps 10] [--out bench/results/memory.csv]
    python bench/memory.py --storage nf4 --rank 32 --tokens 80000 --limit-gib 23.4     does this context fit 24 GiB
    python bench/memory.py --shape tiny --device cpu

The steps are those of onlay's own session (bench/step.py); `torch.cuda.max_memory_allocated` over all of them is the peak.
Each call measures one configuration and appends a row.  Speed and memory do not depend on the weights' values.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from bases import SHAPES, VOCABULARY, make_base
from step import Case, append_row, measure

__all__ = ["VOCABULARY", "make_base"]
"""bench/generation.py takes its random base from here."""
SHOWN = ("shape", "storage", "method", "peak_gib", "tokens_per_second", "last_loss")


def case_of(arguments: argparse.Namespace) -> Case:
    """The first step is the warm-up."""
    return Case(
        shape=arguments.shape, device=arguments.device, storage=arguments.storage, compute=arguments.compute,
        method=arguments.method, rank=arguments.rank, dropout=arguments.dropout, targets=arguments.targets,
        precision=arguments.precision, optimizer=arguments.optimizer, recompute=arguments.recompute, offload=arguments.offload,
        rows=arguments.rows, tokens=arguments.tokens, micro_tokens=arguments.micro_tokens, limit_gib=arguments.limit_gib,
        steps=arguments.steps - 1, warmup=1,
    )  # fmt: skip


def row_of(case: Case, result: dict[str, Any], *, commit: str) -> dict[str, Any]:
    timed = list(zip(result["step_tokens"], result["step_seconds"], strict=True))[case.warmup :]
    rate = median(tokens / seconds for tokens, seconds in timed)
    notes = result["notes"]
    return {
        "shape": case.shape, "storage": case.storage, "method": case.method, "rank": case.rank, "precision": case.precision,
        "optimizer": case.optimizer, "recompute": case.recompute, "offload": case.offload, "dropout": case.dropout,
        "rows": case.rows, "tokens_a_row": case.tokens, "steps": case.all_steps, "peak_gib": round(result["peak_gib"], 3),
        "base_gib": round(result["base_gib"], 3), "tokens_per_second": round(rate), "first_loss": round(result["losses"][0], 4),
        "last_loss": round(result["losses"][-1], 4), "make_seconds": round(result["load_seconds"], 1),
        "attention": notes["attention"], "loss": notes["cross_entropy"], "device": result["device"],
        "torch": result["versions"]["torch"], "transformers": result["versions"]["transformers"], "commit": commit,
        "compute": case.compute, "targets": case.targets, "micro_tokens": notes["micro_batch_tokens"],
        "recomputed": notes["recompute"], "limit_gib": case.limit_gib,
    }  # fmt: skip


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--storage", choices=["bf16", "nf4", "int8", "fp8"], default="nf4")
    parser.add_argument(
        "--compute", choices=["auto", "fp8"], default="auto", help="fp8: products of an NF4 base in FP8"
    )
    parser.add_argument("--method", choices=["lora", "rslora", "dora", "lora+"], default="lora")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--targets", choices=["all-linear", "attention", "mlp", "qv"], default="all-linear")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--recompute", default="none", help="auto, none, all, or the first k layers")
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=2048, help="in each row")
    parser.add_argument("--micro-tokens", type=int, help="most tokens in one forward pass")
    parser.add_argument("--limit-gib", type=float, help="the allocator gives no more than this")
    parser.add_argument("--steps", type=int, default=10, help="the first of them is not timed")
    parser.add_argument("--commit", help="where git is not at hand")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(words)
    if arguments.steps < 2:
        parser.error("--steps: at least 2, as the first is not timed")
    return arguments


def main() -> None:
    from onlay.errors import OnlayError

    arguments = parse()
    case = case_of(arguments)
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    try:
        row = row_of(case, measure(case), commit=arguments.commit or git.stdout.strip())
    except OnlayError as error:
        sys.exit(f"{error.problem}\n{error.remedy}")
    print({key: row[key] for key in SHOWN}, flush=True)
    if arguments.out:
        append_row(arguments.out, row)


if __name__ == "__main__":
    main()
