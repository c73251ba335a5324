from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from onlay.data.decisions import Decision, Decisions
from onlay.data.review import (
    Check,
    Reviewed,
    Said,
    Shown,
    apply_decisions,
    draw_rows,
    review_rows,
    row_digest,
    take_over,
)
from onlay.data.sources import Row
from onlay.errors import DataError, OutputError
from onlay.recipe import DataSection

ROWS = [{"prompt": f"{i} boats?", "completion": f"yes, {i}"} for i in range(1, 9)]
WHEN = "2026-01-01T00:00:00+00:00"


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Reviewed:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return opened(path)


def opened(path: Path) -> Reviewed:
    return Reviewed.opened(str(path), DataSection(train=str(path)))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Person:
    """Says what is written down, and remembers what was shown."""

    def __init__(self, *said: str | Said) -> None:
        self.said, self.shown, self.totals = list(said), list[Shown](), list[tuple[int, int]]()
        self.check: Check | None = None

    def __call__(self, shown: Shown, number: int, total: int, check: Check) -> Said:
        self.shown.append(shown)
        self.totals.append((number, total))
        self.check = check
        said = self.said.pop(0) if self.said else "quit"
        return said if isinstance(said, Said) else Said(word=said)  # type: ignore[arg-type]

    @property
    def numbers(self) -> list[int]:
        return [shown.row.number for shown in self.shown]


def session(reviewed: Reviewed, log: Path, person: Person, numbers: list[int] | None = None, **more: Any) -> int:
    return review_rows(
        reviewed, numbers or list(range(1, 9)), decisions=Decisions(log), codes=more.get("codes", {}), ask=person, who="ann",
        now=lambda: WHEN,
    )  # fmt: skip


def everything(reviewed: Reviewed, **more: Any) -> list[int]:
    return draw_rows(reviewed, **({"wanted": None, "sample": None, "seed": 0, "on_bad": pytest.fail} | more))


# ------------------------------------------------------------------------------------------------------------- session


def test_decisions_are_on_disk_before_the_next_row_is_shown(tmp_path: Path) -> None:
    reviewed, log = write(tmp_path / "rows.jsonl"), tmp_path / "log.jsonl"
    counted: list[int] = []

    class Looking(Person):
        def __call__(self, *arguments: Any) -> Said:
            counted.append(len(lines(log)) if log.exists() else 0)
            return super().__call__(*arguments)

    edited = {"prompt": "2 boats?", "completion": "two"}
    person = Looking("accept", Said(word="edit", edited=edited), "reject", "skip", "quit")
    assert session(reviewed, log, person) == 5
    assert counted == [0, 1, 2, 3, 3]
    assert [(line["row"], line["decision"], line["edited"]) for line in lines(log)] == [
        (1, "accept", None), (2, "edit", edited), (3, "reject", None),
    ]  # fmt: skip
    first = lines(log)[0]
    assert first == {
        "row": 1, "place": "rows.jsonl:1", "digest": row_digest(Row("any", 9, ROWS[0])), "decision": "accept",
        "edited": None, "who": "ann", "when": WHEN,
    }  # fmt: skip
    assert person.totals == [(i, 8) for i in range(1, 6)]


def test_a_second_session_shows_only_what_has_no_decision(tmp_path: Path) -> None:
    reviewed, log = write(tmp_path / "rows.jsonl"), tmp_path / "log.jsonl"
    session(reviewed, log, Person("accept", "skip", "reject", "quit"))
    person = Person(*["accept"] * 9)
    assert session(reviewed, log, person) == 0
    assert person.numbers == [2, 4, 5, 6, 7, 8]


def test_back_shows_the_row_before_and_a_new_decision_takes_the_place_of_the_old(tmp_path: Path) -> None:
    reviewed, log = write(tmp_path / "rows.jsonl"), tmp_path / "log.jsonl"
    person = Person("accept", "accept", "back", "back", "reject", "accept", "quit")
    assert session(reviewed, log, person) == 6
    assert person.numbers == [1, 2, 3, 2, 1, 2, 3]
    kept = Decisions(log)
    assert {decision.row: decision.decision for decision in kept} == {1: "reject", 2: "accept"}
    assert len(lines(log)) == 4


