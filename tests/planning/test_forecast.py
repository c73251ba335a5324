"""From the planner's choice to a Plan, and from measured steps to a corrected forecast."""

from __future__ import annotations

import datetime
from dataclasses import replace
from typing import Any

import pytest

from onlay.data.pack import plan_micro_batches
from onlay.planning import forecast
from onlay.planning.devices import Offer, find_gpu, read_gpus
from onlay.planning.forecast import ForecastWatch, Length, Told, make_plan, summary_lines, tell_seconds, tell_usd
from onlay.planning.lengths import declared_lengths, equal_rows
from onlay.planning.memory import load_of
from onlay.planning.planner import Job, Wishes, choose
from onlay.planning.shapes import find_shape
from onlay.recipe import LoraAdapter, PissaAdapter
from onlay.records import Plan
from onlay.training import session

LENGTH = Length(epochs=3.0, max_steps=None, held_out_rows=50, every_steps=None)


def pack(lengths: list[int], budget: int) -> list[list[int]]:
    return plan_micro_batches(lengths, budget_tokens=budget, packed=True)


def job(gpu: str = "h200", section: Any = None, **changes: Any) -> Job:
    group = find_gpu(gpu, gpus=read_gpus())
    values: dict[str, Any] = {
        "load": load_of(find_shape("llama-3.1-8b"), section or LoraAdapter(), device_bytes=group.gpu.memory_bytes),
        "lengths": equal_rows(1000, 512), "rows_a_step": 16, "group": group, "pack": pack, "padded": False, "ordinary": None,
        "quantizes": True,
    }  # fmt: skip
    return Job(**(values | changes))


def plan_of(one: Job, length: Length = LENGTH, refused: str | None = None, **wishes: Any) -> Plan:
    told = Told(base="llama-3.1-8b", compute="bf16", refused=refused, notes=("a note",))
    return make_plan(one, choose(one, Wishes(**wishes)), length, told)


def test_steps_tokens_and_seconds_belong_together() -> None:
    plan = plan_of(job())
    time = plan.time
    assert time.steps == 188 and time.tokens == 188 * 16 * 512
    assert time.training_seconds == pytest.approx(188 * time.step_seconds)
    assert time.seconds == pytest.approx(time.training_seconds + time.evaluation_seconds + time.loading_seconds)
    assert time.low_seconds < time.seconds < time.high_seconds
    assert time.tokens_per_second == pytest.approx(16 * 512 / time.step_seconds)
    assert plan_of(job(), replace(LENGTH, max_steps=7)).time.steps == 7
    assert plan_of(job(), replace(LENGTH, held_out_rows=0)).time.evaluation_seconds == 0
    rare = plan_of(job(), replace(LENGTH, every_steps=188)).time.evaluation_seconds
    often = plan_of(job(), replace(LENGTH, every_steps=10)).time.evaluation_seconds
    assert often == pytest.approx(rare * (1 + 19) / (1 + 1))


def test_drawn_steps_stand_for_the_mean() -> None:
    one = job(lengths=declared_lengths(5000, 300))
    best = choose(one, Wishes()).best
    assert best is not None and best.step_tokens != 16 * one.lengths.mean
    assert plan_of(one).time.tokens_per_second == pytest.approx(best.tokens_per_second)


def test_evaluations_are_as_many_as_in_training() -> None:
    assert (forecast.EVALUATIONS, forecast.EVALUATION_SHARE) == (session.CHECKPOINTS_A_RUN, session.EVALUATION_SHARE)


def test_memory_is_whole_and_cost_is_the_offers() -> None:
    one = job()
    offers = tuple(
        Offer(
            provider=name,
            usd_per_hour=usd,
            kind="on-demand",
            least_count=1,
            date=datetime.date(2026, 11, 1),
            source="s",
        )
        for name, usd in (("A", 2.0), ("B", 6.0))
    )
    one = replace(one, group=replace(one.group, gpu=one.gpu.model_copy(update={"offers": offers})))
    plan = plan_of(one)
    parts = {name: value for name, value in plan.memory.model_dump().items() if name.split("_")[0] not in ("peak", "low", "high", "needed", "device")}  # fmt: skip
    assert sum(parts.values()) == plan.memory.peak_bytes
    assert plan.memory.low_bytes < plan.memory.peak_bytes < plan.memory.high_bytes < plan.memory.needed_bytes
    assert plan.cost.usd == pytest.approx(plan.time.seconds / 3600 * 2.0) and plan.cost.provider == "A"
    assert plan.cost.most_usd == pytest.approx(3 * plan.time.seconds / 3600 * 2.0) and plan.cost.spot_usd is None


def test_pissa_trains_half_of_what_it_holds() -> None:
    plan = plan_of(job(section=PissaAdapter(method="pissa"), quantizes=False))
    assert plan.parameters.trainable == 41_943_040


def test_decisions_say_why_and_against_what() -> None:
    plan = plan_of(job("rtx4090"))
    found = {one.what: one for one in plan.decisions}
    assert set(found) == {"model.storage", "training.micro_batch_tokens", "training.recompute", "training.optimizer", "path"}  # fmt: skip
    assert found["model.storage"].chosen == plan.settings.storage == "bf16"
    assert any(line.startswith("nf4: ") for line in found["model.storage"].rejected)
    assert found["training.micro_batch_tokens"].chosen == str(plan.settings.micro_batch_tokens)
    assert found["path"].chosen == "fast"
    given_up = plan_of(job("rtx3070"), storage="bf16")
    assert "what the recipe asks for does not fit" in given_up.decisions[0].why
    ordinary = plan_of(job(ordinary="DoRA"))
    assert ordinary.decisions[-1].chosen == "ordinary" and any("DoRA" in note for note in ordinary.notes)


