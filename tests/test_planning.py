"""`onlay plan`: every form of the question, without weights, network or torch; and the plan that training follows."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from onlay import stages
from onlay.console.plan import MOST_RUNGS, compared_view, plan_drawing, plan_view, shown_rungs, table_view
from onlay.errors import BaseModelError, OutputError, RecipeError, SetupError
from onlay.planning.devices import find_gpu, read_gpus
from onlay.planning.lengths import equal_rows
from onlay.planning.memory import room_bytes
from onlay.planning.planner import Job, Wishes
from onlay.planning.table import hardware_table
from onlay.recipe import parse_recipe, read_recipe
from onlay.records import Plan
from onlay.stages import lengths as remembered
from onlay.stages import planning, plans
from onlay.stages.lengths import KnownLengths, recall_lengths, remember_lengths
from onlay.stages.plans import wishes_of

PROJECT = Path(__file__).parent.parent
DECLARED = stages.Declared(rows=5000, mean_tokens=300.0)


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No GPU of this machine, and a home of its own."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "none")
    monkeypatch.setenv("ONLAY_HOME", str(tmp_path / "home"))


def write_recipe(folder: Path, text: str = "", *, base: str = "llama-3.1-8b", rows: int = 60, answer: int = 40) -> Path:
    data = folder / "rows.jsonl"
    row = json.dumps({"prompt": "p" * (160 - answer), "completion": "a" * answer})
    data.write_text(f"{row}\n" * rows)
    path = folder / "recipe.yaml"
    path.write_text(f"model: {{base: {base}}}\ndata: {{train: {data}}}\n{text}", encoding="utf-8")
    return path


def plan(**what: Any) -> Plan:
    return stages.plan(**({"model": "llama-3.1-8b", "declared": DECLARED, "gpu": "h100"} | what))


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "onlay.cli", *words], capture_output=True, text=True)


# ------------------------------------------------------------------------------------------------------------- forms


def test_json_holds_what_programs_ask_for_and_no_torch_is_loaded() -> None:
    code = (
        "import sys, runpy\n"
        "sys.argv = ['onlay', 'plan', '--model', 'llama-3.1-8b', '--rows', '5000', '--mean-tokens', '300', '--epochs', '3',\n"
        "            '--gpu', 'h100', '--json']\n"
        "from onlay.cli import main\n"
        "main()\n"
        "assert not {'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules), 'heavy'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["parameters"] == {"trainable": 41_943_040, "total": 8_072_204_288}
    parts = ("weights", "adapter", "gradient", "optimizer", "activation", "loss", "working")
    assert sum(found["memory"][f"{name}_bytes"] for name in parts) == found["memory"]["peak_bytes"]
    assert found["time"]["seconds"] > 0 and found["cost"]["usd"] > 0 and found["decisions"]
    assert found["time"]["steps"] == 891  # 3 epochs of 4,750 rows: a twentieth is held out.


def test_a_recipes_rows_are_read(tmp_path: Path) -> None:
    made = stages.plan(write_recipe(tmp_path), gpu="rtx4090")
    assert (made.rows, made.mean_tokens, made.gpu) == (57, 40.0, "RTX 4090")
    assert "60 rows of 40 tokens" in made.data
    declared = stages.plan(write_recipe(tmp_path), gpu="rtx4090", declared=stages.Declared(rows=1000))
    assert (declared.rows, declared.mean_tokens) == (950, 40.0)
    assert stages.plan(write_recipe(tmp_path), gpu="rtx4090", declared=DECLARED).rows == 4750
    whole = stages.plan(write_recipe(tmp_path, "evaluation: {split: null}"), gpu="rtx4090")
    assert whole.rows == 60 and whole.time.evaluation_seconds == 0


def test_steps_that_are_given_are_the_length(tmp_path: Path) -> None:
    made = stages.plan(write_recipe(tmp_path, "training: {max_steps: 7}"), gpu="h200", epochs=9.0)
    assert made.time.steps == 7 and any("epochs are not read" in note for note in made.notes)


def test_few_trained_tokens_need_little_loss_memory(tmp_path: Path) -> None:
    small, large = (stages.plan(write_recipe(tmp_path, answer=n), gpu="h200").time.step_seconds for n in (8, 152))
    assert small < large


def test_long_rows_are_told(tmp_path: Path) -> None:
    made = stages.plan(write_recipe(tmp_path), gpu="rtx4090", overrides=["data.max_tokens=30", "data.overlong=cut"])
    assert made.mean_tokens == 30 and any("60 of 60 rows" in note and "cut" in note for note in made.notes)


RECIPES = [PROJECT / "recipes" / "gsm8k.yaml", PROJECT / "onlay" / "examples" / "demo.yaml"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes_of_the_project_have_a_plan(path: Path) -> None:
    """Those of the bundled base's own training begin from folders that are made on the way."""
    made = stages.plan(path, gpu="h200", declared=DECLARED)
    assert made.base == "pocket" and made.refused is None and made.settings.fast_path