def test_what_a_killed_program_left_is_no_line_and_nothing_goes_on_from_it(tmp_path: Path) -> None:
    reviewed, log = write(tmp_path / "rows.jsonl"), tmp_path / "log.jsonl"
    session(reviewed, log, Person("accept", "accept", "quit"))
    whole = log.read_bytes()
    log.write_bytes(whole[:-20])
    assert len(Decisions(log)) == 1
    session(reviewed, log, Person("reject", "quit"))
    assert [line["decision"] for line in lines(log)] == ["accept", "reject"]


def test_a_row_that_changed_is_shown_again_with_what_was_decided(tmp_path: Path) -> None:
    path, log = tmp_path / "rows.jsonl", tmp_path / "log.jsonl"
    session(write(path), log, Person("accept", "accept", "quit"))
    person = Person("quit")
    session(write(path, [ROWS[0], {"prompt": "2 boats?", "completion": "no"}, *ROWS[2:]]), log, person)
    assert person.numbers == [2]
    assert person.shown[0].before is not None and person.shown[0].before.decision == "accept"


def test_what_is_shown(tmp_path: Path) -> None:
    rows = [ROWS[0], {"prompt": "empty?", "completion": ""}]
    reviewed = write(tmp_path / "rows.jsonl", rows)
    person = Person("skip", "skip")
    session(reviewed, tmp_path / "log.jsonl", person, [1, 2], codes={2: ["empty_field"]})
    good, bad = person.shown
    assert good.item is not None and good.problem is None and good.codes == ()
    assert bad.item is None and bad.problem is not None and "field completion: it is empty" in bad.problem
    assert bad.codes == ("empty_field",)
    assert person.check is not None
    assert person.check({"prompt": "empty?", "completion": "full"}) is None
    assert "it is empty" in str(person.check({"prompt": "empty?", "completion": " "}))
    assert "would be a list" in str(person.check([1]))
    assert "what JSON text cannot" in str(person.check({"prompt": "x", "completion": "y", "at": {1, 2}}))


def test_columns_of_no_format_are_shown_as_they_are(tmp_path: Path) -> None:
    person = Person("accept")
    session(write(tmp_path / "rows.jsonl", [{"frage": "?", "antwort": "!"}]), tmp_path / "log.jsonl", person, [1])
    assert person.shown[0].item is None and person.shown[0].problem is None


# -------------------------------------------------------------------------------------------------------------- drawing


def test_a_sample_is_drawn_by_the_seed_and_in_the_files_order(tmp_path: Path) -> None:
    reviewed = write(tmp_path / "rows.jsonl", ROWS * 10)
    drawn = everything(reviewed, sample=12)
    assert drawn == everything(reviewed, sample=12) == sorted(drawn) and len(set(drawn)) == 12
    assert drawn != everything(reviewed, sample=12, seed=1)
    assert everything(reviewed, sample=500) == list(range(1, 81))
    assert everything(reviewed, wanted={5: [], 70: [], 900: []}) == [5, 70]
    assert set(everything(reviewed, wanted={5: [], 70: [], 71: []}, sample=2)) < {5, 70, 71}


