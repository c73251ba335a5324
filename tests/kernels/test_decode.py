"""Kernels of a decoding step against their definition: in float64 by hand, and fast against reference within rounding.

Without a GPU the fast kernels run where Triton is installed and TRITON_INTERPRET=1 is set.
"""

from __future__ import annotations

import math
import os
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from onlay.kernels import decode
from onlay.kernels.updates import HeadNorm, Update

INTERPRETED = find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.bfloat16, torch.float32] if torch.cuda.is_available() else [torch.float32]
"""The interpreter multiplies the bits of bf16 as if they were numbers."""
fast = pytest.mark.skipif(
    not (torch.cuda.is_available() or INTERPRETED), reason="needs a GPU, or Triton with TRITON_INTERPRET=1"
)


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (scale * drawn).to(dtype).to(DEVICE)


def step(
    rows: int, heads: int, groups: int, width: int, ranks: tuple[int, int, int], *, norms: bool, dtype: torch.dtype
):  # type: ignore[no-untyped-def]
    """Arguments of rotate_and_store; the hiddens are parts of one tensor, as they are in use."""
    sizes = (heads * width, groups * width, groups * width)
    hidden = draw(rows, sum(ranks), seed=1, dtype=dtype)
    updates, start = [], 0
    for i, (rank, size) in enumerate(zip(ranks, sizes, strict=True)):
        part = hidden[:, start : start + rank]
        updates.append(Update(hidden=part, b=draw(rank, size, seed=10 + i, dtype=dtype, scale=0.3)) if rank else None)
        start += rank
    angle = draw(rows, width // 2, seed=2)
    angle = torch.cat([angle, angle], -1)
    return {
        "q": draw(rows, sizes[0], seed=3, dtype=dtype), "k": draw(rows, sizes[1], seed=4, dtype=dtype),
        "v": draw(rows, sizes[2], seed=5, dtype=dtype), "cos": angle.cos().to(dtype), "sin": angle.sin().to(dtype),
        "column": torch.tensor([3], device=DEVICE), "updates": tuple(updates),
        "norms": (
            HeadNorm(weight=draw(width, seed=6, dtype=dtype), eps=1e-6),
            HeadNorm(weight=draw(width, seed=7, dtype=dtype), eps=1e-6),
        ) if norms else None,
    }  # fmt: skip


def caches(rows: int, groups: int, width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: draw(rows, groups, 5, width, seed=seed, dtype=dtype) for name, seed in (("keys", 8), ("values", 9))}


def test_the_reference_is_the_definition() -> None:
    """Row by row and head by head, with numbers turned in the plane of (x_i, x_{i + D/2})."""
    rows, heads, groups, width = 3, 4, 2, 6
    given = step(rows, heads, groups, width, (2, 3, 1), norms=True, dtype=torch.float64)
    stored = caches(rows, groups, width, torch.float64)
    before = {name: tensor.clone() for name, tensor in stored.items()}
    found = decode.reference_rotate_and_store(**given, **stored)
    angle = torch.atan2(given["sin"], given["cos"])
    for i, (name, count) in enumerate((("q", heads), ("k", groups), ("v", groups))):
        update = given["updates"][i]
        whole = given[name] + update.hidden @ update.b
        for row in range(rows):
            for head in range(count):
                x = whole[row, head * width : (head + 1) * width].clone()
                if i < 2:
                    norm = given["norms"][i]
                    x = x / math.sqrt(float((x * x).mean()) + norm.eps) * norm.weight
                    turned = x.clone()
                    for j in range(width // 2):
                        a, half = float(angle[row, j]), width // 2
                        turned[j] = x[j] * math.cos(a) - x[j + half] * math.sin(a)
                        turned[j + half] = x[j + half] * math.cos(a) + x[j] * math.sin(a)
                    x = turned
                got = found[row, head] if i == 0 else stored["keys" if i == 1 else "values"][row, head, 3]
                assert torch.allclose(got, x, rtol=1e-12, atol=1e-12), (name, row, head)
    for name, tensor in stored.items():
        others = [0, 1, 2, 4]
        assert torch.equal(tensor[:, :, others], before[name][:, :, others]), "only the column is written"


def test_the_swiglu_reference_is_the_definition() -> None:
    gate, up = draw(3, 5, seed=0), draw(3, 5, seed=1)
    update = Update(hidden=draw(3, 2, seed=2), b=draw(2, 5, seed=3))
    g = gate + update.hidden @ update.b
    assert torch.allclose(
        decode.reference_swiglu(gate, up, updates=(update, None)), g / (1 + torch.exp(-g)) * up, rtol=1e-12
    )


def far(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def widened(given: dict[str, object]) -> dict[str, object]:
    """The same numbers in float64."""

    def wide(value: object) -> object:
        if isinstance(value, Tensor):
            return value.double() if value.is_floating_point() else value
        if isinstance(value, Update):
            return Update(hidden=value.hidden.double(), b=value.b.double())
        if isinstance(value, HeadNorm):
            return HeadNorm(weight=value.weight.double(), eps=value.eps)
        return tuple(wide(item) for item in value) if isinstance(value, tuple) else value

    return {name: wide(value) for name, value in given.items()}


@fast
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(
    ("rows", "heads", "groups", "width", "ranks"),
    [
        (128, 4, 2, 64, (128, 128, 128)),
        (1, 2, 1, 32, (1, 0, 3)),
        (70, 3, 3, 128, (0, 0, 0)),
        (17, 4, 1, 32, (24, 8, 0)),
    ],
)
def test_the_rotation_kernel_is_within_the_rounding_of_the_reference(
    rows: int, heads: int, groups: int, width: int, ranks: tuple[int, int, int], norms: bool, dtype: torch.dtype
) -> None:
    from onlay.kernels.decode_triton import rotate_and_store

    given = step(rows, heads, groups, width, ranks, norms=norms, dtype=dtype)
    results = []
    for function, values in (
        (rotate_and_store, given), (decode.reference_rotate_and_store, given), (decode.reference_rotate_and_store, widened(given)),
    ):  # fmt: skip
        stored = caches(rows, groups, width, values["q"].dtype)  # type: ignore[union-attr]
        out = function(**values, **stored)  # type: ignore[operator]
        results.append((out, stored["keys"][:, :, 3], stored["values"][:, :, 3], stored["keys"][:, :, [0, 1, 2, 4]]))
    fastest, eager, exact = results
    for ours, theirs, truth in zip(fastest[:3], eager[:3], exact[:3], strict=True):
        assert far(ours, truth) <= max(2 * far(theirs, truth), torch.finfo(dtype).eps / 8)
    assert torch.equal(fastest[3], eager[3])


@fast
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width", "ranks"), [(128, 192, (128, 128)), (1, 40, (3, 0)), (65, 100, (0, 0))])
def test_the_swiglu_kernel_is_within_the_rounding_of_the_reference(
    rows: int, width: int, ranks: tuple[int, int], dtype: torch.dtype
) -> None:
    from onlay.kernels.decode_triton import swiglu

    gate, up = draw(rows, width, seed=0, dtype=dtype), draw(rows, width, seed=1, dtype=dtype)
    hidden = draw(rows, sum(ranks), seed=2, dtype=dtype)
    updates = (
        Update(hidden=hidden[:, : ranks[0]], b=draw(ranks[0], width, seed=3, dtype=dtype)) if ranks[0] else None,
        Update(hidden=hidden[:, ranks[0] :], b=draw(ranks[1], width, seed=4, dtype=dtype)) if ranks[1] else None,
    )
    wide = widened({"gate": gate, "up": up, "updates": updates})
    exact = decode.reference_swiglu(**wide)  # type: ignore[arg-type]
    eager = decode.reference_swiglu(gate, up, updates=updates)
    assert far(swiglu(gate, up, updates=updates), exact) <= max(2 * far(eager, exact), torch.finfo(dtype).eps / 8)


@fast
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width", "ranks"), [(128, 192, 128), (1, 40, 3), (65, 100, 70)])
def test_the_residual_kernel_is_within_the_rounding_of_the_reference(
    rows: int, width: int, ranks: int, dtype: torch.dtype
) -> None:
    from onlay.kernels.decode_triton import add_residual

    x, y = draw(rows, width, seed=0, dtype=dtype), draw(rows, width, seed=1, dtype=dtype)
    update = Update(hidden=draw(rows, ranks, seed=2, dtype=dtype), b=draw(ranks, width, seed=3, dtype=dtype))
    exact = x.double() + y.double() + update.hidden.double() @ update.b.double()
    eager = x + torch.addmm(y, update.hidden, update.b)
    assert far(add_residual(x, y, update=update), exact) <= max(2 * far(eager, exact), torch.finfo(dtype).eps / 8)


@pytest.mark.parametrize(
    ("width", "expected"), [(128, True), (64, True), (32, True), (16, False), (96, False), (65, False)]
)
def test_which_heads_fit(width: int, expected: bool) -> None:
    assert decode.fits(width) is expected
