"""Shapes of bases: well-known names, a config.json alone, and the headers of a folder's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from onlay.errors import BaseModelError
from onlay.model.facts import read_facts
from onlay.planning.families import outline, ruled_families
from onlay.planning.parameters import count_parameters
from onlay.planning.shapes import (
    PLAIN_FAMILIES,
    BaseShape,
    _keys,
    _known,
    find_shape,
    is_known,
    known_names,
    read_shape,
    shape_of_facts,
)
from onlay.recipe import LoraAdapter, ModelSection
from onlay.starter import CANDIDATES, CPU_CANDIDATE, SMALL_CANDIDATE
from tests.planning.test_parameters import LLAMA, TINY, WIDE, counted_by_peft


def save_base(folder: Path, family: str, **changes: Any) -> int:
    """Writes a tiny base with real files; returns its number of parameters."""
    config = AutoConfig.for_model(family, **(dict(TINY[family][0]) if family in TINY else WIDE) | changes)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return sum(parameter.numel() for parameter in model.parameters())


def shape_of(folder: Path) -> BaseShape:
    return shape_of_facts(read_facts(ModelSection(base=str(folder))))


# ---------------------------------------------------------------------------------------------------- well-known names


@pytest.mark.parametrize("name", known_names())
def test_the_table_agrees_with_the_published_totals(name: str) -> None:
    assert find_shape(name).num_parameters == _known()[name]["num_parameters"]


def test_the_table_agrees_with_the_real_models_on_the_meta_device() -> None:
    """One of each family and size class: defaults that the table leaves out are transformers' own."""
    for name in ("llama-3.2-1b", "qwen2.5-14b", "qwen3-30b-a3b", "gemma-2-27b", "gemma-3-1b", "phi-4", "pythia-70m",
                 "gpt2-xl", "falcon-7b", "gpt-j-6b", "opt-125m", "bloom-560m", "smollm3-3b", "mixtral-8x7b", "phi-2"):  # fmt: skip
        config = dict(_known()[name]["config"])
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
        assert find_shape(name).num_parameters == sum(parameter.numel() for parameter in model.parameters()), name


def test_no_two_bases_share_a_spelling() -> None:
    spellings = [spelling for base in _known().values() for spelling in (*base["hub"], *base.get("aliases", ()))]
    assert len(spellings) == len(set(spellings))
    assert set(_keys().values()) == set(_known())
    for name in known_names():
        assert find_shape(name).name == name


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("Llama-3.1-8B", "llama-3.1-8b"),
        ("llama3.1_8b", "llama-3.1-8b"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama-2-7b"),
        ("Qwen/Qwen3-4B-Base", "qwen3-4b"),
        ("google/gemma-2-2b-it", "gemma-2-2b"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b-v0.3"),
        ("mistralai/Mistral-7B-v0.1", "mistral-7b"),
        ("microsoft/Phi-3-mini-4k-instruct", "phi-3-mini"),
        ("EleutherAI/pythia-1.4b-deduped", "pythia-1.4b"),
        ("gpt2", "gpt2"),
    ],
)
def test_spellings(spelling: str, name: str) -> None:
    assert is_known(spelling)
    assert find_shape(spelling).name == name


@pytest.mark.parametrize(
    ("given", "near"),
    [("lama-3.1-8b", "llama-3.1-8b"), ("quen3-8b", "qwen3-8b"), ("someone/Llama-3.1-8B", "llama-3.1-8b")],
)
def test_an_unknown_name(given: str, near: str) -> None:
    assert not is_known(given)
    with pytest.raises(BaseModelError) as caught:
        find_shape(given)
    assert caught.value.problem == f"{given} is not a well-known base. Did you mean {near}?"
    assert "llama-2-7b" in caught.value.remedy


def test_nothing_near() -> None:
    with pytest.raises(BaseModelError) as caught:
        find_shape("zzz")
    assert caught.value.problem == "zzz is not a well-known base."


def test_what_a_starter_proposes_is_well_known() -> None:
    for candidate in (*CANDIDATES, SMALL_CANDIDATE, CPU_CANDIDATE):
        assert find_shape(candidate.name).num_parameters == pytest.approx(candidate.num_parameters, rel=1e-3)


