"""A Plan from what the planner chose: time, cost, decisions; and what becomes of it once steps are measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from onlay.planning import speed
from onlay.planning.cost import cost_of
from onlay.planning.lengths import cut_steps
from onlay.planning.memory import Load, MemoryForecast, room_bytes, weights_bytes
from onlay.planning.planner import Candidate, Chosen, Job, gib, tell_levels
from onlay.records import (
    ForecastCheck,
    Plan,
    PlannedCost,
    PlannedDecision,
    PlannedMemory,
    PlannedParameters,
    PlannedSettings,
    PlannedTime,
)

START_SECONDS = 10.0
"""From the command to the base: imports, rows from the cache, CUDA; and its end: proofs, the adapter's file."""
READ_BYTES = 2e9
"""A second, of the base's files from a disk that has to be read."""
EVALUATIONS, EVALUATION_SHARE = 10, 0.05
"""At most so many a run, and at most this share of its time (onlay/training/session.py)."""
PART_SHARE = 0.005
"""Of the peak; smaller components are not told one by one."""
WARMUP_STEPS = 3
"""Not counted when a step is timed: kernels are compiled and memory is asked for in them."""
CORRECTED_AFTER = 20
"""Steps, after which the forecast is made anew."""
LEAST_USD = 0.01
"""Less is told as less."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Length:
    """How long the run is."""

    epochs: float
    max_steps: int | None
    held_out_rows: int
    """Used by an evaluation during training."""
    every_steps: int | None

    def steps(self, *, rows: int, rows_a_step: int) -> int:
        return self.max_steps or max(1, math.ceil(self.epochs * rows / rows_a_step))


@dataclass(frozen=True, kw_only=True, slots=True)
class Told:
    """What a plan says besides."""

    base: str
    compute: str
    refused: str | None
    notes: tuple[str, ...]
    found_gpu: str | None = None
    """Name of a GPU that was found and is not in the table."""


def make_plan(job: Job, chosen: Chosen, length: Length, told: Told) -> Plan:
    """`chosen.best` as a record.  Something must fit."""
    best = chosen.best
    assert best is not None
    timed = forecast_time(job, best, length)
    cost = cost_of(timed.seconds, group=job.group)
    bill, spot = cost.on_demand, cost.spot
    seen = [] if spot is None else [f"spot: {tell_usd(spot.usd)} ({spot.provider}, {spot.date})"]
    return Plan(
        base=told.base, gpu=told.found_gpu or job.gpu.name, gpus=job.group.count, rows=job.lengths.rows,
        mean_tokens=round(job.lengths.mean, 2), data=job.lengths.told,
        parameters=PlannedParameters(trainable=job.load.count.trainable - job.load.count.held, total=job.load.count.total),
        memory=planned_memory(best.memory, device_bytes=job.gpu.memory_bytes), time=timed,
        cost=PlannedCost(
            usd=cost.usd, most_usd=bill.most_usd if bill else None, spot_usd=spot.usd if spot else None,
            usd_per_hour=bill.usd_per_hour if bill else None, provider=bill.provider if bill else None,
            date=bill.date if bill else None, source=bill.source if bill else None, notes=[*seen, *cost.notes],
        ),
        settings=PlannedSettings(
            storage=best.setting.storage, compute="fp8" if best.setting.fp8_products else told.compute,
            optimizer=best.setting.optimizer, offload_activations=best.setting.offload,
            micro_batch_tokens=best.budget_tokens, levels=list(best.setting.levels), recompute=tell_levels(best.setting.levels),
            fast_path=best.setting.fast_path,
        ),
        decisions=_decisions(job, chosen, best), rungs=list(chosen.rungs), refused=told.refused,
        notes=[*told.notes, *_notes(job)],
    )  # fmt: skip


def planned_memory(memory: MemoryForecast, *, device_bytes: int) -> PlannedMemory:
    return PlannedMemory(
        peak_bytes=memory.peak_bytes, low_bytes=memory.low_bytes, high_bytes=memory.high_bytes,
        needed_bytes=memory.device_bytes, device_bytes=device_bytes, **memory.components,
    )  # fmt: skip


def forecast_time(job: Job, best: Candidate, length: Length) -> PlannedTime:
    rows = job.rows_a_step
    steps = length.steps(rows=job.lengths.rows, rows_a_step=rows)
    # The steps that were drawn may hold a little more or less than the mean.
    one = rows * job.lengths.mean / best.tokens_per_second
    training, tokens = steps * one, round(steps * rows * job.lengths.mean)
    evaluation = _evaluation_seconds(job, best, length, steps=steps, tokens=tokens)
    loading = START_SECONDS + load_bytes(job.load) / READ_BYTES
    seconds = training + evaluation + loading
    verified = speed.is_measured(job.gpu)
    low, high = speed.RANGE[verified]
    seen = sum(n * n * count for n, count in job.lengths.counts.items()) / (2 * job.lengths.tokens)
    return PlannedTime(
        seconds=seconds, low_seconds=low * (training + evaluation) + loading / 2, high_seconds=high * (training + evaluation) + 3 * loading,
        training_seconds=training, evaluation_seconds=evaluation, loading_seconds=loading, steps=steps, step_seconds=one,
        tokens=tokens, tokens_per_second=rows * job.lengths.mean / one,
        flops_per_token=speed.flops_a_token(job.load, best.setting, seen=seen), verified=verified,
    )  # fmt: skip


def load_bytes(load: Load) -> int:
    """Of the base's files, which are in 16 bit however it is kept."""
    return 2 * load.shape.num_parameters


