"""`onlay evaluate` and `onlay compare` as typed: what is printed, exit codes, two-line errors.  In this process."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onlay import cli, stages
from onlay.recipe import parse_recipe
from onlay.records import Report
from tests.builders import save_tiny_base

Say = Callable[..., Any]
BRIEF = ("--set", "evaluation.max_new_tokens=6")
MATERIAL = {
    "general_text": [{"text": "The river runs."}, {"text": "Seven boats wait."}],
    "general_checks": [{"question": f"{i} + 1?", "choices": [str(i + 1), "none"], "answer": 0} for i in range(2)],
    "safety_prompts": [{"prompt": f"{i}?", "refuse": bool(i % 2)} for i in range(4)],
}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a run that says `yes` to everything, with gates, and one that learned nothing."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("ONLAY_HOME", str(folder / "home"))
        save_tiny_base(Path("base"))
        write_lines(Path("rows.jsonl"), [{"prompt": f"{i} boats?", "completion": "yes"} for i in range(40)])
        for output, steps in (("run", 40), ("weak", 2)):
            stages.train(parse_recipe({
                "model": {"base": "base"}, "adapter": {"rank": 4}, "data": {"train": "rows.jsonl"},
                "training": {"output": output, "max_steps": steps, "batch_size": 4, "learning_rate": 0.01},
                "evaluation": {"split": 0.3, "gates": {"exact_match": 0.2}},
            }))  # fmt: skip
    return folder


@pytest.fixture
def place(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ONLAY_HOME", str(tmp_path / "home"))
    for name, rows in MATERIAL.items():
        write_lines(tmp_path / f"small_{name}.jsonl", rows)
    for module in ("general", "safety"):
        monkeypatch.setattr(f"onlay.evaluation.{module}.bundled", lambda name: tmp_path / f"small_{name}.jsonl")
    return tmp_path


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    """Runs `onlay ARGUMENTS`, `typed` on standard input; (standard output, standard error), the exit code compared."""

    def run(*arguments: str, code: int = 0, typed: str = "") -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["onlay", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        found = 0
        try:
            cli.main()
        except SystemExit as exit:
            found = int(exit.code or 0)
        out, err = capsys.readouterr()
        assert found == code, err
        return out, err

    return run


def test_the_verdict_is_printed_and_the_next_step(place: Path, say: Say) -> None:
    out, _ = say("evaluate", "run", *BRIEF)
    assert out.startswith("SHIP  adapter on")
    assert "Next: onlay register run --name NAME" in out
    assert "run/report/report.html" in out
    out, _ = say("evaluate", "weak", *BRIEF)
    assert out.startswith("DO NOT SHIP  adapter on")
    assert "exact_match: the gain is" in out
    assert "onlay register" not in out and "weak/report/failures.jsonl" in out


def test_json_is_the_record_and_its_digest(place: Path, say: Say) -> None:
    out, _ = say("evaluate", "run", *BRIEF, "--json")
    values = json.loads(out)
    made = Report.load(place / "run" / "report")
    assert values.pop("digest") == made.digest
    assert values == made.model_dump(mode="json")


def test_options_reach_the_evaluation(place: Path, say: Say) -> None:
    out, _ = say("evaluate", "run", *BRIEF, "--with", "weak", "--data", "rows.jsonl", "--output", "there", "--set",
                 "evaluation.answer_rows=5", "--json")  # fmt: skip
    made = Report.model_validate({key: value for key, value in json.loads(out).items() if key != "digest"})
    assert (made.rows, made.path, made.data) == (5, "there", "rows.jsonl")
    assert list(made.systems) == ["adapter", "weak", "base"]
    assert (place / "there" / "report.html").is_file()
    assert not (place / "run" / "report").exists()
    assert made.environment["command"] == (
        "onlay evaluate run --with weak --data rows.jsonl --set evaluation.max_new_tokens=6 --set evaluation.answer_rows=5"
    )


def test_seeds_are_trained_from_the_command_line(place: Path, say: Say) -> None:
    out, _ = say("evaluate", "weak", *BRIEF, "--seeds", "2", "--json")
    assert {tuple(row["gains"]) for row in json.loads(out)["seeds"]} == {("0", "1")}


@pytest.mark.parametrize(("arguments", "problem", "remedy"), [
    (("evaluate", "base"), "base is no run folder, so it brings no held-out rows.", "onlay evaluate base --data rows.jsonl"),
    (("evaluate", "run", "--set", "adapter.rank=2"), "--set adapter.rank=2 would change what was trained.", "evaluation"),
    (("evaluate", "run", "--set", "evaluation.gates={}"), "--set evaluation.gates comes too late", "train anew"),
    (("evaluate", "run", "--with", "nothing"), "nothing is no adapter, run or registered version.", "onlay versions"),
    (("evaluate", "run", "--seeds", "0"), "Invalid value for '--seeds'", "onlay evaluate --help"),
    (("evaluate", "run", "-o", "rows.jsonl"), "rows.jsonl exists already and holds no report.", "--output"),
    (("evaluate", "run", "--set", "evaluation.general=[no.txt]"), "There is no evaluation file at no.txt.", "relative"),
    (("compare", "run"), "run has no answers to compare yet.", "onlay evaluate run"),
    (("compare", "nowhere"), "nowhere has no answers to compare yet.", "onlay evaluate nowhere"),
])  # fmt: skip
def test_errors_are_two_lines_and_exit_code_2(
    place: Path, say: Say, arguments: tuple[str, ...], problem: str, remedy: str
) -> None:
    out, err = say(*arguments, code=2)
    lines = err.splitlines()
    assert (out, len(lines)) == ("", 2)
    assert lines[0].startswith(problem)
    assert remedy in lines[1]
    out, _ = say(*arguments, "--json", code=2)
    assert json.loads(out) == {"error": lines[0], "remedy": lines[1]}


# -------------------------------------------------------------------------------------------------------------- compare


def test_a_person_chooses_leaves_and_goes_on(place: Path, say: Say) -> None:
    say("evaluate", "run", *BRIEF, "--set", "evaluation.answer_rows=4")
    out, _ = say("compare", "run", typed="a\nnonsense\nb\nq\n")
    assert out.count("Which is better?") == 4  # Two rows, nonsense once more, and q.
    assert "adapter" not in out.rpartition("Which is better?")[0]  # Names come with the result alone.
    assert "of 2 rows" in out
    assert "2 rows are left.\n" in out
    assert out.splitlines()[-1] == "Next: onlay compare run --against base"
    out, _ = say("compare", "run", typed="tie\n")  # The input ends: as q.
    assert "1 tied of 3 rows" in out and "1 row is left.\n" in out
    out, err = say("compare", "run", "--json", typed="s\n")
    record = json.loads(out)
    assert "Which is better?" in err
    assert (record["rows"], record["wins"] + record["losses"], record["ties"], record["left"]) == (3, 2, 1, 0)
    assert (record["system"], record["against"], record["judge"]) == ("adapter", "base", "person")
    out, _ = say("compare", "run")
    assert "Which is better?" not in out and "left" not in out and "Next" not in out


def test_rows_asked_again_tell_how_steady_a_person_is(place: Path, say: Say) -> None:
    say("evaluate", "run", *BRIEF, "--set", "evaluation.answer_rows=4")
    out, _ = say("compare", "run", "--rows", "2", "--again", "2", "--seed", "3", "--json", typed="a\na\na\na\n")
    record = json.loads(out)
    # Always the first: of a pair asked the other way round that is the other system, so nothing is agreed on.
    assert (record["rows"], record["ties"], record["consistency"], record["first_slot_wins"]) == (2, 2, 0.0, 1.0)
    out, _ = say("compare", "run", "--rows", "3", "--again", "2", "--seed", "3", typed="q\n")
    assert out.splitlines()[-1] == "Next: onlay compare run --against base --rows 3 --again 2 --seed 3"
    _, err = say("compare", "run", "--against", "live", code=2)
    assert err.splitlines() == ["--against live did not answer in run/report.", "There: base."]


def test_choices_about_other_answers_are_not_gone_on_with(place: Path, say: Say) -> None:
    say("evaluate", "run", *BRIEF)
    say("compare", "run", typed="a\n")
    say("evaluate", "run", "--set", "evaluation.max_new_tokens=3")
    _, err = say("compare", "run", code=2)
    assert "whose answers have changed since" in err.splitlines()[0]
