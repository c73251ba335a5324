"""Bad input through the real command line: two lines, exit code 2, nothing written over, and torch never loaded.

All cases run in one process of their own, twice each (with and without --json), because it must not have torch.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.builders import save_tiny_base, write_rows

DRIVER = """
import contextlib, io, json, os, sys
from pathlib import Path
from onlay.cli import main

def files():
    found = {str(p): p.read_bytes() for p in sorted(Path(".").rglob("*")) if p.is_file()}
    return {name: hash(content) for name, content in found.items()}

class Terminalless(io.StringIO):
    def isatty(self): return False

results = {}
for name, arguments in json.load(open(sys.argv[1])).items():
    for as_json in (False, True):
        out, err = Terminalless(), Terminalless()
        sys.argv, sys.stdin, before = ["onlay", *arguments, *(["--json"] if as_json else [])], Terminalless(), files()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main(); code = 0
            except SystemExit as exit:
                code = exit.code
        torch = [m for m in ("torch", "transformers") if m in sys.modules]
        results[f"{name} {'json' if as_json else 'text'}"] = dict(
            code=code, out=out.getvalue(), err=err.getvalue(), heavy=torch, changed=before != files())
json.dump(results, sys.stdout)
"""


@dataclass(frozen=True)
class Case:
    arguments: tuple[str, ...]
    problem: str
    """What the first line begins with."""
    remedy: str = ""
    """What the second line holds."""


def recipe(*overrides: str, verb: str = "train", name: str = "good.yaml") -> tuple[str, ...]:
    return (verb, name, *(part for override in overrides for part in ("--set", override)))


CASES = {
    # the recipe
    "missing recipe": Case(("train", "goood.yaml"), "There is no recipe at goood.yaml.", "Did you mean good.yaml?"),
    "not yaml": Case(("train", "broken.yaml"), "broken.yaml, line 3: ", "Indent with spaces"),
    "key twice": Case(("train", "twice.yaml"), "twice.yaml, line 3: base is given twice.", "Delete one"),
    "unknown key": Case(recipe("adapter.rnak=4"), "adapter.rnak is not a recipe field.", "Did you mean adapter.rank?"),
    "wrong type": Case(recipe("adapter.rank=many"), 'adapter.rank = "many" is not a whole number.', "Correct it"),
    "out of range": Case(recipe("adapter.rank=0"), "adapter.rank = 0 is outside 1..1024.", "Use 16, or delete the line"),
    "unknown preset": Case(recipe("adapter.targets=qkv"), "adapter.targets = qkv is neither a preset nor", "such as [q_proj"),
    "contradiction": Case(recipe("model.weights=random"), "model.weights = random needs adapter.method = full", "set adapter.method"),
    "malformed set": Case(recipe("rank4"), "--set rank4 is not section.field=value.", "Example: --set"),
    "no recipe": Case(("train",), "train needs a recipe or --resume RUN, one of the two.", "onlay train"),
    "recipe and resume": Case(("train", "good.yaml", "--resume", "r"), "train needs a recipe or --resume RUN", "onlay train"),
    "set on resume": Case(("train", "--resume", "r", "--set", "training.seed=1"), "--set does not go with --resume", "new run"),
    "tracker not installed": Case(recipe("training.trackers=[clearml]"), "training.trackers: clearml is not installed.", "pip install clearml"),
    "output exists": Case(recipe("training.output=full"), "training.output = full exists already.", "Choose another"),
    "output is a file": Case(recipe("training.output=good.yaml"), "training.output = good.yaml exists already.", "Choose another"),
    # the data
    "missing data": Case(recipe("data.train=row.jsonl"), "There is no data file at row.jsonl.", "Did you mean rows.jsonl or "),
    "not json": Case(recipe("data.train=broken.jsonl"), "broken.jsonl:2 is not JSON: ", "one JSON object a line"),
    "broken list": Case(recipe("data.train=broken.json"), "broken.json:3 is not JSON: ", "list of objects"),
    "row without a field": Case(recipe("data.train=lacks.jsonl"), "lacks.jsonl:2, field completion: missing", "prompt"),
    "empty answer": Case(recipe("data.train=empty.jsonl"), "empty.jsonl:2, field completion: it is empty.", "Fill it, or delete the row."),
    "answer of the wrong type": Case(recipe("data.train=number.jsonl"), "number.jsonl:2, field completion: it is a number, not text.", "text"),
    "no rows": Case(recipe("data.train=none.jsonl"), "none.jsonl holds no rows.", "at least one example"),
    "unknown columns": Case(recipe("data.train=odd.jsonl"), "odd.jsonl:1: no known format has these columns: frage, antwort.", "data.prompt_field"),
    "unknown suffix": Case(recipe("data.train=notes.docx"), "notes.docx has the suffix .docx", "Rename"),
    "no evaluation rows": Case(recipe("data.train=one.jsonl"), "evaluation.split = 0.05: one.jsonl has 1 row", "evaluation.split: null"),
    "missing evaluation file": Case(recipe("evaluation.file=held.jsonl"), "There is no data file at held.jsonl.", ""),
    "shared prompts": Case(recipe("evaluation.file=one.jsonl"), "1 of 1 evaluation rows have a prompt that is also in rows.jsonl", "Delete them"),
    "unknown template": Case(recipe("data.template=chatmll"), "data.template = chatmll is not a template.", "chatml, gemma"),
    "template not there": Case(recipe("data.template=my.jinja"), "data.template = my.jinja is not a file.", "Use auto"),
    "more tokens than the context": Case(recipe("data.max_tokens=9999"), "data.max_tokens = 9999 is more than the base's context of 512", "at most 512"),
    # the base
    "base offline": Case(recipe("model.base=nobody/nothing"), "nobody/nothing is not (wholly) in the cache", "HF_HUB_OFFLINE"),
    "no such folder": Case(recipe("model.base=./nothing"), "model.base = ./nothing: there is no such folder", "pocket"),
    "no safetensors": Case(recipe("model.base=pickled"), "pickled has no safetensors", ".safetensors files"),
    "no config": Case(recipe("model.base=data"), "data has no config.json.", "transformers format"),
    "unknown module": Case(recipe("adapter.targets=[q_porj]"), "adapter.targets: q_porj is not a module of base. Did you mean q_proj?", "Its own: "),
    # the same errors from other verbs
    "prepare unknown key": Case(recipe("data.trian=x", verb="prepare"), "data.trian is not a recipe field.", "Did you mean data.train?"),
    "prepare not json": Case(recipe("data.train=broken.jsonl", verb="prepare"), "broken.jsonl:2 is not JSON", ""),
    "init missing data": Case(("init", "row.jsonl"), "There is no data file at row.jsonl.", "rows.jsonl"),
    "init on an existing recipe": Case(("init", "rows.jsonl", "-o", "good.yaml"), "good.yaml exists already.", "--output"),
    "no run": Case(("generate", "nothing", "-p", "x"), "nothing/run.json does not exist.", "onlay log"),
    "no run to chat with": Case(("chat", "nothing"), "nothing/run.json does not exist.", "onlay log"),
    "nothing to evaluate": Case(("evaluate", "nothing"), "nothing is no run folder, so it brings no held-out rows.", "onlay evaluate nothing --data"),
    "evaluate on missing rows": Case(("evaluate", "base", "--data", "row.jsonl"), "There is no data file at row.jsonl.", "rows.jsonl"),
    "evaluate broken rows": Case(("evaluate", "base", "--data", "broken.jsonl"), "broken.jsonl:2 is not JSON: ", "one JSON object a line"),
    "evaluate a missing version": Case(("evaluate", "boats@live", "--data", "rows.jsonl"), "boats is not registered.", "onlay"),
    "evaluate what was trained": Case(("evaluate", "base", "--data", "rows.jsonl", "--set", "training.seed=1"), "--set training.seed=1 would change what was trained.", "evaluation and release"),
    "evaluate an unknown gate": Case(("evaluate", "base", "--data", "rows.jsonl", "--set", "evaluation.gates={bleau: 1}"), "evaluation.gates: bleau is neither a score nor one of", "Did you mean bleu?"),
    "evaluate into a folder in use": Case(("evaluate", "base", "--data", "rows.jsonl", "-o", "full"), "full exists already and holds no report.", "--output"),
    "evaluate with an unknown adapter": Case(("evaluate", "base", "--data", "rows.jsonl", "--with", "other"), "base is a model; --with takes adapters beside an adapter.", "first"),
    "nothing to compare": Case(("compare", "nothing"), "nothing has no answers to compare yet.", "onlay evaluate nothing"),
    "no run to resume": Case(("train", "--resume", "nothing"), "nothing/run.json does not exist.", "onlay log"),
    "edited run": Case(("show", "edited"), "edited/run.json is not a run record: ", "Was it edited?"),
    "no prompt": Case(("generate", "nothing"), "There is no prompt.", "--prompt"),
    "unknown digest": Case(("show", "deadbeef"), "No record's digest starts with deadbeef.", "onlay log"),
    "no digest": Case(("show", "xyz"), "xyz is neither a run folder nor the start of a digest.", "onlay log"),
    # the command line itself
    "unknown verb": Case(("trian", "good.yaml"), "No such command 'trian'.", "onlay --help"),
    "unknown option": Case(("train", "good.yaml", "--fast"), "No such option: --fast", "onlay train --help"),
    "missing argument": Case(("init",), "Missing argument", "onlay init --help"),
    "option out of range": Case(("generate", "r", "--top-p", "2"), "Invalid value for '--top-p'", "onlay generate --help"),
    # last, because it needs the most: a data set of the hub
    "synthesize from missing rows": Case(("synthesize", "row.jsonl", "--model", "base"), "There is no data file at row.jsonl.", "rows.jsonl"),
    "synthesize from broken rows": Case(("synthesize", "broken.jsonl", "--model", "base"), "broken.jsonl:2 is not JSON: ", "one JSON object a line"),
    "synthesize without a base": Case(("synthesize", "rows.jsonl", "--model", "./nothing"), "model.base = ./nothing: there is no such folder", "pocket"),
    "synthesize at no address": Case(("synthesize", "rows.jsonl", "--model", "m", "--endpoint", "host"), "The model's base_url is no http or https address.", "https://host/v1"),
    "synthesize into another kind of file": Case(("synthesize", "rows.jsonl", "--model", "base", "-o", "rows.csv"), "--output rows.csv does not end in .jsonl.", "JSON lines"),
    "synthesize over a file": Case(("synthesize", "rows.jsonl", "--model", "base", "-o", "one.jsonl"), "one.jsonl exists already.", "--output"),
    "review without a terminal": Case(("review", "rows.jsonl"), "Nobody can be asked: there is no terminal.", "--decisions"),
    "review missing rows": Case(("review", "row.jsonl"), "There is no data file at row.jsonl.", "rows.jsonl"),
    "apply no decisions": Case(("review", "rows.jsonl", "--apply", "clean.jsonl"), "There is no decision about rows.jsonl in rows.decisions.jsonl.", "onlay review rows.jsonl"),
    "import what are no decisions": Case(("review", "rows.jsonl", "--decisions", "one.jsonl"), "one.jsonl:1 is not a decision: ", '"decision": "reject"'),
    "findings of no audit": Case(("review", "rows.jsonl", "--only", "refusals"), "--only refusals names findings, and there is no audit.", "onlay audit rows.jsonl"),
    "audit of missing rows": Case(("audit", "row.jsonl"), "There is no data file at row.jsonl.", "rows.jsonl"),
    "hub data set offline": Case(recipe("data.train=nobody/nothing"), "The data set nobody/nothing cannot be fetched", "local file"),
}  # fmt: skip


def make_inputs(folder: Path) -> None:
    save_tiny_base(folder / "base")
    shutil.copytree(folder / "base", folder / "pickled")
    (folder / "pickled" / "model.safetensors").rename(folder / "pickled" / "pytorch_model.bin")
    (folder / "data").mkdir()
    write_rows(folder / "rows.jsonl", 40)
    first = (folder / "rows.jsonl").read_text().splitlines()[0]
    good = json.dumps({"prompt": "a", "completion": "b"}) + "\n"
    files = {
        "good.yaml": "model: {base: base}\ndata: {train: rows.jsonl}\n",
        "broken.yaml": "model: {base: base}\ndata: [\n",
        "twice.yaml": "model:\n  base: a\n  base: b\n",
        "one.jsonl": first + "\n",
        "broken.jsonl": good + '{"prompt": "a", \n',
        "broken.json": '[{"prompt": "a", "completion": "b"},\n {"prompt": "c",\n  oops}]\n',
        "lacks.jsonl": good + '{"prompt": "c"}\n',
        "empty.jsonl": good + '{"prompt": "c", "completion": " "}\n',
        "number.jsonl": good + '{"prompt": "c", "completion": 5}\n',
        "odd.jsonl": '{"frage": "a", "antwort": "b"}\n',
        "none.jsonl": "\n",
        "notes.docx": "x",
        "full/notes.txt": "mine",
        "edited/run.json": '{"path": 5}',
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("bad")
    make_inputs(folder)
    aside = tmp_path_factory.mktemp("aside")
    (aside / "cases.json").write_text(json.dumps({name: asdict(case)["arguments"] for name, case in CASES.items()}))
    environment = os.environ | {"ONLAY_HOME": str(aside / "home"), "HF_HUB_OFFLINE": "1", "HF_HOME": str(aside / "hf")}
    command = [sys.executable, "-c", DRIVER, str(aside / "cases.json")]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", CASES)
def test_two_lines_and_exit_code_2(name: str, results: dict[str, dict[str, Any]]) -> None:
    case, found = CASES[name], results[f"{name} text"]
    assert found["code"] == 2
    assert found["out"] == ""
    lines = found["err"].splitlines()
    assert len(lines) == 2, found["err"]
    assert lines[0].startswith(case.problem)
    assert case.remedy in lines[1]
    assert lines[1].strip()


@pytest.mark.parametrize("name", CASES)
def test_json_has_the_same_two_lines(name: str, results: dict[str, dict[str, Any]]) -> None:
    text, found = results[f"{name} text"], results[f"{name} json"]
    assert found["code"] == 2
    error = json.loads(found["out"])
    assert set(error) == {"error", "remedy"}
    assert [error["error"], error["remedy"]] == text["err"].splitlines() == found["err"].splitlines()


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_written_and_nothing_heavy_loaded(name: str, results: dict[str, dict[str, Any]]) -> None:
    for form in ("text", "json"):
        assert not results[f"{name} {form}"]["changed"]
        assert results[f"{name} {form}"]["heavy"] == []


def test_a_long_text_is_not_wrapped(results: dict[str, dict[str, Any]]) -> None:
    assert max(len(line) for found in results.values() for line in found["err"].splitlines()) > 120
