"""metrics.jsonl: one JSON object a step or event; and whatever tracker the recipe names, through Accelerate."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onlay.errors import OutputError

if TYPE_CHECKING:
    from accelerate import Accelerator


class MetricsLog:
    def __init__(self, path: Path, *, keep_bytes: int = 0, accelerator: Accelerator | None = None) -> None:
        """`keep_bytes`: length of the log when the checkpoint was written that the run goes on from.

        What stands behind it is of work that was lost, and is taken out.  Raises OutputError.
        """
        self.path = path
        self._accelerator = accelerator
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Not buffered: a line that could not be written is not tried again when the file is closed.
            self._file = path.open("ab", buffering=0)
            self.num_bytes = min(keep_bytes, path.stat().st_size)
            self._file.truncate(self.num_bytes)
        except OSError as error:
            raise self._unwritable(error) from None

    def write(self, event: str, step: int, **values: Any) -> None:
        """`event` is step, evaluation, recovery or loss_scale.  Raises OutputError."""
        line = json.dumps({"event": event, "step": step, **values}).encode() + b"\n"
        try:
            written = self._file.write(line)
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise self._unwritable(error) from None
        self.num_bytes += len(line)
        if self._accelerator is not None:
            numbers = {f"{event}/{k}": v for k, v in values.items() if isinstance(v, int | float)}
            self._accelerator.log(numbers, step=step)

    def close(self) -> None:
        self._file.close()

    def _unwritable(self, error: OSError) -> OutputError:
        return OutputError(
            f"{self.path} could not be written: {error.strerror}.",
            f"Free disk space, then onlay train --resume {self.path.parent}",
        )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All events in order; a step that was repeated after a recovery stands more than once, the last one counts."""
    if not path.is_file():
        return []
    # The last line is of a killed process when no line end follows it.
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]
