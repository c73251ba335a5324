"""Many processes at once, killed at random: the run of bench/registry.py, a few seconds long, in a process without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).parent.parent.parent


def test_killed_writers_lose_tear_and_double_nothing() -> None:
    command = [sys.executable, "bench/registry.py", "--seconds", "4", "--processes", "8"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    counts = json.loads(done.stdout)
    assert [counts[what] for what in ("lost", "torn", "duplicated", "astray", "litter")] == [0] * 5
    # That it was a trial at all: work was done, processes died in it, and versions came of it.
    assert counts["killed at work"] > 8
    assert min(counts[f"told: {what}"] for what in ("register", "promote", "rollback")) > 5
    assert counts["versions"] > 5
    assert counts["moves"] >= counts["told: promote"] + counts["told: rollback"]
