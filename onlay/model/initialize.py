"""The first A and B of adapters that begin in the base's own weights: PiSSA and LoftQ.

Both take a matrix M (O, I) and begin with the A (R, I) and B (O, R) for which s B A is the best approximation of M of
rank R, s being alpha / rank:  M = U S V^T,  A = sqrt(S / s) V^T,  B = U sqrt(S / s).  They differ in what M is.

**PiSSA** (arXiv:2404.02948) takes M = W, so that training moves the largest directions of W itself.  The paper puts
W - s B0 A0 in the place of W.  Here the base stays as it is: the adapter has rank 2 R,

    y = x W^T + s x [A; A0]^T [B, -B0]^T  =  x (W - s B0 A0)^T + s x A^T B^T,

and its second half is held where it began.  That is the same function with the same gradients, and W - s B0 A0 is never
rounded to 16 bits.  With dropout both halves see the same input, so what is dropped is the change alone.  What is saved
is what PEFT calls a converted PiSSA adapter: any program that reads PEFT adapters uses it on the original base.

**LoftQ** (arXiv:2310.08659) takes M = W - Q(W), what NF4 has rounded away: the base begins nearer to W.  One iteration
of the paper's algorithm; more of them would quantize W - s B A instead of W, and the base would no longer be the NF4 form
of the weights that its name and digest stand for.

The SVD is Halko's randomized one (arXiv:0909.4061, algorithm 4.4) in float32 (float64 for float64 weights), on the
weight's device, one module at a time; its random matrix comes from the seed and the module's name, on the CPU, so every
rank and device draws the same.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from onlay.recipe import LoftqAdapter

if TYPE_CHECKING:
    from onlay.model.quantize import QuantizedLinear

OVERSAMPLING = 10
"""Columns of the random matrix beyond the rank (Halko, section 4.2: 5 to 10)."""
Factors = tuple[Tensor, Tensor]
"""A (k, I) and B (O, k); k is the rank, or the smaller side of the matrix where that is less."""
Held = Mapping[nn.Parameter, tuple[tuple[slice, ...], Tensor]]
"""The part of a trained parameter that is kept where it is, and its value there."""


def begin_factors(matrix: Tensor, *, rank: int, scale: float, iterations: int, seed: int, name: str) -> Factors:
    """A and B for which `scale * B @ A` is the best approximation of `matrix` (O, I) of this rank.

    `iterations` power iterations of the randomized SVD; 0 means the exact one.
    """
    exact = matrix.to(torch.float64 if matrix.dtype == torch.float64 else torch.float32)
    left, values, right = truncated_svd(exact, rank=rank, iterations=iterations, generator=_generator(seed, name))
    root = (values / scale).sqrt()
    return root[:, None] * right, left * root


def truncated_svd(
    matrix: Tensor, *, rank: int, iterations: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """U (O, k), S (k,) and V^T (k, I) of the k = min(rank, O, I) largest singular values of a matrix (O, I)."""
    smaller = min(matrix.shape)
    rank, width = min(rank, smaller), min(rank + OVERSAMPLING, smaller)
    if iterations == 0 or width == smaller:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank]
    draw = torch.randn(matrix.shape[1], width, generator=generator, dtype=matrix.dtype).to(matrix.device)
    basis = torch.linalg.qr(matrix @ draw).Q
    for _ in range(iterations):
        # Made orthogonal after every product: without that the small singular values are lost.
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.t() @ basis).Q).Q
    # matrix ~ basis basis^T matrix = basis r^T q^T: what is left to take apart is small and square.
    q, r = torch.linalg.qr(matrix.t() @ basis)
    left, values, right = torch.linalg.svd(r.t())
    return (basis @ left)[:, :rank], values[:rank], (right @ q.t())[:rank]


def _generator(seed: int, name: str) -> torch.Generator:
    """Of a module's own, so that its factors do not depend on which others there are."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)


# -------------------------------------------------------------------------------------------------------------- PiSSA


def put_pissa(a: nn.Parameter, b: nn.Parameter, factors: Factors) -> None:
    """[A0; A0] into a (2R, I) and [B0, -B0] into b (O, 2R): together they are nothing, the first half trains."""
    rank = a.shape[0] // 2
    with torch.no_grad():
        _put(a[:rank], b[:, :rank], factors)
        a[rank:] = a[:rank]
        b[:, rank:] = -b[:, :rank]


def held_halves(a: nn.Parameter, b: nn.Parameter) -> dict[nn.Parameter, tuple[tuple[slice, ...], Tensor]]:
    """The second halves, which stay where they are, and their values."""
    second = slice(a.shape[0] // 2, None)
    parts: dict[nn.Parameter, tuple[slice, ...]] = {a: (second, slice(None)), b: (slice(None), second)}
    return {parameter: (part, parameter.detach()[part].clone()) for parameter, part in parts.items()}


# -------------------------------------------------------------------------------------------------------------- LoftQ


def put_loftq(a: nn.Parameter, b: nn.Parameter, factors: Factors) -> None:
    """A into a (R, I) and B into b (O, R)."""
    with torch.no_grad():
        _put(a, b, factors)


class LoftqFactors:
    """Makes the factors while a base is quantized: hand it to `onlay.model.load.load_base` as `on_quantized`."""

    def __init__(self, section: LoftqAdapter, *, seed: int, wanted: Callable[[str], bool]) -> None:
        """`wanted` tells by a module's full name whether the adapter will sit on it."""
        self.factors: dict[str, Factors] = {}
        """By full module name, in the precision of the adapter."""
        self._section, self._seed, self._wanted = section, seed, wanted
        self._squares = {"weight": 0.0, "nf4": 0.0, "nf4_with_adapter": 0.0, "adapter": 0.0}

    def __call__(self, name: str, weight: Tensor, module: QuantizedLinear) -> None:
        """Takes note of one linear layer, whose 16-bit `weight` (O, I) is about to go."""
        if not self._wanted(name):
            return
        section = self._section
        exact = weight.detach().to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
        rest = exact - module.dequantize(exact.dtype)
        a, b = begin_factors(
            rest, rank=section.rank, scale=section.scale, iterations=section.svd_iterations, seed=self._seed, name=name
        )
        kept = exact.dtype if section.precision == "fp32" else torch.bfloat16
        a, b = a.to(kept), b.to(kept)
        update = section.scale * b.to(exact.dtype) @ a.to(exact.dtype)
        self.factors[name] = (a, b)
        for what, matrix in (
            ("weight", exact),
            ("nf4", rest),
            ("nf4_with_adapter", rest - update),
            ("adapter", update),
        ):
            self._squares[what] += float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2

    def errors(self) -> dict[str, Any]:
        """Distances from the 16-bit weights, Frobenius norms over all modules together, relative to the weights'.

        `nf4` and `nf4_with_adapter` are those of the base before and after; `adapter_on_16_bit` is what the same adapter
        would do to the base that was never quantized: it belongs to the quantized one alone.
        """
        total = self._squares["weight"]
        relative = {what: math.sqrt(square / total) if total else 0.0 for what, square in self._squares.items()}
        return {
            "modules": len(self.factors),
            "nf4": relative["nf4"],
            "nf4_with_adapter": relative["nf4_with_adapter"],
            "adapter_on_16_bit": relative["adapter"],
        }


def _put(a: Tensor, b: Tensor, factors: Factors) -> None:
    """Where the rank exceeds the matrix's own, what is left begins as usual: A as it was drawn, B zero."""
    first_a, first_b = factors
    own = first_a.shape[0]
    b.zero_()
    a[:own] = first_a
    b[:, :own] = first_b
