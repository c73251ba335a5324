"""One pass: every row is counted, here and in worker processes alike; workers die with a word, and do not outlive it."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onlay.data.audit import engine, pool
from onlay.data.audit.comparison import compare_rows
from onlay.data.audit.engine import AuditSource, Examined, Settings, examine
from onlay.data.audit.pool import WorkerError
from onlay.errors import DataError
from onlay.recipe import DataSection
from tests.data.audit import faults

GOOD = {"prompt": "What is a lantern?", "completion": "A lamp that is carried about, with a case around its light."}


def write(path: Path, rows: list[Any]) -> str:
    """Rows as JSON, bytes as they are."""
    path.write_bytes(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows) + b"\n")
    return str(path)


def look(*paths: str, held: str | None = None, workers: int = 1, **fields: Any) -> Examined:
    sources = [AuditSource(path=path, role="train") for path in paths]
    sources += [AuditSource(path=held, role="evaluation")] if held is not None else []
    strict = fields.pop("strict", False)
    section = DataSection(train=paths[0], **fields)
    return examine(sources, section, settings=Settings(workers=workers), strict=strict)


def many(count: int) -> list[Any]:
    rng = np.random.default_rng(0)
    words = ["copper", "lantern", "river", "orchard", "window", "letter", "harbour", "ticket", "garden", "stone"]
    return [
        {"domain": words[i % 3], "prompt": f"{i} " + " ".join(rng.choice(words, 12)), "completion": " ".join(rng.choice(words, 20))}
        for i in range(count)
    ]  # fmt: skip


def counts(examined: Examined) -> dict[str, list[tuple[int, int]]]:
    return {
        one.code: examined.tally.rows(one.code) for one in examined.tally.findings([f.path for f in examined.files])
    }


# ------------------------------------------------------------------------------------------------------ what is counted


def test_every_bad_row_is_counted_with_its_reason(tmp_path: Path) -> None:
    rows = [
        GOOD, b"{not json", [1, 2], b"\xff\xfe", {"prompt": "P"}, {"prompt": "P", "completion": " "},
        {"prompt": "P", "completion": 3}, b"", {"instruction": "I", "input": "x", "output": "O"}, GOOD | {"prompt": "Q"},
    ]  # fmt: skip
    path = write(tmp_path / "a.jsonl", rows)
    found = look(path)
    assert {code: [number for _, number in at] for code, at in counts(found).items()} == {
        "not_json": [2], "not_an_object": [3], "not_text": [4], "missing_field": [5], "empty_field": [6], "wrong_type": [7],
        "mixed_formats": [9],
    }  # fmt: skip
    (file,) = found.files
    assert (file.rows, file.unreadable, file.format) == (2, 7, "prompt_completion")
    assert found.table.number.tolist() == [1, 10]
    reasons = {group.code: group for group in found.groups}
    assert reasons["empty_field"].texts == [f"{path}:6, field completion: it is empty."]
    assert [row.place for row in reasons["mixed_formats"].rows] == [f"{path}:9"]
    assert "looks like alpaca" in reasons["mixed_formats"].texts[0]


def test_strict_raises_at_the_first_bad_row(tmp_path: Path) -> None:
    bad = write(tmp_path / "a.jsonl", [GOOD, {"prompt": "P"}, b"{"])
    with pytest.raises(DataError, match=r"a\.jsonl:2, field completion: missing"):
        look(bad, strict=True)
    bad = write(tmp_path / "a.jsonl", [GOOD, b"{", {"prompt": "P"}])
    with pytest.raises(DataError, match=r"a\.jsonl:2 is not JSON"):
        look(bad, strict=True)
    assert look(write(tmp_path / "a.jsonl", [GOOD]), strict=True).files[0].rows == 1


def test_what_came_before_a_broken_end_is_kept(tmp_path: Path) -> None:
    whole = b"\n".join(json.dumps(row).encode() for row in many(200))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(whole)[:-200])
    (tmp_path / "b.json").write_bytes(
        b"[" + b",".join(json.dumps(row).encode() for row in many(5)) + b', {"prompt": }, {}]'
    )
    (tmp_path / "c.csv").write_bytes(b'prompt,completion\nP,C\nP,"C" x,\nP2,C2\n"P3,C3\nP4,C4\n')
    for name, ended in (("a.jsonl.gz", None), ("b.json", 6), ("c.csv", 5)):
        found = look(str(tmp_path / name))
        ((_, row),) = found.tally.rows("reading_ended")
        assert row == (found.files[0].rows + 1 if ended is None else ended)
        assert any(group.code == "reading_ended" and str(tmp_path / name) in group.texts[0] for group in found.groups)
    assert found.files[0].rows == 2  # Of the CSV file: the row with too much after its quote is lost alone.
    assert found.tally.rows("not_json") == [(0, 3)]


def test_no_readable_row_is_no_crash_but_no_row_at_all_is_an_error(tmp_path: Path) -> None:
    found = look(write(tmp_path / "a.jsonl", [b"{", b"["]))
    assert (found.files[0].rows, found.files[0].unreadable, len(found.table)) == (0, 2, 0)
    with pytest.raises(DataError, match="holds no rows"):
        look(write(tmp_path / "empty.jsonl", [b""]))
    with pytest.raises(DataError, match="There is no data file"):
        look(str(tmp_path / "missing.jsonl"))


def test_a_file_of_no_known_format_names_its_columns(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no known format has these columns: x"):
        look(write(tmp_path / "a.jsonl", [{"x": 1}]))


def test_orders_of_roles_do_not_make_a_row_unreadable(tmp_path: Path) -> None:
    user, assistant = {"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}
    path = write(tmp_path / "a.jsonl", [{"messages": [user, assistant]}, {"messages": [user, user, assistant]}])
    found = look(path)
    assert found.tally.rows("roles_order") == [(0, 2)]
    assert (found.files[0].rows, found.files[0].unreadable) == (2, 0)
    assert found.shares["roles"] == {"user": 3, "assistant": 2}


def test_sources_keep_their_order_and_their_roles(tmp_path: Path) -> None:
    first, second, held = (write(tmp_path / f"{name}.jsonl", many(3)) for name in ("first", "second", "held"))
    sources = [
        AuditSource(path=first, role="train", limit=2), AuditSource(path=held, role="evaluation"),
        AuditSource(path=second, role="train"),
    ]  # fmt: skip
    found = examine(sources, DataSection(train=first), settings=Settings(workers=1))
    assert [file.path for file in found.files] == [first, held, second]
    assert found.table.source.tolist() == [0, 0, 1, 1, 1, 2, 2, 2]
    assert found.among("train").tolist() == [True, True, False, False, False, True, True, True]
    assert found.table.domains == ("copper", "lantern", "river")
    assert found.fingerprints is not None and len(found.fingerprints) == 8
    assert found.distributions[0].count == 5


def test_rows_are_read_again_by_index(tmp_path: Path) -> None:
    rows = many(30)
    rows[4] = b"{"
    first, second = write(tmp_path / "a.jsonl", rows), str(tmp_path / "b.json")
    Path(second).write_text(json.dumps(many(10)))
    found = look(first, second)
    wanted = np.array([0, 4, 28, 29, 38])
    read = list(found.read_texts(wanted))
    assert [index for index, _, _ in read] == wanted.tolist()
    assert [prompt.split()[0] for _, prompt, _ in read] == ["0", "5", "29", "0", "9"]
    Path(second).write_text("[]")
    with pytest.raises(DataError, match="changed while it was read"):
        list(found.read_texts(np.array([38])))


def test_settings_turn_detectors_off(tmp_path: Path) -> None:
    row = GOOD | {"completion": "TODO", "prompt": "Write to anna.keller@example.com please."}
    path = write(tmp_path / "a.jsonl", [row] * 3)
    section, sources = DataSection(train=path), [AuditSource(path=path, role="train")]
    full = examine(sources, section, settings=Settings(workers=1))
    assert {"placeholder_answer", "personal_email"} <= counts(full).keys()
    bare = examine(sources, section, settings=Settings(near_threshold=None, texts=False, privacy=False, workers=1))
    assert counts(bare) == {}
    assert bare.fingerprints is None
    assert np.array_equal(bare.table.row_key, full.table.row_key)


def test_personal_data_is_found_wherever_it_is_trained(tmp_path: Path) -> None:
    def asked(answer: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": "Tell me."}, {"role": "assistant", **answer}], **more}

    address = "anna.keller@example.com"
    rows = [
        asked({"content": "Yes."}),
        asked({"content": "Yes.", "reasoning_content": f"It is {address}."}),
        asked({"content": "", "tool_calls": [{"name": "send", "arguments": {"to": [address]}}]}),
        asked({"content": "Yes."}, tools=[{"name": "send", "description": f"Sends mail as {address}."}]),
    ]
    examined = look(write(tmp_path / "a.jsonl", rows))
    assert counts(examined)["personal_email"] == [(0, 2), (0, 3), (0, 4)]
    assert examined.shares["personal_data"]["email"] == 3


@pytest.mark.usefixtures("small_chunks")
def test_held_out_n_grams_are_joined_without_a_slow_sort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(values: np.ndarray, *arguments: Any, **given: Any) -> Any:
        assert values.dtype != np.uint64 or given, "numpy hashes them first, which takes 40 times as long for millions"
        return unique(values, *arguments, **given)

    unique = np.unique
    monkeypatch.setattr(np, "unique", refuse)
    monkeypatch.setattr(np, "union1d", lambda *arrays: refuse(np.concatenate(arrays)))
    paths = [write(tmp_path / f"{name}.jsonl", rows) for name, rows in (("a", many(60)), ("b", many(50)[10:]))]
    sources = [AuditSource(path=path, role="evaluation") for path in paths]
    train = write(tmp_path / "train.jsonl", many(5))
    examined = examine([*sources, AuditSource(path=train, role="train")], DataSection(train=train))
    alone = examine([sources[0], AuditSource(path=train, role="train")], DataSection(train=train))
    known = examined.known["evaluation"]
    assert len(known) and (known[1:] > known[:-1]).all()
    assert np.array_equal(known, alone.known["evaluation"])


@pytest.mark.parametrize("by_words", [True, False])
def test_clusters_of_words_are_made_where_they_are_wanted(tmp_path: Path, by_words: bool) -> None:
    rows = faults.clean_rows(100, format="prompt_completion")
    compared = compare_rows(look(write(tmp_path / "a.jsonl", rows)), threshold=0.8, by_words=by_words)
    assert ("clusters" in compared.shares) is by_words
    assert ("clustered_rows" in compared.measures) is by_words


def test_ordinary_rows_need_nothing_heavy(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", many(30))
    code = (
        "import sys\n"
        "from onlay.data.audit.engine import AuditSource, examine\n"
        "from onlay.recipe import DataSection\n"
        f"examine([AuditSource(path={path!r}, role='train')], DataSection(train={path!r}))\n"
        "heavy = {'datasets', 'regex', 'jinja2', 'torch', 'transformers', 'onlay.data.privacy.anonymise'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


# ------------------------------------------------------------------------------------------------------------- workers


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "CHUNK_ROWS", 20)
    monkeypatch.setattr(pool, "IN_PROCESS_CHUNKS", 1)


@pytest.mark.usefixtures("small_chunks")
def test_workers_find_what_one_process_finds(tmp_path: Path) -> None:
    rows = many(300)
    rows[50], rows[150], rows[250] = b"{", {"prompt": "P"}, GOOD | {"completion": "TODO"}
    path, held = write(tmp_path / "a.jsonl", rows), write(tmp_path / "held.jsonl", many(40))
    told: list[tuple[int, int]] = []
    sources = [AuditSource(path=path, role="train"), AuditSource(path=held, role="evaluation")]
    one = examine(sources, DataSection(train=path), settings=Settings(workers=1))
    two = examine(
        sources,
        DataSection(train=path),
        settings=Settings(workers=2),
        progress=lambda done, total: told.append((done, total)),
    )
    assert counts(one) == counts(two)
    assert one.files == two.files and one.groups == two.groups and one.shares == two.shares
    assert all(np.array_equal(getattr(one.table, name), getattr(two.table, name)) for name in one.table._arrays())
    assert one.fingerprints is not None and two.fingerprints is not None
    assert np.array_equal(one.fingerprints.rows, two.fingerprints.rows)
    assert np.array_equal(one.shared["evaluation"].rows, two.shared["evaluation"].rows)
    assert all(done <= total for done, total in told)
    assert all(300 <= total <= 420 for _, total in told[-5:]), told
    assert told == sorted(told) and told[-1][0] == 339  # One line was no JSON, so it never became a row.


@pytest.mark.usefixtures("small_chunks")
def test_a_worker_that_dies_is_an_error_and_no_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[pool._Worker] = []
    start = pool._Worker.__init__

    def note(worker: pool._Worker) -> None:
        start(worker)
        started.append(worker)
        worker.process.send_signal(signal.SIGKILL)

    monkeypatch.setattr(pool._Worker, "__init__", note)
    path = write(tmp_path / "a.jsonl", many(200))
    with pytest.raises(WorkerError, match=r"ended \(signal 9\) between .*a\.jsonl:\d+ and row \d+"):
        look(path, workers=2)
    assert all(worker.process.poll() is not None for worker in started)


@pytest.mark.usefixtures("small_chunks")
def test_workers_end_with_the_pass_and_do_not_need_the_main_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[pool._Worker] = []
    start = pool._Worker.__init__
    monkeypatch.setattr(pool._Worker, "__init__", lambda worker: (start(worker), started.append(worker))[0])
    path = write(tmp_path / "a.jsonl", many(200))
    found: list[Examined] = []
    thread = threading.Thread(target=lambda: found.append(look(path, workers=2)))
    thread.start()
    thread.join(60)
    assert found[0].files[0].rows == 200
    assert len(started) == 2 and all(worker.process.poll() is not None for worker in started)


SCRIPT = """
import sys
from onlay.data.audit import engine, pool
from onlay.data.audit.engine import AuditSource, Settings, examine
from onlay.recipe import DataSection
engine.CHUNK_ROWS, pool.IN_PROCESS_CHUNKS = 20, 1
path = sys.argv[1]
def tell(done, total):
    if "wait" in sys.argv and done > 60:
        print("begun", *(worker.process.pid for worker in POOLS[0]._started), flush=True)
        import time; time.sleep(60)
