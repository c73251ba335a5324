"""What adapters, aliases and the files of a version may be called.  No path is ever made from a name or an alias."""

from __future__ import annotations

import re
from collections.abc import Iterable

from onlay.errors import OutputError
from onlay.release.store import MANIFEST

LIVE, LATEST = "live", "latest"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_FILE = re.compile(r"([A-Za-z0-9_][A-Za-z0-9._-]*/){0,2}[A-Za-z0-9_][A-Za-z0-9._-]*")
"""What a version may hold: plain names, at most two folders deep, none hidden, none outside."""


def check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise OutputError(
            f"{name!r} is not a name for an adapter.",
            "Use 1 to 64 of a-z, 0-9, dot, underscore and hyphen, the first a letter or digit.",
        )


def check_alias(alias: str) -> None:
    if alias == LATEST or alias.isdigit() or not _NAME.fullmatch(alias):
        raise OutputError(
            f"{alias!r} is not an alias that can be moved.",
            "Use 1 to 64 of a-z, 0-9, dot, underscore and hyphen, such as live; latest and numbers mean versions.",
        )


def check_files(files: Iterable[str]) -> None:
    """Raises OutputError for a path that would leave a version's folder or take its manifest's place."""
    for name in files:
        if not _FILE.fullmatch(name) or name == MANIFEST:
            raise OutputError(
                f"{name!r} cannot be a file of a version.", "Use plain file names, at most two folders deep."
            )
