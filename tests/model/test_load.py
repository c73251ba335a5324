from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from onlay.errors import BaseModelError, SetupError
from onlay.hardware import Device, Hardware, find_hardware
from onlay.kernels import nf4
from onlay.model import load
from onlay.model.facts import read_facts
from onlay.model.load import Base, choose_compute, load_base, weight_checksums
from onlay.model.quantize import QuantizedLinear, round_trip
from onlay.recipe import ModelSection
from tests.builders import save_tiny_base

CPU = Hardware(devices=[], cpu_cores=2, host_memory_bytes=2**33, platform="test")


def gpu(*capability: int) -> Hardware:
    device = Device(name="GPU", memory_bytes=2**34, compute_capability=(capability[0], capability[1]))
    return CPU.model_copy(update={"devices": [device]})


def section(folder: Path, **fields: Any) -> ModelSection:
    return ModelSection.model_validate({"base": str(folder), **fields})


def load_from(folder: Path, *, attention: str | None = None, seed: int = 0, **fields: Any) -> Base:
    asked = section(folder, **fields)
    return load_base(read_facts(asked), asked, CPU, attention=attention, seed=seed)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"), tied=request.param)


def make_base(folder: Path, *, tied: bool) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def edit(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("asked", "hardware", "expected"),
    [
        ("auto", CPU, "fp32"),
        ("auto", gpu(7, 5), "fp16"),
        ("auto", gpu(8, 0), "bf16"),
        ("auto", gpu(9, 0), "bf16"),
        ("fp16", CPU, "fp16"),
        ("bf16", CPU, "bf16"),
        ("fp32", gpu(9, 0), "fp32"),
    ],
)
def test_compute_is_what_the_device_is_good_at(asked: str, hardware: Hardware, expected: str) -> None:
    assert choose_compute(ModelSection.model_validate({"base": "x", "compute": asked}), hardware) == expected


