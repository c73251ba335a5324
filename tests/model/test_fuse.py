"""The fast path of a base with its adapter: the same function and gradients as PEFT's, and everything can be put back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from onlay.kernels import causal_attention
from onlay.model.adapter import adapted_modules
from onlay.model.attention import PACKED_ATTENTION, use_attention
from onlay.model.fuse import UNUSUAL, fuse, unfuse
from onlay.model.recompute import Recompute
from tests.builders import ARCHITECTURES, AllFloat64, tiny_model
from tests.model.fused import (
    PACKED,
    PADDED,
    ROUNDING,
    Counts,
    adapted,
    another_base,
    assert_same_function,
    covered,
    distance,
    rows_packed,
    run,
    with_adapter,
)  # fmt: skip

FUSED: dict[str, tuple[int, int, int, int]] = {
    "llama": (2, 2, 0, 1), "qwen3": (2, 2, 0, 1), "phi3": (2, 2, 0, 1), "qwen2": (2, 2, 0, 1), "falcon_h1": (2, 2, 2, 5),
    # Tokens enough for their window, and so a mask.
    "gemma3": (0, 2, 8, 13), "mistral": (0, 2, 8, 5),
    # The form of its attention is not that of any kernel.
    "gemma2": (0, 2, 8, 9),
    # Experts are adapted as parameters.
    "mixtral": (2, 0, 0, 3), "qwen3_moe": (2, 0, 0, 3),
    "gpt2": (0, 0, 0, 0), "bloom": (0, 0, 8, 0), "opt": (0, 0, 12, 0), "mamba": (0, 0, 4, 3), "recurrent_gemma": (0, 3, 10, 7),
}  # fmt: skip
"""Attentions, MLPs, other linear layers and other norms that are one node each, of padded rows."""


def test_every_architecture_is_listed() -> None:
    assert set(ARCHITECTURES) <= set(FUSED)


@pytest.mark.parametrize("name", FUSED)
def test_logits_and_gradients_are_those_of_peft(name: str, called: Counts) -> None:
    with AllFloat64():
        model = with_adapter(another_base(name, **({"sliding_window": 16} if name == "mistral" else {})), rank=3)
        fused = assert_same_function(model, called)
    kinds = ("attentions", "MLPs", "other linear layers", "other norms")
    assert tuple(called.get(kind, 0) for kind in kinds) == FUSED[name]
    assert (name in ORDINARY) == bool(fused.ordinary)
    assert set(fused.ordinary) == ORDINARY.get(name, set())


ORDINARY = {
    "gpt2": {"adapters on Conv1D"}, "opt": {UNUSUAL}, "gemma3": {UNUSUAL}, "mistral": {UNUSUAL},
    "gemma2": {"its attention calls no kernel that could be watched"},
    "mixtral": {"adapters on MixtralExperts"}, "qwen3_moe": {"adapters on Qwen3MoeExperts"},
}  # fmt: skip


@pytest.mark.parametrize("method", ["rslora", "lora+", "pissa"])
@pytest.mark.parametrize(("name", "rank"), [("llama", 1), ("phi3", 5), ("bloom", 40)])
def test_other_methods_are_too(method: str, name: str, rank: int, called: Counts) -> None:
    with AllFloat64():
        assert_same_function(adapted(name, method, rank=rank), called)


@pytest.mark.parametrize("targets", ["qv", "attention", "mlp", ["k_proj"], ["o_proj", "up_proj"], ["down_proj"]])
@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3"])
def test_other_targets_are_too(targets: Any, name: str, called: Counts) -> None:
    """A layer without an adapter is part of its group, and its norm and residual of the block."""
    if name == "phi3" and targets in (["k_proj"], ["o_proj", "up_proj"]):
        targets = ["qkv_proj"] if targets == ["k_proj"] else ["o_proj", "gate_up_proj"]
    with AllFloat64():
        assert_same_function(adapted(name, targets=targets), called)
    assert called == {"attentions": 2, "MLPs": 2, "other norms": 1}


def test_biases_that_train_are_too(called: Counts) -> None:
    with AllFloat64():
        model = adapted("qwen2", bias="all")
        assert len(assert_same_function(model, called).layers) == 2
    assert sum(p.grad is not None for name, p in model.named_parameters() if name.endswith("bias")) == 6


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral", "qwen2", "mixtral"])
def test_packed_rows_are_too(name: str, called: Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    """With windows of 16 tokens in gemma3 and mistral.  On a CPU the kernel of the ordinary path is replaced by its definition."""

    def varlen(q: Tensor, k: Tensor, v: Tensor, borders: Tensor, _: Tensor, longest: int, __: int, *, scale: float,
               window_size: tuple[int, int], **grouped: bool) -> Tensor:  # fmt: skip
        examples = causal_attention.Examples(borders=borders, longest=longest)
        window = None if window_size[0] == -1 else window_size[0] + 1
        return causal_attention.reference(q, k, v, examples, scale=scale, window=window)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    with AllFloat64():
        model = with_adapter(another_base(name, **({"sliding_window": 16} if name == "mistral" else {})))
        use_attention(model.get_base_model(), PACKED_ATTENTION)
        fused = assert_same_function(model, called, layout=PACKED, rows=rows_packed)
    assert called["attentions"] == 2
    windows = {"gemma3": {None, 16}, "mistral": {16}}.get(name, {None})
    assert {block.window for group in fused.layers.values() for block in group if hasattr(block, "window")} <= windows
    assert 16 in windows or windows == {None}


def test_a_small_error_of_an_adapter_would_be_seen(called: Counts) -> None:
    """What the tests above would find: one weight of one adapter off by a millionth."""
    with AllFloat64():
        model = adapted(rank=4)
        logits, _ = run(model)
        fuse(model, layout=PADDED, dtype=torch.float64)
        called.clear()
        with torch.no_grad():
            adapted_modules(model)["base_model.model.model.layers.0.mlp.up_proj"]["B"][0, 0] += 1e-6
        assert distance(run(model)[0], logits) > 1e3 * ROUNDING
    assert called["MLPs"] == 2


# ---------------------------------------------------------------------------------------------------- what only looks so


def swapped(model: Any) -> None:
    class Swapped(type(model.get_base_model().model.layers[0].mlp)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Any:
            return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))

    for layer in model.get_base_model().model.layers:
        layer.mlp.__class__ = Swapped


def backwards(model: Any) -> None:
    """Rotates the other way round."""

    class Backwards(type(model.get_base_model().model.layers[0].self_attn)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, position_embeddings: Any = None, **told: Any) -> Any:
            cos, sin = position_embeddings
            return super().forward(hidden_states, position_embeddings=(cos, -sin), **told)

    for layer in model.get_base_model().model.layers:
        layer.self_attn.__class__ = Backwards


def once_more(model: Any) -> None:
    """Adds the input of the MLP a second time."""

    class Layer(type(model.get_base_model().model.layers[0])):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, **told: Any) -> Any:
            return super().forward(hidden_states, **told) + 1e-3 * hidden_states

    for layer in model.get_base_model().model.layers:
        layer.__class__ = Layer


def relu(model: Any) -> None:
    for layer in model.get_base_model().model.layers:
        layer.mlp.act_fn = nn.ReLU()


def capped(model: Any) -> None:
    """Asks its kernel for more than a block does."""

    def kernel(module: Any, *args: Any, softcap: float, **told: Any) -> Any:
        return transformers.AttentionInterface()["sdpa"](module, *args, **told)

    class Capped(type(model.get_base_model().model.layers[0].self_attn)):  # type: ignore[misc]
        def forward(self, *args: Any, **told: Any) -> Any:
            return super().forward(*args, softcap=30.0, **told)

    transformers.AttentionInterface.register("capped", kernel)
    model.get_base_model().set_attn_implementation("capped")
    for layer in model.get_base_model().model.layers:
        layer.self_attn.__class__ = Capped


ELSE = "it computes something else (a token differs by "
LOOKALIKES: dict[str, tuple[str, Callable[[Any], None] | None, Counts, str | None]] = {
    "gate and up swapped": ("llama", swapped, {"attentions": 2, "other linear layers": 6, "other norms": 5}, ELSE),
    "rotation backwards": ("llama", backwards, {"MLPs": 2, "other linear layers": 8, "other norms": 5}, ELSE),
    "a residual twice": ("llama", once_more, {"attentions": 2, "MLPs": 2, "other norms": 5}, ELSE),
    "another activation": ("llama", relu, {"attentions": 2, "other linear layers": 6, "other norms": 3}, None),
    "softcap": ("llama", capped, {"MLPs": 2, "other linear layers": 8, "other norms": 5}, "its attention has softcap"),
    "residual multiplier": ("granite", None, {"attentions": 2, "MLPs": 2, "other norms": 5}, ELSE),
    "interleaved rotation": ("glm", None, {"MLPs": 2, "other linear layers": 8, "other norms": 5}, ELSE),
}


@pytest.mark.parametrize("case", LOOKALIKES)
def test_what_only_looks_so_is_refused_by_the_trial(case: str, called: Counts) -> None:
    """And of what is refused the parts are tried by themselves."""
    name, change, counts, reason = LOOKALIKES[case]
    changes = {"granite": {"residual_multiplier": 0.9}, "glm": {"head_dim": 8}}.get(name, {})
    with AllFloat64():
        model = with_adapter(another_base(name, **changes))
        if change is not None:
            change(model)
        fused = assert_same_function(model, called)
    assert called == counts
    assert all(told.startswith(str(reason)) for told in fused.ordinary)
    assert bool(fused.ordinary) == (reason is not None)


# ------------------------------------------------------------------------------------------------------------- together


@pytest.mark.parametrize("count", [1, None])
def test_recomputed_layers_have_the_same_gradients(count: int | None, called: Counts) -> None:
    with AllFloat64():
        model = adapted(dropout=0.2).train()
        fuse(model, layout=PADDED, dtype=torch.float64)
        torch.manual_seed(0)
        logits, gradients = run(model)
        recompute = Recompute(model.get_base_model())
        recompute.switch_on(count)
        called.clear()
        torch.manual_seed(0)
        again, found = run(model)
    assert called["attentions"] == 2 + (count or 2)
    assert torch.equal(again, logits)
    assert all(torch.equal(found[name], gradients[name]) for name in gradients)


def test_unfuse_puts_everything_back() -> None:
    model = adapted(dtype=torch.float32)
    logits, gradients = run(model)
    fuse(model, layout=PADDED, dtype=torch.float32)
    assert covered(model) == {
        "base_model.model.model.layers.0", "base_model.model.model.layers.1", "base_model.model.model.norm",
    }  # fmt: skip
    unfuse(model)
    assert covered(model) == set()
    again, found = run(model)
    assert torch.equal(again, logits)
    assert all(torch.equal(found[name], gradients[name]) for name in gradients)


@pytest.mark.parametrize("name", ["bloom", "gemma2", "granite"])
def test_unfuse_puts_parts_back(name: str) -> None:
    model = adapted(name)
    before = covered(model)
    fuse(model, layout=PADDED, dtype=torch.float64)
    assert covered(model) > before
    unfuse(model)
    assert covered(model) == before == set()


def test_full_tuning_has_nothing_to_skip(called: Counts) -> None:
    model = tiny_model("llama", dtype=torch.float64).requires_grad_(True)
    fused = fuse(model, layout=PADDED, dtype=torch.float64)
    assert fused.notes == {"fused": "nothing"}
    assert covered(model) == set()
