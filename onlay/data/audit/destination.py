"""Where an audit's page may be written: never over what is audited, nor over anything that is no such page."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from onlay.errors import OutputError

MARKER = "This page was written by onlay audit, which may write over it."
"""In the head of every page."""
HEAD_BYTES = 1 << 16
ELSEWHERE = "Give another name, such as audit.html."


def check_destination(page: Path, *, used: Mapping[str, str]) -> None:
    """Raises OutputError where a page cannot be written to `page`, or would destroy something: a file that is used (`used`:
    what each path is), or one that is there and no page of an audit.  Nothing is written."""
    place = _real(page)
    for path, what in used.items():
        if place == _real(Path(path)) or (page.exists() and Path(path).exists() and page.samefile(path)):
            raise OutputError(f"--html {page} is {what}: the page would be written over it.", ELSEWHERE)
    if page.is_dir():
        raise OutputError(f"--html {page} is a folder.", f"Give a file, such as {page / 'audit.html'}.")
    if os.path.lexists(page) and not _is_page(page):
        raise OutputError(f"--html {page} is there already, and is no page that onlay audit wrote.", ELSEWHERE)
    folder = next(parent for parent in place.parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"--html {page} cannot be written: {folder}: {error.strerror or error}.",
            "Give a file in a folder that you may write to.",
        ) from None


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _is_page(path: Path) -> bool:
    if not path.is_file():  # A device, or a link that leads nowhere.
        return False
    try:
        with path.open("rb") as raw:
            head = raw.read(HEAD_BYTES)
    except OSError:
        return False
    return MARKER.encode() in head.partition(b"</head>")[0]
