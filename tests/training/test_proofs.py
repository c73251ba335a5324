"""The proofs of a run can fail: each is shown a run in which what it guards against happens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from onlay import stages
from onlay.errors import ProofError
from onlay.model.adapter import adapted_modules, attach, held_parts
from onlay.model.load import weight_checksums
from onlay.recipe import LoftqAdapter, LoraAdapter, LoraPlusAdapter, PissaAdapter
from onlay.records import Run
from onlay.training import session
from onlay.training.loop import StepReport
from onlay.training.optimizer import make_optimizer
from onlay.training.proofs import MovementProof, prove_finite, prove_held, prove_unchanged
from tests.builders import proofs_of, recipe_for, save_tiny_base, tiny_model, write_rows

IDS = torch.arange(12)[None]


def trainable_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def two_updates(
    model: nn.Module, run: Callable[[], Tensor] | None = None, *, rate: float = 1e-3
) -> list[dict[str, Any] | None]:
    """What the proof says after each of two optimizer steps."""
    trainable = trainable_of(model)
    proof = MovementProof(model, trainable, done=False)
    optimizer = make_optimizer(trainable, recipe_for("base", "rows.jsonl"))
    for group in optimizer.param_groups:
        group["lr"] = rate
    results = []
    for update in (1, 2):
        optimizer.zero_grad()
        (run() if run else model(input_ids=IDS, use_cache=False).logits.square().sum()).backward()
        optimizer.step()
        results.append(proof.observe(update))
    return results


def adapted(name: str = "llama", **fields: Any) -> Any:
    return attach(tiny_model(name), LoraAdapter(rank=2, **fields), seed=0)[0]


def of_method(method: str) -> Any:
    kinds: dict[str, type[LoraAdapter]] = {"lora+": LoraPlusAdapter, "pissa": PissaAdapter, "loftq": LoftqAdapter}
    section = kinds.get(method, LoraAdapter)(method=method, rank=2)  # type: ignore[arg-type]
    return attach(tiny_model("llama"), section, seed=0, resumed=method == "loftq")[0]


# ---------------------------------------------------------------------------------------------------------- movement


@pytest.mark.parametrize(
    ("name", "modules"), [("llama", 14), ("gpt2", 8), ("mixtral", 12), ("mamba", 4), ("falcon_h1", 16)]
)
def test_every_module_moves(name: str, modules: int) -> None:
    assert two_updates(adapted(name)) == [None, {"moved_modules": modules, "modules_without_tokens": []}]


@pytest.mark.parametrize(("part", "updates"), [("B", 1), ("A", 2)])
def test_a_weight_that_a_hook_holds_is_named(part: str, updates: int) -> None:
    """B must move at the first update, A at the second: its gradient is a product with B."""
    model = adapted()
    name = "base_model.model.model.layers.1.mlp.up_proj"
    adapted_modules(model)[name][part].register_hook(torch.zeros_like)
    seen: list[int] = []
    observe = MovementProof.observe

    def counted(self: MovementProof, update: int) -> Any:
        seen.append(update)
        return observe(self, update)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MovementProof, "observe", counted)
        with pytest.raises(ProofError, match=rf"1 of 14 adapted modules received tokens but did not move: {name}\."):
            two_updates(model)
    assert seen == list(range(1, updates + 1))


@pytest.mark.parametrize("method", ["rslora", "dora", "lora+", "pissa", "loftq"])
def test_every_module_moves_with_every_method(method: str) -> None:
    assert two_updates(of_method(method)) == [None, {"moved_modules": 14, "modules_without_tokens": []}]


def test_a_magnitude_without_a_gradient_is_named() -> None:
    model = of_method("dora")
    name = "base_model.model.model.layers.1.mlp.up_proj"
    adapted_modules(model)[name]["magnitude"].register_hook(torch.zeros_like)
    with pytest.raises(ProofError, match=rf"1 of 14 adapted modules received tokens but did not move: {name}\."):
        two_updates(model)


def test_a_magnitude_too_large_for_the_first_steps_of_a_warm_up_is_no_error() -> None:
    """A step of 1e-9 is below half a spacing of float32 at the norm of a row; A and B have values near zero."""
    model = of_method("dora")
    before = {name: parts["magnitude"].clone() for name, parts in adapted_modules(model).items()}
    assert two_updates(model, rate=1e-9)[1] == {"moved_modules": 14, "modules_without_tokens": []}
    assert any(torch.equal(parts["magnitude"], before[name]) for name, parts in adapted_modules(model).items())


def test_what_is_held_must_not_move_by_a_bit() -> None:
    model = of_method("pissa")
    trainable = trainable_of(model)
    held = held_parts(model, PissaAdapter(method="pissa", rank=2))
    assert len(held) == len(trainable) == 28
    assert prove_held(trainable, held)
    name = next(name for name in trainable if "lora_B" in name)
    with torch.no_grad():
        trainable[name][0, 0] += 1.0
        assert prove_held(trainable, held)
        trainable[name].view(torch.int32)[0, -1] ^= 1
    with pytest.raises(ProofError, match=rf"{name} changed in the half that PiSSA holds"):
        prove_held(trainable, held)


def test_a_cut_graph_is_found() -> None:
    model = adapted(targets=["q_proj", "v_proj"])
    model.get_submodule("base_model.model.model.layers.0.self_attn.v_proj").register_forward_hook(
        lambda _m, _i, out: out.detach()
    )
    with pytest.raises(ProofError, match=r"layers\.0\.self_attn\.v_proj"):
        two_updates(model)


def test_a_rate_below_the_precision_of_the_weights_is_found() -> None:
    model = adapted().to(torch.bfloat16)
    for pair in adapted_modules(model).values():
        nn.init.ones_(pair["B"])
    with pytest.raises(ProofError, match=r"14 of 14 .*\n.*learning_rate too small"):
        two_updates(model, rate=1e-6)


class Experts(nn.Module):
    """Three experts: the first gets all tokens, the second an empty share, the third is not even called."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, states: Tensor) -> Tensor:
        return torch.cat([self.experts[0](states), self.experts[1](states[:0])])