def test_rows_that_cannot_be_read_are_handed_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n{oops\n" + json.dumps(ROWS[1]) + "\n")
    bad: list[DataError] = []
    assert everything(opened(path), on_bad=bad.append) == [1, 3]
    assert [error.row for error in bad] == [2]


# -------------------------------------------------------------------------------------------------------------- import


def imported(folder: Path, reviewed: Reviewed, *decisions: dict[str, Any]) -> tuple[dict[str, int], Decisions]:
    path = folder / "theirs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in decisions))
    kept = Decisions(folder / "log.jsonl")
    return take_over(path, reviewed, kept, who="bob", when=WHEN), Decisions(folder / "log.jsonl")


def test_decisions_from_elsewhere(tmp_path: Path) -> None:
    reviewed = write(tmp_path / "rows.jsonl")
    session(reviewed, tmp_path / "log.jsonl", Person("accept", "accept", "quit"))
    edited = {"prompt": "4?", "completion": "four"}
    counts, kept = imported(
        tmp_path, reviewed,
        {"row": 1, "decision": "accept"},
        {"row": 2, "decision": "reject", "digest": row_digest(Row("", 1, ROWS[1])), "who": "eve", "when": "then"},
        {"row": 3, "decision": "reject", "digest": "another"},
        {"row": 4, "decision": "edit", "edited": edited},
        {"row": 5, "decision": "edit", "edited": {"prompt": "5?"}},
        {"row": 99, "decision": "reject"},
    )  # fmt: skip
    assert counts == {"taken": 2, "replaced": 1, "known": 1, "changed": 1, "missing": 1, "unusable": 1}
    assert {one.row: (one.decision, one.who) for one in kept} == {
        1: ("accept", "ann"), 2: ("reject", "eve"), 4: ("edit", "bob"),
    }  # fmt: skip
    # Once more changes nothing.
    before = (tmp_path / "log.jsonl").read_bytes()
    assert take_over(tmp_path / "theirs.jsonl", reviewed, kept, who="bob", when=WHEN)["known"] == 3
    assert (tmp_path / "log.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{oops", "it is not JSON"),
        ("5", "it is a number"),
        ('{"row": 1}', "decision is None, not one of accept, edit, reject"),
        ('{"row": 1, "decision": "maybe"}', "decision is 'maybe'"),
        ('{"row": "1", "decision": "accept"}', "row is '1'"),
        ('{"row": true, "decision": "accept"}', "row is True"),
        ('{"row": 0, "decision": "accept"}', "row is 0"),
        ('{"row": 1, "decision": "edit"}', "`edited` is an object"),
        ('{"row": 1, "decision": "reject", "edited": {}}', "`edited` is an object"),
        ('{"row": 1, "decision": "accept", "colour": 1}', "colour is no field"),
    ],
)
def test_a_line_that_is_no_decision_is_named_and_nothing_is_taken(tmp_path: Path, line: str, why: str) -> None:
    reviewed = write(tmp_path / "rows.jsonl")
    path, kept = tmp_path / "theirs.jsonl", Decisions(tmp_path / "log.jsonl")
    path.write_text('{"row": 2, "decision": "accept"}\n' + line + "\n")
    with pytest.raises(OutputError, match=r"theirs\.jsonl:2 is not a decision: ") as error:
        take_over(path, reviewed, kept, who="bob", when=WHEN)
    assert why in error.value.problem
    assert not (tmp_path / "log.jsonl").exists()


# --------------------------------------------------------------------------------------------------------------- apply


def test_applying_accounts_for_every_row(tmp_path: Path) -> None:
    path, log, out = tmp_path / "rows.jsonl", tmp_path / "log.jsonl", tmp_path / "clean.jsonl"
    edited = {"prompt": "2?", "completion": "zwei ü"}
    session(write(path), log, Person("accept", Said(word="edit", edited=edited), "reject", "reject", "accept", "quit"))
    kept = Decisions(log)
    kept.add(Decision(row=50, place="rows.jsonl:50", digest="d", decision="reject", who="ann", when=WHEN))
    changed = [*ROWS[:3], {"prompt": "4?", "completion": "new"}, *ROWS[4:]]
    before = write(path, changed).source
    content = Path(before).read_bytes()
    told = apply_decisions(opened(path), Decisions(log), output=out, decided_only=False)
    assert (told.accepted, told.edited, told.rejected, told.undecided, told.changed, told.missing) == (2, 1, 1, 3, 1, 1)
    assert told.changed_places == (f"{path}:4",)
    assert lines(out) == [ROWS[0], edited, changed[3], *ROWS[4:]]
    assert told.written == 7 == len(lines(out))
    assert path.read_bytes() == content
    assert apply_decisions(opened(path), kept, output=tmp_path / "few.jsonl", decided_only=True).written == 3
    assert lines(tmp_path / "few.jsonl") == [ROWS[0], edited, ROWS[4]]


def test_applying_writes_over_nothing_and_leaves_no_part(tmp_path: Path) -> None:
    path, out = tmp_path / "rows.jsonl", tmp_path / "clean.jsonl"
    reviewed = write(path)
    out.write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        apply_decisions(reviewed, Decisions(tmp_path / "log.jsonl"), output=out, decided_only=False)
    assert out.read_text() == "mine"
    path.write_text(path.read_text() + "{oops\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:9 is not JSON"):
        apply_decisions(
            opened(path), Decisions(tmp_path / "log.jsonl"), output=tmp_path / "other.jsonl", decided_only=False
        )
    assert sorted(one.name for one in tmp_path.iterdir()) == ["clean.jsonl", "rows.jsonl"]


