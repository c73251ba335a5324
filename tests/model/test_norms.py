"""Which norms are RMSNorms, and of which kind: by what they compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from onlay.model.norms import eps_of, is_rms_norm, offset_of
from tests.builders import tiny_model


def norms_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]


class ScaledRMSNorm(nn.Module):
    """Looks like one, but for its eps, its place of it, or a factor."""

    def __init__(self, *, inside: float = 1e-5, factor: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, generator=torch.Generator().manual_seed(0)))
        self.eps, self.inside, self.factor = 1e-5, inside, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.weight * x * (x.square().mean(-1, keepdim=True) + self.inside).rsqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("name", "offset"), [
    ("llama", 0.0), ("qwen3", 0.0), ("phi3", 0.0), ("gemma2", 1.0), ("gemma3", 1.0), ("recurrent_gemma", 1.0), ("mamba", 0.0),
])  # fmt: skip
def test_the_kind_is_what_it_computes(name: str, offset: float, dtype: torch.dtype) -> None:
    model = tiny_model(name, dtype=dtype)
    draw = torch.Generator().manual_seed(0)
    norms = norms_of(model)
    assert norms
    for norm in norms:
        norm.weight.data.add_(torch.randn(norm.weight.shape, generator=draw))
        assert offset_of(norm) == offset
        assert is_rms_norm(norm) == (offset == 0.0)


def test_eps_has_two_names() -> None:
    llama, gemma = (norms_of(tiny_model(name))[0] for name in ("llama", "gemma2"))
    assert "variance_epsilon" in vars(llama)
    assert "eps" in vars(gemma)
    assert eps_of(llama) == eps_of(gemma) == 1e-6
    assert eps_of(nn.Linear(2, 2)) is None


def test_what_computes_something_else_is_none() -> None:
    assert offset_of(ScaledRMSNorm()) == 0.0
    assert offset_of(ScaledRMSNorm(inside=1e-3)) is None
    assert offset_of(ScaledRMSNorm(factor=1.0001)) is None
    assert offset_of(nn.LayerNorm(12)) is None
    assert offset_of(nn.Linear(12, 12)) is None
    without = ScaledRMSNorm()
    del without.weight
    assert offset_of(without) is None


def test_a_norm_that_was_replaced_is_asked_for_its_own() -> None:
    """Twice fused is as once: what is tried is what its class computes."""
    norm = norms_of(tiny_model("llama"))[0]
    norm.forward = lambda x: 2 * x
    assert offset_of(norm) == 0.0
