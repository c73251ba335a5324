"""The best tokens a second within 8, 12, 16, 24, 48, 80 and 139 GiB of GPU memory, onlay's and its peers'.

    python bench/budget.py --model FOLDER --make-model --out bench/results/budget.csv [--only onlay-1,unsloth-3] [--budget-seconds 500]
    python bench/budget.py --read bench/results/budget.csv bench/results/throughput.csv     only the table, from rows that are there

8B, rank 16 on all linear layers, one optimizer step = 8 rows of 2,048 tokens, cut into passes that fit.  Each setting is
measured once, with all of the GPU's memory; it fits a budget that its peak of allocated memory and what CUDA takes besides stay
below.  The best setting within each budget makes the curve.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from step import Case
from throughput import SYSTEMS, add_arguments, choose, disagreements, prepare, run_cases

BUDGETS_GIB = (8, 12, 16, 24, 48, 80, 139)
CONTEXT_GIB = 0.5
"""What CUDA takes beside the allocator, where a row does not say."""
ROWS, TOKENS = 8, 2048


def settings() -> dict[str, list[dict[str, Any]]]:
    """What is tried for each system, from the least memory to the most."""
    frugal = {"optimizer": "paged_adamw_8bit"}
    ours = [
        {"storage": "nf4", "recompute": "all", "micro_tokens": 2048, "offload": True, "precision": "bf16"} | frugal,
        {"storage": "nf4", "recompute": "all", "micro_tokens": 2048, "precision": "bf16"} | frugal,
        {"storage": "nf4", "recompute": "all", "micro_tokens": 8192},
        {"storage": "nf4", "recompute": "16", "micro_tokens": 2048},
        {"storage": "nf4", "recompute": "none", "micro_tokens": 2048},
        {"storage": "nf4", "recompute": "none", "micro_tokens": 4096},
        {"storage": "nf4", "recompute": "none", "micro_tokens": 8192},
        {"storage": "nf4", "recompute": "none"},
        {"storage": "nf4", "compute": "fp8", "recompute": "none", "micro_tokens": 2048},
        {"storage": "nf4", "compute": "fp8", "recompute": "none", "micro_tokens": 4096},
        {"storage": "fp8", "recompute": "all", "micro_tokens": 8192},
        {"storage": "fp8", "recompute": "none", "micro_tokens": 2048},
        {"storage": "fp8", "recompute": "none", "micro_tokens": 8192},
        {"storage": "fp8", "recompute": "none"},
        {"storage": "bf16", "recompute": "none"},
    ]
    unsloth = [
        {"storage": "nf4", "recompute": "offload", "micro_tokens": 2048} | frugal,
        {"storage": "nf4", "recompute": "offload"},
        {"storage": "nf4", "recompute": "none", "micro_tokens": 2048},
        {"storage": "nf4", "recompute": "none", "micro_tokens": 4096},
        {"storage": "nf4", "recompute": "none", "micro_tokens": 8192},
        {"storage": "nf4", "recompute": "none"},
        {"storage": "bf16", "recompute": "none"},
    ]
    liger = [
        {"storage": "nf4", "recompute": "all", "micro_tokens": 2048} | frugal,
        {"storage": "nf4", "recompute": "all"},
        {"storage": "nf4", "recompute": "none", "micro_tokens": 4096},
        {"storage": "nf4", "recompute": "none"},
        {"storage": "bf16", "recompute": "none"},
    ]
    return {"onlay": ours, "unsloth": unsloth, "trl+liger": liger}


def cases() -> list[Case]:
    return [
        replace(Case(name=f"{system}-{number}", system=system, rows=ROWS, tokens=TOKENS), **values)
        for system, tried in settings().items()
        for number, values in enumerate(tried, start=1)
    ]


def is_comparable(row: dict[str, Any]) -> bool:
    """The work of the curve: a row of throughput.csv may be of other work."""
    wanted = {"shape": "8b", "rows": ROWS, "tokens_a_row": TOKENS, "rank": 16, "targets": "all-linear", "gpus": 1}
    return not row["error"] and float(row["dropout"]) == 0 and all(str(row[key]) == str(v) for key, v in wanted.items())


def needed_gib(row: dict[str, Any]) -> float:
    """A GPU of so much memory suffices."""
    return float(row["peak_gib"]) + float(row["context_gib"] or CONTEXT_GIB)


def best_within(rows: Iterable[dict[str, Any]]) -> dict[str, dict[int, dict[str, Any] | None]]:
    """{system: {GiB: the fastest comparable row that fits, or None}}, for the systems that have rows."""
    fitting = [row for row in rows if is_comparable(row)]
    found: dict[str, dict[int, dict[str, Any] | None]] = {}
    for system in SYSTEMS:
        own = [row for row in fitting if row["system"] == system]
        if own:
            found[system] = {
                budget: max(
                    (row for row in own if needed_gib(row) <= budget),
                    key=lambda row: float(row["tokens_per_second"]),
                    default=None,
                )
                for budget in BUDGETS_GIB
            }
    return found


def told_settings(row: dict[str, Any]) -> str:
    """The settings that make a row, in a few words; what onlay chose by itself as the run has told it."""
    given, notes = json.loads(row["settings"]), json.loads(row["notes"])
    recompute = {"none": "nothing recomputed", "all": "all recomputed", "offload": "its offloaded checkpointing"}
    parts = [given["storage"] + (" with FP8 products" if given["compute"] == "fp8" else "")]
    if given["recompute"] == "auto" and "recompute" in notes:
        parts.append(f"by itself: {notes['recompute']} recomputed")
    else:
        parts.append(recompute.get(given["recompute"], f"{given['recompute']} layers recomputed"))
    if given["offload"]:
        parts.append("offloaded")
    if given["optimizer"] != "adamw":
        parts.append(given["optimizer"])
    micro = notes.get("micro_batch_tokens", given["micro_tokens"])
    if micro:
        parts.append(f"at most {int(micro):,} tokens a pass")
    if given["pack_tokens"]:
        parts.append(f"packed to {given['pack_tokens']:,}")
    return ", ".join(parts)


def table(rows: Sequence[dict[str, Any]]) -> str:
    best = best_within(rows)
    lines = [f"{'GiB':>4}  " + "  ".join(f"{system:>10}" for system in best)]
    for budget in BUDGETS_GIB:
        cells = [best[system][budget] for system in best]
        told = [f"{int(float(row['tokens_per_second'])):>10,}" if row else f"{'-':>10}" for row in cells]
        lines.append(f"{budget:>4}  " + "  ".join(told))
    return "\n".join(lines)


def read_rows(paths: Iterable[Path]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for path in paths:
        with path.open(newline="", encoding="utf-8") as file:
            rows += csv.DictReader(file)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of the checkpoint that all systems load")
    parser.add_argument("--make-model", action="store_true", help="write a random one there where there is none")
    add_arguments(parser)
    parser.add_argument("--read", type=Path, nargs="+", help="only make the table from these files")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.read:
        print(table(read_rows(arguments.read)))
        return
    chosen = choose(cases(), arguments)
    if arguments.list:
        print(
            "\n".join(f"{case.name:<12} {case.storage} {case.recompute} {case.micro_tokens or ''}" for case in chosen)
        )
        return
    commit = prepare(arguments)
    rows = run_cases(
        chosen, out=arguments.out, timeout=arguments.timeout, budget=arguments.budget_seconds, commit=commit,
        packages=arguments.peer_packages,
    )  # fmt: skip
    print(table(rows), flush=True)
    found = disagreements(rows)
    print("\n".join(["first losses do NOT agree:", *found]) if found else "no first loss disagrees with a peer's", flush=True)  # fmt: skip
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