def test_experts_without_tokens_are_listed_and_need_not_move() -> None:
    model = Experts().requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0", "1", "2"]), model)
    results = two_updates(model, lambda: model(torch.ones(5, 4)).square().sum())
    assert results[1] == {"moved_modules": 1, "modules_without_tokens": ["experts.1", "experts.2"]}


def test_a_resumed_run_is_not_watched_again() -> None:
    model = adapted()
    proof = MovementProof(model, trainable_of(model), done=True)
    assert proof.observe(1) is None
    assert proof.observe(2) is None
    assert not any(module._forward_hooks for module in model.modules())


def test_hooks_are_gone_after_the_second_update() -> None:
    model = adapted()
    two_updates(model)
    assert not any(module._forward_hooks for module in model.modules())


def test_with_full_tuning_every_weight_that_has_a_gradient_moves_at_once() -> None:
    def full() -> nn.Module:
        return tiny_model("llama").requires_grad_(True)

    first, second = two_updates(full())
    assert first == {"moved_weights": 21, "weights_without_tokens": []}
    assert second is None
    with pytest.raises(ProofError, match="21 of 21 adapted weights"):
        two_updates(full(), rate=0.0)


# --------------------------------------------------------------------------------------------- finite and unchanged


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_named(bad: float) -> None:
    trainable = trainable_of(adapted())
    assert prove_finite(trainable)
    name = list(trainable)[5]
    with torch.no_grad():
        trainable[name].view(-1)[-1] = bad
    with pytest.raises(ProofError, match=name):
        prove_finite(trainable)


def test_one_changed_bit_of_the_base_is_found() -> None:
    model = tiny_model("llama")
    before = weight_checksums(model)
    assert prove_unchanged(before, weight_checksums(model))
    weight = model.get_parameter("model.layers.1.mlp.up_proj.weight")
    with torch.no_grad():
        weight.view(torch.int32)[3, 4] ^= 1
    with pytest.raises(ProofError, match=r"1 frozen weights .* first model\.layers\.1\.mlp\.up_proj\.weight"):
        prove_unchanged(before, weight_checksums(model))
    with pytest.raises(ProofError, match="first gone"):
        prove_unchanged({"gone": 1}, {})