def rows_of_every_kind() -> Iterator[dict[str, Any]]:
    yield {"prompt": "a", "completion": "b", "deep": {"list": [1, 2.5, None, True], "text": "ü\n\u2028"}}
    yield {"prompt": "half \ud800", "completion": "b"}
    yield {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def test_accepted_rows_are_the_same_values(tmp_path: Path) -> None:
    rows = list(rows_of_every_kind())
    reviewed, log = write(tmp_path / "rows.jsonl", rows), tmp_path / "log.jsonl"
    session(reviewed, log, Person("accept", "accept", "accept"), [1, 2, 3])
    assert apply_decisions(reviewed, Decisions(log), output=tmp_path / "out.jsonl", decided_only=True).accepted == 3
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().split("\n")[:-1]] == rows


def csv_rows(folder: Path) -> Path:
    (folder / "rows.csv").write_text('prompt,completion\n"a\nb",c\nd,e\n')
    return folder / "rows.csv"


def json_rows(folder: Path) -> Path:
    (folder / "rows.json").write_text(
        json.dumps([{"prompt": "a\nb", "completion": "c"}, {"prompt": "d", "completion": "e"}])
    )
    return folder / "rows.json"


def parquet_rows(folder: Path) -> Path:
    pyarrow.parquet.write_table(
        pyarrow.table({"prompt": ["a\nb", "d"], "completion": ["c", "e"]}), folder / "rows.parquet"
    )
    return folder / "rows.parquet"


