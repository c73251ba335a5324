"""A run of method `head`, from rows with labels to answers: through the functions behind the verbs, on a tiny base."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

import onlay
from onlay import stages
from onlay.data.pack import collate, plan_micro_batches
from onlay.errors import BaseModelError, DataError, OutputError
from onlay.generation.engine import Sampling
from onlay.model.attention import Layout, choose_layout, use_attention
from onlay.model.head import attach_head
from onlay.recipe import Recipe, parse_recipe
from onlay.records import Dataset, Run
from onlay.training.head_loss import HeadLoss, predict
from onlay.training.metrics_log import read_metrics
from tests.builders import ListExamples, save_tiny_base, shake, tiny_model
from tests.training.conftest import Countdown, changed_task

CPU = torch.device("cpu")
ENDS = {"dry": "sun", "wet": "rain", "white": "snow"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with 60 rows in it, whose text tells the label: half of them dry."""
    monkeypatch.chdir(tmp_path)
    labels = ["dry", "wet", "dry", "white", "dry", "wet"] * 10
    rows = [
        {"text": f"day {i} of the {'long ' * (i % 4)}week: {ENDS[label]}", "label": label}
        for i, label in enumerate(labels)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def recipe_on(base: Path, output: str, **sections: Any) -> Recipe:
    values: dict[str, Any] = {
        "model": {"base": str(base)},
        "adapter": {"method": "head"},
        "data": {"train": "rows.jsonl"},
        "training": {"epochs": 10, "batch_size": 8, "learning_rate": 0.05, "checkpoint_steps": 5, "output": output},
        "evaluation": {"split": 0.2},
    }
    return parse_recipe({name: fields | sections.get(name, {}) for name, fields in values.items()})


def test_a_head_learns_is_proven_and_answers(base: Path, place: Path) -> None:
    run = onlay.train(recipe_on(base, "run"))
    assert (run.status, run.method, run.trainable_parameters) == ("finished", "head", 3 * 32)
    # The head starts at zero, where every label is equally likely.
    assert run.first_loss == pytest.approx(math.log(3), rel=torch.finfo(torch.float32).eps * 8)
    assert run.base_evaluation_loss == pytest.approx(math.log(3), rel=torch.finfo(torch.float32).eps * 8)
    assert run.last_loss is not None and run.evaluation_loss is not None
    assert run.last_loss < run.first_loss / 2
    assert run.evaluation_loss < run.base_evaluation_loss / 2
    assert run.scores["rows"] == 12
    assert run.scores["accuracy"] > run.scores["majority_accuracy"]
    assert run.scores["macro_f1"] > 0.5
    assert run.proofs["base_unchanged"] and run.proofs["finite"]
    assert run.proofs["movement"] == {"moved_weights": 1, "weights_without_tokens": []}
    assert run.trained_tokens == run.steps * 8
    assert {path.name for path in (place / "run" / "head").iterdir()} == {"head.safetensors", "head.json"}
    assert not (place / "run" / "adapter").exists()
    assert Dataset.load(place / "run").labels == ["dry", "wet", "white"]

    asked = {
        "day 70 of the week: sun": "dry",
        "day 71 of the long week: snow": "white",
        "day 72 of the week: rain": "wet",
    }
    answers = onlay.generate("run", list(asked))
    assert {answer["prompt"]: answer["answer"] for answer in answers} == asked
    for answer in answers:
        assert list(answer["probabilities"]) == ["dry", "wet", "white"]
        assert sum(answer["probabilities"].values()) == pytest.approx(1.0, rel=1e-6)
        assert max(answer["probabilities"], key=answer["probabilities"].get) == answer["answer"]
    said: list[str] = []
    onlay.generate("run", ["day 70 of the week: sun"], on_text=said.append)
    assert said == ["dry"]


def accuracy_of(folder: str) -> float:
    """Of the answers of a run's saved head to its held-out rows."""
    rows = stages.held_out_rows(Dataset.load(Path(folder)))
    found = onlay.generate(folder, [row.turns[0].content for row in rows])
    return sum(answer["answer"] == row.turns[1].content for answer, row in zip(found, rows, strict=True)) / len(rows)


def test_the_best_weights_are_the_ones_that_are_scored_and_saved(base: Path, place: Path) -> None:
    """Told that the first steps were the best, a run gives up what it learned later."""
    last = onlay.train(recipe_on(base, "last"))
    losses = iter([1.1, 0.5, *[0.9] * 99])
    with changed_task(lambda task: replace(task, validate=lambda budget: next(losses))):
        best = onlay.train(recipe_on(base, "best", training={"warmup_fraction": 1.0}, evaluation={"every_steps": 1}))
    assert (best.selected_step, best.steps) == (1, last.steps)
    saved = load_file(place / "best" / "checkpoints" / "step-0000001" / "weights.safetensors")
    exported = load_file(place / "best" / "head" / "head.safetensors")
    assert torch.equal(saved["score.weight"], exported["score.weight"])
    assert accuracy_of("last") == last.scores["accuracy"]
    assert accuracy_of("best") == best.scores["accuracy"] < last.scores["accuracy"]


def test_a_resumed_run_gives_the_same_bits(base: Path, place: Path) -> None:
    onlay.train(recipe_on(base, "whole"))
    stop = Countdown(23)
    with changed_task(lambda task: replace(task, interrupted=stop)):
        assert onlay.train(recipe_on(base, "parts")).status == "interrupted"
    assert stop.fired
    resumed = onlay.train(resume="parts")
    assert resumed.status == "finished"
    weights = [load_file(place / name / "head" / "head.safetensors")["score.weight"] for name in ("whole", "parts")]
    assert torch.equal(*weights)
    assert bool(weights[0].any())
    logs = [
        [
            {k: v for k, v in event.items() if k != "tokens_per_second"}
            for event in read_metrics(place / name / "metrics.jsonl")
        ]
        for name in ("whole", "parts")
    ]
    assert logs[0] == logs[1]
    assert resumed.scores == Run.load(place / "whole").scores


def test_without_held_out_rows_there_are_no_scores(base: Path, place: Path) -> None:
    run = onlay.train(recipe_on(base, "run", training={"epochs": 1}, evaluation={"split": None}))
    assert (run.scores, run.evaluation_loss) == ({}, None)


def test_columns_may_have_other_names(base: Path, place: Path) -> None:
    rows = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]
    (place / "mine.jsonl").write_text(
        "".join(json.dumps({"review": r["text"], "stars": r["label"]}) + "\n" for r in rows)
    )
    named = {"train": "mine.jsonl", "prompt_field": "review", "answer_field": "stars"}
    prepared = stages.prepare(recipe_on(base, "run", data=named))
    assert (prepared.dataset.format, prepared.dataset.labels) == ("classification", ["dry", "wet", "white"])


