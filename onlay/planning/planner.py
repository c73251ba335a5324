"""The planner: of the settings that fit a GPU with margin, the fastest.

For each way to keep the base, and from the least trouble to the most, micro-batches of several sizes are tried, each with the
least recomputation that makes it fit.  What the user asked for is kept.  Where that does not fit, one wish after another is
given up until something does, and the plan says so.  Everything that was tried is a rung of the ladder, with its numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from onlay.model.storage import FP8_CAPABILITY, NOT_QUANTIZED
from onlay.planning.devices import Gpu, GpuGroup
from onlay.planning.lengths import Lengths, Pack, cut_steps
from onlay.planning.memory import LEVELS, Load, MemoryForecast, Setting, forecast_memory, room_bytes
from onlay.planning.speed import exchange_seconds, step_seconds
from onlay.records import PlannedRung

BUDGETS = (65536, 32768, 16384, 8192, 4096, 2048, 1024, 512)
"""Tokens of a micro-batch that are tried."""
ROUNDING_GAIN = 1.1
"""A base that could be kept as it is, is quantized unasked only where that is so much faster."""
EFFORTS = (("adamw", False), ("paged_adamw_8bit", False), ("paged_adamw_8bit", True))
"""Optimizer, and whether activations wait in host memory; the next is tried only where nothing fits with those before."""
SAID = {
    "none": "nothing computed again", "mlp": "gate and up computed again", "blocks": "all but inputs of attention and MLP computed again",
    "layer": "whole layers computed again", "tiles": "whole layers computed again, MLPs in tiles",
}  # fmt: skip
WISHES = ("micro_tokens", "recompute", "offload", "optimizer", "storage")
"""In the order in which they are given up."""
FIELDS = {
    "micro_tokens": "training.micro_batch_tokens", "recompute": "training.recompute", "offload": "training.offload_activations",
    "optimizer": "training.optimizer", "storage": "model.storage",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Wishes:
    """What the user asked for; None leaves the choice open."""

    storage: str | None = None
    fp8_products: bool | None = None
    micro_tokens: int | None = None
    recompute: str | int | None = None
    """none, all, or the first k layers."""
    optimizer: str | None = None
    offload: bool | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What is to be planned."""

    load: Load
    lengths: Lengths
    rows_a_step: int
    """Over all GPUs."""
    group: GpuGroup
    pack: Pack
    padded: bool
    """Rows are not packed, but filled up to the longest of their micro-batch."""
    ordinary: str | None
    """Why the fast path is not taken; None: it is."""
    quantizes: bool
    """The method allows that the base is quantized, and NF4 is there."""
    small_states: bool = True
    """Optimizers with small or paged states are there: with NF4, in bitsandbytes."""

    @property
    def gpu(self) -> Gpu:
        return self.group.gpu


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A setting with its forecasts."""

    setting: Setting
    memory: MemoryForecast
    fits: bool
    step_seconds: float
    """With the exchange of gradients between GPUs."""
    step_tokens: float
    """Over all GPUs, on average."""
    budget_tokens: int

    @property
    def tokens_per_second(self) -> float:
        return self.step_tokens / self.step_seconds

    def told(self) -> str:
        products = " with FP8 products" if self.setting.fp8_products and self.setting.storage == "nf4" else ""
        parts = [
            f"{self.setting.storage}{products}",
            f"{self.budget_tokens:,} tokens a pass",
            tell_levels(self.setting.levels),
        ]
        parts += [self.setting.optimizer] if self.setting.optimizer != "adamw" else []
        parts += ["activations in host memory"] if self.setting.offload else []
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """What the planner came to."""

    best: Candidate | None
    """None: nothing fits."""
    least: Candidate
    """That takes the least memory, of what was tried."""
    rungs: tuple[PlannedRung, ...]
    given_up: tuple[str, ...]
    """Wishes, by the recipe's name, without which `best` was found."""
    asked: Candidate | None
    """What was asked for and does not fit, at its least; None where it does."""


