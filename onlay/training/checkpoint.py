"""Checkpoints: whole or not there.  Each is a folder that appears by one rename, after everything in it is on disk, and
goes by one.

Holds the trainable weights, the optimizer's state and the loop's progress; the latest one also holds the good states
that the run could go back to, so that a resumed run goes back to the same.  No random state is kept: every step seeds
itself from (seed, step, rank), so a resumed step draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from onlay.errors import OutputError
from onlay.training.optimizer import load_optimizer_state, optimizer_state

NAME = re.compile(r"step-(\d{7})$")
UNREADABLE = (OSError, SafetensorError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError)
"""What the readers of safetensors, JSON and torch raise for a damaged file."""


class Checkpoints:
    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def path_of(self, step: int) -> Path:
        return self.folder / f"step-{step:07d}"

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(int(match[1]) for path in self.folder.iterdir() if (match := NAME.match(path.name)))

    def save(
        self,
        step: int,
        *,
        trainable: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        progress: dict[str, Any],
        snapshots: Sequence[dict[str, Any]] = (),
        best_step: int | None,
    ) -> Path:
        """Writes step's checkpoint, then removes all but the latest `keep` and the best, and any of later steps: they
        hold a state that was gone back from.

        Raises OutputError when the disk is full; earlier checkpoints are untouched then.
        """
        final = self.path_of(step)
        temporary = self.folder / f".writing-{step:07d}"
        weights = {name: p.detach().cpu().contiguous() for name, p in trainable.items()}
        try:
            self._sweep()
            temporary.mkdir(parents=True)
            save_file(weights, temporary / "weights.safetensors")
            torch.save(optimizer_state(optimizer), temporary / "optimizer.pt")
            if snapshots:
                torch.save(list(snapshots), temporary / "snapshots.pt")
            (temporary / "progress.json").write_text(json.dumps(progress, indent=1), encoding="utf-8")
            for path in [*temporary.iterdir(), temporary]:
                _to_disk(path)
            if final.exists():
                self._remove(final)
            temporary.rename(final)
            _to_disk(self.folder)
        except (OSError, SafetensorError, RuntimeError) as error:
            # torch.save reports a full disk as RuntimeError, safetensors as its own error.
            shutil.rmtree(temporary, ignore_errors=True)
            steps = self.steps()
            kept = f"The checkpoint of step {steps[-1]} is intact" if steps else "No checkpoint was written before"
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise OutputError(
                f"Step {step}'s checkpoint could not be written to {self.folder}: {reason}.",
                f"{kept}: free disk space, then onlay train --resume {self.folder.parent}",
            ) from None
        self._prune(step, best_step)
        return final

    def load(
        self, step: int, *, trainable: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer | None
    ) -> dict[str, Any]:
        """Puts step's weights (and optimizer state) in place and returns its progress.  Raises OutputError."""
        folder = self.path_of(step)
        try:
            weights = load_file(folder / "weights.safetensors")
            progress: dict[str, Any] = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
            state = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu") if optimizer else None
        except UNREADABLE as error:
            raise _unreadable(folder, error) from None
        if set(weights) != set(trainable):
            odd = sorted(set(weights) ^ set(trainable))[0]
            raise OutputError(
                f"{folder} does not fit this run: {odd} is on one side only.",
                "Was the recipe in the run folder edited?",
            )
        if optimizer is not None:
            assert state is not None
            load_optimizer_state(optimizer, state, where=str(folder))
        with torch.no_grad():
            for name, parameter in trainable.items():
                parameter.copy_(weights[name])
        return progress

    def load_snapshots(self, step: int) -> list[dict[str, Any]]:
        """The good states that step's checkpoint holds; none where it is not the latest any more.  Raises OutputError."""
        path = self.path_of(step) / "snapshots.pt"
        try:
            return torch.load(path, weights_only=True, map_location="cpu") if path.is_file() else []
        except UNREADABLE as error:
            raise _unreadable(path.parent, error) from None

    def _prune(self, latest: int, best_step: int | None) -> None:
        earlier = [step for step in self.steps() if step < latest]
        for step in earlier:
            (self.path_of(step) / "snapshots.pt").unlink(missing_ok=True)
        outdated = earlier[: len(earlier) + 1 - self.keep]
        for step in self.steps():
            if step > latest or (step in outdated and step != best_step):
                self._remove(self.path_of(step))

    def _remove(self, path: Path) -> None:
        """Gone at once: a folder that is half deleted would look like a checkpoint."""
        shutil.rmtree(path.rename(path.with_name(f".removed-{path.name}")))

    def _sweep(self) -> None:
        """What a process that was killed while it wrote or removed has left."""
        for path in self.folder.glob(".*-*"):
            shutil.rmtree(path)


def _unreadable(folder: Path, error: Exception) -> OutputError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return OutputError(f"{folder} cannot be read: {reason}.", "Delete that folder to resume from the one before.")


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
