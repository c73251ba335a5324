"""Auditing a million rows: seconds, and peak memory of all its processes together, through the command line.

python bench/data.py [--rows 1000000] [--workers N] [--out bench/results/data.json]

The rows are made here from a seed: questions and answers of a support desk in sentences of a vocabulary that is drawn by
Zipf's law, 300 bytes a row, with names, numbers, addresses and such mixed in.  One row in a hundred repeats an earlier one
exactly, one in a hundred nearly; what the audit counts is compared with that.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any

LIMIT_SECONDS, LIMIT_BYTES = 240.0, 2 << 30
CONSONANTS, VOWELS = "bdfgklmnprstv", "aeo"
FREQUENT = """
the of to and a in is it you that for on are with as this be at have from or one had by but not what all were we when your
can said there use an each which do how their if will up other about out many then them these so some her would make like him
into time has look two more write go see number no way could people my than first been call who its now find long down day
did get come made may part
"""
DOMAINS = ("billing", "shipping", "returns", "account", "product", "warranty")
NAMES = ("Anna Keller", "James Porter", "Maria Lopez", "Wei Chen", "Olu Adeyemi", "Priya Nair", "Tom Baker")


def make_rows(path: Path, rows: int, *, seed: int = 0) -> dict[str, int]:
    """Writes `rows` rows; how many were planted of each finding's code."""
    draw = random.Random(seed)
    syllables = [consonant + vowel for consonant in CONSONANTS for vowel in VOWELS]
    rare = {"".join(draw.choices(syllables, k=draw.randint(2, 4))) for _ in range(8000)}
    vocabulary = FREQUENT.split() + sorted(rare)
    weights = list(accumulate(1 / (rank + 2) for rank in range(len(vocabulary))))
    planted = {"duplicates_exact": 0, "duplicates_near": 0, "personal_email": 0}
    kept: list[dict[str, str]] = []
    with path.open("w", encoding="utf-8") as out:
        for number in range(rows):
            kind = draw.random()
            if kind < 0.02 and len(kept) > 100:
                values = dict(draw.choice(kept))
                if kind < 0.01:
                    planted["duplicates_exact"] += 1
                else:
                    values["completion"] += f" {draw.choice(vocabulary)}."
                    planted["duplicates_near"] += 1
            else:
                values = _row(draw, vocabulary, weights, number, planted)
                if number % 97 == 0:
                    kept.append(values)
            out.write(json.dumps(values) + "\n")
    return planted


def _row(
    draw: random.Random, vocabulary: list[str], weights: list[float], number: int, planted: dict[str, int]
) -> dict[str, str]:
    words = draw.choices(vocabulary, cum_weights=weights, k=41)
    prompt, answer = _sentences(draw, words[:15]), _sentences(draw, words[15:])
    extra = draw.random()
    if extra < 0.3:
        prompt += f" My order number is {number}, placed on {draw.randint(1, 28)} March."
    elif extra < 0.4:
        prompt += f" My name is {draw.choice(NAMES)}."
    elif extra < 0.41:
        prompt += f" Write to {draw.choice(vocabulary)}{number}@mail.example.org."
        planted["personal_email"] += 1
    return {"domain": draw.choice(DOMAINS), "prompt": prompt, "completion": answer}


def _sentences(draw: random.Random, words: list[str]) -> str:
    parts, at = [], 0
    while at < len(words):
        length = draw.randint(6, 12)
        parts.append(" ".join(words[at : at + length]).capitalize())
        at += length
    return ". ".join(parts) + "."


def measure(data: Path, folder: Path, workers: int | None) -> dict[str, Any]:
    """Runs `onlay audit` on a file, in a process of its own, and watches it and its children."""
    output = folder / "audit.json"
    command = [sys.executable, "-m", "onlay.cli", "audit", str(data), "--rows", "5", "--json"]
    command += ["--workers", str(workers)] if workers is not None else []
    began = time.perf_counter()
    with output.open("w") as out:
        process = subprocess.Popen(command, stdout=out, env=os.environ | {"ONLAY_HOME": str(folder / "home")})
        peak = 0
        while process.poll() is None:
            peak = max(peak, resident_bytes(process.pid))
            time.sleep(0.1)
    seconds = time.perf_counter() - began
    if process.returncode not in (0, 1):
        raise SystemExit(f"onlay audit exited with {process.returncode}")
    found = json.loads(output.read_text())
    return {
        "seconds": round(seconds, 1), "peak_memory_bytes": peak, "rows": found["rows"],
        "findings": {one["code"]: one["count"] for one in found["findings"]},
    }  # fmt: skip


def resident_bytes(pid: int) -> int:
    """Of a process and all below it.  Shared pages count once for each, so this is an upper bound."""
    total = 0
    waiting = [pid]
    while waiting:
        one = waiting.pop()
        try:
            total += int(Path(f"/proc/{one}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            for task in Path(f"/proc/{one}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):
            continue  # It ended meanwhile.
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        planted = make_rows(data, arguments.rows)
        result = measure(data, Path(folder), arguments.workers)
        result["file_megabytes"] = round(data.stat().st_size / 1e6, 1)
    result["planted"] = planted
    given = "".join(
        f" --{name} {value}" for name, value in vars(arguments).items() if value is not None and name != "out"
    )
    names = ("onlay", "numpy", "rensa", "pydantic")
    result |= {
        "command": f"bench/data.py{given}",
        "cores": len(os.sched_getaffinity(0)),
        "platform": platform.platform(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in names},
    }
    within = result["seconds"] <= LIMIT_SECONDS and result["peak_memory_bytes"] <= LIMIT_BYTES
    result["within_limits"] = within if arguments.rows == 1_000_000 else None
    print(json.dumps(result, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
