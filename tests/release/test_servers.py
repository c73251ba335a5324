"""What each server is said to do with an adapter: small PEFT folders, one peculiarity each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from onlay.release.servers import VLLM_RANKS, Verdicts, judge, read_features

ALL = ("vLLM", "SGLang", "LoRAX", "TGI", "llama.cpp")


def save_adapter(
    folder: Path,
    *,
    rank: int = 16,
    modules: tuple[str, ...] = ("self_attn.q_proj", "mlp.down_proj"),
    layers: int = 2,
    extra: Mapping[str, tuple[int, ...]] | None = None,
    notes: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """A PEFT adapter of zeros; `extra` are further tensors by name and shape."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        for module in modules:
            name = f"base_model.model.model.layers.{layer}.{module}"
            shapes |= {f"{name}.lora_A.weight": (rank, 32), f"{name}.lora_B.weight": (32, rank)}
    shapes |= extra or {}
    save_file(
        {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, folder / "adapter_model.safetensors"
    )
    targets = sorted({module.rpartition(".")[2] for module in modules})
    values = {
        "peft_type": "LORA", "r": rank, "lora_alpha": 32, "bias": "none", "target_modules": targets,
        "base_model_name_or_path": "org/base", "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
        "use_dora": False, "use_rslora": False, "fan_in_fan_out": False,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(values | config))
    if notes is not None:
        (folder / "onlay.json").write_text(json.dumps({"base": "org/base", "base_revision": None} | notes))
    return folder


def verdicts(folder: Path) -> dict[str, Verdicts]:
    return {one.server: one for one in judge(read_features(folder), base="org/base", name="support")}


def accepting(folder: Path) -> tuple[str, ...]:
    return tuple(name for name, one in verdicts(folder).items() if one.verdict != "not accepted")


def test_a_plain_adapter_is_taken_by_all(tmp_path: Path) -> None:
    found = verdicts(save_adapter(tmp_path / "a"))
    assert {name: one.verdict for name, one in found.items()} == {
        "vLLM": "accepted", "SGLang": "accepted", "LoRAX": "accepted", "TGI": "accepted with flags",
        "llama.cpp": "accepted with flags",
    }  # fmt: skip
    assert all(str(tmp_path / "a") in " ".join([one.flags, *one.reasons]) for one in found.values())
    assert "--max-lora-rank" not in found["vLLM"].flags
    assert "--lora-modules support=" in found["vLLM"].flags
    assert "convert_lora_to_gguf" in found["llama.cpp"].flags


@pytest.mark.parametrize(("rank", "flag"), [(16, None), (24, 32), (64, 64), (200, 256), (257, 320), (512, 512)])
def test_vllm_is_told_the_smallest_rank_that_it_allows(tmp_path: Path, rank: int, flag: int | None) -> None:
    found = verdicts(save_adapter(tmp_path, rank=rank))["vLLM"]
    assert found.verdict == ("accepted" if flag is None else "accepted with flags")
    assert (f"--max-lora-rank {flag}" in found.flags) == (flag is not None)
    assert flag is None or flag in VLLM_RANKS


def test_a_rank_above_the_largest_is_not_taken_by_vllm(tmp_path: Path) -> None:
    found = verdicts(save_adapter(tmp_path, rank=1024))["vLLM"]
    assert found.verdict == "not accepted" and found.flags == ""
    assert "rank 1024 is above 512" in found.reasons[0]
    assert found.reasons[-1].startswith("instead: onlay merge")


@pytest.mark.parametrize("rank", [8, 16, 48, 128, 256])
def test_ranks_that_are_not_padded(tmp_path: Path, rank: int) -> None:
    assert {"LoRAX", "TGI"} <= set(accepting(save_adapter(tmp_path, rank=rank)))


@pytest.mark.parametrize("rank", [1, 4, 12, 24, 100])
def test_ranks_that_lorax_and_tgi_pad_and_then_scale_by(tmp_path: Path, rank: int) -> None:
    found = verdicts(save_adapter(tmp_path, rank=rank))
    for server in ("LoRAX", "TGI"):
        assert found[server].verdict == "not accepted"
        assert f"rank {rank} is padded" in found[server].reasons[0]


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("changes", "takers"),
    [
        ({"use_dora": True, "extra": {f"{Q}.lora_magnitude_vector": (32,)}}, ()),
        ({"bias": "all", "extra": {f"{Q}.bias": (32,)}}, ()),
        ({"extra": {f"{Q}.bias": (32,)}}, ()),  # whatever the config says
        ({"modules_to_save": ["lm_head"], "extra": {"base_model.model.lm_head.weight": (64, 32)}}, ()),
        ({"extra": {"base_model.model.model.embed_tokens.weight": (64, 32)}}, ()),
        ({"use_rslora": True}, ("vLLM", "LoRAX", "TGI")),
        ({"alpha_pattern": {"q_proj": 8}}, ()),
        ({"target_modules": ".*_proj"}, ("vLLM", "LoRAX", "TGI", "llama.cpp")),
        ({"target_parameters": ["mlp.experts.down_proj"]}, ()),
        ({"modules": ("attn.c_attn",), "fan_in_fan_out": True}, ("vLLM", "LoRAX", "TGI")),
        (
            {"rank_pattern": {"o_proj": 8},
             "extra": {"base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight": (8, 32),
                       "base_model.model.model.layers.0.self_attn.o_proj.lora_B.weight": (32, 8)}},
            ("llama.cpp",),
        ),
        (
            {"extra": {"base_model.model.model.embed_tokens.lora_embedding_A": (16, 64),
                       "base_model.model.model.embed_tokens.lora_embedding_B": (32, 16)}},
            ("vLLM", "SGLang", "llama.cpp"),
        ),
        (
            {"extra": {f"{Q.replace('.0.', '.1.').replace('q_proj', 'v_proj')}.lora_A.weight": (16, 32),
                       f"{Q.replace('.0.', '.1.').replace('q_proj', 'v_proj')}.lora_B.weight": (32, 16)}},
            ("vLLM", "SGLang", "llama.cpp"),
        ),
        ({"notes": {"storage": "nf4", "method": "loftq"}}, ("vLLM",)),
        ({"notes": {"storage": "int8", "method": "loftq"}}, ()),
        ({"notes": {"storage": "nf4", "method": "lora"}}, ALL),
    ],
)  # fmt: skip
def test_who_takes_what_is_peculiar(tmp_path: Path, changes: dict[str, Any], takers: tuple[str, ...]) -> None:
    assert accepting(save_adapter(tmp_path, **changes)) == takers


def test_a_base_that_was_quantized_in_training_is_told(tmp_path: Path) -> None:
    found = verdicts(save_adapter(tmp_path, notes={"storage": "nf4", "method": "lora"}))
    assert found["vLLM"].verdict == "accepted with flags"
    assert "--quantization bitsandbytes" in found["vLLM"].flags
    assert any("trained on the base in nf4" in reason for reason in found["SGLang"].reasons)


def test_the_ranks_are_those_of_the_header_not_of_the_config(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path, rank=64)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 16}))
    assert read_features(folder).ranks == (64,)
