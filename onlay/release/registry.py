"""Versions of adapters that never change, names for them that move, and who moved them when and why.

The files lie in onlay/release/store.py's folders; this is the SQLite file beside them.  It is a file of its own, not a
part of the ledger: the two live and are copied apart (a registry may be shared by a team, a ledger is a user's), and a
version's number is given under this file's lock.

No torch, no transformers: registering, promoting and rolling back take milliseconds and may be done by many at once.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from pydantic import ValidationError

from onlay.database import Database
from onlay.errors import OutputError, ProofError
from onlay.ledger import home
from onlay.records import AdapterVersion
from onlay.release.history import MIGRATIONS, Event, event_of, insert_move, insert_version, last_move, last_moves
from onlay.release.names import LATEST, LIVE, check_alias, check_files, check_name
from onlay.release.store import MANIFEST, Stage, Store


@dataclass(frozen=True, kw_only=True, slots=True)
class Damage:
    version: str
    problems: list[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class DamagedVersion:
    """A version whose manifest is missing or was changed: what its row still says."""

    name: str
    version: int
    digest: str
    origin: str
    registered_at: str
    registered_by: str
    problem: str

    @property
    def id(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def remedy(self) -> str:
        return _put_back(self.origin)


class Registry:
    """A registry folder.  Processes and threads may share one; every call may be killed at any point."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or home() / "registry"
        self.store = Store(self.root)
        self._database = Database(self.root / "registry.sqlite", migrations=MIGRATIONS, what="registry")

    # ------------------------------------------------------------------------------------------------------- adding

    def add(
        self,
        name: str,
        files: Mapping[str, Path],
        *,
        describe: Callable[[Path, dict[str, str]], AdapterVersion],
        origin: str,
        version: int | None = None,
    ) -> tuple[AdapterVersion, bool]:
        """Copies `files` (path in the version to path on disk) in and gives the content a number; whether it is new.

        `describe` gets the folder with the copies and their SHA-256, checks them, and makes the version's description; it
        refuses by raising.  The same content under the same name is the version that is there; where its files on the disk
        are damaged, these take their place.  `version` is the number wanted; where it is taken, and without one, it is one
        more than the highest.  Raises OutputError.
        """
        check_name(name)
        check_files(files)
        with self.store.adding(known=self.digests) as stage:
            digests = stage.take(files)
            content = describe(stage.folder, digests).model_copy(update=_BLANK)
            self._publish(stage, content)
            with self._database.write() as connection:
                row = connection.execute(
                    "SELECT * FROM versions WHERE name = ? AND digest = ?", (name, content.digest)
                ).fetchone()
                new = row is None
                if new:
                    row = insert_version(connection, name, content.digest, origin=origin, wanted=version)
        return self._load(row), new

    def _publish(self, stage: Stage, content: AdapterVersion) -> None:
        """Puts the files that were taken into the store.  A folder there that is not as registered makes room for them."""
        folder, aside = self.store.folder(content.digest), stage.path / "damaged"
        damaged = folder.is_dir() and (self._content(content.digest) is None or self._is_damaged(content))
        if damaged:
            with suppress(FileNotFoundError):  # Another process repairs it too.
                folder.rename(aside)
        try:
            stage.publish(content.digest, files=content.files, manifest=content.to_json())
        except (OSError, OutputError):
            if aside.is_dir() and not folder.exists():
                aside.rename(folder)
            raise

    def _is_damaged(self, content: AdapterVersion) -> bool:
        return bool(self.store.damage(content.digest, content.files))

    def digests(self) -> set[str]:
        """Of every version that has a number: what else lies in the store is from processes that were killed."""
        with self._database.read() as connection:
            return {str(row["digest"]) for row in connection.execute("SELECT digest FROM versions")}

    # ------------------------------------------------------------------------------------------------------ looking

    def names(self) -> list[str]:
        if not self._database.path.is_file():
            return []
        with self._database.read() as connection:
            return [str(row[0]) for row in connection.execute("SELECT DISTINCT name FROM versions ORDER BY name")]

    def versions(self, name: str | None = None) -> list[AdapterVersion | DamagedVersion]:
        """Of one name (OutputError when there is none of that name), or of all; by name and number.

        One whose manifest cannot be read is listed as damaged; that the other files are whole is `verify`'s to say.
        """
        if name is not None:
            self._check_known(name)
        if not self._database.path.is_file():
            return []
        with self._database.read() as connection:
            rows = connection.execute(
                "SELECT * FROM versions WHERE ? IS NULL OR name = ? ORDER BY name, version", (name, name)
            ).fetchall()
        return [self._listed(row) for row in rows]

    def aliases(self, name: str) -> dict[str, int]:
        """Alias to the version's number; `latest`, which always is, left out."""
        if not self._database.path.is_file():
            return {}
        with self._database.read() as connection:
            rows = connection.execute(
                "SELECT alias, to_version FROM moves WHERE id IN (SELECT max(id) FROM moves WHERE name = ? GROUP BY alias)"
                " ORDER BY alias",
                (name,),
            )
            return {str(row[0]): int(row[1]) for row in rows}

    def resolve(self, reference: str) -> AdapterVersion:
        """The version that `name@4`, `name@live`, `name@latest` or `name` (the latest) means.

        Raises OutputError listing what there is, and ProofError when the manifest of that one is damaged.
        """
        return self._load(self._row(reference))

    def _row(self, reference: str) -> sqlite3.Row:
        name, at, selector = reference.partition("@")
        self._check_known(name)
        numbers = self._numbers(name)
        aliases = self.aliases(name)
        number = int(selector) if selector.isascii() and selector.isdigit() else aliases.get(selector)
        if not at or selector == LATEST:
            number = numbers[-1]
        if number not in numbers:
            named = "".join(f", {name}@{alias} is {name}@{to}" for alias, to in aliases.items())
            raise OutputError(
                f"{reference} is not registered.",
                f"There {'is' if len(numbers) == 1 else 'are'} {_range(name, numbers)}{named}.",
            )
        with self._database.read() as connection:
            row: sqlite3.Row = connection.execute(
                "SELECT * FROM versions WHERE name = ? AND version = ?", (name, number)
            ).fetchone()
        return row

    def history(self, name: str) -> list[Event]:
        """Every registration and every move of an alias, oldest first.  Raises OutputError for an unknown name."""
        self._check_known(name)
        with self._database.read() as connection:
            rows = connection.execute(
                """
                SELECT name, 'register' AS action, NULL AS alias, NULL AS from_version, version AS to_version, 0 AS forced,
                       origin AS reason, registered_at AS at, registered_by AS by, id FROM versions WHERE name = :name
                UNION ALL
                SELECT name, action, alias, from_version, to_version, forced, reason, moved_at, moved_by, id
                FROM moves WHERE name = :name
                ORDER BY at, id
                """,
                {"name": name},
            )
            return [event_of(row) for row in rows]

    # ------------------------------------------------------------------------------------------------------- moving

    def promote(
        self, reference: str, *, alias: str = LIVE, force: bool = False, reason: str | None = None
    ) -> tuple[AdapterVersion, bool]:
        """Points an alias at a version; whether it was moved, or was there.

        Raises OutputError for a version whose gates were not passed, unless forced with a reason, and ProofError for one
        whose files are not whole.
        """
        check_alias(alias)
        version = self.resolve(reference)
        reason = (reason or "").strip() or None
        if force and reason is None:
            raise OutputError("--force needs a reason, which is kept in the history.", '--force --reason "..."')
        held_back = why_not(version)
        if held_back is not None and not force:
            raise OutputError(f"{version.id} is not promoted: {held_back[0]}.", held_back[1])
        self._check_whole(version)
        with self._database.write() as connection:
            current = last_move(connection, version.name, alias)
            if current is not None and current["to_version"] == version.version:
                return version, False
            forced = force and held_back is not None
            back_to = None if current is None else int(current["id"])
            insert_move(connection, version, alias, "promote", current, back_to=back_to, forced=forced, reason=reason)
        return version, True

    def rollback(self, name: str, *, alias: str = LIVE, reason: str | None = None) -> AdapterVersion:
        """Points an alias at the version that it had before; a second rollback goes one further back.

        Raises OutputError when there is none, and ProofError when that version's files are not whole.
        """
        check_alias(alias)
        self._check_known(name)
        reason = (reason or "").strip() or None
        while True:
            with self._database.read() as connection:
                current, below = last_moves(connection, name, alias)
            version = self.resolve(f"{name}@{below['to_version']}")
            self._check_whole(version)  # It reads every byte: not under the lock that all others wait for.
            with self._database.write() as connection:
                if last_moves(connection, name, alias)[0]["id"] != current["id"]:
                    continue  # Someone else moved it meanwhile.
                insert_move(
                    connection, version, alias, "rollback", current, back_to=below["back_to"], forced=False,
                    reason=reason,
                )  # fmt: skip
                return version

    # ---------------------------------------------------------------------------------------------------- verifying

    def verify(self, reference: str | None = None) -> tuple[list[AdapterVersion], list[Damage]]:
        """Reads every byte of a version (`name@4`), of all of a name, or of all, and compares digests.

        Returns what was read and what is not as registered.
        """
        rows = self._rows(reference)
        whole, damaged = [], []
        for row in rows:
            version = self._listed(row)
            if isinstance(version, DamagedVersion):
                damaged.append(Damage(version=version.id, problems=[version.problem]))
                continue
            problems = self.store.damage(str(row["digest"]), version.files)
            whole.append(version)
            if problems:
                damaged.append(Damage(version=version.id, problems=problems))
        return whole, damaged

    def _rows(self, reference: str | None) -> list[sqlite3.Row]:
        name, at, _ = (reference or "").partition("@")
        if reference is not None:
            self._check_known(name)
        if not self._database.path.is_file():
            return []
        number = self._row(reference)["version"] if reference is not None and at else None
        with self._database.read() as connection:
            return connection.execute(
                "SELECT * FROM versions WHERE (:name = '' OR name = :name) AND (:number IS NULL OR version = :number)"
                " ORDER BY name, version",
                {"name": name, "number": number},
            ).fetchall()

    def _check_whole(self, version: AdapterVersion) -> None:
        problems = self.store.damage(Path(version.path).name, version.files)
        if problems:
            raise ProofError(
                f"{version.id} is not as it was registered: {'; '.join(problems)}.", _put_back(version.origin)
            )

    def _load(self, row: sqlite3.Row) -> AdapterVersion:
        version = self._listed(row)
        if isinstance(version, DamagedVersion):
            raise ProofError(f"{version.id}: {version.problem}.", version.remedy)
        return version

    def _listed(self, row: sqlite3.Row) -> AdapterVersion | DamagedVersion:
        known = {key: row[key] for key in ("name", "version", "origin", "registered_at", "registered_by")}
        folder = self.store.folder(str(row["digest"]))
        content = self._content(str(row["digest"]))
        if content is None:
            problem = f"{folder / MANIFEST} is missing or was changed"
            return DamagedVersion(**known, digest=str(row["digest"]), problem=problem)
        return content.model_copy(update=known | {"path": str(folder)})

    def _content(self, digest: str) -> AdapterVersion | None:
        """What the manifest says; None where it is missing or was changed."""
        try:
            content = AdapterVersion.model_validate_json((self.store.folder(digest) / MANIFEST).read_bytes())
        except (OSError, ValidationError):
            return None
        return content if content.digest == digest else None

    def _numbers(self, name: str) -> list[int]:
        with self._database.read() as connection:
            rows = connection.execute("SELECT version FROM versions WHERE name = ? ORDER BY version", (name,))
            return [int(row[0]) for row in rows]

    def _check_known(self, name: str) -> None:
        names = self.names()
        if name in names:
            return
        near = get_close_matches(name, names, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        there = f"Registered: {', '.join(names)}." if names else "Nothing is: onlay register RUN --name NAME"
        raise OutputError(f"{name} is not registered.{hint}", there)


_BLANK = {"name": "", "version": 0, "path": "", "origin": "", "registered_at": "", "registered_by": ""}


def _put_back(origin: str) -> str:
    return (
        f"Register {origin} again, with the Report that it had (--report), or pull a copy that was pushed: that puts the"
        " files back.  Or restore the registry from a copy."
    )


def why_not(version: AdapterVersion) -> tuple[str, str] | None:
    """Why a version may not be promoted, and what to do; None for one that passed its gates."""
    again = (
        f"onlay evaluate {version.origin}, then register it with --report; or promote it with --force --reason '...'"
    )
    if version.verdict is None and version.rank is None:
        scores = f"onlay show {version.origin} has its scores"
        return "a classification head has no gates", f"{scores}; promote it by them with --force --reason '...'"
    if version.verdict is None:
        return "it was registered without a Report", again
    if not version.gates:
        return "its Report has no gates", f"Set evaluation.gates in the recipe, {again}"
    failed = [f"{gate.name} ({gate.reason})" for gate in version.gates if not gate.passed]
    if failed:
        return f"{len(failed)} of {len(version.gates)} gates failed: {'; '.join(failed)}", again
    return None if version.verdict == "ship" else (f"its Report says: {version.verdict}", again)


def _range(name: str, numbers: list[int]) -> str:
    some = [f"{name}@{number}" for number in numbers]
    return ", ".join(some) if len(some) <= 6 else f"{', '.join(some[:2])}, ... {some[-1]}"
