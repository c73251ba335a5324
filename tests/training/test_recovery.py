"""A run goes on: after memory ran out at any point, after values that are not finite, after the loss has exploded."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from onlay.errors import RecipeError, TrainingError
from onlay.model.recompute import Recompute
from onlay.records import Run
from onlay.training import session
from onlay.training.loop import StepReport, Task, is_out_of_memory
from tests.builders import ListExamples
from tests.training.conftest import (
    WORDS,
    Change,
    Countdown,
    Workshop,
    failing_backward,
    failing_optimizer,
    learnable,
    planted,
    uncalled,
    with_loss,
)

CPU_ALLOCATOR = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes."
OUT_OF_MEMORY = {
    "torch": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "allocator": lambda: RuntimeError(CPU_ALLOCATOR),
    "python": lambda: MemoryError(),
    "driver": lambda: RuntimeError("CUDA error: out of memory"),
}
SPLIT_LIMIT = 1e-5


# ------------------------------------------------------------------------------------------------------- out of memory


def of_forward(n: int, error: BaseException) -> Change:
    """Raises in the n-th micro-batch's forward."""
    count = Countdown(n, error)
    return lambda task: with_loss(task, lambda loss: uncalled(loss, count))


def of_backward(n: int, error: BaseException) -> Change:
    count = Countdown(n)
    return lambda task: with_loss(task, lambda loss: failing_backward(loss, error) if count() else loss)


def of_finishing(n: int, error: BaseException) -> Change:
    """While gradients are clipped, after they were."""
    count = Countdown(n, error)

    def change(task: Task) -> Task:
        finish = task.finish_gradient

        def finished(scale: float) -> float:
            norm = finish(scale)
            count()
            return norm

        return replace(task, finish_gradient=finished)

    return change


def of_optimizer(n: int, error: BaseException, *, updated: int) -> Change:
    count = Countdown(n)
    return lambda task: failing_optimizer(task, count, error, updated=updated)


def of_evaluation(n: int, error: BaseException) -> Change:
    """Call 1 is the base's evaluation, before the first step."""
    count = Countdown(n, error)

    def change(task: Task) -> Task:
        validate = task.validate
        assert validate is not None

        def validated(budget: int) -> float:
            loss = validate(budget)
            count()
            return loss

        return replace(task, validate=validated)

    return change


def assert_near(workshop: Workshop, name: str, other: str) -> None:
    losses, expected = workshop.losses(name), workshop.losses(other)
    assert losses.keys() == expected.keys()
    assert losses == pytest.approx(expected, rel=SPLIT_LIMIT)
    evaluations, others = (
        [(e["step"], e["loss"]) for e in workshop.metrics(n) if e["event"] == "evaluation"] for n in (name, other)
    )
    assert dict(evaluations) == pytest.approx(dict(others), rel=SPLIT_LIMIT)


def assert_told(workshop: Workshop, name: str, run: Run, reason: str) -> None:
    """In the record, in the log and to the user: the same recoveries."""
    assert run.recoveries
    assert {recovery.reason for recovery in run.recoveries} == {reason}
    assert workshop.recoveries() == run.recoveries
    logged = [event for event in workshop.metrics(name) if event["event"] == "recovery"]
    assert [{"event": "recovery", **r.model_dump()} for r in run.recoveries] == logged
    assert Run.load(workshop.folder / name) == run


STEPS = 4
PLACES: dict[str, tuple[Callable[..., Change], bool]] = {
    "forward": (of_forward, False),
    "backward": (of_backward, False),
    "clipping": (of_finishing, False),
    "optimizer, nothing updated": (lambda n, error: of_optimizer(n, error, updated=0), True),
    "optimizer, half updated": (lambda n, error: of_optimizer(n, error, updated=9), True),
    "evaluation": (of_evaluation, False),
}


@pytest.mark.parametrize("place", PLACES)
def test_memory_may_run_out_once_at_any_point_of_any_step(workshop: Workshop, place: str) -> None:
    """Three micro-batches a step, evaluations after steps 2 and 4; the n-th call fails, for every n."""
    fault, exact = PLACES[place]
    recipe = workshop.recipe(
        training={"max_steps": STEPS, "micro_batch_tokens": 48, "batch_size": 6}, evaluation={"every_steps": 2}
    )
    workshop.train("whole", recipe)
    calls = {"evaluation": 3, "forward": 3 * STEPS, "backward": 3 * STEPS}.get(place, STEPS)
    names = list(OUT_OF_MEMORY)
    for n in range(1, calls + 1):
        workshop.events.clear()
        error = OUT_OF_MEMORY[names[n % len(names)]]()
        run = workshop.train(f"fault{n}", recipe, change=fault(n, error))
        assert run.status == "finished"
        assert_told(workshop, f"fault{n}", run, "out_of_memory")
        assert_near(workshop, f"fault{n}", "whole")
        assert run.trained_tokens == Run.load(workshop.folder / "whole").trained_tokens
        if exact:
            assert workshop.losses(f"fault{n}") == workshop.losses("whole")
            weights, others = workshop.weights(f"fault{n}"), workshop.weights("whole")
            assert all(torch.equal(weights[key], others[key]) for key in others)


