"""`onlay restore`, as a user has it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from onlay import stages
from onlay.data.privacy.key import read_key
from onlay.data.privacy.pseudonyms import Pseudonyms, open_vault
from onlay.errors import DataError, OutputError

UNKNOWN = "<PERSON_aaaaaaaaaa>"


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A pseudonym whose key and vault lie in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ONLAY_HOME", str(tmp_path / "home"))
    return made_with("key", "Ann Qorvin")


def made_with(where: str, text: str) -> str:
    key = read_key(where, make=True)
    pseudonyms = Pseudonyms(key)
    token = pseudonyms.token("name", text)
    open_vault(where, key=key, home=Path(os.environ["ONLAY_HOME"])).add(pseudonyms)
    return token


def call(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "onlay.cli", "restore", *arguments],
        input=stdin, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_a_file_is_restored_to_a_new_one(token: str) -> None:
    Path("a.jsonl").write_text(json.dumps({"prompt": f"Dear {token} and {UNKNOWN}"}) + "\n")
    code, out, err = call("a.jsonl", "--key", "key", "--output", "sub/b.jsonl")
    assert (code, err) == (0, "")
    assert out == f"sub/b.jsonl: Pseudonyms: 1 restored, 1 unknown.\nUnknown ones stay as they are: {UNKNOWN}.\n"
    assert json.loads(Path("sub/b.jsonl").read_text()) == {"prompt": f"Dear Ann Qorvin and {UNKNOWN}"}
    assert Path("sub/b.jsonl").stat().st_mode & 0o777 == 0o600
    code, out, err = call("a.jsonl", "--key", "key", "--output", "a.jsonl")
    assert (code, out) == (2, "")
    assert err == "a.jsonl exists already.\nChoose another name with --output.\n"
    assert token in Path("a.jsonl").read_text()
    assert sorted(path.name for path in Path("sub").iterdir()) == ["b.jsonl"]


def test_a_stream_is_restored_to_standard_output(token: str) -> None:
    assert call("-", "--key", "key", stdin=f"Dear {token}!\n") == (
        0, "Dear Ann Qorvin!\n", "Pseudonyms: 1 restored, 0 unknown.\n",
    )  # fmt: skip
    code, out, _ = call("-", "--key", "key", "--json", stdin=f"Dear {token}, {UNKNOWN}")
    assert code == 0
    assert json.loads(out) == {
        "file": "-", "output": None, "restored": 1, "unknown": 1, "unknown_tokens": [UNKNOWN], "text": f"Dear Ann Qorvin, {UNKNOWN}",
    }  # fmt: skip


def test_a_wrong_key_or_no_vault_is_told_in_two_lines(token: str) -> None:
    Path("a.txt").write_text(token)
    read_key("other", make=True)
    cases = {"other": "The vault of pseudonyms other.vault does not exist.", "nowhere": "The key of pseudonyms nowhere cannot be read"}  # fmt: skip
    for key, told in cases.items():
        code, out, err = call("a.txt", "--key", key, "--output", "b.txt")
        assert (code, out, len(err.splitlines())) == (2, "", 2)
        assert err.startswith(told)
    Path("key.vault").rename("other.vault")
    code, out, err = call("a.txt", "--key", "other", "--output", "b.txt")
    assert (code, out, len(err.splitlines())) == (2, "", 2)
    assert err.startswith("The vault other.vault belongs to the key ")
    assert sorted(path.name for path in Path().iterdir() if path.name.startswith(("b", ".b"))) == []


def test_a_key_in_a_variable_has_its_vault_in_the_home(
    token: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SOME_KEY", "ab" * 32)
    other = made_with("env:SOME_KEY", "Bo Qorvin")
    assert [path.suffix for path in (tmp_path / "home" / "vaults").glob("*.vault")] == [".vault"]
    code, out, _ = call("-", "--key", "env:SOME_KEY", stdin=f"{other} {token}")
    assert (code, out) == (0, f"Bo Qorvin {token}")


def test_what_is_no_text_is_told_with_its_line(token: str) -> None:
    Path("a.bin").write_bytes(b"fine\n\xff\xfe\n")
    with pytest.raises(DataError, match=r"a\.bin, line 2: it is not UTF-8 text"):
        stages.restore("a.bin", key="key", output=Path("b.txt"))
    Path("a.csv").write_text('a,b\n"open,1\n')
    with pytest.raises(DataError, match=r"a\.csv is no table"):
        stages.restore("a.csv", key="key", output=Path("b.csv"))
    with pytest.raises(DataError, match=r"none\.txt cannot be read"):
        stages.restore("none.txt", key="key", output=Path("b.txt"))
    assert not [path for path in Path().iterdir() if path.name.startswith(("b", ".b"))], "nothing half-written"


def test_a_file_that_appears_meanwhile_stays(token: str) -> None:
    class Slow(io.BytesIO):
        def __next__(self) -> bytes:
            Path("b.txt").write_text("mine")
            return super().__next__()

    with pytest.raises(OutputError, match="exists already"):
        stages.restore(Slow(token.encode()), key="key", output=Path("b.txt"))
    assert Path("b.txt").read_text() == "mine"
