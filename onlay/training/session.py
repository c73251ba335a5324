"""One training run from loaded parts to a finished Run: sets the loop up, runs it, selects, exports and proves."""

from __future__ import annotations

import hashlib
import shutil
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn

from onlay.errors import OnlayError, OutputError, TrainingError
from onlay.model.adapter import attach, held_parts, save_adapter
from onlay.model.attention import Layout, choose_layout, use_attention
from onlay.model.fuse import Fused, fuse, unfuse
from onlay.model.head import ClassificationHead, attach_head, save_head
from onlay.model.initialize import Held, LoftqFactors
from onlay.model.load import Base, quiet_transformers, weight_checksums
from onlay.model.recompute import Recompute
from onlay.model.stack import describe_stack
from onlay.recipe import FullTuning, HeadAdapter, LoftqAdapter, LoraAdapter, PissaAdapter, Recipe
from onlay.records import Checkpoint, Dataset, ModelFacts, Recovery, Run
from onlay.training.batches import Batches, Examples
from onlay.training.checkpoint import Checkpoints
from onlay.training.devices import Devices
from onlay.training.head_loss import HeadLoss, predict
from onlay.training.loop import FIRST_LOSS_SCALE, Progress, StepReport, Task, peak_memory_bytes, run_loop
from onlay.training.loss import Loss, make_loss
from onlay.training.memory import fit
from onlay.training.metrics_log import MetricsLog, read_metrics
from onlay.training.optimizer import gradient_norm, hold, learning_rate_at, make_optimizer, needs_gpu
from onlay.training.proofs import MovementProof, prove_finite, prove_held, prove_unchanged
from onlay.training.watch import Snapshots, Watch

if TYPE_CHECKING:
    from onlay.data.pack import MicroBatch

CPU_BUDGET_TOKENS = 2048
CPU_PIECE_TOKENS = 128
"""One more micro-batch costs a CPU about as much as this many tokens, so little padding pays; a GPU wants few pieces."""
SNAPSHOT_BYTES_A_STEP = 32 * 2**20
"""Snapshots are spaced so that copying costs at most about this much host traffic a step."""
MOST_SNAPSHOT_STEPS = 100
CHECKPOINTS_A_RUN = 10
EVALUATION_SHARE = 0.05
Event = StepReport | Recovery | str


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What a run is made from; `stages` brings it together."""

    recipe: Recipe
    facts: ModelFacts
    dataset: Dataset
    base: Base
    train_examples: Examples
    held_out_examples: Examples | None
    plan: Callable[..., list[list[int]]]
    """onlay.data.pack.plan_micro_batches"""
    collate: Callable[..., MicroBatch]
    """onlay.data.pack.collate"""
    pad_token_id: int
    folder: Path
    devices: Devices
    report: Callable[[Event], None]
    base_weight_digest: Callable[[], str | None]
    """Asked at the end of the run; the digest is computed beside it."""
    save_tokenizer: Callable[[Path], None]
    label_scores: Callable[[Sequence[int], Sequence[int]], dict[str, float]] | None = None
    """onlay.evaluation.scores.label_scores, of a head's predictions; the other methods need none."""
    loftq: LoftqFactors | None = None
    """What a LoftQ adapter begins with, made while the base was quantized; None where a checkpoint's weights follow."""
    levels: Sequence[str] = ()
    """What each layer keeps, as the run's plan has it (onlay/model/keep.py); empty where there is no plan."""


