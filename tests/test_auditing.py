"""`onlay audit`: the stage, and the command as typed: exit codes, JSON, the table, two-line errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from onlay import ledger, stages
from onlay.errors import DataError, OutputError, RecipeError
from onlay.recipe import Recipe
from onlay.records import Audit, Finding
from tests.builders import save_tiny_base, write_rows

ANSWER = "Put it in the blue box beside the door, then ring the bell twice and wait there."


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ONLAY_HOME", str(tmp_path / "home"))


def write(name: str, rows: list[Any]) -> str:
    Path(name).write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return name


def finding(made: Audit, code: str) -> Finding:
    return next(one for one in made.findings if one.code == code)


def codes(made: Audit) -> set[str]:
    return {one.code for one in made.findings}


def good(number: int) -> dict[str, str]:
    words = ("copper", "lantern", "river", "orchard", "window", "letter", "harbour", "ticket", "garden", "stone")
    picked = [words[(number * step + step) % 10] for step in (3, 7, 11, 13, 17, 19)]
    return {
        "prompt": f"Where does number {number} with the {' '.join(picked)} go?",
        "completion": f"Number {number}: {' and '.join(reversed(picked))}, in shelf {number * 31 % 997}.",
    }


# --------------------------------------------------------------------------------------------------------------- stage


def test_a_bad_file_is_told_whole_and_kept_in_the_ledger() -> None:
    rows = [good(number) for number in range(30)]
    rows[3] = {"prompt": "P"}
    rows[9] = dict(rows[8])
    rows[12] = rows[11] | {"completion": "Nowhere at all, as far as anybody knows."}
    rows[20] = good(20) | {"completion": "My key is AKIAIOSFODNN7EXAMPLE and anna@example.com is my address."}
    made = stages.audit(write("rows.jsonl", rows), workers=1)
    assert not made.ok
    assert (made.rows, made.unreadable, made.base, made.tokens) == (29, 1, None, None)
    for code, severity, numbers in (
        ("missing_field", "error", [4]), ("duplicates_exact", "warning", [10]), ("contradictory_answers", "warning", [12, 13]),
        ("personal_email", "warning", [21]), ("secret_key", "error", [21]),
    ):  # fmt: skip
        found = finding(made, code)
        assert (found.severity, [row.row for row in found.rows], found.count) == (severity, numbers, len(numbers)), code
        assert found.remedy
    few = finding(made, "few_rows")
    assert (few.count, "lora is usually given 500" in few.message) == (29, True)
    assert [one.severity for one in made.findings] == sorted((one.severity for one in made.findings), key=["error", "warning", "note"].index)  # fmt: skip
    group = next(group for group in made.groups if group.code == "contradictory_answers")
    assert {"Nowhere at all, as far as anybody knows.", rows[11]["completion"]} <= set(group.texts)
    assert made.measures["near_threshold"] == 0.8
    assert made.measures["duplicate_share"] == pytest.approx(1 / 29)
    assert {one.name for one in made.distributions} >= {"prompt_characters", "answer_characters", "answer_to_prompt"}
    assert made.shares["personal_data"]["email"] == 1
    row = ledger.find(made.digest)
    assert (row.kind, row.record()) == ("audit", made)
    again = stages.audit("rows.jsonl", workers=1)
    assert again.digest == made.digest


def test_clean_rows_are_ok() -> None:
    made = stages.audit(write("rows.jsonl", [good(number) for number in range(600)]), workers=1)
    assert made.ok
    assert not [one for one in made.findings if one.severity == "error"]
    assert "few_rows" not in codes(made)


def test_shown_limits_the_rows_that_are_named() -> None:
    name = write("rows.jsonl", [good(number) for number in range(20)] + [{"prompt": "P"}] * 30)
    assert len(finding(stages.audit(name, shown=3, workers=1), "missing_field").rows) == 3
    assert len(finding(stages.audit(name, shown=None, workers=1), "missing_field").rows) == 30


def test_benchmarks_and_evaluation_files_are_held_against_the_rows() -> None:
    rows = [good(number) for number in range(40)]
    write("rows.jsonl", rows)
    write("bench.jsonl", [rows[5], good(900)])
    write("held.jsonl", [rows[7], rows[8], good(901)])
    made = stages.audit("rows.jsonl", against=["bench.jsonl"], overrides=["evaluation.file=held.jsonl"], workers=1)
    assert [row.row for row in finding(made, "benchmark_exact").rows] == [6]
    assert [row.row for row in finding(made, "leakage_exact").rows] == [8, 9]
    assert [(file.path, file.role, file.rows) for file in made.files] == [
        ("rows.jsonl", "train", 40), ("held.jsonl", "evaluation", 3), ("bench.jsonl", "benchmark", 2),
    ]  # fmt: skip
    assert made.rows == 40


def test_a_recipe_gives_sources_method_terms_and_threshold() -> None:
    write("a.jsonl", [good(number) for number in range(10)])
    rows = [{"text": f"Where is order {i}?", "label": ("billing", "travel")[i % 2]} for i in range(12)]
    write("b.jsonl", rows)
    Path("terms.txt").write_text("lantern\n")
    save_tiny_base(Path("base"))
    Path("r.yaml").write_text(
        "model: {base: base}\ndata: {train: [a.jsonl, {file: a2.jsonl}], terms: terms.txt, near_threshold: 0.9}\n"
    )
    write("a2.jsonl", [good(number) for number in range(10, 16)])
    made = stages.audit("r.yaml", workers=1)
    assert [(file.path, file.rows) for file in made.files] == [("a.jsonl", 10), ("a2.jsonl", 6)]
    assert made.measures["near_threshold"] == 0.9
    assert "listed_terms" in codes(made)
    assert "recipe" in made.sources
    assert made.base is not None and made.tokens is not None and made.trained_tokens is not None
    assert 0 < made.trained_tokens < made.tokens
    assert "trained_share" in {one.name for one in made.distributions}
    Path("h.yaml").write_text("model: {base: base}\nadapter: {method: head}\ndata: {train: b.jsonl}\n")
    head = stages.audit("h.yaml", workers=1)
    assert head.files[0].format == "classification"
    assert "100 rows of each label" in finding(head, "few_rows").message
    assert head.shares["domains"] == {"billing": 6, "travel": 6}
    assert head.tokens is None


def test_known_asks_the_base() -> None:
    write_rows(Path("rows.jsonl"), 30)
    save_tiny_base(Path("base"))
    told: list[Any] = []
    made = stages.audit("rows.jsonl", base="base", known=True, workers=1, report=told.append)
    assert made.measures["base_rows_scored"] == 30
    assert "base_loss" in {one.name for one in made.distributions}
    assert {event.what for event in told if not isinstance(event, str)} >= {"reading rows", "tokenizing rows"}
    with pytest.raises(RecipeError, match="no base is named"):
        stages.audit("rows.jsonl", known=True, workers=1)


def test_what_cannot_be_looked_at_raises() -> None:
    with pytest.raises(DataError, match="There is no data file"):
        stages.audit("missing.jsonl")
    with pytest.raises(RecipeError, match="There is no recipe"):
        stages.audit("missing.yaml")
    write("rows.jsonl", [good(1)])
    with pytest.raises(DataError, match="There is no data file"):
        stages.audit("rows.jsonl", against=["nowhere.jsonl"])
    with pytest.raises(RecipeError, match="near_treshold"):
        stages.audit("rows.jsonl", overrides=["data.near_treshold=0.9"])


def test_a_page_is_written_over_no_file_of_the_audit_s_and_over_nothing_but_a_page() -> None:
    from onlay.data.audit.destination import check_destination
    from onlay.data.audit.page import write_page

    write("a.jsonl", [good(number) for number in range(5)])
    write("held.jsonl", [good(900)])
    write("bench.jsonl", [good(901)])
    write("general.jsonl", [good(902)])
    write("other.txt", ["a poem\n"])
    Path("terms.txt").write_text("lantern\n")
    Path("keys").mkdir()
    Path("r.yaml").write_text(
        "model: {base: base}\ndata: {train: a.jsonl, general: general.jsonl, terms: terms.txt, anonymise: pseudonyms, anonymise_key: keys/k}\n"
        "evaluation: {file: held.jsonl}\n"
    )
    Path("link.jsonl").symlink_to("a.jsonl")
    os.link("a.jsonl", "hard.html")
    read: list[Any] = []
    for name, what in (
        ("a.jsonl", "is audited"), ("link.jsonl", "is audited"), ("hard.html", "is audited"), ("general.jsonl", "is audited"),
        ("held.jsonl", "the evaluation file"), ("bench.jsonl", "a benchmark file"), ("terms.txt", "the list of terms"), ("r.yaml", "the recipe"),
        ("keys/k", "the key of pseudonyms"), ("keys/k.vault", "the vault of pseudonyms"), ("./keys/../a.jsonl", "is audited"),
        ("other.txt", "no page that onlay audit wrote"), ("keys", "is a folder"), ("other.txt/page.html", "cannot be written"),
        ("/proc/no/page.html", "cannot be written"),
    ):  # fmt: skip
        before = Path(name).read_bytes() if Path(name).is_file() else None
        with pytest.raises(OutputError, match=what):
            stages.audit("r.yaml", against=["bench.jsonl"], page=Path(name), workers=1, report=read.append)
        assert (Path(name).read_bytes() if Path(name).is_file() else None) == before, name
    assert not read  # Not a row, and no base either.
    made = stages.audit("a.jsonl", page=Path("new/page.html"), workers=1)
    write_page(made, Path("new/page.html"))
    check_destination(Path("new/page.html"), used={})
    Path("quoted.html").write_text("<head></head><body>" + Path("new/page.html").read_text())
    with pytest.raises(OutputError, match="no page"):
        check_destination(Path("quoted.html"), used={})


def test_what_the_recipe_takes_care_of_is_said_to_be() -> None:
    rows = [good(number) for number in range(30)]
    rows[9] = dict(rows[8])
    rows[20] = good(20) | {
        "completion": "My key is AKIAIOSFODNN7EXAMPLE and anna@example.com or https://example.com is mine."
    }
    write("rows.jsonl", rows)
    remedies = {one.code: one.remedy for one in stages.audit("rows.jsonl", workers=1).findings}
    assert remedies["duplicates_exact"] == "Set data.duplicates: drop_exact."
    changed = ["data.duplicates=drop_near", "data.anonymise=redact"]
    told = {one.code: one.remedy for one in stages.audit("rows.jsonl", overrides=changed, workers=1).findings}
    assert told.keys() == remedies.keys()
    assert told["duplicates_exact"] == "data.duplicates: drop_near leaves them out."
    assert told["personal_email"] == "data.anonymise: redact replaces them."
    assert told["secret_key"].startswith("data.anonymise: redact replaces them. Change them")
    assert told["personal_url"] == remedies["personal_url"]  # Not replaced unless it is asked for.
    one_kind = stages.audit("rows.jsonl", overrides=[*changed, "data.anonymise_kinds=[phone]"], workers=1)
    assert {one.code: one.remedy for one in one_kind.findings}["personal_email"] == remedies["personal_email"]


def test_a_named_domain_field_that_is_nowhere_is_an_error() -> None:
    rows = [good(number) | {"topic": ("tea", "milk")[number % 2]} for number in range(12)]
    write("a.jsonl", rows)
    write("b.jsonl", [good(number) for number in range(20, 24)])
    with pytest.raises(DataError, match=r"data\.domain_field = topik: no row of a\.jsonl has a domain in that field"):
        stages.audit("a.jsonl", overrides=["data.domain_field=topik"], workers=1)
    with pytest.raises(DataError, match="topik"):
        stages.preparing.look(Recipe(model={"base": "base"}, data={"train": "a.jsonl", "domain_field": "topik"}))
    both = stages.audit("a.jsonl", overrides=["data.domain_field=topic", "data.train=[a.jsonl, b.jsonl]"], workers=1)
    found = finding(both, "no_domain")
    assert (found.count, [row.place for row in found.rows]) == (4, [f"b.jsonl:{number}" for number in range(1, 5)])
    assert "no row of b.jsonl has it" in found.message and "topic" in found.message
    assert "no_domain" not in codes(stages.audit("a.jsonl", overrides=["data.domain_field=topic"], workers=1))


def test_where_nothing_could_be_read_nothing_is_said_of_few_rows() -> None:
    made = stages.audit(write("rows.jsonl", ["{\n", "[\n"]), workers=1)
    assert (made.rows, made.unreadable, made.ok) == (0, 2, False)
    assert "few_rows" not in codes(made)


def test_the_page_of_documentation_lists_every_field_and_measure() -> None:
    told = (Path(__file__).parent.parent / "docs" / "audit.md").read_text(encoding="utf-8")
    write_rows(Path("rows.jsonl"), 30)
    save_tiny_base(Path("base"))
    plain = stages.audit("rows.jsonl", base="base", known=True, workers=1)
    write("topics.jsonl", [good(number) | {"topic": ("tea", "milk")[number % 2]} for number in range(12)])
    spread = stages.audit("topics.jsonl", overrides=["data.domain_field=topic"], workers=1)
    for name in [*plain.model_dump(mode="json"), *plain.measures, *spread.measures, "round_trip_unchecked"]:
        assert f"`{name}`" in told, name


# ------------------------------------------------------------------------------------------------------------- command


def call(*arguments: str, code: int) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "100",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    done = subprocess.run(
        [sys.executable, "-m", "onlay.cli", "audit", *arguments], env=environment, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout[-1000:] + done.stderr[-2000:]
    return done


def test_the_command_tells_and_exits_with_1() -> None:
    rows = [good(number) for number in range(10)]
    rows[4] = {"prompt": "P", "completion": ""}
    write("rows.jsonl", rows)
    done = call("rows.jsonl", "--html", "report.html", code=1)
    assert "✗ error" in done.stdout and "[empty_field]" in done.stdout
    assert "rows.jsonl:5, field completion: it is empty." in " ".join(done.stdout.split()) and "row 5" in done.stdout
    assert "→ Fill it, or delete the row." in done.stdout
    assert "NOT READY" in done.stdout and "report.html" in done.stdout
    page = Path("report.html").read_text()
    assert page.lstrip().startswith("<!") and "rows.jsonl" in page


def test_json_holds_the_findings() -> None:
    rows = [good(number) for number in range(10)]
    write("rows.jsonl", [*rows, rows[2]])
    found = json.loads(call("rows.jsonl", "--json", "--rows", "all", code=0).stdout)
    assert found["ok"] is True
    duplicate = next(one for one in found["findings"] if one["code"] == "duplicates_exact")
    assert duplicate["rows"] == [{"file": "rows.jsonl", "row": 11}]
    assert {"code", "severity", "count", "rows", "remedy"} <= duplicate.keys()
    assert len(found["digest"]) == 64


def test_bad_input_exits_with_2_in_two_lines() -> None:
    for arguments in (
        ["missing.jsonl"],
        ["missing.yaml"],
        ["rows.jsonl", "--rows", "few"],
        ["rows.jsonl", "--rows", "0"],
        ["rows.jsonl", "--known"],
        ["rows.jsonl", "--html", "rows.jsonl"],
    ):
        write("rows.jsonl", [good(1)])
        done = call(*arguments, code=2)
        assert len(done.stderr.strip().splitlines()) == 2
        assert "Traceback" not in done.stderr
        assert json.loads(Path("rows.jsonl").read_text()) == good(1)


def test_what_was_found_is_printed_though_the_page_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from onlay.cli import app
    from onlay.data.audit import page

    def full(*_: Any) -> None:
        raise OutputError("report.html could not be written: No space left on device.", "Free disk space.")

    monkeypatch.setattr(page, "write_whole", full)
    write("rows.jsonl", [good(number) for number in range(10)])
    done = CliRunner().invoke(app, ["audit", "rows.jsonl", "--html", "report.html", "--workers", "1"])
    assert "[few_rows]" in done.stdout and "The whole report" not in done.stdout
    assert isinstance(done.exception, OutputError)


def test_text_of_the_data_is_neither_markup_nor_a_terminal_command_and_secrets_are_masked() -> None:
    odd = "[bold]\x1b[31m red[/bold] anna.keller@example.com is who to ask about it here"
    rows = [good(number) for number in range(10)]
    rows += [
        {"prompt": odd, "completion": "One thing or another."},
        {"prompt": odd, "completion": "Quite another thing."},
    ]
    write("rows.jsonl", rows)
    out = call("rows.jsonl", code=0).stdout
    assert "\x1b" not in out and "[bold]" in out and "[EMAIL]" in out and "anna.keller" not in out


def test_every_file_of_the_project_s_own_examples_can_be_audited() -> None:
    from importlib.resources import files

    example = files("onlay") / "examples" / "support.jsonl"
    made = stages.audit(str(example), workers=1)
    assert made.ok and made.rows > 10
