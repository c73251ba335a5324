"""Takes personal data out of rows on their way to the tokenizer, looks again, and keeps what pseudonyms stand for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from onlay.data.privacy.anonymise import Anonymiser
from onlay.data.privacy.key import Key, read_key
from onlay.data.privacy.names import presidio_names
from onlay.data.privacy.pseudonyms import Vault, open_vault
from onlay.data.read import Conversation, Document
from onlay.errors import DataError
from onlay.recipe import Recipe

Item = Conversation | Document


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cleaner:
    anonymiser: Anonymiser
    vault: Vault | None
    """What pseudonyms stand for; None where personal data is redacted."""
    keeps_answers: bool
    """Answers are labels, which stay as they are."""
    digest: str
    """Of everything that the cleaned rows depend on; of the key only its fingerprint."""

    def clean(self, item: Item) -> Item:
        """The item without personal data; itself where there is none.  Raises DataError where some is still found."""
        cleaned = self.anonymiser.anonymise(item)
        if self.keeps_answers and isinstance(item, Conversation) and isinstance(cleaned, Conversation):
            turns = (
                old if old.role == "assistant" else new for old, new in zip(item.turns, cleaned.turns, strict=True)
            )
            cleaned = dataclasses.replace(cleaned, turns=tuple(turns))
        left = sorted({span.kind for span in self.anonymiser.remaining(cleaned)})
        if left:
            raise DataError(
                f"{item.place}: personal data is left after data.anonymise = {self.anonymiser.mode}: {', '.join(left)}.",
                "It stands where nothing is replaced (a label, a function's name, a key of its arguments): change or delete the row.",
            )
        return item if cleaned == item else cleaned

    def store(self) -> list[str]:
        """Puts the pseudonyms since the last call into the vault, so that memory does not grow with them; gives their tokens."""
        if self.vault is not None and self.anonymiser.pseudonyms is not None:
            self.vault.add(self.anonymiser.pseudonyms)
        return sorted(self.anonymiser.taken()[1])


def open_cleaner(recipe: Recipe, *, home: Path) -> Cleaner | None:
    """What data.anonymise asks for; None where it is off.  A key file that is not there is made.

    `home`: under it lies the vault of a key in an environment variable; else it lies beside the key file.
    Raises SetupError for a key or model that cannot be used, OutputError for a key that cannot be written.
    """
    data = recipe.data
    if data.anonymise == "off":
        return None
    key: Key | None = None
    vault: Vault | None = None
    if data.anonymise_key is not None:
        key = read_key(data.anonymise_key, make=True)
        vault = open_vault(data.anonymise_key, key=key, home=home)
    anonymiser = Anonymiser(
        data.anonymise, key=key, kinds=frozenset(data.anonymise_kinds) if data.anonymise_kinds is not None else None,
        names=presidio_names(data.anonymise_names) if data.anonymise_names is not None else None,
    )  # fmt: skip
    return Cleaner(
        anonymiser=anonymiser, vault=vault, keeps_answers=recipe.adapter.method == "head", digest=anonymiser.digest,
    )  # fmt: skip
