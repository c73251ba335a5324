"""`onlay review`: in a terminal, and without one through files of decisions."""

from __future__ import annotations

import io
import json
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onlay import cli
from onlay.console.review import row_of, row_text, safe
from onlay.data.sources import source_digest
from onlay.errors import DataError, OnlayError, OutputError
from onlay.recipe import DataSection
from onlay.stages import Chosen, audit, review
from tests.data.test_review import ROWS, Person, lines
from tests.test_terminal import Terminal

QUESTION = re.compile(r"a accept   e edit")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def write_audit(
    path: Path, *findings: tuple[str, int, list[int]], file: str = "rows.jsonl", digest: str | None = None
) -> Path:
    digest = digest or source_digest("rows.jsonl", DataSection(train="rows.jsonl"))
    made = {"path": file, "digest": digest, "format": "prompt_completion", "rows": 8, "unreadable": 0, "role": "train"}
    values = {
        "kind": "audit", "files": [made],
        "findings": [
            {"code": code, "severity": "warning", "count": count, "message": "m", "remedy": "r",
             "rows": [{"file": file, "row": row} for row in rows]}
            for code, count, rows in findings
        ],
    }  # fmt: skip
    path.write_text(json.dumps(values))
    return path


# ------------------------------------------------------------------------------------------------------ the stage


def test_rows_of_findings_are_shown_with_their_codes(place: Path) -> None:
    made_audit = write_audit(
        place / "audit.json", ("refusals", 2, [2, 5]), ("repetition", 9, [5, 7]), ("few_rows", 8, [])
    )
    person, told = Person("accept", "skip", "reject"), list[str]()
    made = review("rows.jsonl", ask=person, chosen=Chosen(findings=made_audit), who="ann", report=told.append)
    assert person.numbers == [2, 5, 7]
    assert [shown.codes for shown in person.shown] == [("refusals",), ("refusals", "repetition"), ("repetition",)]
    assert (made.chosen, made.left, made.decided) == (3, 1, {"accept": 1, "reject": 1})
    assert told == [f"repetition: {made_audit} lists 2 of 9 rows; onlay audit --rows all lists every one"]
    person = Person()
    review("rows.jsonl", ask=person, chosen=Chosen(findings=made_audit, only=("refusals",)), who="ann")
    assert person.numbers == [5]


def test_what_a_real_audit_prints_is_taken(place: Path) -> None:
    rows = [*ROWS, ROWS[2], {"prompt": "9 boats?", "completion": "I'm sorry, but I cannot help with that."}]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "audit.json").write_text(json.dumps(audit("rows.jsonl", shown=None).model_dump(mode="json")))
    person = Person("skip", "skip")
    only = ("refusals", "duplicates_exact")
    review("rows.jsonl", ask=person, chosen=Chosen(findings=Path("audit.json"), only=only), who="ann")
    assert [(shown.row.number, shown.codes) for shown in person.shown] == [
        (9, ("duplicates_exact",)),
        (10, ("refusals",)),
    ]


def test_sessions_imports_and_applying_go_together(place: Path) -> None:
    review("rows.jsonl", ask=Person("accept", "reject"), who="ann")
    (place / "theirs.jsonl").write_text('{"row": 3, "decision": "reject"}\n')
    made = review("rows.jsonl", decisions=Path("theirs.jsonl"), apply=Path("clean.jsonl"), who="bob")
    assert made.taken_over is not None and made.taken_over["taken"] == 1
    assert made.applied is not None and (made.applied["rejected"], made.applied["written"]) == (2, 6)
    assert lines(place / "clean.jsonl") == [ROWS[0], *ROWS[3:]]
    assert made.decisions_path == "rows.decisions.jsonl" and made.chosen is None