def train_adapter(parts: Parts, *, resume: bool) -> Run:
    """Trains, or goes on after an interruption, and leaves the run folder complete.

    Raises TrainingError (the folder then holds a Run with status failed) and OutputError.
    """
    recipe, devices, base = parts.recipe, parts.devices, parts.base
    started = Run.load(parts.folder).started if resume else datetime.now(UTC).isoformat(timespec="seconds")
    checksums = weight_checksums(base.model) if recipe.adapter.method != "full" else {}
    checkpoints = Checkpoints(parts.folder / "checkpoints", keep=recipe.training.keep_checkpoints)
    model, left_out = _make_trainable(parts, resumed=resume and bool(checkpoints.steps()))
    layout = choose_layout(
        base.model, packing=recipe.training.packing, device=devices.device, compute_dtype=base.compute_dtype
    )
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if isinstance(recipe.adapter, PissaAdapter | LoftqAdapter):
        _share(trainable, devices)
    optimizer = make_optimizer(trainable, recipe)
    progress = _first_progress(parts) if not resume else _resumed(parts, checkpoints, trainable, optimizer)
    held = held_parts(model, recipe.adapter) if isinstance(recipe.adapter, LoraAdapter) else {}
    hold(optimizer, held)
    if parts.loftq is not None:
        progress.proofs["loftq"] = parts.loftq.errors()
    metrics = _open_metrics(parts, keep_bytes=progress.metrics_bytes)
    fast_paths = {"layout": layout.reason, "attention": layout.attention} | base.notes
    fused = fuse(base.model, layout=layout, dtype=base.compute_dtype)
    fast_paths |= fused.notes
    movement = MovementProof(model, trainable, done="movement" in progress.proofs, owners=fused.owners)
    if left_out:
        fast_paths["left_out"] = (
            f"all-linear leaves these out, since an adapter on them would not be used: {', '.join(left_out)}"
        )
    recompute = _recompute(parts, progress, fused, trainable)
    task = _make_task(parts, model, layout, trainable, optimizer, checkpoints, metrics, movement, recompute)
    fast_paths["cross_entropy"] = task.loss.note
    task.snapshots.load(checkpoints.load_snapshots(progress.step))
    run = Run(
        sources={"recipe": recipe.digest, "model": parts.facts.digest, "dataset": parts.dataset.digest},
        path=str(parts.folder), method=recipe.adapter.method, storage=base.storage, status="running", started=started, seconds=progress.seconds, steps=progress.step,
        total_steps=task.total_steps, examples=len(parts.train_examples), trained_tokens=progress.trained_tokens,
        trainable_parameters=sum(p.numel() for p in trainable.values()) - sum(value.numel() for _, value in held.values()), fast_paths=fast_paths, environment=environment(devices),
    )  # fmt: skip
    if devices.is_main:
        run.save(parts.folder)
    if devices.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        with _interruptible() as interrupted:
            task_status = run_loop(_with(task, interrupted=interrupted), progress)
        run = _outcome(parts, run, progress, task, recompute, status=task_status)
        recompute.switch_off()  # First: it stands around the forwards that the fast path has put there.
        if task_status != "interrupted":
            run = _finish(parts, run, model, layout, trainable, checkpoints, progress, checksums, held)
    except OnlayError as error:
        # Kept in the record; the error goes on to the user.
        failed = _outcome(parts, run, progress, task, recompute, status="failed")
        with suppress(OutputError):  # On a full disk not even this: what could not be written first is what to tell.
            _save_run(parts, failed.model_copy(update={"error": error.problem}))
        raise
    finally:
        if metrics is not None:
            metrics.close()
            if recipe.training.trackers:
                devices.accelerator.end_training()
    _save_run(parts, run)
    return run


def _make_trainable(parts: Parts, *, resumed: bool) -> tuple[nn.Module, list[str]]:
    section = parts.recipe.adapter
    if isinstance(section, LoraAdapter):
        factors = parts.loftq.factors if parts.loftq is not None else None
        return attach(parts.base.model, section, seed=parts.recipe.training.seed, factors=factors, resumed=resumed)
    if isinstance(section, HeadAdapter):
        return attach_head(parts.base.model, parts.dataset.labels), []
    assert isinstance(section, FullTuning)
    parts.base.model.requires_grad_(True)
    parts.base.model.train()
    return parts.base.model, []


def _share(trainable: dict[str, nn.Parameter], devices: Devices) -> None:
    """The first rank's first weights on every rank: a decomposition need not round alike on all devices."""
    if devices.world > 1:
        for parameter in trainable.values():
            torch.distributed.broadcast(parameter.data, src=0)


