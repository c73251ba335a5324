from __future__ import annotations

import multiprocessing
import sqlite3
import threading
from pathlib import Path
from typing import ClassVar

import pytest

from onlay import ledger
from onlay.errors import OutputError
from onlay.ledger import MIGRATIONS, Ledger
from onlay.records import Record, Run


class Note(Record):
    kind: ClassVar[str] = "note"
    text: str


@pytest.fixture
def book(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "home" / "ledger.sqlite")


def run_record(path: str, status: str, **sources: str) -> Run:
    return Run(
        path=path, status=status, started="2026-01-01T00:00:00Z", seconds=1.0, steps=1, total_steps=1, examples=1,
        trained_tokens=1, sources=sources,
    )  # fmt: skip


def test_home_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ONLAY_HOME", str(tmp_path / "elsewhere"))
    assert ledger.home() == tmp_path / "elsewhere"
    ledger.append(Note(text="a"), tmp_path)
    assert (tmp_path / "elsewhere" / "ledger.sqlite").is_file()
    assert ledger.find(Note(text="a").digest[:8]).values["text"] == "a"
    monkeypatch.delenv("ONLAY_HOME")
    assert ledger.home() == Path.home() / ".onlay"


def test_an_empty_ledger_has_no_runs_and_makes_no_file(book: Ledger) -> None:
    assert book.runs() == []
    assert book.rows() == []
    assert not book.path.exists()


def test_a_record_comes_back_as_it_was(book: Ledger, tmp_path: Path) -> None:
    run = run_record("runs/a", "finished")
    number = book.append(run, tmp_path / "runs" / "a")
    (row,) = book.rows()
    assert (row.id, row.kind, row.digest, row.path) == (number, "run", run.digest, str(tmp_path / "runs" / "a"))
    assert row.record() == run
    assert row.created_at.endswith("+00:00")


def test_runs_gives_the_latest_row_of_each_folder_newest_first(book: Ledger) -> None:
    for folder, status in (("a", "running"), ("b", "running"), ("a", "finished")):
        book.append(run_record(folder, status), folder)
    assert [(row.values["path"], row.values["status"]) for row in book.runs()] == [("a", "finished"), ("b", "running")]


def test_the_same_record_at_the_same_place_is_one_row(book: Ledger) -> None:
    first = book.append(Note(text="a"), "x")
    assert book.append(Note(text="a"), "x") == first
    assert book.append(Note(text="a"), "y") != first
    book.append(Note(text="b"), "x")
    assert book.append(Note(text="a"), "x") != first
    assert len(book.rows()) == 4


def test_find_needs_a_prefix_that_fits_one_record(book: Ledger) -> None:
    notes = [Note(text=str(number)) for number in range(3000)]
    by_prefix: dict[str, list[Note]] = {}
    for note in notes:
        by_prefix.setdefault(note.digest[:4], []).append(note)
    twins = next(group for group in by_prefix.values() if len(group) > 1)
    for note in twins:
        book.append(note, "x")
    with pytest.raises(OutputError, match=r"2 digests start with .*\nGive more digits"):
        book.find(twins[0].digest[:4])
    assert book.find(twins[0].digest[:12].upper()).digest == twins[0].digest
    with pytest.raises(OutputError, match="No record's digest starts with"):
        book.find("0000000000")
    for bad in ("abc", "not hex", "a' OR 1", "****"):
        with pytest.raises(OutputError, match="is not the start of a digest"):
            book.find(bad)


def test_chain_follows_sources_through_everything_behind(book: Ledger) -> None:
    data = Note(text="data")
    base = Note(text="base", sources={"file": "0" * 64})
    dataset = Note(text="dataset", sources={"data": data.digest, "base": base.digest})
    run = run_record("r", "finished", dataset=dataset.digest, base=base.digest)
    for record in (data, base, dataset, run):
        book.append(record, "p")
    assert [row.values.get("text") for row in book.chain(run)] == ["dataset", "base", "data"]
    assert [row.digest for row in book.chain(book.find(run.digest))] == [r.digest for r in (dataset, base, data)]


def test_rows_can_be_neither_changed_nor_removed(book: Ledger) -> None:
    book.append(Note(text="a"), "x")
    database = sqlite3.connect(book.path)
    for statement in ("UPDATE records SET json = '{}'", "DELETE FROM records", "UPDATE records SET id = 7"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            database.execute(statement)
    database.close()
    assert book.rows()[0].values["text"] == "a"


def test_a_ledger_of_a_newer_version_is_refused(book: Ledger) -> None:
    book.append(Note(text="a"), "x")
    database = sqlite3.connect(book.path)
    database.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    database.close()
    with pytest.raises(OutputError, match="Upgrade onlay"):
        book.append(Note(text="b"), "x")


def test_later_migrations_are_applied_once_and_keep_the_rows(book: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    book.append(Note(text="a"), "x")
    monkeypatch.setattr(ledger, "MIGRATIONS", (*MIGRATIONS, "CREATE TABLE extra (name TEXT) STRICT;"))
    for text in ("b", "c"):
        book.append(Note(text=text), "x")
    assert [row.values["text"] for row in book.rows()] == ["a", "b", "c"]


def test_a_file_that_is_no_ledger_is_two_lines(book: Ledger) -> None:
    book.path.parent.mkdir()
    book.path.write_text("not a database, but long enough to be taken for one" * 40)
    with pytest.raises(OutputError, match="cannot be used") as caught:
        book.append(Note(text="a"), "x")
    assert len(str(caught.value).splitlines()) == 2


def _write_some(path: str, who: int) -> None:
    for number in range(20):
        Ledger(Path(path)).append(Note(text=f"{who}.{number}"), "x")


def test_processes_and_threads_write_at_once_and_nothing_is_lost(book: Ledger) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_write_some, args=(str(book.path), who)) for who in range(2)]
    threads = [threading.Thread(target=_write_some, args=(str(book.path), who)) for who in range(2, 6)]
    for worker in [*processes, *threads]:
        worker.start()
    for worker in [*processes, *threads]:
        worker.join()
    assert [process.exitcode for process in processes] == [0, 0]
    texts = {row.values["text"] for row in book.rows()}
    assert texts == {f"{who}.{number}" for who in range(6) for number in range(20)}
