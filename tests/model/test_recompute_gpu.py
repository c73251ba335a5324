"""Activations in host memory, on a GPU: the same gradient bit by bit, less memory, and pinned memory that is used again.

Run by hand where there is one: pytest tests/model/test_recompute_gpu.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from onlay.model.adapter import attach
from onlay.model.recompute import Offload, Recompute
from onlay.recipe import LoraAdapter
from tests.builders import shake, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = torch.device("cuda")
LAYERS = 12
SIZES = {"hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": LAYERS, "initializer_range": 0.02}
TOKENS = 4096
INPUT_BYTES = TOKENS * 1024 * 2


def adapted(dropout: float = 0.0) -> tuple[nn.Module, nn.Module]:
    base = tiny_model("llama", dtype=torch.bfloat16, max_position_embeddings=TOKENS, **SIZES).to(DEVICE)  # type: ignore[arg-type]
    base.set_attn_implementation("eager")  # The backward pass of fused attention adds up in any order.
    model, _ = attach(base, LoraAdapter(rank=4, dropout=dropout), seed=0)
    shake(model, scale=0.02)
    return base, model


def step(model: nn.Module, tokens: int = TOKENS, *, seed: int = 0) -> dict[str, Tensor]:
    """Gradients of one step over `tokens` tokens in rows of 512, or less."""
    model.zero_grad()
    torch.manual_seed(seed)
    ids = torch.randint(272, (max(1, tokens // 512), min(tokens, 512)), device=DEVICE)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    logits.float().log_softmax(-1)[..., 3].mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def peak_bytes(model: nn.Module) -> int:
    step(model)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(model)
    return torch.cuda.max_memory_allocated() - before


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_the_gradient_is_the_same_bit_by_bit(dropout: float) -> None:
    base, model = adapted(dropout)
    sizes = [TOKENS, 512, TOKENS // 2, 1, TOKENS, 1536]
    expected = [step(model, tokens, seed=seed) for seed, tokens in enumerate(sizes)]
    for seed, tokens in enumerate(sizes):
        assert_equal(step(model, tokens, seed=seed), expected[seed])
    for offload in (False, True):
        recompute = Recompute(base, offload=offload)
        recompute.switch_on()
        for _ in range(3):
            for seed, tokens in enumerate(sizes):
                assert_equal(step(model, tokens, seed=seed), expected[seed])
        recompute.switch_off()


def test_memory_is_lower() -> None:
    base, model = adapted()
    kept = peak_bytes(model)
    recomputing = Recompute(base)
    recomputing.switch_on()
    recomputed = peak_bytes(model)
    recomputing.switch_off()
    Recompute(base, offload=True).switch_on()
    offloaded = peak_bytes(model)
    assert recomputed < 0.5 * kept
    # All but a few of the layers' inputs are gone: those in flight, and the one that came back.
    assert offloaded <= recomputed - (LAYERS - 5) * INPUT_BYTES


def test_pinned_memory_is_used_again() -> None:
    base, model = adapted()
    recompute = Recompute(base, offload=True)
    recompute.switch_on()
    assert recompute._offload is not None
    step(model)
    taken = recompute._offload.buffer_bytes
    assert taken == LAYERS * INPUT_BYTES
    for tokens in (TOKENS // 2, TOKENS, 512, TOKENS):
        step(model, tokens)
        assert recompute._offload.buffer_bytes == taken


def test_a_step_that_breaks_off_leaves_nothing_behind() -> None:
    base, model = adapted()
    recompute = Recompute(base, offload=True)
    recompute.switch_on()
    expected = step(model)
    layers: Any = recompute.layers
    for place in (0, 5, LAYERS - 1):
        for when in ("forward", "backward"):
            count = [0]

            def broken(
                _module: nn.Module, _given: Any, *, n: int = 1 if when == "forward" else 2, count: list[int] = count
            ) -> None:
                count[0] += 1
                if count[0] == n:
                    raise torch.OutOfMemoryError("planted")

            handle = layers[place].mlp.register_forward_pre_hook(broken)
            with pytest.raises(torch.OutOfMemoryError, match="planted"):
                step(model)
            handle.remove()
            assert_equal(step(model), expected)


def test_what_several_layers_share_is_kept_once() -> None:
    offload = Offload()
    shared = torch.randn(2**20, device=DEVICE)
    states = torch.randn(2**20, device=DEVICE, requires_grad=True)

    def layer(states: Tensor, shared: Tensor) -> Tensor:
        return (states * shared).sin() * states.cos()

    def run(hooked: bool) -> Tensor:
        states.grad = None
        out = states
        offload.begin()
        for _ in range(6):
            if hooked:
                with torch.autograd.graph.saved_tensors_hooks(offload.pack, offload.unpack):
                    out = checkpoint(layer, out, shared, use_reentrant=False)
            else:
                out = layer(out, shared)
        out.sum().backward()
        assert states.grad is not None
        return states.grad.clone()

    expected = run(False)
    for _ in range(3):
        assert torch.equal(run(True), expected)
        # Six inputs, of which the first is the leaf, and `shared` once.
        assert offload.buffer_bytes == 7 * shared.nbytes
