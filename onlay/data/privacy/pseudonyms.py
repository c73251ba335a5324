"""Pseudonyms: tokens such as <PERSON_k4q7t2mzw9> that stand for one person, number or address everywhere, under one key.

A token is an HMAC of the kind and the normalised value: without the key it can be neither made nor guessed, and two files share
their tokens exactly when they share the key.  Another spelling of the same value has the same token with a mark,
<EMAIL_k4q7t2mzw9.3fa2xq>, so that restoring gives back every letter; the usual spelling has none.

What the tokens stand for is kept in a vault: a SQLite file beside the key whose every entry is sealed with the key.
"""

from __future__ import annotations

import base64
import ipaddress
import re
import sqlite3
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path

from onlay.data.privacy.key import VARIABLE, Key
from onlay.database import Database
from onlay.errors import DataError, SetupError

LABELS = {
    "email": "EMAIL", "phone": "PHONE", "card": "CARD", "iban": "IBAN", "national_id": "NATIONAL_ID", "ip": "IP", "url": "URL",
    "url_credentials": "URL_CREDENTIALS", "key": "KEY", "address": "ADDRESS", "name": "PERSON",
}  # fmt: skip
ANY_LABEL = "EMAIL|PHONE|CARD|IBAN|NATIONAL_ID|IP|URL|URL_CREDENTIALS|KEY|ADDRESS|PERSON"
IDENTITY_LETTERS = 10
"""50 bits.  Two of a million values get one token in 1 of 2,000 cases, and then work stops: see `Pseudonyms`."""
SPELLING_LETTERS = 6
TOKEN = re.compile(rf"<(?:{ANY_LABEL})_[a-z2-7]{{{IDENTITY_LETTERS}}}(?:\.[a-z2-7]{{{SPELLING_LETTERS}}})?>")
REDACTED = re.compile(rf"\[(?:{ANY_LABEL})\]")
OTHER_KEY = "Use another key: with it they will differ."
LOOKED_UP = 500
"""Tokens in one question to the vault."""


class Pseudonyms:
    """Makes tokens, and remembers what each stands for until it is put into the vault.

    Raises DataError, from `token` and `add`, when two values meet in one token: no text is ever restored to another's value.
    """

    def __init__(self, key: Key) -> None:
        self.key = key
        self.texts: dict[str, str] = {}
        """Token to the text that it stands for."""

    def token(self, kind: str, text: str, *, identity: str | None = None) -> str:
        """`identity`: the normalised value, where it is not that of the text itself (a first name, of a person named whole)."""
        own = normalised(kind, text)
        identity = own if identity is None else identity
        name = _letters(self.key.derive("identity", kind.encode(), identity.encode("utf-8", "surrogatepass")))[
            :IDENTITY_LETTERS
        ]
        token = f"<{LABELS[kind]}_{name}>"
        if text != usual(kind, identity):
            spelling = self.key.derive("spelling", name.encode(), text.encode("utf-8", "surrogatepass"))
            token = f"{token[:-1]}.{_letters(spelling)[:SPELLING_LETTERS]}>"
        self.add({token: text})
        return token

    def add(self, texts: Mapping[str, str]) -> None:
        """What a worker remembered."""
        for token, text in texts.items():
            if self.texts.setdefault(token, text) != text:
                raise DataError(f"Two values have the same pseudonym {token}.", OTHER_KEY)


def _letters(digest: bytes) -> str:
    return base64.b32encode(digest).decode().lower()


def normalised(kind: str, text: str) -> str:
    """Equal for spellings of one value: letter case, white space, separators."""
    text = " ".join(unicodedata.normalize("NFKC", text).split())
    if kind == "phone":
        return _phone(text)
    if kind in ("card", "iban", "national_id"):
        return re.sub(r"[\s./()-]", "", text).upper()
    if kind == "ip":
        return str(ipaddress.ip_address(text))
    if kind in ("email", "name"):
        return text.casefold()
    if kind == "address":
        return re.sub(r"[\s,.;]+", " ", text).strip().casefold()
    if kind == "url":
        scheme, mark, rest = text.rpartition("://")
        host, slash, path = rest.partition("/")
        return f"{scheme.lower()}{mark}{host.lower()}{slash}{path}"
    return text


def _phone(text: str) -> str:
    """+ and digits for an international number, also for one of ten digits in North American groups.

    A national number without its country stays another value than the same number with it.
    """
    number, _, extension = re.sub(r"\s?(?:ext(?:ension)?\.?|x)\s?(?=\d+$)", "x", text.lower()).partition("x")
    international = number.lstrip().startswith(("+", "00"))
    groups = re.findall(r"\d+", number.replace("(0)", "") if international else number)
    digits = "".join(groups)
    if international:
        digits = "+" + (digits[2:] if number.lstrip().startswith("00") else digits)
    elif [len(group) for group in groups] in ([3, 3, 4], [1, 3, 3, 4]):
        digits = "+1" + digits[-10:]
    return digits + (f"x{extension}" if extension else "")


