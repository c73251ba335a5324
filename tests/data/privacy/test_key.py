from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from onlay.data.privacy.key import Key, read_key
from onlay.errors import OutputError, SetupError


def test_a_key_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "pseudonyms.key"
    made = read_key(path, make=True)
    assert len(made.secret) == 32 and read_key(path) == made == read_key(str(path), make=True)
    assert path.stat().st_mode & 0o777 == 0o600 and [one.name for one in path.parent.iterdir()] == [path.name]
    assert read_key(tmp_path / "other.key", make=True) != made
    assert made.secret.hex() not in repr(made) and made.fingerprint not in made.secret.hex()


def test_keys_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SetupError, match="cannot be read: No such file"):
        read_key(tmp_path / "none.key")
    path = tmp_path / "open.key"
    read_key(path, make=True)
    path.chmod(0o644)
    with pytest.raises(SetupError, match="can be read by others"):
        read_key(path)
    path.chmod(0o600)
    for content in (b"", b"short", b"zz" * 32, b"ab" * 31, b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(SetupError, match=r"does not hold a key|not text"):
            read_key(path)
    with pytest.raises(SetupError, match="cannot be read"):
        read_key(tmp_path)
    with pytest.raises(OutputError, match="cannot be written"):
        read_key(path / "below" / "a.key", make=True)
    with pytest.raises(SetupError, match=r"NO_SUCH_VARIABLE.* is not set"):
        read_key("env:NO_SUCH_VARIABLE")
    monkeypatch.setenv("SOME_KEY", "too short")
    with pytest.raises(SetupError, match="SOME_KEY does not hold a key") as told:
        read_key("env:SOME_KEY")
    assert "too short" not in str(told.value)


def test_a_key_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "ab" * 32)
    assert read_key("env:SOME_KEY") == Key(bytes.fromhex("ab" * 32))


def test_derived_values_depend_on_purpose_and_on_how_parts_are_divided() -> None:
    key = Key(bytes(32))
    values = {
        key.derive(*parts)
        for parts in (("a",), ("a", b""), ("a", b"b"), ("ab",), ("a", b"b", b"c"), ("a", b"bc"), ("a", b"", b"bc"))
    }
    assert len(values) == 7


def test_sealed_texts_open_with_their_key_and_label_alone() -> None:
    draw = random.Random(0)
    key, other = Key(os.urandom(32)), Key(os.urandom(32))
    for _ in range(200):
        text = "".join(draw.choices("aé漢\x00\x80 \ud800😀", k=draw.randint(0, 70)))
        sealed = key.seal(text, label="a")
        assert sealed == key.seal(text, label="a") and key.unseal(sealed, label="a") == text
        assert key.unseal(sealed, label="b") is None and other.unseal(sealed, label="a") is None
        place = draw.randrange(len(sealed))
        changed = sealed[:place] + bytes([sealed[place] ^ 1]) + sealed[place + 1 :]
        assert key.unseal(changed, label="a") is None
        assert len(sealed) % 32 == 16
    assert key.unseal(b"", label="a") is None and key.unseal(b"x" * 16, label="a") is None
    assert key.seal("same", label="a")[16:] != key.seal("same", label="b")[16:]