def _evaluation_seconds(job: Job, best: Candidate, length: Length, *, steps: int, tokens: int) -> float:
    """Of all evaluations during training, the one before the first step among them."""
    if not length.held_out_rows:
        return 0.0
    held_out_tokens = length.held_out_rows * job.lengths.mean
    affordable = EVALUATION_SHARE * tokens / max(1.0, 0.4 * held_out_tokens)
    every = length.every_steps or -(-steps // max(1, min(EVALUATIONS, int(affordable))))
    times = 1 + -(-steps // every)
    one = job.lengths.steps(rows_a_step=length.held_out_rows, count=1)[:1]
    batches = cut_steps(one, budget_tokens=best.budget_tokens, gpus=job.group.count, pack=job.pack, padded=job.padded)
    return times * sum(speed.forward_seconds(job.load, best.setting, job.gpu, some) for some in batches)


def _notes(job: Job) -> list[str]:
    notes = []
    if not speed.is_measured(job.gpu):
        notes.append(
            f"times on {job.gpu.efficiency_class} GPUs are unverified: computed from its data sheet with the shares that were measured on {', '.join(speed.MEASURED_CLASSES)}"
        )
    if job.ordinary is not None:
        notes.append(f"on the ordinary path: {job.ordinary}")
    if job.group.count > 1:
        notes.append(
            f"data parallel: each of the {job.group.count} GPUs holds the whole base, and the rows of a step are shared out"
        )
    if job.rows_a_step < job.group.count:
        idle = job.group.count - job.rows_a_step
        notes.append(
            f"no row of a step for {idle} of the {job.group.count} GPUs (training.batch_size = {job.rows_a_step}): that adds no speed, and is paid for; take no more GPUs than rows, or batches of {job.group.count} rows"
        )
    return notes


def _decisions(job: Job, chosen: Chosen, best: Candidate) -> list[PlannedDecision]:
    setting = best.setting
    given_up = set(chosen.given_up)
    storages = [
        rung for rung in chosen.rungs if rung.verdict != "chosen" and not rung.setting.startswith(f"{setting.storage},")
    ]
    others: dict[str, str] = {}
    for rung in storages:
        others.setdefault(rung.setting.partition(",")[0], f"{rung.setting.partition(',')[0]}: {rung.reason}")
    same = [
        rung for rung in chosen.rungs if rung.verdict != "chosen" and rung.setting.startswith(f"{setting.storage},")
    ]
    whole = weights_bytes(job.load, setting)

    def why(field: str, reason: str) -> str:
        return f"{reason}; what the recipe asks for does not fit" if field in given_up else reason

    decisions = [
        PlannedDecision(
            what="model.storage", chosen=setting.storage, rejected=list(others.values()),
            why=why("model.storage", f"the base takes {gib(whole)} of {gib(job.gpu.memory_bytes)}"),
        ),
        PlannedDecision(
            what="training.micro_batch_tokens", chosen=str(best.budget_tokens),
            why=why("training.micro_batch_tokens", f"{best.tokens_per_second:,.0f} tokens/s, with {gib(best.memory.device_bytes)}"),
            rejected=[f"{rung.setting}: {rung.reason}" for rung in same[:4]],
        ),
        PlannedDecision(
            what="training.recompute", chosen=tell_levels(setting.levels),
            why=why("training.recompute", f"{gib(best.memory.activation_bytes)} are kept for the backward pass"),
        ),
        PlannedDecision(
            what="training.optimizer", chosen=setting.optimizer,
            why=why("training.optimizer", f"its state takes {gib(best.memory.optimizer_bytes)} on the GPU"),
        ),
    ]  # fmt: skip
    if setting.offload or "training.offload_activations" in given_up:
        reason = "inputs of layers wait in host memory, because the GPU has no room for them"
        decisions.append(
            PlannedDecision(
                what="training.offload_activations", chosen=str(setting.offload).lower(),
                why=why("training.offload_activations", reason if setting.offload else "there is room for activations"),
            )
        )  # fmt: skip
    path = "fast" if job.ordinary is None else "ordinary"
    said = "its layers are fused blocks" if job.ordinary is None else job.ordinary
    return [*decisions, PlannedDecision(what="path", chosen=path, why=said)]


# ---------------------------------------------------------------------------------------------------------- measured


class ForecastWatch:
    """Follows a run's steps, forecasts its time anew after the first ones, and holds the plan against what was measured."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._rates: list[float] = []
        self._seconds: list[float] = []
        self._total = 0.0
        self._steps = 0
        self._corrected: float | None = None

    def note(self, *, tokens: int, seconds: float, step: int, total_steps: int) -> str | None:
        """One step.  After the first CORRECTED_AFTER the new forecast in words, else None."""
        self._steps += 1
        self._total += seconds
        if self._steps > WARMUP_STEPS:
            self._rates.append(tokens / seconds)
            self._seconds.append(seconds)
        if self._steps != CORRECTED_AFTER:
            return None
        mean = self.plan.time.tokens / self.plan.time.steps
        one = mean / median(self._rates)
        self._corrected = self._total + (total_steps - step) * one
        planned = self.plan.time.training_seconds
        return (
            f"after {self._steps} steps: training will take {tell_seconds(self._corrected)} "
            f"(planned {tell_seconds(planned)}, {self._corrected / planned - 1:+.0%})"
        )

    def check(self, *, peak_bytes: int | None, training_seconds: float | None) -> ForecastCheck:
        """At the end; `training_seconds` None for a run that did not come to it, or went on from a checkpoint."""
        return ForecastCheck(
            planned_peak_bytes=self.plan.memory.peak_bytes, peak_bytes=peak_bytes, planned_step_seconds=self.plan.time.step_seconds,
            step_seconds=median(self._seconds) if self._seconds else None,
            planned_training_seconds=self.plan.time.training_seconds + self.plan.time.evaluation_seconds,
            corrected_training_seconds=self._corrected, training_seconds=training_seconds,
        )  # fmt: skip


def tell_seconds(seconds: float) -> str:
    """47 s, 12 min, 3 h 5 min."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def tell_usd(usd: float) -> str:
    """1.25 USD; less than 0.01 USD."""
    return f"{usd:.2f} USD" if usd >= LEAST_USD else f"less than {LEAST_USD} USD"


def tell_need(needed_bytes: int, job: Job) -> str:
    """Needed memory beside what a plan may take up of the GPU's."""
    memory = job.gpu.memory_bytes
    return f"at least {gib(needed_bytes)} would be needed, and {gib(room_bytes(memory))} of its {gib(memory)} may be taken up"


def summary_lines(plan: Plan) -> list[str]:
    """The plan in ten lines at most."""
    memory, time, cost, settings = plan.memory, plan.time, plan.cost, plan.settings
    parts = sorted(
        ((value, name) for name, value in parts_of(memory).items() if value > PART_SHARE * memory.peak_bytes),
        reverse=True,
    )
    where = plan.gpu if plan.gpus == 1 else f"{plan.gpus} x {plan.gpu}"
    unverified = "" if time.verified else ", unverified"
    lines = [
        f"{plan.base} on {where}: {plan.parameters.trainable:,} of {plan.parameters.total:,} parameters train",
        f"data: {plan.data}",
        f"base {settings.storage}, compute {settings.compute}, {settings.micro_batch_tokens:,} tokens a pass, {settings.recompute}",
        f"optimizer {settings.optimizer}{', activations in host memory' if settings.offload_activations else ''}, {'fast' if settings.fast_path else 'ordinary'} path",
        f"memory: {gib(memory.peak_bytes)} at the peak ({gib(memory.low_bytes)} to {gib(memory.high_bytes)}) of {gib(memory.device_bytes)}",
        f"  {', '.join(f'{name} {gib(value)}' for value, name in parts)}",
        f"time: {tell_seconds(time.seconds)} ({tell_seconds(time.low_seconds)} to {tell_seconds(time.high_seconds)}{unverified}), "
        f"{time.steps:,} steps, {time.tokens_per_second:,.0f} tokens/s",
    ]  # fmt: skip
    if cost.usd is None:
        lines.append("cost: no dated price is known")
    else:
        most = (
            f" to {cost.most_usd:.2f}" if cost.most_usd is not None and cost.most_usd > max(cost.usd, LEAST_USD) else ""
        )
        lines.append(f"cost: {tell_usd(cost.usd).removesuffix(' USD')}{most} USD ({cost.provider}, {cost.date})")
    if plan.refused is not None:
        lines.append(plan.refused)
    return lines


def parts_of(memory: PlannedMemory) -> dict[str, int]:
    """Components by their names in words."""
    return {
        "base": memory.weights_bytes, "adapter": memory.adapter_bytes, "gradients": memory.gradient_bytes,
        "optimizer": memory.optimizer_bytes, "activations": memory.activation_bytes, "loss": memory.loss_bytes,
        "working memory": memory.working_bytes,
    }  # fmt: skip


def tell_refused(job: Job, chosen: Chosen, asked: Sequence[str]) -> str | None:
    """One sentence on wishes that were given up; None where all were kept.  `asked`: `field = value` of each wish."""
    if not chosen.given_up or chosen.asked is None or chosen.best is None:
        return None
    gone = [one for one in asked if one.partition(" ")[0] in chosen.given_up]
    return (
        f"{', '.join(gone)} does not fit {job.group.name}: {tell_need(chosen.asked.memory.device_bytes, job)}. "
        f"The nearest that fits: {chosen.best.told()}."
    )
