"""`onlay check` on runs that were trained: what it reads from disk, ledger and registry.  In this process."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from onlay import cli, ledger, stages
from onlay.cli import checking as verbs
from onlay.errors import OutputError
from onlay.recipe import digest_of
from onlay.records import Merge, MergeCheck, Run
from onlay.stages import registering
from onlay.stages.checking import check
from tests.builders import recipe_for, save_tiny_base, write_rows
from tests.evaluation.reports import answer_row, comparison, full_report

Say = Callable[..., Any]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a licence and two runs, in the folder where the ledger knows them; tests put back what they change."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("ONLAY_HOME", str(folder / "home"))
        base, rows = save_tiny_base(Path("base")), write_rows(Path("rows.jsonl"), 40)
        (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
        for seed in (1, 2):
            training = {"output": f"run{seed}", "max_steps": 12, "learning_rate": 0.01, "seed": seed}
            stages.train(recipe_for(base, rows, training=training, evaluation={"split": 0.1}, adapter={"rank": 8}))
    return folder


@pytest.fixture
def place(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the commands run.  The ledger knows a run by its folder, so the folder is the one of the training."""
    shutil.copytree(trained, tmp_path / "kept")
    monkeypatch.chdir(trained)
    monkeypatch.setenv("ONLAY_HOME", str(trained / "home"))
    yield trained
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(trained)
    shutil.copytree(tmp_path / "kept", trained)


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    """`onlay check ARGUMENTS --json`, after its exit code was compared; without --json as text."""

    def run(*arguments: str, code: int = 0, text: bool = False) -> Any:
        monkeypatch.setattr(sys, "argv", ["onlay", "check", *arguments, *([] if text else ["--json"])])
        found = 0
        try:
            cli.main()
        except SystemExit as exit:
            found = int(exit.code or 0)
        out, err = capsys.readouterr()
        assert found == code, err + out
        return out if text else json.loads(out)

    assert verbs.check is not None  # Its verb is in the app.
    return run


def states(found: dict[str, Any]) -> dict[str, str]:
    return {item["name"]: item["state"] for item in found["items"]}


def item_of(found: dict[str, Any], name: str) -> dict[str, Any]:
    return next(item for item in found["items"] if item["name"] == name)


def evaluate(run: str, folder: str | None = None, **changes: Any) -> Path:
    """Leaves what evaluation leaves: a Report that may ship, in the ledger, with answers and failures."""
    path = Path(folder or f"{run}/report")
    good = full_report()
    values: dict[str, Any] = {
        "sources": {"run": Run.load(Path(run)).digest}, "path": str(path), "comparisons": [comparison()],
        "gates": good.gates[:2], "verdict": "ship", "failures": 2, "likely_causes": [],
        "safety": good.safety[1:], "scores": {"adapter": {"loop": 0.0, "no_stop": 0.0}},
    }  # fmt: skip
    report = full_report(**(values | changes))
    path.mkdir(exist_ok=True)
    report.save(path)
    rows = [answer_row(number) for number in range(4)]
    lines = {"answers.jsonl": rows, "failures.jsonl": [{"place": row["place"]} for row in rows[:2]]}
    for name, values_of in lines.items():
        (path / name).write_text("".join(json.dumps(row) + "\n" for row in values_of))
    ledger.append(report, path)
    return path


def choose(report: Path, number: int, **changes: Any) -> None:
    """A person's choice on one row, as `onlay compare` writes it."""
    row = answer_row(number)
    digest = digest_of([list(row["prompt"]), *sorted(row["answers"].values())])
    values = {
        "row": number, "place": row["place"], "again": False, "first": "base", "second": "adapter", "digest": digest,
        "choice": "b",
    }  # fmt: skip
    with (report.parent / f"choices-{report.name}-adapter-base.jsonl").open("a") as file:
        file.write(json.dumps(values | changes) + "\n")