def test_memory_that_runs_out_again_cuts_again(workshop: Workshop) -> None:
    """As a device with room for 60 tokens: found by halving, once, and kept to."""
    recipe = workshop.recipe(training={"batch_size": 16, "max_steps": 6})
    workshop.train("whole", recipe)
    sizes: list[int] = []

    def change(task: Task) -> Task:
        loss = task.loss

        def limited(model: Any, batch: Any) -> Tensor:
            sizes.append(batch.input_ids.numel())
            if batch.input_ids.numel() > 60:
                raise OUT_OF_MEMORY["torch"]()
            return loss(model, batch)

        return replace(task, loss=limited)

    run = workshop.train("small", recipe, change=change)
    assert_near(workshop, "small", "whole")
    assert 1 < len(run.recoveries) < 8
    assert all("instead of" in recovery.action for recovery in run.recoveries)
    assert max(sizes[-20:]) <= 60
    assert int(run.fast_paths["micro_batch_tokens"]) <= 60


def test_memory_that_runs_out_at_every_step_is_no_end(workshop: Workshop) -> None:
    """Also where nothing can be cut any more: what was freed may be enough."""
    recipe = workshop.recipe(training={"micro_batch_tokens": 8, "max_steps": 5})
    workshop.train("whole", recipe)
    failed: set[int] = set()

    def change(task: Task) -> Task:
        finish, seen = task.finish_gradient, [0]

        def finished(scale: float) -> float:
            seen[0] += 1
            if seen[0] % 3:
                failed.add(seen[0])
                raise OUT_OF_MEMORY["torch"]()
            return finish(scale)

        return replace(task, finish_gradient=finished)

    run = workshop.train("again", recipe, change=change)
    assert len(failed) == len(run.recoveries) == 10
    assert workshop.losses("again") == workshop.losses("whole")


@pytest.mark.parametrize("place", ["loss", "optimizer", "evaluation"])
def test_memory_that_never_suffices_ends_in_an_error_with_remedies(workshop: Workshop, place: str) -> None:
    def fail(*_: Any) -> Any:
        raise OUT_OF_MEMORY["torch"]()

    def change(task: Task) -> Task:
        if place == "optimizer":
            return failing_optimizer(task, lambda: True, OUT_OF_MEMORY["torch"](), updated=3)
        return replace(task, loss=fail) if place == "loss" else replace(task, validate=fail)

    with pytest.raises(TrainingError) as caught:
        workshop.train("run", change=change)
    assert caught.value.exit_code == 1
    assert "Memory ran out at step" in caught.value.problem
    assert "data.max_tokens" in caught.value.remedy
    run = Run.load(workshop.folder / "run")
    assert (run.status, run.error) == ("failed", caught.value.problem)
    assert 3 <= len(run.recoveries) <= 12


def too_small_to_keep_activations(places: set[str]) -> Change:
    """As a device on which an example fits only where layers are recomputed.  `places` gets where memory ran out."""

    def change(task: Task) -> Task:
        layers: Any = task.model.get_base_model().model.layers  # type: ignore[operator]
        loss, finish = task.loss, task.finish_gradient

        def runs_out() -> bool:
            replaced = [getattr(vars(layer).get("forward"), "func", None) for layer in layers]
            return not any(getattr(one, "__func__", None) is Recompute._forward for one in replaced)

        def limited(model: Any, batch: Any) -> Tensor:
            result = loss(model, batch)
            if torch.is_grad_enabled() and "backward" in places and runs_out():
                return failing_backward(result, OUT_OF_MEMORY["torch"]())
            return result

        def finished(scale: float) -> float:
            if "clipping" in places and runs_out():
                raise OUT_OF_MEMORY["driver"]()
            return finish(scale)

        return replace(task, loss=limited, finish_gradient=finished)

    return change