def _first_progress(parts: Parts) -> Progress:
    return Progress(
        budget_tokens=parts.recipe.training.micro_batch_tokens or default_budget_tokens(parts.devices.device),
        loss_scale=FIRST_LOSS_SCALE if parts.base.compute_dtype == torch.float16 else 1.0,
    )


def _recompute(parts: Parts, progress: Progress, fused: Fused, trainable: dict[str, nn.Parameter]) -> Recompute:
    """As the recipe says, or as the run has come to do.  A head's body keeps no activation: there is nothing to save."""
    training, device = parts.recipe.training, parts.devices.device
    recompute = Recompute(parts.base.model, offload=training.offload_activations, blocks=fused.layers)
    if isinstance(parts.recipe.adapter, HeadAdapter):
        recompute.layers.clear()
        return recompute
    if training.offload_activations and device.type != "cuda":
        raise needs_gpu("offload_activations", "it moves activations from its memory to the host's")
    planned = progress.levels or parts.levels
    if planned and len(planned) == len(recompute.layers):
        if set(planned) - {"none"}:
            recompute.set_levels(planned)
            progress.levels = recompute.levels
        return recompute
    if planned:
        parts.report(
            f"the plan is for {len(planned)} layers and this base has {len(recompute.layers)}: what they keep goes by free memory"
        )
    # Offloading is of what recomputed layers keep: to ask for it is to ask for both.
    all_layers = training.recompute == "all" or (training.recompute == "auto" and training.offload_activations)
    if all_layers or isinstance(training.recompute, int):
        recompute.switch_on(training.recompute if isinstance(training.recompute, int) else None)
        progress.levels = recompute.levels
    elif training.recompute == "auto" and (training.micro_batch_tokens is None or parts.levels):
        chosen = fit(
            fused, recompute.layers, device=device, wanted_tokens=progress.budget_tokens,
            longest_tokens=int(parts.train_examples.lengths.max()), state_bytes=3 * sum(p.nbytes for p in trainable.values()),
            item_bytes=parts.base.compute_dtype.itemsize, least=lambda value: -parts.devices.largest(-value),
        )  # fmt: skip
        progress.budget_tokens = min(progress.budget_tokens, chosen.tokens)
        if set(chosen.levels) - {"none"}:
            recompute.set_levels(chosen.levels)
            progress.levels = recompute.levels
    return recompute


def default_budget_tokens(device: torch.device) -> int:
    """A start that is halved when memory runs out: more only helps until the device is busy."""
    if device.type != "cuda":
        return CPU_BUDGET_TOKENS
    gigabytes = torch.cuda.get_device_properties(device).total_memory / 2**30
    return 16384 if gigabytes > 60 else 8192 if gigabytes > 20 else 4096


