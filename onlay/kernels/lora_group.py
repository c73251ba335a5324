"""Frozen linear layers that share an input, and their LoRA adapters, as one product each; and the way back.

What and why.  q, k and v read the same rows, as do gate and up.  Their frozen weights are one product, their first factors A
stand below one another in another, and what each adapter adds to its outputs is left to the kernel that reads the outputs next,
which has them in registers anyway (onlay/kernels/updates.py):

    forward     y = x W^T,  h = x (s A)^T;               the reader adds h_j B_j^T to the columns of layer j
    backward    g_j = dy_j B_j;   dB_j = dy_j^T h_j;   dA = s g^T x;   dx = dy W + g (s A),  the last part again for the reader

Layout.  x (T, I), W (sum O, I), A of all adapters (sum R, I), B_j (O_j, R_j), h and g (T, sum R).
Precision.  Factors are rounded to the dtype of x for each use, s A after its product; dA and dB accumulate in float32 and stay there where the
factors are float32.
What the frozen base lets us skip.  The gradient of W, the largest product of the backward.
On a CPU, where a product with a narrow result runs at a third of the speed of a wide one, adapters of small layers are folded into the weight
instead, which is exact too:   W' = W + s B A;   dW' = dy^T x,  dA = s B^T dW',  dB = s dW' A^T;   dx = dy W'   (`folds` says where).
Kept for the backward.  x and h, by whoever calls.
Dropout drops the input of all adapters of a group with one mask, which is drawn again from its seed (onlay/kernels/residual.py); PEFT draws one for each layer.
Sources.  LoRA (arXiv:2106.09685); one node for layers that share an input is Unsloth's idea (fast_lora.py, read, not copied).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from onlay.kernels.fp8 import quantize_rows
from onlay.kernels.fp8_rows import Fp8Rows
from onlay.kernels.frozen import Frozen, Stored
from onlay.kernels.residual import add_dropped, drop_rows
from onlay.kernels.updates import Update

LARGEST_SEED = 2**31 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """What does not change from step to step."""

    frozen: Frozen
    sizes: tuple[int, ...]
    """Outputs of each layer; their sum is frozen.rows."""
    ranks: tuple[int, ...]
    """Of each layer's adapter; 0 where it has none."""
    scales: tuple[float, ...]
    """alpha / rank, or what the method makes of it; of adapters only."""
    dropout: float = 0.0
    trained_bias: bool = False
    """Biases train: then they are no part of `frozen`, and the last of the parameters."""

    @property
    def count(self) -> int:
        """Parameters that a node is given for this group: A of each adapter, B of each, and the joined bias."""
        return 2 * len(self.scales) + self.trained_bias


