"""The frozen linear layer: the gradients of the definition, nothing kept but the way to rebuild, autocast as torch does it."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from onlay.kernels.frozen_linear import frozen_linear

OUTPUTS, INPUTS = 5, 7


class Stored:
    """A weight in float64 that counts how often it was rebuilt, and remembers what was handed out."""

    def __init__(self, seed: int = 0) -> None:
        self.exact = torch.randn(OUTPUTS, INPUTS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        self.dtypes: list[torch.dtype] = []
        self.handed_out: list[weakref.ref[Tensor]] = []

    def __call__(self, dtype: torch.dtype) -> Tensor:
        weight = self.exact.to(dtype, copy=True)
        self.dtypes.append(dtype)
        self.handed_out.append(weakref.ref(weight))
        return weight


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, INPUTS, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (2, 1, 4)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradcheck(shape: tuple[int, ...], with_bias: bool) -> None:
    stored = Stored()
    bias = torch.randn(OUTPUTS, dtype=torch.float64, requires_grad=True) if with_bias else None
    x = inputs(*shape)
    assert torch.allclose(
        frozen_linear(x, stored, bias),
        functional.linear(x, stored.exact, bias),
        rtol=0,
        atol=1e2 * torch.finfo(x.dtype).eps,
    )
    values = (x,) if bias is None else (x, bias)
    assert torch.autograd.gradcheck(lambda x, b=None: frozen_linear(x, stored, b), values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 0), (2, 9)], ids=str)
def test_every_dtype_is_as_torch_does_it(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    stored, bias = Stored(), torch.randn(OUTPUTS).to(dtype)
    x, twin = inputs(*shape, dtype=dtype), inputs(*shape, dtype=dtype)
    out = frozen_linear(x, stored, bias)
    expected = functional.linear(twin, stored.exact.to(dtype), bias)
    assert out.dtype == dtype
    assert torch.equal(out, expected)
    step = torch.randn(out.shape).to(dtype)
    out.backward(step)
    expected.backward(step)
    assert x.grad is not None
    assert twin.grad is not None
    assert torch.equal(x.grad, twin.grad)
    assert stored.dtypes == [dtype, dtype]


def test_no_weight_is_kept_between_forward_and_backward() -> None:
    stored = Stored()
    out = frozen_linear(inputs(4), stored, None)
    gc.collect()
    assert [weight() for weight in stored.handed_out] == [None]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        frozen_linear(inputs(4), stored, None)
    assert kept == []
    out.sum().backward()
    assert len(stored.dtypes) == 3


def test_an_input_without_gradient_needs_no_rebuilding() -> None:
    stored, bias = Stored(), torch.zeros(OUTPUTS, dtype=torch.float64, requires_grad=True)
    frozen_linear(inputs(4).detach(), stored, bias).sum().backward()
    assert len(stored.dtypes) == 1
    assert bias.grad is not None
    assert bias.grad.tolist() == [4.0] * OUTPUTS


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast_it_is_torch_linear(given: torch.dtype) -> None:
    stored, bias = Stored(), torch.randn(OUTPUTS)
    linear = nn.Linear(INPUTS, OUTPUTS)
    linear.requires_grad_(False)
    linear.weight.copy_(stored.exact)
    linear.bias.copy_(bias)
    x, twin = inputs(3, dtype=given), inputs(3, dtype=given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, expected = frozen_linear(x, stored, bias), linear(twin)
        assert out.dtype == expected.dtype == torch.bfloat16
        assert torch.equal(out, expected)
        out.float().square().sum().backward()
    expected.float().square().sum().backward()
    assert x.grad is not None
    assert twin.grad is not None
    assert x.grad.dtype == given
    assert torch.equal(x.grad, twin.grad)
    assert stored.dtypes == [torch.bfloat16] * 2


def test_float64_stays_float64_under_autocast() -> None:
    stored, x = Stored(), inputs(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(frozen_linear(x, stored, None), functional.linear(x, stored.exact))


def test_a_backward_pass_under_autocast_keeps_the_forwards_precision() -> None:
    stored, x, twin = Stored(), inputs(3, dtype=torch.float32), inputs(3, dtype=torch.float32)
    out, expected = frozen_linear(x, stored, None), functional.linear(twin, stored.exact.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out.sum().backward()
    expected.sum().backward()
    assert x.grad is not None
    assert twin.grad is not None
    assert torch.equal(x.grad, twin.grad)