def choose(job: Job, wishes: Wishes) -> Chosen:
    """The fastest setting that fits, with as many of the wishes as can be kept."""
    best, tried = _best(job, wishes)
    if best is not None or not _asked(wishes):
        return _chosen(job, wishes, best, tried, (), None)
    asked = _least(tried)
    given: list[str] = []
    open_ = wishes
    for name in WISHES:
        if getattr(wishes, name) is None:
            continue
        given.append(name)
        open_ = replace(open_, **{name: None}, **({"fp8_products": None} if name == "storage" else {}))
        best, more = _best(job, open_)
        tried = [*tried, *more]
        if best is not None:
            break
    kept = [name for name in given if _needed(job, wishes, given, name)] if best is not None else given
    if kept != given:
        open_ = _without(wishes, kept)
        best, more = _best(job, open_)
        tried = [*tried, *more]
    return _chosen(job, open_, best, tried, tuple(FIELDS[name] for name in kept), asked)


def fits(job: Job, wishes: Wishes) -> bool:
    """Whether there is room with every one of these wishes kept."""
    return _best(job, wishes)[0] is not None


def _needed(job: Job, wishes: Wishes, given: Sequence[str], name: str) -> bool:
    """Whether nothing fits with this wish kept and the others given up."""
    return not fits(job, _without(wishes, [one for one in given if one != name]))


def _without(wishes: Wishes, names: Sequence[str]) -> Wishes:
    gone: dict[str, None] = dict.fromkeys(names)
    return replace(wishes, **gone, **({"fp8_products": None} if "storage" in gone else {}))


def _asked(wishes: Wishes) -> bool:
    return any(getattr(wishes, name) is not None for name in WISHES)


def _best(job: Job, wishes: Wishes) -> tuple[Candidate | None, list[Candidate]]:
    tried: list[Candidate] = []
    found: dict[str, Candidate] = {}
    for storage, fp8 in _storages(job, wishes):
        for optimizer, offload in _efforts(wishes, small_states=job.small_states):
            some = _of_storage(job, wishes, storage, fp8, optimizer, offload)
            tried += some
            fitting = [one for one in some if one.fits]
            if fitting:
                found[storage] = min(fitting, key=lambda one: one.step_seconds / one.step_tokens)
                break
    plain, packed = found.get(NOT_QUANTIZED), found.get("nf4")
    if plain is not None and packed is not None:
        faster = packed.tokens_per_second >= ROUNDING_GAIN * plain.tokens_per_second
        return (packed if faster else plain), tried
    return next(iter(found.values()), None), tried


def _storages(job: Job, wishes: Wishes) -> list[tuple[str, bool]]:
    """How the base may be kept, and whether its products are in FP8."""
    fp8 = bool(wishes.fp8_products)
    if wishes.storage is not None:
        return [(wishes.storage, fp8 or (wishes.storage == "fp8" and takes_fp8(job.gpu)))]
    return [(NOT_QUANTIZED, False), *([("nf4", fp8)] if job.quantizes else [])]


def takes_fp8(gpu: Gpu) -> bool:
    return gpu.has_fp8 and gpu.compute_capability >= FP8_CAPABILITY


def _efforts(wishes: Wishes, *, small_states: bool) -> list[tuple[str, bool]]:
    given = [
        (
            (optimizer if small_states else "adamw") if wishes.optimizer is None else wishes.optimizer,
            offload if wishes.offload is None else wishes.offload,
        )
        for optimizer, offload in EFFORTS
        if not (offload and wishes.offload is None and wishes.recompute not in (None, "all"))
    ]
    return list(dict.fromkeys(given))