def test_there_must_be_something_to_plan(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="nothing to plan"):
        stages.plan(gpu="h100")
    with pytest.raises(RecipeError, match="nothing to plan"):
        stages.plan(model="llama-3.1-8b", gpu="h100")
    with pytest.raises(SetupError, match="no GPU to plan for"):
        plan(gpu=None)
    with pytest.raises(BaseModelError, match="neither a folder nor a well-known base"):
        plan(model="someone/unheard-of")
    with pytest.raises(RecipeError, match="is no file here"):
        stages.plan(write_recipe(tmp_path), overrides=["data.train=absent.jsonl"], gpu="h100")
    with pytest.raises(SetupError, match=r"needs a GPU of compute capability 8\.9"):
        plan(gpu="a100", overrides=["model.storage=fp8"])


@pytest.mark.parametrize(
    ("key", "values", "grows"),
    [
        ("rank", ["8", "16", "64"], lambda one: one.parameters.trainable),
        ("targets", ["attention", "all-linear"], lambda one: one.parameters.trainable),
        ("storage", ["nf4", "bf16"], lambda one: one.memory.weights_bytes),
        ("gpu", ["rtx4090", "h100", "h200"], lambda one: one.memory.device_bytes),
        ("model", ["llama-3.2-1b", "qwen2.5-7b"], lambda one: one.parameters.total),
        ("training.epochs", ["1", "2"], lambda one: one.time.steps),
    ],
)
def test_comparisons(key: str, values: list[str], grows: Any) -> None:
    rows = stages.compare_plans(key, values, model="llama-3.1-8b", declared=DECLARED, gpu="h200")
    assert [row.value for row in rows] == values
    numbers = [grows(row.plan) for row in rows]
    assert numbers == sorted(numbers) and len(set(numbers)) == len(numbers)


def test_a_value_that_is_none_is_told_in_its_row() -> None:
    rows = stages.compare_plans("rank", ["8", "5000"], model="llama-3.1-8b", declared=DECLARED, gpu="h200")
    assert rows[0].plan is not None and rows[1].plan is None and "adapter.rank = 5000" in str(rows[1].problem)
    with pytest.raises(RecipeError, match="no recipe field"):
        stages.compare_plans("rnak", ["8"], model="llama-3.1-8b", declared=DECLARED, gpu="h200")
    with pytest.raises(RecipeError, match="may be any of"):
        stages.compare_plans("max_rows", ["8"], model="llama-3.1-8b", declared=DECLARED, gpu="h200")
    with pytest.raises(RecipeError, match=r"adapter\.rank = 0"):
        stages.compare_plans("rank", ["0", "5000"], model="llama-3.1-8b", declared=DECLARED, gpu="h200")


def test_every_gpu_has_a_plan_or_a_reason() -> None:
    rows = {row.value: row for row in stages.plan_all_gpus(model="llama-3.1-70b", declared=DECLARED)}
    assert len(rows) > 20 and rows["H200"].plan is not None
    assert rows["RTX 4090"].plan is None and "does not fit" in str(rows["RTX 4090"].problem)


# ----------------------------------------------------------------------------------------------------------- wishes


