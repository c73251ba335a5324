"""A run as a whole: what is selected, evaluated, exported and told."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from onlay.data.pack import collate, plan_micro_batches
from onlay.errors import OutputError, ProofError, TrainingError
from onlay.model.attention import Layout
from onlay.records import Run
from onlay.training import session
from onlay.training.batches import Batches
from onlay.training.devices import Devices, find_devices
from onlay.training.loop import StepReport, Task
from onlay.training.loss import make_loss
from onlay.training.session import held_out_loss
from tests.builders import random_examples, tiny_model, tiny_pad_token_id
from tests.training.conftest import Change, Workshop
from tests.training.test_checkpoint import files_of_at_most


def with_evaluations(*losses: float) -> Change:
    """The first is the base's, before the first step."""
    following: Iterator[float] = iter(losses)
    return lambda task: replace(task, validate=lambda budget: next(following))


# ------------------------------------------------------------------------------------------------------- which weights


def adapter_of_step(workshop: Workshop, name: str, step: int) -> bool:
    """Whether adapter/ holds what this step's checkpoint holds."""
    from safetensors.torch import load_file

    saved = load_file(workshop.folder / name / "checkpoints" / f"step-{step:07d}" / "weights.safetensors")
    exported = workshop.weights(name)
    return all(torch.equal(saved[key.replace(".weight", ".default.weight")], exported[key]) for key in exported)


def test_the_best_weights_are_selected_and_kept(workshop: Workshop) -> None:
    recipe = workshop.recipe(
        training={"keep_checkpoints": 1, "checkpoint_steps": 2}, evaluation={"every_steps": 2, "select": "best"}
    )
    run = workshop.train("run", recipe, change=with_evaluations(9.0, 3.0, 2.0, 2.5, 2.1, 2.2))
    assert (run.selected_step, run.evaluation_loss, run.base_evaluation_loss) == (4, 2.0, 9.0)
    assert [c.step for c in run.checkpoints] == [4, 10]
    assert adapter_of_step(workshop, "run", 4)
    assert not adapter_of_step(workshop, "run", 10)


def test_the_last_weights_are_selected_when_asked_for(workshop: Workshop) -> None:
    recipe = workshop.recipe(evaluation={"every_steps": 2, "select": "last"})
    run = workshop.train("run", recipe, change=with_evaluations(9.0, 3.0, 2.0, 2.5, 2.1, 2.2))
    assert (run.selected_step, run.evaluation_loss) == (10, 2.2)
    assert adapter_of_step(workshop, "run", 10)


@pytest.mark.parametrize(("patience", "steps"), [(1, 6), (2, 8), (3, 10), (None, 10)])
def test_patience(workshop: Workshop, patience: int | None, steps: int) -> None:
    recipe = workshop.recipe(evaluation={"every_steps": 2, "patience": patience})
    run = workshop.train("run", recipe, change=with_evaluations(9.0, 3.0, 2.0, 2.5, 2.1, 2.2))
    assert (run.status, run.steps, run.selected_step) == ("finished", steps, 4)
    assert ("stopped_early" in run.fast_paths) == (steps < 10)


def test_a_gain_renews_patience(workshop: Workshop) -> None:
    recipe = workshop.recipe(evaluation={"every_steps": 2, "patience": 2})
    run = workshop.train("run", recipe, change=with_evaluations(9.0, 3.0, 3.1, 2.9, 3.0, 3.0))
    assert (run.steps, run.selected_step) == (10, 6)


def test_without_held_out_rows_the_last_weights_are_selected(workshop: Workshop) -> None:
    workshop.held_out = None
    run = workshop.train("run", workshop.recipe(evaluation={"split": None, "every_steps": None}))
    assert (run.selected_step, run.evaluation_loss, run.base_evaluation_loss) == (10, None, None)
    assert {e["event"] for e in workshop.metrics("run")} == {"step"}


# ---------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize(
    ("every", "checkpoint", "expected"), [(4, 3, [0, 4, 8, 10]), (3, 100, [0, 3, 6, 9, 10]), (100, 2, [0, 10])]
)
def test_evaluations_have_an_interval_of_their_own(
    workshop: Workshop, every: int, checkpoint: int, expected: list[int]
) -> None:
    recipe = workshop.recipe(training={"checkpoint_steps": checkpoint}, evaluation={"every_steps": every})
    workshop.train("run", recipe)
    assert [e["step"] for e in workshop.metrics("run") if e["event"] == "evaluation"] == expected


