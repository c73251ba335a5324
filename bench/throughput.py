"""Tokens a second and peak memory of the training step, onlay's and its peers', one process each, in one run on one machine.

    python bench/throughput.py --model FOLDER --make-model [--only nf4,fp8] [--systems onlay,unsloth] [--out bench/results/throughput.csv]
    python bench/throughput.py --shape tiny --device cpu      the same on a CPU, with a base of a few thousand weights
    python bench/throughput.py --list                         the names of the configurations

One optimizer step is 8 rows of 2,048 random tokens where a configuration says nothing else; the median of the timed steps
counts.  `--make-model` writes a random 8B checkpoint into FOLDER first; without `--model` onlay makes its base in memory and
peers cannot run.  Peers run with the settings that are fastest (or smallest, where memory is the question) for them.
A process that fails is a row with its last error; the exit code is 1 where first losses do not agree.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

from bases import SHAPES, wanted_layers
from step import LENGTHS, MARK, Case, append_row, row_lengths

HERE = Path(__file__).parent
SYSTEMS = ("onlay", "unsloth", "trl+liger", "axolotl", "trl")
PEAKS = {"NVIDIA H200": (813e12, 1555e12)}
"""FLOP/s of a large matrix product in bf16 and in FP8 (rowwise scales), as measured there; other devices get no share."""
UNRELATED_NATS = 1.28 * 2**0.5
"""Divided by the square root of the tokens: how far the mean losses of two unrelated random models are apart, whose logits
have a standard deviation of 1.28 (a hidden width of 4,096 and weights of 0.02)."""
ROUNDING_NATS = 0.04
"""Likewise, of two correct bf16 forwards of one model: 32 layers round hidden states by about 3 %."""
FP8_NATS = 0.2
"""Likewise, of an FP8 and a bf16 forward: both operands of each product are rounded by 2 to 3 %."""


def cases() -> list[Case]:
    """All configurations, those that matter most first; a name stands for one piece of work."""
    nf4, none, recomputed = Case(storage="nf4"), {"recompute": "none"}, {"recompute": "all"}
    made: list[Case] = []

    def add(name: str, case: Case, *systems: tuple[str, dict[str, Any]], ours: dict[str, Any] | None = None) -> None:
        if ours is not None:
            made.append(replace(case, name=name, system="onlay", **ours))
        made.extend(replace(case, name=name, system=system, **settings) for system, settings in systems)

    add("nf4", nf4, ("unsloth", none), ("trl+liger", none), ("axolotl", none), ours={})
    add("bf16", Case(), ("unsloth", none), ("trl+liger", none), ("axolotl", none), ours={})
    add("fp8", Case(storage="fp8"), ours={})
    add("nf4-fp8-products", replace(nf4, compute="fp8"), ours={})
    add(
        "nf4-24gib", replace(nf4, limit_gib=23.4),
        ("unsloth", {"recompute": "offload"}), ("unsloth", none | {"micro_tokens": 4096}), ("trl+liger", recomputed),
        ("axolotl", recomputed), ("onlay", {"micro_tokens": 4096}), ours={},
    )  # fmt: skip
    add("nf4-least-memory", replace(nf4, rows=1, optimizer="paged_adamw_8bit"), ("unsloth", {"recompute": "offload"}),
        ours={"recompute": "all", "offload": True, "precision": "bf16"})  # fmt: skip
    real = replace(nf4, rows=96, tokens=None)
    packed = {"rows": 8, "pack_tokens": 2048}
    one_pass = {"micro_tokens": 20480}
    add("gsm8k-nf4", real, ("unsloth", none | packed), ("trl+liger", none | packed), ours=one_pass)
    add("gsm8k-fp8", replace(real, storage="fp8"), ours=one_pass)
    add("nf4-recompute", nf4, ("unsloth", {"recompute": "offload"}), ("trl+liger", recomputed), ("trl", recomputed), ours=recomputed)  # fmt: skip
    add("bf16-recompute", Case(), ("trl+liger", recomputed), ours=recomputed)
    add("nf4-qv", replace(nf4, targets="qv"), ("unsloth", none), ours={})
    add("nf4-qv-dropout", replace(nf4, targets="qv", dropout=0.05), ("unsloth", none), ("trl+liger", none), ours={})
    add("nf4-dropout", replace(nf4, dropout=0.05), ("unsloth", none), ours={})
    add("nf4-1row", replace(nf4, rows=1), ("unsloth", none), ours={})
    add("fp8-1row", Case(storage="fp8", rows=1), ours={})
    add("gsm8k-16", replace(real, rows=16), ("unsloth", none), ("trl+liger", none), ours={})
    return made


def several_gpus(gpus: int) -> list[Case]:
    """As many rows on each GPU as on one alone."""
    one = Case(name="bf16-1gpu", storage="bf16")
    return [one, replace(one, name=f"bf16-{gpus}gpus", gpus=gpus, rows=gpus * one.rows)]


def tiny(case: Case) -> Case:
    """The same on a CPU within a second: a few short rows on the tiny base."""
    smaller = {
        "shape": "tiny", "device": "cpu", "rows": 2, "tokens": case.tokens and 32, "limit_gib": None, "optimizer": "adamw",
        "offload": False, "gpus": 1, "micro_tokens": case.micro_tokens and 512,
    }  # fmt: skip
    return replace(case, **smaller)


# --------------------------------------------------------------------------------------------------------- one process


def run_case(case: Case, *, timeout: float, packages: Path | None = None) -> dict[str, Any]:
    """What the process found, or {"error": its last error}.  `packages`: a folder of packages that only peers see."""
    ours = case.system == "onlay"
    script = HERE / ("step.py" if ours else "peer_step.py")
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.gpus)] if case.gpus > 1 else []
    )
    command = [sys.executable, *launcher, str(script), json.dumps(asdict(case))]
    folders = [
        str(HERE.parent),
        os.environ.get("PYTHONPATH", ""),
        "" if ours or packages is None else str(packages.resolve()),
    ]
    path = os.pathsep.join(filter(None, folders))
    began = time.time()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"PYTHONPATH": path}, cwd=tempfile.gettempdir(),  # Unsloth writes into the current folder.
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # A group of its own: what a launcher started is in it.
        process.communicate()
        return {"error": f"not done after {timeout:.0f} s", "seconds": time.time() - began}
    found = [line for line in out.splitlines() if line.startswith(MARK)]
    result: dict[str, Any] = {"seconds": time.time() - began}
    if process.returncode != 0 or not found:
        return result | {"error": last_error(err) or f"exit code {process.returncode} without a word"}
    result |= json.loads(found[-1][len(MARK) :])
    return result | {"first_step_seconds": result.pop("first_step_at") - began}


def last_error(text: str) -> str:
    """The last line that names an error, else the last one that says anything."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return (named or lines or [""])[-1][:300]


