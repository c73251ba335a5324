"""Which base an adapter goes with, told by headers: wrong ones are refused by name, right ones never are."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from onlay.errors import BaseModelError, OutputError
from onlay.model.adapter import attach, load_adapter, save_adapter
from onlay.model.compatibility import check, read_adapter
from onlay.model.facts import read_facts
from onlay.recipe import LoraAdapter, ModelSection
from onlay.records import ModelFacts
from tests.builders import ARCHITECTURES, save_tiny_base, shake, tiny_model

Pair = tuple[Path, ModelFacts]


def facts_of(folder: Path) -> ModelFacts:
    return read_facts(ModelSection(base=str(folder)))


def adapter_on(
    base: Path, folder: Path, *, notes: bool = True, extra: dict[str, Any] | None = None, **fields: Any
) -> Path:
    """A saved adapter; without `notes` as plain PEFT leaves one."""
    model = AutoModelForCausalLM.from_pretrained(base).requires_grad_(False)
    adapted, _ = attach(model, LoraAdapter(**{"rank": 2, **fields}), seed=0)
    shake(adapted)
    save_adapter(adapted, folder, facts=facts_of(base), extra=extra or {})
    if not notes:
        (folder / "onlay.json").unlink()
    return folder


# ----------------------------------------------------------------------------------------------------------- right pairs


@pytest.mark.parametrize("notes", [True, False], ids=["onlay", "plain"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_right_pair_is_never_refused(name: str, notes: bool, tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base", name)
    facts = facts_of(base)
    for preset in ("all-linear", "attention", "mlp"):
        if name == "mamba" and preset == "mlp":
            continue
        folder = adapter_on(base, tmp_path / preset, notes=notes, targets=preset)
        told = check(folder, facts, storage="bf16")
        if notes:
            assert told == []
        else:
            adapter = read_adapter(folder)
            every = len(adapter.shapes) + adapter.num_experts_modules
            fit = re.search(r"the shapes of (\d+) of its (\d+) modules fit", told[0])
            assert fit is not None
            assert (int(fit[1]), int(fit[2])) == (len(adapter.shapes), every)
        load_adapter(AutoModelForCausalLM.from_pretrained(base), folder, facts=facts)


@pytest.mark.parametrize("prefix", ["", "language_model.", "model.language_model."])
def test_what_stands_before_the_layers_does_not_matter(prefix: str, tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base")
    folder = adapter_on(base, tmp_path / "adapter", notes=False)
    facts = facts_of(base)
    shapes = {prefix + name.removeprefix("model."): shape for name, shape in facts.linear_shapes.items()}
    assert "the shapes of 14 of its 14" in check(folder, facts.model_copy(update={"linear_shapes": shapes}))[0]


@pytest.mark.parametrize("how", ["names", "layers_to_transform"])
def test_an_adapter_on_some_layers_only_fits(how: str, tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base")
    fields: dict[str, Any] = (
        {"target_modules": ["layers.0.mlp.up_proj"]}
        if how == "names"
        else {"target_modules": ["up_proj"], "layers_to_transform": [0]}
    )
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, **fields))  # type: ignore[arg-type]
    model.save_pretrained(str(tmp_path / "adapter"))
    assert "the shapes of 1 of its 1 modules fit" in check(tmp_path / "adapter", facts_of(base))[0]
    load_adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter", facts=facts_of(base))


def test_an_adapter_saved_by_an_earlier_version_is_read(tmp_path: Path) -> None:
    base, other = save_tiny_base(tmp_path / "base"), save_tiny_base(tmp_path / "other", num_hidden_layers=3)
    folder = adapter_on(base, tmp_path / "adapter")
    notes = json.loads((folder / "onlay.json").read_text())
    del notes["base_num_layers"], notes["base_vocabulary_size"]
    (folder / "onlay.json").write_text(json.dumps(notes))
    assert check(folder, facts_of(base), storage="nf4") == []
    with pytest.raises(BaseModelError, match="with other weights than"):
        check(folder, facts_of(other))


# ----------------------------------------------------------------------------------------------------------- wrong pairs

WRONG: dict[str, tuple[tuple[str, dict[str, Any]], str, str]] = {
    "shapes": (
        ("llama", {"intermediate_size": 48}),
        r"model\.layers\.0\.mlp\.down_proj is 32 x 64 \(outputs x inputs\) in its base, 32 x 48 in this one",
        r"model\.layers\.0\.mlp\.down_proj is 32 x 64 \(outputs x inputs\) in its base, 32 x 48 in this one",
    ),
    "fewer layers": (
        ("llama", {"num_hidden_layers": 1}),
        "its base has 2 layers, this one 1",
        "it has adapters up to layer 1, and this base has 1 layers",
    ),
    "more layers": (
        ("llama", {"num_hidden_layers": 3}),
        "its base has 2 layers, this one 3",
        "it has adapters up to layer 1 of all that its config names, and this base has 3 layers",
    ),
    "vocabulary": (("llama", {"vocab_size": 300}), "its base has 272 tokens in its vocabulary, this one 300", ""),
    "architecture": (
        ("gpt2", {}),
        "its base is a LlamaForCausalLM, this one a GPT2LMHeadModel",
        r"this base has no model\.layers\.0\.mlp\.down_proj; its linear layers are c_attn, c_fc, c_proj",
    ),
    "weights": (("llama", {"seed": 1}), "was trained on .*/base with other weights than .*/other", ""),
}  # fmt: skip


@pytest.mark.parametrize("difference", WRONG)
def test_a_wrong_base_is_refused_by_what_differs(difference: str, tmp_path: Path) -> None:
    (name, changes), of_onlay, of_plain = WRONG[difference]
    base = save_tiny_base(tmp_path / "base")
    facts = facts_of(save_tiny_base(tmp_path / "other", name, **changes))
    folder = adapter_on(base, tmp_path / "adapter")
    with pytest.raises(BaseModelError, match=of_onlay) as caught:
        check(folder, facts)
    assert caught.value.remedy == f"Use {base}, or train again on this one."
    (folder / "onlay.json").unlink()
    if of_plain:
        with pytest.raises(BaseModelError, match=of_plain) as caught:
            check(folder, facts)
        assert caught.value.remedy == f"Use {base}, or train again on this one."
    else:
        assert check(folder, facts) == [
            "the adapter has no onlay.json: the shapes of 14 of its 14 modules fit; which weights it was trained on cannot be checked"
        ]


def test_the_remedy_names_the_revision(tmp_path: Path) -> None:
    base, other = save_tiny_base(tmp_path / "base"), save_tiny_base(tmp_path / "other", seed=1)
    facts = facts_of(base).model_copy(update={"name": "maker/base", "revision": "0123abc"})
    adapted, _ = attach(tiny_model("llama"), LoraAdapter(), seed=0)
    save_adapter(adapted, tmp_path / "adapter", facts=facts, extra={})
    with pytest.raises(BaseModelError, match=r"was trained on maker/base with other weights") as caught:
        check(tmp_path / "adapter", facts_of(other))
    assert caught.value.remedy == "Use maker/base at revision 0123abc, or train again on this one."


def test_what_the_header_cannot_tell_the_loaded_base_does(tmp_path: Path) -> None:
    """Shapes unknown from the files: the model itself is asked, before PEFT is."""
    base, other = save_tiny_base(tmp_path / "base"), save_tiny_base(tmp_path / "other", intermediate_size=48)
    folder = adapter_on(base, tmp_path / "adapter", notes=False)
    facts = facts_of(other).model_copy(update={"linear_shapes": {}})
    assert "their shapes cannot be checked" in check(folder, facts)[0]
    with pytest.raises(
        BaseModelError, match=r"down_proj is 32 x 64 \(outputs x inputs\) in its base, this one has 32 x 48"
    ):
        load_adapter(AutoModelForCausalLM.from_pretrained(other), folder, facts=facts)


def more_weights(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    weights["base_model.model.model.layers.0.mlp.up_proj.bias"] = torch.zeros(3)
    save_file(weights, folder / "adapter_model.safetensors")


def fewer_weights(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    kept = {name: value for name, value in weights.items() if "layers.1.mlp.up_proj" not in name}
    save_file(kept, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (more_weights, r"up_proj\.bias has no place"),
        (fewer_weights, r"layers\.1\.mlp\.up_proj\.lora_A\.weight is not in"),
    ],
)
def test_every_weight_of_the_adapter_and_of_the_model_is_accounted_for(
    spoil: Callable[[Path], None], problem: str, tmp_path: Path
) -> None:
    base = save_tiny_base(tmp_path / "base")
    folder = adapter_on(base, tmp_path / "adapter")
    spoil(folder)
    with pytest.raises(BaseModelError, match=problem):
        load_adapter(AutoModelForCausalLM.from_pretrained(base), folder, facts=facts_of(base))


# --------------------------------------------------------------------------------------------------------------- storage


@pytest.mark.parametrize(
    ("method", "trained", "used", "told"),
    [
        ("lora", "nf4", "nf4", None),
        ("lora", "nf4", None, None),
        ("lora", "nf4", "bf16", "was trained on its base in nf4 and is used on it in bf16"),
        ("lora", "bf16", "int8", "was trained on its base in bf16 and is used on it in int8"),
        ("loftq", "nf4", "nf4", None),
    ],
)
def test_another_storage_is_allowed_and_told(
    method: str, trained: str, used: str | None, told: str | None, tmp_path: Path
) -> None:
    base = save_tiny_base(tmp_path / "base")
    folder = adapter_on(base, tmp_path / "adapter", extra={"method": method, "storage": trained})
    notes = check(folder, facts_of(base), storage=used)
    assert len(notes) == (told is not None)
    assert told is None or told in notes[0]


@pytest.mark.parametrize("used", ["bf16", "int8"])
def test_loftq_goes_with_nf4_alone(used: str, tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base")
    folder = adapter_on(base, tmp_path / "adapter", extra={"method": "loftq", "storage": "nf4"})
    with pytest.raises(
        BaseModelError, match=rf"what nf4 rounds away \(loftq\), and this base is kept in {used}"
    ) as caught:
        check(folder, facts_of(base), storage=used)
    assert caught.value.remedy == "Load the base with model.storage = nf4."
    with pytest.raises(BaseModelError, match="loftq"):
        load_adapter(tiny_model("llama"), folder, facts=facts_of(base), storage=used)


# ----------------------------------------------------------------------------------------------------------- bad folders


def test_folders_that_are_no_adapter(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base")
    facts = facts_of(base)
    with pytest.raises(OutputError, match="holds no adapter"):
        check(tmp_path / "nothing", facts)
    folder = adapter_on(base, tmp_path / "adapter")
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    with pytest.raises(OutputError, match=r"adapter_model\.safetensors cannot be read"):
        check(folder, facts)
    weights.unlink()
    with pytest.raises(OutputError, match=r"has no adapter_model\.safetensors"):
        check(folder, facts)
    weights.write_bytes(whole)
    (folder / "onlay.json").write_text("{")
    with pytest.raises(OutputError, match=r"onlay\.json cannot be read"):
        check(folder, facts)


def test_a_and_b_that_do_not_go_together(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base")
    folder = adapter_on(base, tmp_path / "adapter")
    weights = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in weights if ".lora_B." in name)
    save_file({**weights, name: weights[name][:, :1].contiguous()}, folder / "adapter_model.safetensors")
    with pytest.raises(OutputError, match="has no A and B that go together"):
        check(folder, facts_of(base))


def test_an_adapter_that_changes_its_base_is_refused(tmp_path: Path) -> None:
    """PEFT's own PiSSA subtracts from the base's weights at loading."""
    base = save_tiny_base(tmp_path / "base")
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"))
    model.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(BaseModelError, match=r"changes the weights of its base .*init_lora_weights = pissa"):
        check(tmp_path / "adapter", facts_of(base))
