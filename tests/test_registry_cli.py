"""The registry's verbs on a run that was trained: what a user types, what is refused and why.  In this process."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from onlay import cli, ledger, stages
from onlay.cli import registry as verbs
from onlay.errors import OnlayError
from onlay.recipe import Recipe, parse_recipe
from onlay.records import Dataset, Gate, Report, Run
from onlay.release.describe import describe
from onlay.stages.registering import find_version
from tests.builders import recipe_for, save_tiny_base, write_rows

Say = Callable[..., Any]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, two runs on it and one of a head; tests work on a copy."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("ONLAY_HOME", str(folder / "home"))
        base, rows = save_tiny_base(Path("base")), write_rows(Path("rows.jsonl"), 12)
        for seed in (1, 2):
            training = {"output": f"run{seed}", "max_steps": 3, "learning_rate": 0.01, "seed": seed}
            stages.train(recipe_for(base, rows, training=training))
        texts = write_rows(Path("texts.jsonl"), 24, "classification")
        training = {"output": "head", "max_steps": 3, "learning_rate": 0.01}
        stages.train(head_recipe(base, texts, training))
    return folder


def head_recipe(base: Path, texts: Path, training: dict[str, Any]) -> Recipe:
    return parse_recipe({
        "model": {"base": str(base)}, "adapter": {"method": "head"}, "data": {"train": str(texts)},
        "training": {"batch_size": 4, "epochs": 1, **training}, "evaluation": {"split": None},
    })  # fmt: skip


@pytest.fixture
def place(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the commands run: copies of base and runs, an empty registry and ledger."""
    for name in ("base", "run1", "run2", "head"):
        shutil.copytree(trained / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    """`onlay ARGUMENTS --json`: what it printed, after its exit code was compared; without --json as text."""

    def run(*arguments: str, code: int = 0, text: bool = False) -> Any:
        monkeypatch.setattr(sys, "argv", ["onlay", *arguments, *([] if text else ["--json"])])
        found = 0
        try:
            cli.main()
        except SystemExit as exit:
            found = int(exit.code or 0)
        out, err = capsys.readouterr()
        assert found == code, err
        return out if text else json.loads(out)

    assert verbs.register is not None  # Its verbs are in the app.
    return run


def make_report(run: str, folder: str, *, passed: bool = True, **changes: Any) -> Path:
    gate = Gate(name="exact_match_gain", limit=0.02, found=0.1, passed=passed, reason="gained 10 points")
    values: dict[str, Any] = {
        "sources": {"run": Run.load(Path(run)).digest}, "path": folder, "system": "adapter", "systems": {"adapter": run},
        "base": "base", "base_revision": None, "data": "rows.jsonl", "data_digest": Dataset.load(Path(run)).digest, "rows": 4,
        "scores": {"base": {"exact_match": 0.1}, "adapter": {"exact_match": 0.75}}, "comparisons": [],
        "smallest_difference": {}, "likelihood": [], "forgetting": [], "safety": [], "judged": [], "gates": [gate],
        "verdict": "ship" if passed else "do not ship", "reasons": [], "risks": [], "failures": 0, "likely_causes": [],
        "seconds": 1.0, "environment": {},
    }  # fmt: skip
    report = Report(**(values | changes))
    Path(folder).mkdir(exist_ok=True)
    report.save(Path(folder))
    ledger.append(report, folder)
    return Path(folder)


def test_from_run_to_live_and_back(place: Path, say: Say) -> None:
    make_report("run1", "report1")
    make_report("run2", "report2")
    first = say("register", "run1", "--name", "support", "--report", "report1")
    assert (first["id"], first["new"], first["base"], first["rank"]) == ("support@1", True, "base", 4)
    assert set(first["sources"]) == {"run", "recipe", "dataset", "model", "report"}
    assert first["scores"] == {"exact_match": 0.75}
    assert {"adapter_model.safetensors", "tokenizer/tokenizer.json", "recipe.yaml", "report.json"} <= set(
        first["files"]
    )
    second = say("register", "run2", "--name", "support")  # finds its Report in the ledger
    assert (second["version"], second["verdict"]) == (2, "ship")
    assert say("register", "run1", "--name", "support", "--report", "report1")["new"] is False
    assert say("promote", "support@1", "--as", "live")["moved"] is True
    assert say("promote", "support@2", "--as", "live")["id"] == "support@2"
    rows = say("versions", "support")["versions"]
    assert [(row["version"], row["aliases"], row["digest"]) for row in rows] == [
        (1, [], first["digest"]), (2, ["live"], second["digest"]),
    ]  # fmt: skip
    assert say("rollback", "support")["version"] == 1
    assert say("versions", "support")["versions"][0]["aliases"] == ["live"]
    assert [event["action"] for event in say("history", "support")["events"]] == ["register"] * 2 + [
        "promote", "promote", "rollback",
    ]  # fmt: skip


def test_an_adapter_is_loaded_from_its_version_by_plain_peft(place: Path, say: Say) -> None:
    say("register", "run1", "--name", "support")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = find_version("support@latest").path
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), path)
    stored = load_file(Path("run1/adapter/adapter_model.safetensors"))
    name = next(name for name in stored if "lora_B" in name)
    found = model.get_parameter(name.replace(".weight", ".default.weight"))
    assert (found.detach().numpy() == stored[name]).all()
    assert AutoTokenizer.from_pretrained(f"{path}/tokenizer")("abc")["input_ids"]


