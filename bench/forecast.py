"""Forecasts of memory and time beside what was measured: the table of docs/planning.md.

    python bench/forecast.py --run --out bench/results/forecast.csv [--only 8b] [--budget-seconds 500]    measures, on a GPU
    python bench/forecast.py                                          the table, from rows that are there
    python bench/forecast.py --write                                  the same, into docs/planning.md
    python bench/forecast.py --list                                   the configurations

Each configuration is a process of its own and one row: peak of allocated memory and the median step through onlay's own
session (bench/step.py), on a random base.  A row is forecast from its settings and its device's name alone.  Rows of
bench/results/memory.csv and throughput.csv whose settings are known whole are forecast too.  FITTED names the rows that constants of
onlay/planning were taken from; all others check them.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import step
from bases import wanted_layers
from step import MARK, Case, append_row, row_lengths

from onlay.data.pack import plan_micro_batches
from onlay.planning.devices import read_gpus
from onlay.planning.lengths import cut_steps
from onlay.planning.memory import Load, Setting, forecast_memory, load_of
from onlay.planning.shapes import BaseShape, read_shape
from onlay.planning.speed import step_seconds

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGE = HERE.parent / "docs" / "planning.md"
BLOCK = re.compile(r"<!-- measured: forecast -->\n.*?<!-- end -->", re.S)
NOTHING = "Not measured yet."
WHOLE_GPU_TOKENS = 16384
"""Of a micro-batch where a row names none (onlay/training/session.py, on a GPU of more than 60 GiB)."""
ORDINARY = "ordinary"
"""In a configuration's name: the fast path is switched off."""
FITTED = ("8b-bf16-none", "8b-bf16-none-1row", "8b-nf4-none-ordinary", "8b-fp8-none-gsm8k")
"""Rows whose times constants of onlay/planning/speed.py were fitted to.  No memory was fitted: it is counted."""


def cases() -> list[Case]:
    """Three shapes, storages, recomputation, token budgets, ranks, dropout, full tuning, and the fast path off."""
    made: list[Case] = []

    def add(name: str, **values: Any) -> None:
        made.append(Case(name=name, **({"steps": 5, "warmup": 3, "recompute": "none"} | values)))

    halves = {"1b": "8", "8b": "16", "70b": "40"}
    for storage in ("bf16", "nf4", "fp8"):
        add(f"8b-{storage}-none", storage=storage)
        add(f"8b-{storage}-half", storage=storage, recompute=halves["8b"])
        add(f"8b-{storage}-all", storage=storage, recompute="all")
    add("8b-bf16-none-1row", rows=1)
    add("8b-bf16-none-4096", micro_tokens=4096)
    add("8b-nf4-none-2048", storage="nf4", micro_tokens=2048)
    add("8b-nf4-all-32768", storage="nf4", recompute="all", rows=16, micro_tokens=32768)
    add("8b-bf16-none-rank128", rank=128)
    add("8b-nf4-none-rank8-dropout", storage="nf4", rank=8, dropout=0.05)
    add("8b-bf16-none-qv-dropout", targets="qv", dropout=0.05)
    add("8b-fp8-none-gsm8k", storage="fp8", rows=96, tokens=None)
    add("8b-nf4-none-gsm8k", storage="nf4", rows=96, tokens=None)
    add("8b-nf4-none-ordinary", storage="nf4")
    add("8b-nf4-all-ordinary", storage="nf4", recompute="all")
    add("8b-bf16-none-ordinary", rows=4)
    add("1b-bf16-none", shape="1b")
    add("1b-nf4-half", shape="1b", storage="nf4", recompute=halves["1b"])
    add("1b-fp8-none", shape="1b", storage="fp8")
    add("1b-bf16-none-rank128-2048", shape="1b", rank=128, micro_tokens=2048)
    add("1b-full-none", shape="1b", method="full", rows=4)
    add("1b-full-all", shape="1b", method="full", recompute="all", rows=4)
    add("70b-nf4-all", shape="70b", storage="nf4", recompute="all", rows=1, tokens=4096)
    add("70b-nf4-half", shape="70b", storage="nf4", recompute=halves["70b"], rows=1, tokens=4096)
    add("70b-nf4-all-8bit", shape="70b", storage="nf4", recompute="all", rows=1, tokens=4096, optimizer="adamw_8bit", precision="bf16")  # fmt: skip
    add("70b-nf4-all-offload", shape="70b", storage="nf4", recompute="all", rows=1, tokens=4096, offload=True)
    return made