def usual(kind: str, identity: str) -> str:
    """The spelling that needs no mark."""
    if kind == "name":
        return " ".join(word[:1].upper() + word[1:] for word in identity.split(" "))
    return identity


class Vault:
    """What tokens stand for, sealed with the key.  Processes may use it at once; entries are added, never changed."""

    def __init__(self, path: Path, *, key: Key) -> None:
        self.path = path
        self.key = key
        self._database = Database(path, migrations=MIGRATIONS, what="vault of pseudonyms")

    def add(self, pseudonyms: Pseudonyms) -> None:
        """Raises DataError where a token stands for another value already, SetupError where the vault is another key's;
        nothing is then added."""
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch(mode=0o600)
        rows = [(token, self.key.seal(text, label=token)) for token, text in pseudonyms.texts.items()]
        with self._database.write() as connection:
            connection.execute("INSERT OR IGNORE INTO owner (one, fingerprint) VALUES (1, ?)", (self.key.fingerprint,))
            self._check(connection)
            connection.executemany("INSERT OR IGNORE INTO pseudonyms (token, sealed) VALUES (?, ?)", rows)
            for token, sealed in rows:
                held = connection.execute("SELECT sealed FROM pseudonyms WHERE token = ?", (token,)).fetchone()[
                    "sealed"
                ]
                if held != sealed:
                    self._open(token, held)
                    raise DataError(f"Two values have the same pseudonym {token}.", OTHER_KEY)

    def restore(self, text: str) -> str:
        """The text with every token of this vault replaced by what it stands for; tokens of another key stay.

        Raises SetupError as `look_up` does.
        """
        texts = self.look_up(TOKEN.findall(text))
        return TOKEN.sub(lambda found: texts.get(found[0], found[0]), text)

    def look_up(self, tokens: Iterable[str]) -> dict[str, str]:
        """What the tokens stand for; those that are not in the vault are left out.

        Raises SetupError where there is no vault, or the key is not the vault's; for no tokens, too.
        """
        if not self.path.is_file():
            raise SetupError(
                f"The vault of pseudonyms {self.path} does not exist.",
                "It lies beside the key that they were made with; `onlay prepare` with that key and data fills it again.",
            )
        wanted = sorted(set(tokens))
        texts: dict[str, str] = {}
        with self._database.read() as connection:
            self._check(connection)
            for first in range(0, len(wanted), LOOKED_UP):
                some = wanted[first : first + LOOKED_UP]
                marks = ", ".join("?" * len(some))
                for row in connection.execute(f"SELECT token, sealed FROM pseudonyms WHERE token IN ({marks})", some):
                    texts[row["token"]] = self._open(row["token"], row["sealed"])
        return texts

    def holds(self, tokens: Iterable[str]) -> bool:
        """Whether it knows every one of them; False where there is no vault (any more)."""
        wanted = set(tokens)
        return not wanted or (self.path.is_file() and len(self.look_up(wanted)) == len(wanted))

    def _check(self, connection: sqlite3.Connection) -> None:
        owner = connection.execute("SELECT fingerprint FROM owner").fetchone()
        if owner is not None and owner["fingerprint"] != self.key.fingerprint:
            raise SetupError(f"The vault {self.path} belongs to the key {owner['fingerprint']}, not to {self.key.fingerprint}.",
                             "Give the key that its pseudonyms were made with.")  # fmt: skip

    def _open(self, token: str, sealed: bytes) -> str:
        text = self.key.unseal(sealed, label=token)
        if text is None:
            raise SetupError(f"The vault {self.path} was changed: {token} cannot be opened.", "Take it from a backup.")
        return text


MIGRATIONS = (
    """CREATE TABLE owner (one INTEGER PRIMARY KEY CHECK (one = 1), fingerprint TEXT NOT NULL);
    CREATE TABLE pseudonyms (token TEXT PRIMARY KEY, sealed BLOB NOT NULL) WITHOUT ROWID;""",
)


def vault_path(key_file: str | Path) -> Path:
    """Where the vault of a key file is: beside it."""
    path = Path(key_file).expanduser()
    return path.with_name(path.name + ".vault")


def open_vault(where: str | Path, *, key: Key, home: Path) -> Vault:
    """The vault of a key that `read_key(where)` gave: beside its file, or under `home` where it is in a variable, which has
    no place of its own: `home`/vaults/FINGERPRINT.vault."""
    in_variable = isinstance(where, str) and where.startswith(VARIABLE)
    return Vault(home / "vaults" / f"{key.fingerprint}.vault" if in_variable else vault_path(where), key=key)