POOLS = []
start = pool.Pool.__init__
pool.Pool.__init__ = lambda self, workers: (start(self, workers), POOLS.append(self))[0]
found = examine([AuditSource(path=path, role="train")], DataSection(train=path), settings=Settings(workers=2), progress=tell)
print("rows", found.files[0].rows)
"""


def script(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    """A user's script without a guard, in a folder whose files have the names of modules."""
    (tmp_path / "run.py").write_text(SCRIPT)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "json.py").write_text("raise SystemExit('shadowed')")
    path = write(tmp_path / "a.jsonl", many(300))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(part for part in sys.path if part),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, str(tmp_path / "run.py"), path, *arguments], cwd=tmp_path / "work", env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_a_script_needs_no_guard(tmp_path: Path) -> None:
    process = script(tmp_path)
    out, err = process.communicate(timeout=60)
    assert (out.strip(), process.returncode) == ("rows 300", 0), err


def test_ctrl_c_ends_the_workers(tmp_path: Path) -> None:
    process = script(tmp_path, "wait")
    assert process.stdout is not None
    workers = [int(word) for word in process.stdout.readline().split()[1:]]
    assert len(workers) == 2
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in err
    deadline = time.monotonic() + 10
    while any(_runs(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_runs(pid) for pid in workers)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