def _of_storage(job: Job, wishes: Wishes, storage: str, fp8: bool, optimizer: str, offload: bool) -> list[Candidate]:
    steps = job.lengths.steps(rows_a_step=job.rows_a_step)
    longest_step = max(sum(step[:: job.group.count]) for step in steps)
    if wishes.micro_tokens is not None:
        budgets = [wishes.micro_tokens]
    else:
        least = job.lengths.longest
        useful = [
            budget for budget in BUDGETS if budget >= least and (budget < 2 * longest_step or budget == BUDGETS[-1])
        ]
        budgets = sorted({*useful, least}, reverse=True)
    found = []
    for budget in budgets:
        cut = cut_steps(steps, budget_tokens=budget, gpus=job.group.count, pack=job.pack, padded=job.padded)
        most = max(job.lengths.longest, *(batch.tokens for batches in cut for batch in batches))
        accumulates = any(len(batches) > 1 for batches in cut)
        base = Setting(
            storage=storage, fp8_products=fp8, micro_tokens=most, levels=("none",) * job.load.layer.count,
            optimizer=optimizer, offload=offload, fast_path=job.ordinary is None,
        )  # fmt: skip
        tokens = sum(sum(step) for step in steps) / len(steps)
        for setting, memory, has_room in _least_again(job, base, wishes, accumulates=accumulates):
            seconds = sum(step_seconds(job.load, setting, job.gpu, batches) for batches in cut) / len(cut)
            seconds += exchange_seconds(job.load, job.group.count)
            found.append(
                Candidate(
                    setting=setting, memory=memory, fits=has_room, step_seconds=seconds, step_tokens=tokens, budget_tokens=budget
                )
            )  # fmt: skip
    return found


def _least_again(
    job: Job, base: Setting, wishes: Wishes, *, accumulates: bool
) -> list[tuple[Setting, MemoryForecast, bool]]:
    """The setting with as little computed again as fits, its memory, and whether it does fit; before it, the one with the
    least of all, where that is another."""
    ladder = level_ladder(job.load.layer.count, wishes.recompute, fast_path=base.fast_path, offload=base.offload)

    def at(place: int) -> tuple[Setting, MemoryForecast, bool]:
        setting = replace(base, levels=ladder(place)[0])
        memory = forecast_memory(job.load, setting, accumulates=accumulates)
        return setting, memory, memory.device_bytes <= room_bytes(job.gpu.memory_bytes)

    first, low, high = at(0), 1, ladder(0)[1]
    if first[2] or high == 0:
        return [first]
    last = at(high)
    while last[2] and low < high:
        middle = (low + high) // 2
        here = at(middle)
        if here[2]:
            high, last = middle, here
        else:
            low = middle + 1
    return [first, last]


@dataclass(frozen=True, slots=True)
class _Ladder:
    """Levels of all layers by place: 0 is the least recomputation."""

    first: tuple[str, ...]
    count: int
    kinds: tuple[str, ...]

    def __call__(self, place: int) -> tuple[tuple[str, ...], int]:
        """Levels at this place, and the last place there is."""
        last = self.count * len(self.kinds)
        if place == 0 or not self.kinds:
            return self.first, last
        whole, some = divmod(place - 1, self.count)
        before = self.first if whole == 0 else (self.kinds[whole - 1],) * self.count
        return (self.kinds[whole],) * (some + 1) + before[some + 1 :], last


def level_ladder(count: int, recompute: str | int | None, *, fast_path: bool, offload: bool) -> _Ladder:
    """By what the user asked for: none and a number leave nothing to choose; all leaves tiles, on the fast path."""
    if recompute == "none":
        return _Ladder(("none",) * count, count, ())
    if isinstance(recompute, int):
        first = min(recompute, count)
        return _Ladder(("layer",) * first + ("none",) * (count - first), count, ())
    if recompute == "all" or offload:
        return _Ladder(("layer",) * count, count, ("tiles",) if fast_path else ())
    return _Ladder(("none",) * count, count, LEVELS[1:] if fast_path else ("layer",))


def tell_levels(levels: Sequence[str]) -> str:
    """In words."""
    counts = Counter(levels)
    said = [
        SAID[level] if counts[level] == len(levels) else f"{SAID[level]} in {counts[level]} of {len(levels)} layers"
        for level in LEVELS[1:]
        if counts[level]
    ]
    return "; ".join(said) or SAID["none"]


# ------------------------------------------------------------------------------------------------------------ ladder


def _least(tried: Sequence[Candidate]) -> Candidate:
    return min(tried, key=lambda one: one.memory.device_bytes)