@pytest.mark.parametrize(
    ("call", "kind", "problem"),
    [
        (lambda: review("rows.jsonl", who="a"), OnlayError, "Nobody can be asked: there is no terminal."),
        (lambda: review("row.jsonl", who="a"), DataError, "There is no data file at row.jsonl"),
        (lambda: review("nobody/data", who="a"), DataError, "There is no file at nobody/data"),
        (lambda: review("rows.jsonl", apply=Path("o.csv")), OutputError, "--apply o.csv does not end in .jsonl"),
        (lambda: review("rows.jsonl", apply=Path("o.jsonl")), OutputError, "There is no decision about rows.jsonl"),
        (lambda: review("rows.jsonl", decisions=Path("no.jsonl"), who="a"), OutputError, "no.jsonl cannot be read"),
        (lambda: review("rows.jsonl", ask=Person(), chosen=Chosen(only=("refusals",)), who="a"), OutputError, "there is no audit"),
        (lambda: review("rows.jsonl", ask=Person(), chosen=Chosen(findings=Path("no.json")), who="a"), OutputError, "no.json cannot be read"),
        (lambda: review("rows.jsonl", ask=Person(), chosen=Chosen(findings=Path("rows.jsonl")), who="a"), OutputError, "rows.jsonl is not JSON"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_and_nothing_is_written(
    place: Path, call: Callable[[], Any], kind: type[OnlayError], problem: str
) -> None:
    with pytest.raises(kind) as error:
        call()
    assert error.value.problem.startswith(problem) or problem in error.value.problem
    assert error.value.remedy
    assert [one.name for one in place.iterdir()] == ["rows.jsonl"]


def test_audits_that_do_not_fit_are_refused(place: Path) -> None:
    def ask(path: Path, *only: str) -> OnlayError:
        with pytest.raises(OutputError) as error:
            review("rows.jsonl", ask=Person(), chosen=Chosen(findings=path, only=only), who="a")
        return error.value

    good = write_audit(place / "audit.json", ("refusals", 1, [1]))
    assert (
        "has no finding refusal." in ask(good, "refusal").problem
        and "Did you mean refusals?" in ask(good, "refusal").remedy
    )
    other = write_audit(place / "other.json", ("refusals", 1, [1]), file="boats.jsonl")
    assert "is not about rows.jsonl, but about boats.jsonl" in ask(other).problem
    old = write_audit(place / "old.json", ("refusals", 1, [1]), digest="0" * 64)
    assert "rows.jsonl has changed since" in ask(old).problem
    (place / "odd.json").write_text('{"findings": [{"code": 5}]}')
    assert "is not an audit" in ask(place / "odd.json").problem
    (place / "list.json").write_text("[]")
    assert "holds no findings" in ask(place / "list.json").problem


# -------------------------------------------------------------------------------------------------- texts for an editor


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "short", "completion": "of\nseveral\n\n  lines  \n"},
        {"prompt": " leading\nspace", "completion": "trailing \nspace\t"},
        {"messages": [{"role": "user", "content": "a: b # c\n- d"}, {"role": "assistant", "content": "yes"}]},
        {
            "prompt": "null",
            "completion": "2024-01-01",
            "yes": "no",
            "n": 1,
            "x": 2.5,
            "none": None,
            "flag": True,
            "5": "6",
        },
        {"prompt": "ü 漢字 🚤 \u2028 \x00 \x85 \x7f \ud800", "completion": "\r\n\r"},
        {"prompt": "x" * 300, "completion": "", "a b": [], "c": {}},
        {"": "", "a:\nb": "c"},
    ],
)
def test_a_row_comes_back_from_the_editor_as_it_was(values: dict[str, Any]) -> None:
    text = row_text(values)
    assert row_of(text) == (values, None)
    assert row_of(json.dumps(values)) == (values, None)


def test_long_texts_are_blocks_and_what_is_typed_into_texts_stays_text() -> None:
    text = row_text({"prompt": "first line\nsecond line", "completion": "no"})
    assert text == 'prompt: |-\n  first line\n  second line\ncompletion: "no"\n'
    assert row_of(text.replace('"no"', '"yes"'))[0]["completion"] == "yes"


@pytest.mark.parametrize("text", ["a: [", "{", '{"a": 1} x', "\t- a", "2024-99-99"])
def test_what_cannot_be_read_back_is_told(text: str) -> None:
    values, problem = row_of(text)
    assert values is None and problem is not None and problem.startswith("The edited row cannot be read")
    assert "\n" not in problem


def test_a_row_cannot_drive_the_terminal() -> None:
    assert safe("a\x1b[2Jb\u202ec\ud800\n\td") == "a\ufffd[2Jb\ufffdc?\n\td"


# ------------------------------------------------------------------------------------------------------- in a terminal


