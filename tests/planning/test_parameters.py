"""Parameter counts: the closed form against PEFT's own count of the same base on the meta device, and published totals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_FAMILIES
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

from onlay.errors import BaseModelError, RecipeError
from onlay.model.adapter import attach
from onlay.model.head import attach_head
from onlay.model.stored_names import model_without_weights
from onlay.planning.families import ruled_families
from onlay.planning.parameters import choose_linears, count_parameters
from onlay.planning.shapes import _stand_in, find_shape, read_shape
from onlay.recipe import (
    FullTuning,
    HeadAdapter,
    LoftqAdapter,
    LoraAdapter,
    LoraPlusAdapter,
    PissaAdapter,
    TargetPreset,
)

PRESETS: tuple[TargetPreset, ...] = ("all-linear", "attention", "mlp", "qv")
LLAMA = {
    "vocab_size": 96, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
GPT = {"vocab_size": 96, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 64}
HEADS = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
WIDE = LLAMA | {"head_dim": 8}
BERT = HEADS | {"is_decoder": True}
EXPERTS = {"num_experts_per_tok": 2}
TINY: dict[str, list[dict[str, Any]]] = {
    "llama": [LLAMA, HEADS, WIDE | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}],
    "granite": [LLAMA, HEADS | {"attention_bias": True, "mlp_bias": True}],
    "smollm3": [LLAMA, LLAMA | {"tie_word_embeddings": False, "attention_bias": True}],
    "mistral": [LLAMA, WIDE | {"tie_word_embeddings": True}],
    "mixtral": [LLAMA | EXPERTS | {"num_local_experts": 4}],
    "qwen2": [LLAMA, LLAMA | {"tie_word_embeddings": True}],
    "qwen3": [WIDE, WIDE | {"attention_bias": True, "tie_word_embeddings": True}],
    "qwen3_moe": [
        WIDE | EXPERTS | {"num_experts": 4, "moe_intermediate_size": 16, "attention_bias": True},
        WIDE | EXPERTS | {"num_experts": 4, "moe_intermediate_size": 16, "mlp_only_layers": [1]},
    ],
    "gemma": [WIDE, WIDE | {"attention_bias": True, "tie_word_embeddings": False}],
    "gemma2": [WIDE, WIDE | {"attention_bias": True}],
    "gemma3_text": [WIDE, WIDE | {"attention_bias": True}],
    "olmo2": [LLAMA, HEADS | {"attention_bias": True}],
    "stablelm": [LLAMA, LLAMA | {"use_qkv_bias": True}, LLAMA | {"use_parallel_residual": True, "qk_layernorm": True}],
    "phi": [LLAMA, HEADS, LLAMA | {"qk_layernorm": True}],
    "phi3": [LLAMA, HEADS | {"tie_word_embeddings": True}],
    "starcoder2": [LLAMA, LLAMA | {"use_bias": False, "tie_word_embeddings": False}],
    "gpt2": [GPT, GPT | {"n_inner": 40}, GPT | {"add_cross_attention": True}],
    "gpt_bigcode": [GPT, GPT | {"multi_query": False}],
    "gpt_neo": [
        {
            "vocab_size": 96, "hidden_size": 24, "num_layers": 4, "num_heads": 4, "max_position_embeddings": 64,
            "attention_types": [[["global", "local"], 2]], "intermediate_size": inner,
        }
        for inner in (None, 40)
    ],
    "gptj": [GPT | {"rotary_dim": 4}],
    "codegen": [GPT | {"rotary_dim": 4, "n_inner": 40}],
    "gpt_neox": [HEADS, HEADS | {"attention_bias": False, "tie_word_embeddings": True}],
    "bloom": [{"vocab_size": 96, "hidden_size": 24, "n_layer": 3, "n_head": 4}],
    "falcon": [
        HEADS,
        HEADS | {"bias": True, "multi_query": False, "parallel_attn": False},
        HEADS | {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 40},
    ],
    "opt": [
        HEADS | {"ffn_dim": 40, "word_embed_proj_dim": 24},
        HEADS | {"ffn_dim": 40, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
        HEADS | {"ffn_dim": 40, "word_embed_proj_dim": 24, "do_layer_norm_before": False, "enable_bias": False},
    ],
    "mpt": [{"vocab_size": 96, "d_model": 24, "n_layers": 3, "n_heads": 4}],
    "bart": [{"vocab_size": 96, "d_model": 24, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 40}],
    "bert": [BERT],
    "roberta": [BERT],
    "xlm-roberta": [BERT],
    "electra": [BERT | {"embedding_size": 16}],
    "llama4": [{"text_config": WIDE | EXPERTS | {"num_local_experts": 2, "intermediate_size_mlp": 48}}],
    "gemma4": [{"text_config": WIDE | {
        "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8, "global_head_dim": 8, "num_kv_shared_layers": 0,
    }}],
    "nemotron_h": [WIDE | {
        "hybrid_override_pattern": "M*-", "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1,
    }],
    "rwkv": [{"vocab_size": 96, "hidden_size": 24, "num_hidden_layers": 3, "attention_hidden_size": 24}],
}  # fmt: skip
VARIANTS = {("qwen3_moe", 1), ("stablelm", 2), ("phi", 2), ("gpt2", 2), ("opt", 1)}
"""Configs that the rule of their family does not cover."""
CASES = [(family, number) for family, configs in TINY.items() for number in range(len(configs))]


def tiny_folder(family: str, number: int, folder: Path) -> Path:
    AutoConfig.for_model(family, **TINY[family][number]).save_pretrained(folder)
    return folder


def sections(preset: TargetPreset) -> list[LoraAdapter]:
    return [
        LoraAdapter(rank=4, targets=preset),
        LoraAdapter(method="rslora", rank=3, targets=preset, bias="all"),
        LoraAdapter(method="dora", rank=2, targets=preset),
        LoraPlusAdapter(method="lora+", rank=5, targets=preset, bias="lora_only"),
        PissaAdapter(method="pissa", rank=3, targets=preset),
        LoftqAdapter(method="loftq", rank=2, targets=preset),
    ]


def counted_by_peft(folder: Path, section: LoraAdapter) -> tuple[int, int] | str:
    """Total and trainable parameters of the real model with the adapter attached, or what kind of error."""
    model = model_without_weights(_stand_in("tiny", folder)).requires_grad_(False)
    try:
        with torch.device("meta"):
            adapted, _ = attach(model, section, seed=0, resumed=True)
    except (RecipeError, BaseModelError) as error:
        return type(error).__name__
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in adapted.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)


def counted_here(folder: Path, section: LoraAdapter) -> tuple[int, int] | str:
    try:
        count = count_parameters(read_shape(folder), section)
    except (RecipeError, BaseModelError) as error:
        return type(error).__name__
    assert sum(count.modules.values()) == count.trainable
    return count.total, count.trainable


def test_every_causal_family_that_peft_knows_is_counted() -> None:
    assert {family for family in PEFT_FAMILIES if family in CAUSAL} <= set(TINY)
    assert set(ruled_families()) <= set(TINY)


@pytest.mark.parametrize(("family", "number"), CASES)
def test_the_counts_are_pefts_own(family: str, number: int, tmp_path: Path) -> None:
    folder = tiny_folder(family, number, tmp_path)
    shape = read_shape(folder)
    assert shape.how == (
        "closed form" if family in ruled_families() and (family, number) not in VARIANTS else "meta device"
    )
    model = model_without_weights(_stand_in("tiny", folder))
    assert shape.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.tied_head == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    for preset in PRESETS:
        # What a method adds does not go by the preset; and on the meta device it is PEFT that counts.
        few = preset != "all-linear" or shape.how == "meta device"
        for section in sections(preset)[:2] if few else sections(preset):
            assert counted_here(folder, section) == counted_by_peft(folder, section), (preset, section)


def trained(name: str, rank: int, targets: str | list[str] = "all-linear") -> int:
    section = LoraAdapter.model_validate({"rank": rank, "targets": targets})
    return count_parameters(find_shape(name), section).trainable


@pytest.mark.parametrize(
    ("name", "targets", "rank", "expected"),
    [
        ("llama-3-8b", "attention", 16, 13_631_488),
        ("llama-3-8b", "qv", 16, 6_815_744),
        ("llama-3-8b", "all-linear", 8, 20_971_520),
        ("llama-3-8b", "all-linear", 16, 41_943_040),
        ("llama-3-8b", "all-linear", 64, 167_772_160),
        ("llama-3.1-70b", "all-linear", 16, 207_093_760),
        ("llama-3.1-70b", "attention", 16, 65_536_000),
        ("llama-2-7b", "all-linear", 8, 19_988_480),
        ("llama-2-7b", "all-linear", 16, 39_976_960),
        ("llama-2-7b", "all-linear", 32, 79_953_920),
        ("llama-2-7b", "all-linear", 64, 159_907_840),
        ("llama-3.2-1b", "all-linear", 16, 11_272_192),
        ("llama-3.2-1b", "attention", 16, 3_407_872),
        ("llama-3.2-3b", "qv", 16, 4_587_520),
        ("llama-3.2-3b", "all-linear", 64, 97_255_424),
    ],
)
def test_published_counts(name: str, targets: str, rank: int, expected: int) -> None:
    assert trained(name, rank, targets) == expected


def test_what_peft_prints_for_8b() -> None:
    """`all params: 8,043,892,736 || trainable%: 0.1695`."""
    count = count_parameters(find_shape("llama-3-8b"), LoraAdapter(rank=16, targets="attention"))
    assert count.total == 8_043_892_736
    assert round(100 * count.share, 4) == 0.1695
    assert (count.how, count.held) == ("closed form", 0)
    assert list(count.modules) == [f"self_attn.{name}_proj" for name in "qkvo"]
    assert count.modules["self_attn.k_proj"] == 32 * 16 * (4096 + 1024)


def test_fused_experts_have_an_adapter_each() -> None:
    count = count_parameters(find_shape("mixtral-8x7b"), LoraAdapter(rank=2, targets="mlp"))
    assert count.modules == {
        "mlp.experts.gate_up_proj": 32 * 2 * 8 * (4096 + 2 * 14336),
        "mlp.experts.down_proj": 32 * 2 * 8 * (14336 + 4096),
    }


@pytest.mark.parametrize("family", ["llama", "phi", "opt", "gptj", "rwkv"])
def test_full_and_head(family: str, tmp_path: Path) -> None:
    shape = read_shape(tiny_folder(family, 0, tmp_path))
    full = count_parameters(shape, FullTuning(method="full"))
    assert full.total == full.trainable == shape.num_parameters
    head = count_parameters(shape, HeadAdapter(method="head"), num_labels=5)
    real = attach_head(model_without_weights(_stand_in("tiny", tmp_path)), list("abcde"))
    assert head.total == sum(parameter.numel() for parameter in real.parameters())
    assert head.trainable == real.score.weight.numel() == 5 * 24
    assert head.modules == {"score": 120}


def test_a_head_needs_the_number_of_labels() -> None:
    for num_labels in (None, 1):
        with pytest.raises(RecipeError, match=f"num_labels = {num_labels}"):
            count_parameters(find_shape("gpt2"), HeadAdapter(method="head"), num_labels=num_labels)


def test_half_of_pissa_is_held(tmp_path: Path) -> None:
    section = PissaAdapter(method="pissa", rank=4, targets="qv")
    for family in ("llama", "rwkv"):
        (tmp_path / family).mkdir()
        shape = read_shape(tiny_folder(family, 0, tmp_path / family))
        if family == "rwkv":
            section = PissaAdapter(method="pissa", rank=4, targets=["receptance"], bias="all")
        count = count_parameters(shape, section)
        assert count.trainable - count.modules.get("biases", 0) == 2 * count.held > 0


@pytest.mark.parametrize(
    ("targets", "modules"),
    [
        (["q_proj", "v_proj"], {"self_attn.q_proj": 3, "self_attn.v_proj": 3}),
        (["layers.1.self_attn.q_proj"], {"self_attn.q_proj": 1}),
        (["mlp.up_proj", "model.layers.0.mlp.up_proj", "down_proj"], {"mlp.up_proj": 3, "mlp.down_proj": 3}),
    ],
)
def test_a_list_of_names(targets: list[str], modules: dict[str, int], tmp_path: Path) -> None:
    folder = tiny_folder("llama", 0, tmp_path)
    section = LoraAdapter(rank=4, targets=targets)
    assert {linear.name: linear.count for linear in choose_linears(read_shape(folder), targets)} == modules
    assert counted_here(folder, section) == counted_by_peft(folder, section)


def test_a_name_that_the_base_does_not_have() -> None:
    with pytest.raises(RecipeError) as caught:
        count_parameters(find_shape("mixtral-8x7b"), LoraAdapter(targets=["q_proj", "query"]))
    assert caught.value.problem == "adapter.targets: query is not a module of mixtral-8x7b."
    assert (
        caught.value.remedy == "Its own are: q_proj, k_proj, v_proj, o_proj, experts.gate_up_proj, experts.down_proj."
    )


def test_what_fused_experts_do_not_allow() -> None:
    shape = find_shape("mixtral-8x7b")
    for section in (LoraAdapter(method="dora"), LoraAdapter(dropout=0.1), PissaAdapter(method="pissa")):
        with pytest.raises(RecipeError, match="fused experts"):
            count_parameters(shape, section)
        assert count_parameters(shape, section.model_copy(update={"targets": "attention"})).trainable > 0


def test_a_well_known_name_is_counted_without_torch() -> None:
    code = (
        "import sys, json\n"
        "from onlay.planning.parameters import count_parameters\n"
        "from onlay.planning.shapes import find_shape\n"
        "from onlay.recipe import LoraAdapter\n"
        "count = count_parameters(find_shape('Llama-3.1-70B'), LoraAdapter(rank=16))\n"
        "print(json.dumps([count.trainable, sorted({'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules))]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [207_093_760, []]