def _chosen(
    job: Job, wishes: Wishes, best: Candidate | None, tried: Sequence[Candidate], given_up: tuple[str, ...],
    asked: Candidate | None,
) -> Chosen:  # fmt: skip
    """`wishes`: those that `best` was found with."""
    rungs = tuple(_rungs(job, wishes, best, tried))
    return Chosen(best=best, least=_least(tried), rungs=rungs, given_up=given_up, asked=asked)


def _rungs(job: Job, wishes: Wishes, best: Candidate | None, tried: Sequence[Candidate]) -> list[PlannedRung]:
    """What was tried: what fits by speed, what does not by memory; of the latter for each storage the fastest that was wished
    for, and for each effort the one that needs least."""
    once = {one.setting: one for one in tried}
    fitting = sorted((one for one in once.values() if one.fits), key=lambda one: -one.tokens_per_second)
    failing = [one for one in once.values() if not one.fits]
    shown: dict[Setting, Candidate] = {}
    for storage in dict.fromkeys(one.setting.storage for one in failing):
        own = [one for one in failing if one.setting.storage == storage]
        fastest = max(own, key=lambda one: one.tokens_per_second)
        shown[fastest.setting] = fastest
        if not any(one.setting.storage == storage for one in fitting):
            for effort in dict.fromkeys((one.setting.optimizer, one.setting.offload) for one in own):
                least = _least([one for one in own if (one.setting.optimizer, one.setting.offload) == effort])
                shown[least.setting] = least
    rungs = [_rung(job, one, best) for one in fitting]
    rungs.sort(key=lambda rung: rung.verdict != "chosen")
    rungs += [_rung(job, one, best) for one in sorted(shown.values(), key=lambda one: -one.memory.device_bytes)]
    open_to_fp8 = takes_fp8(job.gpu) and job.quantizes and job.ordinary is None
    if best is not None and best.setting.storage != "fp8" and open_to_fp8:
        rungs += _unasked(job, wishes, best)
    return rungs


def _rung(job: Job, one: Candidate, best: Candidate | None) -> PlannedRung:
    needed = one.memory.device_bytes
    if not one.fits:
        room = room_bytes(job.gpu.memory_bytes)
        why = f"{gib(needed - room)} more than the {gib(room)} that may be taken up"
        return PlannedRung(
            setting=one.told(), needed_bytes=needed, tokens_per_second=None, verdict="does not fit", reason=why
        )
    rate = one.tokens_per_second
    if best is not None and one.setting == best.setting:
        return PlannedRung(
            setting=one.told(), needed_bytes=needed, tokens_per_second=rate, verdict="chosen", reason="the fastest that fits"
        )  # fmt: skip
    assert best is not None
    share = rate / best.tokens_per_second - 1
    why = _slower(-share) if share <= 0 else f"{share:.0%} faster, but it rounds the base"
    verdict: Literal["slower", "not unasked"] = "slower" if share <= 0 else "not unasked"
    return PlannedRung(
        setting=one.told(), needed_bytes=needed, tokens_per_second=rate, verdict=verdict, reason=why
    )  # fmt: skip


def _slower(share: float) -> str:
    return "less than 1 % slower" if share < 0.01 else f"{share:.0%} slower"


def _unasked(job: Job, wishes: Wishes, best: Candidate) -> list[PlannedRung]:
    """FP8 changes what is computed, so it is shown and not taken; everything else is as it was wished for."""
    chosen, _ = _best(job, replace(wishes, storage="fp8", fp8_products=True))
    if chosen is None or chosen.tokens_per_second <= best.tokens_per_second:
        return []
    gain = chosen.tokens_per_second / best.tokens_per_second - 1
    why = f"{gain:.0%} faster; products are rounded to 8 bits, so it is taken only with model.storage = fp8"
    return [
        PlannedRung(
            setting=chosen.told(), needed_bytes=chosen.memory.device_bytes, tokens_per_second=chosen.tokens_per_second,
            verdict="not unasked", reason=why,
        )
    ]  # fmt: skip


def gib(num_bytes: float) -> str:
    """In words; small ones in MiB."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**28 else f"{num_bytes / 2**20:.0f} MiB"