# --------------------------------------------------------------------------------------------------------------- a row


def row_of(case: Case, result: dict[str, Any], *, commit: str, run: str) -> dict[str, Any]:
    """One line of the CSV file; `run` is the time at which this list of cases began.  Tokens are real ones: padding is not counted."""
    row: dict[str, Any] = {
        "case": case.name, "system": case.system, "shape": case.shape, "storage": case.storage, "compute": case.compute,
        "recompute": case.recompute, "rows": case.rows, "tokens_a_row": case.tokens or "gsm8k lengths", "rank": case.rank,
        "dropout": case.dropout, "targets": case.targets, "gpus": case.gpus, "limit_gib": case.limit_gib,
    }  # fmt: skip
    timed = slice(case.warmup, None)
    failed = "error" in result
    if not failed:
        seconds = median(result["step_seconds"][timed])
        rates = [
            tokens / time
            for tokens, time in zip(result["step_tokens"][timed], result["step_seconds"][timed], strict=True)
        ]
        rate = median(rates)
    row |= {
        "tokens_a_step": None if failed else median(result["step_tokens"][timed]),
        "step_seconds": None if failed else round(seconds, 4),
        "tokens_per_second": None if failed else round(rate),
        "peak_gib": rounded(result.get("peak_gib"), 3), "reserved_gib": rounded(result.get("reserved_gib"), 3),
        "context_gib": rounded(result.get("context_gib"), 3),
        "share_of_ceiling": None if failed else rounded(share_of_ceiling(case, rate, device=result["device"]), 3),
        "first_loss": None if failed else round(result["losses"][0], 5),
        "losses": json.dumps([round(loss, 5) for loss in result.get("losses", [])]),
        "steps": json.dumps([round(one, 4) for one in result.get("step_seconds", [])]),
        "load_seconds": rounded(result.get("load_seconds"), 2), "first_step_seconds": rounded(result.get("first_step_seconds"), 2),
        "process_seconds": rounded(result.get("seconds"), 1), "error": result.get("error", ""),
        "settings": json.dumps({key: value for key, value in asdict(case).items() if key not in ("name", "system", "model")}),
        "notes": json.dumps(result.get("notes", {})), "device": result.get("device"),
        "versions": json.dumps(result.get("versions", {})), "commit": commit, "run": run,
    }  # fmt: skip
    return row


def rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def share_of_ceiling(case: Case, tokens_per_second: float, *, device: str) -> float | None:
    """Seconds that the products would take at the device's peak, over the seconds that they took; None where it is not known.

    A frozen linear layer of N weights costs 4 N FLOPs a token, forward and backward without a weight gradient, and 2 N more
    where it is recomputed; causal attention over L tokens 7 L^2 times the heads' width (2 forward, 5 backward), and 2 more.
    The head and attention are counted at bf16's peak.  What a system decides to recompute by itself is not counted as work.
    """
    if device not in PEAKS:
        return None
    bf16, fp8 = PEAKS[device]
    sizes = wanted_layers(case.shape)
    hidden, layers = sizes["hidden_size"], sizes["num_hidden_layers"]
    keys = hidden // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    body = layers * (2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * sizes["intermediate_size"])
    again = {"all": 1.0, "offload": 1.0}.get(case.recompute, 0.0)
    if case.recompute.isdigit():
        again = int(case.recompute) / layers
    lengths = row_lengths(case)
    attention = layers * hidden * sum(length * length for length in lengths) / sum(lengths)
    fast = fp8 if "fp8" in (case.storage, case.compute) else bf16
    seconds = (4 + 2 * again) * body / fast + (4 * sizes["vocab_size"] * hidden + (7 + 2 * again) * attention) / bf16
    return tokens_per_second * seconds / case.gpus


# ----------------------------------------------------------------------------------------------------------- agreement


def loss_limit(row: dict[str, Any], *, same_rows: bool) -> float:
    """Nats that two first losses may be apart.

    Same rows: halfway, on a logarithmic scale, between what rounding does and what a wrong forward does (FP8: four standard
    errors of its rounding, as there is little between the two).  Other rows, chosen by a peer's packer: four standard errors.
    """
    if not same_rows:
        nats = 4 * UNRELATED_NATS
    elif "fp8" in (row["storage"], row["compute"]):
        nats = 4 * FP8_NATS
    else:
        nats = math.sqrt(UNRELATED_NATS * ROUNDING_NATS)
    return nats / math.sqrt(float(row["tokens_a_step"]))


def disagreements(rows: Sequence[dict[str, Any]]) -> list[str]:
    """First losses against a peer's on the same tokens and weights, in words; empty where all agree.

    B is zero at first, so the first loss is the base's.  The reference is TRL's, else Unsloth's, in the same storage (bf16's for
    an FP8 base), of the same rows where there are such.
    """
    done = [row for row in rows if row["first_loss"] not in (None, "")]
    found: list[str] = []
    for row in done:
        storage = "bf16" if row["storage"] == "fp8" else row["storage"]
        like = [
            other for system in ("trl+liger", "trl", "unsloth", "axolotl") for other in done
            if other["system"] == system and other["storage"] == storage and other["tokens_a_row"] == row["tokens_a_row"]
        ]  # fmt: skip
        if not like:
            continue
        same = [other for other in like if other["rows"] == row["rows"]]
        other = (same or like)[0]
        limit = loss_limit(row, same_rows=bool(same))
        apart = abs(float(row["first_loss"]) - float(other["first_loss"]))
        if not apart <= limit:
            found.append(
                f"{row['case']}: {row['system']} begins at {row['first_loss']}, {other['system']} ({other['case']}) at "
                f"{other['first_loss']}: {apart:.4f} nats apart, allowed {limit:.4f}"
            )
    return found


# ---------------------------------------------------------------------------------------------------------------- main


def run_cases(
    chosen: Iterable[Case], *, out: Path | None, timeout: float, budget: float | None, commit: str, packages: Path | None = None
) -> list[dict[str, Any]]:  # fmt: skip
    """Runs them one after the other; prints and appends a row as soon as it is there, and says what time did not allow."""
    began, run = time.perf_counter(), time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
    waiting = list(chosen)
    rows: list[dict[str, Any]] = []
    while waiting:
        left = None if budget is None else budget - (time.perf_counter() - began)
        if left is not None and left <= 0:
            print(
                f"not run for want of time: {'; '.join(f'{case.name} ({case.system})' for case in waiting)}", flush=True
            )
            break
        case = waiting.pop(0)
        row = row_of(
            case, run_case(case, timeout=min(timeout, left or timeout), packages=packages), commit=commit, run=run
        )
        rows.append(row)
        if out is not None:
            append_row(out, row)
        print(line_of(row), flush=True)
    return rows


