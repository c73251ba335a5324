"""How the next token is chosen: greedy or drawn, each row from its own stream of random numbers.

A stream is a function of (seed, index of the request, number of the token): a counter is hashed, nothing is carried along,
so a row's draws do not depend on what else is in the batch, and torch's own random state is not touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    max_new_tokens: int = 256
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    """Over the tokens of prompt and answer: their positive logits are divided by it, negative ones multiplied."""
    seed: int = 0


class Sampler:
    """Chooses the next token of each row of a batch, on the batch's device and without waiting for it."""

    def __init__(self, sampling: Sampling, *, rows: int, device: torch.device) -> None:
        import torch

        self._sampling = sampling
        self._streams = torch.zeros(rows, dtype=torch.long, device=device)
        """Each row's request, hashed with the seed."""
        self._drawn = torch.zeros(rows, dtype=torch.long, device=device)
        self._seen: Tensor | None = None
        """Tokens (rows, V) of prompt and answer, where a penalty asks for them."""

    def admit(self, rows: Tensor, *, indices: Sequence[int], prompts: Sequence[Sequence[int]], vocabulary: int) -> None:
        """Rows (n,) begin anew with these requests; vocabulary is the width of the logits."""
        import torch

        indices_tensor = torch.tensor(list(indices), dtype=torch.long, device=rows.device)
        seed = _hash(torch.tensor(_signed(self._sampling.seed), dtype=torch.long, device=rows.device))
        self._streams[rows] = _hash(seed + indices_tensor * _signed(_GOLDEN))
        self._drawn[rows] = 0
        if self._sampling.repetition_penalty != 1.0:
            if self._seen is None:
                self._seen = torch.zeros(len(self._drawn), vocabulary, dtype=torch.bool, device=rows.device)
            seen = torch.zeros(len(prompts), vocabulary, dtype=torch.bool)
            for row, prompt in enumerate(prompts):
                seen[row, torch.tensor(list(prompt), dtype=torch.long)] = True
            self._seen[rows] = seen.to(rows.device)

    def keep(self, rows: Tensor) -> None:
        """The batch goes on with these rows only."""
        self._streams, self._drawn = self._streams[rows], self._drawn[rows]
        if self._seen is not None:
            self._seen = self._seen[rows]

    def choose(self, logits: Tensor, rows: Tensor | None = None) -> Tensor:
        """Token ids (n,) from logits (n, V) of these rows; None: of all."""
        import torch

        if logits.dtype != torch.float64:
            logits = logits.float()
        if self._seen is not None:
            seen = self._seen if rows is None else self._seen[rows]
            penalty = self._sampling.repetition_penalty
            logits = torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
        ids = self._draw(logits, rows) if self._sampling.temperature > 0 else logits.argmax(-1)
        if self._seen is not None:
            at = torch.arange(len(self._seen), device=ids.device) if rows is None else rows
            self._seen[at, ids] = True
        return ids

    def _draw(self, logits: Tensor, rows: Tensor | None) -> Tensor:
        """The token at which the summed probability passes the row's next random number."""
        import torch

        at = torch.arange(len(self._streams), device=logits.device) if rows is None else rows
        number = _uniform(self._streams[at], self._drawn[at])[:, None]
        self._drawn[at] += 1
        probabilities = (logits / self._sampling.temperature).softmax(-1)
        order = None
        if self._sampling.top_p < 1.0:
            probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)
            before = probabilities.cumsum(-1, dtype=torch.float64) - probabilities
            # The first is always kept: nothing is before it.
            probabilities = probabilities.masked_fill(before >= max(self._sampling.top_p, 1e-12), 0.0)
        sums = probabilities.cumsum(-1, dtype=torch.float64)
        chosen = torch.searchsorted(sums, number * sums[:, -1:], right=True).clamp_(max=logits.shape[-1] - 1)
        return (chosen if order is None else order.gather(1, chosen)).squeeze(1)


def _uniform(streams: Tensor, drawn: Tensor) -> Tensor:
    """float64 in [0, 1): 53 bits of the hash of stream and count."""
    return ((_hash(streams + drawn * _signed(_GOLDEN)) >> 11) & (2**53 - 1)).double() * 2.0**-53


def _hash(x: Tensor) -> Tensor:
    """SplitMix64 (Steele, Lea, Flood 2014): int64 in, int64 out, all bits mixed."""
    x = x + _signed(_GOLDEN)
    x = (x ^ _shifted(x, 30)) * _signed(_FIRST)
    x = (x ^ _shifted(x, 27)) * _signed(_SECOND)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """To the right, zeros coming in: torch's own shift repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value
