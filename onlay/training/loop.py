"""THE training loop: batches in, trained weights out.  Read it from top to bottom; `run_loop` is the whole story.

What it works on is handed in: where batches come from, what a loss is, what is done to gradients, what guards a step.
So several devices, differential privacy or many adapters at once bring their own parts and no second loop.

The gradient of a step does not depend on how the step is cut into micro-batches, because the loss is the sum over all
trained tokens divided by their number in the whole step, over all devices.  That makes recovery cheap: when memory runs
out the cut is made finer and the same step is repeated, with the same examples and the same gradient; and when it cannot be
made finer, layers compute their activations again instead of keeping them, which does not change the gradient either.
"""

from __future__ import annotations

import gc
import itertools
import math
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

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
"""... and after a spike that follows within HEALTHY_STEPS: then the rate itself is likely the cause."""
HEALTHY_STEPS = 20
MAX_REPEATS = 3
"""Of a step for which memory does not suffice and that cannot be cut finer."""
FIRST_LOSS_SCALE = 2.0**14
LEAST_LOSS_SCALE = 2.0
"""A scale of 1 means that there is none."""
SCALE_GROWTH_STEPS = 200


@dataclass(slots=True)
class Progress:
    """Everything the loop must remember over an interruption, beside weights and optimizer state."""

    step: int = 0
    """Last optimizer step that is done (or skipped)."""
    budget_tokens: int = 0
    rate_scale: float = 1.0
    skipped_steps: list[int] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)
    """Examples that are left out of later epochs too."""
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
    broken_updates: list[int] = field(default_factory=list)
    """Steps at which memory ran out in the optimizer."""
    levels: list[str] = field(default_factory=list)
    """What each layer keeps for the backward pass (onlay/model/keep.py), where that is not all of it."""
    metrics_bytes: int = 0
    """Length of the metrics log: what stands behind is of work that was lost."""
    watch: dict[str, Any] = field(default_factory=dict)
    proofs: dict[str, Any] = field(default_factory=dict)


OUT_OF_MEMORY_TEXTS = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


PATH_FIELDS = (
    "step", "loss_scale", "scale_steps", "best_loss", "best_step", "evaluations_without_gain", "last_evaluation",
    "updates", "trained_tokens",
)  # fmt: skip
"""What going back sets back; the rest of Progress is what was learned on the way and stays."""


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


class TokenLoss(Protocol):
    note: str
    """How it is computed, in words, for the Run."""

    def __call__(self, model: nn.Module, batch: MicroBatch, /) -> Tensor:
        """Sum of nats over the trained tokens of a micro-batch, a scalar that can be differentiated."""


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
    loss: TokenLoss
    finish_gradient: Callable[[float], float]
    """Given the loss scale: sums gradients over devices, takes the scale out, clips; returns the norm before clipping."""
    validate: Callable[[int], float] | None
    """Given a token budget: nats per trained token on held-out rows."""
    after_update: Callable[[Progress], None]
    """Called after every update, for the proofs."""
    save_memory: Callable[[Progress], str | None]
    """Asked when nothing else helps: does what saves memory for more work, notes it in `progress` and says it in words;
    None when nothing is left.  The gradient stays the same."""
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
    task.batches.left_out = frozenset(progress.left_out)
    if progress.watch:
        task.watch.load(progress.watch)
    if progress.step == 0 and progress.base_loss is None and task.validate is not None:
        progress.base_loss = progress.last_evaluation = _evaluate(task, progress)
    _keep_good_state(task, progress)

    while progress.step < task.total_steps:
        progress.seconds = time.perf_counter() - began
        if _out_of_patience(task, progress):
            return "stopped_early"
        if task.devices.largest(int(task.interrupted())):
            _save(task, progress)
            return "interrupted"
        step = progress.step + 1
        if step not in progress.skipped_steps and not _train_step(task, progress, step):
            continue  # Recovered from something: `progress` says where to go on.
        progress.step = step
        _keep_good_state(task, progress)

        last = step == task.total_steps
        improved = False
        if task.validate is not None and (last or step % task.evaluation_steps == 0):
            improved = _evaluate_and_compare(task, progress)
        progress.seconds = time.perf_counter() - began
        if last or improved or step % task.checkpoint_steps == 0 or _out_of_patience(task, progress):
            _save(task, progress)
    return "finished"