def test_a_gpu_that_was_not_measured_says_so() -> None:
    assert plan_of(job()).time.verified and not plan_of(job("rtx4090")).time.verified
    assert any("unverified" in note for note in plan_of(job("rtx4090")).notes)
    assert any("unverified" in line for line in summary_lines(plan_of(job("rtx4090"))))
    spread = [plan.time.high_seconds / plan.time.low_seconds for plan in (plan_of(job()), plan_of(job("rtx4090")))]
    assert spread[0] < spread[1]


@pytest.mark.parametrize("gpu", ["h200", "rtx4090", "2xh100"])
def test_a_plan_is_told_in_ten_lines(gpu: str) -> None:
    lines = summary_lines(plan_of(job(gpu), refused="model.storage = int8 does not fit."))
    assert len(lines) <= 10 and lines[-1] == "model.storage = int8 does not fit."
    assert "41,943,040 of 8,072,204,288" in lines[0]


def test_a_plan_survives_its_file(tmp_path: Any) -> None:
    plan = plan_of(job())
    plan.save(tmp_path)
    assert Plan.load(tmp_path) == plan and Plan.load(tmp_path).digest == plan.digest


def test_the_forecast_is_made_anew_after_twenty_steps() -> None:
    plan = plan_of(job())
    watch = ForecastWatch(plan)
    tokens = 16 * 512
    slow = [watch.note(tokens=tokens, seconds=9.0, step=step, total_steps=188) for step in (1, 2, 3)]
    twice = 2 * plan.time.step_seconds
    told = [watch.note(tokens=tokens, seconds=twice, step=step, total_steps=188) for step in range(4, 21)]
    assert slow == [None] * 3 and told[:-1] == [None] * 16 and told[-1] is not None
    corrected = 27 + 17 * twice + 168 * twice
    check = watch.check(peak_bytes=5, training_seconds=123.0)
    assert check.corrected_training_seconds == pytest.approx(corrected)
    assert tell_seconds(corrected) in told[-1] and f"{corrected / plan.time.training_seconds - 1:+.0%}" in told[-1]
    assert (check.step_seconds, check.peak_bytes, check.training_seconds) == (pytest.approx(twice), 5, 123.0)
    assert check.planned_peak_bytes == plan.memory.peak_bytes and check.planned_step_seconds == plan.time.step_seconds


def test_longer_steps_count_by_their_tokens() -> None:
    plan = plan_of(job())
    watch = ForecastWatch(plan)
    for step in range(1, 21):
        watch.note(tokens=2 * 16 * 512, seconds=2.0, step=step, total_steps=188)
    assert watch.check(peak_bytes=None, training_seconds=None).corrected_training_seconds == pytest.approx(
        40 + 168 * 1.0
    )


def test_a_short_run_has_no_corrected_forecast() -> None:
    watch = ForecastWatch(plan_of(job()))
    watch.note(tokens=10, seconds=1.0, step=1, total_steps=188)
    check = watch.check(peak_bytes=None, training_seconds=None)
    assert (check.step_seconds, check.corrected_training_seconds) == (None, None)


@pytest.mark.parametrize(
    ("seconds", "words"), [(3.2, "3 s"), (99.6, "2 min"), (1500, "25 min"), (7200, "2 h 0 min"), (11_111, "3 h 5 min")]
)
def test_seconds_in_words(seconds: float, words: str) -> None:
    assert tell_seconds(seconds) == words


def test_several_gpus_have_one_speed_in_header_and_ladder() -> None:
    plan = plan_of(job("4xh200", lengths=declared_lengths(5000, 300)))
    chosen = next(rung for rung in plan.rungs if rung.verdict == "chosen")
    assert plan.time.tokens_per_second == pytest.approx(chosen.tokens_per_second)


def test_gpus_without_a_row_are_told() -> None:
    few = plan_of(job("8xh200", rows_a_step=3))
    assert any(note.startswith("no row of a step for 5 of the 8 GPUs (training.batch_size = 3)") for note in few.notes)
    assert not any("no row of a step" in note for note in plan_of(job("8xh200", rows_a_step=8)).notes)


def test_a_spot_price_is_named_with_its_own_provider_and_date() -> None:
    one = job()
    offers = tuple(
        Offer(provider=name, usd_per_hour=usd, kind=kind, least_count=1, date=datetime.date(2026, 11, day), source="s")
        for name, usd, kind, day in (("A", 2.0, "on-demand", 1), ("B", 1.0, "spot", 9))
    )
    plan = plan_of(replace(one, group=replace(one.group, gpu=one.gpu.model_copy(update={"offers": offers}))))
    assert plan.cost.spot_usd is not None
    assert plan.cost.notes[0] == f"spot: {plan.cost.spot_usd:.2f} USD (B, 2026-11-09)"
    line = next(line for line in summary_lines(plan) if line.startswith("cost: "))
    assert line.endswith("USD (A, 2026-11-01)") and "spot" not in line


@pytest.mark.parametrize(("usd", "words"), [(0.0, "less than 0.01 USD"), (0.0099, "less than 0.01 USD"), (1.254, "1.25 USD")])  # fmt: skip
def test_dollars_in_words(usd: float, words: str) -> None:
    assert tell_usd(usd) == words
    plan = plan_of(job())
    cheap = plan.model_copy(update={"cost": plan.cost.model_copy(update={"usd": usd, "most_usd": usd})})
    assert any(line.startswith(f"cost: {words} (") for line in summary_lines(cheap))
