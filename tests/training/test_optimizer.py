"""AdamW by its equations, in all of its forms; what it holds still; its stored state; the learning rate of every step."""

from __future__ import annotations

import io
import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from onlay.errors import OutputError, RecipeError, SetupError
from onlay.recipe import Recipe, TrainingSection
from onlay.training.optimizer import (
    gradient_norm,
    hold,
    learning_rate_at,
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
)
from onlay.training.watch import Snapshots, restore
from tests.builders import recipe_for

PEAK = 3e-4
ON_CPU = ("adamw", "adamw_8bit")
LARGE = (64, 128)
"""More than the 4096 values that are needed for state in 8 bit."""


def recipe_of(*, adapter: dict[str, Any] | None = None, **training: Any) -> Recipe:
    return recipe_for("base", "rows.jsonl", training=training, adapter=adapter or {})


class Weights:
    """A large and a small weight with an optimizer, and gradients that depend on nothing but the step."""

    def __init__(self, kind: str, *, dtype: torch.dtype = torch.float32, **training: Any) -> None:
        generator = torch.Generator().manual_seed(7)
        shapes = {"large": LARGE, "small": (3, 5), "vector": (6,)}
        self.named = {
            name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in shapes.items()
        }
        self.optimizer = make_optimizer(self.named, recipe_of(optimizer=kind, **training))
        self.updates = 0

    def update(self, times: int = 1) -> Weights:
        for _ in range(times):
            self.updates += 1
            generator = torch.Generator().manual_seed(self.updates)
            for group in self.optimizer.param_groups:
                group["lr"] = 1e-2 * group["rate_ratio"]
            for parameter in self.named.values():
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)
            self.optimizer.step()
        return self

    def assert_same(self, other: Weights) -> None:
        assert all(torch.equal(self.named[name], other.named[name]) for name in self.named)


def rates(total_steps: int, **fields: Any) -> list[float]:
    """Of steps 1 to total_steps, and one after the last."""
    section = TrainingSection(**fields)
    return [
        learning_rate_at(step, peak=PEAK, total_steps=total_steps, section=section)
        for step in range(1, total_steps + 2)
    ]


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.33, 1.0])
@pytest.mark.parametrize("total_steps", [1, 2, 7, 100])
def test_every_schedule_rises_to_the_peak_and_never_stands_still_at_zero(
    scheduler: str, warmup: float, total_steps: int
) -> None:
    *found, after = rates(total_steps, scheduler=scheduler, warmup_fraction=warmup)
    warmup_steps = math.ceil(warmup * total_steps)
    assert found[0] > 0
    assert min(found) > 0
    assert max(found) == pytest.approx(PEAK)
    assert found[:warmup_steps] == pytest.approx([PEAK * (i + 1) / warmup_steps for i in range(warmup_steps)])
    rest = found[warmup_steps:]
    assert rest == sorted(rest, reverse=True)
    if scheduler == "constant":
        assert rest == [PEAK] * len(rest)
    elif rest:
        assert rest[0] == PEAK
        assert after == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("scheduler", "usual"), [("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup)]
)
def test_after_the_warm_up_rates_are_those_of_transformers(scheduler: str, usual: Any) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=PEAK)
    schedule = usual(optimizer, num_warmup_steps=5, num_training_steps=100)
    expected = []
    for _ in range(100):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates(100, scheduler=scheduler, warmup_fraction=0.05)[5:100] == pytest.approx(expected[5:])


def test_halfway_down_the_cosine_is_half_the_peak() -> None:
    assert rates(100, warmup_fraction=0.0)[50] == pytest.approx(PEAK / 2)
    assert rates(100, warmup_fraction=0.0)[25] == pytest.approx(PEAK * 0.5 * (1 + math.sqrt(0.5)))


def test_it_is_adamw_and_decays_matrices_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {name: nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for name, shape in
               {"A": (3, 4), "B": (4, 3), "bias": (4,), "experts": (2, 3, 4)}.items()}  # fmt: skip
    expected = {name: p.detach().clone() for name, p in weights.items()}
    first, second = ({name: torch.zeros_like(p) for name, p in expected.items()} for _ in range(2))
    optimizer = make_optimizer(weights, recipe_of(weight_decay=0.1))
    assert optimizer.param_groups[0]["lr"] == 0.0
    for step in range(1, 6):
        rate = PEAK * step
        for group in optimizer.param_groups:
            group["lr"] = rate
        for name, parameter in weights.items():
            grad = parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            first[name] = 0.9 * first[name] + 0.1 * grad
            second[name] = 0.999 * second[name] + 0.001 * grad**2
            decay = 0.0 if name == "bias" else 0.1
            moved = (first[name] / (1 - 0.9**step)) / ((second[name] / (1 - 0.999**step)).sqrt() + 1e-8)
            expected[name] = expected[name] * (1 - rate * decay) - rate * moved
        optimizer.step()
        for name, parameter in weights.items():
            assert torch.allclose(parameter.detach(), expected[name], rtol=1e-12, atol=1e-14)


