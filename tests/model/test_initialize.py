"""PiSSA and LoftQ: the SVD against numpy's, the same function and steps as the papers' own form, the errors against float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from onlay.errors import RecipeError
from onlay.model.adapter import adapted_modules, attach, held_parts, save_adapter
from onlay.model.facts import read_facts
from onlay.model.initialize import Held, LoftqFactors, begin_factors, truncated_svd
from onlay.model.quantize import QuantizedLinear, round_trip
from onlay.model.targets import is_wanted
from onlay.recipe import LoftqAdapter, ModelSection, PissaAdapter
from onlay.training.optimizer import hold
from tests.builders import VOCABULARY, AllFloat64, save_tiny_base, tiny_model

IDS = (torch.arange(24) * 37 % VOCABULARY)[None]


def falling(outputs: int, inputs: int, *, seed: int = 0) -> Tensor:
    """A matrix whose singular values fall by a tenth from one to the next, as those of trained weights fall."""
    draw = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(size, min(outputs, inputs), generator=draw, dtype=torch.float64)).Q
        for size in (outputs, inputs)
    )
    matrix: Tensor = (left * 0.9 ** torch.arange(min(outputs, inputs))) @ right.t()
    return matrix


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=IDS, use_cache=False).logits
    return logits


def pissa(**fields: Any) -> PissaAdapter:
    return PissaAdapter(**{"method": "pissa", "rank": 4, **fields})


def loftq(**fields: Any) -> LoftqAdapter:
    return LoftqAdapter(**{"method": "loftq", "rank": 4, **fields})


# ---------------------------------------------------------------------------------------------------------------- SVD


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (50, 50), (30, 1), (1, 30), (7, 5)])
@pytest.mark.parametrize("iterations", [0, 16])
def test_the_svd_is_the_best_approximation_of_its_rank(shape: tuple[int, int], iterations: int) -> None:
    matrix = falling(*shape)
    rank = 6
    left, values, right = truncated_svd(matrix, rank=rank, iterations=iterations, generator=torch.Generator())
    kept = min(rank, *shape)
    assert left.shape == (shape[0], kept)
    assert right.shape == (kept, shape[1])
    u, s, vt = np.linalg.svd(matrix.numpy(), full_matrices=False)
    best = torch.from_numpy((u[:, :kept] * s[:kept]) @ vt[:kept])
    # Power iterations shrink what is missed by (s[k + oversampling] / s[k]) to the power of 2 x 16 + 1: below 1e-13.
    bound = 100 * torch.finfo(torch.float64).eps * float(matrix.norm())
    assert float((left * values @ right - best).norm()) <= bound
    assert float((left.t() @ left - torch.eye(kept)).norm()) <= bound + 1e-13


def test_more_iterations_come_closer_to_the_exact_one() -> None:
    matrix = torch.randn(80, 80, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    left, values, right = truncated_svd(matrix, rank=8, iterations=0, generator=torch.Generator())
    best = float((matrix - left * values @ right).norm())
    rest = []
    for iterations in (1, 4, 16):
        left, values, right = truncated_svd(matrix, rank=8, iterations=iterations, generator=torch.Generator())
        rest.append(float((matrix - left * values @ right).norm()))
    assert rest[0] > rest[1] > rest[2] >= best


@pytest.mark.parametrize("scale", [1.0, 2.0, 0.25])
def test_the_factors_carry_the_scale(scale: float) -> None:
    matrix = falling(30, 20)
    a, b = begin_factors(matrix, rank=20, scale=scale, iterations=0, seed=0, name="m")
    assert float((scale * b @ a - matrix).norm()) <= 100 * torch.finfo(torch.float64).eps * float(matrix.norm())
    assert torch.allclose(a.norm(dim=1), b.norm(dim=0))


def test_seed_and_name_alone_decide_the_factors() -> None:
    matrix = torch.randn(60, 60, generator=torch.Generator().manual_seed(1))

    def first(seed: int, name: str) -> Tensor:
        return begin_factors(matrix, rank=4, scale=1.0, iterations=1, seed=seed, name=name)[0]

    torch.manual_seed(1)
    one = first(0, "a")
    torch.manual_seed(2)
    assert torch.equal(one, first(0, "a"))
    assert not torch.equal(one, first(1, "a"))
    assert not torch.equal(one, first(0, "b"))


# -------------------------------------------------------------------------------------------------------------- PiSSA


class Literal(nn.Module):
    """PiSSA as the paper has it: W - s B0 A0 in the place of W, and an adapter of rank R that begins with A0 and B0."""

    def __init__(self, linear: Any, section: PissaAdapter) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.bias: nn.Parameter | None = linear.bias
        self.transposed = not isinstance(linear, nn.Linear)
        matrix = (weight.t() if self.transposed else weight).numpy()
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
        root = np.sqrt(s[: section.rank] / section.scale)
        self.scale = section.scale
        self.a = nn.Parameter(torch.from_numpy(root[:, None] * vt[: section.rank]))
        self.b = nn.Parameter(torch.from_numpy(u[:, : section.rank] * root))
        self.rest: Tensor = torch.from_numpy(matrix) - self.scale * (self.b @ self.a).detach()

    def forward(self, x: Tensor) -> Tensor:
        own = functional.linear(x, self.rest, self.bias)
        return own + self.scale * functional.linear(functional.linear(x, self.a), self.b)


def ten_steps(model: nn.Module, parameters: list[nn.Parameter], held: Held | None = None) -> list[float]:
    """Losses of ten AdamW steps on one batch, with weight decay, which must not reach what is held."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1)
    hold(optimizer, held or {})
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(("name", "alpha"), [("llama", None), ("gpt2", 10.0)])
def test_ten_steps_are_those_of_the_papers_form(name: str, alpha: float | None, tmp_path: Path) -> None:
    section = pissa(alpha=alpha, svd_iterations=0)
    with AllFloat64():
        base = tiny_model(name, dtype=torch.float64)
        expected = logits_of(base)
        literal = copy.deepcopy(base)
        adapted, _ = attach(base, section, seed=0)
        assert float((logits_of(adapted) - expected).abs().max()) <= 1e-12 * float(expected.abs().max())
        names = [full.removeprefix("base_model.model.") for full in adapted_modules(adapted)]
        for full in names:
            literal.set_submodule(full, Literal(literal.get_submodule(full), section))
        held = held_parts(adapted, section)
        losses = ten_steps(adapted, parts_of(adapted), held)
        papers = ten_steps(literal, [p for full in names for p in literal.get_submodule(full).parameters()])
        assert losses == pytest.approx(papers, rel=1e-11)
        assert losses[-1] < losses[0] - 1e-3
        for full, pair in adapted_modules(adapted).items():
            own: Any = literal.get_submodule(full.removeprefix("base_model.model."))
            update = pair["B"] @ pair["A"]
            papers_update = own.b @ own.a + (own.rest - _weight(adapted.get_submodule(full))) / section.scale
            assert torch.allclose(update, papers_update, rtol=0, atol=1e-10)
        assert all(torch.equal(parameter[part], value) for parameter, (part, value) in held.items())
        assert logits_of(adapted).sub(logits_of(literal)).abs().max() <= 1e-10 * expected.abs().max()


