"""Chunked cross-entropy on a GPU: at most twice eager's error in the same precision, and memory bounded by the chunk.

Run by hand where there is one: pytest tests/kernels/test_chunked_loss_gpu.py
"""

from __future__ import annotations

import pytest
import torch

from onlay.kernels.chunked_loss import CHUNK_BYTES, linear_cross_entropy, reference
from tests.kernels.test_chunked_loss import inputs, results

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 64, 1000), (77, 33, 4099), (2000, 256, 32003)])
def test_it_errs_at_most_twice_as_much_as_eager(shape: tuple[int, int, int], dtype: torch.dtype, scale: float) -> None:
    hidden, weight, _, targets = inputs(shape, dtype, scale=scale)
    given = hidden.cuda(), weight.cuda(), None, targets.cuda()
    exact = results(reference, given, torch.float64)
    eager, found = (results(loss, given, dtype) for loss in (reference, linear_cross_entropy))
    for ours, theirs, true, rounded in zip(found, eager, exact, (torch.float32, dtype), strict=True):
        assert (ours - true).norm() <= 2 * (theirs - true).norm() + torch.finfo(rounded).eps * true.norm()


def test_memory_is_that_of_a_few_chunks() -> None:
    tokens, vocabulary = 4096, 128256
    hidden = torch.randn(tokens, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocabulary, 64, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(vocabulary, (tokens,), device="cuda")
    peaks = {}
    for loss in (linear_cross_entropy, reference):
        hidden.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss(hidden, weight, None, targets).backward()
        peaks[loss] = torch.cuda.max_memory_allocated() - before
    # The logits of a chunk, and 32 MiB that cuBLAS works in.
    assert peaks[linear_cross_entropy] < 1.2 * CHUNK_BYTES
    assert peaks[reference] > tokens * vocabulary * 4