def _train_step(task: Task, progress: Progress, step: int) -> bool:
    """One optimizer step.  False when it was not taken, because something went wrong and was recovered from."""
    began = time.perf_counter()
    if not len(task.batches.indices(step)):
        return True  # All of its examples are left out.
    loss, grad_norm = _finished_gradient(task, progress, step)
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        what = (
            f"gradient norm of step {step} is {grad_norm}" if math.isfinite(loss) else f"loss of step {step} is {loss}"
        )
        _recover(task, progress, step, "not_finite", f"the {what}", bad_steps=[*task.watch.high_steps, step])
        return False
    if alarm := task.watch.judge(step, loss):
        _recover(task, progress, step, "loss_spike", alarm.detail, bad_steps=alarm.steps)
        return False

    rate = task.learning_rate(step) * progress.rate_scale
    if not _update(task, rate):
        _repeat_update(task, progress, step)
        return False
    progress.updates += 1
    progress.trained_tokens += task.batches.trained_tokens(step)
    _grow_scale(progress)
    task.after_update(progress)

    tokens = task.batches.tokens(step)
    seconds = time.perf_counter() - began
    report = StepReport(
        step=step,
        total_steps=task.total_steps,
        loss=loss,
        learning_rate=rate,
        grad_norm=grad_norm,
        tokens=tokens,
        seconds=seconds,
        memory_bytes=peak_memory_bytes(task.devices.device),
    )
    task.report(report)
    if task.metrics is not None:
        task.metrics.write(
            "step",
            step,
            loss=loss,
            learning_rate=rate,
            grad_norm=grad_norm,
            tokens=tokens,
            tokens_per_second=round(tokens / seconds, 1),
        )
    return True


def _gradient(task: Task, progress: Progress, step: int) -> float:
    """Leaves the step's gradient, times the loss scale, in .grad; returns nats per trained token over all devices.

    When memory runs out, on any device, all of them halve the token budget and repeat the step.
    """
    total = task.batches.trained_tokens(step)
    nats = torch.zeros((), dtype=torch.float64, device=task.devices.device)

    def work() -> None:
        for micro_batch in task.batches.micro_batches(step, progress.budget_tokens):
            loss = task.loss(task.model, micro_batch)
            (loss * (progress.loss_scale / total)).backward()
            nats.add_(loss.detach().double())

    attempt = 0
    while True:
        task.optimizer.zero_grad(set_to_none=True)
        # The step's own randomness (dropout), whatever happened before it.
        torch.manual_seed((task.seed * 1_000_003 + step) * 1_009 + task.devices.rank)
        nats.zero_()
        if _fits(task, work):
            break
        attempt = _cut_finer_for_step(task, progress, step, attempt + 1)
    return task.devices.sum(float(nats)) / total


def _finished_gradient(task: Task, progress: Progress, step: int) -> tuple[float, float]:
    """The step's loss and gradient norm; the gradient in .grad is summed over devices, unscaled and clipped.

    In float16 a gradient that is not finite first of all means that the loss scale is too large: it is halved and the
    step repeated.  Where no scale helps, it is not the scale's fault, and that is set back.
    """
    scale = progress.loss_scale
    norm = math.nan

    def work() -> None:
        nonlocal norm
        norm = task.finish_gradient(progress.loss_scale)

    attempt = 0
    while True:
        loss = _gradient(task, progress, step)
        if not math.isfinite(loss):
            return loss, math.nan
        if not _fits(task, work):
            attempt = _cut_finer_for_step(task, progress, step, attempt + 1)
        elif math.isfinite(norm):
            return loss, norm
        elif progress.loss_scale > LEAST_LOSS_SCALE:
            progress.loss_scale /= 2.0
            progress.scale_steps = 0
            task.report(f"step {step}: the gradient left float16's range, loss scale halved to {progress.loss_scale:g}")
            if task.metrics is not None:
                task.metrics.write("loss_scale", step, value=progress.loss_scale)
        else:
            progress.loss_scale = scale
            return loss, norm


def _update(task: Task, rate: float) -> bool:
    """One optimizer step; False when memory ran out in it on any device (weights may then be half updated)."""
    for group in task.optimizer.param_groups:
        group["lr"] = rate * group["rate_ratio"]

    def work() -> None:
        task.optimizer.step()

    return _fits(task, work)


