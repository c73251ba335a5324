"""Recomputed layers: the same gradient bit by bit from less memory, and everything put back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from onlay.errors import RecipeError
from onlay.model.adapter import attach
from onlay.model.attention import Layout
from onlay.model.fuse import fuse, unfuse
from onlay.model.recompute import Recompute, find_layers
from onlay.recipe import LoraAdapter
from tests.builders import ARCHITECTURES, shake, tiny_model

IDS = torch.arange(3, 43).view(2, 20)
PADDED = Layout(packed=False, mask_padding=False, attention="sdpa", reason="")


def adapted(name: str, *, dropout: float = 0.0, **changes: Any) -> tuple[nn.Module, nn.Module]:
    """A base and the same with an adapter, in training mode."""
    base = tiny_model(name, **changes)
    model, _ = attach(base, LoraAdapter(rank=4, dropout=dropout), seed=0)
    shake(model)
    return base, model


def gradients(model: nn.Module, *, seed: int = 5) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(seed)
    logits: Tensor = model(input_ids=IDS, use_cache=False).logits
    logits.float().log_softmax(-1).square().mean().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert found
    assert all(bool(gradient.any()) for gradient in found.values())
    return found


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class Kept:
    """Bytes that autograd keeps between forward and backward, weights left out."""

    def __init__(self, model: nn.Module) -> None:
        self.total = 0
        weights = {p.data_ptr() for p in model.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            self.total += 0 if tensor.data_ptr() in weights else tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(input_ids=IDS, use_cache=False)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_layers_of_every_architecture_are_found(name: str) -> None:
    base = tiny_model(name)
    assert len(find_layers(base)) == base.config.num_hidden_layers


@pytest.mark.parametrize("fast", [False, True], ids=["ordinary", "fused"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral", "mamba", "recurrent_gemma", "falcon_h1"])
def test_the_gradient_is_the_same_bit_by_bit(name: str, fast: bool) -> None:
    base, model = adapted(name)
    if fast:
        fuse(model, layout=PADDED, dtype=torch.float32)
    own = {layer: vars(layer).get("forward") for layer in find_layers(base)}
    expected, kept = gradients(model), Kept(model).total
    recompute = Recompute(base)
    recompute.switch_on()
    assert_equal(gradients(model), expected)
    assert Kept(model).total < 0.5 * kept
    recompute.switch_off()
    assert Kept(model).total == kept
    assert {layer: vars(layer).get("forward") for layer in recompute.layers} == own


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
def test_each_level_keeps_less_and_gives_the_same_gradient(name: str) -> None:
    base, model = adapted(name)
    fused = fuse(model, layout=PADDED, dtype=torch.float32)
    expected, kept = gradients(model), [Kept(model).total]
    recompute = Recompute(base, blocks=fused.layers)
    for level in ("mlp", "blocks", "layer"):
        recompute.set_levels([level] * len(recompute.layers))
        assert recompute.levels == [level] * len(recompute.layers)
        assert_equal(gradients(model), expected)
        kept.append(Kept(model).total)
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == 4
    recompute.switch_off()
    assert Kept(model).total == kept[0]


def test_an_mlp_in_tiles_gives_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onlay.model.keep.TILE_TOKENS", 5)
    base, model = adapted("llama", dtype=torch.float64)
    fused = fuse(model, layout=PADDED, dtype=torch.float64)
    expected = gradients(model)
    recompute = Recompute(base, blocks=fused.layers)
    recompute.set_levels(["tiles"] * len(recompute.layers))
    found = gradients(model)
    # Sums over tokens are taken in another order, which float32's rounding of the norms inside makes visible.
    for key, gradient in expected.items():
        assert float((found[key] - gradient).norm()) <= 1e-6 * float(gradient.norm()), key


def test_more_memory_is_saved_level_by_level_until_there_is_none() -> None:
    base, model = adapted("llama")
    fused = fuse(model, layout=PADDED, dtype=torch.float32)
    recompute = Recompute(base, blocks=fused.layers)
    recompute.set_levels(["mlp", "none"])
    assert recompute.note == "gate and up of 1 of 2 layers"
    assert recompute.save_more()
    assert recompute.note == "all but its input of 2 of 2 layers"
    assert recompute.save_more()
    assert recompute.note == "all but its input, the MLP in parts of its tokens of 2 of 2 layers"
    assert not recompute.save_more()


def test_dropout_draws_the_same_again() -> None:
    base, model = adapted("llama", dropout=0.3, attention_dropout=0.2)
    expected = gradients(model)
    assert not torch.equal(next(iter(gradients(model, seed=6).values())), next(iter(expected.values())))
    recompute = Recompute(base)
    recompute.switch_on()
    assert_equal(gradients(model), expected)
    # What is drawn after a step goes on as without recomputation.
    after = torch.rand(4)
    recompute.switch_off()
    gradients(model)
    assert torch.equal(torch.rand(4), after)


def test_each_further_layer_keeps_less() -> None:
    base, model = adapted("llama", num_hidden_layers=4)
    expected, kept = gradients(model), [Kept(model).total]
    recompute = Recompute(base)
    assert (recompute.count, recompute.note) == (0, "no layer")
    for count, note in ((n, f"all but its input of {n} of 4 layers") for n in (1, 3, 4)):
        recompute.switch_on(count)
        assert (recompute.count, recompute.note) == (count, note)
        assert_equal(gradients(model), expected)
        kept.append(Kept(model).total)
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == 4


def test_full_tuning_and_autocast() -> None:
    base = tiny_model("llama").requires_grad_(True).train()  # type: ignore[arg-type]
    recompute = Recompute(base)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = gradients(base)
        recompute.switch_on()
        assert_equal(gradients(base), expected)


@pytest.mark.parametrize("mode", ["evaluation", "no gradient"])
def test_it_steps_aside(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, model = adapted("llama")
    recompute = Recompute(base)
    recompute.switch_on()
    calls: list[int] = []
    monkeypatch.setattr("onlay.model.recompute.checkpoint", lambda run, *args, **_: calls.append(1) or run(*args))
    model(input_ids=IDS)
    assert len(calls) == 2
    with torch.set_grad_enabled(mode == "evaluation"):
        model.train(mode != "evaluation")(input_ids=IDS)
    assert len(calls) == 2


def test_a_forward_of_a_layers_own_is_kept() -> None:
    """As Accelerate puts one there, where a base is spread over devices."""
    base, model = adapted("llama")
    expected = gradients(model)
    layer, calls = base.model.layers[0], []
    forward = layer.forward

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return forward(*args, **kwargs)

    layer.forward = own
    recompute = Recompute(base)
    recompute.switch_on()
    assert_equal(gradients(model), expected)
    assert len(calls) == 2
    recompute.switch_off()
    assert layer.forward is own


def test_what_cannot_be_done_is_refused_by_name() -> None:
    base = tiny_model("llama")
    with pytest.raises(RecipeError) as caught:
        Recompute(base).switch_on(3)
    assert caught.value.problem == "training.recompute = 3, but this base has 2 layers."
    assert caught.value.remedy == "Set it to all, or to at most 2."

    class OfItsOwn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(2, 2)])

    with pytest.raises(RecipeError) as caught:
        Recompute(OfItsOwn()).switch_on()
    assert caught.value.problem == "training.recompute: the layers of OfItsOwn are not found in its code."


def test_on_a_cpu_offloading_moves_nothing() -> None:
    base, model = adapted("llama")
    expected = gradients(model)
    recompute = Recompute(base, offload=True)
    recompute.switch_on()
    assert recompute.note == "all but its input of 2 of 2 layers, their inputs in host memory until then"
    assert_equal(gradients(model), expected)


def test_what_is_partly_recomputed_can_still_save_more() -> None:
    base, model = adapted("llama")
    plain = Recompute(base)
    plain.set_levels(["layer", "none"])
    assert plain.save_more()
    assert plain.levels == ["layer", "layer"]
    assert not plain.save_more()
    plain.switch_off()
    fused = fuse(model, layout=PADDED, dtype=torch.float32)
    mixed = Recompute(base, blocks=fused.layers)
    mixed.set_levels(["tiles", "layer"])
    assert mixed.save_more()
    assert mixed.levels == ["tiles", "tiles"]


def test_a_layer_without_blocks_is_recomputed_whole_where_less_was_meant() -> None:
    base, _ = adapted("llama")
    recompute = Recompute(base)
    recompute.set_levels(["mlp", "none"])
    assert recompute.levels == ["layer", "none"]
    assert recompute.note == "all but its input of 1 of 2 layers"


def test_what_was_fused_is_put_back_once_recomputation_is_off() -> None:
    base, model = adapted("llama")
    fused = fuse(model, layout=PADDED, dtype=torch.float32)
    recompute = Recompute(base, blocks=fused.layers)
    recompute.switch_on()
    recompute.switch_off()
    unfuse(model)
    assert not any("forward" in vars(module) for module in model.modules())
