"""What stages tell while they work, and who may speak."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Report = Callable[[Any], None]
"""Gets StepReport, Recovery, Loading and plain text, as they happen."""


@dataclass(frozen=True, slots=True)
class Loading:
    """Something that is counted while it goes on: rows prepared, bytes fetched."""

    what: str
    done: int
    total: int


def silent(_event: Any) -> None:
    pass


def while_loading(report: Report) -> Callable[[int, int], None]:
    return lambda done, total: report(Loading("loading the base", done, total))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))
