from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from onlay.errors import SetupError
from onlay.hardware import Device, Hardware
from onlay.model.storage import (
    BASE_SHARE,
    SPREAD_SHARE,
    bytes_per_weight,
    choose_storage,
    describe_placement,
    multiplies_in_fp8,
    needs_spreading,
    refuse_fp8,
    spread_memory,
    stored_bytes,
)
from onlay.recipe import ModelSection
from onlay.records import ModelFacts

LINEAR, REST = 900_000, 100_000


def facts() -> ModelFacts:
    return ModelFacts(
        name="base", path="/base", architecture="LlamaForCausalLM", model_type="llama", revision=None, licence=None,
        num_parameters=LINEAR + REST, weight_bytes=2 * (LINEAR + REST), vocabulary_size=10, context_tokens=10,
        hidden_size=10, num_layers=1, weight_fingerprint="x", sources={},
        linear_shapes={"q": (900, 500), "o": (500, 900), "experts.0.up": (1, 1)},
    )  # fmt: skip


def machine(*gpu_bytes: float) -> Hardware:
    devices = [Device(name="GPU", memory_bytes=int(size), compute_capability=(9, 0)) for size in gpu_bytes]
    return Hardware(devices=devices, cpu_cores=2, host_memory_bytes=2**33, platform="test")


def section(**fields: Any) -> ModelSection:
    return ModelSection.model_validate({"base": "base", **fields})


FP8_GPU = Device(name="RTX 4090", memory_bytes=2**35, compute_capability=(8, 9))
ENOUGH = 2 * (LINEAR + REST) / BASE_SHARE


@pytest.mark.parametrize(
    ("hardware", "options", "expected", "words"),
    [
        (machine(), {}, "bf16", "on a CPU"),
        (machine(ENOUGH + 1), {}, "bf16", "it fits"),
        (machine(ENOUGH - 10), {}, "nf4", "75%"),
        (machine(2 * ENOUGH, ENOUGH - 10), {}, "nf4", "75%"),
        (machine(ENOUGH - 10), {"trains_weights": True}, "bf16", "as they are"),
        (machine(ENOUGH - 10), {"needs_16_bit": True}, "bf16", "as they are"),
    ],
)
def test_auto(hardware: Hardware, options: dict[str, bool], expected: str, words: str) -> None:
    storage, reason = choose_storage(facts(), section(), hardware, **options)
    assert storage == expected
    assert words in reason


def test_auto_in_float32_needs_twice_the_room() -> None:
    assert choose_storage(facts(), section(compute="fp32"), machine(ENOUGH + 1))[0] == "nf4"
    assert choose_storage(facts(), section(compute="fp32"), machine(2 * ENOUGH + 1))[0] == "bf16"


def test_auto_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    storage, reason = choose_storage(facts(), section(), machine(1000))
    assert storage == "bf16"
    assert "not installed" in reason


@pytest.mark.parametrize("asked", ["bf16", "nf4", "int8", "fp8"])
def test_what_is_asked_for_is_done(asked: str) -> None:
    assert choose_storage(facts(), section(storage=asked), machine(1000))[0] == asked
    assert choose_storage(facts(), section(storage=asked), machine())[0] == asked


def test_bytes() -> None:
    assert bytes_per_weight("nf4", True) == 0.5 + 1 / 64 + 1 / 4096
    assert bytes_per_weight("nf4", False) == 0.5 + 1 / 16
    assert stored_bytes(facts(), section(), "bf16") == 2 * (LINEAR + REST)
    assert stored_bytes(facts(), section(), "int8") == LINEAR + 2 * REST
    # Neither size of o and q is a multiple of 16: FP8 does not take them.
    assert stored_bytes(facts(), section(), "fp8") == 2 * (LINEAR + REST)
    fitting = facts().model_copy(update={"linear_shapes": {"q": (896, 512)}})
    assert stored_bytes(fitting, section(), "fp8") == 896 * 512 + 2 * (LINEAR + REST - 896 * 512)
    assert stored_bytes(facts(), section(double_quantization=False), "nf4") == round(0.5625 * LINEAR + 2 * REST)