def test_the_sizes_of_a_shape() -> None:
    shape = find_shape("llama-3-8b")
    assert (shape.architecture, shape.vocabulary_size, shape.hidden_size, shape.num_layers) == (
        "llama",
        128256,
        4096,
        32,
    )
    assert (shape.num_heads, shape.num_key_heads, shape.head_width, shape.context_tokens) == (32, 8, 128, 8192)
    assert not shape.tied_head
    assert shape.embedding_parameters == shape.head_parameters == 128256 * 4096
    assert (shape.bias_parameters, shape.other_parameters) == (0, 65 * 4096)
    assert [(one.name, one.outputs, one.inputs, one.count) for one in shape.linears] == [
        ("self_attn.q_proj", 4096, 4096, 32), ("self_attn.k_proj", 1024, 4096, 32), ("self_attn.v_proj", 1024, 4096, 32),
        ("self_attn.o_proj", 4096, 4096, 32), ("mlp.gate_proj", 14336, 4096, 32), ("mlp.up_proj", 14336, 4096, 32),
        ("mlp.down_proj", 4096, 14336, 32),
    ]  # fmt: skip
    assert shape.linears[0].names[31] == "model.layers.31.self_attn.q_proj"
    assert [one.is_expert for one in find_shape("mixtral-8x7b").linears] == [False] * 4 + [True] * 2


# ------------------------------------------------------------------------------------------------------------- headers


@pytest.mark.parametrize("family", PLAIN_FAMILIES)
def test_headers_give_what_peft_counts(family: str, tmp_path: Path) -> None:
    total = save_base(tmp_path, family)
    shape = shape_of(tmp_path)
    assert (shape.how, shape.num_parameters) == ("closed form", total)
    for section in (
        LoraAdapter(method="dora", rank=3, targets="all-linear", bias="all"),
        LoraAdapter(rank=3, targets="attention", bias="lora_only"),
    ):
        count = count_parameters(shape, section)
        assert (count.total, count.trainable) == counted_by_peft(tmp_path, section), section


@pytest.mark.parametrize("family", [family for family in ruled_families() if family in PLAIN_FAMILIES])
def test_headers_and_config_agree(family: str, tmp_path: Path) -> None:
    save_base(tmp_path, family)
    by_files, by_config = shape_of(tmp_path), read_shape(tmp_path)

    def told(shape: BaseShape) -> tuple[Any, ...]:
        sizes = (shape.embedding_parameters, shape.head_parameters, shape.bias_parameters, shape.other_parameters)
        heads = (shape.num_heads, shape.num_key_heads, shape.head_width, shape.context_tokens, shape.head_inputs)
        linears = {(one.name, one.inputs, one.outputs, one.count, one.bias) for one in shape.linears}
        return (sizes, heads, shape.tied_head, shape.num_layers, shape.vocabulary_size, linears)

    assert told(by_files) == told(by_config)


def test_a_base_with_layers_of_several_widths_is_read_from_its_headers(tmp_path: Path) -> None:
    """As pruned bases are: the config's one number is not what the files hold."""
    save_base(tmp_path, "llama")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for part, shape in (("gate_proj", (20, 24)), ("up_proj", (20, 24)), ("down_proj", (24, 20))):
        tensors[f"model.layers.1.mlp.{part}.weight"] = torch.zeros(shape)
    save_file(tensors, file)
    shape = shape_of(tmp_path)
    assert sorted((one.outputs, one.count) for one in shape.linears if one.name == "mlp.up_proj") == [(20, 1), (40, 2)]
    assert shape.num_parameters == sum(tensor.numel() for tensor in tensors.values())
    count = count_parameters(shape, LoraAdapter(rank=2, targets=["up_proj"]))
    assert count.modules == {"mlp.up_proj": 2 * (2 * (24 + 40) + (24 + 20))}