# --------------------------------------------------------------------------------------------------------- measuring


def measure_one(case: Case) -> dict[str, Any]:
    """Through the session; full tuning and the ordinary path need what `step` does not have."""
    from onlay.model.fuse import Fused
    from onlay.training import session

    if case.name.endswith(ORDINARY):
        session.fuse = lambda *_, **__: Fused()  # type: ignore[assignment]
    if case.method == "full":
        _tune_whole()
    return step.measure(case)


def _tune_whole() -> None:
    """The recipe without an adapter's fields, and the base in float32, as it is loaded to be trained."""
    import torch

    from onlay.recipe import FullTuning

    plain_recipe, plain_base = step.recipe_of, step.get_base

    def recipe_of(case: Case) -> Any:
        recipe = plain_recipe(replace(case, method="lora"))
        return recipe.model_copy(update={"adapter": FullTuning(method="full")})

    def get_base(case: Case, recipe: Any, device: Any) -> Any:
        facts, base = plain_base(case, recipe, device)
        base.model.float()
        return facts, replace(base, weight_dtype=torch.float32)

    step.recipe_of, step.get_base = recipe_of, get_base


def run_cases(chosen: Sequence[Case], *, out: Path | None, timeout: float, budget: float, commit: str) -> None:
    began = time.monotonic()
    for case in chosen:
        if time.monotonic() - began > budget:
            print(f"{case.name}: left out, the time is used up", flush=True)
            continue
        words = [sys.executable, str(HERE / "forecast.py"), "--one", json.dumps(asdict(case))]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=timeout, check=False)
        except subprocess.TimeoutExpired:
            print(f"{case.name}: more than {timeout:.0f} s", flush=True)
            continue
        line = next((line for line in done.stdout.splitlines() if line.startswith(MARK)), None)
        if line is None:
            print(f"{case.name}: {(done.stderr.strip().splitlines() or ['no result'])[-1]}", flush=True)
            continue
        row = row_of(case, json.loads(line.removeprefix(MARK)), commit=commit)
        if out is not None:
            append_row(out, row)
        print(told(compare(row)), flush=True)