@pytest.mark.parametrize("budget", [8, 100, 10_000])
@pytest.mark.parametrize("packed", [False, True])
def test_the_held_out_loss_is_weighted_by_tokens(tmp_path: Path, budget: int, packed: bool) -> None:
    """Against the plain model, example by example: all nats over all trained tokens, and no mean of means."""
    model = tiny_model("llama", dtype=torch.float64)
    examples = random_examples(12, most=30)
    nats, tokens, means = 0.0, 0, []
    for i in range(len(examples)):
        ids, trained = (torch.from_numpy(array.copy()) for array in examples.example(i))
        logits = model(input_ids=ids[None].long()).logits[0, :-1]
        loss = functional.cross_entropy(logits[trained[1:]], ids[1:][trained[1:]].long(), reduction="sum")
        count = int(trained[1:].sum())
        nats, tokens, means = nats + float(loss), tokens + count, [*means, float(loss) / count]
    layout = Layout(packed=packed, mask_padding=False, attention="sdpa", reason="")
    devices: Devices = find_devices(folder=tmp_path)
    loss_of = make_loss(model, layout, device=torch.device("cpu"), compute_dtype=torch.float64)
    batches = Batches(
        examples, batch_size=1, seed=0,
        plan=lambda lengths, budget: plan_micro_batches(lengths, budget_tokens=budget, packed=packed),
        collate=lambda group: collate(group, packed=packed, pad_token_id=tiny_pad_token_id()),
    )  # fmt: skip
    model.train()
    found = held_out_loss(model, batches, range(12), loss=loss_of, budget_tokens=budget, devices=devices)
    assert found == pytest.approx(nats / tokens, rel=1e-9)
    assert found != pytest.approx(sum(means) / 12, rel=1e-3)
    assert model.training


def test_dropout_is_off_in_evaluations_and_on_in_training(workshop: Workshop) -> None:
    """Evaluated twice without an update between: the same; trained with another dropout: another loss."""
    losses: list[float] = []

    def twice(task: Task) -> Task:
        validate = task.validate
        assert validate is not None

        def both(budget: int) -> float:
            losses.extend([validate(budget), validate(budget)])
            return losses[-1]

        return replace(task, validate=both)

    workshop.train("run", workshop.recipe(adapter={"dropout": 0.5}), change=twice)
    assert losses[::2] == losses[1::2]
    workshop.train("plain")
    assert workshop.losses("run")[10] != workshop.losses("plain")[10]


# ------------------------------------------------------------------------------------------------------- what is told


def test_steps_are_told_in_order_and_as_they_are_logged(workshop: Workshop) -> None:
    run = workshop.train("run")
    reports = [event for event in workshop.events if isinstance(event, StepReport)]
    assert [r.step for r in reports] == list(range(1, 11))
    assert [r.loss for r in reports] == list(workshop.losses("run").values())
    logged = [event for event in workshop.metrics("run") if event["event"] == "step"]
    assert [r.learning_rate for r in reports] == [event["learning_rate"] for event in logged]
    assert all(set(event) == {"event", "step", "loss", "learning_rate", "grad_norm", "tokens"} for event in logged)
    assert run.first_loss == reports[0].loss
    assert run.last_loss == reports[-1].loss
    assert sum(event["tokens"] for event in logged) > run.trained_tokens > 0
    assert run.proofs["finite"] is True
    assert run.proofs["base_unchanged"] is True
    assert run.proofs["movement"]["moved_modules"] == 14
    assert run.recoveries == []
    assert Run.load(workshop.folder / "run") == run


def test_tensorboard_gets_the_same_numbers(workshop: Workshop) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    workshop.train("run", workshop.recipe(training={"trackers": ["tensorboard"]}))
    files = (workshop.folder / "run").rglob("events.out.tfevents.*")
    [events] = [
        loaded
        for path in files
        if "step/loss" in (loaded := accumulator.EventAccumulator(str(path)).Reload()).Tags()["scalars"]
    ]
    told = {event.step: event.value for event in events.Scalars("step/loss")}
    assert told == pytest.approx(workshop.losses("run"), rel=1e-6)
    assert [event.step for event in events.Scalars("evaluation/loss")] == [0, 4, 8, 10]


def test_two_runs_are_the_same(workshop: Workshop) -> None:
    recipe = workshop.recipe(adapter={"dropout": 0.1})
    workshop.train("one", recipe)
    torch.manual_seed(12345)
    workshop.train("two", recipe)
    workshop.assert_same("one", "two")


# -------------------------------------------------------------------------------------------------------- full tuning


