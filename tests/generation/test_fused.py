"""Fused steps against the base's own modules, in float64 on a CPU: which bases have the form, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention

from onlay.generation import prove
from onlay.generation.adapters import RowAdapters, base_of
from onlay.generation.fused import FusedDecoding
from onlay.generation.slots import SLOT_ATTENTION, Slots, attention
from onlay.kernels.decode import rotate_and_store
from tests.builders import shake, tiny_model

WIDE_HEADS = {"head_dim": 32}
"""The tiny bases' heads are too narrow for the kernel."""
USUAL = ("llama", "qwen3")


def wide_model(name: str) -> Any:
    return tiny_model(name, dtype=torch.float64, **WIDE_HEADS)


def prompts(lengths: Sequence[int]) -> list[list[int]]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(256, (length,), generator=draw).tolist() for length in lengths]


def walk(model: Any, rows: list[list[int]], adapters: list[str | None] | None, *, fused: bool) -> Tensor:
    """Logits of six steps after the prompts."""
    base = base_of(model)
    steps = FusedDecoding(base) if fused else None
    by_row = RowAdapters(model, groups=steps.groups if steps else ()) if adapters else None
    found = []
    with torch.inference_mode(), attention(base, SLOT_ATTENTION), by_row or nullcontext():
        if by_row is not None and adapters is not None:
            by_row.expect(adapters)
            by_row.put(adapters)
        with steps.use(by_row) if steps else nullcontext():
            slots = Slots(base, rows=len(rows), columns=40, longest=40, piece_tokens=64, graphs=False)
            everyone = list(range(len(rows)))
            logits = slots.admit(everyone, rows, active=everyone)
            for _ in range(6):
                logits = slots.step(logits.argmax(-1), active=everyone)
                found.append(logits)
    return torch.stack(found)