def script(path: Path, code: str) -> Path:
    path.write_text(f"#!{sys.executable}\nimport sys\npath = sys.argv[1]\ntext = open(path).read()\n{code}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def open_terminal(place: Path, *arguments: str) -> Terminal:
    return Terminal([sys.executable, "-m", "onlay.cli", "review", "rows.jsonl", *arguments], cwd=place)


def press(terminal: Terminal, keys: str) -> None:
    """Each key when the question has been asked once more."""
    for key in keys:
        terminal.read_until(QUESTION)
        terminal.text = ""
        terminal.type(key.encode())


def test_one_key_a_row_and_a_stop_in_between(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = script(place / "editor.py", "open(path, 'w').write(text.replace('yes, 2', 'two boats'))")
    monkeypatch.setenv("EDITOR", str(editor))
    monkeypatch.delenv("VISUAL", raising=False)
    terminal = open_terminal(place)
    try:
        first = terminal.read_until(QUESTION)
        assert first and "1 of 8  rows.jsonl:1" in terminal.text
        assert "1 boats?" in terminal.text and "yes, 1" in terminal.text
        press(terminal, "xaers")
        terminal.read_until(re.compile(r"5 of 8"))
        # An arrow key is none of the keys, though its code ends in a letter that is.
        terminal.type(b"\x1b[A")
        press(terminal, "bq")
        assert terminal.wait() == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
    assert "Traceback" not in terminal.text
    assert "Decisions in rows.decisions.jsonl: 1 accept, 1 edit, 1 reject." in terminal.text
    assert "5 of 8 rows are left." in terminal.text and "onlay review rows.jsonl" in terminal.text
    kept = lines(place / "rows.decisions.jsonl")
    assert [(line["row"], line["decision"]) for line in kept] == [(1, "accept"), (2, "edit"), (3, "reject")]
    assert kept[1]["edited"] == {"prompt": "2 boats?", "completion": "two boats"}
    assert kept[0]["who"] and kept[0]["when"].endswith("+00:00")

    review("rows.jsonl", apply=Path("clean.jsonl"), decided_only=True)
    assert lines(place / "clean.jsonl") == [ROWS[0], kept[1]["edited"]]


def test_an_edit_that_cannot_be_used_is_told_and_can_be_taken_up_again(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "open(path, 'w').write(text.replace('yes, 1', '') if 'yes, 1' in text else text.replace('\"\"', 'one'))"
    monkeypatch.setenv("EDITOR", str(script(place / "editor.py", code)))
    monkeypatch.delenv("VISUAL", raising=False)
    terminal = open_terminal(place, "--sample", "8", "--json")
    try:
        press(terminal, "e")
        terminal.read_until(re.compile(r"it is empty.*any other key: leave", re.S))
        terminal.type(b"e")
        terminal.read_until(re.compile(r"edited"))
        press(terminal, "\x04")
        assert terminal.wait() == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
    [kept] = lines(place / "rows.decisions.jsonl")
    assert kept["edited"] == {"prompt": "1 boats?", "completion": "one"}
    # With --json the one object is the last that is printed.
    assert json.loads(terminal.text[terminal.text.rindex('{"file"') :])["left"] == 7


def test_a_row_that_cannot_be_written_is_not_accepted(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "rows.jsonl").write_text('{"prompt": "a", "completion": "b", "score": NaN}\n')
    code = "open(path, 'w').write(text.replace('NaN', '2'))"
    monkeypatch.setenv("EDITOR", str(script(place / "editor.py", code)))
    monkeypatch.delenv("VISUAL", raising=False)
    terminal = open_terminal(place)
    try:
        terminal.read_until(QUESTION)
        assert "rows.jsonl:1 holds what JSON text cannot" in terminal.text and '"score": NaN' in terminal.text
        press(terminal, "a")
        terminal.read_until(re.compile(r"cannot be written as it is: edit or reject it"))
        press(terminal, "e")
        assert terminal.wait() == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
    [kept] = lines(place / "rows.decisions.jsonl")
    assert kept["edited"] == {"prompt": "a", "completion": "b", "score": 2}


def test_ctrl_c_keeps_what_was_decided_and_the_terminal_as_it_was(place: Path) -> None:
    terminal = open_terminal(place)
    try:
        press(terminal, "a")
        terminal.read_until(re.compile(r"2 of 8"))
        terminal.read_until(QUESTION)
        terminal.type(b"\x03")
        assert terminal.wait() == 130
    finally:
        terminal.process.kill()
        terminal.process.wait()
    assert "Traceback" not in terminal.text
    assert [line["row"] for line in lines(place / "rows.decisions.jsonl")] == [1]


# ------------------------------------------------------------------------------------------- without a terminal


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """Runs `onlay review ARGUMENTS`; (standard output, standard error), the exit code compared."""

    def run(*arguments: str, code: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["onlay", "review", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO())
        found = 0
        try:
            cli.main()
        except SystemExit as exit:
            found = int(exit.code or 0)
        out, err = capsys.readouterr()
        assert found == code, err
        return out, err

    return run


def test_decisions_are_taken_over_and_applied_as_typed(place: Path, say: Callable[..., tuple[str, str]]) -> None:
    theirs = [
        {"row": 1, "decision": "accept"},
        {"row": 2, "decision": "reject"},
        {"row": 3, "decision": "reject", "digest": "x"},
    ]
    (place / "theirs.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in [*theirs, {"row": 50, "decision": "accept"}])
    )
    out, _ = say("rows.jsonl", "--decisions", "theirs.jsonl", "--who", "bob")
    assert "Taken over: 2 (0 in place of earlier ones; 0 known)." in out
    assert "Not taken over: 1 about rows whose content is another now." in out
    assert "Not taken over: 1 about rows that the file does not have." in out
    assert "Next: onlay review rows.jsonl --apply rows-reviewed.jsonl" in out
    (place / "rows.jsonl").write_text((place / "rows.jsonl").read_text().replace("1 boats?", "one boat?"))
    out, _ = say("rows.jsonl", "--apply", "rows-reviewed.jsonl")
    assert "rows-reviewed.jsonl: 7 rows; 0 accepted, 0 edited, 1 rejected, 6 without a decision." in out
    assert "Untouched: 1 rows whose content changed since their decision (rows.jsonl:1)." in out
    out, _ = say("rows.jsonl", "--apply", "again.jsonl", "--decided-only", "--json")
    values = json.loads(out)
    assert values["applied"]["written"] == 0 and values["decided"] == {"accept": 1, "reject": 1}
    assert (place / "again.jsonl").read_text() == ""


@pytest.mark.parametrize(("arguments", "problem"), [
    (("rows.jsonl",), "Nobody can be asked: there is no terminal."),
    (("row.jsonl",), "There is no data file at row.jsonl."),
    (("rows.jsonl", "--apply", "rows.jsonl"), "There is no decision about rows.jsonl in rows.decisions.jsonl."),
    (("rows.jsonl", "--only", "refusals"), "--only refusals names findings, and there is no audit."),
    (("rows.jsonl", "--set", "training.seed=1"), "--set training.seed is not about reading a file."),
])  # fmt: skip
def test_errors_are_two_lines_and_exit_code_2(
    place: Path, say: Callable[..., tuple[str, str]], arguments: tuple[str, ...], problem: str
) -> None:
    out, err = say(*arguments, code=2)
    two = err.splitlines()
    assert (out, len(two)) == ("", 2) and two[0].startswith(problem)
    out, _ = say(*arguments, "--json", code=2)
    assert json.loads(out) == {"error": two[0], "remedy": two[1]}
    assert [one.name for one in place.iterdir()] == ["rows.jsonl"]


def test_the_file_itself_is_never_written_over(place: Path, say: Callable[..., tuple[str, str]]) -> None:
    review("rows.jsonl", ask=Person("reject"), who="ann")
    before = (place / "rows.jsonl").read_bytes()
    _, err = say("rows.jsonl", "--apply", "rows.jsonl", code=2)
    assert err.startswith("rows.jsonl exists already.")
    assert (place / "rows.jsonl").read_bytes() == before


def test_files_whose_names_begin_alike_have_decisions_of_their_own(
    place: Path, say: Callable[..., tuple[str, str]]
) -> None:
    (place / "reject.jsonl").write_text('{"row": 1, "decision": "reject"}\n')
    for name in ("d.v1.jsonl", "d.v2.jsonl"):
        (place / name).write_text((place / "rows.jsonl").read_text())
    out, _ = say("d.v1.jsonl", "--decisions", "reject.jsonl", "--who", "a")
    assert "Decisions in d.v1.decisions.jsonl: 1 reject." in out
    assert "Next: onlay review d.v1.jsonl --apply d.v1-reviewed.jsonl" in out
    _, err = say("d.v2.jsonl", "--apply", "o.jsonl", code=2)
    assert err.startswith("There is no decision about d.v2.jsonl in d.v2.decisions.jsonl.")
    # Of one name and different kinds.
    (place / "d.v1.csv").write_text("prompt,completion\na,b\n")
    _, err = say("d.v1.csv", "--apply", "o.jsonl", code=2)
    assert err.startswith("There is no decision about d.v1.csv in d.v1.decisions.jsonl.")


def test_what_is_to_be_typed_next_repeats_what_was_given(place: Path, say: Callable[..., tuple[str, str]]) -> None:
    (place / "theirs.jsonl").write_text('{"row": 1, "decision": "reject"}\n')
    given = ("--set", "data.max_rows=5", "--set", "data.prompt_field=prompt", "--log", "my log.jsonl", "--who", "ann b")
    out, _ = say("rows.jsonl", "--decisions", "theirs.jsonl", *given)
    how = "--set data.max_rows=5 --set data.prompt_field=prompt --log 'my log.jsonl'"
    assert f"Next: onlay review rows.jsonl {how} --apply rows-reviewed.jsonl\n" in out


def test_what_is_left_goes_on_with_what_was_given(place: Path) -> None:
    terminal = open_terminal(place, "--set", "data.max_rows=5", "--log", "l.jsonl", "--who", "ann b", "--sample", "3")
    try:
        press(terminal, "aq")
        assert terminal.wait() == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
    text = "".join(terminal.text.split("\r\n"))
    assert "onlay review rows.jsonl --sample 3 --who 'ann b' --set data.max_rows=5 --log l.jsonl" in text
