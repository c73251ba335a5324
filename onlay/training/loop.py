"""THE training loop: batches in, trained weights out.  Read it from top to bottom; `run_loop` is the whole story.

What it works on is handed in: where batches come from, what a loss is, what is done to gradients, what guards a step.
So several devices, differential privacy or many adapters at once bring their own parts and no second loop.

The gradient of a step does not depend on how the step is cut into micro-batches, because the loss is the sum over all
trained tokens divided by their number in the whole step, over all devices.  That makes recovery cheap: when memory runs
out the cut is made finer and the same step is repeated, with the same examples and the same gradient.
"""

from __future__ import annotations

import gc
import math
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from onlay.errors import TrainingError
from onlay.records import Recovery
from onlay.training.batches import Batches
from onlay.training.checkpoint import Checkpoints
from onlay.training.devices import Devices
from onlay.training.metrics_log import MetricsLog
from onlay.training.watch import Snapshots, Watch, restore

if TYPE_CHECKING:
    from onlay.data.pack import MicroBatch

FIRST_CUT = 0.5
"""Learning rate after the first recovery from divergence ..."""
REPEATED_CUT = 0.1
"""... and after one that follows within HEALTHY_STEPS: then the rate itself is likely the cause."""
HEALTHY_STEPS = 20
MAX_OPTIMIZER_RETRIES = 3
FIRST_LOSS_SCALE = 2.0**14
SCALE_GROWTH_STEPS = 200


@dataclass(slots=True)
class Progress:
    """Everything the loop must remember over an interruption, beside weights and optimizer state."""

    step: int = 0
    """Last optimizer step that is done (or skipped)."""
    budget_tokens: int = 0
    rate_scale: float = 1.0
    skipped_steps: list[int] = field(default_factory=list)
    recoveries: list[dict[str, Any]] = field(default_factory=list)
    divergences: int = 0
    loss_scale: float = 1.0
    scale_steps: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0
    base_loss: float | None = None
    last_evaluation: float | None = None
    updates: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    watch: dict[str, Any] = field(default_factory=dict)
    proofs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    step: int
    total_steps: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    seconds: float
    memory_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """The parts of a run."""

    model: nn.Module
    trainable: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    batches: Batches
    total_steps: int
    learning_rate: Callable[[int], float]
    """Step (1 is the first) to the planned rate."""
    loss: Callable[[nn.Module, MicroBatch], Tensor]
    """Sum of nats over the trained tokens of a micro-batch, a scalar that can be differentiated."""
    finish_gradient: Callable[[float], float]
    """Given the loss scale: sums gradients over devices, takes the scale out, clips; returns the norm before clipping."""
    validate: Callable[[int], float] | None
    """Given a token budget: nats per trained token on held-out rows."""
    after_update: Callable[[Progress], None]
    """Called after every update, for the proofs."""
    interrupted: Callable[[], bool]
    report: Callable[[StepReport | Recovery | str], None]
    devices: Devices
    watch: Watch
    snapshots: Snapshots
    checkpoints: Checkpoints
    metrics: MetricsLog | None
    """None on all ranks but the first."""
    seed: int
    checkpoint_steps: int
    evaluation_steps: int
    patience: int | None
    max_recoveries: int
    longest_held_out_tokens: int = 0