@pytest.mark.parametrize("name", USUAL)
def test_fused_steps_give_the_logits_of_the_modules(name: str) -> None:
    model = wide_model(name)
    rows = prompts([9, 14, 5])
    assert FusedDecoding(model).found
    with FusedDecoding(model):
        replaced = [type(module).__name__ for module in model.modules() if "forward" in vars(module)]
    assert sum(kind.endswith("DecoderLayer") for kind in replaced) == model.config.num_hidden_layers
    own, ours = walk(model, rows, None, fused=False), walk(model, rows, None, fused=True)
    # transformers' norms and rotary tables are float32 inside.
    assert float((own - ours).abs().max()) < 2e-5
    assert not torch.equal(own, ours), "the fused path ran"


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_that_share_an_input_are_computed_together(dora: bool) -> None:
    """One adapts everything, one only some of a group's layers, and one row has none."""
    model: Any = wide_model("llama")
    model = get_peft_model(
        model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=dora), "a"
    )
    model.add_adapter("b", LoraConfig(r=3, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["a", "b"])
    shake(model, scale=0.3)
    rows, worn = prompts([9, 14, 5, 8]), ["a", "b", None, "b"]
    own, ours = walk(model, rows, worn, fused=False), walk(model, rows, worn, fused=True)
    assert float((own - ours).abs().max()) < 2e-5
    plain = walk(model, rows, [None, None, None, "b"], fused=True)
    assert float((plain[:, 0] - ours[:, 0]).abs().max()) > 1e-2, "adapters do something"
    assert torch.allclose(plain[:, 2], ours[:, 2])


@pytest.mark.parametrize("name", ["gpt2", "phi3", "gemma2", "gemma3", "mixtral"])
def test_other_forms_keep_their_attention_or_mlp(name: str) -> None:
    """Joined projections, softcaps, norms of another kind and experts are not taken for the usual form."""
    model = tiny_model(name, dtype=torch.float64)
    if name != "gemma2":  # Slots leave it its own attention.
        rows = prompts([9, 14])
        own, ours = walk(model, rows, None, fused=False), walk(model, rows, None, fused=True)
        assert float((own - ours).abs().max()) < 2e-5
    fused = FusedDecoding(model)
    with fused:
        replaced = {type(module).__name__ for module in model.modules() if "forward" in vars(module)}
    assert not any("Attention" in kind and name in ("gpt2", "phi3", "gemma2") for kind in replaced), replaced


def test_leaving_takes_the_forwards_off() -> None:
    model = wide_model("llama")
    with FusedDecoding(model):
        assert sum("forward" in vars(module) for module in model.modules()) > 4
    assert not any("forward" in vars(module) for module in model.modules())


def test_prompts_and_training_go_through_the_modules() -> None:
    model = wide_model("llama")
    ids = torch.tensor(prompts([12]))
    expected = model(input_ids=ids).logits
    with FusedDecoding(model):
        assert float((model(input_ids=ids).logits - expected).detach().abs().max()) < 2e-5


# ----------------------------------------------------------------------------------------------------------- the proof


@pytest.fixture
def believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof as on a GPU, with the references in the place of the kernels."""
    monkeypatch.setattr(prove, "has_kernels", lambda _: True)
    monkeypatch.setattr(prove, "why_not", lambda **_: None)


class AsksForPositions(LlamaAttention):
    def forward(self, hidden_states: Tensor, position_ids: Tensor | None = None, **kwargs: Any) -> Any:
        return super().forward(hidden_states, **kwargs)


class ScalesLate(LlamaAttention):
    """Like those that scale their queries beyond the length they were trained at."""

    def forward(self, hidden_states: Tensor, position_embeddings: Any = None, **kwargs: Any) -> Any:
        late = (kwargs["position_ids"] > 100)[:, :, None].to(hidden_states.dtype)
        return super().forward(hidden_states * (1 + late), position_embeddings, **kwargs)


def of_class(kind: type[nn.Module]) -> Any:
    model = wide_model("llama")
    for layer in model.model.layers:
        layer.self_attn.__class__ = kind
    return model


@pytest.mark.usefixtures("believed")
def test_the_usual_form_is_proven_to_the_end_of_the_context() -> None:
    proven = prove.prove_slots(wide_model("llama"), context_tokens=512)
    assert proven.failure is None
    assert proven.fused is None
    assert proven.steps is not None


@pytest.mark.usefixtures("believed")
@pytest.mark.parametrize(
    ("kind", "reason"), [(AsksForPositions, "another form"), (ScalesLate, "logits at position 511 differ")]
)
def test_attentions_that_compute_more_are_not_fused(kind: type[nn.Module], reason: str) -> None:
    model = of_class(kind)
    # Without it the MLPs of layers whose attention is not covered would still be.
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.GELU()
    proven = prove.prove_slots(model, context_tokens=512)
    assert proven.failure is None, "its own modules decode it"
    assert proven.fused is not None
    assert reason in proven.fused
    assert proven.steps is None


def test_kernels_that_do_not_run_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prove, "has_kernels", lambda _: True)
    monkeypatch.setattr(prove, "why_not", lambda **_: "the kernels do not run here: OutOfResources")
    proven = prove.prove_slots(wide_model("llama"), context_tokens=512)
    assert proven.failure is None
    assert proven.fused == "the kernels do not run here: OutOfResources"


def test_tables_of_another_width_are_refused() -> None:
    """Where only a part of each head is rotated."""
    wide, narrow = torch.zeros(2, 32), torch.zeros(2, 16)
    room = torch.zeros(2, 1, 4, 32)
    with pytest.raises(ValueError, match="tables of width 16 for heads of width 32"):
        rotate_and_store(
            wide, wide, wide, cos=narrow, sin=narrow, keys=room, values=room, column=torch.zeros(1, dtype=torch.long)
        )


def test_norms_without_a_weight_are_no_reason_to_stop() -> None:
    class Bare(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    model = wide_model("qwen3")
    for layer in model.model.layers:
        layer.self_attn.q_norm, layer.self_attn.k_norm = Bare(), Bare()
    with FusedDecoding(model):
        assert not any("forward" in vars(layer.self_attn) for layer in model.model.layers)
