"""A SQLite file of numbered migrations that processes and threads may share: every use opens and closes it."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from onlay.errors import OutputError

BUSY_SECONDS = 30.0


class Database:
    """`migrations` are applied in order, each once; number N brings the file to version N (PRAGMA user_version).

    `what` names it in errors, such as `registry`.
    """

    def __init__(self, path: Path, *, migrations: Sequence[str], what: str) -> None:
        self.path = path
        self._migrations = tuple(migrations)
        self._what = what

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """One consistent state for all that is read in the block.  Raises OutputError for a file that cannot be used."""
        with self._open("BEGIN") as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """A transaction of its own: committed, and on disk, when the block ends; undone when it raises."""
        with self._open("BEGIN IMMEDIATE") as connection:
            yield connection

    @contextmanager
    def _open(self, begin: str) -> Iterator[sqlite3.Connection]:
        connection = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)
            connection.row_factory = sqlite3.Row
            _use_wal(connection)
            # In WAL mode FULL waits for the disk at each commit, so a version that was told survives a power cut.
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
            self._migrate(connection)
            connection.execute(begin)
            yield connection
            connection.execute("COMMIT")
        except (sqlite3.Error, OSError) as error:
            raise OutputError(
                f"The {self._what} {self.path} cannot be used: {error}.",
                "Free disk space or correct its rights, or set ONLAY_HOME to another folder.",
            ) from None
        finally:
            if connection is not None:
                connection.close()

    def _migrate(self, connection: sqlite3.Connection) -> None:
        if self._version(connection) == len(self._migrations):
            return
        connection.execute("BEGIN IMMEDIATE")
        # Another process may have migrated it while this one waited for the lock.
        for number in range(self._version(connection), len(self._migrations)):
            for statement in _statements(self._migrations[number]):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {number + 1}")
        connection.execute("COMMIT")

    def _version(self, connection: sqlite3.Connection) -> int:
        version = int(connection.execute("PRAGMA user_version").fetchone()[0])
        if version > len(self._migrations):
            raise OutputError(
                f"The {self._what} {self.path} is of version {version}; this onlay knows {len(self._migrations)}.",
                "Upgrade onlay, or set ONLAY_HOME to another folder.",
            )
        return version


def _use_wal(connection: sqlite3.Connection) -> None:
    """Readers and a writer at the same time.  Turning it on needs the file alone, which SQLite does not wait for."""
    give_up = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL").fetchone()
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > give_up:
                raise
            time.sleep(0.02)


def _statements(script: str) -> Iterator[str]:
    """The statements of a script, those of a trigger's body kept together."""
    statement = ""
    for part in script.split(";"):
        statement += part + ";"
        if sqlite3.complete_statement(statement):
            if statement.strip(" \n;"):
                yield statement
            statement = ""
