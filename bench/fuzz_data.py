"""Malformed data files through the readers and the audit: never a traceback, always file and row, no row lost uncounted.

python bench/fuzz_data.py [--examples 20000] [--seed 0] [--out bench/results/fuzz_data.json]

The files and what must hold for them are those of tests/data/audit/fuzzing.py; exits 1 when any example fails, and prints
the smallest file of each failure.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hypothesis
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.data.audit import fuzzing

BATCH = 2500
"""Examples of one run of hypothesis; each has a seed of its own, so that they differ."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    began = time.perf_counter()
    counts: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    different: set[bytes] = set()
    failures: dict[str, fuzzing.Case] = {}
    with tempfile.TemporaryDirectory() as folder:

        def examine(case: fuzzing.Case) -> None:
            counts["examples"] += 1
            kinds[case.name.partition(".")[2]] += 1
            different.add(case.name.encode() + case.data)
            try:
                outcome = fuzzing.check(case, Path(folder))
            except Exception as error:  # noqa: BLE001 - whatever is raised is what is looked for
                place = traceback.extract_tb(error.__traceback__)[-1]
                name = f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}"
                counts["failures"] += 1
                if name not in failures or len(case.data) < len(failures[name].data):
                    failures[name] = case
                return
            counts["rows_read"] += outcome.rows
            counts["rows_counted_as_bad"] += outcome.bad - outcome.ended
            counts["files_that_ended_early"] += outcome.ended
            counts["files_refused_as_a_whole"] += outcome.refused
            counts["files_with_a_known_number_of_rows"] += case.rows is not None

        for number in range(-(-arguments.examples // BATCH)):
            size = min(BATCH, arguments.examples - number * BATCH)
            run = given(case=fuzzing.CASES)(examine)
            run = settings(max_examples=size, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))(run)  # fmt: skip
            seed(arguments.seed * 1_000_003 + number)(run)()
    result = {
        "command": " ".join(["python", *sys.argv]), "python": platform.python_version(), "hypothesis": hypothesis.__version__,
        "seconds": round(time.perf_counter() - began, 1), "different_files": len(different), **dict(sorted(counts.items())),
        "failures": counts["failures"], "kinds": dict(sorted(kinds.items())),
    }  # fmt: skip
    print(json.dumps(result, indent=2))
    for name, case in failures.items():
        print(
            f"\n{name}\n  {case.name} format={case.format} rows={case.rows} ended={case.ended}\n  {case.data[:600]!r}"
        )
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
