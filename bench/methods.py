"""Every method at demo length: the bundled base on the bundled support desk, held-out loss, exact match, time, memory.

    python bench/methods.py [--methods lora,dora] [--rates 1e-3,3e-3] [--out bench/results/methods.csv]

One run a method and learning rate; each in a process of its own, so that peak memory is the run's.  A row is written as
soon as it is measured.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

METHODS = {
    "lora": {},
    "lora, nf4 base (QLoRA)": {"model.storage": "nf4"},
    "lora, int8 base": {"model.storage": "int8"},
    "rslora": {"adapter.method": "rslora"},
    "dora": {"adapter.method": "dora"},
    "lora+": {"adapter.method": "lora+"},
    "pissa": {"adapter.method": "pissa"},
    "loftq, nf4 base": {"adapter.method": "loftq", "model.storage": "nf4"},
    "full": {"adapter.method": "full"},
}
RATES = {"lora+": 1.0e-3, "full": 1.0e-3, "pissa": 1.0e-3}
"""Where the demo's own rate is not the method's: B of lora+ learns 16 times as fast, and these move large weights."""
DEMO_RATE = 3.0e-3
FIELDS = [
    "method", "learning_rate", "evaluation_loss", "base_evaluation_loss", "exact_match", "trainable_parameters",
    "loop_seconds", "peak_memory_mib", "cores", "torch", "peft", "machine",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", help="names, separated by semicolons; default: all")
    parser.add_argument("--rates", help="learning rates to try for each instead of the one rate")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(**json.loads(arguments.one))))
        return
    rows = []
    for name in arguments.methods.split(";") if arguments.methods else METHODS:
        rates = [float(r) for r in arguments.rates.split(",")] if arguments.rates else [RATES.get(name, DEMO_RATE)]
        for rate in rates:
            task = json.dumps({"name": name, "rate": rate})
            done = subprocess.run(
                [sys.executable, __file__, "--one", task], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise SystemExit(f"{name}: {done.stderr[-2000:]}")
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
            if arguments.out:
                with arguments.out.open("w", newline="", encoding="utf-8") as out:
                    writer = csv.DictWriter(out, FIELDS)
                    writer.writeheader()
                    writer.writerows(rows)


def measure(name: str, rate: float) -> dict[str, object]:
    import onlay
    from onlay.evaluation.scores import exact_match
    from onlay.generation.engine import Sampling
    from onlay.stages import held_out_rows, open_run

    package = Path(onlay.__file__).parent / "examples"
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ONLAY_HOME"] = f"{folder}/home"
        overrides = METHODS[name] | {
            "data.train": package / "support.jsonl", "training.output": f"{folder}/run", "training.learning_rate": rate,
        }  # fmt: skip
        lines = (package / "demo.yaml").read_text(encoding="utf-8").splitlines()
        if name == "full":  # it has no other adapter field
            lines = [line for line in lines if not line.startswith(("  rank:", "  targets:"))]
        path = Path(folder) / "demo.yaml"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        run = onlay.train(path, overrides=[f"{key}={value}" for key, value in overrides.items()])
        loaded = open_run(run.path)
        rows = held_out_rows(loaded.dataset)
        expected = [row.turns[-1].content for row in rows]
        longest = max(len(loaded.tokenizer(text)["input_ids"]) for text in expected)
        answers = loaded.answer([row.turns[:-1] for row in rows], sampling=Sampling(max_new_tokens=longest + 8))
        return {
            "method": name, "learning_rate": rate, "evaluation_loss": round(run.evaluation_loss or 0.0, 4),
            "base_evaluation_loss": round(run.base_evaluation_loss or 0.0, 4),
            "exact_match": exact_match(answers, expected), "trainable_parameters": run.trainable_parameters,
            "loop_seconds": round(run.seconds, 1), "peak_memory_mib": round((run.peak_memory_bytes or 0) / 2**20),
            "cores": os.cpu_count(), "torch": version("torch"), "peft": version("peft"), "machine": platform.machine(),
        }  # fmt: skip


if __name__ == "__main__":
    main()