def parts_of(adapted: nn.Module) -> list[nn.Parameter]:
    return [part for module in adapted_modules(adapted).values() for part in module.values()]


def _weight(layer: Any) -> Tensor:
    weight: Tensor = layer.get_base_layer().weight
    return weight.t() if layer.fan_in_fan_out else weight


def test_the_base_is_not_touched_and_the_saved_adapter_is_plain_peft_on_it(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base).requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    section = pissa(alpha=8.0)
    adapted, _ = attach(model, section, seed=0)
    found = {name.replace(".base_layer", ""): p for name, p in adapted.named_parameters()}
    assert all(torch.equal(found[f"base_model.model.{name}"], parameter) for name, parameter in before.items())
    ten_steps(adapted, parts_of(adapted), held_parts(adapted, section))
    expected = logits_of(adapted)
    save_adapter(adapted, tmp_path / "adapter", facts=read_facts(ModelSection(base=str(base))), extra={})
    plain_base = AutoModelForCausalLM.from_pretrained(base)
    of_base = logits_of(plain_base)
    plain = PeftModel.from_pretrained(plain_base, str(tmp_path / "adapter"))
    config: Any = plain.peft_config["default"]
    assert (config.r, config.lora_alpha, config.init_lora_weights) == (8, 16.0, True)
    assert torch.equal(logits_of(plain), expected)
    assert not torch.allclose(expected, of_base, atol=1e-3)