def run_loop(task: Task, progress: Progress) -> str:
    """Trains from `progress` to the end.  Returns finished, stopped_early or interrupted; raises TrainingError."""
    began = time.perf_counter() - progress.seconds
    if progress.watch:
        task.watch.load(progress.watch)
    if progress.step == 0 and progress.base_loss is None and task.validate is not None:
        progress.base_loss = progress.last_evaluation = _evaluate(task, progress)
    task.snapshots.take(progress.step, task.trainable, task.optimizer, task.watch)
    optimizer_failures = 0

    while progress.step < task.total_steps:
        progress.seconds = time.perf_counter() - began
        if task.devices.largest(int(task.interrupted())):
            _save(task, progress)
            return "interrupted"
        step = progress.step + 1
        if step in progress.skipped_steps:
            progress.step = step
            continue
        step_began = time.perf_counter()

        loss = _gradient(task, progress, step)
        if not math.isfinite(loss):
            _recover(task, progress, step, "not_finite", f"the loss of step {step} is {loss}", bad_steps=[step])
            continue
        grad_norm = task.finish_gradient(progress.loss_scale)
        if not math.isfinite(grad_norm):
            if progress.loss_scale > 1.0:  # float16: the scale was too large, which says nothing about the step
                progress.loss_scale /= 2.0
                progress.scale_steps = 0
                continue
            _recover(task, progress, step, "not_finite", f"the gradient norm of step {step} is {grad_norm}", bad_steps=[step])
            continue
        if task.watch.judge(step, loss) == "spike":
            high = list(task.watch.high_steps)
            detail = f"the loss rose to {loss:.3f} at steps {high}; the limit was {task.watch.limit():.3f}"
            _recover(task, progress, step, "loss_spike", detail, bad_steps=high)
            continue

        rate = task.learning_rate(step) * progress.rate_scale
        if not _update(task, rate):
            optimizer_failures += 1
            if optimizer_failures > MAX_OPTIMIZER_RETRIES:
                raise _out_of_memory_error(step, "the optimizer's step")
            _go_back(task, progress, step - 1)
            _record(task, progress, step, "out_of_memory", "memory ran out in the optimizer's step",
                    f"went back to step {progress.step} and repeats from there")
            continue
        optimizer_failures = 0
        progress.step = step
        progress.updates += 1
        progress.trained_tokens += task.batches.trained_tokens(step)
        _grow_scale(progress)
        task.after_update(progress)

        tokens = task.batches.tokens(step)
        seconds = time.perf_counter() - step_began
        report = StepReport(step=step, total_steps=task.total_steps, loss=loss, learning_rate=rate, grad_norm=grad_norm,
                            tokens=tokens, seconds=seconds, memory_bytes=peak_memory_bytes(task.devices.device))
        task.report(report)
        if task.metrics is not None:
            task.metrics.write("step", step, loss=loss, learning_rate=rate, grad_norm=grad_norm, tokens=tokens,
                               tokens_per_second=round(tokens / seconds, 1))
        if task.snapshots.due(step) and not task.watch.high_steps:
            task.snapshots.take(step, task.trainable, task.optimizer, task.watch)

        last = step == task.total_steps
        improved = False
        if task.validate is not None and (last or step % task.evaluation_steps == 0):
            improved = _evaluate_and_compare(task, progress)
        progress.seconds = time.perf_counter() - began
        enough = task.patience is not None and progress.evaluations_without_gain >= task.patience
        if last or improved or enough or step % task.checkpoint_steps == 0:
            _save(task, progress)
        if enough and not last:
            return "stopped_early"
    progress.seconds = time.perf_counter() - began
    return "finished"


def _gradient(task: Task, progress: Progress, step: int) -> float:
    """Leaves the step's gradient, times the loss scale, in .grad; returns nats per trained token over all devices.

    When memory runs out, on any device, all of them halve the token budget and repeat the step.
    """
    total = task.batches.trained_tokens(step)
    while True:
        task.optimizer.zero_grad(set_to_none=True)
        # The step's own randomness (dropout), whatever happened before it.
        torch.manual_seed((task.seed * 1_000_003 + step) * 1_009 + task.devices.rank)
        nats = torch.zeros((), dtype=torch.float64, device=task.devices.device)
        out_of_memory = False
        try:
            for micro_batch in task.batches.micro_batches(step, progress.budget_tokens):
                loss = task.loss(task.model, micro_batch)
                (loss * (progress.loss_scale / total)).backward()
                nats += loss.detach().double()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            out_of_memory = True
        if not task.devices.largest(int(out_of_memory)):
            return task.devices.sum(float(nats)) / total
        loss = nats = None  # type: ignore[assignment]
        _halve_budget(task, progress, step, f"memory ran out in step {step}", longest=task.batches.longest(step),
                      tokens=task.batches.tokens(step))


def _update(task: Task, rate: float) -> bool:
    """One optimizer step; False when memory ran out in it on any device (weights may then be half updated)."""
    out_of_memory = False
    for group in task.optimizer.param_groups:
        group["lr"] = rate
    try:
        task.optimizer.step()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        out_of_memory = True
    return not task.devices.largest(int(out_of_memory))


def _evaluate(task: Task, progress: Progress) -> float:
    assert task.validate is not None
    while True:
        out_of_memory = False
        loss = math.nan
        try:
            loss = task.validate(progress.budget_tokens)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            out_of_memory = True
        if not task.devices.largest(int(out_of_memory)):
            if task.metrics is not None:
                task.metrics.write("evaluation", progress.step, loss=loss)
            task.report(f"held-out loss {loss:.4f} at step {progress.step}")
            return loss
        _halve_budget(task, progress, progress.step, f"memory ran out in the evaluation after step {progress.step}",
                      longest=task.longest_held_out_tokens, tokens=progress.budget_tokens)