@pytest.mark.parametrize("weights", ["random", "pretrained"])
def test_full_tuning_leaves_a_model_that_plain_transformers_loads(workshop: Workshop, weights: str) -> None:
    recipe = workshop.recipe(
        model={"weights": weights}, adapter={"method": "full"}, training={"learning_rate": 3e-3, "max_steps": 20}
    )
    run = workshop.train("run", recipe)
    assert run.evaluation_loss is not None
    assert run.base_evaluation_loss is not None
    assert run.evaluation_loss < run.base_evaluation_loss - 1.0
    assert run.proofs["movement"]["moved_weights"] > 10
    folder = workshop.folder / "run" / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("ABC")["input_ids"]) == "ABC"
    assert workshop.held_out is not None
    nats, tokens = 0.0, 0
    for i in range(len(workshop.held_out)):
        ids = torch.from_numpy(workshop.held_out.example(i)[0].copy()).long()[None]
        loss = model(input_ids=ids, labels=ids).loss
        nats, tokens = nats + float(loss.detach()) * (ids.shape[1] - 1), tokens + ids.shape[1] - 1
    assert nats / tokens == pytest.approx(run.evaluation_loss, rel=1e-5)


def test_full_tuning_is_resumed_alike(workshop: Workshop) -> None:
    from safetensors.torch import load_file

    from tests.training.test_resume import stopped_after

    recipe = workshop.recipe(model={"weights": "random"}, adapter={"method": "full"}, training={"learning_rate": 3e-3})
    workshop.train("whole", recipe)
    workshop.train("run", recipe, change=stopped_after(5))
    workshop.train("run", recipe, resume=True)
    weights, expected = (load_file(workshop.folder / n / "model" / "model.safetensors") for n in ("run", "whole"))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert workshop.metrics("run") == workshop.metrics("whole")


# --------------------------------------------------------------------------------------------------------------- failing


@pytest.mark.parametrize("size", [0, 900, 3000])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_disk_that_is_full_at_the_end_loses_nothing(workshop: Workshop, size: int, method: str) -> None:
    """A real failure to write while results are exported; then resumed, without a further step."""
    adapter: dict[str, Any] = {"method": "full"} if method == "full" else {}
    recipe = workshop.recipe(adapter=adapter)
    real: Callable[..., Run] = session._finish

    def finish(*arguments: Any) -> Run:
        with files_of_at_most(size):
            return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "_finish", finish)
        with pytest.raises(OutputError) as caught:
            workshop.train("run", recipe)
    assert str(caught.value).count("\n") == 1
    folder = workshop.folder / "run"
    assert not (folder / "adapter").exists()
    assert not (folder / "model").exists()
    assert not [path for path in folder.iterdir() if path.is_dir() and path.name.startswith(".")]
    assert Run.load(folder).status == "failed"
    steps = len([event for event in workshop.events if isinstance(event, StepReport)])
    assert workshop.train("run", recipe, resume=True).status == "finished"
    assert len([event for event in workshop.events if isinstance(event, StepReport)]) == steps


def test_a_log_that_cannot_be_written_ends_the_run_in_two_lines(workshop: Workshop) -> None:
    recipe = workshop.recipe(training={"checkpoint_steps": 2})

    def change(task: Task) -> Task:
        assert task.metrics is not None
        write = task.metrics.write

        def full(event: str, step: int, **values: Any) -> None:
            if step < 6:
                return write(event, step, **values)
            with files_of_at_most(10):
                return write(event, step, **values)

        task.metrics.write = full  # type: ignore[method-assign]
        return task

    workshop.train("whole", recipe)
    with pytest.raises(OutputError, match=r"metrics\.jsonl could not be written"):
        workshop.train("run", recipe, change=change)
    assert Run.load(workshop.folder / "run").status == "failed"
    workshop.train("run", recipe, resume=True)
    workshop.assert_same("run", "whole")


def test_a_module_that_does_not_move_is_told(workshop: Workshop) -> None:
    def frozen(task: Task) -> Task:
        name = next(name for name in task.trainable if "lora_B" in name)
        task.trainable[name].register_hook(torch.zeros_like)
        return task

    with pytest.raises(ProofError, match="1 of 14 adapted modules received tokens but did not move") as caught:
        workshop.train("run", change=frozen)
    assert isinstance(caught.value, TrainingError)
    assert Run.load(workshop.folder / "run").status == "failed"


def test_the_base_is_not_changed_by_training_unseen(workshop: Workshop) -> None:
    def tampering(task: Task) -> Task:
        weight = next(p for name, p in task.model.named_parameters() if name.endswith("q_proj.base_layer.weight"))

        def tamper(_progress: Any) -> None:
            with torch.no_grad():
                weight[0, 0] += 1e-3

        return replace(task, after_update=lambda progress: (task.after_update(progress), tamper(progress))[0])

    with pytest.raises(ProofError, match="1 frozen weights of the base changed"):
        workshop.train("run", change=tampering)


def test_a_loss_in_the_record_is_a_number(workshop: Workshop) -> None:
    run = workshop.train("run")
    assert run.last_loss is not None
    assert math.isfinite(run.last_loss)
    assert run.total_steps == 10
    assert run.peak_memory_bytes is not None
    assert run.peak_memory_bytes > 2**20
