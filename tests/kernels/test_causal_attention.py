"""Causal attention of packed rows against a softmax over a dense matrix of scores, and the GPU's kernels against both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from onlay.kernels.causal_attention import Examples, attend, attend_backward, choose, reference
from tests.kernels.compare import assert_exact, assert_near, draw

SCALE = 0.3
LENGTHS = {"packed": (5, 1, 9), "one": (12,), "equal": (4, 4, 4), "with empty ones": (0, 3, 0, 2)}


def examples_of(lengths: tuple[int, ...], device: str = "cpu") -> Examples:
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
    equal = lengths[0] if len(set(lengths)) == 1 and lengths[0] else None
    return Examples(borders=borders, longest=max(lengths), equal=equal)


def dense(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], *, window: int | None) -> Tensor:
    """(T, H, D), with one matrix of scores over all tokens of all examples."""
    times = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
    example = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(q.device)
    place = torch.arange(len(q), device=q.device)
    seen = (example[:, None] == example) & (place[:, None] >= place)
    if window is not None:
        seen &= place > place[:, None] - window
    scores = torch.einsum("thd,shd->hts", q, k) * SCALE
    return torch.einsum("hts,shd->thd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def drawn(lengths: tuple[int, ...], *, heads: int, groups: int, width: int = 6, **where: Any) -> list[Tensor]:
    """q, k, v and a gradient of the result."""
    count = sum(lengths)
    return [draw(count, n, width, seed=seed, **where) for seed, n in enumerate((heads, groups, groups, heads))]


def both_ways(lengths: tuple[int, ...], tensors: list[Tensor], *, window: int | None) -> list[Tensor]:
    """o, dq, dk and dv, of the ops."""
    *inputs, grad = tensors
    examples = examples_of(lengths, str(grad.device))
    attended = attend(*inputs, examples, scale=SCALE, window=window)
    return [attended.o, *attend_backward(grad, *inputs, attended, examples, scale=SCALE, window=window)]


def dense_ways(lengths: tuple[int, ...], tensors: list[Tensor], *, window: int | None) -> list[Tensor]:
    *inputs, grad = (tensor.double() for tensor in tensors)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    o = dense(*leaves, lengths, window=window)
    return [o.detach(), *torch.autograd.grad(o, leaves, grad)]


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_it_is_a_softmax_over_what_a_token_sees(
    lengths: tuple[int, ...], heads: int, groups: int, window: int | None
) -> None:
    tensors = drawn(lengths, heads=heads, groups=groups)
    found, expected = (way(lengths, tensors, window=window) for way in (both_ways, dense_ways))
    for one, other in zip(found, expected, strict=True):
        assert_exact(one, other)


@pytest.mark.parametrize(("width", "way"), [(6, "blocks"), (128, "host")])
def test_examples_of_one_length_have_kernels_on_a_cpu(width: int, way: str) -> None:
    """In float64 too: by definition only what they do not know, windows and examples of many lengths."""
    tensors = drawn((16, 16), heads=4, groups=2, width=width)
    assert choose(tensors[0], examples_of((16, 16)), window=None, groups=tensors[1].shape[1]) == way
    for lengths, window in (((16, 16), 3), ((20, 12), None)):
        assert choose(tensors[0], examples_of(lengths), window=window, groups=tensors[1].shape[1]) == "reference"
    assert choose(tensors[0].bfloat16(), examples_of((16, 16)), window=None, groups=tensors[1].shape[1]) == "reference"
    found, expected = (run((16, 16), tensors, window=None) for run in (both_ways, dense_ways))
    for one, other in zip(found, expected, strict=True):
        assert_exact(one, other)


def test_gradients_are_those_of_small_steps() -> None:
    inputs = [tensor.requires_grad_() for tensor in drawn((3, 2), heads=2, groups=1, width=2)[:3]]
    assert torch.autograd.gradcheck(
        lambda *given: reference(*given, examples_of((3, 2)), scale=SCALE, window=2), inputs
    )


def test_no_tokens_are_no_result() -> None:
    found = both_ways((0,), drawn((0,), heads=4, groups=2), window=None)
    assert [tensor.shape for tensor in found] == [(0, 4, 6), (0, 4, 6), (0, 2, 6), (0, 2, 6)]


def test_the_first_token_of_an_example_sees_itself_alone() -> None:
    q, k, v, _ = drawn((5, 4), heads=2, groups=2)
    o = attend(q, k, v, examples_of((5, 4)), scale=SCALE).o
    for place in (0, 5):
        assert_exact(o[place], v[place])


WAYS = {
    "all equally long": ((128, 128), 64, None, "cudnn"),
    "of any length": ((5, 200, 51), 128, None, "flash"),
    "in a window": ((128, 128), 64, 40, "flash"),
    "wide heads": ((100, 100), 256, None, "flash"),
    "heads that no kernel takes": ((30, 30), 12, None, "reference"),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("lengths", "width", "window", "way"), WAYS.values(), ids=WAYS.keys())
def test_the_kernels_are_as_near_to_float64_as_the_definition(
    lengths: tuple[int, ...],
    width: int,
    window: int | None,
    way: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensors = drawn(lengths, heads=4, groups=2, width=width, dtype=dtype, device="cuda")
    assert choose(tensors[0], examples_of(lengths, "cuda"), window=window, groups=tensors[1].shape[1]) == way
    exact = dense_ways(lengths, tensors, window=window)
    ours = both_ways(lengths, tensors, window=window)
    monkeypatch.setattr("onlay.kernels.causal_attention.choose", lambda *_, **__: "reference")
    eager = both_ways(lengths, tensors, window=window)
    for one, plain, truth in zip(ours, eager, exact, strict=True):
        assert_near(one, plain, truth)


@pytest.mark.gpu
def test_in_float32_a_gpu_has_the_definition_too() -> None:
    q = draw(8, 2, 64, seed=0, dtype=torch.float32, device="cuda")
    assert choose(q, examples_of((8,), "cuda"), window=None, groups=1) == "reference"
