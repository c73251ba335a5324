"""`onlay advise`: from a recipe or answers to advice, without weights, network or torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from rich.console import Console

from onlay import stages
from onlay.cli import advising as verb
from onlay.console.advice import OPTIONS, advice_view
from onlay.errors import BaseModelError, DataError, RecipeError, SetupError
from onlay.planning import advice
from onlay.planning.advice import Answers
from onlay.release.servers import judge, read_features

GIB = 2**30


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "none")


def write_recipe(folder: Path, text: str = "", *, base: str = "llama-3.1-8b", rows: int = 60) -> Path:
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": "p" * 120, "completion": "a" * 40}) + "\n" for _ in range(rows)))
    path = folder / "recipe.yaml"
    path.write_text(f"model: {{base: {base}}}\ndata: {{train: {data}}}\n{text}", encoding="utf-8")
    return path


def verdicts(made: stages.Advising) -> dict[str, str]:
    return {one.server: one.verdict for one in made.servers}


def test_rows_and_lengths_are_the_recipes(tmp_path: Path) -> None:
    made = stages.advise(write_recipe(tmp_path), answers=Answers(), gpu="rtx4090")
    known = made.advice.known
    assert (known["rows"], known["tokens"], known["trained_tokens"]) == (60, 60 * 40, 60 * 10)
    assert any("60 rows in" in note and "25% of them trained" in note for note in made.notes)
    assert (made.base, made.gpu) == ("llama-3.1-8b", "RTX 4090")
    assert made.advice.approach.advised == "lora"


def test_what_is_declared_goes_before_what_is_found(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    made = stages.advise(recipe, answers=Answers(rows=5000, mean_tokens=100.0), gpu="none", model="qwen3-8b")
    assert (made.advice.known["rows"], made.advice.known["tokens"]) == (5000, 500_000)
    assert (made.base, made.gpu, made.advice.known["has_gpu"]) == ("qwen3-8b", None, False)


def test_only_the_first_rows_are_measured_and_all_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onlay.stages.advising.MEASURED_ROWS", 40)
    made = stages.advise(write_recipe(tmp_path), answers=Answers(), gpu="none")
    assert made.advice.known["rows"] == 60
    assert made.advice.known["tokens"] == 60 * 40
    assert any("from 40 rows" in note for note in made.notes)


def test_a_machine_without_gpu_says_so(tmp_path: Path) -> None:
    made = stages.advise(write_recipe(tmp_path), answers=Answers())
    assert made.gpu is None
    assert "this machine has no GPU; --gpu NAME advises for another" in made.notes


def test_the_format_tells_the_task(tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text("word " * 2_000_000, encoding="utf-8")
    recipe = write_recipe(tmp_path)
    made = stages.advise(recipe, answers=Answers(), overrides=[f"data.train={text}"], gpu="h200")
    assert made.advice.known["task"] == "domain"
    assert made.advice.known["trained_tokens"] == made.advice.known["tokens"]
    recipe = write_recipe(tmp_path, "adapter: {method: head}\n")
    rows = [json.dumps({"text": "good " * 5, "label": "yes"}) + "\n"] * 30
    (tmp_path / "rows.jsonl").write_text("".join(rows), encoding="utf-8")
    made = stages.advise(recipe, answers=Answers(), gpu="none")
    assert made.advice.known["task"] == "classify"
    assert made.advice.serving.advised == "as it is"
    assert made.servers == []


def test_servers_are_judged_from_the_recipe_alone(tmp_path: Path) -> None:
    plain = stages.advise(write_recipe(tmp_path), answers=Answers(), gpu="h200")
    assert set(verdicts(plain).values()) <= {"accepted", "accepted with flags"}
    dora = stages.advise(write_recipe(tmp_path, "adapter: {method: dora}\n"), answers=Answers(), gpu="h200")
    assert set(verdicts(dora).values()) == {"not accepted"}
    assert dora.advice.serving.advised == "merge"
    odd = stages.advise(write_recipe(tmp_path, "adapter: {rank: 24}\n"), answers=Answers(), gpu="h200")
    assert [name for name, found in verdicts(odd).items() if found == "not accepted"] == ["LoRAX", "TGI"]
    rslora = stages.advise(write_recipe(tmp_path, "adapter: {method: rslora}\n"), answers=Answers(), gpu="h200")
    assert [name for name, found in verdicts(rslora).items() if found == "not accepted"] == ["SGLang", "llama.cpp"]
    pissa = stages.advise(
        write_recipe(tmp_path, "adapter: {method: pissa, rank: 320}\n"), answers=Answers(), gpu="h200"
    )
    assert "rank 640 is above 512" in next(one for one in pissa.servers if one.server == "vLLM").reasons[0]
    some = "adapter: {targets: [model.layers.0.self_attn.q_proj, v_proj]}\n"
    partial = stages.advise(write_recipe(tmp_path, some), answers=Answers(), gpu="h200")
    assert "q_proj is adapted in some layers only" in " ".join(
        next(one for one in partial.servers if one.server == "TGI").reasons
    )


def test_experts_and_transposed_layers_are_seen(tmp_path: Path) -> None:
    moe = stages.advise(write_recipe(tmp_path, base="mixtral-8x7b"), answers=Answers(), gpu="h200")
    assert verdicts(moe)["vLLM"] == "not accepted"
    attention = stages.advise(
        write_recipe(tmp_path, base="mixtral-8x7b"),
        answers=Answers(),
        gpu="h200",
        overrides=["adapter.targets=attention"],
    )
    assert verdicts(attention)["vLLM"] == "accepted"
    gpt2 = stages.advise(write_recipe(tmp_path, base="gpt2"), answers=Answers(), gpu="h200")
    assert verdicts(gpt2)["llama.cpp"] == "not accepted"


@pytest.mark.parametrize(
    "adapter",
    [{"rank": 8}, {"method": "rslora"}, {"method": "dora"}, {"targets": ["q_proj", "v_proj"]}, {"bias": "all"},
     {"method": "pissa"}, {"targets": "attention", "rank": 24}],
)  # fmt: skip
def test_the_verdicts_are_those_of_the_trained_adapter(tmp_path: Path, adapter: dict[str, Any]) -> None:
    """An adapter that is really made on a tiny base: what is told before and after is the same."""
    from onlay.model.adapter import attach, save_adapter
    from onlay.model.facts import read_facts
    from onlay.recipe import ModelSection, parse_recipe
    from tests.builders import save_tiny_base, tiny_model

    base = save_tiny_base(tmp_path / "base")
    write_recipe(tmp_path)
    sections = {"model": {"base": str(base)}, "data": {"train": str(tmp_path / "rows.jsonl")}, "adapter": adapter}
    recipe = parse_recipe(sections)
    (tmp_path / "own.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    made = stages.advise(tmp_path / "own.yaml", answers=Answers(), gpu="h200")
    adapted, _ = attach(tiny_model("llama"), recipe.adapter, seed=0)  # type: ignore[arg-type]
    facts = read_facts(ModelSection(base=str(base)))
    save_adapter(adapted, tmp_path / "adapter", facts=facts, extra={"method": recipe.adapter.method, "storage": "bf16"})
    features = read_features(tmp_path / "adapter", facts=facts)
    after = judge(features, base=str(base), name="NAME")
    assert [(one.server, one.verdict, [r.replace(str(tmp_path / "adapter"), "ADAPTER") for r in one.reasons]) for one in after] == [
        (one.server, one.verdict, one.reasons) for one in made.servers
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- errors


def test_a_base_that_would_have_to_be_fetched_is_left_out(tmp_path: Path) -> None:
    made = stages.advise(write_recipe(tmp_path, base="someone/else-7b"), answers=Answers(), gpu="h200")
    assert made.base is None
    assert "parameters" not in made.advice.known
    assert any(note.startswith("someone/else-7b is neither a folder nor a well-known base") for note in made.notes)


def test_wrong_names_are_told(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    with pytest.raises(BaseModelError, match=r"Did you mean llama-3\.1-8b"):
        stages.advise(answers=Answers(), model="llama-3.1-8bb")
    with pytest.raises(SetupError, match="Did you mean RTX 4090"):
        stages.advise(recipe, answers=Answers(), gpu="rtx4900")
    with pytest.raises(RecipeError, match="--set changes a recipe, and none is given"):
        stages.advise(answers=Answers(), overrides=["adapter.rank=8"])
    with pytest.raises(RecipeError, match=r"model\.weights = random trains a model from nothing"):
        stages.advise(recipe, answers=Answers(), overrides=["model.weights=random", "adapter.method=full"])
    with pytest.raises(RecipeError, match="q_prj is not a module"):
        stages.advise(recipe, answers=Answers(), overrides=["adapter.targets=[q_prj]"])
    (tmp_path / "rows.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match="holds no rows"):
        stages.advise(recipe, answers=Answers())
    (tmp_path / "rows.jsonl").unlink()
    made = stages.advise(recipe, answers=Answers())
    assert any("rows and lengths are not known (--rows, --mean-tokens)" in note for note in made.notes)


def test_steps_that_are_given_are_told(tmp_path: Path) -> None:
    made = stages.advise(write_recipe(tmp_path), answers=Answers(), overrides=["training.max_steps=9"], gpu="h200")
    assert "training.max_steps = 9 sets the length of the run; epochs are not read" in made.notes


# ---------------------------------------------------------------------------------------------------------- the verb


def call(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "onlay.cli", "advise", *arguments]
    done = subprocess.run(command, env=os.environ | {"COLUMNS": "140"}, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr[-2000:]
    return done


def test_the_verb_prints_a_table(tmp_path: Path) -> None:
    told = call(str(write_recipe(tmp_path, "adapter: {method: dora, rank: 64}\n")), "--gpu", "rtx4090").stdout
    assert told.startswith("lora: a manner, a form or a skill")
    assert "setting" in told and "recipe" in told and "advised" in told and "source" in told
    row = next(line for line in told.splitlines() if line.startswith("rank "))
    assert row.split()[1:4] == ["64", "≠", "16"]
    assert "vLLM" in told and "✗ not accepted" in told
    assert "Not said, and it would change the advice: --task, --facts-change, --prompted, --latency, --serves" in told


def test_the_verb_without_a_recipe_prints_one_object() -> None:
    done = call(
        "--task",
        "facts",
        "--rows",
        "5000",
        "--mean-tokens",
        "300",
        "--model",
        "llama-3.1-8b",
        "--gpu",
        "h100",
        "--json",
    )
    assert len(done.stdout.splitlines()) == 1
    made = json.loads(done.stdout)
    assert made["approach"]["advised"] == "rag"
    assert {one["setting"]: one["advised"] for one in made["settings"]}["training.learning_rate"] == 2.9e-4
    assert all(one["reason"] and one["source"] and one["rule"] for one in made["settings"])
    assert {one["server"] for one in made["servers"]} == {"vLLM", "SGLang", "LoRAX", "TGI", "llama.cpp"}
    assert (made["base"], made["gpu"], made["recipe"]) == ("llama-3.1-8b", "H100 SXM", None)


def test_nothing_to_go_by_is_an_error() -> None:
    done = call("--gpu", "h100", code=2)
    assert done.stderr.splitlines() == [
        "There is nothing to advise on.",
        "Give a RECIPE, or --task, --rows and --model.",
    ]


def test_no_torch_is_loaded(tmp_path: Path) -> None:
    code = (
        "import sys; from onlay import stages; from onlay.planning.advice import Answers\n"
        f"stages.advise({str(write_recipe(tmp_path))!r}, answers=Answers(), gpu='h200')\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_the_words_of_the_options_are_those_of_the_rules() -> None:
    assert get_args(verb.Task) == get_args(advice.Task)
    hints = verb.advise.__annotations__
    for name, kind in (("facts_change", advice.FactsChange), ("prompted", advice.Prompted), ("latency", advice.Latency),
                       ("serves", advice.Tasks)):  # fmt: skip
        assert "Literal[" + ", ".join(f'"{word}"' for word in get_args(kind)) + "]" in hints[name].replace("'", '"')


def test_every_answer_that_can_be_missing_has_an_option() -> None:
    assert set(advice.advise(Answers(), base=None).unknown) == set(OPTIONS)


@pytest.mark.parametrize("width", [60, 80, 140])
def test_the_page_fits_its_width(tmp_path: Path, width: int) -> None:
    made = stages.advise(write_recipe(tmp_path, rows=20), answers=Answers(), gpu="t4")
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    advice_view(console, made)
    told = console.export_text()
    assert "few-shot: 20 rows can be shown in the context" in " ".join(told.split())
    assert "If you train all the same:" in told
    assert max(len(line) for line in told.splitlines() if not line.startswith("Not said")) <= width


def test_no_rows_are_refused() -> None:
    done = call("--rows", "0", "--task", "style", code=2)
    assert len(done.stderr.splitlines()) == 2 and "--rows" in done.stderr
    with pytest.raises(RecipeError, match="--rows 0 are no rows"):
        stages.advise(answers=Answers(rows=0, task="style"), gpu="none")
