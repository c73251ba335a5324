"""Seconds of `onlay evaluate` for 1,000 generations, half by the base and half by the adapter, on this machine's CPU.

    python bench/evaluation.py [--clinc150 data_full.json] [--out bench/results/evaluation.json]

Two runs of the bundled base: the demo (its own support desk), and, where the file is given, intents of CLINC150 (Larson et
al. 2019) as short answers.  500 rows are asked of each.  Everything that `evaluate` does counts: loading, held-out loss,
general text, checks, safety prompts, comparisons, the page.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROWS = 500
CLINC_ROWS = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clinc150", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as folder, resources.as_file(resources.files("onlay") / "examples") as examples:
        os.environ["ONLAY_HOME"] = f"{folder}/home"
        desk = examples / "support.jsonl"
        recipe = (examples / "demo.yaml").read_text(encoding="utf-8")
        found.append(measure("demo", recipe, desk, Path(folder), data=str(desk)))
        if arguments.clinc150:
            rows = json.loads(arguments.clinc150.read_text(encoding="utf-8"))["train"]
            path = Path(folder) / "clinc150.jsonl"
            # Every so many of them: the file is sorted by intent.
            some = rows[:: max(1, len(rows) // CLINC_ROWS)][:CLINC_ROWS]
            path.write_text("".join(json.dumps({"prompt": text, "completion": label}) + "\n" for text, label in some))
            text = recipe.replace("format: messages", "format: auto").replace(
                "split: 0.1", f"split: {ROWS / len(some)}"
            )
            found.append(measure("clinc150", text, path, Path(folder)))
    if arguments.out:
        result = {
            "command": "bench/evaluation.py --clinc150 data_full.json", "rows": found, "cores": os.cpu_count(),
            "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        }  # fmt: skip
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def measure(name: str, recipe: str, rows: Path, folder: Path, *, data: str | None = None) -> dict[str, Any]:
    from onlay import stages

    path = folder / f"{name}.yaml"
    path.write_text(recipe, encoding="utf-8")
    run = stages.train(path, overrides=[f"data.train={rows}", f"training.output={folder / name}", "training.epochs=1"])
    began = time.perf_counter()
    made = stages.evaluate(run.path, data=data, overrides=[f"evaluation.answer_rows={ROWS}"])
    seconds = time.perf_counter() - began
    answers = (Path(made.path) / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    row = {
        "data": name, "generations": 2 * made.rows, "evaluate_seconds": round(seconds, 1),
        "answer_characters": sum(len(text) for line in answers for text in json.loads(line)["answers"].values()),
        "scores": made.scores,
    }  # fmt: skip
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()