def test_a_run_that_was_only_trained(place: Path, say: Say) -> None:
    found = say("run1")
    assert (found["run"], found["ready"]) == ("run1", False)
    assert set(item_of(found, "losses")) == {
        "name", "phase", "state", "evidence", "details", "commands", "record", "digest", "remedy",
    }  # fmt: skip
    before = [item for item in found["items"] if item["phase"] in ("before training", "during training")]
    assert {item["name"]: item["state"] for item in before if item["state"] != "passed"} == {
        "licence of the data": "not done"
    }
    after = {item["name"]: item["state"] for item in found["items"] if item["phase"] == "after training"}
    assert after.pop("serving compatibility") == "passed"
    assert set(after.values()) == {"not done"}
    assert item_of(found, "gates")["remedy"] == "onlay evaluate run1"
    assert {item["state"] for item in found["items"] if item["phase"] == "deployment"} == {"not yet applicable"}
    assert item_of(found, "losses")["digest"] == Run.load(Path("run1")).digest
    assert "step-0000012" in item_of(found, "checkpoints")["evidence"]
    assert "in 12 steps" in item_of(found, "gradient norms")["evidence"]


def test_from_a_report_and_two_versions_to_ready(place: Path, say: Say) -> None:
    report = evaluate("run1")
    evaluate("run2")
    registering.register("run2", name="support")
    registering.promote("support@1")
    registering.register("run1", name="support")
    registering.promote("support@2")
    choose(report, 0)
    first = say("run1", "--data-licence", "own")
    assert item_of(first, "failures looked at")["evidence"].startswith("1 of 2 rows")
    choose(report, 1)
    found = say("run1", "--data-licence", "own")
    assert {name: state for name, state in states(found).items() if state != "passed"} == {
        "A/B test": "not yet applicable", "monitoring": "not yet applicable",
    }  # fmt: skip
    assert found["ready"] is True
    rolled = item_of(found, "rollback target")["evidence"]
    assert rolled == "onlay rollback support gives support@1"
    version = say("support@2", "--data-licence", "own")
    assert version["ready"] is True and version["run"] == "support@2"
    assert registering.rollback("support").version == 1
    assert "live is support@1" in item_of(say("support@2"), "version map")["evidence"]


def test_the_rollback_that_is_told_is_the_one_that_happens(place: Path, say: Say) -> None:
    for run in ("run1", "run2"):
        evaluate(run)
        registering.register(run, name="a")
    for number in (1, 2, 1):
        registering.promote(f"a@{number}")
    registering.rollback("a")
    registering.promote("a@1")
    gone_through = []
    while (told := item_of(say("a@live"), "rollback target"))["state"] == "passed":
        gone_through.append(registering.rollback("a").version)
        assert told["evidence"] == f"onlay rollback a gives a@{gone_through[-1]}"
    assert gone_through == [2, 1]


def test_choices_on_other_answers_or_without_a_choice_do_not_count(place: Path, say: Say) -> None:
    report = evaluate("run1")
    choose(report, 0, digest="0" * 64)
    choose(report, 1, choice="skip")
    choose(report, 3)
    assert item_of(say("run1"), "failures looked at")["evidence"].startswith("0 of 2 rows")


def _edit_run(place: Path) -> None:
    Run.load(Path("run1")).model_copy(update={"last_loss": 0.01}).save(Path("run1"))


def _edit_recipe(place: Path) -> None:
    path = Path("run1/recipe.yaml")
    path.write_text(path.read_text().replace("rank: 8", "rank: 9"))


def _edit_dataset(place: Path) -> None:
    path = Path("run1/dataset.json")
    path.write_text(
        path.read_text().replace('"max_tokens"', '"longest"').replace('"longest"', '"max_tokens"').replace("512", "511")
    )


def _edit_report(place: Path) -> None:
    path = evaluate("run1") / "report.json"
    path.write_text(path.read_text().replace('"failures": 2', '"failures": 0'))


def _set_nan(place: Path) -> None:
    path = Path("run1/adapter/adapter_model.safetensors")
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = np.nan
    save_file(tensors, path)