@pytest.mark.parametrize("place", ["backward", "clipping"])
def test_layers_are_recomputed_when_nothing_else_helps(workshop: Workshop, place: str) -> None:
    recipe = workshop.recipe(training={"micro_batch_tokens": 8, "max_steps": 6})  # one example at a time
    whole = workshop.train("whole", recipe)
    run = workshop.train("run", recipe, change=too_small_to_keep_activations({place}))
    assert_told(workshop, "run", run, "out_of_memory")
    # It is freed three times first, and after that never again.
    assert len(run.recoveries) == 4
    assert {recovery.step for recovery in run.recoveries} == {1}
    assert run.recoveries[-1].action == (
        "from now on the backward pass computes again all but its input of 2 of 2 layers; the same step is repeated"
    )
    assert workshop.losses("run") == workshop.losses("whole")
    weights, others = workshop.weights("run"), workshop.weights("whole")
    assert all(torch.equal(weights[key], others[key]) for key in others)
    assert (whole.fast_paths["recompute"], run.fast_paths["recompute"]) == (
        "no layer",
        "all but its input of 2 of 2 layers",
    )
    assert workshop.progress("run")["levels"] == ["layer", "layer"]


def test_a_resumed_run_goes_on_recomputing(workshop: Workshop) -> None:
    recipe = workshop.recipe(training={"micro_batch_tokens": 8, "max_steps": 6})
    small = too_small_to_keep_activations({"backward"})
    whole = workshop.train("whole", recipe, change=small)
    stop = Countdown(4)
    stopped = workshop.train("run", recipe, change=lambda task: replace(small(task), interrupted=stop))
    assert (stopped.status, stopped.fast_paths["recompute"]) == ("interrupted", "all but its input of 2 of 2 layers")
    run = workshop.train("run", recipe, change=small, resume=True)
    workshop.assert_same("run", "whole")
    assert run.recoveries == whole.recoveries


@pytest.mark.parametrize(
    ("recompute", "note"),
    [("all", "all but its input of 2 of 2 layers"), (1, "all but its input of 1 of 2 layers"), ("none", "no layer")],
)
def test_what_the_recipe_says_about_recomputation_is_done_from_the_start(
    workshop: Workshop, recompute: str | int, note: str
) -> None:
    whole = workshop.train("whole")
    run = workshop.train("run", workshop.recipe(training={"recompute": recompute}))
    workshop.assert_same("run", "whole")
    assert (whole.fast_paths["recompute"], run.fast_paths["recompute"]) == ("no layer", note)
    assert run.recoveries == []


def test_where_the_recipe_refuses_recomputation_memory_is_at_its_end(workshop: Workshop) -> None:
    recipe = workshop.recipe(training={"micro_batch_tokens": 8, "recompute": "none"})
    with pytest.raises(TrainingError, match="Memory ran out at step 1 even for one example"):
        workshop.train("run", recipe, change=too_small_to_keep_activations({"backward"}))


def test_offloading_is_refused_on_a_cpu(workshop: Workshop) -> None:
    with pytest.raises(RecipeError, match=r"training.offload_activations needs a GPU: .*\nDelete the line"):
        workshop.train("run", workshop.recipe(training={"offload_activations": True}))


@pytest.mark.parametrize("place", ["forward", "backward", "optimizer, half updated", "evaluation"])
def test_another_error_is_not_taken_for_memory(workshop: Workshop, place: str) -> None:
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        workshop.train("run", change=PLACES[place][0](3, error))
    assert workshop.recoveries() == []


def test_errors_that_mean_memory() -> None:
    assert all(is_out_of_memory(make()) for make in OUT_OF_MEMORY.values())
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))


# ----------------------------------------------------------------------------------------------------------- not finite


LONG = {"max_steps": 50, "batch_size": 4, "learning_rate": 1e-2, "max_recoveries": 5}


def poisoned(token: int, value: float, *, of_gradient: bool = False) -> Change:
    """A micro-batch that holds `token` has this loss (or gradient)."""

    def change(task: Task) -> Task:
        loss = task.loss

        def around(model: Any, batch: Any) -> Tensor:
            result = loss(model, batch)
            if not bool((batch.input_ids == token).any()):
                return result
            if of_gradient:
                result.register_hook(lambda gradient: gradient * value)
                return result
            return result * value

        return replace(task, loss=around)

    return change


