"""The registry's files: each content once, by its SHA-256; a version is a folder of links to them.

    blobs/ab/ab34...      a content, read-only
    versions/<digest>/    links to blobs under the files' names, and manifest.json; appears by one rename, never changes
    staging/<id>/         what a process is about to add; it stays until its row is committed
    lock                  held shared while something is added, alone while the rest of a killed process is swept

Everything is on disk (fsync) before the next step can see it, so after a SIGKILL or a power cut a version folder is whole
or not there.  What a killed process leaves, its folder in staging says: it is swept before the next one adds.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from onlay.errors import OutputError
from onlay.records import write_whole

MANIFEST = "manifest.json"
_CHUNK_BYTES = 4 * 2**20


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Store:
    def __init__(self, root: Path) -> None:
        self.root = root
        self._blobs, self._versions, self._staging = root / "blobs", root / "versions", root / "staging"

    def folder(self, digest: str) -> Path:
        """Where the version of this digest lies."""
        return self._versions / digest

    @contextmanager
    def adding(self, *, known: Callable[[], set[str]]) -> Iterator[Stage]:
        """A place to put a new version's files.  What killed processes left is swept first; `known` gives the digests of
        the versions that have a row.  Raises OutputError when the disk refuses."""
        with self._problems():
            for folder in (self._blobs, self._versions, self._staging):
                folder.mkdir(parents=True, exist_ok=True)
            self.sweep(known=known)
            with self._locked(fcntl.LOCK_SH):
                stage = Stage(self, self._staging / uuid.uuid4().hex)
                stage.path.mkdir()
                _sync(self._staging)  # Before anything else is: this folder is what tells of a process that was killed.
                whole = False
                try:
                    yield stage
                    whole = True
                finally:
                    shutil.rmtree(stage.folder, ignore_errors=True)
                    # Otherwise blobs may be there that no version links to: what is left tells the next to look.
                    if whole:
                        shutil.rmtree(stage.path)

    def sweep(self, *, known: Callable[[], set[str]]) -> int:
        """Removes what killed processes left, unless others are adding now; the number of things removed."""
        if not self._staging.is_dir() or not any(self._staging.iterdir()):
            return 0
        with self._problems():
            try:
                with self._locked(fcntl.LOCK_EX | fcntl.LOCK_NB):
                    return self._sweep(known())
            except BlockingIOError:
                return 0  # Some of these folders are alive; a later call finds the others.

    def _sweep(self, known: set[str]) -> int:
        left = list(self._staging.iterdir())
        # First what is in them, as it has links to blobs; the folders last, as they tell that there is work to do.
        for path in [inner for folder in left for inner in folder.iterdir()]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        removed = 0
        for folder in self._versions.iterdir():
            if folder.name not in known:
                shutil.rmtree(folder)
                removed += 1
        for blob in self._blobs.glob("*/*"):
            if blob.stat().st_nlink == 1:  # No version links to it.
                blob.unlink()
                removed += 1
        for folder in left:
            folder.rmdir()
        return removed + len(left)

    def damage(self, digest: str, files: Mapping[str, str]) -> list[str]:
        """What differs from `files` (path to SHA-256) in a version's folder, in words; every byte is read."""
        folder = self.folder(digest)
        if not folder.is_dir():
            return [f"{folder} is missing"]
        found = []
        for name, expected in sorted(files.items()):
            path = folder / name
            if path.is_symlink() or not path.is_file():
                found.append(f"{name} is missing")
            elif file_digest(path) != expected:
                found.append(f"{name} was changed")
        here = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()}
        found += [f"{name} does not belong to it" for name in sorted(here - set(files) - {MANIFEST})]
        return found

    @contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        """The kernel lets go of a flock when its process ends, however it ends."""
        descriptor = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, how)
            yield
        finally:
            os.close(descriptor)

    @contextmanager
    def _problems(self) -> Iterator[None]:
        try:
            yield
        except BlockingIOError:
            raise
        except OSError as error:
            what = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
            where = f" ({error.filename})" if error.filename is not None else ""
            links = error.errno in (errno.EPERM, errno.ENOTSUP, errno.EXDEV)
            raise OutputError(
                f"The registry {self.root} cannot be written: {what}{where}.",
                "Set ONLAY_HOME to a file system that has hard links."
                if links
                else "Free disk space or correct its rights, or set ONLAY_HOME to another folder.",
            ) from None


class Stage:
    """One version on its way into the store."""

    def __init__(self, store: Store, path: Path) -> None:
        self.path = path
        self.folder = path / "version"
        self._store = store

    def take(self, files: Mapping[str, Path]) -> dict[str, str]:
        """Copies files into `folder` under the given names; the SHA-256 of what was copied."""
        digests = {}
        for name, source in files.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            digest = hashlib.sha256()
            with source.open("rb") as file, path.open("wb") as out:
                while chunk := file.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    out.write(chunk)
                out.flush()
                os.fsync(out.fileno())
            path.chmod(0o444)
            digests[name] = digest.hexdigest()
        return digests

    def publish(self, digest: str, *, files: Mapping[str, str], manifest: str) -> None:
        """Makes versions/<digest> of the files that were taken; does nothing where it is there."""
        final = self._store.folder(digest)
        if not final.is_dir():
            for name, content in files.items():
                self._share(self.folder / name, content)
            write_whole(self.folder / MANIFEST, manifest)
            (self.folder / MANIFEST).chmod(0o444)
            for inner in {path.parent for path in self.folder.rglob("*")}:
                _sync(inner)
            try:
                self.folder.rename(final)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                # Another process was first, with the same content.
        _sync(final.parent)  # Also where another made it, who may not have come to that yet.

    def _share(self, path: Path, digest: str) -> None:
        """Makes a file and the blob of its content one."""
        blob = self._store.root / "blobs" / digest[:2] / digest
        blob.parent.mkdir(exist_ok=True)
        try:
            os.link(path, blob)
        except FileExistsError:
            if file_digest(blob) == digest:
                path.unlink()
                os.link(blob, path)
            else:  # Damaged on disk: versions to come shall not inherit it.
                sound = self.path / "sound"
                os.link(path, sound)
                sound.replace(blob)
        _sync(blob.parent)
        _sync(blob.parent.parent)


def _sync(folder: Path) -> None:
    """A folder's entries, which a file's own fsync leaves out."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
