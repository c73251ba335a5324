from __future__ import annotations

import json
import os
import random
import struct
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from onlay.errors import BaseModelError, RecipeError
from onlay.model import weight_files
from onlay.model.facts import Digesting, check_targets, full_digest, leaf_names, read_facts
from onlay.model.weight_files import fingerprint, read_tensors
from onlay.recipe import ModelSection
from onlay.records import ModelFacts

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 16,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
Weights = dict[str, tuple[tuple[int, ...], bytes]]


def weights(seed: int = 0) -> Weights:
    """Names of a two-layer Llama with F32 values."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (16, 8), "lm_head.weight": (16, 8)}
    shapes["model.norm.weight"] = (8,)
    for layer in range(2):
        for name in ("q_proj", "o_proj"):
            shapes[f"model.layers.{layer}.self_attn.{name}.weight"] = (8, 8)
        shapes[f"model.layers.{layer}.self_attn.k_proj.weight"] = (4, 8)
        shapes[f"model.layers.{layer}.mlp.down_proj.weight"] = (8, 12)
    source = random.Random(seed)
    return {name: (shape, source.randbytes(4 * _count(shape))) for name, shape in shapes.items()}


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def write_safetensors(path: Path, tensors: Weights, dtype: str = "F32") -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, data in tensors.values()))


def write_base(
    folder: Path, tensors: Weights | None = None, *, shards: int = 1, config: dict[str, Any] | None = None
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | (config or {})))
    (folder / "tokenizer.json").write_text("{}")
    tensors = weights() if tensors is None else tensors
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return folder
    weight_map = {}
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        # Reversed, so that neither the order in a file nor the file itself follows the names.
        part = dict(reversed(list(tensors.items())[number::shards]))
        write_safetensors(folder / name, part)
        weight_map.update(dict.fromkeys(part, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def facts_of(folder: Path, **section: Any) -> ModelFacts:
    return read_facts(ModelSection.model_validate({"base": str(folder), **section}))


def refused(folder: Path, **section: Any) -> str:
    with pytest.raises(BaseModelError) as caught:
        facts_of(folder, **section)
    text = str(caught.value)
    assert len(text.splitlines()) == 2
    return text


def test_facts_of_a_folder(tmp_path: Path) -> None:
    facts = facts_of(write_base(tmp_path / "base"))
    assert facts.architecture == "LlamaForCausalLM"
    assert (facts.vocabulary_size, facts.context_tokens, facts.hidden_size, facts.num_layers) == (16, 64, 8, 2)
    assert facts.num_parameters == sum(_count(shape) for shape, _ in weights().values())
    assert facts.weight_bytes == 4 * facts.num_parameters
    assert facts.revision is None
    assert facts.path == str(tmp_path / "base")
    assert facts.linear_shapes["model.layers.1.self_attn.k_proj"] == (4, 8)
    assert facts.linear_shapes["model.layers.0.mlp.down_proj"] == (8, 12)
    assert len(facts.linear_shapes) == 8
    assert sorted(leaf_names(facts)) == ["down_proj", "k_proj", "o_proj", "q_proj"]
    assert ModelFacts.model_validate_json(facts.to_json()) == facts


def test_a_tied_output_layer_is_counted_once(tmp_path: Path) -> None:
    stored = facts_of(write_base(tmp_path / "stored", config={"tie_word_embeddings": True}))
    without = {name: value for name, value in weights().items() if name != "lm_head.weight"}
    left_out = facts_of(write_base(tmp_path / "left_out", without, config={"tie_word_embeddings": True}))
    untied = facts_of(write_base(tmp_path / "untied"))
    assert stored.num_parameters == left_out.num_parameters == untied.num_parameters - 16 * 8


def test_sizes_come_from_the_embedding_where_the_config_is_silent(tmp_path: Path) -> None:
    folder = write_base(tmp_path)
    config = {key: CONFIG[key] for key in ("architectures", "model_type")}
    (folder / "config.json").write_text(json.dumps(config))
    facts = facts_of(folder)
    assert (facts.vocabulary_size, facts.hidden_size, facts.num_layers, facts.context_tokens) == (16, 8, 2, None)


def test_a_text_model_inside_a_larger_one(tmp_path: Path) -> None:
    inner = {key: CONFIG[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings")}
    folder = write_base(tmp_path)
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": inner}
    (folder / "config.json").write_text(json.dumps(config))
    assert facts_of(folder).context_tokens == 64


def test_conv1d_weights_are_turned_round(tmp_path: Path) -> None:
    tensors: Weights = {"wte.weight": ((16, 8), bytes(512)), "wpe.weight": ((4, 8), bytes(128))}
    tensors["h.0.attn.c_attn.weight"] = ((8, 24), bytes(768))
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    facts = facts_of(write_base(tmp_path, tensors, config=config))
    assert facts.linear_shapes == {"h.0.attn.c_attn": (24, 8)}


@pytest.mark.parametrize(
    ("file", "text", "licence"),
    [
        ("README.md", "---\nlicense: apache-2.0\ntags: [a]\n---\n# Card\n", "apache-2.0"),
        ("README.md", "# Card without front matter\n---\nlicense: mit\n---\n", None),
        ("README.md", "---\n{ not yaml: [\n---\n", None),
        ("LICENSE", "MIT License\n\nCopyright", "mit"),
        ("LICENSE.txt", "        Apache License\n   Version 2.0", "apache-2.0"),
    ],
)
def test_the_licence_is_read_from_card_or_file(tmp_path: Path, file: str, text: str, licence: str | None) -> None:
    folder = write_base(tmp_path)
    (folder / file).write_text(text)
    assert facts_of(folder).licence == licence


# ------------------------------------------------------------------------------------------------------- fingerprints


@pytest.mark.parametrize("sample_bytes", [32 * 2**20, 600])
def test_the_same_weights_in_other_shards_have_the_same_digests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sample_bytes: int
) -> None:
    monkeypatch.setattr(weight_files, "SAMPLE_BYTES", sample_bytes)
    found = [facts_of(write_base(tmp_path / str(shards), shards=shards)) for shards in (1, 2, 3)]
    assert len({facts.weight_fingerprint for facts in found}) == 1
    assert len({full_digest(facts, tmp_path) for facts in found}) == 1


def changed(tensors: Weights, name: str, index: int) -> Weights:
    shape, data = tensors[name]
    return {**tensors, name: (shape, data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :])}


def test_every_bit_of_a_small_base_is_in_its_fingerprint(tmp_path: Path) -> None:
    original = facts_of(write_base(tmp_path / "a")).weight_fingerprint
    seen = {original}
    for name, (_, data) in weights().items():
        for index in (0, len(data) // 2, len(data) - 1, len(data) // 3):
            path = write_base(tmp_path / "b", changed(weights(), name, index))
            seen.add(facts_of(path).weight_fingerprint)
    assert len(seen) == 1 + 4 * len(weights())


def test_names_shapes_and_types_are_in_the_fingerprint(tmp_path: Path) -> None:
    shape, data = weights()["model.norm.weight"]
    variants: list[Weights] = [
        {"a.weight": (shape, data)},
        {"b.weight": (shape, data)},
        {"a.weight": ((2, 4), data)},
    ]
    seen = set()
    for variant in variants:
        write_safetensors(tmp_path / "model.safetensors", variant)
        seen.add(fingerprint(read_tensors(tmp_path, "x")))
    write_safetensors(tmp_path / "model.safetensors", variants[0], dtype="I32")
    seen.add(fingerprint(read_tensors(tmp_path, "x")))
    assert len(seen) == 4


def test_of_a_large_base_a_sample_is_read_and_the_full_digest_sees_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors: Weights = {
        f"layers.{n}.mlp.down_proj.weight": ((50, 100), random.Random(n).randbytes(20_000)) for n in range(4)
    }
    tensors["embed.weight"] = ((16, 8), bytes(512))
    monkeypatch.setattr(weight_files, "SAMPLE_BYTES", 15 * 256)
    reads: list[int] = []
    read = weight_files.os.pread
    monkeypatch.setattr(weight_files.os, "pread", lambda *args: reads.append(args[1]) or read(*args))
    name = "layers.2.mlp.down_proj.weight"

    def both(tensors: Weights) -> tuple[str, str]:
        facts = facts_of(write_base(tmp_path / "base", tensors))
        assert sum(reads) <= 15 * 256
        digest = full_digest(facts, tmp_path / "cache")
        reads.clear()
        return facts.weight_fingerprint, digest

    original = both(tensors)
    for index in (0, 255, 10_000, 19_999):
        assert both(changed(tensors, name, index))[0] != original[0]
    unsampled = both(changed(tensors, name, 5_000))
    assert unsampled[0] == original[0]
    assert unsampled[1] != original[1]


def test_the_full_digest_is_remembered_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_base(tmp_path / "base")
    facts = facts_of(folder)
    first = full_digest(facts, tmp_path / "cache")
    calls = []
    work = weight_files.digest_weights
    monkeypatch.setattr(weight_files, "digest_weights", lambda *args: calls.append(1) or work(*args))
    assert full_digest(facts, tmp_path / "cache") == first
    assert not calls
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert full_digest(facts, tmp_path / "cache") == first
    assert len(calls) == 1
    (tmp_path / "cache" / "weight_digests.json").write_text("{ broken")
    assert full_digest(facts, tmp_path / "cache") == first
    assert len(calls) == 2


def test_digesting_runs_beside_and_hands_over_what_went_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = facts_of(write_base(tmp_path / "base"))
    assert Digesting(facts, tmp_path / "a").result(30) == full_digest(facts, tmp_path / "b")
    gate = threading.Event()
    work = weight_files.digest_weights
    monkeypatch.setattr(weight_files, "digest_weights", lambda *args: gate.wait(30) and work(*args))
    slow = Digesting(facts, tmp_path / "c")
    assert slow.result(0.05) is None
    gate.set()
    assert slow.result(30) is not None
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(BaseModelError, match="has no safetensors"):
        Digesting(facts, tmp_path / "d").result(30)


def test_digesting_stops_when_asked(tmp_path: Path) -> None:
    facts = facts_of(write_base(tmp_path / "base"))
    digesting = Digesting(facts, tmp_path / "a")
    digesting.stop()
    assert not any(thread.name == "weight-digest" for thread in threading.enumerate())


# -------------------------------------------------------------------------------------------------------- wrong bases


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "is not a causal language model"),
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "is not a causal"),
        ({"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}, "is not a causal"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantized weights \(gptq\)"),
        ({"model_type": "unheard_of"}, "does not know model_type = unheard_of"),
        (
            {"model_type": "unheard_of", "auto_map": {"AutoModelForCausalLM": "modeling_x.X"}},
            "trust_remote_code: true",
        ),
    ],
)
def test_configs_that_cannot_be_used(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    with pytest.raises(BaseModelError, match=words):
        facts_of(write_base(tmp_path, config=config))


def test_remote_code_is_allowed_when_asked_for_and_not_needed_where_transformers_has_its_own(tmp_path: Path) -> None:
    auto_map = {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}
    facts_of(write_base(tmp_path, config={"model_type": "unheard_of", **auto_map}), trust_remote_code=True)
    facts_of(write_base(tmp_path, config=auto_map))


def test_files_that_are_missing_or_damaged(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "base")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    assert f"it has {len(whole) - 100:,} of {len(whole):,} bytes" in refused(folder)
    (folder / "model.safetensors").write_bytes(b"version https://example.org/spec/v1\noid sha256:0\n")
    assert "git lfs pull" in refused(folder)
    for content in (
        b"",
        b"\x05\0\0\0\0\0\0\0nojso",
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 9) + b'{"a": {}}',
    ):
        (folder / "model.safetensors").write_bytes(content)
        assert "not a whole safetensors file" in refused(folder)
    (folder / "model.safetensors").unlink()
    assert "has no safetensors." in refused(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert "only pickled weights (pytorch_model.bin)" in refused(folder)
    (folder / "config.json").write_text('{"a":\n 1,}')
    assert "config.json is not JSON (line 2" in refused(folder)
    (folder / "config.json").write_text("[]")
    assert "does not hold an object" in refused(folder)
    (folder / "config.json").unlink()
    assert "has no config.json" in refused(folder)
    (folder / "adapter_config.json").write_text("{}")
    assert "is an adapter, not a base" in refused(folder)


def test_shards_that_are_missing(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "base", shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors, named by model.safetensors.index.json, is missing" in refused(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/passwd"}}')
    assert "is missing" in refused(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "has no weight_map" in refused(folder)


def test_a_base_without_a_tokenizer(tmp_path: Path) -> None:
    folder = write_base(tmp_path)
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer" in refused(folder)


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("pokcet", "Did you mean pocket"),
        ("./nowhere", "there is no such folder"),
        ("/nowhere/at/all", "there is no such folder"),
        ("a/b/c", "there is no such folder"),
        ("has space/x", "it is not a hub name"),
    ],
)
def test_names_that_cannot_be_bases_are_refused_without_a_network(base: str, words: str) -> None:
    started = time.perf_counter()
    assert words in refused(Path(base)) if base.startswith("/") else words in _refused_name(base)
    assert time.perf_counter() - started < 1


def _refused_name(base: str) -> str:
    with pytest.raises(BaseModelError) as caught:
        read_facts(ModelSection.model_validate({"base": base}))
    return str(caught.value)


def test_a_file_is_no_base(tmp_path: Path) -> None:
    write_base(tmp_path)
    assert "is a file" in refused(tmp_path / "model.safetensors")


def test_random_weights_need_a_config_only(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "base")
    (folder / "model.safetensors").unlink()
    facts = facts_of(folder, weights="random")
    assert (facts.num_parameters, facts.linear_shapes, facts.vocabulary_size) == (0, {}, 16)
    assert full_digest(facts, tmp_path) == facts.weight_fingerprint
    other = facts_of(write_base(tmp_path / "other", config={"hidden_size": 4}), weights="random")
    assert other.weight_fingerprint != facts.weight_fingerprint


# ------------------------------------------------------------------------------------------------------------ targets


def test_targets_are_checked_against_the_checkpoint(tmp_path: Path) -> None:
    facts = facts_of(write_base(tmp_path))
    for good in ("all-linear", ["q_proj"], ["self_attn.q_proj", "mlp.down_proj"], ["lm_head"], ["embed_tokens"]):
        check_targets(facts, good)
    check_targets(facts, ["base.model.layers.0.self_attn.q_proj"])
    with pytest.raises(RecipeError) as caught:
        check_targets(facts, ["q_proj", "query_proj"])
    assert "query_proj is not a module" in caught.value.problem
    assert "Did you mean q_proj?" in caught.value.problem
    for name in ("q_proj", "k_proj", "o_proj", "down_proj"):
        assert name in caught.value.remedy
    with pytest.raises(RecipeError):
        check_targets(facts, ["proj"])


def test_targets_of_expert_models_are_left_to_the_loaded_model(tmp_path: Path) -> None:
    tensors = {**weights(), "model.layers.0.mlp.experts.0.up_proj.weight": ((8, 8), bytes(256))}
    check_targets(facts_of(write_base(tmp_path, tensors)), ["gate_up_proj"])


def test_real_base() -> None:
    root = os.environ.get("ONLAY_TEST_DATA")
    if not root:
        pytest.skip("ONLAY_TEST_DATA is not set: no real base to read")
    folder = Path(root) / "models" / "stories260K" / "hf"
    started = time.perf_counter()
    facts = facts_of(folder)
    assert time.perf_counter() - started < 0.5
    assert (facts.num_parameters, facts.num_layers, facts.context_tokens) == (260_032, 5, 512)
    assert facts.linear_shapes["model.layers.0.mlp.gate_proj"] == (172, 64)
    assert leaf_names(facts)[0] in ("down_proj", "q_proj")
