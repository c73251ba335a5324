"""Another adapter for each row: the logits of each adapter alone, on every kind of layer, and everything put back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from onlay.errors import BaseModelError, OutputError
from onlay.generation.adapters import RowAdapters, refuse_mixing, switched, why_not_by_row
from onlay.model.adapter import attach, load_adapters, save_adapter
from onlay.model.quantize import QuantizedLinear
from onlay.recipe import LoraAdapter
from tests.builders import save_tiny_base, shake, tiny_model
from tests.generation.test_engine import adapters_on

IDS = torch.randint(256, (6, 9), generator=torch.Generator().manual_seed(0))
ROWS = ["one", None, "two", "three", "one", None]


def alone(model: Any, name: str | None, ids: Tensor) -> Tensor:
    with torch.inference_mode(), switched(model, name):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def mixed(model: Any, rows: list[str | None], ids: Tensor) -> Tensor:
    with torch.inference_mode(), RowAdapters(model) as adapters:
        adapters.expect(rows)
        adapters.put(rows)
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "phi3"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_mixed_rows_are_each_adapter_alone(name: str, method: str) -> None:
    model = adapters_on(tiny_model(name, dtype=torch.float64), method=method)
    assert why_not_by_row(model) is None
    found = mixed(model, ROWS, IDS)
    for row, own in enumerate(ROWS):
        expected = alone(model, own, IDS[row : row + 1])
        assert float((found[row] - expected[0]).abs().max()) < 1e-10
    assert float((found[0] - alone(model, None, IDS[:1])[0]).abs().max()) > 1e-3, "the adapter does something"


def test_one_method_beside_another_and_layers_that_only_some_have() -> None:
    model = adapters_on(tiny_model("llama", dtype=torch.float64), method="lora", targets="attention")
    model.add_adapter("wide", LoraConfig(r=5, use_dora=True, target_modules=["up_proj", "q_proj"], use_rslora=True))
    shake_adapters(model)
    rows = ["wide", "one", None, "wide"]
    found = mixed(model, rows, IDS[:4])
    for row, own in enumerate(rows):
        assert float((found[row] - alone(model, own, IDS[row : row + 1])[0]).abs().max()) < 1e-10


def shake_adapters(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name and "magnitude" not in name)
    shake(model, scale=0.3)
    model.requires_grad_(False)


@pytest.mark.parametrize("storage", ["nf4", "int8", "fp8"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_quantized_bases(storage: str, method: str) -> None:
    pytest.importorskip("bitsandbytes")
    model = tiny_model("llama", dtype=torch.float64)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, QuantizedLinear.from_linear(module, storage=storage))
    adapted = adapters_on(model, method=method)
    found = mixed(adapted, ROWS, IDS)
    for row, own in enumerate(ROWS):
        expected = alone(adapted, own, IDS[row : row + 1])[0]
        # PEFT's DoRA rounds the weight of a quantized layer to float32 on the way.
        assert float((found[row] - expected).abs().max()) < (1e-10 if method == "lora" or own is None else 1e-4)


def test_rows_without_adapters_are_the_base_to_the_last_bit() -> None:
    model = adapters_on(tiny_model("llama"))
    assert torch.equal(mixed(model, [None] * 6, IDS), alone(model, None, IDS))
    kept = mixed(model, [None, "one"] * 3, IDS)
    assert torch.equal(kept[::2], alone(model, None, IDS)[::2])


def test_over_the_limit_only_what_the_batch_has_is_stacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onlay.generation.adapters.STACKED_RANKS", 4)
    model = adapters_on(tiny_model("llama", dtype=torch.float64))
    with torch.inference_mode(), RowAdapters(model) as adapters:
        adapters.expect(ROWS)
        assert adapters.put(["two", None])
        assert adapters.names == ("two",)
        assert not adapters.put([None, "two"]), "the same weights for other rows"
        found = model(input_ids=IDS[:2], use_cache=False).logits
        assert adapters.put(["one", "two"])
    assert float((found[1] - alone(model, "two", IDS[1:2])[0]).abs().max()) < 1e-10


def test_forwards_are_put_back_on_an_exception() -> None:
    model = adapters_on(tiny_model("llama"))
    marked = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    marked.forward = marked.forward  # an own forward, as the fast path of training puts there
    mine = marked.forward
    before = alone(model, "one", IDS)

    def fail() -> None:
        with RowAdapters(model):
            assert marked.forward is not mine
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert vars(marked)["forward"] is mine
    assert [name for name, m in model.named_modules() if "forward" in vars(m)] == [
        "base_model.model.model.layers.0.self_attn.q_proj"
    ]
    assert torch.equal(alone(model, "one", IDS), before)


def test_switching_leaves_the_model_as_it_was() -> None:
    model = adapters_on(tiny_model("llama"))
    model.set_adapter("two")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    with switched(model, "one"):
        assert model.active_adapters == ["one"]
    with switched(model, None):
        pass
    assert model.active_adapters == ["two"]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained


def test_what_cannot_be_done_by_row_says_why() -> None:
    experts, _ = attach(tiny_model("mixtral"), LoraAdapter(rank=2), seed=0)
    assert "ParamWrapper" in str(why_not_by_row(experts))
    whole = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))  # type: ignore[arg-type]
    assert "lm_head is a whole layer" in str(why_not_by_row(whole))
    biased = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"], lora_bias=True))  # type: ignore[arg-type]
    assert "bias of its own" in str(why_not_by_row(biased))


def test_a_base_whose_biases_an_adapter_has_taken_is_not_asked() -> None:
    model = get_peft_model(tiny_model("gpt2"), LoraConfig(target_modules=["c_attn"], bias="all", fan_in_fan_out=True))  # type: ignore[arg-type]
    refuse_mixing(model, {"default"})
    with pytest.raises(BaseModelError, match="the base cannot be asked"):
        refuse_mixing(model, {None})


def test_several_saved_adapters_on_one_base(tmp_path: Path) -> None:
    from onlay.model.facts import read_facts
    from onlay.recipe import parse_recipe

    base = save_tiny_base(tmp_path / "base")
    facts = read_facts(parse_recipe({"model": {"base": str(base)}, "data": {"train": "x"}}).model)
    folders, expected = {}, {}
    for seed, name in enumerate(("first", "second")):
        model, _ = attach(tiny_model("llama"), LoraAdapter(rank=2 + seed), seed=seed)
        shake(model, seed=seed, scale=0.3)
        model.eval()
        save_adapter(model, tmp_path / name, facts=facts, extra={})
        folders[name] = tmp_path / name
        expected[name] = alone(model, "default", IDS[:2])
    loaded = load_adapters(tiny_model("llama"), folders, facts=facts)
    assert isinstance(loaded, PeftModel)
    assert tuple(loaded.peft_config) == ("first", "second")
    found = mixed(loaded, ["second", "first"], IDS[:2])
    assert torch.allclose(found[0], expected["second"][0], atol=1e-5)
    assert torch.allclose(found[1], expected["first"][1], atol=1e-5)
    with pytest.raises(OutputError, match="cannot be an adapter's name"):
        load_adapters(tiny_model("llama"), {"v1.2": tmp_path / "first"}, facts=facts)
