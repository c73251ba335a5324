"""Adapters: what presets mean in each architecture, that every part trains, and that plain PEFT reads what is saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from onlay.errors import BaseModelError, OutputError, RecipeError
from onlay.model.adapter import adapted_modules, attach, find_targets, load_adapter, save_adapter
from onlay.model.facts import read_facts
from onlay.model.quantize import QuantizedLinear
from onlay.recipe import LoftqAdapter, LoraAdapter, LoraPlusAdapter, ModelSection, PissaAdapter
from onlay.records import ModelFacts
from tests.builders import ARCHITECTURES, VOCABULARY, save_tiny_base, shake, tiny_model

IDS = (torch.arange(24) * 37 % VOCABULARY)[None]
QKV, MLP, EXPERTS = (
    {"q_proj", "k_proj", "v_proj"},
    {"gate_proj", "up_proj", "down_proj"},
    {"experts.gate_up_proj", "experts.down_proj"},
)
PRESETS: dict[str, dict[str, set[str]]] = {
    "llama": {"attention": QKV | {"o_proj"}, "mlp": MLP, "qv": {"q_proj", "v_proj"}},
    "qwen3": {"attention": QKV | {"o_proj"}, "mlp": MLP, "qv": {"q_proj", "v_proj"}},
    "gemma2": {"attention": QKV | {"o_proj"}, "mlp": MLP, "qv": {"q_proj", "v_proj"}},
    "gemma3": {"attention": QKV | {"o_proj"}, "mlp": MLP, "qv": {"q_proj", "v_proj"}},
    "gpt2": {"attention": {"c_attn", "c_proj"}, "mlp": {"c_fc", "c_proj"}, "qv": {"c_attn"}},
    "bloom": {
        "attention": {"query_key_value", "dense"}, "mlp": {"dense_h_to_4h", "dense_4h_to_h"}, "qv": {"query_key_value"},
    },
    "opt": {"attention": QKV | {"out_proj"}, "mlp": {"fc1", "fc2"}, "qv": {"q_proj", "v_proj"}},
    "phi3": {"attention": {"qkv_proj", "o_proj"}, "mlp": {"gate_up_proj", "down_proj"}, "qv": {"qkv_proj"}},
    "mixtral": {"attention": QKV | {"o_proj"}, "mlp": EXPERTS, "qv": {"q_proj", "v_proj"}},
    "qwen3_moe": {"attention": QKV | {"o_proj"}, "mlp": EXPERTS, "qv": {"q_proj", "v_proj"}},
    "mamba": {"attention": {"in_proj", "x_proj"}},
    "recurrent_gemma": {
        "attention": QKV | {"o_proj", "linear_x", "linear_y", "linear_out"}, "mlp": MLP, "qv": {"q_proj", "v_proj"},
    },
    "falcon_h1": {"attention": QKV | {"o_proj", "in_proj"}, "mlp": MLP, "qv": {"q_proj", "v_proj"}},
}  # fmt: skip
CASES = [(name, preset) for name, presets in PRESETS.items() for preset in ("all-linear", *presets)]


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=IDS, use_cache=False).logits
    return logits


def facts_of(folder: Path) -> ModelFacts:
    return read_facts(ModelSection(base=str(folder)))


def save_shaken(base: Path, folder: Path, **fields: Any) -> tuple[ModelFacts, Tensor]:
    """Saves an adapter whose weights are random, and returns its base's facts and its logits."""
    model = AutoModelForCausalLM.from_pretrained(base).requires_grad_(False).eval()
    adapted, _ = attach(model, LoraAdapter(**{"rank": 4, **fields}), seed=0)
    shake(adapted)
    facts = facts_of(base)
    save_adapter(adapted, folder, facts=facts, extra={"step": 3})
    return facts, logits_of(adapted)


# ----------------------------------------------------------------------------------------------------------- targets


def test_presets_are_listed_for_every_architecture() -> None:
    assert set(PRESETS) == set(ARCHITECTURES)


