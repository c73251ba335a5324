"""The command line as a user has it: `--help` without torch, and the main job end to end on a tiny base."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from onlay import __version__, stages
from onlay.cli import main
from onlay.cli.app import verbs
from onlay.records import Run
from tests.builders import save_tiny_base, write_rows

VERBS = (
    "init", "doctor", "prepare", "audit", "synthesize", "review", "restore", "advise", "plan", "train", "generate", "chat", "evaluate", "compare", "check", "register", "promote", "rollback",
    "versions", "diff", "verify", "history", "push", "pull", "compatible", "merge", "show", "log", "schema", "demo",
)  # fmt: skip
HELP = """
import contextlib, io, json, sys
from onlay import __version__
from onlay.cli import main
after_import = [name for name in ("torch", "transformers", "pydantic", "rich.console", "yaml") if name in sys.modules]
texts = {}
for verb in ["", *sys.argv[1:]]:
    sys.argv, out = ["onlay", *([verb] if verb else []), "--help"], io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            main(); code = 0
        except SystemExit as exit:
            code = exit.code
    texts[verb] = (code, out.getvalue())
heavy = [name for name in ("torch", "transformers", "datasets", "numpy") if name in sys.modules]
print(json.dumps({"after_import": after_import, "heavy": heavy, "texts": texts}))
"""


def call(*arguments: str, cwd: Path, stdin: str = "", code: int = 0) -> subprocess.CompletedProcess[str]:
    """`onlay ARGUMENTS` in a process of its own; one thread, because several tests run at once."""
    command = [sys.executable, "-m", "onlay.cli", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    done = subprocess.run(
        command, cwd=cwd, env=environment, input=stdin, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == code, done.stderr[-2000:]
    return done


@pytest.fixture(scope="module")
def helped() -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", HELP, *VERBS], capture_output=True, text=True, timeout=60, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_help_never_loads_torch(helped: dict[str, Any]) -> None:
    assert helped["after_import"] == []
    assert helped["heavy"] == []


def test_help_lists_every_verb_with_whole_words(helped: dict[str, Any]) -> None:
    code, text = helped["texts"][""]
    assert code == 0
    listed = text.split("Commands:")[1].strip().splitlines()
    assert [line.split()[0] for line in listed] == list(VERBS)
    assert "..." not in "".join(listed)
    assert len(app_verbs()) == len(VERBS)


def app_verbs() -> list[str]:
    return verbs()


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_json(verb: str, helped: dict[str, Any]) -> None:
    code, text = helped["texts"][verb]
    assert code == 0
    assert text.startswith(f"Usage: onlay {verb} ")
    assert "--json" in text or verb == "schema"  # which prints JSON and nothing else
    assert max(len(line) for line in text.splitlines()) <= 80


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    save_tiny_base(folder / "base")
    write_rows(folder / "rows.jsonl", 30)
    return folder


def test_from_a_file_to_an_adapter_and_its_answers(place: Path) -> None:
    made = call("init", "rows.jsonl", cwd=place)
    assert made.stdout.splitlines()[-1] == "Next: onlay prepare rows.yaml --show 3, then onlay train rows.yaml"
    text = (place / "rows.yaml").read_text()
    small = text.replace("base: HuggingFaceTB/SmolLM2-135M-Instruct", "base: base").replace(
        "epochs: 5.0", "epochs: 0.5"
    )
    (place / "rows.yaml").write_text(small)
    assert small != text

    shown = call("prepare", "rows.yaml", "--show", "2", cwd=place).stdout
    assert "format prompt_completion, template base, at most 512 tokens" in shown
    assert "rows.jsonl:1" in shown
    assert "<|im_start|>assistant" in shown
    assert "Next: onlay train rows.yaml" in shown

    options = ("--set", "training.output=run", "--set", "adapter.rank=4")
    trained = call("train", "rows.yaml", *options, "--json", cwd=place)
    run = one_object(trained.stdout)
    assert (run["status"], run["path"], run["method"]) == ("finished", "run", "lora")
    assert run["proofs"]["base_unchanged"] is True
    assert (place / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert f"step {run['steps']}/{run['total_steps']}" in trained.stderr
    assert_quiet(trained.stderr)

    answered = call(
        "generate", "run", "-p", "one?", "-p", "two?", "--compare", "--max-new-tokens", "5", "--json", cwd=place
    )
    found = one_object(answered.stdout)
    assert [set(answer) for answer in found["answers"]] == [{"prompt", "answer", "base"}] * 2
    assert_quiet(answered.stderr)

    said = call("chat", "run", "--max-new-tokens", "5", "--json", cwd=place, stdin="one?\nand?\n\nnever asked\n")
    talk = one_object(said.stdout)
    assert [answer["prompt"] for answer in talk["answers"]] == ["one?", "and?"]
    assert talk["answers"][0]["answer"] == found["answers"][0]["answer"]

    record = one_object(call("show", "run", "--json", cwd=place).stdout)
    assert record["record"] == run
    assert {link["kind"] for link in record["chain"]} == {"recipe", "model", "dataset"}
    link = next(link for link in record["chain"] if link["kind"] == "recipe")  # the one that is no record of its own
    behind = one_object(call("show", link["digest"][:10], "--json", cwd=place).stdout)
    assert behind["record"]["digest"] == link["digest"]
    assert behind["record"]["model"]["base"] == "base"
    listed = one_object(call("log", "--json", cwd=place).stdout)
    assert [row["digest"] for row in listed["runs"]] == [run["digest"]]

    again = call("train", "rows.yaml", *options, cwd=place, code=2)
    assert again.stderr.splitlines()[0] == "training.output = run exists already."


def one_object(text: str) -> dict[str, Any]:
    """Standard output carries the JSON object and nothing else."""
    assert len(text.splitlines()) == 1
    value = json.loads(text)
    assert isinstance(value, dict)
    return value


def assert_quiet(text: str) -> None:
    """None of the stack's own talk: it speaks to its callers, not to those who train."""
    for noise in ("Warning", "warnings.warn", "site-packages", "Loading weights", "Writing model", "%|"):
        assert noise not in text, text