def test_a_rank_above_the_matrix_leaves_the_rest_as_lora_begins() -> None:
    base = tiny_model("llama")
    expected = logits_of(base)
    adapted, _ = attach(base, pissa(rank=40), seed=0)  # The widest k_proj has 16 outputs.
    pair = adapted_modules(adapted)["base_model.model.model.layers.0.self_attn.k_proj"]
    assert pair["A"].shape == (80, 32)
    assert pair["A"][16:40].detach().any(dim=1).all()
    assert not pair["B"][:, 16:40].any()
    assert torch.equal(pair["A"][:40], pair["A"][40:])
    assert torch.equal(pair["B"][:, :40], -pair["B"][:, 40:])
    assert float((logits_of(adapted) - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def test_the_first_half_alone_has_a_gradient_and_moves() -> None:
    section = pissa()
    adapted, _ = attach(tiny_model("llama"), section, seed=0)
    before = [part.detach().clone() for part in parts_of(adapted)]
    held = held_parts(adapted, section)
    assert sum(value.numel() for _, value in held.values()) * 2 == sum(part.numel() for part in parts_of(adapted))
    ten_steps(adapted, parts_of(adapted), held)
    for part, first in zip(parts_of(adapted), before, strict=True):
        where, value = held[part]
        assert part.grad is not None
        assert part.grad.any()
        assert not part.grad[where].any()
        assert torch.equal(part.detach()[where], value)
        assert torch.equal(first[where], value)
        assert not torch.equal(part.detach(), first)


@pytest.mark.parametrize("method", ["pissa", "loftq"])
def test_fused_experts_are_refused(method: str) -> None:
    section = pissa() if method == "pissa" else loftq()
    with pytest.raises(RecipeError, match=rf"{method} cannot be used on this base's fused experts \(model\.layers\.0"):
        attach(tiny_model("mixtral"), section, seed=0)


def test_a_quantized_base_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"pissa .*q_proj is quantized"):
        attach(quantized(tiny_model("llama"), lambda *_: None), pissa(), seed=0)


def test_a_resumed_adapter_has_its_shapes_without_the_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onlay.model.adapter.begin_factors", None)
    section = pissa()
    adapted, _ = attach(tiny_model("llama"), section, seed=0, resumed=True)
    assert all(pair["A"].shape[0] == pair["B"].shape[1] == 8 for pair in adapted_modules(adapted).values())
    assert len(held_parts(adapted, section)) == 28


# -------------------------------------------------------------------------------------------------------------- LoftQ


def quantized(model: nn.Module, on_quantized: Any) -> nn.Module:
    """Puts what NF4 keeps of each linear layer (but the head) in its place, as load_base does while it reads."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            packed = QuantizedLinear.from_linear(module, storage="nf4")
            model.set_submodule(name, packed)
            on_quantized(name, module.weight.detach(), packed)
    return model


def collector(section: LoftqAdapter) -> LoftqFactors:
    return LoftqFactors(section, seed=0, wanted=lambda name: is_wanted(name, section.targets))


@pytest.mark.parametrize("alpha", [None, 12.0])
def test_loftq_comes_nearer_to_the_weights_as_an_independent_svd_does(alpha: float | None) -> None:
    section = loftq(alpha=alpha, svd_iterations=0, targets="attention")
    source, factors = tiny_model("llama"), collector(section)
    base = quantized(copy.deepcopy(source), factors)
    squares = dict.fromkeys(("weight", "nf4", "best", "update"), 0.0)
    for name in factors.factors:
        weight = source.get_parameter(f"{name}.weight").detach()
        rest = weight.double().numpy() - round_trip(weight, storage="nf4", double_quantization=True).double().numpy()
        u, s, vt = np.linalg.svd(rest, full_matrices=False)
        best = (u[:, :4] * s[:4]) @ vt[:4]
        for what, matrix in (
            ("weight", weight.double().numpy()),
            ("nf4", rest),
            ("best", rest - best),
            ("update", best),
        ):
            squares[what] += float((matrix**2).sum())
        a, b = factors.factors[name]
        error = float((section.scale * b @ a - torch.from_numpy(best)).norm())
        assert error <= 1000 * torch.finfo(torch.float32).eps * float(np.linalg.norm(rest))
    errors = factors.errors()
    assert errors["modules"] == 8
    for found, expected in (("nf4", "nf4"), ("nf4_with_adapter", "best"), ("adapter_on_16_bit", "update")):
        assert errors[found] == pytest.approx((squares[expected] / squares["weight"]) ** 0.5, rel=1e-4)
    assert 0 < errors["nf4_with_adapter"] < errors["nf4"]
    adapted, _ = attach(base, section, seed=0, factors=factors.factors)
    exact = logits_of(source)
    with adapted.disable_adapter():
        without = float((logits_of(adapted) - exact).norm())
    assert float((logits_of(adapted) - exact).norm()) < without


def test_the_precision_of_the_adapter_is_part_of_what_is_measured() -> None:
    wide, narrow = (collector(loftq(precision=precision)) for precision in ("fp32", "bf16"))
    quantized(tiny_model("llama"), wide)
    quantized(tiny_model("llama"), narrow)
    assert all(a.dtype == b.dtype == torch.bfloat16 for a, b in narrow.factors.values())
    assert wide.errors()["nf4"] == narrow.errors()["nf4"] > narrow.errors()["nf4_with_adapter"]
    assert wide.errors()["nf4_with_adapter"] < narrow.errors()["nf4_with_adapter"]


def test_loftq_without_its_factors_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"loftq .*is not known for model\.layers\.0\.self_attn\.q_proj"):
        attach(tiny_model("llama"), loftq(), seed=0)
    factors = collector(loftq(targets="attention"))
    with pytest.raises(RecipeError, match=r"loftq .*is not known for model\.layers\.0\.mlp\.gate_proj"):
        attach(quantized(tiny_model("llama"), factors), loftq(), seed=0, factors=factors.factors)
    attach(tiny_model("llama"), loftq(), seed=0, resumed=True)


def test_what_stays_in_16_bits_begins_as_lora() -> None:
    factors = collector(loftq())
    base = quantized(tiny_model("llama"), factors)
    name = "model.layers.1.mlp.up_proj"
    base.set_submodule(name, tiny_model("llama").get_submodule(name))
    del factors.factors[name]
    adapted, _ = attach(base, loftq(), seed=0, factors=factors.factors)
    begun = {
        full.removeprefix("base_model.model.") for full, pair in adapted_modules(adapted).items() if pair["B"].any()
    }
    assert begun == set(factors.factors)
    assert len(begun) == 13
