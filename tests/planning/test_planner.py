"""The planner: the fastest that fits, wishes kept or given up, and everything that was tried with its numbers."""

from __future__ import annotations

from typing import Any

import pytest

from onlay.data.pack import plan_micro_batches
from onlay.planning import speed
from onlay.planning.devices import find_gpu, read_gpus
from onlay.planning.lengths import cut_steps, declared_lengths, equal_rows
from onlay.planning.memory import LEVELS, load_of, room_bytes
from onlay.planning.planner import Candidate, Chosen, Job, Wishes, choose, fits, level_ladder, tell_levels
from onlay.planning.shapes import find_shape
from onlay.planning.speed import MicroBatch
from onlay.recipe import LoraAdapter

LONG_ROWS: dict[str, Any] = {"lengths": equal_rows(100, 3000), "rows_a_step": 4}


def pack(lengths: list[int], budget: int) -> list[list[int]]:
    return plan_micro_batches(lengths, budget_tokens=budget, packed=True)


def job(base: str = "llama-3.1-8b", gpu: str = "rtx4090", **changes: Any) -> Job:
    group = find_gpu(gpu, gpus=read_gpus())
    values: dict[str, Any] = {
        "load": load_of(find_shape(base), LoraAdapter(), device_bytes=group.gpu.memory_bytes),
        "lengths": declared_lengths(5000, 300), "rows_a_step": 16, "group": group, "pack": pack, "padded": False,
        "ordinary": None, "quantizes": True,
    }  # fmt: skip
    return Job(**(values | changes))


def made(base: str = "llama-3.1-8b", gpu: str = "rtx4090", changes: Any = None, **wishes: Any) -> Chosen:
    return choose(job(base, gpu, **(changes or {})), Wishes(**wishes))


@pytest.mark.parametrize(
    ("base", "gpu", "storage"),
    [("llama-3.1-8b", "h200", "bf16"), ("llama-3.1-8b", "rtx4090", "bf16"), ("llama-3.1-8b", "rtx4080", "nf4"), ("llama-3.1-70b", "a6000", "nf4"), ("llama-3.1-70b", "h200", "nf4")],
)  # fmt: skip
def test_the_choice_fits_and_is_the_fastest_of_its_storage(base: str, gpu: str, storage: str) -> None:
    one = job(base, gpu)
    best = choose(one, Wishes()).best
    assert best is not None and best.fits and best.setting.storage == storage
    assert best.memory.device_bytes <= room_bytes(one.gpu.memory_bytes)
    rungs = [rung for rung in choose(one, Wishes()).rungs if rung.setting.startswith(storage)]
    assert max(rung.tokens_per_second or 0 for rung in rungs) == pytest.approx(best.tokens_per_second)


def test_memory_left_over_becomes_speed() -> None:
    """The more memory, the less is computed again."""
    long = {"lengths": equal_rows(1000, 4096), "rows_a_step": 8}
    again = []
    for gpu in ("rtx4080", "rtx4090", "a6000"):
        best = made("llama-2-13b", gpu, long, storage="nf4").best
        assert best is not None
        again.append(sum(LEVELS.index(level) for level in best.setting.levels))
    assert again == sorted(again, reverse=True) and again[0] > again[-1]


def test_a_base_is_not_quantized_for_a_little_speed() -> None:
    found = made(gpu="rtx4090")
    assert found.best is not None and found.best.setting.storage == "bf16"
    assert any(rung.setting.startswith("nf4") for rung in found.rungs)


def test_fp8_is_told_and_not_taken_unasked() -> None:
    rung = next(rung for rung in made(gpu="h200").rungs if rung.setting.startswith("fp8"))
    assert rung.verdict == "not unasked" and "model.storage = fp8" in rung.reason
    asked = made(gpu="h200", storage="fp8").best
    assert asked is not None and asked.setting.fp8_products
    assert not any(rung.setting.startswith("fp8") for rung in made(gpu="a100").rungs)


@pytest.mark.parametrize(
    "wishes",
    [{"storage": "nf4"}, {"recompute": "all"}, {"recompute": 5}, {"recompute": "none"}, {"micro_tokens": 2048}, {"optimizer": "adamw_8bit"}, {"offload": True}],
)  # fmt: skip
def test_wishes_are_kept_where_they_fit(wishes: dict[str, Any]) -> None:
    found = made(gpu="h200", **wishes)
    assert found.given_up == () and found.asked is None and found.best is not None
    setting = found.best.setting
    kept = {
        "storage": setting.storage, "micro_tokens": found.best.budget_tokens, "optimizer": setting.optimizer, "offload": setting.offload,
        "recompute": {0: "none", 32: "all"}.get(setting.levels.count("layer"), setting.levels.count("layer")),
    }  # fmt: skip
    assert {name: kept[name] for name in wishes} == wishes


def test_what_does_not_fit_is_given_up_and_nothing_else() -> None:
    found = made(storage="bf16", recompute="none", micro_tokens=8192)
    assert found.given_up == ("training.micro_batch_tokens",)
    assert (
        found.best is not None and found.best.setting.storage == "bf16" and set(found.best.setting.levels) == {"none"}
    )
    assert found.asked is not None and not found.asked.fits and found.asked.budget_tokens == 8192
    found = made(gpu="rtx3070", storage="bf16", micro_tokens=2048)
    assert found.given_up[-1] == "model.storage"
    assert found.best is not None and found.best.setting.storage == "nf4"