def _repeat_update(task: Task, progress: Progress, step: int) -> None:
    """Goes back after an update that broke off; what is repeated is the same, so the same weights come out."""
    if progress.broken_updates.count(step) >= MAX_REPEATS:
        raise _out_of_memory_error(step, "the optimizer's step")
    progress.broken_updates.append(step)
    _go_back(task, progress, step - 1)
    action = f"went back to step {progress.step} and repeats from there"
    _record(task, progress, step, "out_of_memory", "memory ran out in the optimizer's step", action)


def _evaluate(task: Task, progress: Progress) -> float:
    validate, loss = task.validate, math.nan
    assert validate is not None

    def work() -> None:
        nonlocal loss
        loss = validate(progress.budget_tokens)

    for attempt in itertools.count(1):
        if _fits(task, work):
            break
        _cut_finer(
            task,
            progress,
            progress.step,
            f"memory ran out in the evaluation after step {progress.step}",
            longest=task.longest_held_out_tokens,
            again="the evaluation",
            tokens=progress.budget_tokens,
            attempt=attempt,
            save_memory=lambda _progress: None,  # What it saves is kept for a backward pass, and here is none.
        )
    if task.metrics is not None:
        task.metrics.write("evaluation", progress.step, loss=loss)
    task.report(f"held-out loss {loss:.4f} at step {progress.step}")
    return loss


def _evaluate_and_compare(task: Task, progress: Progress) -> bool:
    loss = progress.last_evaluation = _evaluate(task, progress)
    if math.isfinite(loss) and (progress.best_loss is None or loss < progress.best_loss):
        progress.best_loss, progress.best_step = loss, progress.step
        progress.evaluations_without_gain = 0
        return True
    progress.evaluations_without_gain += 1
    return False


def _out_of_patience(task: Task, progress: Progress) -> bool:
    return task.patience is not None and progress.evaluations_without_gain >= task.patience


def _fits(task: Task, work: Callable[[], None]) -> bool:
    """Does it; False when memory ran out in it, on any device.  What it had allocated is then free."""
    out_of_memory = False
    try:
        work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        out_of_memory = True
    return not task.devices.largest(int(out_of_memory))


def _cut_finer_for_step(task: Task, progress: Progress, step: int, attempt: int) -> int:
    return _cut_finer(
        task,
        progress,
        step,
        f"memory ran out in step {step}",
        longest=task.batches.longest(step),
        again="the same step",
        tokens=task.batches.tokens(step),
        attempt=attempt,
        save_memory=task.save_memory,
    )


