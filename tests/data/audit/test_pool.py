"""Worker processes: whose signals they get, and when they end."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from onlay.data.audit.pool import Pool

MAIN = """
import sys, time
from onlay.data.audit.pool import Pool
pool = Pool(2)
pool._start()
print(*(worker.process.pid for worker in pool._started), flush=True)
time.sleep(60)
"""


def test_ctrl_c_in_a_terminal_does_not_reach_the_workers_while_they_start() -> None:
    with Pool(2) as pool:
        pool._start()
        groups = {os.getpgid(worker.process.pid) for worker in pool._started}
    assert len(groups) == 2 and os.getpgid(0) not in groups


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_end_with_the_main_process_however_it_ends() -> None:
    with subprocess.Popen([sys.executable, "-c", MAIN], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        workers = [int(word) for word in process.stdout.readline().split()]
        process.kill()
    assert len(workers) == 2
    deadline = time.monotonic() + 30
    while any(map(_runs, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_runs, workers))


def _runs(pid: int) -> bool:
    """Whether it is there, and no more than an entry that nobody has asked for yet."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