def test_impossible_wishes_are_answered_with_what_would_fit() -> None:
    done = run("plan", "--model", "llama-3.1-70b", "--rows", "100", "--mean-tokens", "300", "--gpu", "rtx4090", "--set", "model.storage=bf16", "--json")  # fmt: skip
    assert done.returncode == 2
    problem, remedy = done.stderr.splitlines()
    assert "does not fit RTX 4090" in problem and "of its 24.0 GiB" in problem
    assert "without that llama-3.1-70b needs " in remedy and "the largest well-known base that fits is" in remedy
    assert json.loads(done.stdout) == {"error": problem, "remedy": remedy}


def test_a_wish_that_does_not_fit_is_refused_with_the_nearest() -> None:
    made = plan(gpu="rtx3070", overrides=["model.storage=bf16", "adapter.rank=8"])
    assert made.refused is not None and "model.storage = bf16 does not fit RTX 3070" in made.refused
    assert "The nearest that fits: nf4" in made.refused
    assert made.settings.storage == "nf4" and made.memory.needed_bytes < made.memory.device_bytes


def test_only_what_a_recipe_says_is_a_wish(tmp_path: Path) -> None:
    values: dict[str, Any] = {"model": {"base": "x"}, "data": {"train": "y"}}
    open_ = wishes_of(parse_recipe(values))
    assert {getattr(open_, name) for name in ("storage", "fp8_products", "micro_tokens", "recompute", "optimizer", "offload")} == {None}  # fmt: skip
    said = wishes_of(
        parse_recipe(
            {
                "model": {"base": "x", "storage": "nf4", "compute": "fp8"}, "data": {"train": "y"},
                "training": {"optimizer": "adamw", "recompute": 3, "micro_batch_tokens": 512, "offload_activations": False},
            }
        )
    )  # fmt: skip
    assert (said.storage, said.fp8_products, said.micro_tokens, said.recompute, said.optimizer, said.offload) == ("nf4", True, 512, 3, "adamw", False)  # fmt: skip


def test_servers_that_will_refuse_are_named() -> None:
    assert any("vLLM will not take the adapter" in note for note in plan(overrides=["adapter.method=dora"]).notes)
    assert not any("will not take" in note for note in plan().notes)


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "lora+", "pissa", "head", "full"])
def test_every_method_has_a_plan(method: str) -> None:
    made = plan(model="llama-3.2-1b", gpu="h200", overrides=[f"adapter.method={method}"])
    assert made.memory.peak_bytes > 2e9 and made.time.seconds > 0


# ---------------------------------------------------------------------------------------------------------- lengths


