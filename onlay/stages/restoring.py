"""`restore`: pseudonyms in a text become what they stand for, for whoever has the key."""

from __future__ import annotations

import contextlib
import csv
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from onlay import ledger
from onlay.errors import DataError, OutputError

if TYPE_CHECKING:
    from onlay.data.privacy.restore import Restorer

SHOWN_TOKENS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Restored:
    """What became of a text's pseudonyms."""

    file: str
    """`-` for a stream."""
    output: str | None
    """None: the text was given to the caller."""
    restored: int
    """Pseudonyms that were replaced, each as often as it occurs."""
    unknown: int
    """Pseudonyms that the vault does not know; they stay as they are."""
    unknown_tokens: list[str]
    """The most frequent of them."""

    def values(self) -> dict[str, Any]:
        return asdict(self)


def restore(
    source: str | IO[bytes], *, key: str, output: Path | None = None, write: Callable[[str], object] | None = None
) -> Restored:
    """Replaces pseudonyms with the vault of a key; the source stays as it is.

    `source`: a text file, or a stream of UTF-8; `key`: the key's file, or env:NAME; `output`: a new file, readable by its
    owner alone; without it the text goes to `write`, piece by piece.  Exactly one of the two is given.
    Raises SetupError for a key or vault that cannot be used, DataError for what is no text, OutputError for a file that exists.
    """
    from onlay.data.privacy.key import read_key
    from onlay.data.privacy.pseudonyms import open_vault
    from onlay.data.privacy.restore import FORMS, Restorer

    if (output is None) == (write is None):
        raise ValueError("give either output or write")
    restorer = Restorer(open_vault(key, key=read_key(key), home=ledger.home()))
    told = source if isinstance(source, str) else "-"
    if output is not None and output.exists():
        raise OutputError(f"{output} exists already.", "Choose another name with --output.")
    with _opened(source) as stream:
        lines = _lines(stream, told)
        pieces = restorer.restore(lines, form=FORMS.get(Path(told).suffix.lower(), "text"))
        try:
            if output is not None:
                _write_new(output, pieces)
            elif write is not None:
                for piece in pieces:
                    write(piece)
        except csv.Error as error:
            raise DataError(f"{told} is no table: {error}.", "Rename it to .txt if it is none.") from None
    return _restored(restorer, told, output)


def _restored(restorer: Restorer, file: str, output: Path | None) -> Restored:
    return Restored(
        file=file, output=None if output is None else str(output), restored=restorer.restored,
        unknown=restorer.unknown.total(),
        unknown_tokens=[token for token, _ in restorer.unknown.most_common(SHOWN_TOKENS)],
    )  # fmt: skip


@contextlib.contextmanager
def _opened(source: str | IO[bytes]) -> Iterator[IO[bytes]]:
    if not isinstance(source, str):
        yield source
        return
    try:
        stream = Path(source).expanduser().open("rb")
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror}.", "Give a text file, or - for standard input.") from None  # fmt: skip
    with stream:
        yield stream


def _lines(stream: IO[bytes], told: str) -> Iterator[str]:
    """Line ends stay as they are."""
    for number, line in enumerate(stream, 1):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError:
            raise DataError(
                f"{'standard input' if told == '-' else told}, line {number}: it is not UTF-8 text.",
                "Unpack it, or save it as text or JSON lines, first.",
            ) from None


def _write_new(output: Path, pieces: Iterator[str]) -> None:
    """Whole or not at all, and never over a file, also not over one that another process wrote meanwhile."""
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as out:
            out.writelines(pieces)
            out.flush()
            os.fsync(out.fileno())
        os.link(temporary, output)
    except FileExistsError:
        raise OutputError(f"{output} exists already.", "Choose another name with --output.") from None
    except OSError as error:
        raise OutputError(
            f"{output} could not be written: {error.strerror}.", "Free disk space, or choose another place."
        ) from None
    finally:
        with contextlib.suppress(OSError):  # Its folder may be none.
            temporary.unlink()
