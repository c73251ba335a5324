"""A frozen linear layer with its adapter in one op: both forms against the definition in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from onlay.kernels.lora_linear import _Factored, _Folded, folds, lora_linear, reference

FORMS = (_Folded, _Factored)
SHAPES = [
    # tokens, inputs, outputs, rank
    (((7,)), 5, 9, 3),
    (((7,)), 9, 5, 1),
    ((2, 3), 16, 16, 4),
    ((2, 3, 4), 8, 3, 2),
    ((1,), 33, 17, 40),
    ((64,), 64, 48, 8),
    ((0,), 6, 4, 2),
    ((2, 0), 6, 4, 2),
]


@dataclass(frozen=True, slots=True)
class Case:
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scale: float
    grad: Tensor

    def to(self, dtype: torch.dtype) -> Case:
        tensors = (self.x, self.weight, self.bias, self.a, self.b)
        x, weight, bias, a, b = (
            None if t is None else t.detach().to(dtype).requires_grad_(t.requires_grad) for t in tensors
        )
        assert x is not None
        assert weight is not None
        assert a is not None
        assert b is not None
        return Case(x, weight, bias, a, b, self.scale, self.grad.to(dtype))


def case(
    tokens: tuple[int, ...],
    inputs: int,
    outputs: int,
    rank: int,
    *,
    bias: bool = True,
    seed: int = 0,
    scale: float = 0.7,
) -> Case:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    return Case(
        x=normal(*tokens, inputs).requires_grad_(True), weight=normal(outputs, inputs), bias=normal(outputs) if bias else None,
        a=normal(rank, inputs).requires_grad_(True), b=normal(outputs, rank).requires_grad_(True), scale=scale,
        grad=normal(*tokens, outputs),
    )  # fmt: skip


def run(form: type | None, c: Case) -> dict[str, Tensor]:
    """Output and gradients; None is the definition."""
    arguments = (c.x, c.weight, c.bias, c.a, c.b, c.scale)
    out = reference(*arguments) if form is None else form.apply(*arguments)  # type: ignore[attr-defined]
    x, a, b = torch.autograd.grad(out, (c.x, c.a, c.b), c.grad)
    return {"out": out.detach(), "x": x, "a": a, "b": b}


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> Iterator[tuple[str, float]]:
    for name, value in exact.items():
        assert found[name].shape == value.shape
        yield name, float((found[name].double() - value).norm())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_forms_are_the_definition_in_float64(
    form: type, shape: tuple[tuple[int, ...], int, int, int], bias: bool
) -> None:
    c = case(*shape, bias=bias)
    exact, found = run(None, c), run(form, c)
    terms = max(shape[1], shape[2], c.x[..., 0].numel()) * shape[3]
    for name, error in errors(found, exact):
        assert error <= 10 * terms * torch.finfo(torch.float64).eps * float(exact[name].norm()), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("shape", [((200,), 96, 80, 8), ((3, 50), 80, 160, 16)], ids=str)
def test_in_float32_the_error_is_at_most_twice_that_of_separate_layers(
    form: type, shape: tuple[tuple[int, ...], int, int, int], seed: int
) -> None:
    c = case(*shape, seed=seed)
    narrow = c.to(torch.float32)
    exact = run(None, narrow.to(torch.float64))
    eager, found = dict(errors(run(None, narrow), exact)), dict(errors(run(form, narrow), exact))
    for name, error in found.items():
        assert error <= 2 * eager[name], name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [1, 3])
def test_gradcheck(form: type, rank: int) -> None:
    c = case((2, 3), 5, 4, rank)

    def op(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        out: Tensor = form.apply(x, c.weight, c.bias, a, b, c.scale)  # type: ignore[attr-defined]
        return out

    assert torch.autograd.gradcheck(op, (c.x, c.a, c.b))


@pytest.mark.parametrize("form", FORMS)
def test_layouts_that_are_not_contiguous(form: type) -> None:
    c = case((6, 4), 5, 7, 2)
    exact = run(None, c)
    turned = Case(
        x=c.x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(True),
        weight=c.weight.t().contiguous().t(), bias=c.bias,
        a=c.a.detach().t().contiguous().t().requires_grad_(True), b=c.b.detach().t().contiguous().t().requires_grad_(True),
        scale=c.scale, grad=c.grad.transpose(0, 1).contiguous().transpose(0, 1),
    )  # fmt: skip
    assert not turned.x.is_contiguous()
    assert not turned.grad.is_contiguous()
    for name, error in errors(run(form, turned), exact):
        assert error <= 1000 * torch.finfo(torch.float64).eps * float(exact[name].norm()), name


@pytest.mark.parametrize("form", FORMS)
def test_an_input_without_gradient_gets_none(form: type) -> None:
    c = case((7,), 5, 9, 3)
    exact = run(None, c)
    out = form.apply(c.x.detach(), c.weight, c.bias, c.a, c.b, c.scale)  # type: ignore[attr-defined]
    a, b = torch.autograd.grad(out, (c.a, c.b), c.grad)
    assert torch.allclose(a, exact["a"])
    assert torch.allclose(b, exact["b"])


@pytest.mark.parametrize("form", FORMS)
def test_what_is_frozen_has_no_gradient_and_is_not_changed(form: type) -> None:
    c = case((7,), 5, 9, 3)
    before = [t.detach().clone() for t in (c.x, c.weight, c.a, c.b)]
    assert c.bias is not None
    c.weight.requires_grad_(True)
    out = form.apply(c.x, c.weight, c.bias, c.a, c.b, c.scale)  # type: ignore[attr-defined]
    out.backward(c.grad)
    assert c.weight.grad is None
    assert all(torch.equal(t.detach(), first) for t, first in zip((c.x, c.weight, c.a, c.b), before, strict=True))


def test_a_second_derivative_is_refused() -> None:
    c = case((7,), 5, 9, 3)
    out = lora_linear(c.x, c.weight, c.bias, c.a, c.b, c.scale)
    [grad] = torch.autograd.grad(out.square().sum(), c.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("outputs", "inputs", "rank"), [(32, 32, 1), (32, 32, 40), (4096, 4096, 16), (100, 50, 6), (100, 50, 7)]
)
def test_the_form_is_that_of_fewer_operations(outputs: int, inputs: int, rank: int) -> None:
    folded, factored = 3 * outputs * inputs, 2 * outputs * inputs + 5 * rank * (outputs + inputs)
    assert folds(outputs, inputs, rank=rank) == (folded <= factored)
    c = case((3,), inputs, outputs, rank)
    node = type(lora_linear(c.x, c.weight, c.bias, c.a, c.b, c.scale).grad_fn).__name__
    assert node == ("_FoldedBackward" if folded <= factored else "_FactoredBackward")