def test_lengths_are_remembered_until_anything_changes(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    recipe = read_recipe(path)
    assert recall_lengths(recipe) is None
    known = KnownLengths(lengths=equal_rows(57, 123), trained_share=0.25, held_out_rows=3)
    remember_lengths(recipe, known)
    found = recall_lengths(recipe)
    assert (
        found is not None
        and found.lengths.counts == {123: 57}
        and (found.trained_share, found.held_out_rows) == (0.25, 3)
    )
    made = stages.plan(path, gpu="h100")
    assert (made.rows, made.mean_tokens) == (57, 123.0) and made.data.endswith("before")
    assert stages.plan(path, gpu="h100", overrides=["data.max_tokens=50"]).mean_tokens == 40.0
    with (tmp_path / "rows.jsonl").open("a") as out:
        out.write("\n")
    assert recall_lengths(recipe) is None


def test_lengths_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    recipe = read_recipe(write_recipe(tmp_path))
    place = remembered._place(recipe)
    place.parent.mkdir(parents=True)
    place.write_text("{")
    with pytest.raises(OutputError, match="cannot be read"):
        recall_lengths(recipe)


# ------------------------------------------------------------------------------------------------------------ shown


def shown(view: Any, *values: Any) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    view(console, *values)
    return console.export_text()


def test_what_a_person_sees() -> None:
    text = shown(plan_view, plan(gpu="rtx4090"))
    assert "41,943,040 of 8,072,204,288 parameters train" in text and "the fastest that fits" in text
    assert "unverified" in text and text.count("✓") == 1
    refused = plan(gpu="rtx3070", overrides=["model.storage=bf16"])
    assert "does not fit RTX 3070" in shown(plan_view, refused)
    compared = stages.compare_plans("data.template", ["'[bold]'"], model="llama-3.1-8b", declared=DECLARED, gpu="h200")
    assert "[bold]" in shown(compared_view, "data.template", compared)  # No markup.
    rows = stages.plan_all_gpus(model="llama-3.1-8b", declared=DECLARED)
    text = shown(compared_view, "gpu", rows)
    assert "cheapest: " in text and "fastest: B200" in text and "~ unverified" in text
    assert "full tuning" in shown(table_view, hardware_table())


def test_a_long_ladder_is_cut_and_its_ends_stay() -> None:
    rungs = plan(gpu="rtx4090").rungs
    few = shown_rungs(rungs)
    assert len(rungs) > MOST_RUNGS == len(few) and few[0].verdict == "chosen"
    assert {"chosen", "slower", "does not fit"} <= {rung.verdict for rung in few}


def test_the_drawing_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "plan.svg"
    words = ("plan", "--model", "llama-3.1-8b", "--rows", "50", "--mean-tokens", "300", "--gpu", "rtx4090")
    done = run(*words, "--plot", str(path))
    assert done.returncode == 0 and done.stdout.endswith(f"wrote {path}\n")
    assert json.loads(run(*words, "--plot", str(path), "--json").stdout)["plot"] == str(path)
    tree = ElementTree.fromstring(path.read_text(encoding="utf-8"))
    titles = [node.text or "" for node in tree.iter("{http://www.w3.org/2000/svg}title")]
    assert any(title.startswith("base: ") for title in titles) and any("chosen" in title for title in titles)
    made = plan(gpu="rtx4090")
    assert plan_drawing(replace_base(made, "a<b>&")).count("a&lt;b&gt;&amp;") >= 1
    done = run(*words, "--plot", str(tmp_path / "plan.png"))
    assert done.returncode == 2 and "not an .svg file" in done.stderr


def replace_base(made: Plan, name: str) -> Plan:
    return made.model_copy(update={"base": name})


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--compare", "rank"), "is not KEY=A,B,C"),
        (("--compare", "rank=1,,2"), "is not KEY=A,B,C"),
        (("--compare", "rank=1,2", "--compare", "epochs=1,2"), "are two tables"),
        (("--table", "--all-gpus"), "--all-gpus and --table are different questions"),
        (("--table", "--rows", "5"), "--table does not read a job"),
        (("--all-gpus", "--gpu", "h100"), "--all-gpus does not read --gpu"),
        (("--compare", "rank=1,2", "--plot", "x.svg"), "--compare does not read --plot"),
    ],
)
def test_what_cannot_be_asked(words: tuple[str, ...], problem: str) -> None:
    done = run("plan", *words)
    assert done.returncode == 2 and problem in done.stderr and len(done.stderr.splitlines()) == 2


def test_tables_as_json() -> None:
    table = json.loads(run("plan", "--table", "--json").stdout)
    assert {"base", "method", "needed_bytes", "gpu"} <= set(table["rows"][0]) and table["assumptions"]
    words = ("--model", "llama-3.1-8b", "--rows", "50", "--mean-tokens", "300", "--gpu", "h100", "--json")
    compared = json.loads(run("plan", "--compare", "rank=8,9999", *words).stdout)
    assert [row["value"] for row in compared["plans"]] == ["8", "9999"]
    assert (
        compared["plans"][0]["plan"]["parameters"]["trainable"] == 20_971_520 and compared["plans"][1]["plan"] is None
    )


@pytest.mark.parametrize("verb", [("plan", "--gpu", "h100"), ("advise",)], ids=["plan", "advise"])
def test_a_length_that_is_no_number_is_refused(verb: tuple[str, ...]) -> None:
    done = run(*verb, "--model", "llama-3.1-8b", "--rows", "50", "--mean-tokens", "inf")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "--mean-tokens inf is not the length of rows: a finite number from 1 on is.",
        "Example: --mean-tokens 300",
    ]
    with pytest.raises(RecipeError, match="--mean-tokens nan is not"):
        plan(declared=stages.Declared(rows=5, mean_tokens=float("nan")))


