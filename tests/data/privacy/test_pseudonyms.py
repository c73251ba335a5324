from __future__ import annotations

import os
from pathlib import Path

import pytest

from onlay.data.privacy.key import Key
from onlay.data.privacy.pseudonyms import ANY_LABEL, LABELS, TOKEN, Pseudonyms, Vault, normalised, vault_path
from onlay.data.privacy.spans import KINDS
from onlay.errors import DataError, SetupError

KEY = Key(bytes(range(32)))


def test_every_kind_has_a_label() -> None:
    assert set(LABELS) == set(KINDS) and sorted(LABELS.values()) == sorted(ANY_LABEL.split("|"))


@pytest.mark.parametrize(
    ("kind", "spellings"),
    [
        ("email", ["Ada@Example.org", "ada@example.org", "ADA@EXAMPLE.ORG"]),
        ("phone", ["+1 202 555 0143", "+1-202-555-0143", "(202) 555-0143", "202.555.0143", "001-202-555-0143"]),
        ("phone", ["+46 (0)8 928 571 38", "+46 8 92857138", "0046 8 928 571 38"]),
        ("phone", ["202-555-0143x12", "(202) 555-0143 ext. 12"]),
        ("iban", ["DE89370400440532013000", "de89 3704 0044 0532 0130 00"]),
        ("card", ["4111 1111 1111 1111", "4111-1111-1111-1111", "4111111111111111"]),
        ("ip", ["2001:db8::1", "2001:0DB8:0:0:0:0:0:1"]),
        ("name", ["Sara  Schwarz", "SARA SCHWARZ", "sara schwarz"]),
        ("address", ["12 Oak Ave., Apt 4", "12 oak ave\n Apt 4"]),
        ("url", ["HTTPS://Example.org/A", "https://example.org/A"]),
    ],
)
def test_spellings_of_one_value_share_their_token(kind: str, spellings: list[str]) -> None:
    pseudonyms = Pseudonyms(KEY)
    tokens = [pseudonyms.token(kind, text) for text in spellings]
    assert len({token.strip("<>").split(".")[0] for token in tokens}) == 1
    assert len(set(tokens)) == len(spellings), "each spelling has its own mark"
    assert [pseudonyms.texts[token] for token in tokens] == spellings
    assert all(TOKEN.fullmatch(token) for token in tokens)


def test_other_values_kinds_and_keys_have_other_tokens() -> None:
    pseudonyms = Pseudonyms(KEY)
    tokens = {pseudonyms.token("name", f"Person {number}") for number in range(5000)}
    assert len(tokens) == 5000
    assert pseudonyms.token("key", "abc") != pseudonyms.token("key", "abd")
    assert pseudonyms.token("email", "x").split("_")[1] != pseudonyms.token("name", "x").split("_")[1]
    assert Pseudonyms(Key(bytes(32))).token("name", "Person 1") not in tokens
    assert Pseudonyms(KEY).token("name", "Person 1") in tokens
    assert normalised("phone", "020 7946 0958") != normalised("phone", "+44 20 7946 0958")


def test_the_usual_spelling_has_no_mark() -> None:
    pseudonyms = Pseudonyms(KEY)
    for kind, text in (
        ("name", "Sara Schwarz"),
        ("email", "a@b.org"),
        ("iban", "DE89370400440532013000"),
        ("phone", "+12025550143"),
    ):
        assert "." not in pseudonyms.token(kind, text)


def test_two_values_in_one_token_stop_the_work(tmp_path: Path) -> None:
    pseudonyms = Pseudonyms(KEY)
    token = pseudonyms.token("name", "Ada Qorvin")
    with pytest.raises(DataError, match="Two values have the same pseudonym <PERSON_"):
        pseudonyms.add({token: "Bob Qorvin"})
    vault = Vault(tmp_path / "a.vault", key=KEY)
    vault.add(pseudonyms)
    other = Pseudonyms(KEY)
    other.texts = {"<PERSON_aaaaaaaaaa>": "New", token: "Bob Qorvin"}
    with pytest.raises(DataError, match="Two values"):
        vault.add(other)
    assert vault.restore("<PERSON_aaaaaaaaaa>") == "<PERSON_aaaaaaaaaa>", "nothing of it was added"


def test_the_vault_restores_and_holds_nothing_in_the_clear(tmp_path: Path) -> None:
    path = vault_path(tmp_path / "pseudonyms.key")
    assert path.name == "pseudonyms.key.vault"
    pseudonyms = Pseudonyms(KEY)
    texts = [f"Person-{number} <&é" for number in range(1200)]
    text = " ".join(pseudonyms.token("name", one) for one in texts)
    Vault(path, key=KEY).add(pseudonyms)
    Vault(path, key=KEY).add(pseudonyms)  # Twice changes nothing.
    assert Vault(path, key=KEY).restore(text) == " ".join(texts)
    assert path.stat().st_mode & 0o777 == 0o600
    assert all(b"Person-" not in one.read_bytes() for one in tmp_path.iterdir())


def test_the_vault_opens_with_its_key_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.vault"
    with pytest.raises(SetupError, match="does not exist"):
        Vault(path, key=KEY).restore("x")
    pseudonyms = Pseudonyms(KEY)
    token = pseudonyms.token("name", "Ada Qorvin")
    Vault(path, key=KEY).add(pseudonyms)
    other = Key(os.urandom(32))
    with pytest.raises(SetupError, match="belongs to the key"):
        Vault(path, key=other).restore(token)
    with pytest.raises(SetupError, match="belongs to the key"):
        Vault(path, key=other).add(Pseudonyms(other))
    foreign = Pseudonyms(other).token("name", "Ada Qorvin")
    assert Vault(path, key=KEY).restore(f"{foreign} {token}") == f"{foreign} Ada Qorvin"


def test_a_changed_entry_is_noticed(tmp_path: Path) -> None:
    import sqlite3

    path = tmp_path / "a.vault"
    pseudonyms = Pseudonyms(KEY)
    first, second = pseudonyms.token("name", "Ada Qorvin"), pseudonyms.token("name", "Bob Qorvin")
    Vault(path, key=KEY).add(pseudonyms)
    connection = sqlite3.connect(path)
    # An entry moved to another token is as wrong as a changed byte.
    connection.execute(
        "UPDATE pseudonyms SET sealed = (SELECT sealed FROM pseudonyms WHERE token = ?) WHERE token = ?",
        (first, second),
    )
    connection.commit()
    connection.close()
    with pytest.raises(SetupError, match="was changed"):
        Vault(path, key=KEY).restore(second)