@pytest.mark.parametrize(("name", "preset"), CASES)
def test_a_preset_finds_the_models_own_names_and_all_of_it_trains(name: str, preset: str) -> None:
    presets = PRESETS[name]
    expected = presets[preset] if preset != "all-linear" else set().union(*presets.values())
    model = tiny_model(name)
    targets = find_targets(model, preset)
    leaves = {full.rpartition(".")[2] for full in targets.modules}
    assert leaves | {".".join(full.split(".")[-2:]) for full in targets.parameters} == expected
    adapted, left_out = attach(model, LoraAdapter(rank=2, targets=preset), seed=0)
    assert not set(left_out) & set(targets.modules)
    found = {full.removeprefix("base_model.model.") for full in adapted_modules(adapted)}
    assert found >= set(targets.modules)
    shake(adapted)
    adapted(input_ids=IDS, use_cache=False).logits.square().sum().backward()
    trainable = {full: p for full, p in adapted.named_parameters() if p.requires_grad}
    assert all(".lora_" in full for full in trainable)
    still = [full for full, p in trainable.items() if p.grad is None or not bool(p.grad.any())]
    assert not still


def test_all_linear_is_attention_and_mlp_without_the_head() -> None:
    model = tiny_model("llama")
    every, attention, mlp = (set(find_targets(model, preset).modules) for preset in ("all-linear", "attention", "mlp"))
    assert (
        every
        == attention | mlp
        == {name for name, m in model.named_modules() if isinstance(m, nn.Linear)} - {"lm_head"}
    )
    assert not attention & mlp


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (["v_proj"], ["model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"]),
        (["layers.1.self_attn.v_proj"], ["model.layers.1.self_attn.v_proj"]),
        (["model.layers.0.mlp.up_proj", "up_proj"], ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]),
    ],
)
def test_names_may_be_short_or_whole(wanted: list[str], found: list[str]) -> None:
    model = tiny_model("llama")
    assert list(find_targets(model, wanted).modules) == found
    adapted, _ = attach(model, LoraAdapter(targets=wanted), seed=0)
    assert [name.removeprefix("base_model.model.") for name in adapted_modules(adapted)] == found


def test_experts_may_be_named() -> None:
    targets = find_targets(tiny_model("mixtral"), ["experts.down_proj"])
    assert targets.modules == ()
    assert [name.split(".", 2)[2] for name in targets.parameters] == [
        "0.mlp.experts.down_proj",
        "1.mlp.experts.down_proj",
    ]


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("llama", "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"),
        ("mixtral", "experts.down_proj, experts.gate_up_proj, k_proj, o_proj, q_proj, v_proj"),
    ],
)
def test_an_unknown_name_lists_the_models_own(name: str, own: str) -> None:
    with pytest.raises(RecipeError) as caught:
        find_targets(tiny_model(name), ["q_proj", "query"])
    assert caught.value.problem == "adapter.targets: query is not a module of this base."
    assert caught.value.remedy == f"Its own are: {own}."


def test_an_unknown_preset_and_one_that_finds_nothing() -> None:
    with pytest.raises(RecipeError, match=r"adapter\.targets = everything is not a preset"):
        find_targets(tiny_model("llama"), "everything")
    with pytest.raises(BaseModelError, match="its linear layers are in_proj, x_proj"):
        find_targets(tiny_model("mamba"), "qv")


# ------------------------------------------------------------------------------------------------------------ attach


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "bloom", "mixtral", "mamba", "falcon_h1"])
def test_a_fresh_adapter_changes_nothing(name: str) -> None:
    model = tiny_model(name)
    before = logits_of(model)
    state = torch.get_rng_state()
    adapted, _ = attach(model, LoraAdapter(rank=3), seed=5)
    assert torch.equal(state, torch.get_rng_state())
    assert adapted.training
    assert torch.allclose(logits_of(adapted), before, rtol=0, atol=1e-6)
    for pair in adapted_modules(adapted).values():
        assert not pair["B"].any()
        # Kaiming-uniform with a = sqrt(5): within 1 / sqrt(inputs).
        assert 0 < float(pair["A"].detach().abs().max()) <= pair["A"].shape[1] ** -0.5


def test_the_seed_alone_decides_the_first_weights() -> None:
    def first(seed: int) -> list[Tensor]:
        adapted, _ = attach(tiny_model("llama"), LoraAdapter(), seed=seed)
        return [pair["A"].detach() for pair in adapted_modules(adapted).values()]

    torch.manual_seed(1)
    one = first(0)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(one, first(0), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, first(1), strict=True))