def test_a_loaded_base_is_frozen_quiet_and_exact(made: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = load_from(made)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not base.model.training
    assert base.model.config.use_cache is False
    assert base.compute_dtype == base.weight_dtype == torch.float32
    assert base.attention == "sdpa"
    stored = load_file(made / "model.safetensors")
    for name, tensor in stored.items():
        assert torch.equal(base.model.state_dict()[name], tensor)
    facts = read_facts(section(made))
    modules = dict(base.model.named_modules())
    for name, (outputs, inputs) in facts.linear_shapes.items():
        assert isinstance(modules[name], nn.Linear)
        assert (modules[name].out_features, modules[name].in_features) == (outputs, inputs)
    assert facts.num_parameters == sum(parameter.numel() for parameter in base.model.parameters())


@pytest.mark.parametrize(("compute", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_sixteen_bits_on_the_cpu_when_asked_for(made: Path, compute: str, dtype: torch.dtype) -> None:
    base = load_from(made, compute=compute, attention="eager")
    assert base.compute_dtype == base.weight_dtype == dtype
    assert {parameter.dtype for parameter in base.model.parameters()} == {dtype}
    assert base.attention == "eager"


def test_random_weights_follow_the_seed_and_leave_the_global_one_alone(made: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((made / name).read_bytes())
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (load_from(tmp_path, weights="random", seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.rand(3), expected)
    name = "model.layers.0.self_attn.q_proj.weight"
    weight = first.model.state_dict()[name]
    assert torch.equal(weight, again.model.state_dict()[name])
    assert not torch.equal(weight, other.model.state_dict()[name])
    assert weight.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in first.model.parameters())


def test_weights_that_do_not_belong_to_the_architecture(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    key = "model.layers.1.mlp.up_proj.weight"
    cases: list[tuple[Any, str]] = [
        (lambda tensors: tensors.pop(key), rf"{key} is missing"),
        (lambda tensors: tensors.update(extra=torch.zeros(2)), "extra is stored, but LlamaForCausalLM has no such"),
        (lambda tensors: tensors.update({key: torch.zeros(24, 8)}), r"is stored as 24 x 8, but .* has 24 x 16"),
        (
            lambda tensors: [tensors.pop(name) for name in list(tensors) if ".1." in name],
            r"model.layers.1.input_layernorm.weight, .* and 7 more are missing",
        ),
    ]
    for number, (change, words) in enumerate(cases):
        folder = make_base(tmp_path / str(number), tied=True)
        edit(folder, change)
        with pytest.raises(BaseModelError, match=words) as caught:
            load_from(folder)
        assert len(str(caught.value).splitlines()) == 2
    captured = capfd.readouterr()
    assert "LOAD REPORT" not in captured.out + captured.err


def test_an_attention_that_there_is_not_is_two_lines(made: Path) -> None:
    with pytest.raises(BaseModelError, match="cannot be loaded") as caught:
        load_from(made, attention="flash_attention_2")
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("storage", ["auto", "bf16", "nf4", "int8", "fp8"])
def test_progress_and_notes_of_every_storage(made: Path, storage: str) -> None:
    told: list[tuple[int, int]] = []
    asked = section(made, storage=storage)
    base = load_base(read_facts(asked), asked, CPU, progress=lambda done, total: told.append((done, total)))
    stored = sum(tensor.numel() * tensor.element_size() for tensor in load_file(made / "model.safetensors").values())
    assert told[-1] == (stored, stored)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert base.storage == {"auto": "bf16"}.get(storage, storage)
    assert base.notes["storage"].startswith(f"{base.storage}: ")
    assert ("storage_16_bit" in base.notes) == (storage in ("nf4", "int8", "fp8"))
    assert "placement" not in base.notes
    kept = {str(parameter.dtype) for parameter in base.model.parameters()}
    assert kept == {"torch.float32"} | {"nf4": {"torch.uint8"}, "int8": {"torch.int8"}, "fp8": {"torch.uint8"}}.get(
        storage, set()
    )


@pytest.mark.parametrize("storage", ["bf16", "nf4"])
def test_shards_are_read_like_a_single_file(tmp_path: Path, storage: str) -> None:
    make_base(tmp_path / "one", tied=False)
    base = load_from(tmp_path / "one", storage=storage)
    whole = load_from(tmp_path / "one").model
    whole.save_pretrained(tmp_path / "many", max_shard_size="4KB")
    (tmp_path / "many" / "tokenizer.json").write_text("{}")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    again = load_from(tmp_path / "many", storage=storage)
    expected = base.model.state_dict()
    assert again.model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.model.state_dict().items())


def test_the_files_own_generation_settings_are_kept(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text('{"eos_token_id": [3, 5], "top_k": 7}')
    settings = load_from(tmp_path / "base").model.generation_config
    assert settings is not None
    assert settings.eos_token_id == [3, 5]
    assert settings.top_k == 7
    assert load_from(made).model.generation_config is not None


def test_code_that_comes_with_the_base_runs_when_it_is_trusted(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base--own"  # Two dashes, as in the hub's cache.
    shutil.copytree(made, folder)
    (folder / "modeling_own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'onlay_own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "onlay_own", "architectures": ["OwnForCausalLM"],
        "auto_map": {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    for storage in ("bf16", "int8"):
        loaded = load_from(folder, trust_remote_code=True, storage=storage).model
        assert type(loaded).__name__ == "OwnForCausalLM"
        assert torch.equal(loaded.lm_head.weight, load_from(made).model.lm_head.weight)


def test_nf4_without_bitsandbytes_says_what_to_install(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nf4.bitsandbytes_kernels.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(SetupError, match=r"onlay\[quantized\]"):
        load_from(made, storage="nf4")
    assert load_from(made, storage="int8").storage == "int8"


@pytest.mark.parametrize("storage", ["bf16", "nf4"])
def test_a_base_too_large_for_one_gpu_is_spread(made: Path, monkeypatch: pytest.MonkeyPatch, storage: str) -> None:
    """Here there is one place only, but it is transformers that finds that out."""
    asked = section(made, storage=storage)
    alone = load_base(read_facts(asked), asked, CPU, spread=True)
    assert "placement" not in alone.notes
    monkeypatch.setattr(load, "needs_spreading", lambda *_: True)
    spread = load_base(read_facts(asked), asked, CPU, spread=True)
    assert spread.notes["placement"] == "everything on cpu"
    ids = torch.arange(8)[None]
    assert torch.equal(spread.model(input_ids=ids).logits, alone.model(input_ids=ids).logits)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("storage", ["bf16", "nf4", "int8", "fp8"])
def test_a_base_spread_over_gpu_and_host_computes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: str
) -> None:
    save_tiny_base(tmp_path, num_hidden_layers=6)
    asked = section(tmp_path, storage=storage, compute="fp32")
    here = find_hardware()
    alone = load_base(read_facts(asked), asked, here)
    monkeypatch.setattr(load, "needs_spreading", lambda *_: True)
    for room in range(280_000, 20_000, -20_000):  # What counts as room left is transformers' affair.
        monkeypatch.setattr(load, "spread_memory", lambda _, room=room: {0: room, "cpu": 2**33})
        spread = load_base(read_facts(asked), asked, here, spread=True)
        if "on cpu" in spread.notes["placement"]:
            break
    assert "on cuda:0" in spread.notes["placement"]
    assert "on cpu" in spread.notes["placement"]
    ids = torch.arange(8, device="cuda")[None]
    found, expected = spread.model(input_ids=ids).logits, alone.model(input_ids=ids).logits
    assert float((found - expected).norm()) <= torch.finfo(torch.float32).eps ** 0.5 * float(expected.norm())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("storage", ["bf16", "nf4", "int8", "fp8"])
def test_a_gpu_holds_what_the_files_hold(tmp_path: Path, storage: str) -> None:
    save_tiny_base(tmp_path)
    asked = section(tmp_path, storage=storage)
    base = load_base(read_facts(asked), asked, find_hardware())
    assert {tensor.device.type for tensor in (*base.model.parameters(), *base.model.buffers())} == {"cuda"}
    for name, stored in load_file(tmp_path / "model.safetensors").items():
        module = base.model.get_submodule(name.rpartition(".")[0])
        weight = stored.to("cuda", base.weight_dtype)
        if isinstance(module, QuantizedLinear):
            assert torch.equal(module.dequantize(), round_trip(weight, storage=storage))
        else:
            assert torch.equal(base.model.state_dict()[name], weight)


def test_importing_the_file_imports_nothing_heavy() -> None:
    heavy = "[name for name in ('torch', 'transformers', 'huggingface_hub') if name in sys.modules]"
    modules = "onlay.model.load, onlay.model.facts, onlay.model.tokenizer, onlay.hardware, onlay.ledger, onlay.doctor"
    script = f"import sys, {modules}; print({heavy})"
    root = Path(load.__file__).parent.parent.parent
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------------------------------------------------- checksums


class Weights(nn.Module):
    def __init__(self, **tensors: torch.Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@pytest.mark.parametrize("dtype", [*INTEGERS, torch.float64, torch.uint8, torch.int8], ids=str)
@pytest.mark.parametrize("count", [0, 1, 7, 64, 200])
def test_checksums_are_the_sums_they_claim_to_be(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, count: int
) -> None:
    values = list(random.Random(count).randbytes(count * dtype.itemsize))
    tensor = torch.tensor(values, dtype=torch.uint8).view(dtype)
    before = tensor.view(torch.uint8).clone()
    bits = tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]).tolist()
    expected = (sum(bits) % 2**64 << 64) + sum(place * bit for place, bit in enumerate(bits, 1)) % 2**64
    for chunk in (2**16, 16, 5):
        monkeypatch.setattr(load, "_CPU_CHUNK_ELEMENTS", chunk)
        assert weight_checksums(Weights(weight=tensor)) == {"weight": expected}
    assert torch.equal(tensor.view(torch.uint8), before)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_a_flipped_bit_and_two_swapped_values_are_seen(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = Weights(weight=torch.randn(300, 401).to(dtype))
    flat = module.weight.data.view(-1)
    bits = flat.view(INTEGERS[dtype])
    original = weight_checksums(module)
    for place in (0, 65_535, 65_536, flat.numel() - 1):
        for bit in range(8 * dtype.itemsize - 1):
            bits[place] ^= 1 << bit
            assert weight_checksums(module) != original
            bits[place] ^= 1 << bit
    for one, other in ((0, 1), (5, 65_541), (0, flat.numel() - 1), (70_000, 70_001)):
        assert flat[one] != flat[other]
        flat[[one, other]] = flat[[other, one]]
        assert weight_checksums(module) != original
        flat[[one, other]] = flat[[other, one]]
    # Not a number and the sign of zero are bits like others.
    flat[3] = float("nan")
    with_nan = weight_checksums(module)
    assert with_nan == weight_checksums(module) != original
    flat[3] = 0.0
    zero = weight_checksums(module)
    flat[3] = -0.0
    assert weight_checksums(module) != zero


def test_checksums_cover_frozen_weights_only_and_do_not_depend_on_layout() -> None:
    weight = torch.randn(6, 4)
    module = Weights(plain=weight, turned=weight.t().contiguous().t())
    module.trained = nn.Parameter(weight.clone())
    found = weight_checksums(module)
    assert set(found) == {"plain", "turned"}
    assert found["plain"] == found["turned"]
    assert weight_checksums(nn.Module()) == {}
