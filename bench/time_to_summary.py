"""Seconds from command to summary: 720 rows of GSM8K, one epoch, stories260K, rank 16 all-linear, on this machine's CPU.

    python bench/time_to_summary.py --data train.jsonl --base FOLDER [--repeat 3] [--out bench/results/time_to_summary.json]

Each repetition is a new process with an empty cache, as for a user's first run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--base", required=True)
    parser.add_argument("--rows", type=int, default=720)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    recipe = Path(__file__).parent.parent / "recipes" / "gsm8k.yaml"
    seconds, runs = [], []
    for _ in range(arguments.repeat):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "onlay.cli", "train", str(recipe), "--json"]
            fields = {
                "data.train": arguments.data, "model.base": arguments.base, "data.max_rows": arguments.rows,
                "training.output": f"{folder}/run",
            }  # fmt: skip
            for field, value in fields.items():
                command += ["--set", f"{field}={value}"]
            began = time.perf_counter()
            done = subprocess.run(
                command, env=os.environ | {"ONLAY_HOME": f"{folder}/home"}, capture_output=True, text=True, check=True
            )
            seconds.append(round(time.perf_counter() - began, 2))
            runs.append(json.loads(done.stdout))
            print(f"{seconds[-1]:.1f} s, of which the loop {runs[-1]['seconds']:.1f} s", flush=True)
    if arguments.out:
        result = {
            "command": f"bench/time_to_summary.py --rows {arguments.rows}", "seconds": seconds,
            "loop_seconds": [round(run["seconds"], 2) for run in runs], "first_loss": runs[0]["first_loss"],
            "evaluation_loss": [runs[0]["base_evaluation_loss"], runs[0]["evaluation_loss"]],
            "cores": os.cpu_count(), "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        }  # fmt: skip
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