def test_without_gates_it_is_registered_and_not_promoted(place: Path, say: Say) -> None:
    say("register", "run1", "--name", "support")
    refused = say("promote", "support@1", "--as", "live", code=2)
    assert "without a Report" in refused["error"] and "onlay evaluate" in refused["remedy"]
    assert "needs a reason" in say("promote", "support@1", "--force", code=2)["error"]
    assert say("promote", "support@1", "--force", "--reason", "a trial")["moved"]
    make_report("run2", "failed", passed=False)
    say("register", "run2", "--name", "support", "--report", "failed")
    assert "exact_match_gain" in say("promote", "support@2", code=2)["error"]


def _edit_weights(change: Callable[[dict[str, np.ndarray]], None]) -> Callable[[Path], None]:
    def edit(place: Path) -> None:
        path = place / "run1/adapter/adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
        _record_files(place)

    return edit


def _record_files(place: Path) -> None:
    """As if training had saved the weights so."""
    from onlay.release.store import file_digest

    run = Run.load(place / "run1")
    adapter = place / "run1/adapter"
    saved = {path.name: file_digest(path) for path in sorted(adapter.iterdir())}
    run.model_copy(update={"proofs": run.proofs | {"artefact_sha256": saved}}).save(place / "run1")


def _edit_run(*, known: bool = False, **changes: Any) -> Callable[[Path], None]:
    def edit(place: Path) -> None:
        run = Run.load(place / "run1")
        if known:
            ledger.append(run, "run1")
        run.model_copy(update=changes).save(place / "run1")

    return edit


def _set_nan(tensors: dict[str, np.ndarray]) -> None:
    next(iter(tensors.values()))[0, 0] = np.nan


def _set_still(tensors: dict[str, np.ndarray]) -> None:
    for name in tensors:
        if "lora_B" in name:
            tensors[name][:] = 0


def _other_base(place: Path) -> None:
    shutil.rmtree(place / "base")
    save_tiny_base(place / "base", seed=7)


def _other_adapter(place: Path) -> None:
    save_tiny_base(place / "wide", hidden_size=64, intermediate_size=64)
    notes = place / "run1/adapter/onlay.json"
    notes.write_text(json.dumps(json.loads(notes.read_text()) | {"base": "wide", "base_weight_fingerprint": "0" * 64}))


def _other_tokenizer(place: Path) -> None:
    path = place / "base/tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 7}))


def _recorded_otherwise(place: Path) -> None:
    run = Run.load(place / "run1")
    run.model_copy(update={"proofs": run.proofs | {"artefact_sha256": {"adapter_model.safetensors": "0" * 64}}}).save(
        place / "run1"
    )


@pytest.mark.parametrize(
    ("damage", "said", "code"),
    [
        (_edit_weights(_set_nan), "holds NaN or infinity", 1),
        (_edit_weights(_set_still), "did not move", 1),
        (_edit_run(proofs={"movement": {"moved_modules": 0}}), "no module moved", 1),
        (_edit_run(known=True, evaluation_loss=0.1), "not the record that training left", 1),
        (_edit_run(status="interrupted"), "is interrupted: only a finished run", 2),
        (_recorded_otherwise, "adapter_model.safetensors was changed on disk", 1),
        (_other_base, "other weights of base", 2),
        (_other_adapter, "was trained on wide", 2),
        (_other_tokenizer, "tokenizer in .* is not the one", 2),
        (lambda place: shutil.rmtree(place / "run1/adapter"), "does not exist", 2),
    ],
    ids=["nan", "still", "by its record", "record", "unfinished", "files", "base", "adapter", "tokenizer", "gone"],
)  # fmt: skip
def test_what_is_not_sound_is_refused_with_its_reason(
    place: Path, say: Say, damage: Callable[[Path], None], said: str, code: int
) -> None:
    damage(place)
    assert re.search(said, say("register", "run1", "--name", "support", code=code)["error"])
    assert say("versions")["versions"] == []


