"""`init`: a commented recipe for a data file."""

from __future__ import annotations

from pathlib import Path

from onlay.errors import OutputError
from onlay.records import write_whole


def init(data: str | Path, *, output: str | Path | None = None) -> tuple[Path, list[str]]:
    """Looks at the data and the device and writes a commented recipe; returns its path and a summary in sentences."""
    from onlay.hardware import find_hardware_light
    from onlay.starter import propose

    path = Path(output) if output else Path(Path(data).stem + ".yaml")
    if path.exists():
        raise OutputError(f"{path} exists already.", f"Use it (onlay prepare {path}), move it away, or give --output.")
    text, summary = propose(data, find_hardware_light())
    write_whole(path, text)
    return path, summary
