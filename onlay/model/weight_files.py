"""Safetensors files read without torch: their headers, a fingerprint from a sample, a digest of every byte.

A file is 8 bytes (length of the header, little endian), the header (JSON: tensor name to dtype, shape and offsets), and
the tensors' bytes.  Fingerprint and digest go by tensor name, so the same weights in other shards give the same value.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from onlay.errors import BaseModelError, OnlayError
from onlay.model.hub import INDEX_FILE, SINGLE_FILE, no_safetensors, shards_of_index
from onlay.records import ModelFacts, write_whole

SAMPLE_BYTES = 32 * 2**20
"""Most bytes that a fingerprint reads; smaller bases are read whole."""
_CHUNK_BYTES = 4 * 2**20
_LONGEST_HEADER_BYTES = 100 * 10**6
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16}
_BITS |= {"BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4}


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """One tensor of a safetensors file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    """Offset of its first byte in the file."""
    num_bytes: int

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    @property
    def key(self) -> bytes:
        """What a digest holds about the tensor besides its bytes."""
        return json.dumps([self.name, self.dtype, list(self.shape)]).encode() + b"\0"


def weight_paths(folder: Path, name: str) -> list[Path]:
    """The safetensors files of a folder, as transformers picks them.  Raises BaseModelError when one is missing."""
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if not (folder / INDEX_FILE).is_file():
        raise BaseModelError(*no_safetensors(name, sorted(path.name for path in folder.iterdir())))
    paths = [folder / shard for shard in shards_of_index(folder / INDEX_FILE, name)]
    for path in paths:
        if path.parent != folder or not path.is_file():
            raise BaseModelError(f"{name}: {path.name}, named by {INDEX_FILE}, is missing.", "Download the base again.")
    return paths


def read_tensors(folder: Path, name: str) -> list[StoredTensor]:
    """Every stored tensor, sorted by name.  Raises BaseModelError for files that are cut short or damaged."""
    tensors: dict[str, StoredTensor] = {}
    for path in weight_paths(folder, name):
        for tensor in _read_header(path, name):
            tensors[tensor.name] = tensor
    return [tensors[key] for key in sorted(tensors)]


