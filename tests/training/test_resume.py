"""Interrupted at any step, in any way, and resumed: the same losses and the same bits as without the interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from onlay import stages
from onlay.errors import OutputError
from onlay.recipe import Recipe
from onlay.records import Run
from onlay.training import session
from onlay.training.checkpoint import Checkpoints
from onlay.training.loop import Task
from onlay.training.metrics_log import read_metrics
from tests.builders import proofs_of, recipe_for, write_rows
from tests.training.conftest import (
    Change,
    Countdown,
    Workshop,
    failing_backward,
    failing_optimizer,
    planted,
    uncalled,
    with_loss,
)

STEPS = 10
DROPOUT = {"dropout": 0.2}


def stopped_after(step: int) -> Change:
    """As Ctrl-C does: the loop is asked before every step, so at the (step + 1)-th question it has done `step`."""
    asked = Countdown(step + 1)
    return lambda task: replace(task, interrupted=asked)


def killed(error: BaseException, place: str, n: int) -> Change:
    """Raises at the n-th time that the loop comes by; nothing is saved on the way out, as when the process is killed."""
    count = Countdown(n, error)
    quiet = Countdown(n)

    def change(task: Task) -> Task:
        validate = task.validate
        assert validate is not None
        if place == "forward":
            return with_loss(task, lambda loss: uncalled(loss, count))
        if place == "backward":
            return with_loss(task, lambda loss: failing_backward(loss, error) if quiet() else loss)
        if place == "optimizer":
            return failing_optimizer(task, quiet, error, updated=5)
        if place == "update":
            return replace(task, after_update=lambda progress: uncalled(None, count))
        assert place == "evaluation"
        return replace(task, validate=lambda budget: uncalled(validate(budget), count))

    return change


@pytest.mark.parametrize(("interval", "dropout"), [(1, 0.0), (3, 0.2)])
def test_stopped_after_any_step(workshop: Workshop, interval: int, dropout: float) -> None:
    recipe = workshop.recipe(training={"checkpoint_steps": interval}, adapter={"dropout": dropout})
    whole = workshop.train("whole", recipe)
    for step in range(STEPS):
        name = f"stopped{step}"
        stopped = workshop.train(name, recipe, change=stopped_after(step))
        assert (stopped.status, stopped.steps) == ("interrupted", step)
        assert not (workshop.folder / name / "adapter").exists()
        run = workshop.train(name, recipe, resume=True)
        workshop.assert_same(name, "whole")
        assert run.started == stopped.started
        assert run.seconds > stopped.seconds
        unlike = {"path", "started", "seconds", "checkpoints", "peak_memory_bytes", "proofs"}
        assert proofs_of(run) == proofs_of(whole)
        assert run.model_dump(exclude=unlike) == whole.model_dump(exclude=unlike)
        assert [c.step for c in run.checkpoints] == [c.step for c in whole.checkpoints]


@pytest.mark.parametrize("place", ["forward", "backward", "optimizer", "update", "evaluation"])
def test_broken_off_in_the_middle_of_any_step(workshop: Workshop, place: str) -> None:
    recipe = workshop.recipe(adapter=DROPOUT)
    workshop.train("whole", recipe)
    for n in range(1, {"evaluation": 4}.get(place, STEPS) + 1):
        name, error = f"broken{n}", RuntimeError("broken off") if n == 5 else KeyboardInterrupt()
        with pytest.raises(type(error)):
            workshop.train(name, recipe, change=killed(error, place, n))
        assert Run.load(workshop.folder / name).status == "running"
        workshop.train(name, recipe, resume=True)
        workshop.assert_same(name, "whole")


@pytest.mark.parametrize("n", [1, 2, 4, 6])
@pytest.mark.parametrize("call", ["save_file", "fsync", "rename"])
def test_broken_off_while_a_checkpoint_is_written(
    workshop: Workshop, call: str, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = workshop.recipe()
    workshop.train("whole", recipe)
    count = Countdown(n * {"save_file": 1, "fsync": 5, "rename": 1}[call], KeyboardInterrupt())
    target: Any = {
        "save_file": "onlay.training.checkpoint.save_file",
        "fsync": "os.fsync",
        "rename": "pathlib.Path.rename",
    }
    owner, attribute = target[call].rsplit(".", 1)

    with monkeypatch.context() as patch:

        def counted(task: Task) -> Task:
            module: Any = {"os": os, "pathlib.Path": Path}.get(owner) or sys.modules[owner]
            real = getattr(module, attribute)
            patch.setattr(module, attribute, lambda *a, **k: uncalled(None, count) or real(*a, **k))
            return task

        with pytest.raises(KeyboardInterrupt):
            workshop.train("broken", recipe, change=counted)
    workshop.train("broken", recipe, resume=True)
    workshop.assert_same("broken", "whole")
    checkpoints = workshop.folder / "broken" / "checkpoints"
    assert all(path.name.startswith("step-") for path in checkpoints.iterdir())


def test_resumed_twice_and_at_the_end(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped, resumed and stopped, killed, and killed again after the last step while results are written."""
    recipe = workshop.recipe(adapter=DROPOUT)
    workshop.train("whole", recipe)
    workshop.train("run", recipe, change=stopped_after(2))
    assert workshop.train("run", recipe, change=stopped_after(3), resume=True).steps == 5
    with pytest.raises(KeyboardInterrupt):
        workshop.train("run", recipe, change=killed(KeyboardInterrupt(), "backward", 3), resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(session, "save_adapter", lambda *_, **__: Countdown(1, KeyboardInterrupt())())
        with pytest.raises(KeyboardInterrupt):
            workshop.train("run", recipe, resume=True)
    assert workshop.train("run", recipe, resume=True).status == "finished"
    workshop.assert_same("run", "whole")


def test_early_stopping_is_not_forgotten(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the run was stopped early, before its results were written: it stays stopped."""

    def change(task: Task) -> Task:
        return replace(task, validate=lambda budget: 2.0 + Countdown(1)())

    recipe = workshop.recipe(evaluation={"every_steps": 2, "patience": 2})
    whole = workshop.train("whole", recipe, change=change)
    assert whole.steps == 6
    with monkeypatch.context() as patch:
        patch.setattr(session, "save_adapter", lambda *_, **__: Countdown(1, KeyboardInterrupt())())
        with pytest.raises(KeyboardInterrupt):
            workshop.train("run", recipe, change=change)
    assert workshop.train("run", recipe, change=change, resume=True).steps == 6
    workshop.assert_same("run", "whole")


def test_the_optimizer_is_where_it_was(workshop: Workshop) -> None:
    seen: dict[str, list[float]] = {}

    def counting(name: str) -> Change:
        def change(task: Task) -> Task:
            after = task.after_update

            def noted(progress: Any) -> None:
                after(progress)
                state = next(iter(task.optimizer.state.values()))
                seen.setdefault(name, []).append((float(state["step"]), float(state["exp_avg_sq"].sum())))  # type: ignore[arg-type]

            return replace(task, after_update=noted)

        return change

    workshop.train("whole", change=counting("whole"))
    workshop.train("run", change=stopped_after(4))
    workshop.train("run", change=counting("run"), resume=True)
    assert seen["run"] == seen["whole"][4:]
    assert seen["run"][0][0] == 5.0  # type: ignore[index]


ALL_8_BIT = {"rank": 64}
"""Large enough for some of the optimizer's state to be in 8 bit."""


@pytest.mark.parametrize(
    "sections",
    [
        {"training": {"optimizer": "adamw_8bit"}, "adapter": ALL_8_BIT},
        {"adapter": {"precision": "bf16"}},
        {"training": {"optimizer": "adamw_8bit"}, "adapter": {"precision": "bf16", **ALL_8_BIT}},
        {"adapter": {"method": "lora+"}},
    ],
    ids=["8 bit", "bf16", "8 bit, bf16", "lora+"],
)
def test_every_optimizer_and_precision_goes_on_bit_by_bit(workshop: Workshop, sections: dict[str, Any]) -> None:
    recipe = workshop.recipe(**sections)
    dtypes: set[Any] = set()

    def noted(task: Task) -> Task:
        after = task.after_update

        def note(progress: Any) -> None:
            after(progress)
            for state in task.optimizer.state.values():
                dtypes.update(value.dtype for value in state.values() if isinstance(value, torch.Tensor))

        return replace(task, after_update=note)

    whole = workshop.train("whole", recipe, change=noted)
    assert (torch.uint8 in dtypes) == (recipe.training.optimizer == "adamw_8bit")
    for step in (2, 4, 9):
        name = f"stopped{step}"
        assert workshop.train(name, recipe, change=stopped_after(step)).steps == step
        workshop.train(name, recipe, resume=True)
        workshop.assert_same(name, "whole")
    assert whole.first_loss is not None
    assert whole.last_loss is not None
    assert whole.last_loss < 0.8 * whole.first_loss


@pytest.mark.parametrize(("begun", "resumed"), [("adamw", "adamw_8bit"), ("adamw_8bit", "adamw")])
def test_a_run_keeps_its_optimizer(workshop: Workshop, begun: str, resumed: str) -> None:
    workshop.train("run", workshop.recipe(training={"optimizer": begun}), change=stopped_after(3))
    with pytest.raises(OutputError, match=r"step-0000003 holds the state of .*\nA run keeps its optimizer"):
        workshop.train("run", workshop.recipe(training={"optimizer": resumed}), resume=True)


# ------------------------------------------------------------------------------------------------ after something went wrong


def test_a_spike_is_gone_back_from_alike_after_an_interruption(
    workshop: Workshop, trained_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rate is wrong at step 14, seen at 16; what is gone back to, step 10, may lie before the interruption."""
    monkeypatch.setattr(session, "learning_rate_at", planted((14,), 100.0))
    workshop.base = trained_base
    training = {"max_steps": 20, "batch_size": 16, "checkpoint_steps": 4}
    recipe = workshop.recipe(training=training, evaluation={"every_steps": 5})
    whole = workshop.train("whole", recipe)
    [recovery] = whole.recoveries
    assert recovery.action.startswith("continues from step 10 without the examples of steps 14, 15, 16")
    for asked in (9, 10, 11, 14, 15, 16, 17, 20):
        name = f"stopped{asked}"
        assert workshop.train(name, recipe, change=stopped_after(asked)).status == "interrupted"
        run = workshop.train(name, recipe, resume=True)
        workshop.assert_same(name, "whole")
        assert run.recoveries == whole.recoveries


def test_killed_after_a_recovery(workshop: Workshop) -> None:
    bad = Countdown(5)

    def change(task: Task, *, kill: int = 99) -> Task:
        seen = [0]

        def around(loss: torch.Tensor) -> torch.Tensor:
            seen[0] += 1
            if seen[0] == kill:
                raise KeyboardInterrupt
            return loss * float("nan") if bad() else loss

        return with_loss(task, around)

    recipe = workshop.recipe(training={"batch_size": 8})  # Two epochs: what is left out is left out of the second too.
    whole = workshop.train("whole", recipe, change=change)
    bad.calls, bad.fired = 0, False
    with pytest.raises(KeyboardInterrupt):
        workshop.train("run", recipe, change=lambda task: change(task, kill=8))
    run = workshop.train("run", recipe, resume=True)
    workshop.assert_same("run", "whole")
    assert run.recoveries == whole.recoveries
    assert len(run.recoveries) == 1


def test_a_disk_that_is_full_for_a_while(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = workshop.recipe()
    workshop.train("whole", recipe)
    save, count = Checkpoints.save, Countdown(3)

    def full(self: Checkpoints, *arguments: Any, **keywords: Any) -> Path:
        if not count():
            return save(self, *arguments, **keywords)
        with monkeypatch.context() as patch:
            error = OSError(28, "No space left on device")
            patch.setattr("onlay.training.checkpoint.save_file", lambda *_: Countdown(1, error)())
            return save(self, *arguments, **keywords)

    monkeypatch.setattr(Checkpoints, "save", full)
    with pytest.raises(OutputError, match=r"No space left on device.*\nThe checkpoint of step 4 is intact") as caught:
        workshop.train("run", recipe)
    assert caught.value.exit_code == 2
    stopped = Run.load(workshop.folder / "run")
    assert (stopped.status, stopped.error) == ("failed", caught.value.problem)
    assert [c.step for c in stopped.checkpoints] == [3, 4]
    assert sorted(p.name for p in (workshop.folder / "run" / "checkpoints").iterdir()) == [
        "step-0000003",
        "step-0000004",
    ]
    run = workshop.train("run", recipe, resume=True)
    assert (run.status, run.error) == ("finished", None)
    workshop.assert_same("run", "whole")


# ----------------------------------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", 120)


def slow_recipe(base: Path, data: Path, output: Path) -> Recipe:
    """Steps long enough to be interrupted between two looks at the log."""
    return recipe_for(
        base, data, adapter={"dropout": 0.1, "rank": 4}, evaluation={"split": 0.1, "every_steps": 9},
        training={"max_steps": 24, "batch_size": 32, "micro_batch_tokens": 400, "learning_rate": 1e-3, "checkpoint_steps": 5, "output": str(output)},
    )  # fmt: skip


class Command:
    """`onlay train` in a process of its own, on one thread, as the tests are."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "onlay.cli", "train", *arguments],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def send_at(self, step: int, folder: Path, number: signal.Signals) -> None:
        """Sends a signal as soon as the log holds this step."""
        deadline = time.monotonic() + 120
        while not any(e["event"] == "step" and e["step"] == step for e in read_metrics(folder / "metrics.jsonl")):
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        self.process.send_signal(number)

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=120)
        return self.process.returncode, out, err


def test_killed_killed_again_and_stopped_by_hand(tmp_path: Path, tiny_base: Path, data: Path) -> None:
    """SIGKILL before and after the first checkpoint, then Ctrl-C, then to the end: as if nothing had been."""
    torch.set_num_threads(1)
    whole = stages.train(slow_recipe(tiny_base, data, tmp_path / "whole"))
    folder = tmp_path / "run"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(slow_recipe(tiny_base, data, folder).to_yaml())

    command = Command(str(recipe))
    command.send_at(2, folder, signal.SIGKILL)
    assert command.end()[0] == -signal.SIGKILL
    assert Run.load(folder).status == "running"

    command = Command("--resume", str(folder))
    command.send_at(7, folder, signal.SIGKILL)
    assert command.end()[0] == -signal.SIGKILL
    assert max(Checkpoints(folder / "checkpoints", keep=2).steps()) < 24

    command = Command("--resume", str(folder))
    command.send_at(13, folder, signal.SIGINT)
    code, out, err = command.end()
    assert code == 130, err
    assert f"Next: onlay train --resume {folder}" in out.replace("\n", " ")
    assert "Traceback" not in err
    stopped = Run.load(folder)
    assert stopped.status == "interrupted"
    assert 13 <= stopped.steps < 24
    assert stopped.checkpoints[-1].step == stopped.steps

    code, out, err = Command("--resume", str(folder), "--json").end()
    assert code == 0, err
    run = json.loads(out)
    assert run["status"] == "finished"
    events, others = (
        [{k: v for k, v in e.items() if k != "tokens_per_second"} for e in read_metrics(path / "metrics.jsonl")]
        for path in (folder, tmp_path / "whole")
    )
    assert events == others
    assert sum(e["event"] == "step" for e in events) == 24
    weights, expected = (
        load_file(path / "adapter" / "adapter_model.safetensors") for path in (folder, tmp_path / "whole")
    )
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert run["evaluation_loss"] == whole.evaluation_loss


@pytest.fixture
def interrupted(tmp_path: Path, tiny_base: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A run folder that was stopped after two of three steps, from copies of base and data that a test may change."""
    import shutil

    def make() -> Path:
        base, rows, folder = tmp_path / "base", tmp_path / "rows.jsonl", tmp_path / "run"
        shutil.copytree(tiny_base, base)
        shutil.copy(data, rows)
        recipe = recipe_for(base, rows, training={"max_steps": 3, "batch_size": 4, "output": str(folder)})
        real = session.run_loop
        with monkeypatch.context() as patch:
            patch.setattr(session, "run_loop", lambda task, progress: real(stopped_after(2)(task), progress))
            assert stages.train(recipe).status == "interrupted"
        return folder

    return make


def test_a_finished_run_is_not_resumed(interrupted: Callable[..., Path]) -> None:
    folder = interrupted()
    assert stages.train(resume=folder).status == "finished"
    with pytest.raises(OutputError, match="is finished"):
        stages.train(resume=folder)


def test_other_rows_are_refused(interrupted: Callable[..., Path]) -> None:
    folder = interrupted()
    rows = folder.parent / "rows.jsonl"
    content = rows.read_text()
    rows.write_text(content.replace("river", "brook", 1))
    with pytest.raises(OutputError, match=r"no longer those .* was begun with"):
        stages.train(resume=folder)
    rows.write_text(content)
    assert stages.train(resume=folder).status == "finished"


def test_another_base_is_refused(interrupted: Callable[..., Path]) -> None:
    from tests.builders import save_tiny_base

    folder = interrupted()
    save_tiny_base(folder.parent / "base", seed=5)
    with pytest.raises(OutputError, match="was begun on other weights"):
        stages.train(resume=folder)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"run\.json does not exist"):
        stages.train(resume=tmp_path)