def _evaluate_and_compare(task: Task, progress: Progress) -> bool:
    loss = progress.last_evaluation = _evaluate(task, progress)
    if progress.best_loss is None or loss < progress.best_loss:
        progress.best_loss, progress.best_step = loss, progress.step
        progress.evaluations_without_gain = 0
        return True
    progress.evaluations_without_gain += 1
    return False


def _halve_budget(task: Task, progress: Progress, step: int, detail: str, *, longest: int, tokens: int) -> None:
    task.optimizer.zero_grad(set_to_none=True)
    _free_memory()
    if progress.budget_tokens <= longest:
        raise _out_of_memory_error(step, f"one example of {longest} tokens")
    before = progress.budget_tokens
    # Below the longest example a smaller budget changes nothing.
    progress.budget_tokens = max(min(before, tokens) // 2, longest)
    _record(task, progress, step, "out_of_memory", detail,
            f"micro-batches of at most {progress.budget_tokens} tokens instead of {before}; the same step is repeated")


def _recover(task: Task, progress: Progress, step: int, reason: str, detail: str, *, bad_steps: list[int]) -> None:
    """Goes back to the last good state, lowers the learning rate and leaves the bad steps' examples out."""
    task.optimizer.zero_grad(set_to_none=True)
    if progress.divergences >= task.max_recoveries:
        raise TrainingError(
            f"Training diverges: after {progress.divergences} recoveries {detail}.",
            "Lower training.learning_rate, look at the examples of these steps (onlay show RUN), or set adapter.dropout to 0.",
        )
    progress.divergences += 1
    last = max((s for s in progress.skipped_steps if s < bad_steps[0]), default=None)
    repeated = last is not None and bad_steps[0] - last <= HEALTHY_STEPS
    progress.rate_scale *= REPEATED_CUT if repeated else FIRST_CUT
    # A loss that is not finite was seen before its update, so the weights are still good, unless the step before it was
    # bad too.  A spike shows one step after the update that caused it: go back to before that.
    good_step = step - 1 if reason == "not_finite" and last != step - 1 else bad_steps[0] - 2
    if not (reason == "not_finite" and good_step == step - 1):
        _go_back(task, progress, good_step)
    progress.skipped_steps = sorted({*progress.skipped_steps, *bad_steps})
    task.watch.high_steps = []
    _record(task, progress, step, reason, detail,
            f"continues from step {progress.step} without the examples of steps {bad_steps}, learning rate x {progress.rate_scale:g}")
    _save(task, progress)


def _go_back(task: Task, progress: Progress, step: int) -> None:
    snapshot = task.snapshots.before(step)
    if snapshot is None:
        raise TrainingError("There is no good state to go back to.", "Lower training.learning_rate and start again.")
    task.optimizer.zero_grad(set_to_none=True)
    _free_memory()
    restore(snapshot, task.trainable, task.optimizer, task.watch)
    progress.step = snapshot.step
    task.snapshots.forget_after(snapshot.step)
    if task.devices.is_main:
        task.checkpoints.forget_after(snapshot.step)
    if progress.best_step is not None and progress.best_step > snapshot.step:
        progress.best_loss = progress.best_step = None


def _record(task: Task, progress: Progress, step: int, reason: str, detail: str, action: str) -> None:
    recovery = Recovery(step=step, reason=reason, detail=detail, action=action)
    progress.recoveries.append(recovery.model_dump())
    task.report(recovery)
    if task.metrics is not None:
        task.metrics.write("recovery", step, reason=reason, detail=detail, action=action)


def _save(task: Task, progress: Progress) -> None:
    progress.watch = task.watch.state()
    if task.devices.is_main:
        task.checkpoints.save(progress.step, trainable=task.trainable, optimizer=task.optimizer,
                              progress=asdict(progress), best_step=progress.best_step)
    task.devices.wait()


def _grow_scale(progress: Progress) -> None:
    if progress.loss_scale == 1.0:
        return
    progress.scale_steps += 1
    if progress.scale_steps >= SCALE_GROWTH_STEPS:
        progress.loss_scale, progress.scale_steps = progress.loss_scale * 2.0, 0


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA's error, Python's, or the CPU allocator's, which is a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _out_of_memory_error(step: int, what: str) -> TrainingError:
    return TrainingError(
        f"Memory ran out at step {step} even for {what}.",
        "Lower data.max_tokens or adapter.rank, or use a smaller base; then start again.",
    )


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory in use so far: allocated on the GPU, or resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