# ----------------------------------------------------------------------------------------------------- in whole runs


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """Trains four steps; `spoil(model)` is called after step 3, or before the first with `at=0`."""
    monkeypatch.setenv("ONLAY_HOME", str(tmp_path / "home"))
    base = save_tiny_base(tmp_path / "base")
    rows = write_rows(tmp_path / "rows.jsonl", 16)
    models: list[Any] = []

    def run(spoil: Callable[[Any], None] | None = None, *, at: int = 3, **sections: Any) -> Run:
        def kept(*args: Any, **kwargs: Any) -> Any:
            model, left_out = attach(*args, **kwargs)
            models.append(model)
            if spoil is not None and at == 0:
                spoil(model)
            return model, left_out

        def report(event: Any) -> None:
            if isinstance(event, StepReport) and event.step == at and spoil is not None:
                spoil(models[-1])

        monkeypatch.setattr(session, "attach", kept)
        return stages.train(
            recipe_for(base, rows, training={"output": str(tmp_path / "run"), "batch_size": 4}, **sections),
            report=report,
        )

    return run


@pytest.mark.parametrize("bias", ["none", "all"])
def test_a_run_records_its_proofs(train: Callable[..., Run], bias: str) -> None:
    run = train(adapter={"bias": bias})
    assert run.status == "finished"
    assert proofs_of(run) == {
        "movement": {"moved_modules": 14, "modules_without_tokens": []}, "finite": True, "base_unchanged": True,
    }  # fmt: skip
    assert run.fast_paths["layout"].startswith("rows padded by length buckets")
    assert Run.load(Path(run.path)).proofs == run.proofs


def test_pissa_also_proves_what_it_held_and_counts_what_it_trains(train: Callable[..., Run]) -> None:
    run = train(adapter={"method": "pissa", "rank": 4})
    assert run.status == "finished"
    assert proofs_of(run) == {
        "movement": {"moved_modules": 14, "modules_without_tokens": []}, "finite": True, "held_still": True,
        "base_unchanged": True,
    }  # fmt: skip
    assert run.method == "pissa"
    assert run.trainable_parameters == sum(
        parameter.numel()
        for parameter in trainable_of(attach(tiny_model("llama"), LoraAdapter(rank=4), seed=0)[0]).values()
    )


def move_held(model: Any) -> None:
    with torch.no_grad():
        adapted_modules(model)["base_model.model.model.layers.0.self_attn.q_proj"]["A"][-1, 0] += 1.0


def test_a_held_half_that_is_moved_is_found(train: Callable[..., Run], tmp_path: Path) -> None:
    with pytest.raises(ProofError, match=r"q_proj\.lora_A\.default\.weight changed in the half that PiSSA holds"):
        train(move_held, at=4, adapter={"method": "pissa", "rank": 4})
    assert not (tmp_path / "run" / "adapter").exists()


def test_full_tuning_records_its_proofs(train: Callable[..., Run]) -> None:
    assert proofs_of(train(adapter={"method": "full"})) == {
        "movement": {"moved_weights": 21, "weights_without_tokens": []}, "finite": True,
    }  # fmt: skip


def change_base(model: Any) -> None:
    with torch.no_grad():
        model.get_parameter("base_model.model.model.layers.0.mlp.down_proj.base_layer.weight")[0, 0] += 1e-3


def hold_b(model: Any) -> None:
    adapted_modules(model)["base_model.model.model.layers.0.self_attn.q_proj"]["B"].register_hook(torch.zeros_like)


def plant_nan(model: Any) -> None:
    with torch.no_grad():
        adapted_modules(model)["base_model.model.model.layers.0.self_attn.q_proj"]["A"][0, 0] = float("nan")


@pytest.mark.parametrize(
    ("spoil", "at", "problem"),
    [
        (
            change_base,
            3,
            r"1 frozen weights of the base changed during training, first model\.layers\.0\.mlp\.down_proj\.weight",
        ),
        (hold_b, 0, r"1 of 14 adapted modules received tokens but did not move: .*layers\.0\.self_attn\.q_proj"),
        (plant_nan, 4, r"layers\.0\.self_attn\.q_proj\.lora_A\.default\.weight holds values that are not finite"),
    ],
    ids=["base", "movement", "finite"],
)
def test_a_run_that_breaks_a_proof_fails_and_leaves_no_adapter(
    train: Callable[..., Run], tmp_path: Path, spoil: Callable[[Any], None], at: int, problem: str
) -> None:
    with pytest.raises(ProofError, match=problem):
        train(spoil, at=at)
    run = Run.load(tmp_path / "run")
    assert run.status == "failed"
    assert run.error
    assert not (tmp_path / "run" / "adapter").exists()
