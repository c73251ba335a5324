"""Seconds of a step: against measured steps, those the constants were fitted to and others."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from onlay.planning import speed
from onlay.planning.devices import Gpu, find_gpu, read_gpus
from onlay.planning.memory import Load, Setting, load_of
from onlay.planning.shapes import find_shape
from onlay.planning.speed import MicroBatch, flops_a_token, forward_seconds, step_seconds
from onlay.recipe import FullTuning, HeadAdapter, LoraAdapter

GSM8K = Path(__file__).parents[2] / "bench" / "gsm8k_lengths.json"
B8, B70 = "llama-3.1-8b", "llama-3.1-70b"


def gpu(name: str = "h200") -> Gpu:
    return find_gpu(name, gpus=read_gpus()).gpu


def even(rows: int, tokens: int) -> MicroBatch:
    return MicroBatch(lengths=(tokens,) * rows)


def gsm8k(rows: int) -> MicroBatch:
    counts = json.loads(GSM8K.read_text(encoding="utf-8"))
    every = [int(length) for length, number in counts.items() for _ in range(number)]
    random.Random(0).shuffle(every)
    return MicroBatch(lengths=tuple(every[:rows]))


def made(
    base: str = B8,
    section: Any = None,
    *,
    storage: str = "bf16",
    level: str = "none",
    fp8: bool = False,
    fast: bool = True,
) -> tuple[Load, Setting]:
    shape = find_shape(base)
    levels = (level,) * shape.num_layers
    setting = Setting(storage=storage, fp8_products=fp8, micro_tokens=1, levels=levels, fast_path=fast)
    return load_of(shape, section or LoraAdapter()), setting


def rate(batch: MicroBatch, name: str = "h200", **what: Any) -> float:
    load, setting = made(**what)
    return batch.tokens / step_seconds(load, setting, gpu(name), [batch])


NF4: dict[str, Any] = {"storage": "nf4"}
ORDINARY: dict[str, Any] = {"fast": False}
FITTED: list[tuple[MicroBatch, dict[str, Any], int]] = [
    (even(8, 2048), {}, 17_400),
    (even(1, 2048), {}, 16_500),
    (even(8, 2048), NF4 | ORDINARY, 10_641),
    (even(1, 2048), NF4 | ORDINARY | {"level": "layer"}, 5_451),
]
CHECKED: list[tuple[MicroBatch, dict[str, Any], int]] = [
    (even(8, 2048), {"storage": "fp8", "fp8": True}, 25_000),
    (even(8, 2048), NF4 | {"fp8": True}, 24_600),
    (even(8, 2048), NF4 | {"level": "mlp"}, 14_200),
    (even(8, 2048), NF4 | {"level": "blocks"}, 13_400),
    (even(8, 2048), NF4 | {"level": "layer"}, 12_100),
    (even(8, 2048), ORDINARY, 10_778),
    (even(8, 2048), ORDINARY | {"storage": "int8"}, 10_506),
    (even(8, 2048), NF4 | ORDINARY | {"level": "layer"}, 7_534),
    (even(1, 4096), NF4 | ORDINARY | {"level": "layer", "base": B70}, 1_030),
]


@pytest.mark.parametrize(("batch", "what", "tokens_per_second"), [*FITTED, *CHECKED])
def test_forecasts_are_what_was_measured(batch: MicroBatch, what: dict[str, Any], tokens_per_second: int) -> None:
    assert rate(batch, **what) == pytest.approx(tokens_per_second, rel=0.04)


@pytest.mark.parametrize(("what", "tokens_per_second"), [({"storage": "fp8", "fp8": True}, 26_500), (NF4, 18_100)])
def test_short_rows_are_too(what: dict[str, Any], tokens_per_second: int) -> None:
    """Rows as long as GSM8K's, packed: the share of attention's traffic was fitted to the first."""
    assert rate(gsm8k(96), **what) == pytest.approx(tokens_per_second, rel=0.04)


def test_more_work_takes_longer() -> None:
    plain = rate(even(8, 2048))
    assert rate(even(8, 2048), section=LoraAdapter(rank=256)) < plain
    assert rate(even(1, 16384)) < plain  # Each token sees eight times as many.
    assert rate(even(8, 2048), section=FullTuning(method="full"), fast=False) < rate(even(8, 2048), fast=False)
    assert rate(even(8, 2048), storage="nf4") < plain
    assert rate(even(8, 2048), name="a100") < rate(even(8, 2048), name="h100") < plain


def test_a_step_is_the_sum_of_its_micro_batches() -> None:
    load, setting = made()
    one, two = (step_seconds(load, setting, gpu(), [even(2, 1024)] * count) for count in (1, 2))
    assert two - one == pytest.approx(one - speed.STEP_SECONDS)


def test_products_cost_four_a_weight_and_six_recomputed() -> None:
    shape = find_shape(B8)
    weights = shape.linear_parameters + shape.vocabulary_size * shape.hidden_size
    adapter = 6 * 41_943_040
    load, setting = made()
    assert flops_a_token(load, setting, seen=0) == 4 * weights + adapter
    load, setting = made(level="layer")
    assert flops_a_token(load, setting, seen=0) == 4 * weights + 2 * shape.linear_parameters + adapter
    load, setting = made(section=FullTuning(method="full"), fast=False)
    assert flops_a_token(load, setting, seen=0) == 6 * weights
    seen = 14 * shape.num_layers * shape.hidden_size * 1024
    assert flops_a_token(load, setting, seen=1024) == 6 * weights + seen


def test_an_evaluation_is_a_forward_pass_without_recomputation() -> None:
    load, setting = made(level="layer")
    plain_load, plain = made()
    batches = [even(4, 512)]
    assert forward_seconds(load, setting, gpu(), batches) == forward_seconds(plain_load, plain, gpu(), batches)
    assert forward_seconds(load, setting, gpu(), batches) < 0.5 * step_seconds(plain_load, plain, gpu(), batches)


def test_under_a_head_the_body_runs_forward_alone() -> None:
    shape = find_shape(B8)
    load = load_of(shape, HeadAdapter(method="head"), num_labels=3)
    _, setting = made(fast=False)
    batch = [even(8, 2048)]
    whole_load, whole = made(fast=False)
    assert step_seconds(load, setting, gpu(), batch) < 0.5 * step_seconds(whole_load, whole, gpu(), batch)
    assert flops_a_token(load, setting, seen=0) == 2 * shape.linear_parameters


def test_gpus_without_fp8_multiply_in_16_bit() -> None:
    a100 = gpu("a100")
    _, setting = made(storage="nf4", fp8=True)
    assert a100.fp8_tflops is None
    assert speed._product_rate(setting, a100) == speed.PRODUCT_SHARE * a100.tflops * 1e12


def test_what_a_token_sees() -> None:
    assert even(3, 100).seen == 50 and even(3, 100).is_even
    mixed = MicroBatch(lengths=(100, 300))
    assert mixed.seen == (100**2 + 300**2) / 800 and not mixed.is_even
