"""metrics.jsonl: one JSON object a step or event; and whatever tracker the recipe names, through Accelerate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onlay.errors import OutputError

if TYPE_CHECKING:
    from accelerate import Accelerator


class MetricsLog:
    def __init__(self, path: Path, *, resume_step: int | None, accelerator: Accelerator | None = None) -> None:
        """`resume_step`: lines of later steps are of work that was lost, and are taken out."""
        self.path = path
        self._accelerator = accelerator
        if resume_step is not None and path.is_file():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= resume_step]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
            temporary.replace(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def write(self, event: str, step: int, **values: Any) -> None:
        """`event` is step, evaluation or recovery."""
        line = json.dumps({"event": event, "step": step, **values})
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            raise OutputError(f"{self.path} could not be written: {error.strerror}.", "Free disk space, then resume.") from None
        if self._accelerator is not None:
            numbers = {f"{event}/{k}": v for k, v in values.items() if isinstance(v, int | float)}
            self._accelerator.log(numbers, step=step)

    def close(self) -> None:
        self._file.close()


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError):
        return 2**62  # the half line of a killed process


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All events in order; a step that was repeated after a recovery stands more than once, the last one counts."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if _step_of(line) < 2**62]