def test_what_fits_nowhere_has_no_choice_but_numbers() -> None:
    found = made("llama-3.1-70b", storage="bf16")
    assert found.best is None and found.least.setting.storage == "nf4"
    assert {rung.verdict for rung in found.rungs} == {"does not fit"}
    assert min(rung.needed_bytes for rung in found.rungs) == found.least.memory.device_bytes > 30 * 2**30


def test_effort_grows_only_where_it_must() -> None:
    easy, hard = made(gpu="h200").best, made(gpu="rtx3070", changes=LONG_ROWS).best
    assert easy is not None and (easy.setting.optimizer, easy.setting.offload) == ("adamw", False)
    assert hard is not None and (hard.setting.optimizer, hard.setting.offload) == ("paged_adamw_8bit", True)


def test_a_method_that_needs_the_weights_is_not_quantized() -> None:
    assert made(gpu="rtx4080", changes={"quantizes": False}).best is None
    found = made(gpu="rtx4090", changes={"quantizes": False})
    assert not any(rung.setting.startswith(("nf4", "fp8")) for rung in found.rungs)


def test_several_gpus_share_the_rows_of_a_step() -> None:
    one, four = made(gpu="h200").best, made(gpu="4xh200").best
    assert one is not None and four is not None
    assert 3 < four.tokens_per_second / one.tokens_per_second <= 4.5
    assert four.setting.micro_tokens < one.setting.micro_tokens


def test_no_micro_batch_is_smaller_than_the_longest_row() -> None:
    for gpu in ("rtx3070", "rtx4080"):
        best = made(gpu=gpu, changes=LONG_ROWS, micro_tokens=None).best
        assert best is not None and best.budget_tokens >= 3000 and best.setting.micro_tokens % 3000 == 0


def test_levels_go_up_from_the_first_layer() -> None:
    ladder = level_ladder(2, None, fast_path=True, offload=False)
    last = ladder(0)[1]
    found = [ladder(place)[0] for place in range(last + 1)]
    assert found[:4] == [("none", "none"), ("mlp", "none"), ("mlp", "mlp"), ("blocks", "mlp")]
    assert found[-1] == ("tiles", "tiles") and len(found) == 9
    ordinary = level_ladder(2, None, fast_path=False, offload=False)
    assert [ordinary(place)[0] for place in range(ordinary(0)[1] + 1)] == [("none", "none"), ("layer", "none"), ("layer", "layer")]  # fmt: skip
    assert level_ladder(3, 2, fast_path=True, offload=False)(0) == (("layer", "layer", "none"), 0)
    assert level_ladder(3, "none", fast_path=True, offload=False)(0) == (("none",) * 3, 0)
    assert level_ladder(2, None, fast_path=True, offload=True)(0)[0] == ("layer", "layer")


def test_levels_in_words() -> None:
    assert tell_levels(("none", "none")) == "nothing computed again"
    assert tell_levels(("mlp", "mlp")) == "gate and up computed again"
    assert tell_levels(("layer", "none")) == "whole layers computed again in 1 of 2 layers"


def test_fp8_is_shown_with_the_other_wishes_kept() -> None:
    found = made(gpu="h200", micro_tokens=2048, recompute="all")
    rung = next(rung for rung in found.rungs if rung.setting.startswith("fp8"))
    assert "2,048 tokens a pass" in rung.setting and "whole layers computed again" in rung.setting


def test_the_exchange_of_gradients_is_in_every_rung() -> None:
    one = job(gpu="2xh200")
    best = choose(one, Wishes()).best
    assert best is not None
    alone = sum(speed.step_seconds(one.load, best.setting, one.gpu, batches) for batches in cut_of(one, best)) / 12
    shared = speed.exchange_seconds(one.load, 2)
    assert shared == 2 * 4 * one.load.count.trainable / speed.GRADIENT_BYTES_A_SECOND
    assert best.step_seconds == pytest.approx(alone + shared) and speed.exchange_seconds(one.load, 1) == 0.0


def cut_of(one: Job, best: Candidate) -> list[list[MicroBatch]]:
    steps = one.lengths.steps(rows_a_step=one.rows_a_step)
    return cut_steps(steps, budget_tokens=best.budget_tokens, gpus=one.group.count, pack=one.pack)


def test_gpus_without_rows_are_no_speed() -> None:
    few = {"lengths": equal_rows(1000, 512), "rows_a_step": 2}
    two, eight = made(gpu="2xh200", changes=few).best, made(gpu="8xh200", changes=few).best
    assert two is not None and eight is not None
    assert eight.tokens_per_second == pytest.approx(two.tokens_per_second)


def test_whether_wishes_can_be_kept() -> None:
    assert fits(job(gpu="h200"), Wishes(storage="bf16")) and not fits(job(gpu="rtx3070"), Wishes(storage="bf16"))
