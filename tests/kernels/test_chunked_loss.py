"""Chunked cross-entropy against its definition: exact in float64, within twice eager's own error in float32 and bf16."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from onlay.kernels import chunked_loss
from onlay.kernels.chunked_loss import linear_cross_entropy, reference

SHAPES = [(1, 1, 2), (1, 32, 272), (7, 5, 3), (64, 16, 1000), (129, 33, 513), (300, 64, 4099)]
"""(tokens N, width D, vocabulary V): one token, odd sizes, chunks that do not come out even."""
SMALL_CHUNK = 2**20
"""15 tokens and more: a CPU's product of three rows or fewer adds up another way, and errs four times as much by itself."""
Loss = Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]


def inputs(
    shape: tuple[int, int, int], dtype: torch.dtype, *, bias: bool = False, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    tokens, width, vocabulary = shape
    generator = torch.Generator().manual_seed(sum(shape))
    hidden = scale * torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64) * width**-0.5
    offset = torch.randn(vocabulary, generator=generator, dtype=torch.float64).to(dtype) if bias else None
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    return hidden.to(dtype), weight.to(dtype), offset, targets


def results(loss: Loss, given: tuple[Tensor, Tensor, Tensor | None, Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The loss and the gradient of the hidden states of 0.3 times it, computed in `dtype`, as float64."""
    hidden, weight, bias, targets = given
    leaf = hidden.to(dtype).requires_grad_()
    nats = loss(leaf, weight.to(dtype), None if bias is None else bias.to(dtype), targets)
    (grad,) = torch.autograd.grad(0.3 * nats, leaf)
    assert grad.dtype == dtype
    return [nats.detach().double(), grad.double()]


@pytest.fixture(params=[SMALL_CHUNK, chunked_loss.CHUNK_BYTES], ids=["chunks", "whole"])
def chunk_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", request.param)
    return int(request.param)


@pytest.mark.usefixtures("chunk_bytes")
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("shape", SHAPES)
def test_float64_is_the_definition(shape: tuple[int, int, int], bias: bool) -> None:
    given = inputs(shape, torch.float64, bias=bias)
    found, expected = (results(loss, given, torch.float64) for loss in (linear_cross_entropy, reference))
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-13 * theirs.norm()


@pytest.mark.usefixtures("chunk_bytes")
@pytest.mark.parametrize("scale", [1.0, 100.0], ids=["usual", "huge"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_errs_at_most_twice_as_much_as_eager(
    shape: tuple[int, int, int], dtype: torch.dtype, bias: bool, scale: float
) -> None:
    given = inputs(shape, dtype, bias=bias, scale=scale)
    exact = results(reference, given, torch.float64)
    eager, found = (results(loss, given, dtype) for loss in (reference, linear_cross_entropy))
    # Where eager happens to be exact: the loss is rounded to float32, the gradient to the dtype.
    for ours, theirs, true, rounded in zip(found, eager, exact, (torch.float32, dtype), strict=True):
        assert (ours - true).norm() <= 2 * (theirs - true).norm() + torch.finfo(rounded).eps * true.norm()


@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", 16 * 11 * 2)  # two tokens
    hidden, weight, offset, targets = inputs((5, 4, 11), torch.float64, bias=bias)
    for loss in (linear_cross_entropy, reference):
        assert torch.autograd.gradcheck(lambda h, run=loss: run(h, weight, offset, targets), hidden.requires_grad_())


def test_no_token_is_no_nats_and_can_be_differentiated() -> None:
    hidden, weight, _, targets = inputs((0, 8, 20), torch.float32)
    nats = linear_cross_entropy(hidden.requires_grad_(), weight, None, targets)
    nats.backward()
    assert float(nats.detach()) == 0.0
    assert hidden.grad is not None and hidden.grad.shape == (0, 8)


def test_logits_that_overflow_a_naive_softmax() -> None:
    hidden = torch.tensor([[1e4, -1e4]], requires_grad=True)
    weight = torch.eye(2)
    nats = linear_cross_entropy(hidden, weight, None, torch.tensor([1]))
    nats.backward()
    assert float(nats.detach()) == 2e4
    assert hidden.grad is not None and torch.equal(hidden.grad, torch.tensor([[1.0, -1.0]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_gradient_to_come_the_loss_is_the_same(dtype: torch.dtype) -> None:
    hidden, weight, _, targets = inputs((129, 33, 513), dtype)
    with_gradient = linear_cross_entropy(hidden.requires_grad_(), weight, None, targets)
    with torch.no_grad():
        without = linear_cross_entropy(hidden, weight, None, targets)
    assert without.grad_fn is None
    assert torch.equal(with_gradient.detach(), without)


@pytest.mark.parametrize("factor", [1 / 3, 1e-3])
def test_the_factor_of_the_loss_is_not_rounded_to_16_bit(factor: float) -> None:
    """As a bf16 number it would be off by up to 0.4 %, and all of the gradient with it."""
    hidden, weight, _, targets = inputs((40, 16, 300), torch.bfloat16)
    whole, part = (hidden.clone().requires_grad_() for _ in range(2))
    linear_cross_entropy(whole, weight, None, targets).backward()
    (linear_cross_entropy(part, weight, None, targets) * factor).backward()
    assert whole.grad is not None and part.grad is not None
    assert torch.equal(part.grad, (whole.grad.float() * factor).bfloat16())


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, in numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:  # type: ignore[type-arg]
        out = func(*args, **(kwargs or {}))  # type: ignore[operator]
        if isinstance(out, Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out


def test_logits_never_exist_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", SMALL_CHUNK)
    hidden, weight, _, targets = inputs((500, 16, 1000), torch.float32)
    assert weight.numel() <= SMALL_CHUNK // 8  # a logit and its log-softmax in float32
    for loss, bounded in ((linear_cross_entropy, True), (reference, False)):
        with Largest() as largest:
            loss(hidden.requires_grad_(), weight, None, targets).backward()
        assert (largest.numbers <= SMALL_CHUNK // 8) == bounded