def _record_digest(place: Path) -> None:
    run = Run.load(Path("run1"))
    run = run.model_copy(update={"proofs": run.proofs | {"artefact_sha256": {"onlay.json": "0" * 64}}})
    run.save(Path("run1"))
    ledger.append(run, "run1")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_edit_run, "run.json is not the record that training left"),
        (_edit_recipe, "recipe.yaml was edited"),
        (_edit_dataset, "dataset.json is not the one"),
        (_edit_report, "report.json is not the record that evaluation left"),
        (_set_nan, "holds NaN"),
        (_record_digest, "onlay.json was changed since the run saved it"),
    ],
)
def test_what_was_changed_by_hand_fails(place: Path, say: Say, damage: Callable[[Path], None], said: str) -> None:
    damage(place)
    item = item_of(say("run1", code=1), "records")
    assert item["state"] == "failed" and said in "; ".join([item["evidence"], *item["details"]])


def test_a_recipe_with_fields_of_a_later_version_is_the_same_recipe(place: Path, say: Say) -> None:
    """The ledger holds the recipe as it was; where it was shorter, defaults fill it up."""
    run = Run.load(Path("run1"))
    row = next(row for row in ledger.Ledger().rows("recipe") if row.digest == run.sources["recipe"])
    values = row.values
    del values["training"]["weight_decay"]
    ledger.Ledger().append_json("recipe", digest_of(values), json.dumps(values), "run1")
    changed = run.model_copy(update={"sources": run.sources | {"recipe": digest_of(values)}})
    changed.save(Path("run1"))
    ledger.append(changed, "run1")
    assert states(say("run1"))["records"] == "passed"


def test_a_copied_run_is_taken_and_it_is_said(place: Path, say: Say) -> None:
    shutil.copytree("run1", "copy")
    item = item_of(say("copy"), "records")
    assert item["state"] == "passed" and any("does not know the run" in line for line in item["details"])


def test_checkpoints_that_are_torn_or_gone(place: Path, say: Say) -> None:
    latest = sorted(Path("run1/checkpoints").glob("step-*"))[-1]
    weights = latest / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert "cannot be read" in item_of(say("run1", code=1), "checkpoints")["evidence"]
    shutil.rmtree("run1/checkpoints")
    assert "none on the disk" in item_of(say("run1", code=1), "checkpoints")["evidence"]


def test_a_version_whose_run_is_gone(place: Path, say: Say) -> None:
    evaluate("run1")
    registering.register("run1", name="support")
    shutil.rmtree("run1")
    found = states(say("support@1"))
    assert (found["gradient norms"], found["checkpoints"], found["losses"]) == ("not done", "not done", "passed")
    assert (found["gates"], found["registered version"]) == ("passed", "passed")


def test_a_version_with_a_changed_file(place: Path, say: Say) -> None:
    version = registering.register("run1", name="support").version
    path = Path(version.path) / "chat_template.jinja"
    path = path if path.is_file() else Path(version.path) / "tokenizer" / "tokenizer_config.json"
    path.chmod(0o644)
    path.write_text(path.read_text() + " ")
    item = item_of(say("run1"), "registered version")
    assert item["state"] == "failed" and "was changed" in item["evidence"]


def test_a_report_on_another_record_of_the_run_does_not_count(place: Path, say: Say) -> None:
    path = Path("run1/report")
    path.mkdir()
    full_report(sources={"run": "other"}).save(path)
    item = item_of(say("run1"), "gates")
    assert item["state"] == "not done" and "another record" in item["evidence"]


