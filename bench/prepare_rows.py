"""Preparing many rows: seconds and peak memory, in a process of its own, first and again from the cache.

python bench/prepare_rows.py [--rows 100000] [--out bench/results/prepare_rows.json]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHILD = """
import resource, sys, time, json
from onlay import stages
from onlay.recipe import parse_recipe
recipe = parse_recipe({"model": {"base": "pocket"}, "data": {"train": sys.argv[1]}})
import torch, transformers
from onlay.model.tokenizer import load_tokenizer
began = time.perf_counter()
source = stages.look(recipe)
load_tokenizer(source.facts)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
prepared = stages.prepare_source(source)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": round(time.perf_counter() - began, 1), "memory_before_bytes": before, "peak_memory_bytes": peak,
                  "train_tokens": prepared.dataset.splits["train"].tokens}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    words = [
        "copper",
        "lantern",
        "river",
        "orchard",
        "window",
        "letter",
        "number",
        "seven",
        "twelve",
        "north",
        "harbour",
        "ticket",
        "garden",
        "stone",
        "paper",
    ]
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        with data.open("w", encoding="utf-8") as out:
            for number in range(arguments.rows):
                prompt = " ".join(rng.choices(words, k=40)) + f" {number}"
                out.write(json.dumps({"prompt": prompt, "completion": " ".join(rng.choices(words, k=30))}) + "\n")
        results = []
        for _ in range(2):
            began = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", CHILD, str(data)], env=os.environ | {"ONLAY_HOME": f"{folder}/home"},
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            results.append(json.loads(done.stdout) | {"process_seconds": round(time.perf_counter() - began, 1)})
            print(results[-1], flush=True)
        megabytes = data.stat().st_size / 1e6
    if arguments.out:
        result = {
            "command": f"bench/prepare_rows.py --rows {arguments.rows}", "file_megabytes": round(megabytes, 1),
            "first": results[0], "cached": results[1], "cores": os.cpu_count(),
            "machine_memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        }  # fmt: skip
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"children's peak {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