def line_of(row: dict[str, Any]) -> str:
    head = f"{row['case']:<24} {row['system']:<10}"
    if row["error"]:
        return f"{head} failed after {row['process_seconds']} s: {row['error']}"
    share = "" if row["share_of_ceiling"] is None else f"{row['share_of_ceiling']:.0%} of the ceiling, "
    return (
        f"{head} {row['tokens_per_second']:>7,} tokens/s  {row['step_seconds']:.3f} s a step  {row['peak_gib']:.2f} GiB  {share}"
        f"first loss {row['first_loss']}, loaded in {row['load_seconds']} s, first step done after {row['first_step_seconds']} s"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `choose` and `run_cases` need beside the checkpoint."""
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", help="names of configurations, separated by commas; default: all")
    parser.add_argument("--systems", help=f"of {', '.join(SYSTEMS)}; default: all")
    parser.add_argument("--steps", type=int, default=4, help="that are timed")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--timeout", type=float, default=180.0, help="seconds for one process")
    parser.add_argument("--budget-seconds", type=float, help="what is left of the list after this time is dropped")
    parser.add_argument("--commit", help="where git is not at hand")
    parser.add_argument(
        "--peer-packages", type=Path, help="folder of the peers' packages, seen by their processes alone"
    )
    parser.add_argument("--list", action="store_true", help="only list the configurations")


def choose(every: list[Case], arguments: argparse.Namespace) -> list[Case]:
    """The cases asked for, with the model, shape and steps asked for.  Exits with a message on a name that there is not."""
    systems = SYSTEMS if arguments.systems is None else tuple(arguments.systems.split(","))
    for system in systems:
        if system not in SYSTEMS:
            sys.exit(f"--systems: {system} is not one of {', '.join(SYSTEMS)}")
    names = list(dict.fromkeys(case.name for case in every))
    wanted = names if arguments.only is None else arguments.only.split(",")
    for name in wanted:
        if name not in names:
            sys.exit(f"--only: {name} is not one of {', '.join(names)}")
    chosen = [case for case in every if case.name in wanted and case.system in systems]
    common = {
        "steps": arguments.steps,
        "warmup": arguments.warmup,
        "shape": arguments.shape,
        "device": arguments.device,
    }
    model = None if arguments.model is None else str(arguments.model.resolve())
    chosen = [replace(case, model=model, **common) for case in chosen]
    if arguments.device == "cpu":
        left_out = sorted({case.system for case in chosen} - {"onlay"})
        if left_out:
            print(f"on a CPU these cannot run: {', '.join(left_out)}", flush=True)
        chosen = [tiny(case) for case in chosen if case.system == "onlay"]
    return chosen


def prepare(arguments: argparse.Namespace) -> str:
    """Writes the checkpoint where that is asked for; returns the commit."""
    if arguments.make_model:
        if arguments.model is None:
            sys.exit("--make-model needs --model FOLDER")
        if not (arguments.model / "config.json").is_file():
            # In a process of its own: this one must hold no memory of the GPU.
            code = "import sys; from pathlib import Path; from bases import write_base; write_base(Path(sys.argv[1]), sys.argv[2], device=sys.argv[3])"
            subprocess.run([sys.executable, "-c", code, str(arguments.model), arguments.shape, arguments.device], cwd=HERE, check=True)  # fmt: skip
    if arguments.commit:
        return str(arguments.commit)
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False)
    return git.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of the checkpoint that all systems load")
    parser.add_argument("--make-model", action="store_true", help="write a random one there where there is none")
    add_arguments(parser)
    parser.add_argument("--gpus", type=int, default=1, help="onlay alone on one GPU and on so many, data parallel")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    chosen = choose(several_gpus(arguments.gpus) if arguments.gpus > 1 else cases(), arguments)
    if arguments.list:
        print("\n".join(f"{case.name:<24} {case.system}" for case in chosen))
        return
    if not LENGTHS.is_file():
        sys.exit(f"{LENGTHS} is missing")
    commit = prepare(arguments)
    rows = run_cases(
        chosen, out=arguments.out, timeout=arguments.timeout, budget=arguments.budget_seconds, commit=commit,
        packages=arguments.peer_packages,
    )  # fmt: skip
    found = disagreements(rows)
    print(
        "\n".join(["first losses do NOT agree:", *found]) if found else "no first loss disagrees with a peer's",
        flush=True,
    )
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
