"""The registry's tables and their rows: versions that were registered, aliases that were moved.

Both only grow, and triggers see to it.  Where an alias points is the latest row about it, so there is nothing that could
disagree with the history.
"""

from __future__ import annotations

import getpass
import os
import socket
import sqlite3
from dataclasses import dataclass
from datetime import UTC, datetime

from onlay.errors import OutputError
from onlay.records import AdapterVersion

MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE versions (
        id            INTEGER PRIMARY KEY AUTOINCREMENT,
        name          TEXT NOT NULL,
        version       INTEGER NOT NULL CHECK (version > 0),
        digest        TEXT NOT NULL,
        origin        TEXT NOT NULL,
        registered_at TEXT NOT NULL,
        registered_by TEXT NOT NULL,
        UNIQUE (name, version),
        UNIQUE (name, digest)
    ) STRICT;
    CREATE TABLE moves (
        id           INTEGER PRIMARY KEY AUTOINCREMENT,
        name         TEXT NOT NULL,
        alias        TEXT NOT NULL,
        action       TEXT NOT NULL CHECK (action IN ('promote', 'rollback')),
        from_version INTEGER,
        to_version   INTEGER NOT NULL,
        back_to      INTEGER REFERENCES moves (id),
        forced       INTEGER NOT NULL CHECK (forced IN (0, 1)),
        reason       TEXT,
        moved_at     TEXT NOT NULL,
        moved_by     TEXT NOT NULL,
        FOREIGN KEY (name, to_version) REFERENCES versions (name, version)
    ) STRICT;
    CREATE INDEX moves_by_alias ON moves (name, alias, id);
    CREATE TRIGGER versions_never_change BEFORE UPDATE ON versions
        BEGIN SELECT RAISE(ABORT, 'versions never change'); END;
    CREATE TRIGGER versions_never_go BEFORE DELETE ON versions
        BEGIN SELECT RAISE(ABORT, 'versions never change'); END;
    CREATE TRIGGER moves_never_change BEFORE UPDATE ON moves
        BEGIN SELECT RAISE(ABORT, 'the history is append-only'); END;
    CREATE TRIGGER moves_never_go BEFORE DELETE ON moves
        BEGIN SELECT RAISE(ABORT, 'the history is append-only'); END;
    """,
)
"""Only ever appended to.  `moves.back_to` is the move whose version a rollback goes back to: under it lies the one before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One entry of the audit trail."""

    name: str
    action: str
    """register, promote or rollback."""
    alias: str | None
    """None for a registration."""
    from_version: int | None
    to_version: int
    forced: bool
    """Promoted although its gates were not passed."""
    reason: str | None
    """As given; for a registration where it came from."""
    at: str
    """UTC, ISO 8601."""
    by: str
    """user@host."""


def whoami() -> str:
    """user@host, for the history.  In a container the user may have a number only."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = f"uid{os.getuid()}"
    return f"{user}@{socket.gethostname()}"


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


def insert_version(
    connection: sqlite3.Connection, name: str, digest: str, *, origin: str, wanted: int | None
) -> sqlite3.Row:
    numbers = {int(row[0]) for row in connection.execute("SELECT version FROM versions WHERE name = ?", (name,))}
    number = wanted if wanted is not None and wanted not in numbers else max(numbers, default=0) + 1
    connection.execute(
        "INSERT INTO versions (name, version, digest, origin, registered_at, registered_by) VALUES (?, ?, ?, ?, ?, ?)",
        (name, number, digest, origin, now(), whoami()),
    )
    row: sqlite3.Row = connection.execute(
        "SELECT * FROM versions WHERE name = ? AND version = ?", (name, number)
    ).fetchone()
    return row


def last_move(connection: sqlite3.Connection, name: str, alias: str) -> sqlite3.Row | None:
    """The one that says where an alias points now."""
    found = connection.execute(
        "SELECT * FROM moves WHERE name = ? AND alias = ? ORDER BY id DESC LIMIT 1", (name, alias)
    ).fetchone()
    return found if isinstance(found, sqlite3.Row) else None


def last_moves(connection: sqlite3.Connection, name: str, alias: str) -> tuple[sqlite3.Row, sqlite3.Row]:
    """The latest move of an alias and the one that a rollback goes back to.  Raises OutputError when there is none."""
    current = last_move(connection, name, alias)
    if current is None:
        raise OutputError(f"{name} has no alias {alias}.", f"onlay promote {name}@latest --as {alias}")
    if current["back_to"] is None:
        raise OutputError(
            f"{name}@{alias} is {name}@{current['to_version']}, and it was never another one before.",
            f"onlay versions {name} lists what it can be promoted to.",
        )
    return current, connection.execute("SELECT * FROM moves WHERE id = ?", (current["back_to"],)).fetchone()


def insert_move(
    connection: sqlite3.Connection, version: AdapterVersion, alias: str, action: str, current: sqlite3.Row | None,
    *, back_to: int | None, forced: bool, reason: str | None,
) -> None:  # fmt: skip
    before = None if current is None else current["to_version"]
    connection.execute(
        "INSERT INTO moves (name, alias, action, from_version, to_version, back_to, forced, reason, moved_at, moved_by)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (version.name, alias, action, before, version.version, back_to, int(forced), reason, now(), whoami()),
    )


def event_of(row: sqlite3.Row) -> Event:
    values = {key: row[key] for key in ("name", "action", "alias", "from_version", "to_version", "reason", "at", "by")}
    return Event(**values, forced=bool(row["forced"]))