def row_of(case: Case, result: dict[str, Any], *, commit: str) -> dict[str, Any]:
    timed = slice(case.warmup, None)
    seconds = median(result["step_seconds"][timed])
    return {
        "case": case.name, "peak_gib": round(result["peak_gib"], 3), "step_seconds": round(seconds, 4),
        "tokens_per_second": round(median(result["step_tokens"][timed]) / seconds), "base_gib": round(result["base_gib"], 3),
        "reserved_gib": result.get("reserved_gib"), "context_gib": result.get("context_gib"),
        "recomputed": result["notes"].get("recompute"), "trainable": result["trainable"], "device": result["device"],
        "torch": result["versions"]["torch"], "transformers": result["versions"]["transformers"], "commit": commit,
        "settings": json.dumps({key: value for key, value in asdict(case).items() if key not in ("name", "system", "model")}),
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------------- forecasting


@dataclass(frozen=True, kw_only=True)
class Comparison:
    name: str
    device: str
    planned_gib: float
    peak_gib: float
    planned_seconds: float | None
    """None where the device is in no table."""
    seconds: float
    fitted: bool

    @property
    def memory_error(self) -> float:
        return self.planned_gib / self.peak_gib - 1

    @property
    def time_error(self) -> float | None:
        return None if self.planned_seconds is None else self.planned_seconds / self.seconds - 1


def shape_of(name: str) -> BaseShape:
    """Of a random base (bench/bases.py)."""
    with tempfile.TemporaryDirectory() as folder:
        config = wanted_layers(name) | {"model_type": "llama", "tie_word_embeddings": False}
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return replace(read_shape(folder), name=name, folder=None)


def plan_case(case: Case, *, device: str, fast_path: bool) -> tuple[float, float | None]:
    """Peak GiB, and seconds of a step, by the closed forms."""
    recipe = step.recipe_of(replace(case, method="lora") if case.method == "full" else case)
    section: Any = recipe.adapter
    if case.method == "full":
        from onlay.recipe import FullTuning

        section = FullTuning(method="full")
    gpus = read_gpus()
    known = next((gpu for gpu in gpus.values() if device.removeprefix("NVIDIA ") in (gpu.name, *gpu.aliases)), None)
    load = load_of(shape_of(case.shape), section, device_bytes=known.memory_bytes if known else None)
    lengths = row_lengths(case)
    steps = [lengths[i : i + case.rows] for i in range(0, len(lengths), case.rows)]
    longest = max(lengths)

    def pack(some: Sequence[int], budget: int) -> list[list[int]]:
        return plan_micro_batches(some, budget_tokens=budget, packed=True)

    cut = cut_steps(steps, budget_tokens=case.micro_tokens or WHOLE_GPU_TOKENS, gpus=case.gpus, pack=pack)
    most = max(longest, *(batch.tokens for batches in cut for batch in batches))
    setting = setting_of(case, load, micro_tokens=most, fast_path=fast_path and case.method != "full")
    peak = forecast_memory(load, setting, accumulates=any(len(batches) > 1 for batches in cut)).peak_bytes / 2**30
    if known is None:
        return peak, None
    return peak, median(step_seconds(load, setting, known, batches) for batches in cut[case.warmup :])


def setting_of(case: Case, load: Load, *, micro_tokens: int, fast_path: bool) -> Setting:
    count = load.layer.count
    first = {"none": 0, "auto": 0, "all": count}.get(case.recompute)
    first = int(case.recompute) if first is None else first
    return Setting(
        storage=case.storage, fp8_products="fp8" in (case.storage, case.compute), micro_tokens=micro_tokens,
        levels=("layer",) * first + ("none",) * (count - first), optimizer=case.optimizer, offload=case.offload, fast_path=fast_path,
    )  # fmt: skip


def compare(row: dict[str, Any]) -> Comparison:
    """A row of forecast.csv."""
    case = Case(**{"name": row["case"]} | json.loads(row["settings"]))
    planned, seconds = plan_case(case, device=row["device"], fast_path=not case.name.endswith(ORDINARY))
    return Comparison(
        name=case.name, device=row["device"], planned_gib=planned, peak_gib=float(row["peak_gib"]), planned_seconds=seconds,
        seconds=float(row["step_seconds"]), fitted=case.name in FITTED,
    )  # fmt: skip


def older(row: dict[str, Any]) -> Comparison | None:
    """A row of memory.csv; rows from before the fast path say nothing of what was recomputed.  DoRA has no closed form of its own."""
    if row["method"] == "dora" or row.get("limit_gib") or not row["peak_gib"]:
        return None
    case = Case(
        name=f"{row['shape']}-{row['storage']}-{row['recompute']}", shape=row["shape"], storage=row["storage"], method=row["method"],
        compute=row.get("compute") or "auto", rank=int(row["rank"]), dropout=float(row["dropout"]), targets=row.get("targets") or "all-linear",
        precision=row["precision"], optimizer=row["optimizer"], recompute=row["recompute"], offload=row["offload"] == "True",
        rows=int(row["rows"]), tokens=int(row["tokens_a_row"]), micro_tokens=int(row["micro_tokens"]) if row.get("micro_tokens") else None,
        steps=2, warmup=1,
    )  # fmt: skip
    fast = bool(row.get("recomputed"))
    if case.recompute == "auto" and row.get("recomputed") != "no layer":
        return None
    planned, seconds = plan_case(case, device=row["device"], fast_path=fast)
    name = f"{case.name}{'-offload' if case.offload else ''}{'' if fast else f'-{ORDINARY}'}"
    return Comparison(
        name=name, device=row["device"], planned_gib=planned, peak_gib=float(row["peak_gib"]), planned_seconds=seconds,
        seconds=case.rows * int(row["tokens_a_row"]) / float(row["tokens_per_second"]), fitted=name in FITTED,
    )  # fmt: skip


def of_throughput(row: dict[str, Any]) -> Comparison | None:
    """A row of throughput.csv that is onlay's own and whose layers all keep everything, or nothing."""
    if row["system"] != "onlay" or row["error"] or row["gpus"] != "1" or not row["peak_gib"]:
        return None
    case, notes = Case(**{"name": row["case"]} | json.loads(row["settings"])), json.loads(row["notes"])
    whole = "all but its input of"
    said = notes.get("recompute", "")
    if case.method == "dora" or not (said == "no layer" or (said.startswith(whole) and ";" not in said)):
        return None
    case = replace(
        case, micro_tokens=int(notes["micro_batch_tokens"]), recompute="none" if said == "no layer" else case.recompute
    )
    planned, seconds = plan_case(case, device=row["device"], fast_path="nothing" not in notes.get("fused", "nothing"))
    return Comparison(
        name=f"{case.name} (throughput)", device=row["device"], planned_gib=planned, peak_gib=float(row["peak_gib"]),
        planned_seconds=seconds, seconds=float(row["step_seconds"]), fitted=False,
    )  # fmt: skip


def comparisons() -> list[Comparison]:
    """Of all rows that are there; of a configuration that was measured several times, the latest."""
    found: dict[str, Comparison] = {}
    for name, read in (("forecast.csv", compare), ("throughput.csv", of_throughput), ("memory.csv", older)):
        for row in rows_of(RESULTS / name):
            one = read(row)
            if one is not None:
                found[
                    f"{name} {row.get('settings', '')} {one.name} {row.get('rows', '')} {row.get('tokens_a_row', '')}"
                ] = one
    return list(found.values())


def rows_of(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------------------------------------------------- table


def told(one: Comparison) -> str:
    time_error = "" if one.time_error is None else f", time {one.time_error:+.1%}"
    return f"{one.name}: {one.planned_gib:.2f} planned, {one.peak_gib:.2f} GiB measured, {one.memory_error:+.1%}{time_error}"


def table(rows: Iterable[Comparison]) -> str:
    """In Markdown, with the worst and the median of each error at the end; times that constants were fitted to are marked, and left
    out of those."""
    rows = list(rows)
    if not rows:
        return NOTHING
    lines = [
        "| configuration | planned GiB | measured | error | planned s | measured | error |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for one in rows:
        planned = "" if one.planned_seconds is None else f"{one.planned_seconds:.3f}"
        error = "" if one.time_error is None else f"{one.time_error:+.1%}{' (fitted)' if one.fitted else ''}"
        lines.append(
            f"| {one.name} | {one.planned_gib:.2f} | {one.peak_gib:.2f} | {one.memory_error:+.1%} | {planned} | {one.seconds:.3f} | {error} |"
        )
    memory = [abs(one.memory_error) for one in rows]
    times = [abs(one.time_error) for one in rows if one.time_error is not None and not one.fitted]
    lines += ["", f"Memory, {len(rows)} rows: worst {max(memory):.1%}, median {median(memory):.1%}."]
    if times:
        lines.append(
            f"Time, {len(times)} rows that nothing was fitted to: worst {max(times):.1%}, median {median(times):.1%}."
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="store_true", help="measure, each configuration in a process of its own")
    parser.add_argument("--only", help="configurations whose names hold one of these, with commas between")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--write", action="store_true", help="the table into docs/planning.md")
    parser.add_argument("--timeout", type=float, default=240.0)
    parser.add_argument("--budget-seconds", type=float, default=3600.0)
    parser.add_argument("--commit", help="where git is not at hand")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(MARK + json.dumps(measure_one(Case(**json.loads(arguments.one)))), flush=True)
        return
    wanted = arguments.only.split(",") if arguments.only else [""]
    chosen = [case for case in cases() if any(word in case.name for word in wanted)]
    if arguments.list:
        print("\n".join(case.name for case in chosen))
        return
    if arguments.run:
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        run_cases(
            chosen, out=arguments.out, timeout=arguments.timeout, budget=arguments.budget_seconds,
            commit=arguments.commit or git.stdout.strip(),
        )  # fmt: skip
        return
    made = table(comparisons())
    if arguments.write:
        text = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(
            BLOCK.sub(lambda _: f"<!-- measured: forecast -->\n{made}\n<!-- end -->", text), encoding="utf-8"
        )
    print(made)


if __name__ == "__main__":
    main()
