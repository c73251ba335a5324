"""Training in a real terminal: a bar that says how it goes, and Ctrl-C that saves."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

from onlay.records import Run
from onlay.stages import train
from tests.builders import save_tiny_base, write_rows

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07")
BAR = re.compile(r"training [━╸╺ ]+ (\d+)/200 +loss \d+\.\d{4}  [\d,]+ tokens/s  \d+\.\d GiB (\d+:)?\d\d:\d\d")
GIVE_UP_SECONDS = 90


class Terminal:
    """A process on a pseudo-terminal of 80 x 24, as a user's shell would start it."""

    def __init__(self, command: list[str], *, cwd: Path) -> None:
        self.ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        environment = {
            name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")
        }
        environment |= {"TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}

        def own_terminal() -> None:
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            command, cwd=cwd, env=environment, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=own_terminal
        )
        os.close(theirs)
        self.text = ""

    def read_until(self, pattern: re.Pattern[str]) -> re.Match[str]:
        give_up = time.monotonic() + GIVE_UP_SECONDS
        while time.monotonic() < give_up:
            if found := pattern.search(self.text):
                return found
            if not self._read(1.0):
                break
        raise AssertionError(f"{pattern.pattern} did not appear in:\n{self.text[-3000:]}")

    def type(self, keys: bytes) -> None:
        os.write(self.ours, keys)

    def wait(self) -> int:
        while self._read(GIVE_UP_SECONDS):
            pass
        os.close(self.ours)
        return self.process.wait(GIVE_UP_SECONDS)

    def _read(self, seconds: float) -> bool:
        if not select.select([self.ours], [], [], seconds)[0]:
            return True
        try:
            piece = os.read(self.ours, 65536)
        except OSError:  # how Linux says that the other end is closed
            return False
        self.text += ESCAPES.sub("", piece.decode(errors="replace"))
        return bool(piece)


def test_the_bar_and_ctrl_c(tmp_path: Path) -> None:
    save_tiny_base(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl", 30)
    (tmp_path / "small.yaml").write_text(
        "model: {base: base}\ndata: {train: rows.jsonl}\nadapter: {rank: 4}\n"
        "training: {max_steps: 200, batch_size: 2, output: run, checkpoint_steps: 1000}\nevaluation: {split: null}\n"
    )
    terminal = Terminal([sys.executable, "-m", "onlay.cli", "train", "small.yaml"], cwd=tmp_path)
    try:
        bar = terminal.read_until(BAR)
        assert len(bar.group()) <= 80
        terminal.type(b"\x03")
        assert terminal.wait() == 130
    finally:
        terminal.process.kill()
        terminal.process.wait()
    assert "Traceback" not in terminal.text
    assert "Warning" not in terminal.text
    assert "Run run: interrupted" in terminal.text
    assert terminal.text.rstrip().splitlines()[-1].strip() == "Next: onlay train --resume run"

    run = Run.load(tmp_path / "run")
    assert run.status == "interrupted"
    assert 0 < run.steps < 200
    assert [checkpoint.step for checkpoint in run.checkpoints] == [run.steps]

    # The command that it named goes on from there.
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        resumed = train(resume="run")
    finally:
        os.chdir(before)
    assert (resumed.status, resumed.steps) == ("finished", 200)
