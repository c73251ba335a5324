"""Checkpoints: whole or not there, whatever happens while they are written or removed."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from onlay.errors import OutputError
from onlay.training import checkpoint as module
from onlay.training.checkpoint import Checkpoints


class State:
    """Something to save: two weights, AdamW after some updates."""

    def __init__(self, updates: int, size: int = 8) -> None:
        torch.manual_seed(updates)
        self.trainable = {"a": nn.Parameter(torch.randn(size, 2)), "b": nn.Parameter(torch.randn(2))}
        self.optimizer = torch.optim.AdamW(self.trainable.values(), lr=0.1)
        for _ in range(updates):
            sum((p**2).sum() for p in self.trainable.values()).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def save(self, checkpoints: Checkpoints, step: int, *, best: int | None = None, **more: Any) -> Path:
        return checkpoints.save(
            step, trainable=self.trainable, optimizer=self.optimizer, progress={"step": step}, best_step=best, **more
        )


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The kernel refuses to write files beyond this size, as it refuses to write to a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    checkpoints, saved, loaded = Checkpoints(tmp_path / "c", keep=2), State(3), State(1)
    folder = saved.save(checkpoints, 12, snapshots=[{"step": 6, "weights": dict(saved.trainable), "state": {"x": [1]}}])
    assert folder.name == "step-0000012"
    assert names(tmp_path / "c") == ["step-0000012"]
    assert checkpoints.steps() == [12]
    progress = checkpoints.load(12, trainable=loaded.trainable, optimizer=loaded.optimizer)
    assert progress == {"step": 12}
    assert all(torch.equal(loaded.trainable[name], saved.trainable[name]) for name in saved.trainable)
    for parameter, other in zip(loaded.trainable.values(), saved.trainable.values(), strict=True):
        state, expected = loaded.optimizer.state[parameter], saved.optimizer.state[other]
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in state)
        assert float(state["step"]) == 3.0
    [snapshot] = checkpoints.load_snapshots(12)
    assert torch.equal(snapshot["weights"]["a"], saved.trainable["a"])
    assert snapshot["state"] == {"x": [1]}


def test_the_latest_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints, state = Checkpoints(tmp_path, keep=2), State(1)
    kept = []
    for step, best in ((1, 1), (2, 1), (3, 1), (4, 4), (5, 4), (6, 4), (7, 4)):
        state.save(checkpoints, step, best=best, snapshots=[{"step": 0}])
        kept.append(checkpoints.steps())
    assert kept == [[1], [1, 2], [1, 2, 3], [3, 4], [4, 5], [4, 5, 6], [4, 6, 7]]
    assert [step for step in (4, 6, 7) if checkpoints.load_snapshots(step)] == [7]
    assert names(tmp_path) == ["step-0000004", "step-0000006", "step-0000007"]


def test_one_checkpoint_is_kept_when_one_is_asked_for(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in (3, 6, 6):
        State(1).save(checkpoints, step)
        assert checkpoints.steps() == [step]


def test_later_steps_go_when_the_run_went_back(tmp_path: Path) -> None:
    checkpoints, state = Checkpoints(tmp_path, keep=2), State(1)
    for step in (2, 4, 6):
        state.save(checkpoints, step, best=2)
    state.save(checkpoints, 3, best=2)
    assert checkpoints.steps() == [2, 3]


@pytest.mark.parametrize("size", [0, 100, 700, 2500])
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, size: int) -> None:
    """The real thing: each size makes another of the files fail, by another library's own error."""
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", keep=1)
    State(1, size=100).save(checkpoints, 3)
    before = {path.name: path.read_bytes() for path in checkpoints.path_of(3).iterdir()}
    with pytest.raises(OutputError) as caught, files_of_at_most(size):
        State(2, size=100).save(checkpoints, 6)
    assert caught.value.problem.startswith(f"Step 6's checkpoint could not be written to {checkpoints.folder}: ")
    assert "\n" not in caught.value.problem
    assert caught.value.remedy == (
        f"The checkpoint of step 3 is intact: free disk space, then onlay train --resume {tmp_path / 'run'}"
    )
    assert names(checkpoints.folder) == ["step-0000003"]
    assert {path.name: path.read_bytes() for path in checkpoints.path_of(3).iterdir()} == before
    State(2, size=100).save(checkpoints, 6)
    assert checkpoints.steps() == [6]


def test_a_full_disk_before_the_first_checkpoint_says_so(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    with pytest.raises(OutputError, match="No checkpoint was written before"), files_of_at_most(10):
        State(1).save(checkpoints, 3)
    assert checkpoints.steps() == []


@pytest.mark.parametrize("call", ["rename", "rmtree", "fsync", "save_file"])
def test_killed_anywhere_there_is_a_whole_checkpoint(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stops dead at every call of a kind in turn, as a kill would; the same step is written over, the older removed."""

    class Killed(BaseException):
        pass

    real = {"rename": Path.rename, "rmtree": shutil.rmtree, "fsync": os.fsync, "save_file": module.save_file}[call]
    owner: Any = {"rename": Path, "rmtree": shutil, "fsync": os, "save_file": module}[call]
    deaths = 0
    for n in range(20):
        folder = tmp_path / str(n)
        checkpoints = Checkpoints(folder, keep=2)
        for step in (2, 4, 6):
            State(step).save(checkpoints, step)
        calls = 0

        def counted(*arguments: Any, n: int = n, **keywords: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == n + 1:
                if call == "rmtree":  # It dies half-way.
                    next(Path(arguments[0]).iterdir(), Path(arguments[0]) / "none").unlink(missing_ok=True)
                raise Killed
            return real(*arguments, **keywords)

        with monkeypatch.context() as patch:
            patch.setattr(owner, call, counted)
            try:
                State(8).save(checkpoints, 8)
                State(5).save(checkpoints, 6)
            except Killed:
                deaths += 1
            else:
                break
        assert checkpoints.steps()
        for step in checkpoints.steps():
            state = State(0)
            assert checkpoints.load(step, trainable=state.trainable, optimizer=state.optimizer) == {"step": step}
            checkpoints.load_snapshots(step)
        State(9).save(checkpoints, 10)
        assert checkpoints.steps()[-1] == 10
        assert all(name.startswith("step-") for name in names(folder))
    assert deaths >= 1


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.pt", "progress.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, name: str, damage: str) -> None:
    checkpoints, state = Checkpoints(tmp_path, keep=1), State(2)
    path = state.save(checkpoints, 3) / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    with pytest.raises(OutputError, match=r"step-0000003 cannot be read: .*\nDelete that folder"):
        checkpoints.load(3, trainable=state.trainable, optimizer=state.optimizer)


def test_weights_of_another_adapter_are_refused(tmp_path: Path) -> None:
    checkpoints, state = Checkpoints(tmp_path, keep=1), State(1)
    state.save(checkpoints, 3)
    with pytest.raises(OutputError, match="b is on one side only"):
        checkpoints.load(3, trainable={"a": state.trainable["a"]}, optimizer=None)