# ---------------------------------------------------------------------------- in this process: what the verbs print


@pytest.fixture
def onlay(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`onlay ARGUMENTS` through main(): (exit code, standard output, standard error)."""
    monkeypatch.chdir(place)

    def verb(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["onlay", *arguments])
        code = 0
        try:
            main()
        except SystemExit as exit:
            code = int(exit.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return verb


SMALL = ("--set", "adapter.rank=2", "--set", "training.max_steps=2", "--set", "training.batch_size=2")


@pytest.fixture
def recipe(place: Path) -> str:
    (place / "small.yaml").write_text("model: {base: base}\ndata: {train: rows.jsonl}\n")
    return "small.yaml"


def test_the_summary_fits_80_columns_and_names_the_next_command(onlay: Any, recipe: str) -> None:
    code, out, err = onlay("train", recipe, *SMALL, "--set", "training.output=short")
    assert code == 0
    assert max(len(line) for line in out.splitlines()) <= 80
    assert "Run short: finished" in out
    assert "short/adapter" in out
    assert out.splitlines()[-2:] == ["Next: onlay evaluate short", "      onlay chat short --compare"]
    assert "held-out loss" in err
    code, out, _ = onlay("log")
    assert out.split()[: len(["run", "status", "steps", "held-out", "loss", "started", "(UTC)"])] == [
        "run",
        "status",
        "steps",
        "held-out",
        "loss",
        "started",
        "(UTC)",
    ]
    assert "short" in out
    assert "2/2" in out
    code, out, _ = onlay("show", "short")
    assert max(len(line) for line in out.splitlines()) <= 80
    assert "proofs.base_unchanged" in out
    assert "Chain" in out
    code, out, _ = onlay("generate", "short", "-p", "one?", "--max-new-tokens", "4")
    assert code == 0
    code, out, _ = onlay("generate", "short", "-p", "[bold]one[/]?", "-p", "two?", "--compare", "--max-new-tokens", "4")
    assert "[bold]one[/]?" in " ".join(out.split())
    assert "adapter" in out


@pytest.mark.parametrize(("changes", "said"), [
    ({"evaluation_loss": 1.0}, ["Next: onlay evaluate r", "      onlay chat r --compare"]),
    ({}, ["Next: onlay chat r --compare"]),
    ({"evaluation_loss": 1.0, "method": "head"}, ["Next: onlay generate r --prompt 'a text'"]),
])  # fmt: skip
def test_evaluating_is_named_where_it_can_be_done(
    onlay: Any, recipe: str, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], said: list[str]
) -> None:
    run = Run(
        path="r", status="finished", started="2026-11-22T10:00:00", seconds=1.0, steps=1, total_steps=1, examples=1,
        trained_tokens=1, **changes,
    )  # fmt: skip
    monkeypatch.setattr(stages, "train", lambda *_, **__: run)
    out = onlay("train", recipe)[1].splitlines()
    assert out[-len(said) :] == said and not out[-len(said) - 1]


def test_a_full_run_ends_with_its_model(onlay: Any, recipe: str) -> None:
    code, out, err = onlay("train", recipe, *SMALL[2:], "--set", "adapter.method=full", "--set", "training.output=full")
    assert code == 0, err
    assert "full/model" in out
    assert "adapter" not in out
    assert out.splitlines()[-2:] == ["Next: onlay evaluate full", "      onlay chat full"]
    assert_quiet(err)
    code, out, err = onlay("chat", "full", "--compare")
    assert (code, err.splitlines()[-1]) == (2, "Leave --compare out.")


def test_other_verbs(onlay: Any) -> None:
    code, out, _ = onlay("schema")
    assert code == 0
    assert set(json.loads(out)["properties"]) == {"model", "adapter", "data", "training", "evaluation", "release"}
    code, out, _ = onlay("--version")
    assert (code, out.strip()) == (0, __version__)
    code, out, _ = onlay()
    assert code == 0
    assert out.startswith("Usage: onlay")
    code, out, _ = onlay("log")
    assert out.strip() == "No run yet. Start with: onlay demo"
    code, out, _ = onlay("doctor")
    assert "[wandb]" in out  # not taken for a colour
    assert max(len(line) for line in out.splitlines()) <= 80
    code, out, _ = onlay("doctor", "--json")
    checks = one_object(out)
    assert checks["ok"] is (code == 0)


def test_ctrl_c_before_there_is_anything_to_save(onlay: Any, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_args: Any, **_options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("onlay.stages.training.look", interrupted)
    code, out, err = onlay("train", recipe, "--json")
    assert code == 130
    assert err.splitlines()[0] == "Interrupted."
    assert one_object(out)["error"] == "Interrupted."