def test_vectors_alone_or_matrices_alone_are_no_empty_group() -> None:
    for shape in ((3,), (3, 3)):
        optimizer = make_optimizer({"x": nn.Parameter(torch.zeros(shape))}, recipe_of(weight_decay=0.1))
        assert [len(group["params"]) for group in optimizer.param_groups] == [1]


# ------------------------------------------------------------------------------------------------------ in all its forms


@pytest.mark.parametrize("kind", ON_CPU)
def test_every_form_is_adamw_with_the_same_numbers(kind: str) -> None:
    weights = Weights(kind, weight_decay=0.1)
    for group in weights.optimizer.param_groups:
        assert (tuple(group["betas"]), group["eps"]) == ((0.9, 0.999), 1e-8)
        assert group["weight_decay"] in (0.0, 0.1)
    before = {name: p.detach().clone() for name, p in weights.named.items()}
    expected = Weights("adamw", weight_decay=0.1).update()
    weights.update()
    for name, parameter in weights.named.items():
        # The first update is minus the rate times the gradient's sign, and the decay.
        assert torch.allclose(parameter, expected.named[name], rtol=0.0, atol=2e-3 * 1e-2)
        assert float((parameter.detach() - before[name]).abs().median()) == pytest.approx(1e-2, rel=0.2)


def test_in_8_bit_it_stays_near_to_32_bit() -> None:
    exact, rounded = Weights("adamw").update(40), Weights("adamw_8bit").update(40)
    start = Weights("adamw").named["large"]
    moved = exact.named["large"] - start
    assert (rounded.named["large"] - exact.named["large"]).norm() < 0.1 * moved.norm()
    state: Any = rounded.optimizer.state[rounded.named["large"]]
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8
    assert rounded.optimizer.state[rounded.named["small"]]["state1"].dtype == torch.float32


@pytest.mark.parametrize("kind", ["paged_adamw_8bit", "paged_adamw_32bit"])
def test_paged_forms_are_for_gpus(kind: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Weights(kind)
    assert caught.value.problem.startswith(f"training.optimizer = {kind} needs a GPU: ")
    assert "onlay doctor" in caught.value.remedy


def test_bitsandbytes_that_is_missing_is_named_with_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(SetupError) as caught:
        Weights("adamw_8bit")
    assert "training.optimizer = adamw_8bit needs bitsandbytes" in caught.value.problem
    assert caught.value.remedy == "python -m pip install 'onlay[quantized]'"


def test_lora_plus_lets_every_b_learn_faster() -> None:
    names = ["q.lora_A.default.weight", "q.lora_B.default.weight", "experts.lora_B.default.weight", "q.bias"]
    named = {name: nn.Parameter(torch.zeros(2 if name == "q.bias" else (2, 2))) for name in names}
    ratios = {}
    for method, fields in (("lora", {}), ("lora+", {"learning_rate_ratio": 8.0})):
        optimizer = make_optimizer(named, recipe_of(adapter={"method": method, **fields}, weight_decay=0.1))
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        assert len(groups) == len(names)
        ratios[method] = [groups[id(p)]["rate_ratio"] for p in named.values()]
        assert [groups[id(p)]["weight_decay"] for p in named.values()] == [0.1, 0.1, 0.1, 0.0]
    assert ratios == {"lora": [1.0] * 4, "lora+": [1.0, 8.0, 8.0, 1.0]}


# ------------------------------------------------------------------------------------------------------------ held still


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ON_CPU)
def test_a_part_that_is_held_keeps_every_bit_and_counts_for_nothing(kind: str, dtype: torch.dtype) -> None:
    weights, free = Weights(kind, dtype=dtype, weight_decay=0.1), Weights(kind, dtype=dtype, weight_decay=0.1)
    parameter = weights.named["small"]
    where = (slice(0, 2), slice(None))
    value = parameter.detach()[where].clone()
    hold(weights.optimizer, {parameter: (where, value)})
    weights.update(3), free.update(3)
    assert torch.equal(parameter[where], value)
    assert torch.equal(parameter[2:], free.named["small"][2:])
    assert not torch.equal(free.named["small"][where], value)
    assert torch.equal(weights.named["large"], free.named["large"])


