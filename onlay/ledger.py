"""The ledger: every record that a stage made, in one SQLite file of the user's, in the order they were made.

A row is never changed or removed (triggers see to it), so a result can be traced even when run folders are gone.
`$ONLAY_HOME` (default ~/.onlay) holds the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from onlay.database import Database
from onlay.errors import OutputError
from onlay.records import RECORDS, Record

FILE = "ledger.sqlite"
_SHORTEST_PREFIX = 4

MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE records (
        id         INTEGER PRIMARY KEY AUTOINCREMENT,
        kind       TEXT NOT NULL,
        digest     TEXT NOT NULL,
        created_at TEXT NOT NULL,
        path       TEXT NOT NULL,
        json       TEXT NOT NULL
    ) STRICT;
    CREATE INDEX records_by_digest ON records (digest);
    CREATE INDEX records_by_kind_and_path ON records (kind, path);
    CREATE TRIGGER records_never_change BEFORE UPDATE ON records
        BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
    CREATE TRIGGER records_never_go BEFORE DELETE ON records
        BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
    """,
)
"""Applied in order, each once; number N brings the file to version N (PRAGMA user_version).  Only ever appended to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    id: int
    kind: str
    digest: str
    created_at: str
    """UTC, ISO 8601."""
    path: str
    """Folder (or file) that the record was written to."""
    json: str

    @property
    def values(self) -> dict[str, Any]:
        return dict(json.loads(self.json))

    def record(self) -> Record:
        """The record itself.  Raises OutputError for a kind that this version does not know."""
        if self.kind not in RECORDS:
            raise OutputError(
                f"{self.kind} is not a kind of record that this version of onlay knows.", "Upgrade onlay."
            )
        return RECORDS[self.kind].model_validate_json(self.json)


def home() -> Path:
    """The user's folder for what outlives a run: $ONLAY_HOME, or ~/.onlay."""
    return Path(os.environ.get("ONLAY_HOME") or "~/.onlay").expanduser().absolute()


class Ledger:
    """A ledger file.  Every call opens and closes it, so processes and threads may share one."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or home() / FILE

    def append(self, record: Record, path: str | Path) -> int:
        """Adds a row for `record`, which lies at `path`; its number.  Raises OutputError when it cannot be written."""
        return self.append_json(record.kind, record.digest, record.model_dump_json(), path)

    def append_json(self, kind: str, digest: str, text: str, path: str | Path) -> int:
        """The same for what is not a Record, such as a Recipe.

        When the latest row of that kind and path holds the same record already, its number is given and none is added.
        """
        place = str(Path(path).absolute())
        values = (kind, digest, datetime.now(UTC).isoformat(timespec="microseconds"), place, text)
        latest = "SELECT id, digest FROM records WHERE kind = ? AND path = ? ORDER BY id DESC LIMIT 1"
        with self._database.write() as database:
            known = database.execute(latest, (kind, place)).fetchone()
            if known is not None and known[1] == digest:
                return int(known[0])
            cursor = database.execute(
                "INSERT INTO records (kind, digest, created_at, path, json) VALUES (?, ?, ?, ?, ?)", values
            )
            return int(cursor.lastrowid or 0)

    def rows(self, kind: str | None = None) -> list[Row]:
        """Every row, oldest first."""
        where, values = ("WHERE kind = ?", [kind]) if kind is not None else ("", [])
        return self._select(f"{where} ORDER BY id", values)

    def runs(self) -> list[Row]:
        """The latest row of each run folder, newest first."""
        latest = "WHERE id IN (SELECT max(id) FROM records WHERE kind = 'run' GROUP BY path) ORDER BY id DESC"
        return self._select(latest, [])

    def find(self, digest_prefix: str) -> Row:
        """The record whose digest starts so.  Raises OutputError when none or more than one does."""
        prefix = digest_prefix.strip().lower()
        if len(prefix) < _SHORTEST_PREFIX or set(prefix) - set("0123456789abcdef"):
            raise OutputError(
                f"{digest_prefix} is not the start of a digest.",
                f"Give at least {_SHORTEST_PREFIX} hexadecimal digits.",
            )
        found = {row.digest: row for row in self._select("WHERE digest GLOB ? ORDER BY id", [prefix + "*"])}
        if not found:
            raise OutputError(f"No record's digest starts with {prefix}.", "`onlay log` lists the runs.")
        if len(found) > 1:
            some = ", ".join(f"{row.kind} {digest[: len(prefix) + 4]}" for digest, row in list(found.items())[:4])
            raise OutputError(f"{len(found)} digests start with {prefix}: {some}.", "Give more digits.")
        return next(iter(found.values()))

    def chain(self, record: Record | Row) -> Iterator[Row]:
        """The records behind `record`, through `sources`, nearest first, each once.

        Sources that are no records of this ledger (digests of files, records of another machine) are passed over.
        """
        waiting = list(_sources(record))
        seen: set[str] = set()
        while waiting:
            digest = waiting.pop(0)
            if digest in seen:
                continue
            seen.add(digest)
            for row in self._select("WHERE digest = ? ORDER BY id DESC LIMIT 1", [digest]):
                yield row
                waiting.extend(_sources(row))

    def _select(self, tail: str, values: list[str]) -> list[Row]:
        if not self.path.is_file():
            return []
        with self._database.read() as database:
            found = database.execute(f"SELECT id, kind, digest, created_at, path, json FROM records {tail}", values)
            return [
                Row(id=row[0], kind=row[1], digest=row[2], created_at=row[3], path=row[4], json=row[5]) for row in found
            ]

    @property
    def _database(self) -> Database:
        return Database(self.path, migrations=MIGRATIONS, what="ledger")


def _sources(record: Record | Row) -> list[str]:
    sources = record.sources if isinstance(record, Record) else record.values.get("sources", {})
    return [str(digest) for digest in sources.values()]


def append(record: Record, path: str | Path) -> int:
    """Adds `record` to the user's ledger."""
    return Ledger().append(record, path)


def runs() -> list[Row]:
    """The latest row of each run folder in the user's ledger, newest first."""
    return Ledger().runs()


def find(digest_prefix: str) -> Row:
    return Ledger().find(digest_prefix)


def chain(record: Record | Row) -> Iterator[Row]:
    return Ledger().chain(record)