def _cut_finer(
    task: Task, progress: Progress, step: int, detail: str, *, longest: int, tokens: int, attempt: int, again: str,
    save_memory: Callable[[Progress], str | None],
) -> int:  # fmt: skip
    """Frees memory and halves the token budget, down to the longest example; a few times more it is only freed; then
    memory is saved for more work.  Returns how many of the attempts count from now on."""
    task.optimizer.zero_grad(set_to_none=True)
    _free_memory()
    before = progress.budget_tokens
    if before > longest:
        progress.budget_tokens = max(min(before, tokens) // 2, longest)
        action = f"micro-batches of at most {progress.budget_tokens} tokens instead of {before}; {again} is repeated"
    elif attempt <= MAX_REPEATS:
        action = f"memory was freed; {again} is repeated"
    elif (saved := save_memory(progress)) is not None:
        action, attempt = f"{saved}; {again} is repeated", 0
    else:
        raise _out_of_memory_error(step, f"one example of {longest} tokens")
    _record(task, progress, step, "out_of_memory", detail, action)
    return attempt


def _recover(task: Task, progress: Progress, step: int, reason: str, detail: str, *, bad_steps: list[int]) -> None:
    """Leaves the bad steps' examples out, lowers the learning rate, and goes back to before the harm was done.

    A value that is not finite, out of the blue, is the examples' fault: it was seen before their update, so the weights
    are good, and the examples are left out for good.  After a high loss, or a step that was left out, the weights are at
    fault, and so is the update before the first sign of it.
    """
    task.optimizer.zero_grad(set_to_none=True)
    if progress.divergences >= task.max_recoveries:
        raise TrainingError(
            f"Training diverges: after {progress.divergences} recoveries {detail}.",
            "Lower training.learning_rate, look at the examples of these steps, or allow more training.max_recoveries.",
        )
    progress.divergences += 1
    last_skipped = max((s for s in progress.skipped_steps if s < bad_steps[0]), default=-HEALTHY_STEPS)
    if reason == "not_finite" and len(bad_steps) == 1 and last_skipped != step - 1:
        progress.rate_scale *= FIRST_CUT
        progress.left_out = sorted({*progress.left_out, *task.batches.indices(step).tolist()})
        task.batches.left_out = frozenset(progress.left_out)
    else:
        progress.rate_scale *= REPEATED_CUT if bad_steps[0] - last_skipped <= HEALTHY_STEPS else FIRST_CUT
        cause = max((s for s in range(1, bad_steps[0]) if s not in progress.skipped_steps), default=bad_steps[0])
        bad_steps = sorted({cause, *bad_steps})
        _go_back(task, progress, cause - 1)
    progress.skipped_steps = sorted({*progress.skipped_steps, *bad_steps})
    without = f"step {bad_steps[0]}" if len(bad_steps) == 1 else f"steps {', '.join(map(str, bad_steps))}"
    action = f"continues from step {progress.step} without the examples of {without}, learning rate x {progress.rate_scale:g}"
    _record(task, progress, step, reason, detail, action)
    _save(task, progress)


def _keep_good_state(task: Task, progress: Progress) -> None:
    """Copies what the loop would need to go on from here, at some steps.  With a high loss, it may be no good state."""
    if not task.snapshots.due(progress.step) or task.watch.high_steps:
        return
    state = {name: getattr(progress, name) for name in PATH_FIELDS} | {"watch": task.watch.state()}
    task.snapshots.take(progress.step, trainable=task.trainable, optimizer=task.optimizer, state=state)


def _go_back(task: Task, progress: Progress, step: int) -> None:
    """Everything as it was after `step`, or the nearest step before that there is a copy of."""
    snapshot = task.snapshots.before(step)
    if snapshot is None:
        raise TrainingError("There is no good state to go back to.", "Lower training.learning_rate and start again.")
    task.optimizer.zero_grad(set_to_none=True)
    _free_memory()
    restore(snapshot, trainable=task.trainable, optimizer=task.optimizer)
    task.watch.load(snapshot.state["watch"])
    for name in PATH_FIELDS:
        setattr(progress, name, snapshot.state[name])
    task.snapshots.forget_after(snapshot.step)
    if progress.best_step is not None and progress.best_step not in task.checkpoints.steps():
        progress.best_loss = progress.best_step = None  # A better one had taken its place on the disk.


def _record(task: Task, progress: Progress, step: int, reason: str, detail: str, action: str) -> None:
    recovery = Recovery(step=step, reason=reason, detail=detail, action=action)
    progress.recoveries.append(recovery.model_dump())
    task.report(recovery)
    if task.metrics is not None:
        task.metrics.write("recovery", step, reason=reason, detail=detail, action=action)


def _save(task: Task, progress: Progress) -> None:
    progress.watch = task.watch.state()
    if task.metrics is not None:
        progress.metrics_bytes = task.metrics.num_bytes
    if task.devices.is_main:
        task.checkpoints.save(
            progress.step,
            trainable=task.trainable,
            optimizer=task.optimizer,
            progress=asdict(progress),
            snapshots=task.snapshots.stored(progress.step),
            best_step=progress.best_step,
        )
    task.devices.wait()


def _grow_scale(progress: Progress) -> None:
    if progress.loss_scale == 1.0:
        return
    progress.scale_steps += 1
    if progress.scale_steps >= SCALE_GROWTH_STEPS:
        progress.loss_scale, progress.scale_steps = progress.loss_scale * 2.0, 0


def is_out_of_memory(error: BaseException) -> bool:
    """PyTorch's error, Python's, or one of those that are plain RuntimeErrors and known by their text only."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(t in str(error) for t in OUT_OF_MEMORY_TEXTS)


def _out_of_memory_error(step: int, what: str) -> TrainingError:
    return TrainingError(
        f"Memory ran out at step {step} even for {what}.",
        "Lower data.max_tokens or adapter.rank, set training.recompute to all or model.storage to nf4, or use a smaller base.",
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
