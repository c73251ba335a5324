"""How fast kernels are held against their references: on a CPU in Triton's interpreter, on a GPU as they are.

The interpreter runs where TRITON_INTERPRET=1 was set before Triton was imported; test_interpreter.py runs these tests so.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from onlay.kernels.updates import Update

INTERPRETED = find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available()

PLACES = [
    # The interpreter multiplies the bits of bf16 as if they were numbers.
    *(("cpu", dtype) for dtype in (torch.float32, torch.float16) if INTERPRETED),
    *(
        pytest.param("cuda", dtype, marks=pytest.mark.gpu)
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
        if CUDA
    ),
]
"""Where neither is, these tests are skipped: pytest says that their parameter set is empty."""
in_each_place = pytest.mark.parametrize(("device", "dtype"), PLACES)


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64, device: str = "cpu", scale: float = 1.0) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (scale * drawn).to(dtype).to(device)


def updates(
    rows: int, ranks: tuple[int, ...], widths: tuple[int, ...], *, seed: int, dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> tuple[Update | None, ...]:  # fmt: skip
    """One for each rank, none for 0; the hiddens are parts of one tensor, as they are in use."""
    hidden = draw(rows, sum(ranks) + 3, seed=seed, dtype=dtype, device=device)
    found: list[Update | None] = []
    start = 1
    for i, (rank, width) in enumerate(zip(ranks, widths, strict=True)):
        b = draw(rank, width, seed=seed + 1 + i, dtype=dtype, device=device, scale=0.3)
        found.append(Update(hidden=hidden[:, start : start + rank], b=b) if rank else None)
        start += rank
    return tuple(found)


def widened(value: Any) -> Any:
    """The same numbers in float64: of a tensor, of an update, of several."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Update):
        return Update(hidden=value.hidden.double(), b=value.b.double())
    if isinstance(value, tuple):
        return tuple(widened(item) for item in value)
    return value


def assert_near(ours: Tensor, eager: Tensor, exact: Tensor) -> None:
    """At most twice the reference's own error, and the half of a last place that rounding a number to its dtype takes."""
    assert ours.dtype == eager.dtype and ours.shape == eager.shape == exact.shape
    error, own = ((found.double() - exact).norm() for found in (ours, eager))
    assert error <= 2 * own + torch.finfo(ours.dtype).eps / 2 * exact.norm(), (float(error), float(own))


def assert_exact(found: Tensor, expected: Tensor) -> None:
    """Equal but for the rounding of float64."""
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-10)


@pytest.fixture
def fp8_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter of Triton 3.6 loses the carry where a rounded mantissa becomes 2: it rounds to FP8 as torch does instead."""
    if not INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(given: Any, from_: Any, to: Any, mode: Any) -> Any:
        if (from_, to) != (tl.float32, tl.float8e4nv):
            return convert(given, from_, to, mode)
        exact = torch.from_numpy(np.ascontiguousarray(given).view(np.float32))
        return exact.to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