# ---------------------------------------------------------------------------------------------------------- the loss


def classified(n: int, labels: int) -> ListExamples:
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(0, 256, (3 + i % 7,), generator=generator).tolist() + [i % labels] for i in range(n)]
    return ListExamples(rows, [[False] * (len(row) - 1) + [True] for row in rows])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("budget", [1, 30, 10_000])
def test_loss_and_predictions_are_those_of_each_text_alone(packed: bool, budget: int) -> None:
    model = tiny_model("llama", dtype=torch.float64)
    head = attach_head(model, ["a", "b", "c", "d"])
    shake(head, scale=1.0)
    examples = classified(11, 4)
    nats, likeliest = 0.0, []
    for i in range(len(examples)):
        ids = torch.from_numpy(examples.example(i)[0].copy()).long()
        hidden = model.model(input_ids=ids[None, :-1]).last_hidden_state[0, -1]
        logits = hidden @ head.score.weight.T
        nats += float(functional.cross_entropy(logits, ids[-1]).detach())
        likeliest.append((int(logits.argmax()), int(ids[-1])))
    layout = Layout(packed=packed, mask_padding=False, attention="sdpa", reason="")

    def plan(lengths: Any) -> list[list[int]]:
        return plan_micro_batches(lengths, budget_tokens=budget, packed=packed)

    def laid_out(group: Any) -> Any:
        return collate(group, packed=packed, pad_token_id=256)

    loss = HeadLoss(model, layout, device=CPU)
    groups = plan(examples.lengths)
    found = sum(loss(head, laid_out([examples.example(i) for i in group])).item() for group in groups)
    assert found == pytest.approx(nats, rel=torch.finfo(torch.float64).eps ** 0.5)
    pairs = predict(head, examples, loss=loss, plan=plan, collate=laid_out)
    assert sorted(zip(*pairs, strict=True)) == sorted(likeliest)
    assert len({guess for guess, _ in likeliest}) > 1


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x", "label": None}, r"rows\.jsonl:61, field label: missing"),
        ({"text": "x"}, r"rows\.jsonl:61, field label_text: missing"),
        ({"text": "", "label": "dry"}, r"rows\.jsonl:61, field text: it is empty"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(base: Path, place: Path, row: dict[str, Any], message: str) -> None:
    with (place / "rows.jsonl").open("a") as rows:
        rows.write(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=message) as caught:
        onlay.train(recipe_on(base, "run"))
    assert str(caught.value).count("\n") == 1
    assert not (place / "run").exists()


def test_labels_that_cannot_be_learned_are_refused_before_anything_is_loaded(base: Path, place: Path) -> None:
    (place / "held.jsonl").write_text('{"text": "fog", "label": "grey"}\n')
    with pytest.raises(DataError, match=r"held\.jsonl:1: its label 'grey' is held out"):
        stages.look(recipe_on(base, "run", evaluation={"file": "held.jsonl"}))
    (place / "rows.jsonl").write_text('{"text": "fog", "label": "grey"}\n' * 3)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: its label 'grey' is that of every training row"):
        stages.look(recipe_on(base, "run", evaluation={"split": None}))
    (place / "rows.jsonl").write_text('{"instruction": "fog", "output": "grey"}\n' * 3)
    with pytest.raises(DataError, match="the format is classification, this row looks like alpaca"):
        stages.look(recipe_on(base, "run"))


def test_a_head_does_not_write(base: Path, place: Path) -> None:
    onlay.train(recipe_on(base, "run", training={"epochs": 1}))
    for options in ({"compare": True}, {"system": "Be brief."}, {"sampling": Sampling(temperature=1.0)}):
        with pytest.raises(OutputError, match="a classification head says a label"):
            onlay.generate("run", ["x"], **options)  # type: ignore[arg-type]
    with pytest.raises(OutputError, match=r"says a label for a text, and writes nothing\.\nonlay generate run"):
        onlay.chat("run")
    with pytest.raises(DataError, match=r"The text has 600 tokens; the context of .* is 512"):
        onlay.generate("run", ["a" * 600])


def test_another_base_in_the_same_place_is_refused(tmp_path_factory: pytest.TempPathFactory, place: Path) -> None:
    folder = save_tiny_base(tmp_path_factory.mktemp("base"), seed=1)
    onlay.train(recipe_on(folder, "run", training={"epochs": 1}))
    save_tiny_base(folder, seed=2)
    with pytest.raises(BaseModelError, match="with other weights"):
        onlay.generate("run", ["x"])


def test_a_run_that_was_interrupted_has_no_head_yet(base: Path, place: Path) -> None:
    with changed_task(lambda task: replace(task, interrupted=Countdown(2))):
        onlay.train(recipe_on(base, "run"))
    with pytest.raises(OutputError, match=r"it has no head yet\.\nonlay train --resume run"):
        onlay.generate("run", ["x"])


# ------------------------------------------------------------------------------------------------------------ 16 bit


@pytest.mark.parametrize("compute", ["bf16", "fp16"])
def test_a_base_in_16_bit_keeps_a_head_in_32(base: Path, place: Path, compute: str) -> None:
    run = onlay.train(recipe_on(base, "run", model={"compute": compute}))
    assert load_file(place / "run" / "head" / "head.safetensors")["score.weight"].dtype == torch.float32
    assert run.scores["accuracy"] > run.scores["majority_accuracy"]
    assert accuracy_of("run") == run.scores["accuracy"]


def test_a_quantized_base_keeps_a_head_in_32_bits(base: Path, place: Path) -> None:
    """What the head reads differs from one storage to the next; each is proven unchanged and answers as it was scored."""
    weights = {}
    for storage in ("bf16", "nf4", "int8"):
        run = onlay.train(recipe_on(base, storage, model={"storage": storage}, training={"epochs": 6}))
        assert run.proofs["base_unchanged"]
        assert run.scores["accuracy"] > run.scores["majority_accuracy"]
        assert accuracy_of(storage) == run.scores["accuracy"]
        weights[storage] = load_file(place / storage / "head" / "head.safetensors")["score.weight"]
        assert weights[storage].dtype == torch.float32
    assert not torch.equal(weights["bf16"], weights["nf4"])
    assert not torch.equal(weights["int8"], weights["nf4"])


@pytest.mark.gpu
def test_packed_texts_on_a_gpu_are_as_near_to_float64_as_each_alone() -> None:
    device = torch.device("cuda")
    examples = classified(40, 4)
    group = [examples.example(i) for i in range(len(examples))]
    models = {dtype: tiny_model("llama", dtype=dtype).to(device) for dtype in (torch.bfloat16, torch.float64)}  # type: ignore[arg-type]
    layout = choose_layout(models[torch.bfloat16], packing="on", device=device, compute_dtype=torch.bfloat16)
    assert layout.packed
    logits = {}
    for dtype, model in models.items():
        head = attach_head(model, ["a", "b", "c", "d"])
        shake(head, scale=1.0)
        head.score.weight.data.copy_(head.score.weight.float())
        use_attention(model, "sdpa")
        alone = HeadLoss(model, Layout(packed=False, mask_padding=False, attention="sdpa", reason=""), device=device)
        each = [alone.logits(head, collate([one], packed=False, pad_token_id=256))[0] for one in group]
        logits[f"alone {dtype}"] = torch.cat(each).double()
        if dtype == torch.bfloat16:
            batch = collate(group, packed=True, pad_token_id=256)
            use_attention(model, layout.attention)
            logits["packed"] = HeadLoss(model, layout, device=device).logits(head, batch)[0].double()
    exact = logits["alone torch.float64"]
    assert (logits["packed"] - exact).norm() <= 2 * (logits["alone torch.bfloat16"] - exact).norm()
    assert (logits["packed"] - exact).norm() < exact.norm() / 10
