"""Guards a run: tells when the loss has gone wrong, and keeps good states to go back to.

Two rules.  A **spike**: the loss is above a limit in a few steps in a row.  The limit is six deviations above the
median, and one nat above nine tenths, of the last losses, so that neither one hard batch nor a data set with many hard
examples is a spike.  A **level**: the mean of the last losses is a nat, and three deviations, above the lowest that it has
been, which is what a learning rate that is too large ends in when it does not explode.  Both count examples, not steps:
with batches of one example it takes more steps to be sure.  Deviations are taken from the differences of neighbours, so
that a falling loss is not taken for a noisy one.

OLMo-core skips steps above mean + 6 sigma, PaLM restarted before a spike and skipped its batches; this goes back and
skips, inside the run.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from onlay.training.optimizer import load_optimizer_state, optimizer_state

WINDOW_STEPS = 32
MIN_HISTORY_STEPS = 8
SPIKE_SIGMAS = 6.0
LEVEL_SIGMAS = 3.0
LEAST_RISE_NATS = 1.0
EARLY_RISE_NATS = 3.0
"""Above all losses so far, while there are fewer than MIN_HISTORY_STEPS."""
SPIKE_EXAMPLES = 16
LEVEL_EXAMPLES = 128
MIN_LEVEL_STEPS = 16


@dataclass(frozen=True, slots=True)
class Alarm:
    steps: list[int]
    """The first steps that show it, in order."""
    detail: str


class Watch:
    """Judges the loss of each step, before its update."""

    def __init__(self, *, batch_size: int) -> None:
        self.spike_steps = max(2, math.ceil(SPIKE_EXAMPLES / batch_size))
        """High losses in a row that make a spike."""
        self.level_steps = max(MIN_LEVEL_STEPS, math.ceil(LEVEL_EXAMPLES / batch_size))
        """Losses whose mean is the level."""
        self._losses: deque[float] = deque(maxlen=WINDOW_STEPS)
        self._high: list[tuple[int, float]] = []
        self._recent: deque[tuple[int, float]] = deque(maxlen=self.level_steps)
        self._lowest_level: float | None = None

    @property
    def lag_steps(self) -> int:
        """From an update that does harm until it is known: a good state is at least so old."""
        return max(self.spike_steps, self.level_steps // 2) + 2

    @property
    def high_steps(self) -> list[int]:
        """Steps in a row with a high loss, up to the latest."""
        return [step for step, _ in self._high]

    def limit(self) -> float:
        """Loss above which a step is suspicious; infinite before the first loss is known."""
        if not self._losses:
            return math.inf
        if len(self._losses) < MIN_HISTORY_STEPS:
            return max(self._losses) + EARLY_RISE_NATS
        nine_tenths = sorted(self._losses)[math.ceil(0.9 * len(self._losses)) - 1]
        median = statistics.median(self._losses)
        return max(median + SPIKE_SIGMAS * _deviation(self._losses), nine_tenths + LEAST_RISE_NATS)

    def judge(self, step: int, loss: float) -> Alarm | None:
        """Takes note of a step's loss.  An alarm means that it is time to go back."""
        limit = self.limit()
        self._recent.append((step, min(loss, limit)))  # One very hard batch is not to move the mean.
        if loss > limit:
            self._high.append((step, loss))
            if len(self._high) >= self.spike_steps:
                return Alarm(self.high_steps, f"the loss rose to {loss:.3f}, above the limit of {limit:.3f}")
        else:
            # What a normal loss follows was noise, and noise is part of what is normal.
            self._losses.extend(high for _, high in self._high)
            self._losses.append(loss)
            self._high = []
        return self._above_level()

    def _above_level(self) -> Alarm | None:
        losses = [loss for _, loss in self._recent]
        level = statistics.fmean(losses)
        if len(losses) < self.level_steps:
            if len(losses) == self.level_steps // 8 and self._lowest_level is None:
                self._lowest_level = level  # Where the run began.
            return None
        assert self._lowest_level is not None
        deviation = max(_deviation(losses), _deviation(self._losses))
        allowed = self._lowest_level + max(LEAST_RISE_NATS, LEVEL_SIGMAS * deviation)
        lowest, self._lowest_level = self._lowest_level, min(self._lowest_level, level)
        if level <= allowed:
            return None
        steps = [step for step, loss in self._recent if loss > allowed][: self.spike_steps]
        return Alarm(steps, f"the loss rose from {lowest:.3f} to {level:.3f} on average of {len(losses)} steps")

    def state(self) -> dict[str, Any]:
        return {
            "losses": list(self._losses),
            "high": list(self._high),
            "recent": list(self._recent),
            "lowest_level": self._lowest_level,
        }

    def load(self, state: dict[str, Any]) -> None:
        self._losses = deque(state["losses"], maxlen=WINDOW_STEPS)
        self._high = [(step, loss) for step, loss in state["high"]]
        self._recent = deque(((step, loss) for step, loss in state["recent"]), maxlen=self.level_steps)
        self._lowest_level = state["lowest_level"]


def _deviation(losses: Iterable[float]) -> float:
    """Standard deviation of what is left of these losses without their trend (von Neumann's estimate)."""
    squares = [(after - before) ** 2 for before, after in itertools.pairwise(losses)]
    return math.sqrt(statistics.fmean(squares) / 2.0) if squares else 0.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    step: int
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    state: dict[str, Any]
    """What else the loop and the watch knew after `step`."""


class Snapshots:
    """The last few good states in host memory, taken every `every_steps` steps."""

    KEEP = 2

    def __init__(self, *, every_steps: int) -> None:
        self.every_steps = every_steps
        self._kept: list[Snapshot] = []

    def due(self, step: int) -> bool:
        return step % self.every_steps == 0

    def take(
        self,
        step: int,
        *,
        trainable: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
    ) -> None:
        """Copies the state after `step`.  A state with a value that is not finite is no good state and is not kept."""
        if not all(bool(torch.isfinite(p).all()) for p in trainable.values()):
            return
        weights = {name: p.detach().to("cpu", copy=True) for name, p in trainable.items()}
        snapshot = Snapshot(step, weights, _copied(optimizer_state(optimizer)), state)
        self._kept = [s for s in self._kept if s.step < step][-(self.KEEP - 1) :] + [snapshot]

    def before(self, step: int) -> Snapshot | None:
        """The newest state at most at `step`; else the oldest there is."""
        earlier = [s for s in self._kept if s.step <= step]
        if earlier:
            return earlier[-1]
        return self._kept[0] if self._kept else None

    def forget_after(self, step: int) -> None:
        self._kept = [s for s in self._kept if s.step <= step]

    def stored(self, step: int) -> list[dict[str, Any]]:
        """What a checkpoint of `step` holds of them: all but the one of `step`, which the checkpoint is itself."""
        return [
            {"step": s.step, "weights": s.weights, "optimizer": s.optimizer, "state": s.state}
            for s in self._kept
            if s.step != step
        ]

    def load(self, stored: Sequence[dict[str, Any]]) -> None:
        self._kept = [Snapshot(**values) for values in stored]


def restore(snapshot: Snapshot, *, trainable: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(snapshot.weights[name])
    # Copied again: the optimizer updates what it is given in place, and a snapshot may be needed twice.
    load_optimizer_state(optimizer, _copied(snapshot.optimizer), where=f"the good state of step {snapshot.step}")


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copied(item) for item in value]
    return value
