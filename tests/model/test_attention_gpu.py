"""Packed attention on a GPU: at most twice the error of eager attention in the same precision, forward and backward.

Run by hand where there is one: pytest tests/model/test_attention_gpu.py
"""

from __future__ import annotations

from itertools import accumulate
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from onlay.model.adapter import attach
from onlay.model.attention import PACKED_ATTENTION, choose_layout, packed_attention, use_attention
from onlay.recipe import LoraAdapter
from tests.builders import AllFloat64, random_examples, relative_error, shake, step_gradient, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = torch.device("cuda")


def eager_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], *, window: int | None
) -> Tensor:
    """(1, H, T, D), (1, G, T, D) twice -> (1, T, H, D) in the dtype given, as transformers' eager attention computes it:
    products in that dtype, softmax in float32 (float64 for float64), one example at a time."""
    groups = query.shape[1] // key.shape[1]
    out = []
    for q, k, v in zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True):
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        n = q.shape[2]
        distance = torch.arange(n, device=q.device)[:, None] - torch.arange(n, device=q.device)[None]
        hidden = (distance < 0) | (distance >= (window or n))
        scores = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).masked_fill(hidden, torch.finfo(q.dtype).min)
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        out.append((functional.softmax(scores, dim=-1, dtype=wide).to(q.dtype) @ v).transpose(1, 2))
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 1, 16, 100])
@pytest.mark.parametrize(("heads", "groups", "head_dim"), [(4, 4, 64), (8, 2, 128), (6, 1, 64), (2, 2, 256)])
@pytest.mark.parametrize("lengths", [(1,), (1, 1, 1), (37, 1, 129, 64), (513, 3), (255, 257)])
def test_packed_attention_errs_at_most_twice_as_much_as_eager(
    lengths: tuple[int, ...], heads: int, groups: int, head_dim: int, window: int | None, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(sum(lengths) + heads)

    def draw(count: int) -> Tensor:
        return torch.randn(1, count, sum(lengths), head_dim, generator=generator).to(DEVICE, dtype)

    states = [draw(heads), draw(groups), draw(groups)]
    weight = torch.randn(1, sum(lengths), heads, head_dim, generator=generator).to(DEVICE, dtype)
    borders = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=DEVICE)

    def packed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        module = cast(nn.Module, SimpleNamespace(is_causal=True))
        return packed_attention(
            module, query, key, value, None, sliding_window=window, cu_seq_lens_q=borders, max_length_q=max(lengths)
        )[0]

    def results(function: Any, wanted: torch.dtype) -> list[Tensor]:
        inputs = [state.detach().to(wanted).requires_grad_() for state in states]
        out = function(*inputs)
        out.backward(weight.to(wanted))
        return [out.detach(), *(cast(Tensor, state.grad) for state in inputs)]

    def eager(*inputs: Tensor) -> Tensor:
        return eager_attention(*inputs, lengths, window=window)

    exact, usual, found = results(eager, torch.float64), results(eager, dtype), results(packed, dtype)
    # An example of one token, or a window of one, has a gradient of exactly zero in query and key; eager has it too,
    # and the kernel the difference of two float32 dot products of head_dim numbers, each off by head_dim roundings at most.
    floor = head_dim * torch.finfo(torch.float32).eps * float(sum(value.norm() for value in exact))
    for name, x, e, f in zip(("output", "query", "key", "value"), exact, usual, found, strict=True):
        assert f.shape == x.shape
        assert float((f - x).norm()) <= 2 * float((e - x).norm()) + floor, name


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4}], ids=["grouped", "ungrouped"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_packed_step_errs_at_most_twice_as_much_as_a_padded_one(name: str, changes: dict[str, int]) -> None:
    examples = random_examples(16, least=1 + 1, most=300)
    sizes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "initializer_range": 0.05, **changes}
    base = tiny_model(name, **sizes).to(torch.bfloat16).to(DEVICE)  # type: ignore[arg-type]
    adapted, _ = attach(base, LoraAdapter(rank=8), seed=0)
    shake(adapted, scale=0.05)
    with AllFloat64():
        wide = tiny_model(name, dtype=torch.float64, **sizes).to(torch.bfloat16).to(DEVICE, torch.float64)  # type: ignore[call-overload]
        exact_model, _ = attach(wide, LoraAdapter(rank=8), seed=0)
        shake(exact_model, scale=0.05)
        with torch.no_grad():
            for ours, exact in zip(adapted.parameters(), exact_model.parameters(), strict=True):
                exact.copy_(ours)
        layout = choose_layout(wide, packing="off", device=DEVICE, compute_dtype=torch.float64)
        expected = step_gradient(exact_model, layout, examples, budget_tokens=4096, compute_dtype=torch.float64)

    def error(packing: str, budget_tokens: int) -> float:
        use_attention(base, "sdpa")
        layout = choose_layout(base, packing=packing, device=DEVICE, compute_dtype=torch.bfloat16)
        assert (layout.attention == PACKED_ATTENTION) == layout.packed == (packing == "auto"), layout.reason
        found = step_gradient(adapted, layout, examples, budget_tokens=budget_tokens, compute_dtype=torch.bfloat16)
        return relative_error(found.gradients, expected.gradients)

    padded = error("off", 4096)
    assert padded < 0.1
    for budget_tokens in (4096, 1024, 300):
        assert error("auto", budget_tokens) <= 2 * padded