def _read_header(path: Path, name: str) -> list[StoredTensor]:
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        header_bytes = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= header_bytes <= min(_LONGEST_HEADER_BYTES, file_bytes - 8):
            raise _damaged(path, name, _pointer_or("its header cannot be read", start))
        raw = file.read(header_bytes)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        tensors = [_stored(key, entry, path, 8 + header_bytes) for key, entry in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _damaged(path, name, "its header is not that of a safetensors file") from None
    end = max((tensor.start + tensor.num_bytes for tensor in tensors), default=8 + header_bytes)
    if end > file_bytes:
        raise _damaged(path, name, f"it has {file_bytes:,} of {end:,} bytes")
    return tensors


def _stored(key: str, entry: dict[str, Any], path: Path, data_start: int) -> StoredTensor:
    first, last = (int(offset) for offset in entry["data_offsets"])
    tensor = StoredTensor(
        name=key,
        dtype=str(entry["dtype"]),
        shape=tuple(int(size) for size in entry["shape"]),
        file=path,
        start=data_start + first,
        num_bytes=last - first,
    )
    bits = _BITS.get(tensor.dtype)
    if first < 0 or tensor.num_bytes < 0 or (bits and tensor.num_elements * bits != 8 * tensor.num_bytes):
        raise ValueError("offsets and shape disagree")
    return tensor


def _pointer_or(text: str, start: bytes) -> str:
    """A clone without git-lfs holds small text files in the place of weights."""
    return "it is a git-lfs pointer, not the weights (git lfs pull fetches them)" if start == b"version " else text


def _damaged(path: Path, name: str, what: str) -> BaseModelError:
    return BaseModelError(f"{name}: {path.name} is not a whole safetensors file: {what}.", "Download the base again.")


def fingerprint(tensors: list[StoredTensor]) -> str:
    """SHA-256 over names, dtypes, shapes and the same sample of each tensor: all of it, or first, middle and last block.

    A block's length depends on the number of tensors alone, never on the files they lie in.
    """
    block = max(64, SAMPLE_BYTES // (3 * max(1, len(tensors))))
    digest = hashlib.sha256()
    whole = sum(tensor.num_bytes for tensor in tensors) <= SAMPLE_BYTES
    with _opened() as read:
        for tensor in tensors:
            digest.update(tensor.key)
            if whole or tensor.num_bytes <= 3 * block:
                digest.update(read(tensor, 0, tensor.num_bytes))
                continue
            for offset in (0, (tensor.num_bytes - block) // 2, tensor.num_bytes - block):
                digest.update(read(tensor, offset, block))
    return digest.hexdigest()


def digest_weights(tensors: list[StoredTensor], stop: threading.Event | None = None) -> str:
    """SHA-256 over names, dtypes, shapes and every byte; hashing and reading leave other threads running."""
    digest = hashlib.sha256()
    with _opened() as read:
        for tensor in tensors:
            digest.update(tensor.key)
            for offset in range(0, tensor.num_bytes, _CHUNK_BYTES):
                if stop is not None and stop.is_set():
                    raise InterruptedError("stopped")
                digest.update(read(tensor, offset, min(_CHUNK_BYTES, tensor.num_bytes - offset)))
    return digest.hexdigest()


class _Reader:
    def __init__(self) -> None:
        self._open: dict[Path, int] = {}

    def __call__(self, tensor: StoredTensor, offset: int, length: int) -> bytes:
        if tensor.file not in self._open:
            self._open[tensor.file] = os.open(tensor.file, os.O_RDONLY)
        data = os.pread(self._open[tensor.file], length, tensor.start + offset)
        if len(data) != length:
            raise BaseModelError(f"{tensor.file} changed while it was read.", "Leave the base alone during a run.")
        return data

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


@contextmanager
def _opened() -> Iterator[_Reader]:
    reader = _Reader()
    try:
        yield reader
    finally:
        reader.close()


def full_digest(facts: ModelFacts, cache_folder: Path, *, stop: threading.Event | None = None) -> str:
    """SHA-256 over every tensor's bytes, by name; remembered in `cache_folder` until a file's size or time changes.

    For a base with random weights, which has no files, it is the fingerprint.
    """
    folder = Path(facts.path)
    if not facts.linear_shapes and not (folder / SINGLE_FILE).is_file() and not (folder / INDEX_FILE).is_file():
        return facts.weight_fingerprint
    key = _files_key(weight_paths(folder, facts.name))
    store = cache_folder / "weight_digests.json"
    known = _read_store(store)
    if key not in known:
        digest = digest_weights(read_tensors(folder, facts.name), stop)
        if _files_key(weight_paths(folder, facts.name)) != key:
            raise BaseModelError(f"{facts.path} changed while it was read.", "Leave the base alone during a run.")
        known = {**_read_store(store), key: digest}
        write_whole(store, json.dumps(known, indent=1) + "\n")
    return known[key]


def _files_key(paths: list[Path]) -> str:
    files = []
    for path in paths:
        stat = path.stat()
        files.append([str(path.resolve()), stat.st_size, stat.st_mtime_ns])
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def _read_store(store: Path) -> dict[str, str]:
    try:
        known = json.loads(store.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}  # A cache: what cannot be read is computed again.
    return known if isinstance(known, dict) else {}


class Digesting:
    """`full_digest` in a thread of its own, beside training.  The thread ends with the process, or with `stop()`."""

    def __init__(self, facts: ModelFacts, cache_folder: Path) -> None:
        self._stop = threading.Event()
        self._digest: str | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(
            target=self._work, args=(facts, cache_folder), name="weight-digest", daemon=True
        )
        self._thread.start()

    def _work(self, facts: ModelFacts, cache_folder: Path) -> None:
        try:
            self._digest = full_digest(facts, cache_folder, stop=self._stop)
        except InterruptedError:
            pass
        except (OSError, OnlayError) as error:  # Handed over to whoever asks for the result.
            self._error = error

    def result(self, timeout: float | None = None) -> str | None:
        """The digest, or None when it is not ready within `timeout` seconds.  Raises what went wrong in the thread."""
        self._thread.join(timeout)
        if isinstance(self._error, OSError):
            raise BaseModelError(
                f"The base's weights could not be read for their digest: {self._error}.",
                "Put the files back, then resume the run: the weights in memory were trained on as they were.",
            ) from self._error
        if self._error is not None:
            raise self._error
        return self._digest

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
