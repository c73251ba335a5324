"""Which norms are covered, that the model stays the same function, and that the norms step aside where they must."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from onlay.model.norms import eps_of, fuse_norms, is_rms_norm, unfuse_norms
from tests.builders import tiny_model

IDS = (torch.arange(24) * 37 % 256)[None]


def norms_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]


def frozen(name: str, dtype: torch.dtype = torch.float32) -> Any:
    model = tiny_model(name, dtype=dtype).requires_grad_(False)
    draw = torch.Generator().manual_seed(0)
    for norm in norms_of(model):
        norm.weight.data.add_(torch.randn(norm.weight.shape, generator=draw))
    return model


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_logits_and_gradients_stay(name: str) -> None:
    model = frozen(name)
    hidden = model.get_input_embeddings()(IDS).detach().requires_grad_()

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        hidden.grad = None
        logits = model(inputs_embeds=hidden, use_cache=False).logits
        logits.square().mean().backward()
        assert hidden.grad is not None
        return logits.detach(), hidden.grad.clone()

    before = run()
    count = len(norms_of(model))
    assert fuse_norms(model) == f"{count} RMSNorms as one op each"
    after = run()
    for ours, own in zip(after, before, strict=True):
        assert float((ours - own).norm()) <= 100 * torch.finfo(torch.float32).eps * float(own.norm())
        assert not torch.equal(ours, own), "the fast path ran"
    unfuse_norms(model)
    assert all(torch.equal(ours, own) for ours, own in zip(run(), before, strict=True))


def test_norms_of_another_form_are_left_alone() -> None:
    """Gemma adds one to the weight."""
    model = frozen("gemma2")
    assert not any(is_rms_norm(norm) for norm in norms_of(model))
    said = fuse_norms(model)
    assert said == f"{len(norms_of(model))} as the base has them: another form"


def test_norms_that_train_or_are_in_16_bit_are_left_alone() -> None:
    model = frozen("llama")
    model.model.norm.requires_grad_(True)
    assert "1 as the base has them: they train" in fuse_norms(model)
    assert "forward" not in vars(model.model.norm)
    assert "weights in bfloat16" in fuse_norms(frozen("llama", torch.bfloat16))
    assert "weights in float64" in fuse_norms(frozen("llama", torch.float64))


def test_a_base_without_rms_norms_says_nothing() -> None:
    assert fuse_norms(frozen("gpt2")) == ""


def test_other_inputs_go_to_the_norm_itself() -> None:
    model = frozen("llama")
    norm = model.model.norm
    x = torch.randn(3, norm.weight.numel(), generator=torch.Generator().manual_seed(0)).double()
    own = norm(x)
    fuse_norms(model)
    assert torch.equal(norm(x), own)
    assert eps_of(norm) == model.config.rms_norm_eps
