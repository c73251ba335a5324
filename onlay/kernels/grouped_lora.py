"""The LoRA part of a linear layer for a batch in which every row may have another adapter, or none.

What and why.  Rows with different adapters are usually computed by gathering each row's own factors, or adapter by
adapter.  When the ranks of all adapters together are few, two dense products over all of them cost less than either, and
know nothing of which row has what, so that a captured CUDA graph stays valid when the rows change:

    h = x A^T, A (S, I) all adapters' A below one another;   h = h * mask;   y += h B, B (S, O) all B^T, scaled

S is the sum of the ranks.  mask (N, S) is 1 in the columns of the row's own adapter and 0 elsewhere: a row without an
adapter has zeros only, and the product adds exact zeros to it.  This is exact, not approximate.
DoRA divides the outputs by the norm of the whole weight, so the base's part of a row is scaled too: y = bias + g (y - bias)
with g (N, O) the row's magnitude over that norm (1 without DoRA), and B holds g as well as the scale.
Layout.  x (N, ..., I), y (N, ..., O), both of any leading sizes after the row; A (S, I), B (S, O).
Precision.  Everything in the dtype of y; the products accumulate as the library's do.
Operations a token: 2 S (I + O), beside 2 I O of the base.  With S over a few hundred stack only the adapters in the batch.
Forward only: the gradient is not wanted while generating, and y is changed in place.
When it is *not* used.  Fused experts, embeddings, adapters with biases or whole layers of their own: there PEFT's
own forward runs, adapter by adapter.
Sources.  S-LoRA (arXiv:2311.03285) and Punica (arXiv:2310.18547) for batches of many adapters, which gather; this is
the dense form for few of them.  DoRA (arXiv:2402.09353), equation 5.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reference(
    y: Tensor, x: Tensor, *, a: list[Tensor], b: list[Tensor], scales: list[float], owners: list[int | None]
) -> Tensor:
    """The same by definition: row by row, y + s x A^T B^T with the row's own A (R, I) and B (O, R), or y."""
    rows = [
        y[row] if own is None else y[row] + scales[own] * (x[row] @ a[own].t()) @ b[own].t()
        for row, own in enumerate(owners)
    ]
    return torch.stack(rows)


def hidden_of(x: Tensor, *, a: Tensor, mask: Tensor | None) -> Tensor:
    """h = (x A^T) * mask: (tokens of all rows, S).  mask None: every row has every adapter of A."""
    hidden = x.reshape(-1, x.shape[-1]) @ a.t()
    if mask is not None:
        hidden.view(_by_row(hidden, mask)).mul_(mask.unsqueeze(1))
    return hidden


def grouped_lora_(y: Tensor, x: Tensor, *, a: Tensor, b: Tensor, mask: Tensor | None) -> Tensor:
    """y (N, ..., O) += ((x A^T) * mask) B in place, and y."""
    y.view(-1, y.shape[-1]).addmm_(hidden_of(x, a=a, mask=mask), b)
    return y


def scale_base_(y: Tensor, *, gain: Tensor, bias: Tensor | None) -> Tensor:
    """y (N, ..., O) = bias + gain (y - bias) in place, and y; gain (N, O)."""
    rows = y.view(_by_row(y, gain))
    if bias is None:
        rows.mul_(gain.unsqueeze(1))
    else:
        rows.sub_(bias).mul_(gain.unsqueeze(1)).add_(bias)
    return y


def _by_row(tensor: Tensor, rows: Tensor) -> tuple[int, int, int]:
    """(N, tokens a row, width): some models flatten rows and tokens to one size, and the tokens of a row stay together."""
    width = tensor.shape[-1]
    return rows.shape[0], tensor.numel() // max(1, width * rows.shape[0]), width