def test_a_run_that_lies_where_it_was_trained_is_known(
    trained: Path, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    monkeypatch.setenv("ONLAY_HOME", str(trained / "home"))
    done = say("register", "run1", "--name", "known")
    assert not any("ledger" in note for note in done["notes"])
    record, chain = stages.show(done["digest"])
    assert record is not None
    assert {row.kind for row in chain} == {"run", "recipe", "model", "dataset"}


def test_files_that_are_as_recorded_are_taken(place: Path, say: Say) -> None:
    from onlay.release.store import file_digest

    run = Run.load(Path("run1"))
    recorded = {path.name: file_digest(path) for path in Path("run1/adapter").iterdir()}
    run.model_copy(update={"proofs": run.proofs | {"artefact_sha256": recorded}}).save(Path("run1"))
    done = say("register", "run1", "--name", "support")
    assert not any("digests" in note for note in done["notes"])
    assert any("ledger does not know" in note for note in done["notes"])


def test_a_report_of_another_run_is_refused(place: Path, say: Say) -> None:
    make_report("run2", "report2")
    assert "another run" in say("register", "run1", "--name", "a", "--report", "report2", code=2)["error"]
    assert say("register", "run1", "--name", "a")["verdict"] is None


def weights_of(run: str) -> str:
    from onlay.release.store import file_digest

    return file_digest(Path(run) / "adapter" / "adapter_model.safetensors")


def sources_of(run: str, *, weights: str | None = None) -> dict[str, str]:
    return {"run": Run.load(Path(run)).digest, "weights": weights or weights_of(run)}


def test_the_report_that_speaks_for_a_run_is_taken(place: Path, say: Say) -> None:
    from onlay.stages import checking

    def chosen() -> str:
        with_report = [note for note in say("register", "run1", "--name", "a")["notes"] if "with the Report in" in note]
        path = with_report[0].rpartition(" in ")[2] if with_report else "none"
        found, folder, _, _ = checking._find_report(checking._find("run1"), Run.load(Path("run1")))
        assert (folder is None, found is None) == (path == "none", path == "none")
        assert folder is None or str(folder) == path  # `check` looks at the one that `register` takes.
        return path.removeprefix(str(place) + "/")

    make_report("run1", "elsewhere", data_digest="other rows")  # Newer or not: not on the run's own rows.
    assert chosen() == "none"
    make_report("run1", "first")
    assert chosen() == "first"
    make_report("run1", "second", sources=sources_of("run1"))
    make_report("run1", "foreign", data_digest="other rows")
    make_report("run1", "retrained", sources=sources_of("run1", weights="0" * 64))
    make_report("run2", "theirs")
    assert chosen() == "second"
    make_report("run1", "run1/report")
    make_report("run1", "third")
    assert chosen() == "run1/report"
    make_report("run1", "run1/report", sources=sources_of("run1", weights="0" * 64))
    assert chosen() == "third"
    told = say("register", "run1", "--name", "a")["notes"]
    assert "no Report of the run: the one in run1/report measured other weights than the run has now" in told


def test_a_report_on_other_weights_is_refused_also_where_it_is_named(place: Path, say: Say) -> None:
    make_report("run1", "stale", sources=sources_of("run1", weights="0" * 64))
    refused = say("register", "run1", "--name", "a", "--report", "stale", code=1)
    assert "stale measured other weights than run1 has now" in refused["error"]
    assert refused["remedy"] == "onlay evaluate run1"


def test_full_tuning_is_refused(place: Path, say: Say) -> None:
    recipe = Path("run1/recipe.yaml")
    recipe.write_text("model: {base: base}\nadapter: {method: full}\ndata: {train: rows.jsonl}\n")
    assert "whole model" in say("register", "run1", "--name", "a", code=2)["error"]


def test_a_head_is_registered(place: Path, say: Say) -> None:
    done = say("register", "head", "--name", "mood")
    assert (done["method"], done["rank"]) == ("head", None)
    assert "head.safetensors" in done["files"]
    assert "classification head" in say("compatible", "mood@1", code=2)["error"]


def test_diff_tells_recipe_data_scores_and_base(place: Path, say: Say) -> None:
    make_report("run2", "report2")
    say("register", "run1", "--name", "a"), say("register", "run2", "--name", "a")
    found = say("diff", "a@1", "a@2")
    assert found["recipe"] == {"training.seed": [1, 2], "training.output": ["run1", "run2"]}
    assert found["data"] == {} == found["base"]
    assert found["scores"]["exact_match"] == [None, 0.75]
    assert "adapter_model.safetensors" in found["files"] and "tokenizer/tokenizer.json" not in found["files"]
    assert say("diff", "a@1", "a@1")["files"] == {}
    assert "do not differ" in say("diff", "a@1", "a@1", text=True)
    assert "training.seed" in say("diff", "a@1", "a@2", text=True)


def test_verify_exits_with_1_when_a_byte_differs(place: Path, say: Say) -> None:
    done = say("register", "run1", "--name", "a")
    assert say("verify", "a") == {"versions": ["a@1"], "damaged": []}
    path = Path(done["path"]) / "adapter_config.json"
    path.chmod(0o644)
    path.write_text(path.read_text() + " ")
    assert say("verify", code=1)["damaged"] == [{"version": "a@1", "problems": ["adapter_config.json was changed"]}]
    assert "adapter_config.json was changed" in say("verify", "a@1", text=True, code=1)


def test_pushed_here_and_pulled_there(place: Path, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    make_report("run1", "report1")
    done = say("register", "run1", "--name", "support")
    place_of = say("push", "support", "out")["path"]
    monkeypatch.setenv("ONLAY_HOME", str(place / "elsewhere"))
    pulled = say("pull", place_of)
    assert (pulled["id"], pulled["digest"], pulled["gates"]) == ("support@1", done["digest"], done["gates"])
    assert say("promote", "support@1")["moved"]
    assert say("pull", place_of)["new"] is False
    assert say("pull", place_of, "--name", "desk")["id"] == "desk@1"
    _claim(place / "out", "exact_match", 0.99)
    assert "says something else than the files do" in say("pull", place_of, "--name", "x", code=1)["error"]


def _claim(folder: Path, score: str, value: float) -> None:
    values = json.loads((folder / "version.json").read_text())
    values["scores"][score] = value
    (folder / "version.json").write_text(json.dumps(values))


def test_the_description_is_a_function_of_the_files(place: Path, say: Say) -> None:
    done = say("register", "run1", "--name", "support")
    version = find_version("support")
    assert describe(Path(version.path), version.files).digest == done["digest"]


def test_compatible_tells_of_base_and_servers(place: Path, say: Say) -> None:
    say("register", "run1", "--name", "support")
    for what in ("support@1", "run1", "run1/adapter"):
        found = say("compatible", what)
        assert (found["fits"], found["base"]) == (True, "base")
        assert [server["server"] for server in found["servers"]] == ["vLLM", "SGLang", "LoRAX", "TGI", "llama.cpp"]
    assert "vLLM: accepted" in say("compatible", "support", text=True)
    save_tiny_base(place / "other", seed=3)
    refused = say("compatible", "support", "--base", "other", code=1)
    assert refused["fits"] is False and "other weights" in refused["notes"][0]
    assert refused["servers"] == []


def test_tables_are_shown(place: Path, say: Say) -> None:
    assert "Nothing is registered" in say("versions", text=True)
    assert "Next: onlay evaluate run1" in say("register", "run1", "--name", "support", text=True)
    assert "was registered before" in say("register", "run1", "--name", "support", text=True)
    say("promote", "support", "--force", "--reason", "a trial", text=True)
    assert "live" in say("versions", text=True)
    assert "forced" in say("history", "support", text=True)


def test_what_is_not_registered_is_two_lines(place: Path, say: Say) -> None:
    say("register", "run1", "--name", "support")
    for arguments in (("rollback", "suport"), ("promote", "suport@1"), ("history", "x"), ("diff", "support", "x")):
        assert "is not registered" in say(*arguments, code=2)["error"]
    with pytest.raises(OnlayError):
        find_version("support@9")