@pytest.mark.parametrize(("value", "of_gradient"), [(float("nan"), False), (float("inf"), True)])
def test_an_example_that_is_not_finite_is_left_out_for_good(
    workshop: Workshop, value: float, of_gradient: bool
) -> None:
    """Five epochs; the bad example is met once."""
    rows = [workshop.examples.example(i)[0] for i in range(39)]
    bad = 200
    workshop.examples = ListExamples([*rows, [*rows[0][:6], bad]])
    whole = workshop.train("whole", workshop.recipe(training=LONG))
    run = workshop.train("run", workshop.recipe(training=LONG), change=poisoned(bad, value, of_gradient=of_gradient))
    assert run.status == "finished"
    assert_told(workshop, "run", run, "not_finite")
    [recovery] = run.recoveries
    assert str(float(value)) in recovery.detail or "nan" in recovery.detail
    assert f"without the examples of step {recovery.step}, learning rate x 0.5" in recovery.action
    assert recovery.step not in workshop.losses("run")
    assert len(workshop.losses("run")) == 49
    assert len(workshop.progress("run")["left_out"]) == 4
    assert run.evaluation_loss is not None
    assert whole.evaluation_loss is not None
    assert whole.base_evaluation_loss is not None
    assert whole.evaluation_loss < 0.3 * whole.base_evaluation_loss
    assert run.evaluation_loss < whole.evaluation_loss + 0.15 * whole.base_evaluation_loss


def test_a_step_right_after_one_that_was_left_out_blames_the_weights(workshop: Workshop) -> None:
    count = [0]

    def around(loss: Tensor) -> Tensor:
        count[0] += 1
        return loss * float("nan") if count[0] in (5, 6) else loss

    run = workshop.train("run", change=lambda task: with_loss(task, around))
    assert run.status == "finished"
    assert [r.step for r in run.recoveries] == [5, 6]
    assert run.recoveries[1].action.startswith("continues from step 0 without the examples of steps 4, 6")
    assert sorted(workshop.progress("run")["skipped_steps"]) == [4, 5, 6]


def test_the_last_step_left_out_is_evaluated_and_saved_all_the_same(workshop: Workshop) -> None:
    count = Countdown(10)
    run = workshop.train(
        "run", change=lambda task: with_loss(task, lambda loss: loss * float("nan") if count() else loss)
    )
    assert run.steps == 10
    assert run.checkpoints[-1].step == 10
    assert workshop.metrics("run")[-1]["event"] == "evaluation"
    assert workshop.metrics("run")[-1]["step"] == 10


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_recoveries_are_limited_in_number(workshop: Workshop, limit: int) -> None:
    with pytest.raises(TrainingError) as caught:
        workshop.train(
            "run",
            workshop.recipe(training={"max_recoveries": limit}),
            change=lambda task: with_loss(task, lambda loss: loss * float("nan")),
        )
    assert caught.value.problem.startswith(f"Training diverges: after {limit} recoveries the loss of step ")
    assert "training.learning_rate" in caught.value.remedy
    assert caught.value.exit_code == 1
    run = Run.load(workshop.folder / "run")
    assert run.status == "failed"
    assert len(run.recoveries) == limit


def test_a_held_out_loss_that_is_not_finite_is_not_the_best(workshop: Workshop) -> None:
    count = Countdown(2)

    def change(task: Task) -> Task:
        validate = task.validate
        assert validate is not None
        return replace(task, validate=lambda budget: float("nan") if count() else validate(budget))

    run = workshop.train("run", change=change)
    assert run.selected_step == 10
    assert run.evaluation_loss == workshop.progress("run")["best_loss"]


# ---------------------------------------------------------------------------------------------------------------- spike


