"""The key of pseudonyms: 32 bytes in a file of its own, or in an environment variable, never beside the data.

Everything is derived from it with HMAC-SHA256, by the standard library alone.  `seal` is deterministic authenticated encryption in
the manner of SIV (Rogaway and Shrimpton, EUROCRYPT 2006): the tag is a PRF of label and text, and the key stream is a PRF of the tag,
so equal texts under one label give equal bytes, two texts never share a key stream, and a changed byte is noticed.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path

from onlay.errors import OutputError, SetupError

KEY_BYTES = 32
TAG_BYTES = 16
BLOCK = 32
"""Sealed texts are filled up to a multiple of this, so that their size tells little of their length."""
VARIABLE = "env:"
HEADER = "onlay-pseudonym-key-1 "


@dataclass(frozen=True, slots=True)
class Key:
    secret: bytes = field(repr=False)

    def derive(self, purpose: str, *parts: bytes) -> bytes:
        """32 bytes, another for every purpose and every list of parts."""
        message = b"".join(len(part).to_bytes(8, "big") + part for part in (purpose.encode(), *parts))
        return hmac.new(self.secret, message, hashlib.sha256).digest()

    @property
    def fingerprint(self) -> str:
        """Tells keys apart without telling anything of them."""
        return self.derive("fingerprint").hex()[:12]

    def seal(self, text: str, *, label: str) -> bytes:
        plain = text.encode("utf-8", "surrogatepass") + b"\x80"
        plain += b"\x00" * (-len(plain) % BLOCK)
        tag = self.derive("tag", label.encode(), plain)[:TAG_BYTES]
        return tag + self._streamed(tag, plain)

    def unseal(self, sealed: bytes, *, label: str) -> str | None:
        """None: another key, another label, or changed bytes."""
        tag = sealed[:TAG_BYTES]
        plain = self._streamed(tag, sealed[TAG_BYTES:])
        if not hmac.compare_digest(tag, self.derive("tag", label.encode(), plain)[:TAG_BYTES]):
            return None
        return plain.rstrip(b"\x00")[:-1].decode("utf-8", "surrogatepass")

    def _streamed(self, tag: bytes, content: bytes) -> bytes:
        stream = b"".join(
            self.derive("stream", tag, number.to_bytes(8, "big")) for number in range(-(-len(content) // 32))
        )
        return bytes(one ^ other for one, other in zip(content, stream, strict=False))


def read_key(where: str | Path, *, make: bool = False) -> Key:
    """The key in a file, or in the environment variable NAME for `env:NAME`.

    `make` writes a new file, readable by its owner alone, where there is none.
    Raises SetupError: no such file or variable, not a key, or a file that others may read; OutputError: it cannot be written.
    """
    if isinstance(where, str) and where.startswith(VARIABLE):
        name = where.removeprefix(VARIABLE)
        if name not in os.environ:
            raise SetupError(f"The environment variable {name}, which holds the key of pseudonyms, is not set.",
                             f"Set it to 64 hexadecimal digits: export {name}=$(openssl rand -hex 32).")  # fmt: skip
        return Key(_decoded(os.environ[name].strip(), f"The environment variable {name}"))
    path = Path(where).expanduser()
    if make and not path.exists():
        _write_new(path)
    try:
        with path.open(encoding="utf-8") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            text = file.read(1000).strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise SetupError(f"The key of pseudonyms {path} cannot be read: {reason}.",
                         "Give the file that the pseudonyms were made with.") from None  # fmt: skip
    if os.name == "posix" and mode & 0o077:
        raise SetupError(f"The key of pseudonyms {path} can be read by others (mode {mode:o}).", f"chmod 600 {path}")
    return Key(_decoded(text.removeprefix(HEADER), f"The file {path}"))


def _decoded(text: str, what: str) -> bytes:
    try:
        secret = bytes.fromhex(text)
    except ValueError:
        secret = b""
    if len(secret) != KEY_BYTES:
        raise SetupError(f"{what} does not hold a key of pseudonyms: that is {2 * KEY_BYTES} hexadecimal digits.",
                         "Give the right one; a lost key cannot be made again.")  # fmt: skip
    return secret


def _write_new(path: Path) -> None:
    """Of two processes that make it at once, one writes it, and the other uses that."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(f"{HEADER}{secrets.token_hex(KEY_BYTES)}\n")
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    except OSError as error:
        raise OutputError(f"The key of pseudonyms {path} cannot be written: {error.strerror}.",
                          "Choose another place for it.") from None  # fmt: skip
    finally:
        with contextlib.suppress(OSError):  # Its folder may be none.
            temporary.unlink()