def test_a_refusal_tells_the_room_and_not_the_whole_memory() -> None:
    made = plan(gpu="rtx3070", overrides=["model.storage=bf16"])
    room = room_bytes(made.memory.device_bytes) / 2**30
    assert f"and {room:.1f} GiB of its 8.0 GiB may be taken up" in str(made.refused)


def test_what_fits_nowhere_is_told_as_it_was_asked_and_without() -> None:
    bf16 = ["model.storage=bf16"]
    with pytest.raises(SetupError) as told:
        plan(model="llama-3.1-70b", gpu="rtx4090", overrides=bf16)
    assert "llama-3.1-70b with method lora and model.storage = bf16 does not fit RTX 4090" in told.value.problem
    need = float(told.value.problem.split("at least ")[1].split(" GiB")[0])
    assert need > 130  # Two bytes a weight.
    smallest = told.value.remedy.split("As asked it fits ")[1].split(";")[0]
    assert plan(model="llama-3.1-70b", gpu=smallest, overrides=bf16).refused is None
    without = told.value.remedy.split("without that llama-3.1-70b needs ")[1]
    assert float(without.split(" GiB")[0]) < 60 and " and fits " in without
    with pytest.raises(SetupError) as told:
        plan(model="llama-3.1-405b", gpu="rtx4090", overrides=bf16)
    assert told.value.remedy.startswith("No GPU of the table takes it as asked; ")


def test_the_largest_base_is_tried_on_the_path_of_its_own_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """Falcon is on the ordinary path; what is suggested in its place need not be."""
    tried: dict[str, Job] = {}

    def never(job: Job, _: Wishes) -> bool:
        tried[job.load.shape.name] = job
        return False

    monkeypatch.setattr("onlay.planning.planner.fits", never)
    known = planning._wanted(None, [], model="falcon-7b", declared=DECLARED, epochs=None)
    group = find_gpu("rtx3070", gpus=read_gpus())
    assert plans._job(known, group)[0].ordinary is not None and plans._largest_base(known, group) is None
    assert tried["qwen2.5-3b"].ordinary is None and "phi" in str(tried["phi-2"].ordinary)


def test_a_refused_plan_is_told_and_exits_with_2() -> None:
    words = ("plan", "--model", "llama-3.1-8b", "--rows", "50", "--mean-tokens", "300", "--gpu", "rtx3070", "--set", "model.storage=bf16", "--json")  # fmt: skip
    done = run(*words)
    assert done.returncode == 2 and "model.storage = bf16 does not fit" in json.loads(done.stdout)["refused"]


def test_all_gpus_where_none_takes_it_is_an_error() -> None:
    with pytest.raises(SetupError, match="No GPU of the table takes this run"):
        stages.plan_all_gpus(model="llama-3.1-405b", declared=DECLARED, overrides=["model.storage=bf16"])


def test_a_refused_value_has_no_numbers_of_another_plan() -> None:
    rows = stages.compare_plans("storage", ["bf16", "nf4"], model="llama-3.1-8b", declared=DECLARED, gpu="rtx3070")
    assert rows[0].plan is None and "model.storage = bf16 does not fit" in str(rows[0].problem) and rows[0].remedy
    assert rows[1].plan is not None
    text = shown(compared_view, "storage", rows)
    assert "fastest: nf4" in text and text.count("41,943,040") == 1
    with pytest.raises(RecipeError, match=r"model\.storage = bf16 does not fit"):
        stages.compare_plans("storage", ["bf16"], model="llama-3.1-8b", declared=DECLARED, gpu="rtx3070")


def test_a_declared_mean_above_the_cut_is_told() -> None:
    made = plan(declared=stages.Declared(rows=5000, mean_tokens=9000.0))
    assert made.mean_tokens < 4096 and "longer ones count as 4,096 tokens" in made.data
    assert any("data.overlong = drop drops them" in note for note in made.notes)
    assert not any("data.overlong" in note for note in plan().notes)