def _resumed(
    parts: Parts, checkpoints: Checkpoints, trainable: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> Progress:
    steps = checkpoints.steps()
    if not steps:  # it was stopped before its first checkpoint: start over, same seed, same result
        return _first_progress(parts)
    saved = checkpoints.load(steps[-1], trainable=trainable, optimizer=optimizer)
    return Progress(**{f.name: saved[f.name] for f in fields(Progress)})


def _open_metrics(parts: Parts, *, keep_bytes: int) -> MetricsLog | None:
    accelerator = None
    if parts.recipe.training.trackers:
        accelerator = parts.devices.accelerator
        accelerator.init_trackers(parts.folder.name, config=_flat(parts.recipe.model_dump(mode="json")))
    if not parts.devices.is_main:
        return None
    return MetricsLog(parts.folder / "metrics.jsonl", keep_bytes=keep_bytes, accelerator=accelerator)


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """TensorBoard takes numbers and texts only."""
    return {
        f"{section}.{key}": value if isinstance(value, int | float | str) else str(value)
        for section, entries in values.items()
        for key, value in entries.items()
    }


def _arrangement(
    parts: Parts, layout: Layout
) -> tuple[Callable[[Sequence[int], int], list[list[int]]], Callable[[list[Any]], MicroBatch]]:
    """How this run groups examples, given lengths and a token budget, and lays a group out."""
    piece_tokens = CPU_PIECE_TOKENS if parts.devices.device.type == "cpu" else None

    def plan(lengths: Sequence[int], budget: int) -> list[list[int]]:
        return parts.plan(lengths, budget_tokens=budget, packed=layout.packed, piece_tokens=piece_tokens)

    return plan, partial(parts.collate, packed=layout.packed, pad_token_id=parts.pad_token_id)


def _make_task(
    parts: Parts,
    model: nn.Module,
    layout: Layout,
    trainable: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    checkpoints: Checkpoints,
    metrics: MetricsLog | None,
    movement: MovementProof,
    recompute: Recompute,
) -> Task:
    training, evaluation, devices = parts.recipe.training, parts.recipe.evaluation, parts.devices

    plan, collate = _arrangement(parts, layout)
    make_batches = partial(
        Batches, plan=plan, collate=collate, seed=training.seed, rank=devices.rank, world=devices.world
    )
    batches = make_batches(parts.train_examples, batch_size=training.batch_size)
    if isinstance(model, ClassificationHead):
        loss: Loss | HeadLoss = HeadLoss(parts.base.model, layout, device=devices.device)
    else:
        loss = make_loss(model, layout, device=devices.device, compute_dtype=parts.base.compute_dtype)
    held_out = parts.held_out_examples
    chosen: np.ndarray = np.empty(0, dtype=np.int64)
    if held_out is not None:
        chosen = np.random.default_rng(training.seed).permutation(len(held_out))[: evaluation.max_rows]

    def validate(budget: int) -> float:
        assert held_out is not None
        return held_out_loss(
            model, make_batches(held_out, batch_size=1), chosen, loss=loss, budget_tokens=budget, devices=devices
        )

    def finish_gradient(loss_scale: float) -> float:
        parameters = list(trainable.values())
        devices.sum_gradients(parameters)
        gradients = [p.grad for p in parameters if p.grad is not None]
        if loss_scale != 1.0:
            torch._foreach_div_(gradients, loss_scale)
        norm = gradient_norm(gradients)
        if training.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, training.max_grad_norm, norm)
        return float(norm)

    def after_update(progress: Progress) -> None:
        results = movement.observe(progress.updates)
        if results is not None:
            progress.proofs["movement"] = results

    def save_memory(progress: Progress) -> str | None:
        if training.recompute != "auto" or not recompute.save_more():
            return None
        progress.levels = recompute.levels
        return f"from now on the backward pass computes again {recompute.note}"

    watch = Watch(batch_size=training.batch_size)
    total_steps = training.max_steps or batches.steps_for(training.epochs)
    train_tokens = total_steps * training.batch_size * float(parts.train_examples.lengths.mean())
    held_out_tokens = float(held_out.lengths[chosen].sum()) if held_out is not None else 0.0
    checkpoint_steps = training.checkpoint_steps or max(1, -(-total_steps // CHECKPOINTS_A_RUN))
    state_bytes = 3 * sum(p.nbytes for p in trainable.values())
    return Task(
        model=model, trainable=trainable, optimizer=optimizer, batches=batches, total_steps=total_steps,
        learning_rate=partial(learning_rate_at, peak=parts.recipe.learning_rate, total_steps=total_steps, section=training),
        loss=loss, finish_gradient=finish_gradient, validate=validate if held_out is not None else None,
        after_update=after_update, save_memory=save_memory, interrupted=lambda: False, report=parts.report, devices=devices, watch=watch,
        snapshots=Snapshots(every_steps=max(watch.lag_steps, min(MOST_SNAPSHOT_STEPS, state_bytes // SNAPSHOT_BYTES_A_STEP))),
        checkpoints=checkpoints, metrics=metrics, seed=training.seed, checkpoint_steps=checkpoint_steps,
        evaluation_steps=evaluation.every_steps or _evaluation_steps(total_steps, train_tokens, held_out_tokens), patience=evaluation.patience,
        max_recoveries=training.max_recoveries,
        longest_held_out_tokens=int(held_out.lengths[chosen].max()) if held_out is not None else 0,
    )  # fmt: skip


def _evaluation_steps(total_steps: int, train_tokens: float, held_out_tokens: float) -> int:
    """Steps between evaluations: at most ten a run, and no more than cost EVALUATION_SHARE of its time.

    A token costs an evaluation about 0.4 of what it costs a step: a forward pass out of forward and backward.
    """
    affordable = EVALUATION_SHARE * train_tokens / max(1.0, 0.4 * held_out_tokens)
    return -(-total_steps // max(1, min(CHECKPOINTS_A_RUN, int(affordable))))


@torch.no_grad()
def held_out_loss(
    model: nn.Module,
    batches: Batches,
    indices: Sequence[int] | np.ndarray,
    *,
    loss: Callable[[nn.Module, MicroBatch], torch.Tensor],
    budget_tokens: int,
    devices: Devices,
) -> float:
    """Nats per trained token over these examples, all ranks together: the sum over tokens, never a mean of means."""
    was_training = model.training
    model.eval()
    try:
        nats, tokens = 0.0, 0
        for batch in batches.all_micro_batches([int(i) for i in indices], budget_tokens):
            nats += float(loss(model, batch))
            tokens += batch.num_trained
    finally:
        model.train(was_training)
    return devices.sum(nats) / devices.sum(tokens)


def _with(task: Task, *, interrupted: Callable[[], bool]) -> Task:
    from dataclasses import replace

    return replace(task, interrupted=interrupted)


@contextmanager
def _interruptible() -> Any:
    """Ctrl-C (or SIGTERM) ends the run after the step in progress, with a checkpoint; a second one ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    seen: list[int] = []

    def note(number: int, _frame: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _outcome(parts: Parts, run: Run, progress: Progress, task: Task, recompute: Recompute, *, status: str) -> Run:
    events = read_metrics(parts.folder / "metrics.jsonl")
    of_step = {e["step"]: e["loss"] for e in events if e["event"] == "step" and e["step"] not in progress.skipped_steps}
    losses = [of_step[step] for step in sorted(of_step)]
    tail = losses[-max(1, len(losses) // 10) :]
    return run.model_copy(update={
        "status": {"stopped_early": "finished"}.get(status, status),
        "steps": progress.step, "seconds": progress.seconds, "trained_tokens": progress.trained_tokens,
        "first_loss": losses[0] if losses else None, "last_loss": sum(tail) / len(tail) if tail else None,
        "base_evaluation_loss": progress.base_loss, "evaluation_loss": progress.last_evaluation,
        "recoveries": [Recovery(**r) for r in progress.recoveries], "proofs": dict(progress.proofs),
        "checkpoints": [Checkpoint(step=s, path=str(task.checkpoints.path_of(s))) for s in task.checkpoints.steps()],
        "peak_memory_bytes": peak_memory_bytes(parts.devices.device),
        "fast_paths": run.fast_paths | {"micro_batch_tokens": str(progress.budget_tokens), "recompute": recompute.note}
        | ({"stopped_early": f"no better held-out loss for {task.patience} evaluations"} if status == "stopped_early" else {}),
    })  # fmt: skip


def _finish(
    parts: Parts,
    run: Run,
    model: nn.Module,
    layout: Layout,
    trainable: dict[str, nn.Parameter],
    checkpoints: Checkpoints,
    progress: Progress,
    checksums: dict[str, int],
    held: Held,
) -> Run:
    """Selects the weights, proves them and writes adapter/ (or model/ for full tuning)."""
    selected, loss = progress.step, progress.last_evaluation
    best = progress.best_step
    if parts.recipe.evaluation.select == "best" and best is not None and best != progress.step:
        checkpoints.load(best, trainable=trainable, optimizer=None)
        selected, loss = best, progress.best_loss
    proofs = dict(run.proofs)
    if "movement" not in proofs and progress.updates >= 2:
        raise TrainingError("The run did not prove that its adapter moved.", "Report this with the run folder.")
    proofs["finite"] = prove_finite(trainable)
    if held:
        proofs["held_still"] = prove_held(trainable, held)
    if checksums:
        proofs["base_unchanged"] = prove_unchanged(
            _frozen(checksums, trainable), _frozen(weight_checksums(parts.base.model), trainable)
        )
    digest = parts.base_weight_digest()
    run = run.model_copy(update={
        "proofs": proofs, "selected_step": selected, "evaluation_loss": loss, "base_weight_digest": digest,
        "scores": _label_scores(parts, model, layout, progress.budget_tokens),
    })  # fmt: skip
    if parts.devices.is_main:
        _export(parts, run, model)
        artefact = parts.folder / parts.recipe.adapter.artefact
        if artefact.name != "model":  # A whole model is not registered, and takes long to read.
            saved = {
                p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(artefact.iterdir()) if p.is_file()
            }
            run = run.model_copy(update={"proofs": run.proofs | {"artefact_sha256": saved}})
    unfuse(parts.base.model)
    use_attention(parts.base.model, parts.base.attention)
    parts.devices.wait()
    return run


def _label_scores(parts: Parts, model: nn.Module, layout: Layout, budget_tokens: int) -> dict[str, float]:
    """A head's scores on all held-out rows.  Each rank scores all of them: the body is fast and nothing need be gathered."""
    if not isinstance(model, ClassificationHead) or parts.held_out_examples is None:
        return {}
    assert parts.label_scores is not None
    plan, collate = _arrangement(parts, layout)
    predicted, expected = predict(
        model, parts.held_out_examples, loss=HeadLoss(parts.base.model, layout, device=parts.devices.device),
        plan=lambda lengths: plan(lengths, budget_tokens), collate=collate,
    )  # fmt: skip
    return parts.label_scores(predicted, expected)


def _frozen(checksums: dict[str, int], trainable: dict[str, nn.Parameter]) -> dict[str, int]:
    """Checksums of what is frozen, under the names that it had before PEFT put its layers around it."""

    def plain(name: str) -> str:
        return name.removeprefix("base_model.model.").replace(".base_layer", "")

    trained = {plain(name) for name in trainable}
    return {plain(name): value for name, value in checksums.items() if plain(name) not in trained}


def _export(parts: Parts, run: Run, model: nn.Module) -> None:
    final = parts.folder / parts.recipe.adapter.artefact
    temporary = final.with_name(f".{final.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        extra = {"run": parts.folder.name, "step": run.selected_step, "base_weight_digest": run.base_weight_digest}
        if isinstance(model, ClassificationHead):
            labels, storage = parts.dataset.labels, parts.base.storage
            save_head(model, temporary, facts=parts.facts, labels=labels, storage=storage, extra=extra)
        elif isinstance(parts.recipe.adapter, LoraAdapter):
            double = parts.recipe.model.double_quantization
            extra |= {"method": run.method, "storage": parts.base.storage, "double_quantization": double}
            save_adapter(model, temporary, facts=parts.facts, extra=extra)  # type: ignore[arg-type]
        else:
            weights = model.to(torch.bfloat16) if parts.base.compute_dtype == torch.bfloat16 else model
            with quiet_transformers():
                weights.save_pretrained(str(temporary))  # type: ignore[operator]
            parts.save_tokenizer(temporary)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"{final} could not be written: {error}.", f"Free disk space, then onlay train --resume {parts.folder}"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _save_run(parts: Parts, run: Run) -> None:
    if parts.devices.is_main:
        run.save(parts.folder)


def environment(devices: Devices) -> dict[str, str]:
    """What the numbers of a run depend on."""
    return {"devices": str(devices.world)} | describe_stack(devices.device)
