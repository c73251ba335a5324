"""Every adapter method from recipe to answer: it learns, resumes to the bit, and comes back here and in plain PEFT."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from onlay import stages
from onlay.errors import BaseModelError
from onlay.model.adapter import load_adapter
from onlay.model.facts import read_facts
from onlay.model.load import load_base
from onlay.model.quantize import round_trip
from onlay.recipe import ModelSection, Recipe
from onlay.records import Run
from onlay.training.loop import StepReport
from tests.builders import proofs_of, recipe_for
from tests.training.conftest import NO_GPU
from tests.training.test_devices import launch

CASES: dict[str, tuple[dict[str, Any], str]] = {
    "lora": ({"method": "lora"}, "bf16"),
    "rslora": ({"method": "rslora"}, "bf16"),
    "dora": ({"method": "dora"}, "bf16"),
    "lora+": ({"method": "lora+"}, "bf16"),
    "pissa": ({"method": "pissa"}, "bf16"),
    "lora-bf16": ({"method": "lora", "precision": "bf16"}, "bf16"),
    "qlora": ({"method": "lora"}, "nf4"),
    "lora-int8": ({"method": "lora"}, "int8"),
    "dora-nf4": ({"method": "dora"}, "nf4"),
    "loftq": ({"method": "loftq"}, "nf4"),
}
IDS = [65 + i % 12 for i in range(24)]
STEPS = 10

FRESH = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from onlay import stages
torch.set_num_threads(1)
base, ids, runs, plain_bases = json.loads(sys.argv[1])
ids = torch.tensor([ids])
logits = {}
with torch.no_grad():
    for name, folder in runs.items():
        ours = stages.open_run(folder).model
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(plain_bases[name]), folder + "/adapter").eval()
        logits[name] = {kind: model(input_ids=ids, use_cache=False).logits for kind, model in (("onlay", ours), ("peft", plain))}
    logits["base"] = AutoModelForCausalLM.from_pretrained(base).eval()(input_ids=ids, use_cache=False).logits
torch.save(logits, sys.argv[2])
"""


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that `trained_base` half knows: the tokens 65 to 76 in order, from anywhere; not known is where a row ends."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [
        {"text": "".join(chr(ord("b") + (start * 5 + i) % 12) for i in range(10 + start % 9))} for start in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def recipe_of(
    trained_base: Path, counting: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Recipe]:
    folder = tmp_path_factory.mktemp("runs")

    def recipe(name: str, output: str) -> Recipe:
        adapter, storage = CASES[name]
        training = {"max_steps": STEPS, "learning_rate": 1e-3 if "lora+" in name else 5e-3, "checkpoint_steps": 3}
        return recipe_for(
            trained_base, counting, adapter=adapter, model={"storage": storage},
            training={"batch_size": 4, "output": str(folder / f"{name}-{output}"), **training},
            evaluation={"split": 0.2, "select": "last", "every_steps": 5},
        )  # fmt: skip

    return recipe