@pytest.mark.parametrize("steps", [(20,), (20, 21), (20, 21, 22)])
def test_a_hundredfold_learning_rate_for_some_steps(
    workshop: Workshop, steps: tuple[int, ...], trained_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop.base = trained_base
    recipe = workshop.recipe(training={"max_steps": 60, "batch_size": 8, "checkpoint_steps": 100})
    whole = workshop.train("whole", recipe)
    assert whole.recoveries == []
    monkeypatch.setattr(session, "learning_rate_at", planted(steps, 100.0))
    run = workshop.train("run", recipe)
    assert_told(workshop, "run", run, "loss_spike")
    assert len(run.recoveries) == 1
    assert max(workshop.losses("run").values()) < 10.0
    assert_ends_near(run, whole)


def test_a_hundredfold_learning_rate_from_the_start(workshop: Workshop, trained_base: Path) -> None:
    workshop.base = trained_base
    training = {"max_steps": 60, "batch_size": 8, "learning_rate": 5e-3}
    whole = workshop.train("whole", workshop.recipe(training=training))
    assert whole.recoveries == []
    run = workshop.train("run", workshop.recipe(training=training | {"learning_rate": 5e-1}))
    assert_told(workshop, "run", run, "loss_spike")
    assert_ends_near(run, whole)


def assert_ends_near(run: Run, whole: Run) -> None:
    """Most of what the undisturbed run gains is gained."""
    assert run.evaluation_loss is not None
    assert whole.evaluation_loss is not None
    assert whole.base_evaluation_loss is not None
    gain = whole.base_evaluation_loss - whole.evaluation_loss
    assert gain > 0.5 * whole.base_evaluation_loss
    assert run.evaluation_loss < whole.evaluation_loss + 0.15 * gain


def test_what_was_gone_back_from_counts_for_nothing(
    workshop: Workshop, trained_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop.base = trained_base
    monkeypatch.setattr(session, "learning_rate_at", planted((20,), 100.0))
    recipe = workshop.recipe(
        training={"max_steps": 40, "batch_size": 8, "checkpoint_steps": 7}, evaluation={"every_steps": 100}
    )
    run = workshop.train("run", recipe)
    [recovery] = run.recoveries
    progress = workshop.progress("run")
    assert 20 in progress["skipped_steps"]
    assert progress["updates"] == 40 - len(progress["skipped_steps"])
    kept = {loss for step, loss in workshop.losses("run").items() if step not in progress["skipped_steps"]}
    assert set(progress["watch"]["losses"]) <= kept
    used = [e for e in workshop.events if isinstance(e, StepReport) and e.step not in progress["skipped_steps"]]
    assert run.last_loss is not None
    assert run.last_loss < 1.0
    assert {e.step for e in used} == set(range(1, 41)) - set(progress["skipped_steps"])
    assert recovery.action.startswith("continues from step 10 without the examples of steps 20, 21, 22")
    assert [c.step for c in run.checkpoints] == [35, 40]


@pytest.mark.parametrize("batch_size", [1, 16])
def test_ordinary_training_recovers_from_nothing(workshop: Workshop, batch_size: int) -> None:
    """From new weights, and with batches of one example, of a few very hard ones among easy ones."""
    workshop.examples = learnable(60, least=3, most=30)
    training = {"max_steps": 80, "batch_size": batch_size, "learning_rate": 3e-3}
    recipe = workshop.recipe(model={"weights": "random"}, adapter={"method": "full"}, training=training)
    run = workshop.train("run", recipe)
    assert run.recoveries == []
    assert run.last_loss is not None
    assert run.last_loss < 2.5
    assert WORDS == 12


# --------------------------------------------------------------------------------------------------------------- float16


@pytest.fixture
def float16(workshop: Workshop) -> Callable[..., Any]:
    def recipe(**training: Any) -> Any:
        return workshop.recipe(model={"compute": "fp16"}, training=training)

    return recipe


def test_float16_lowers_a_scale_that_is_too_large_without_a_recovery(
    workshop: Workshop, float16: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = workshop.train("whole", float16())
    assert workshop.progress("whole")["loss_scale"] == 2.0**14
    monkeypatch.setattr(session, "FIRST_LOSS_SCALE", 2.0**40)
    run = workshop.train("run", float16())
    assert run.recoveries == []
    assert run.steps == 10
    assert 2.0 <= workshop.progress("run")["loss_scale"] < 2.0**40
    assert workshop.losses("run") == pytest.approx(workshop.losses("whole"), rel=0.01)
    assert whole.evaluation_loss == pytest.approx(run.evaluation_loss, rel=0.01)
    assert workshop.losses("run")[10] < 0.8 * workshop.losses("run")[1]


def test_float16_does_not_blame_the_scale_for_what_no_scale_helps(
    workshop: Workshop, float16: Callable[..., Any]
) -> None:
    rows = [workshop.examples.example(i)[0] for i in range(39)]
    workshop.examples = ListExamples([*rows, [*rows[0][:6], 200]])
    run = workshop.train("run", float16(), change=poisoned(200, float("inf"), of_gradient=True))
    assert [r.reason for r in run.recoveries] == ["not_finite"]
    assert workshop.progress("run")["loss_scale"] == 2.0**14


def test_the_scale_grows_after_steps_without_trouble_and_is_resumed(
    workshop: Workshop, float16: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onlay.training.loop.SCALE_GROWTH_STEPS", 4)
    workshop.train("whole", float16())
    assert workshop.progress("whole")["loss_scale"] == 2.0**16
    assert workshop.progress("whole")["scale_steps"] == 2
    stop = Countdown(7)
    workshop.train("run", float16(), change=lambda task: replace(task, interrupted=stop))
    assert json.dumps(workshop.progress("run")["loss_scale"]) == "32768.0"
    workshop.train("run", float16(), resume=True)
    workshop.assert_same("run", "whole")