def test_what_old_files_hold_besides_is_no_parameter(tmp_path: Path) -> None:
    total = save_base(tmp_path, "gpt_neox")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    assert "embed_out.weight" in tensors  # The head's name in files.
    for number in range(3):
        layer = f"gpt_neox.layers.{number}.attention"
        tensors[f"{layer}.bias"] = torch.ones(1, 1, 64, 64)
        tensors[f"{layer}.masked_bias"] = torch.tensor(-1e9)
        tensors[f"{layer}.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(tensors, file)
    shape = shape_of(tmp_path)
    assert shape.num_parameters == total
    assert (shape.tied_head, shape.head_parameters) == (False, 96 * 24)


def test_a_tied_head_that_is_stored_as_well_is_counted_once(tmp_path: Path) -> None:
    total = save_base(tmp_path, "gpt2")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": tensors["transformer.wte.weight"].clone()}, file)
    assert shape_of(tmp_path).num_parameters == total


def test_the_prefix_that_old_files_lack_may_be_named(tmp_path: Path) -> None:
    save_base(tmp_path, "gpt2")
    file = tmp_path / "model.safetensors"
    save_file({name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}, file)
    for targets in (["transformer.h.1.attn.c_attn"], ["h.1.attn.c_attn"]):
        section = LoraAdapter(rank=2, targets=targets)
        assert count_parameters(shape_of(tmp_path), section).trainable == 2 * (24 + 72)


def test_experts_are_told_by_the_rule_and_not_by_the_files(tmp_path: Path) -> None:
    total = save_base(tmp_path, "mixtral")
    shape = shape_of(tmp_path)
    assert (shape.how, shape.num_parameters) == ("closed form", total)
    assert [one.name for one in shape.linears if one.is_expert] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def test_random_weights_are_told_by_the_config(tmp_path: Path) -> None:
    total = save_base(tmp_path, "qwen3")
    facts = read_facts(ModelSection(base=str(tmp_path), weights="random"))
    assert facts.linear_shapes == {}
    assert shape_of_facts(facts).num_parameters == total


def test_a_family_without_a_rule_is_built(tmp_path: Path) -> None:
    total = save_base(tmp_path, "rwkv")
    shape = shape_of(tmp_path)
    assert (shape.how, shape.num_parameters, shape.folder) == ("meta device", total, str(tmp_path))


# -------------------------------------------------------------------------------------------------------------- config


def write_config(folder: Path, **fields: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(fields))
    return path


def test_a_config_file_or_its_folder(tmp_path: Path) -> None:
    path = write_config(tmp_path, model_type="llama", **LLAMA)
    assert read_shape(path).linears == read_shape(tmp_path).linears
    other = path.rename(tmp_path / "tiny.json")
    assert read_shape(other).num_layers == 3


def test_a_field_that_decides_is_not_guessed() -> None:
    """transformers has 8 for Mistral where Llama has as many as heads; the rule leaves both to it."""
    without = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    assert outline("mistral", without) is None
    null = outline("mistral", without | {"num_key_value_heads": None})
    assert null is not None and null.num_key_heads == 4
    left_out = outline("llama", without)
    assert left_out is not None and left_out.num_key_heads == 4
    assert outline("llama", {key: value for key, value in LLAMA.items() if key != "hidden_size"}) is None
    assert outline("unheard_of", LLAMA) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": "24"}, "hidden_size = '24' is not a positive whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0 is not a positive whole number"),
        ({"vocab_size": True}, "vocab_size = True is not a positive whole number"),
        ({"attention_bias": 1}, "attention_bias = 1 is neither true nor false"),
    ],
)
def test_a_field_of_the_wrong_kind(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=said):
        read_shape(write_config(tmp_path, model_type="llama", **LLAMA | changes))


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"config\.json cannot be read"):
        read_shape(tmp_path)
    path = write_config(tmp_path, model_type="unheard_of")
    with pytest.raises(BaseModelError, match="cannot be built"):
        read_shape(path)
    with pytest.raises(BaseModelError, match="there is no rule for model_type = unheard_of"):
        read_shape(path.rename(tmp_path / "tiny.json"))
    for text, said in (("{", "cannot be read"), ("[]", "holds no JSON object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(BaseModelError, match=said):
            read_shape(tmp_path)