@pytest.fixture(scope="module")
def runs(recipe_of: Callable[[str, str], Recipe], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """A whole run with each method."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONLAY_HOME", str(tmp_path_factory.mktemp("home")))
        return {name: stages.train(recipe_of(name, "whole")) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_ten_steps_learn_something(name: str, runs: dict[str, Run]) -> None:
    run = runs[name]
    assert (run.status, run.steps, run.method) == ("finished", STEPS, CASES[name][0]["method"])
    assert run.base_evaluation_loss is not None
    assert run.evaluation_loss is not None
    assert run.evaluation_loss < run.base_evaluation_loss
    assert run.proofs["movement"] == {"moved_modules": 14, "modules_without_tokens": []}
    assert run.proofs["base_unchanged"]
    assert ("held_still" in run.proofs) == (name == "pissa")
    assert ("loftq" in run.proofs) == (name == "loftq")
    notes = json.loads((Path(run.path) / "adapter" / "onlay.json").read_text())
    assert (notes["method"], notes["storage"], notes["base_num_layers"]) == (run.method, CASES[name][1], 2)


def test_the_methods_train_as_many_weights_as_they_say(runs: dict[str, Run]) -> None:
    plain = runs["lora"].trainable_parameters
    assert {name: run.trainable_parameters - plain for name, run in runs.items() if run.trainable_parameters != plain} == {
        "dora": 2 * (32 + 16 + 16 + 32 + 64 + 64 + 32), "dora-nf4": 2 * (32 + 16 + 16 + 32 + 64 + 64 + 32),
    }  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_an_interrupted_run_ends_as_the_whole_one(
    name: str, runs: dict[str, Run], recipe_of: Callable[[str, str], Recipe]
) -> None:
    def report(event: Any) -> None:
        if isinstance(event, StepReport) and event.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    run = stages.train(recipe_of(name, "broken"), report=report)
    assert (run.status, run.steps) == ("interrupted", 5)
    run = stages.train(resume=run.path)
    assert (run.status, run.steps) == ("finished", STEPS)
    assert run.evaluation_loss == runs[name].evaluation_loss
    assert proofs_of(run) == proofs_of(runs[name])
    weights, whole = (load_file(Path(r.path) / "adapter" / "adapter_model.safetensors") for r in (run, runs[name]))
    assert weights.keys() == whole.keys()
    assert all(torch.equal(weights[key], whole[key]) for key in whole)


def test_a_fresh_process_loads_all_of_them_here_and_in_plain_peft(
    runs: dict[str, Run], trained_base: Path, tmp_path: Path
) -> None:
    quantized = {storage: with_round_trip(trained_base, tmp_path / storage, storage) for storage in ("nf4", "int8")}
    bases = {name: str(quantized.get(CASES[name][1], trained_base)) for name in runs}
    arguments = json.dumps([str(trained_base), IDS, {name: run.path for name, run in runs.items()}, bases])
    subprocess.run([sys.executable, "-c", FRESH, arguments, str(tmp_path / "logits.pt")], check=True, timeout=300)
    logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    for name in runs:
        ours, plain = logits[name]["onlay"].double(), logits[name]["peft"].double()
        # One is quantized and rebuilt, the other read: the same numbers, multiplied in another order at most.
        assert float((ours - plain).norm()) <= 1e-5 * float(plain.norm()), name
        assert float((ours - logits["base"]).norm()) > 0.01 * float(ours.norm()), name


def with_round_trip(base: Path, folder: Path, storage: str) -> Path:
    """The base with what its quantized weights stand for, as a plain 16-bit (here 32-bit) one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight"):
                parameter.copy_(round_trip(parameter, storage=storage))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------------------------------- what they promise


def test_loftq_begins_nearer_to_the_base_than_plain_nf4(runs: dict[str, Run], recipe_of: Callable[..., Recipe]) -> None:
    """Before the first step the held-out loss lies between nf4's and that of 16 bits."""
    loftq, plain = (recipe_of(name, "first") for name in ("loftq", "qlora"))
    loftq = loftq.model_copy(update={"adapter": loftq.adapter.model_copy(update={"rank": 8})})
    runs = {name: stages.train(recipe) for name, recipe in (("loftq", loftq), ("qlora", plain))} | {
        "lora": runs["lora"]
    }
    exact, better, worse = (runs[name].base_evaluation_loss for name in ("lora", "loftq", "qlora"))
    assert exact is not None
    assert better is not None
    assert worse is not None
    assert exact < better < worse
    errors = runs["loftq"].proofs["loftq"]
    assert errors["modules"] == 14
    assert 0 < errors["nf4_with_adapter"] < errors["nf4"]
    assert errors["adapter_on_16_bit"] == pytest.approx(
        (errors["nf4"] ** 2 - errors["nf4_with_adapter"] ** 2) ** 0.5, rel=1e-3
    )


def test_pissa_begins_where_the_base_is(runs: dict[str, Run]) -> None:
    assert runs["pissa"].base_evaluation_loss == pytest.approx(runs["lora"].base_evaluation_loss, rel=1e-5)


def test_two_ranks_begin_with_the_same_svd_and_hold_the_same_half(
    runs: dict[str, Run], recipe_of: Callable[[str, str], Recipe], tmp_path: Path
) -> None:
    recipe = recipe_of("pissa", "two-ranks")
    (tmp_path / "two.yaml").write_text(recipe.to_yaml())
    launch("-m", "onlay.cli", "train", str(tmp_path / "two.yaml"), "--json", home=tmp_path / "home")
    assert recipe.training.output is not None
    two, one = Run.load(Path(recipe.training.output)), runs["pissa"]
    assert two.environment["devices"] == "2"
    assert proofs_of(two) == proofs_of(one)
    assert two.evaluation_loss == pytest.approx(one.evaluation_loss, rel=1e-4)


def test_another_storage_is_told_and_loftq_refuses_it(runs: dict[str, Run], trained_base: Path) -> None:
    said: list[Any] = []
    recipe = Path(runs["qlora"].path) / "recipe.yaml"
    text = recipe.read_text()
    recipe.write_text(text.replace("storage: nf4", "storage: bf16"))
    try:
        stages.open_run(runs["qlora"].path, report=said.append)
    finally:
        recipe.write_text(text)
    assert "the adapter was trained on its base in nf4 and is used on it in bf16: answers may differ" in said
    facts = read_facts(ModelSection(base=str(trained_base)))
    base = load_base(facts, ModelSection(base=str(trained_base)), NO_GPU, device="cpu")
    with pytest.raises(BaseModelError, match="loftq"):
        load_adapter(base.model, Path(runs["loftq"].path) / "adapter", facts=facts, storage=base.storage)
