"""Streams rows out of files and hub data sets.  Raises DataError that names file and line.

Nothing heavy is imported here, so a wrong data file is reported before torch or transformers load.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import logging
import re
import socket
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from onlay.data.files import (
    ENDED,
    Asked,
    OnBad,
    Reading,
    Row,
    raise_bad,
    read_csv,
    read_jsonl,
    read_parquet,
    read_text,
    suffix_of,
    type_name,
)  # fmt: skip
from onlay.data.json_lists import read_json
from onlay.errors import DataError
from onlay.recipe import DataSection

__all__ = ["ENDED", "SUFFIXES", "OnBad", "Reading", "Row", "raise_bad", "read_rows", "source_digest", "type_name"]

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
PORTS = {"http": 80, "https": 443}
REACH_SECONDS = 5


def read_rows(
    source: str,
    section: DataSection,
    *,
    limit: int | None = None,
    on_bad: OnBad = raise_bad,
    only: Container[int] | None = None,
    reading: Reading | None = None,
) -> Iterator[Row]:
    """The rows of a file or hub data set, streamed; at most `limit`.  Raises DataError.

    `on_bad` gets the error of every row that cannot be read, and of whatever ends a file early (code reading_ended); it
    may return, to go on.  `only`: numbers of the rows that are wanted; the others of a JSONL file are not even decoded.
    A source that does not exist, or is of no known kind, raises at once.
    """
    kind = _kind(source)
    readers: dict[str, Callable[[Path, Asked], Iterator[Row]]] = {
        ".jsonl": read_jsonl, ".ndjson": read_jsonl, ".json": read_json, ".csv": read_csv, ".tsv": read_csv,
        ".parquet": read_parquet, ".txt": read_text,
    }  # fmt: skip
    asked = Asked(on_bad, only, reading or Reading())
    rows = _read_hub(source, section, asked) if kind == "hub" else readers[kind](Path(source), asked)
    return itertools.islice(_told(rows, asked), limit)


def _told(rows: Iterator[Row], asked: Asked) -> Iterator[Row]:
    """Those that are wanted; an error that ends the reading goes to on_bad, with the row that could not be reached."""
    last = 0
    try:
        for row in rows:
            last = row.number
            if asked.wants(last):
                yield row
    except DataError as error:
        if error.row is None and error.code is not None:
            error.row = last + 1
        asked.on_bad(error)


def _kind(source: str) -> str:
    """The reader's suffix, or `hub`.  Raises DataError where the source cannot be read at all."""
    path = Path(source)
    suffix = suffix_of(path)
    if path.is_dir():
        raise DataError(
            f"{source} is a folder, not a data file.", "Give one file in data.train: " + ", ".join(SUFFIXES) + "."
        )
    if path.exists():
        if suffix not in SUFFIXES:
            raise DataError(
                f"{source} has the suffix {path.suffix or '(none)'}, which is not one of {', '.join(SUFFIXES)}.",
                "Rename the file to what it holds; .gz may follow.",
            )
        return suffix
    looks_like_hub = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", source) is not None
    if looks_like_hub and suffix not in SUFFIXES and not path.parent.is_dir():
        return "hub"
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if near:
        remedy = "Did you mean " + " or ".join(str(path.parent / name) for name in near) + "?"
    elif not path.parent.is_dir():
        remedy = f"The folder {path.parent} does not exist either; paths are relative to {Path.cwd()}."
    else:
        remedy = f"Paths are relative to {Path.cwd()}; a hub data set is written owner/name."
    raise DataError(f"There is no data file at {source}.", remedy)


def _read_hub(name: str, section: DataSection, asked: Asked) -> Iterator[Row]:
    rows = _load_hub(name, section)
    number = 0
    asked.reading.follow(lambda: number, len(rows))
    for values in rows:
        number += 1
        yield Row(name, number, values)


def _load_hub(name: str, section: DataSection) -> Any:
    """The split of a hub data set (a `datasets.Dataset`, memory-mapped).  Raises DataError."""
    import datasets
    import huggingface_hub.constants as hub_constants
    import huggingface_hub.errors as hub

    config, split = section.hub_config, section.hub_split
    kept = Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")
    if not hub_constants.HF_HUB_OFFLINE and not kept.is_dir() and not _reaches(hub_constants.ENDPOINT):
        # The client would try for most of a minute.
        raise DataError(
            f"There is no local file {name}, and the hub, where it would be a data set, cannot be reached.",
            "Check the path; or the network, for a data set of the hub.",
        )
    try:
        with _quiet("huggingface_hub", "datasets"):
            return datasets.load_dataset(name, config, split=split)
    except (datasets.exceptions.DatasetNotFoundError, hub.GatedRepoError, hub.RepositoryNotFoundError) as error:
        what = str(error)
        if isinstance(error, hub.GatedRepoError) or "gated" in what:
            raise DataError(
                f"The data set {name} is gated on the hub.",
                "Accept its terms on its hub page, then set HF_TOKEN or run `hf auth login`; or give a local file.",
            ) from None
        raise DataError(
            f"There is no data set {name} on the hub (or it is private), and no local file of that name.",
            "Check the name owner/name; for a private one set HF_TOKEN or run `hf auth login`.",
        ) from None
    except (ConnectionError, hub.OfflineModeIsEnabled, hub.LocalEntryNotFoundError) as error:
        raise DataError(
            f"The data set {name} cannot be fetched: the hub cannot be reached ({type(error).__name__}).",
            "Check the network (and HF_HUB_OFFLINE), or give a local file in data.train.",
        ) from None
    except (ValueError, FileNotFoundError, datasets.exceptions.DatasetGenerationError) as error:
        what = " ".join(str(error).split())[:300]
        raise DataError(
            f"The data set {name} (hub_config {config}, hub_split {split}) cannot be loaded: {what}.",
            "Set data.hub_config and data.hub_split to what its hub page lists, or give a local file.",
        ) from None


def _reaches(endpoint: str) -> bool:
    """Whether a connection to the hub can be made; what a proxy reaches only the client knows."""
    where = urlsplit(endpoint)
    if where.hostname is None or getproxies().get(where.scheme) or getproxies().get("all"):
        return True
    try:
        with socket.create_connection((where.hostname, where.port or PORTS.get(where.scheme, 443)), REACH_SECONDS):
            return True
    except OSError:
        return False


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Loggers that tell errors alone: what goes wrong is told by our own error."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def source_digest(source: str, section: DataSection) -> str:
    """SHA-256 of a file's bytes, or of a hub data set's fingerprint."""
    if _kind(source) == "hub":
        fingerprint = f"{source} {section.hub_config} {section.hub_split} {_load_hub(source, section)._fingerprint}"
        return hashlib.sha256(fingerprint.encode()).hexdigest()
    try:
        with Path(source).open("rb") as raw:
            return hashlib.file_digest(raw, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror}.", "Check the file and its permissions.") from None