@pytest.mark.parametrize("make", [csv_rows, json_rows, parquet_rows])
def test_other_formats_of_files(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    reviewed, log = opened(make(tmp_path)), tmp_path / "log.jsonl"
    numbers = everything(reviewed)
    session(reviewed, log, Person("reject", "accept"), numbers)
    assert apply_decisions(reviewed, Decisions(log), output=tmp_path / "o.jsonl", decided_only=False).rejected == 1
    assert lines(tmp_path / "o.jsonl") == [{"prompt": "d", "completion": "e"}]


def test_what_cannot_be_reviewed_is_told(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(
        pyarrow.table({"prompt": ["a"], "completion": ["b"], "at": [datetime.date(2026, 1, 1)]}),
        tmp_path / "dates.parquet",
    )
    with pytest.raises(DataError, match=r"dates\.parquet:1 holds what JSON text cannot: .*date"):
        opened(tmp_path / "dates.parquet")
    with pytest.raises(DataError, match="holds no rows"):
        write(tmp_path / "none.jsonl", [])
    (tmp_path / "broken.jsonl").write_text("{oops\n")
    with pytest.raises(DataError, match=r"broken\.jsonl:1 is not JSON"):
        opened(tmp_path / "broken.jsonl")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_a_row_with_a_number_that_json_has_not_can_be_rejected_or_edited(tmp_path: Path, number: str) -> None:
    path, log = tmp_path / "rows.jsonl", tmp_path / "log.jsonl"
    path.write_text(
        json.dumps(ROWS[0]) + "\n" + json.dumps(ROWS[1])[:-1] + f', "score": {number}}}\n' + json.dumps(ROWS[2]) + "\n"
    )
    reviewed = opened(path)
    assert everything(reviewed) == [1, 2, 3]
    person = Person("accept", "reject", "quit")
    session(reviewed, log, person)
    good, bad = person.shown[:2]
    assert good.writable and not bad.writable and bad.item is None
    assert bad.problem is not None and bad.problem.startswith(f"{path}:2 holds what JSON text cannot: ")
    assert row_digest(bad.row) == row_digest(bad.row) != row_digest(Row("", 1, ROWS[1]))
    assert apply_decisions(reviewed, Decisions(log), output=tmp_path / "out.jsonl", decided_only=False).rejected == 1
    assert lines(tmp_path / "out.jsonl") == [ROWS[0], ROWS[2]]
    # Edited.
    session(reviewed, tmp_path / "other.jsonl", Person("accept", Said(word="edit", edited=ROWS[1]), "quit"))
    apply_decisions(reviewed, Decisions(tmp_path / "other.jsonl"), output=tmp_path / "edited.jsonl", decided_only=False)
    assert lines(tmp_path / "edited.jsonl") == ROWS[:3]
    # Taken over by nobody, and written by nothing.
    more = tmp_path / "more"
    more.mkdir()
    counts, kept = imported(more, reviewed, {"row": 2, "decision": "accept"}, {"row": 1, "decision": "accept"})
    assert counts["unusable"] == 1 and counts["taken"] == 1
    with pytest.raises(DataError, match=r"rows\.jsonl:2 holds what JSON text cannot") as error:
        apply_decisions(reviewed, kept, output=tmp_path / "no.jsonl", decided_only=False)
    assert "Reject or edit the row" in error.value.remedy and not (tmp_path / "no.jsonl").exists()
    assert apply_decisions(reviewed, kept, output=tmp_path / "no.jsonl", decided_only=True).written == 1


def test_two_files_may_share_a_file_of_decisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log.jsonl"
    (tmp_path / "x").mkdir()
    first, second = write(tmp_path / "rows.jsonl"), write(tmp_path / "x" / "rows.jsonl", ROWS[::-1])
    session(first, log, Person("accept", "reject", "quit"))
    person = Person("reject", "quit")
    session(second, log, person)
    assert person.shown[0].row.number == 1 and person.shown[0].before is None
    assert [line["place"] for line in lines(log)] == ["rows.jsonl:1", "rows.jsonl:2", "x/rows.jsonl:1"]
    kept = Decisions(log)
    assert [one.decision for one in kept.of(first.source)] == ["accept", "reject"]
    told = apply_decisions(first, kept, output=tmp_path / "out.jsonl", decided_only=False)
    assert (told.accepted, told.rejected, told.changed, told.missing) == (1, 1, 0, 0)
    # However the file is called from elsewhere, and after both were moved.
    (tmp_path / "y").mkdir()
    for name in ("rows.jsonl", "log.jsonl"):
        (tmp_path / name).rename(tmp_path / "y" / name)
    monkeypatch.chdir(tmp_path / "x")
    moved = opened(Path("../y/rows.jsonl"))
    person = Person("quit")
    session(moved, Path("../y/log.jsonl"), person)
    assert person.numbers == [3]
    # A file about both is taken over by what the rows hold.
    path = tmp_path / "x" / "theirs.jsonl"
    path.write_text((tmp_path / "y" / "log.jsonl").read_text())
    counts = take_over(path, moved, Decisions(tmp_path / "x" / "new.jsonl"), who="bob", when=WHEN)
    assert (counts["taken"], counts["changed"]) == (2, 0)


def test_many_decisions_are_taken_over_at_once_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reviewed, log = write(tmp_path / "rows.jsonl", ROWS * 50), tmp_path / "log.jsonl"
    session(reviewed, log, Person("accept", "accept", "quit"))
    log.write_bytes(log.read_bytes() + b'{"row": 3')  # Where a program was killed.
    whole, there, synced = log.read_bytes(), sorted(tmp_path.iterdir()), list[int]()
    theirs = tmp_path / "theirs.txt"
    theirs.write_text("".join(json.dumps({"row": row, "decision": "reject"}) + "\n" for row in range(1, 401)))

    def interrupt(place: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    kept = Decisions(log)
    with pytest.raises(KeyboardInterrupt):
        take_over(theirs, reviewed, kept, who="bob", when=WHEN)
    assert log.read_bytes() == whole and len(kept) == len(Decisions(log)) == 2
    theirs.unlink()
    assert sorted(tmp_path.iterdir()) == there
    theirs.write_text("".join(json.dumps({"row": row, "decision": "reject"}) + "\n" for row in range(1, 401)))
    monkeypatch.setattr(os, "fsync", synced.append)
    assert take_over(theirs, reviewed, kept, who="bob", when=WHEN)["taken"] == 400
    assert len(synced) == 1 and len(lines(log)) == 402
    assert {one.decision for one in Decisions(log)} == {"reject"}