def test_a_merge_decides(place: Path, say: Say) -> None:
    measured = {
        "into": "original", "split": "evaluation", "rows": 1, "tokens": 1, "max_logit_difference": 0.0,
        "mean_logit_difference": 0.0, "top1_agreement": 1.0, "perplexity": {"adapter": 1.0, "merged": 1.0, "base": 1.0},
        "base_mean_logit_difference": 0.1, "proven_max_difference": 0.0, "proven_mean_difference": 0.0,
        "rounding_max_difference": 0.0, "rounding_mean_difference": 0.0, "limit": 0.1, "passed": True,
    }  # fmt: skip
    merge = Merge(
        sources={"run": Run.load(Path("run1")).digest}, path="merged", status="merged", base="base", base_revision=None,
        method="lora", storage="bf16", into="original", seconds=1.0, weight_bytes=1, changed_tensors=1,
        verification=MergeCheck(**measured),
    )  # fmt: skip
    ledger.append(merge, "merged")
    assert states(say("run1"))["merge or serve decided"] == "not done"  # It is not there any more.
    Path("merged").mkdir()
    Path("merged/config.json").write_text("{}")
    item = item_of(say("run1"), "merge or serve decided")
    assert (item["state"], item["digest"]) == ("passed", merge.digest)


def test_deployment_records_are_looked_up_in_the_ledger(place: Path, say: Say) -> None:
    version = registering.register("run1", name="support").version
    text = json.dumps({"sources": {"version": version.digest}})
    ledger.Ledger().append_json("deployment", "e" * 64, text, "served")
    item = item_of(say("support@1"), "monitoring")
    assert (item["state"], item["digest"]) == ("not done", "e" * 64)


def test_the_table_says_words_and_signs(place: Path, say: Say) -> None:
    evaluate("run1", scores={"adapter": {"no_stop": 0.5}}, likely_causes=["likely: end token untrained: 0%"])
    text = say("run1", text=True, code=1)
    for told in (
        "before training",
        "✓ passed",
        "○ not done",
        "✗ failed",
        "– not yet applicable",
        "NOT READY  run1",
        "→",
    ):
        assert told in text
    assert "likely: end token untrained" in " ".join(text.split())
    below = [line for line in text.splitlines() if len(line) > 80]
    assert all(line.startswith(("  ", "→ ", "NOT READY")) for line in below)
    last = text.rstrip().splitlines()[-1]
    assert "; failed: domain scores" not in last and "; failed: answers stop and do not repeat" in last
    assert "; missing: licence of the data, " in last and "registered version" not in last


def test_commands_can_be_copied(place: Path, say: Say) -> None:
    lines = say("run1", text=True).splitlines()
    items = say("run1")["items"]
    commands = next(item["commands"] for item in items if item["name"] == "serving compatibility")
    assert "vLLM" in commands
    remedies = {item["remedy"] for item in items if item["remedy"] is not None}
    assert {f"  {command}" for command in [*commands.values(), *remedies]} <= set(lines)


def test_choices_on_another_report_beside_it_do_not_count(place: Path, say: Say) -> None:
    evaluate("run1")
    choose(Path("run1/other"), 0)
    assert item_of(say("run1"), "failures looked at")["evidence"].startswith("0 of 2 rows")
    choose(Path("run1/report"), 0)
    assert item_of(say("run1"), "failures looked at")["evidence"].startswith("1 of 2 rows")


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("base", "run.json does not exist"),
        ("runs/none", "neither a run folder nor a registered version"),
        ("rows.jsonl", "neither a run folder nor a registered version"),
        ("support@1", "support is not registered"),
    ],
)
def test_what_is_neither_run_nor_version(place: Path, say: Say, what: str, said: str) -> None:
    assert said in say(what, code=2)["error"]


def test_a_version_that_is_not_there(place: Path, say: Say) -> None:
    registering.register("run1", name="support")
    assert "There is support@1" in say("support@7", code=2)["remedy"]


def test_files_that_cannot_be_read_are_named(place: Path) -> None:
    Path("run1/metrics.jsonl").write_text("{\n")
    with pytest.raises(OutputError, match=r"metrics\.jsonl cannot be read"):
        check("run1")


def test_the_adapter_folder_means_its_run(place: Path) -> None:
    assert check("run1/adapter").run == "run1"
