from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from onlay.data.privacy import restore
from onlay.data.privacy.key import Key
from onlay.data.privacy.pseudonyms import Pseudonyms, Vault
from onlay.data.privacy.restore import FORMS, Form, Restorer
from onlay.errors import SetupError

KEY = Key(bytes(range(32)))
TEXTS = ("Ann Qorvin", 'quoted "Bo"\nQorvin, of\\a', "Zoë\tQorvin", "half \ud800")
UNKNOWN = "<PERSON_aaaaaaaaaa>"


@pytest.fixture
def tokens(tmp_path: Path) -> list[str]:
    pseudonyms = Pseudonyms(KEY)
    made = [pseudonyms.token("address", text) for text in TEXTS]
    Vault(tmp_path / "a.vault", key=KEY).add(pseudonyms)
    return made


@pytest.fixture
def restorer(tmp_path: Path) -> Restorer:
    return Restorer(Vault(tmp_path / "a.vault", key=KEY))


def restored(restorer: Restorer, text: str, form: Form) -> str:
    return "".join(restorer.restore(text.splitlines(keepends=True), form=form))


def test_text_gets_every_letter_back(tokens: list[str], restorer: Restorer) -> None:
    text = f"To {tokens[0]},\r\n{tokens[1]} and {UNKNOWN}\n{tokens[0]}{tokens[2]}"
    assert restored(restorer, text, "text") == f"To {TEXTS[0]},\r\n{TEXTS[1]} and {UNKNOWN}\n{TEXTS[0]}{TEXTS[2]}"
    assert (restorer.restored, dict(restorer.unknown)) == (4, {UNKNOWN: 1})
    assert restored(restorer, tokens[3], "text") == "half \\ud800", "what no file can hold is written out"


@pytest.mark.parametrize("form", ["json", "text"])
@pytest.mark.parametrize("ensure_ascii", [False, True])
def test_json_lines_stay_json(tokens: list[str], restorer: Restorer, form: Form, ensure_ascii: bool) -> None:
    rows = [{"prompt": f"é {token} {UNKNOWN}", "n": 1.10} for token in tokens]
    text = "".join(json.dumps(row, ensure_ascii=ensure_ascii) + "\n" for row in rows)
    made = restored(restorer, text, form)
    assert [json.loads(line)["prompt"] for line in made.splitlines()] == [f"é {text} {UNKNOWN}" for text in TEXTS]
    made.encode()


def test_json_on_many_lines_stays_json(tokens: list[str], restorer: Restorer) -> None:
    made = restored(restorer, json.dumps([{"a": token} for token in tokens], indent=2), "json")
    assert json.loads(made) == [{"a": text} for text in TEXTS]


@pytest.mark.parametrize(("form", "delimiter"), [("csv", ","), ("tsv", "\t")])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_tables_stay_tables(tokens: list[str], restorer: Restorer, form: Form, delimiter: str, end: str) -> None:
    rows = [["prompt", "n"], *([f"Dear {token}, é", "1"] for token in tokens[:3]), ["two\nlines", f"{tokens[0]}"]]
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter, lineterminator=end).writerows(rows)
    made = restored(restorer, "\ufeff" + out.getvalue(), form)
    expected = [["prompt", "n"], *([f"Dear {text}, é", "1"] for text in TEXTS[:3]), ["two\nlines", TEXTS[0]]]
    assert made.startswith(f"\ufeffprompt{delimiter}n{end}")
    assert list(csv.reader(io.StringIO(made[1:], newline=""), delimiter=delimiter)) == expected
    assert restored(restorer, "", form) == ""


@pytest.mark.parametrize("form", ["text", "csv"])
def test_long_texts_are_taken_in_parts(tokens: list[str], restorer: Restorer, form: Form, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(restore, "LINES", 3)
    pieces = list(restorer.restore((f"{number} {tokens[0]}\n" for number in range(10)), form=form))
    assert len(pieces) == 4
    assert "".join(pieces) == "".join(f"{number} {TEXTS[0]}\n" for number in range(10))


def test_another_key_is_refused_before_anything_is_written(tokens: list[str], tmp_path: Path) -> None:
    for path, told in ((tmp_path / "a.vault", "belongs to the key"), (tmp_path / "none.vault", "does not exist")):
        other = Restorer(Vault(path, key=Key(bytes(32))))
        with pytest.raises(SetupError, match=told):
            next(other.restore(["no token here"], form="text"))


def test_forms_go_by_the_files_name() -> None:
    assert FORMS[".jsonl"] == "json" and FORMS[".tsv"] == "tsv" and ".txt" not in FORMS