def test_the_gradient_of_a_held_part_is_zero_for_the_norm_and_the_averages() -> None:
    weights = Weights("adamw")
    parameter = weights.named["small"]
    hold(weights.optimizer, {parameter: ((slice(None), slice(0, 2)), parameter.detach()[:, :2].clone())})
    for _ in range(2):  # accumulated over two micro-batches
        (parameter * 3.0).sum().backward()
    assert parameter.grad is not None
    assert torch.equal(parameter.grad, torch.tensor([0.0, 0.0, 6.0, 6.0, 6.0]).expand(3, 5))


# ---------------------------------------------------------------------------------------------------------- stored states


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True, map_location="cpu")
    return loaded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ON_CPU)
def test_a_stored_state_goes_on_bit_by_bit(kind: str, dtype: torch.dtype) -> None:
    whole, first, second = Weights(kind, dtype=dtype), Weights(kind, dtype=dtype), Weights(kind, dtype=dtype)
    first.update(3)
    with torch.no_grad():
        for name, parameter in second.named.items():
            parameter.copy_(first.named[name])
    load_optimizer_state(second.optimizer, through_a_file(optimizer_state(first.optimizer)), where="step 3")
    second.updates = 3
    whole.update(7).assert_same(second.update(4))


@pytest.mark.parametrize("kind", ON_CPU)
def test_a_good_state_is_gone_back_to_bit_by_bit_and_more_than_once(kind: str) -> None:
    weights, expected = Weights(kind).update(3), Weights(kind).update(6)
    snapshots = Snapshots(every_steps=1)
    snapshots.take(3, trainable=weights.named, optimizer=weights.optimizer, state={})
    for _ in range(2):
        weights.update(5)
        snapshot = snapshots.before(3)
        assert snapshot is not None
        restore(snapshot, trainable=weights.named, optimizer=weights.optimizer)
        weights.updates = 3
        weights.update(3).assert_same(expected)


@pytest.mark.parametrize(("made", "given"), [("adamw", "adamw_8bit"), ("adamw_8bit", "adamw")])
def test_the_state_of_another_optimizer_is_refused(made: str, given: str) -> None:
    names = {"adamw": "torch.AdamW", "adamw_8bit": "bitsandbytes.AdamW8bit"}
    state = optimizer_state(Weights(made).update().optimizer)
    with pytest.raises(OutputError) as caught:
        load_optimizer_state(Weights(given).optimizer, state, where="runs/a/checkpoints/step-0000001")
    assert caught.value.problem == (
        f"runs/a/checkpoints/step-0000001 holds the state of {names[made]}, "
        f"but training.optimizer of this run is {names[given]}."
    )
    assert "recipe.yaml" in caught.value.remedy


# ------------------------------------------------------------------------------------------------------- 16-bit gradients


@pytest.mark.parametrize(
    "dtypes", [(torch.float32,), (torch.bfloat16,), (torch.float32, torch.bfloat16), (torch.float64, torch.float16)]
)
def test_the_norm_of_gradients_is_not_rounded_to_16_bit(dtypes: tuple[torch.dtype, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [
        torch.randn(shape, generator=generator).to(dtype) for dtype in dtypes for shape in ((300, 40), (7,), (1, 1))
    ]
    exact = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
    found = gradient_norm(gradients)
    assert found.dtype in (torch.float32, torch.float64)
    count = sum(gradient.numel() for gradient in gradients)
    assert float(found) == pytest.approx(exact, rel=torch.finfo(torch.float32).eps * math.sqrt(count))


def test_clipping_by_that_norm_takes_weights_of_several_precisions() -> None:
    parameters = [nn.Parameter(torch.zeros(50, 8, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 3.0)
    gradients: list[Tensor] = [parameter.grad for parameter in parameters if parameter.grad is not None]
    torch.nn.utils.clip_grads_with_norm_(parameters, 1.0, gradient_norm(gradients))
    assert float(gradient_norm(gradients)) == pytest.approx(1.0, rel=torch.finfo(torch.bfloat16).eps)


def test_no_gradient_has_no_norm() -> None:
    assert float(gradient_norm([])) == 0.0