@pytest.mark.parametrize(
    ("model", "on_gpu", "on_cpu"),
    [
        ({"storage": "fp8"}, True, False),
        ({"storage": "fp8", "compute": "fp8"}, True, True),
        ({"storage": "fp8", "compute": "bf16"}, False, False),
        ({"storage": "nf4"}, False, False),
        ({"storage": "nf4", "compute": "fp8"}, True, True),
        ({"storage": "int8"}, False, False),
        ({"storage": "bf16", "compute": "fp8"}, False, False),
    ],
)
def test_what_multiplies_in_fp8(model: dict[str, str], on_gpu: bool, on_cpu: bool) -> None:
    assert multiplies_in_fp8(section(**model), model["storage"], on_gpu=True) == on_gpu
    assert multiplies_in_fp8(section(**model), model["storage"], on_gpu=False) == on_cpu


@pytest.mark.parametrize(
    ("model", "field", "remedy"),
    [
        ({"storage": "fp8"}, "storage", "Set model.storage to nf4 or int8."),
        (
            {"storage": "nf4", "compute": "fp8"},
            "compute",
            "Set model.storage to nf4 or int8, and model.compute to auto.",
        ),
    ],
)
def test_gpus_without_fp8_are_named(model: dict[str, str], field: str, remedy: str) -> None:
    old = Device(name="RTX 3090", memory_bytes=2**35, compute_capability=(8, 6))
    for devices in ([], [FP8_GPU], [FP8_GPU, FP8_GPU]):
        refuse_fp8(section(**model), model["storage"], machine().model_copy(update={"devices": devices}))
    here = machine().model_copy(update={"devices": [FP8_GPU, old]})
    refuse_fp8(section(), "nf4", here)
    with pytest.raises(SetupError) as caught:
        refuse_fp8(section(**model), model["storage"], here)
    assert caught.value.problem == (
        f"model.{field} = fp8 needs a GPU of compute capability 8.9 or more; RTX 3090 has 8.6."
    )  # fmt: skip
    assert caught.value.remedy == remedy


def test_spreading_goes_by_the_first_gpu() -> None:
    enough = stored_bytes(facts(), section(), "nf4") / SPREAD_SHARE
    assert not needs_spreading(facts(), section(), "nf4", machine(enough + 2))
    assert needs_spreading(facts(), section(), "nf4", machine(enough - 2, 10 * enough))
    assert needs_spreading(facts(), section(), "bf16", machine(enough + 2))
    assert not needs_spreading(facts(), section(), "bf16", machine())


def test_a_spread_base_leaves_room_on_every_device() -> None:
    room = spread_memory(machine(1000, 2000))
    assert room == {0: int(SPREAD_SHARE * 1000), 1: int(SPREAD_SHARE * 2000), "cpu": int(SPREAD_SHARE * 2**33)}


@pytest.mark.parametrize(
    ("device_map", "words"),
    [
        ({"": 0}, "everything on cuda:0"),
        ({"": "cpu"}, "everything on cpu"),
        (
            {"model.embed_tokens": 0, **{f"model.layers.{i}": int(i >= 18) for i in range(32)}, "model.norm": 1, "lm_head": "cpu"},
            "embed_tokens, layers 0-17 on cuda:0; layers 18-31, norm on cuda:1; lm_head on cpu",
        ),
        (
            {"transformer.h.0": 0, "transformer.h.1.attn": 0, "transformer.h.1.mlp.up": 1, "transformer.h.2": 1, "transformer.h.4": 1},
            "h 0, h.1.attn on cuda:0; h.1.mlp.up, h 2, h 4 on cuda:1",
        ),
    ],
)  # fmt: skip
def test_placement_in_words(device_map: dict[str, int | str], words: str) -> None:
    assert describe_placement(device_map) == words