def test_rank_alpha_and_precision() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    adapted, _ = attach(model, LoraAdapter(rank=3, alpha=12), seed=0)
    config = adapted.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (3, 12, 0.0, "none")  # type: ignore[attr-defined]
    module: Any = adapted.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    assert module.scaling["default"] == LoraAdapter(rank=3, alpha=12).scale == 4.0
    for pair in adapted_modules(adapted).values():
        assert pair["A"].shape[0] == pair["B"].shape[1] == 3
        assert pair["A"].dtype == pair["B"].dtype == torch.float32
    frozen = [p for p in adapted.parameters() if not p.requires_grad]
    assert all(p.dtype == torch.bfloat16 for p in frozen)


def test_dropout_on_the_adapter_acts_in_training_only() -> None:
    adapted, _ = attach(tiny_model("llama"), LoraAdapter(dropout=0.5), seed=0)
    shake(adapted)
    assert torch.equal(logits_of(adapted), logits_of(adapted))
    adapted.train()
    first, second = (adapted(input_ids=IDS, use_cache=False).logits for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("targets", ["all-linear", "mlp", ["experts.down_proj"]])
def test_dropout_on_fused_experts_is_refused(targets: Any) -> None:
    with pytest.raises(
        RecipeError, match=r"dropout = 0\.1 cannot be used on this base's fused experts \(model\.layers\.0"
    ):
        attach(tiny_model("mixtral"), LoraAdapter(dropout=0.1, targets=targets), seed=0)


def test_dropout_beside_fused_experts_is_not() -> None:
    attach(tiny_model("mixtral"), LoraAdapter(dropout=0.1, targets="attention"), seed=0)


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_biases_train_as_asked_and_come_back(bias: str, tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base", "bloom")
    model = AutoModelForCausalLM.from_pretrained(base).requires_grad_(False)
    every = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    inside = {name for name in every if "query_key_value" in name}
    adapted, _ = attach(model, LoraAdapter(targets=["query_key_value"], bias=bias), seed=0)  # type: ignore[arg-type]
    trained = {
        name.removeprefix("base_model.model.").replace(".base_layer", "")
        for name, p in adapted.named_parameters()
        if p.requires_grad and ".lora_" not in name
    }
    assert len(inside) == 2 < len(every)
    assert trained == {"none": set(), "lora_only": inside, "all": every}[bias]
    shake(adapted)
    expected = logits_of(adapted)
    save_adapter(adapted, tmp_path / "adapter", facts=facts_of(base), extra={})
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "adapter"))
    assert torch.allclose(logits_of(plain), expected, rtol=0, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------- methods

METHODS: dict[str, type[LoraAdapter]] = {
    "lora": LoraAdapter, "rslora": LoraAdapter, "dora": LoraAdapter, "lora+": LoraPlusAdapter, "pissa": PissaAdapter,
    "loftq": LoftqAdapter,
}  # fmt: skip


def section_of(method: str, **fields: Any) -> LoraAdapter:
    return METHODS[method](**{"method": method, "rank": 4, **fields})


def attached(method: str, base: str | nn.Module = "llama", **fields: Any) -> Any:
    model = tiny_model(base) if isinstance(base, str) else base
    return attach(model, section_of(method, **fields), seed=0, resumed=method == "loftq")[0]


@pytest.mark.parametrize("alpha", [None, 6.0])
@pytest.mark.parametrize(
    ("method", "name"),
    [*((method, "llama") for method in METHODS), *((method, "mixtral") for method in ("lora", "rslora", "lora+"))],
)
def test_the_update_is_scaled_as_the_section_says(method: str, name: str, alpha: float | None) -> None:
    section = section_of(method, alpha=alpha)
    model = attached(method, name, alpha=alpha)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert layers
    for layer in layers:
        assert layer.scaling["default"] == section.scale
    expected = {"rslora": 16.0 / 2, "pissa": 1.0, "loftq": 1.0} if alpha is None else {"rslora": 3.0}
    assert section.scale == expected.get(method, 2.0 if alpha is None else 1.5)


@pytest.mark.parametrize("method", METHODS)
def test_the_config_of_each_method_is_plain_peft(method: str) -> None:
    config = attached(method).peft_config["default"]
    assert config.use_rslora == (method == "rslora")
    assert config.use_dora == (method == "dora")
    assert config.init_lora_weights is True
    assert config.r == (8 if method == "pissa" else 4)


def test_lora_plus_begins_and_is_saved_as_lora() -> None:
    plain, plus = (adapted_modules(attached(method)) for method in ("lora", "lora+"))
    assert all(torch.equal(plain[name]["A"], plus[name]["A"]) for name in plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "falcon_h1"])
