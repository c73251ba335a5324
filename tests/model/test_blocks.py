"""When blocks step aside, and with what they agree: adapters that are off, dropout, quantized bases; and what becomes no group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft.utils import PeftType
from torch import Tensor, nn

from onlay.model.adapter import attach
from onlay.model.blocks import Adapted, adapted_group, examples_of
from onlay.model.fuse import fuse
from onlay.model.quantize import QuantizedLinear
from tests.builders import AllFloat64, shake, tiny_model
from tests.model.fused import (
    IDS,
    PADDED,
    ROUNDING,
    Counts,
    adapted,
    assert_same_function,
    distance,
    rows_apart,
    run,
    section_of,
)  # fmt: skip

# ------------------------------------------------------------------------------------------------------------ steps aside


@pytest.fixture
def pair(called: Counts) -> Iterator[tuple[Any, Any]]:
    """The same twice, the second fused; in float64."""
    with AllFloat64():
        plain, fast = adapted(), adapted()
        assert len(fuse(fast, layout=PADDED, dtype=torch.float64).layers) == 2
        called.clear()
        yield plain, fast


def test_generation_gives_the_same_tokens(pair: tuple[Any, Any], called: Counts) -> None:
    """With a cache, which no block knows: only the last norm runs."""
    plain, fast = (m.generate(input_ids=IDS, max_new_tokens=12, do_sample=False, use_cache=True) for m in pair)
    assert plain.shape == (2, 36)
    assert torch.equal(plain, fast)
    assert set(called) == {"other norms"}
    plain, fast = (m.generate(input_ids=IDS, max_new_tokens=3, do_sample=False, use_cache=False) for m in pair)
    assert torch.equal(plain, fast)
    assert called["attentions"] == 6


def test_with_a_mask_it_steps_aside(pair: tuple[Any, Any], called: Counts) -> None:
    mask = torch.ones_like(IDS)
    plain, fast = (model(input_ids=IDS, attention_mask=mask, use_cache=False).logits for model in pair)
    assert distance(fast, plain) <= ROUNDING
    assert called["attentions"] == 2, "a mask of nothing is none"
    mask[0, :5] = 0
    called.clear()
    plain, fast = (model(input_ids=IDS, attention_mask=mask, use_cache=False).logits for model in pair)
    assert distance(fast, plain) <= ROUNDING
    assert set(called) == {"other norms"}


def test_an_adapter_that_is_off_is_off(pair: tuple[Any, Any], called: Counts) -> None:
    plain, fast = pair
    expected = rows_apart(plain)
    with plain.disable_adapter(), fast.disable_adapter():
        assert distance(rows_apart(fast), rows_apart(plain)) <= ROUNDING
        assert distance(rows_apart(fast), expected) > 0.1
    assert set(called) == {"other norms"}
    assert distance(rows_apart(fast), expected) <= ROUNDING
    assert called["attentions"] == 2


def test_a_merged_adapter_is_not_added_again(pair: tuple[Any, Any], called: Counts) -> None:
    """Weights are joined without a copy: what is merged into them is in them."""
    plain, fast = pair
    expected = rows_apart(plain)
    fast.merge_adapter()
    assert distance(rows_apart(fast), expected) <= ROUNDING
    assert set(called) == {"other norms"}
    fast.unmerge_adapter()
    assert distance(rows_apart(fast), expected) <= ROUNDING
    assert called["attentions"] == 2


def test_with_a_second_adapter_it_steps_aside(pair: tuple[Any, Any], called: Counts) -> None:
    for model in pair:
        model.add_adapter("second", model.peft_config["default"])
        shake(model, seed=3)
        model.base_model.set_adapter(["default", "second"])
        assert model.peft_config["second"].peft_type == PeftType.LORA
    called.clear()
    plain, fast = (rows_apart(model) for model in pair)
    assert distance(fast, plain) <= ROUNDING
    assert set(called) == {"other norms"}


def test_under_autocast_of_another_precision_it_is_pefts(called: Counts) -> None:
    model = adapted(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = rows_apart(model)
    fuse(model, layout=PADDED, dtype=torch.float32)
    called.clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert distance(rows_apart(model), expected) <= torch.finfo(torch.bfloat16).eps
    assert set(called) == {"other norms"}
    rows_apart(model)
    assert called["attentions"] == called["MLPs"] == 2


def test_dropout_is_of_training_alone(called: Counts) -> None:
    with AllFloat64():
        model = adapted(dropout=0.3)
        expected = rows_apart(model)
        assert_same_function(model, called)
        model.train()

        def drawn(seed: int) -> Tensor:
            torch.manual_seed(seed)
            return rows_apart(model)

        one, same, other = drawn(1), drawn(1), drawn(2)
        assert torch.equal(one, same)
        assert distance(one, expected) > 1e-3
        assert distance(one, other) > 1e-3
        mean = torch.stack([drawn(seed).detach() for seed in range(40)]).mean(0)
        assert distance(mean, expected) < 0.5 * distance(one, expected)


# -------------------------------------------------------------------------------------------------------- what is not covered


REASONS: dict[str, tuple[Callable[[], Any], str, int]] = {
    "DoRA": (lambda: adapted(method="dora"), "DoRA", 14),
    "half precision": (
        lambda: adapted(dtype=torch.bfloat16), "weights in bfloat16 for work in float64", 14,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REASONS)
def test_what_is_not_covered_is_told_and_stays_as_it_is(case: str, called: Counts) -> None:
    make, reason, count = REASONS[case]
    with AllFloat64() if case != "half precision" else nullcontext():
        model = make()
        expected = rows_apart(model)
        fused = fuse(model, layout=PADDED, dtype=torch.float64)
        assert f"{reason}: {count} modules, first " in fused.notes["ordinary"]
        called.clear()
        assert distance(rows_apart(model), expected) <= (ROUNDING if expected.dtype == torch.float64 else 0.0)
    assert set(called) <= {"other norms"}


# ---------------------------------------------------------------------------------------------------------- quantized bases


def quantized(storage: str, *, fp8_products: bool = False, dtype: torch.dtype = torch.float64) -> Any:
    """The same weights in each precision of work, packed."""
    base = tiny_model("llama", dtype=torch.float32).to(torch.bfloat16).to(dtype)
    for name, module in list(base.named_modules()):
        if type(module) is nn.Linear and name.endswith("proj"):
            layer = QuantizedLinear.from_linear(module.float(), storage=storage, fp8_products=fp8_products)
            base.set_submodule(name, layer)
    model, _ = attach(base, section_of("lora", rank=4), seed=0)
    shake(model)
    return model.eval()


STORAGES = [("nf4", False), ("int8", False), ("fp8", False), ("nf4", True), ("fp8", True)]


@pytest.mark.parametrize(("storage", "fp8_products"), STORAGES)
def test_quantized_bases_are_too(storage: str, fp8_products: bool, called: Counts) -> None:
    """In float64 nothing is multiplied in FP8: what is left is rounding."""
    with AllFloat64():
        assert_same_function(quantized(storage, fp8_products=fp8_products), called)
    assert called == {"attentions": 2, "MLPs": 2, "other norms": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("storage", "fp8_products"), STORAGES)
def test_quantized_bases_are_as_near_to_float64_as_pefts(
    storage: str, fp8_products: bool, dtype: torch.dtype, called: Counts
) -> None:
    """At most twice as far: the logits, and all gradients together."""
    with AllFloat64():
        exact, exact_gradients = run(quantized(storage, fp8_products=fp8_products))
    model = quantized(storage, fp8_products=fp8_products, dtype=dtype)

    def errors() -> tuple[float, float]:
        with torch.autocast("cpu", dtype) if dtype == torch.bfloat16 else nullcontext():
            logits, gradients = run(model)
        names = sorted(exact_gradients)
        found, expected = (
            torch.cat([g[name].double().flatten() for name in names]) for g in (gradients, exact_gradients)
        )
        return distance(logits, exact), distance(found, expected)

    ordinary = errors()
    fused = fuse(model, layout=PADDED, dtype=dtype)
    assert len(fused.layers) == 2
    called.clear()
    fast = errors()
    assert called["attentions"] == called["MLPs"] == 2
    assert 0 < fast[0] <= 2 * ordinary[0]
    assert 0 < fast[1] <= 2 * ordinary[1]


# ------------------------------------------------------------------------------------------------------------------ groups


def layers_of(model: Any, *names: str) -> list[Any]:
    return [model.get_base_model().model.layers[0].get_submodule(name) for name in names]


GATE, UP, DOWN = "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"


def group_of(model: Any, *names: str) -> Adapted | str:
    return adapted_group(layers_of(model, *names), dtype=torch.float64, keep_transposed=False)


def test_a_group_is_its_layers_with_their_adapters() -> None:
    model = adapted(targets=["up_proj", "down_proj"], rank=3, alpha=7.0, dropout=0.2)
    gate, up, down = layers_of(model, GATE, UP, DOWN)
    both, one = group_of(model, GATE, UP), group_of(model, DOWN)
    assert isinstance(both, Adapted) and isinstance(one, Adapted)
    assert (both.group.sizes, both.group.ranks, both.group.scales, both.group.dropout) == (
        (64, 64),
        (0, 3),
        (7 / 3,),
        0.2,
    )
    assert both.adapters == [up]
    assert [p.data_ptr() for p in both.parameters()] == [
        up.lora_A.default.weight.data_ptr(),
        up.lora_B.default.weight.data_ptr(),
    ]
    assert torch.equal(both.group.frozen.weight, torch.cat([gate.weight, up.base_layer.weight]))  # type: ignore[attr-defined]
    assert gate.weight.data_ptr() == both.group.frozen.weight.data_ptr(), "joined without a second copy"  # type: ignore[attr-defined]
    assert one.parameters()[0] is down.lora_A.default.weight


def other_dropout(model: Any) -> None:
    [up] = layers_of(model, UP)
    up.lora_dropout["default"] = nn.Dropout(0.5)


def trains(model: Any) -> None:
    layers_of(model, UP)[0].base_layer.weight.requires_grad_(True)


def narrower(model: Any) -> None:
    layers_of(model, UP)[0].base_layer.bfloat16()


def packed(model: Any) -> None:
    [up] = layers_of(model, UP)
    up.base_layer = QuantizedLinear.from_linear(up.base_layer, storage="int8")


def second(model: Any) -> None:
    model.add_adapter("second", model.peft_config["default"])


NO_GROUP: dict[str, tuple[Callable[[Any], None], str]] = {
    "dropouts": (other_dropout, "adapters with different dropout share an input"),
    "a layer that trains": (trains, "a base layer that trains"),
    "another precision": (narrower, "weights in bfloat16 for work in float64"),
    "another storage": (packed, "layers of different kinds cannot be joined: int8, torch.float64"),
    "two adapters": (second, "several adapters"),
}


@pytest.mark.parametrize(("change", "reason"), NO_GROUP.values(), ids=NO_GROUP.keys())
def test_layers_that_are_no_group_say_why(change: Callable[[Any], None], reason: str) -> None:
    model = adapted(rank=3)
    assert isinstance(group_of(model, GATE, UP), Adapted)
    change(model)
    assert group_of(model, GATE, UP) == reason


def test_a_group_is_used_while_its_adapters_are() -> None:
    model = adapted(rank=3)
    found = group_of(model, GATE, UP)
    assert isinstance(found, Adapted)
    assert found.is_plain()
    with model.disable_adapter():
        assert not found.is_plain()
    layers_of(model, UP)[0].merge()
    assert not found.is_plain()
    layers_of(model, UP)[0].unmerge()
    assert found.is_plain()
    model.add_adapter("second", model.peft_config["default"])
    assert not found.is_plain()


def test_rows_are_examples_unless_borders_are_told() -> None:
    x = torch.zeros(3, 5, 2)
    rows = examples_of(x, {})
    assert (rows.borders.tolist(), rows.longest, rows.equal) == ([0, 5, 10, 15], 5, 5)
    one = torch.zeros(1, 9, 2)
    told = examples_of(one, {"cu_seq_lens_q": torch.tensor([0, 4, 9]), "max_length_q": 5})
    assert (told.borders.tolist(), told.longest, told.equal) == ([0, 4, 9], 5, None)
    told = examples_of(one, {"cu_seq_lens_q": torch.tensor([0, 3, 6, 9]), "max_length_q": 3})
    assert (told.longest, told.equal) == (3, 3)


@pytest.mark.parametrize(
    ("name", "fields"), [("opt", {"bias": "all"}), ("bloom", {"dropout": 0.1})], ids=["trained biases", "dropout"]
)
def test_layers_that_no_block_covers_are_one_node_each_with_biases_and_dropout(
    name: str, fields: dict[str, Any]
) -> None:
    with AllFloat64():
        model = adapted(name, **fields)
        logits, gradients = run(model)
        fused = fuse(model, layout=PADDED, dtype=torch.float64)
        fast, fast_gradients = run(model)
    assert "other linear layers" in fused.notes["fused"]
    assert distance(fast, logits) <= 1e-12
    most = max(float(expected.norm()) for expected in gradients.values())
    for key, expected in gradients.items():
        # A key's bias moves all scores of a query alike: its gradient is nothing but rounding.
        assert float((fast_gradients[key] - expected).norm()) <= 1e-12 * max(float(expected.norm()), 1e-3 * most), key