@dataclass(slots=True)
class Factors:
    """A group's adapters, rounded for one use."""

    group: Group
    parameters: Sequence[Tensor]
    a: Tensor | None = None
    """(sum R, I): s A of all adapters."""
    b: list[Tensor] = field(default_factory=list)
    """(O_j, R_j) of each adapter."""
    folded: Tensor | None = None
    """(sum O, I): the weight with the adapters in it; then there is neither a nor b."""

    @classmethod
    def of(cls, group: Group, parameters: Sequence[Tensor], dtype: torch.dtype) -> Factors:
        count = len(group.scales)
        if not count:
            return cls(group, parameters)
        firsts, seconds = parameters[:count], parameters[count : 2 * count]
        if isinstance(group.frozen, Stored) and folds(group, device=firsts[0].device, dtype=dtype):
            factors = cls(group, parameters, folded=group.frozen.weight.clone())
            for number, rows, _ in factors.parts():
                assert factors.folded is not None
                first, second = firsts[number].to(dtype), seconds[number].to(dtype)
                factors.folded[rows].addmm_(second, first, alpha=group.scales[number])
            return factors
        a = firsts[0].new_empty(sum(len(first) for first in firsts), firsts[0].shape[1], dtype=dtype)
        for part, first, scale in zip(a.split([len(f) for f in firsts]), firsts, group.scales, strict=True):
            torch.mul(first, scale, out=part)
        return cls(group, parameters, a, [second.to(dtype) for second in seconds])

    @property
    def bias(self) -> Tensor | None:
        return self.parameters[-1] if self.group.trained_bias else None

    def parts(self) -> Iterator[tuple[int, slice, slice]]:
        """Of each adapter: its number, its columns of y, and its columns of h."""
        number = column = hidden = 0
        for size, rank in zip(self.group.sizes, self.group.ranks, strict=True):
            if rank:
                yield number, slice(column, column + size), slice(hidden, hidden + rank)
                number, hidden = number + 1, hidden + rank
            column += size

    def hidden_of(self, x: Tensor, *, seed: int) -> Tensor | None:
        """h (T, sum R)."""
        return None if self.a is None else _narrow(dropped(x, self.group, seed=seed), self.a.t())

    def updates(self, hidden: Tensor | None, pieces: Sequence[int] | None = None) -> tuple[Update | None, ...]:
        """What is to be added to each piece of y's columns: to each layer's own, or to `pieces` of which each lies within one layer."""
        found: list[Update | None] = []
        start = 0
        for size in pieces or self.group.sizes:
            update = None
            for number, columns, inner in self.parts():
                if hidden is not None and columns.start <= start < columns.stop:
                    rows = self.b[number][start - columns.start : start - columns.start + size]
                    update = Update(hidden=hidden[:, inner], b=rows.t().contiguous())
            found.append(update)
            start += size
        return tuple(found)

    def product(self, x: Tensor | Fp8Rows) -> Tensor:
        """y (T, sum O), without the adapters."""
        frozen = self.group.frozen
        if self.folded is not None and isinstance(frozen, Stored) and isinstance(x, Tensor):
            y = functional.linear(x, self.folded, frozen.bias)
        else:
            y = frozen.product(x)
        return y if self.bias is None else y.add_(self.bias)

    # ------------------------------------------------------------------------------------------------------ the way back

    def hidden_grad(self, dy: Tensor) -> Tensor | None:
        """g (T, sum R) of dy (T, sum O)."""
        if self.a is None:
            return None
        if dy.device.type == "cpu":
            return torch.cat([_narrow(dy[:, columns], self.b[number]) for number, columns, _ in self.parts()], 1)
        g = dy.new_empty(len(dy), len(self.a))
        for number, columns, inner in self.parts():
            torch.mm(dy[:, columns], self.b[number], out=g[:, inner])
        return g

    def input_update(self, g: Tensor | None) -> Update | None:
        """What is to be added to dx, where there is no dropout."""
        return None if g is None or self.a is None else Update(hidden=g, b=self.a)

    def back_product(self, dy: Tensor) -> Tensor:
        """dy W (T, I)."""
        frozen = self.group.frozen
        if self.folded is not None:
            return dy @ self.folded
        return frozen.back_product(quantize_rows(dy, columns=frozen.grad_columns) if frozen.fp8 else dy)

    def add_input_grad(self, dx: Tensor, g: Tensor | None, *, seed: int) -> Tensor:
        """dx + g (s A), dropped as the input was, in place."""
        if g is None or self.a is None:
            return dx
        if self.group.dropout:
            return add_dropped(dx, g @ self.a, seed=seed, p=self.group.dropout)
        return dx.addmm_(g, self.a)

    def gradients(
        self, x: Tensor, dy: Tensor, hidden: Tensor | None, g: Tensor | None, *, columns: Tensor | None = None, seed: int
    ) -> list[Tensor]:  # fmt: skip
        """Of the parameters, in their order.  x (T, I) is the group's input, or what it is once multiplied by `columns` (I,)."""
        found: list[Tensor] = []
        if self.folded is not None:
            found += self._unfolded(dy.t() @ x)
        elif hidden is not None and g is not None:
            d_a = _wide_mm(g.t(), dropped(x, self.group, seed=seed), self.parameters[0].dtype)
            if columns is not None:
                d_a *= columns
            ranks = [rank for rank in self.group.ranks if rank]
            for part, scale in zip(d_a.split(ranks), self.group.scales, strict=True):
                found.append(part if scale == 1.0 else part.mul_(scale))
            found += [
                _wide_mm(dy[:, columns_].t(), hidden[:, inner], self.parameters[len(ranks) + number].dtype)
                for number, columns_, inner in self.parts()
            ]
        if self.bias is not None:
            found.append(dy.sum(0, dtype=torch.float32 if dy.dtype != torch.float64 else None).to(self.bias.dtype))
        return found

    def _unfolded(self, d_folded: Tensor) -> list[Tensor]:
        """dA of each adapter and dB of each, of the gradient (sum O, I) of the folded weight."""
        count, found_a, found_b = len(self.group.scales), [], []
        for number, columns, _ in self.parts():
            first, second, scale = self.parameters[number], self.parameters[count + number], self.group.scales[number]
            d = d_folded[columns]
            found_a.append((scale * (second.t().to(d.dtype) @ d)).to(first.dtype))
            found_b.append((scale * (d @ first.t().to(d.dtype))).to(second.dtype))
        return found_a + found_b


def folds(group: Group, *, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether folding the adapters into the weight takes fewer operations a token than keeping them apart, on a CPU."""
    if device.type != "cpu" or group.dropout or dtype not in (torch.float32, torch.float64):
        return False
    outputs, inputs = group.frozen.rows, group.frozen.columns
    apart = sum(5 * rank * (size + inputs) for size, rank in zip(group.sizes, group.ranks, strict=True) if rank)
    return 3 * outputs * inputs <= 2 * outputs * inputs + apart


def draw_seed(group: Group) -> int:
    """For the dropout of one forward; 0 where nothing is dropped."""
    return int(torch.randint(LARGEST_SEED, (), device="cpu")) if group.dropout and group.scales else 0


def dropped(x: Tensor, group: Group, *, seed: int) -> Tensor:
    """What the adapters are given."""
    return drop_rows(x, seed=seed, p=group.dropout) if group.dropout else x


def _wide_mm(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right with sums in float32, in `dtype`."""
    if left.is_cuda and dtype == torch.float32 and left.dtype in (torch.bfloat16, torch.float16):
        out: Tensor = torch.mm(left, right, out_dtype=torch.float32)  # type: ignore[call-overload]
        return out
    return _narrow(left, right).to(dtype)


def _narrow(left: Tensor, right: Tensor) -> Tensor:
    """left @ right: on a CPU, where a product with a wide result is three times as fast, the narrow side is made the rows."""
    if left.device.type == "cpu" and right.shape[1] < left.shape[0]:
        return (right.t() @ left.t()).t()
    return left @ right