def test_dora_begins_as_the_base_and_its_magnitude_is_the_norm_of_each_row(name: str, dtype: torch.dtype) -> None:
    base = tiny_model(name, dtype=dtype)
    weights = {
        full: module.weight.detach() for full, module in base.named_modules() if "weight" in vars(module)["_parameters"]
    }
    expected = logits_of(base)
    model = attached("dora", base)
    for full, parts in adapted_modules(model).items():
        weight = weights[full.removeprefix("base_model.model.")].float()
        rows = weight if isinstance(model.get_submodule(full).get_base_layer(), nn.Linear) else weight.t()
        assert torch.equal(parts["magnitude"], torch.linalg.vector_norm(rows, dim=1))
        assert parts["magnitude"].dtype == torch.float32
    # Twice the rounding of adding nothing: (m / |W| - 1) is zero to one rounding of float32.
    assert float((logits_of(model) - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def test_dora_on_a_quantized_layer_trains_all_its_parts() -> None:
    base = tiny_model("llama")
    for full in find_targets(base, "all-linear").modules:
        base.set_submodule(full, QuantizedLinear.from_linear(base.get_submodule(full), storage="nf4"))  # type: ignore[arg-type]
    expected = logits_of(base)
    model = attached("dora", base)
    assert float((logits_of(model) - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    shake(model, scale=0.3)
    model(input_ids=IDS, use_cache=False).logits.square().sum().backward()
    for parts in adapted_modules(model).values():
        assert set(parts) == {"A", "B", "magnitude"}
        assert all(p.grad is not None and bool(p.grad.any()) for p in parts.values())


def test_dora_is_refused_on_fused_experts_and_in_16_bits() -> None:
    with pytest.raises(
        RecipeError, match=r"dora cannot be used on this base's fused experts \(model\.layers\.0.*three dim"
    ):
        attached("dora", "mixtral")
    attached("dora", "mixtral", targets="attention")
    with pytest.raises(RecipeError, match=r"precision = bf16 cannot be used with adapter\.method = dora"):
        attached("dora", precision="bf16")


@pytest.mark.parametrize("method", ["lora", "rslora", "lora+", "pissa", "loftq"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_precision_is_that_of_the_section_whatever_the_bases(method: str, dtype: torch.dtype) -> None:
    for precision, wanted in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model = attached(method, tiny_model("llama", dtype=dtype), precision=precision)
        assert {part.dtype for parts in adapted_modules(model).values() for part in parts.values()} == {wanted}
        assert {p.dtype for p in model.parameters() if not p.requires_grad} == {dtype}
        shake(model)
        assert logits_of(model).isfinite().all()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_precision_on_fused_experts(precision: str) -> None:
    model = attached("lora", tiny_model("mixtral", dtype=torch.bfloat16), precision=precision)
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert {part.dtype for parts in adapted_modules(model).values() for part in parts.values()} == {wanted}
    shake(model)
    assert logits_of(model).isfinite().all()


@pytest.mark.parametrize(
    ("method", "precision"), [(method, "fp32") for method in METHODS] + [(m, "bf16") for m in METHODS if m != "dora"]
)
def test_every_method_comes_back_in_plain_peft(method: str, precision: str, tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base")
    model = attached(method, AutoModelForCausalLM.from_pretrained(base).requires_grad_(False), precision=precision)
    shake(model)
    facts = facts_of(base)
    save_adapter(model, tmp_path / "adapter", facts=facts, extra={})
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float32 if precision == "fp32" else torch.bfloat16}
    expected = logits_of(model if precision == "fp32" else model.float())  # PEFT reads 16-bit adapters into 32.
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "adapter"))
    assert torch.equal(logits_of(plain), expected)
    ours = load_adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter", facts=facts)
    assert torch.equal(logits_of(ours), expected)


# ----------------------------------------------------------------------------------------------------- save and load


@pytest.mark.parametrize(
    "name", ["llama", "qwen3", "gpt2", "phi3", "bloom", "mixtral", "qwen3_moe", "mamba", "falcon_h1"]
)
def test_plain_peft_on_plain_transformers_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base", name)
    facts, expected = save_shaken(base, tmp_path / "adapter")
    plain_base = AutoModelForCausalLM.from_pretrained(base)
    of_base = logits_of(plain_base)
    plain = PeftModel.from_pretrained(plain_base, str(tmp_path / "adapter"))
    assert torch.allclose(logits_of(plain), expected, rtol=1e-6, atol=1e-6)
    ours = load_adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter", facts=facts)
    assert not ours.training
    assert not any(p.requires_grad for p in ours.parameters())
    assert torch.equal(logits_of(ours), logits_of(plain))
    assert float((expected - of_base).norm() / of_base.norm()) > 0.1


def test_what_is_saved_is_a_plain_peft_adapter(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base")
    facts, _ = save_shaken(base, tmp_path / "adapter", rank=2, alpha=6)
    folder = tmp_path / "adapter"
    assert {path.name for path in folder.iterdir()} - {"README.md"} == {
        "adapter_config.json", "adapter_model.safetensors", "onlay.json",
    }  # fmt: skip
    values = json.loads((folder / "adapter_config.json").read_text())
    config = LoraConfig.from_pretrained(str(folder))
    assert set(values) <= set(config.to_dict())
    assert (values["peft_type"], values["task_type"], values["r"], values["lora_alpha"]) == ("LORA", "CAUSAL_LM", 2, 6)
    assert values["base_model_name_or_path"] == str(base)
    assert values["revision"] is None
    assert set(values["target_modules"]) == QKV | {"o_proj"} | MLP
    weights = load_file(folder / "adapter_model.safetensors")
    assert len(weights) == 2 * 7 * 2
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in weights)
    assert all(w.dtype == torch.float32 and bool(w.isfinite().all()) for w in weights.values())
    notes = json.loads((folder / "onlay.json").read_text())
    assert notes == {
        "base": str(base), "base_revision": None, "base_weight_fingerprint": facts.weight_fingerprint,
        "base_architecture": "LlamaForCausalLM", "base_num_layers": 2, "base_vocabulary_size": VOCABULARY, "step": 3,
    }  # fmt: skip


def test_a_base_from_the_hub_is_recorded_by_name_and_revision(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base")
    facts = facts_of(base).model_copy(update={"name": "maker/base", "revision": "0123abc"})
    adapted, _ = attach(tiny_model("llama"), LoraAdapter(), seed=0)
    save_adapter(adapted, tmp_path / "adapter", facts=facts, extra={})
    values = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (values["base_model_name_or_path"], values["revision"]) == ("maker/base", "0123abc")
    notes = json.loads((tmp_path / "adapter" / "onlay.json").read_text())
    assert (notes["base"], notes["base_revision"]) == ("maker/base", "0123abc")


def test_another_base_is_refused(tmp_path: Path) -> None:
    base, other = save_tiny_base(tmp_path / "base"), save_tiny_base(tmp_path / "other", seed=1)
    save_shaken(base, tmp_path / "adapter")
    with pytest.raises(BaseModelError, match=r"was trained on .*/base with other weights than .*/other"):
        load_adapter(AutoModelForCausalLM.from_pretrained(other), tmp_path / "adapter", facts=facts_of(other))


def test_an_adapter_of_plain_peft_loads_and_an_empty_folder_does_not(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base")
    facts, expected = save_shaken(base, tmp_path / "adapter")
    (tmp_path / "adapter" / "onlay.json").unlink()
    model = load_adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter", facts=facts)
    assert torch.equal(logits_of(model), expected)
    with pytest.raises(OutputError, match="holds no adapter"):
        load_adapter(tiny_model("llama"), tmp_path, facts=facts)


def test_what_all_linear_leaves_out_is_told() -> None:
    _, left_out = attach(tiny_model("mamba"), LoraAdapter(), seed=0)
    assert sorted({name.rpartition(".")[2] for name in left_out}) == ["dt_proj", "out_proj"]
    _, left_out = attach(tiny_model("llama"), LoraAdapter(), seed=0)
    assert left_out == []
