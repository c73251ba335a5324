"""Guards a run: tells when a step has gone wrong, and keeps good states to go back to.

A spike is judged against the running median and median absolute deviation, so one hard batch is no spike: it takes two
steps in a row above the limit.  OLMo-core skips steps above mean + 6 sigma, PaLM restarted before a spike and skipped its
batches; this does both, inside the run.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

WINDOW_STEPS = 64
MIN_HISTORY_STEPS = 8
SIGMAS = 6.0
LEAST_RISE_NATS = 1.0
EARLY_RISE_NATS = 3.0
PATIENCE_STEPS = 2


@dataclass(slots=True)
class Watch:
    """Losses of accepted steps, and how many in a row were too high."""

    losses: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW_STEPS))
    high_steps: list[int] = field(default_factory=list)
    """Steps in a row whose loss was above the limit, up to the latest."""

    def limit(self) -> float:
        """Loss above which a step is suspicious; infinite before the first loss is known."""
        if not self.losses:
            return math.inf
        if len(self.losses) < MIN_HISTORY_STEPS:
            return max(self.losses) + EARLY_RISE_NATS
        median = statistics.median(self.losses)
        deviation = 1.4826 * statistics.median(abs(loss - median) for loss in self.losses)
        return median + max(SIGMAS * deviation, LEAST_RISE_NATS)

    def judge(self, step: int, loss: float) -> str:
        """`ok`, `high` (suspicious, go on) or `spike` (the second in a row: go back)."""
        if loss <= self.limit():
            self.losses.append(loss)
            self.high_steps = []
            return "ok"
        self.high_steps.append(step)
        return "spike" if len(self.high_steps) >= PATIENCE_STEPS else "high"

    def state(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "high_steps": list(self.high_steps)}

    def load(self, state: dict[str, Any]) -> None:
        self.losses = deque(state["losses"], maxlen=WINDOW_STEPS)
        self.high_steps = list(state["high_steps"])


@dataclass(frozen=True, slots=True)
class Snapshot:
    step: int
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    watch: dict[str, Any]


class Snapshots:
    """The last few good states in host memory, taken every `every_steps` steps."""

    KEEP = 3

    def __init__(self, *, every_steps: int) -> None:
        self.every_steps = every_steps
        self._kept: list[Snapshot] = []

    def due(self, step: int) -> bool:
        return step % self.every_steps == 0

    def take(self, step: int, trainable: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, watch: Watch) -> None:
        """Copies the state after `step`.  A state with a value that is not finite is no good state and is not kept."""
        if not all(bool(torch.isfinite(p).all()) for p in trainable.values()):
            return
        weights = {name: p.detach().to("cpu", copy=True) for name, p in trainable.items()}
        snapshot = Snapshot(step, weights, _copied(optimizer.state_dict()), watch.state())
        self._kept = [s for s in self._kept if s.step < step][-(self.KEEP - 1) :] + [snapshot]

    def before(self, step: int) -> Snapshot | None:
        """The newest state at most at `step`; else the oldest there is."""
        earlier = [s for s in self._kept if s.step <= step]
        if earlier:
            return earlier[-1]
        return self._kept[0] if self._kept else None

    def forget_after(self, step: int) -> None:
        self._kept = [s for s in self._kept if s.step <= step]


def restore(snapshot: Snapshot, trainable: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, watch: Watch) -> None:
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(snapshot.weights[name])
    # Copied again: the optimizer updates what it is given in place, and a snapshot may be needed twice.
    optimizer.load_state_dict(_copied(snapshot.optimizer))
    watch.load(snapshot.watch)


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copied(item) for item in value]
    return value
