"""Proof of a merge: the merged model says what base and adapter said.

One model is in memory at a time, so what the first said is kept: float32 logits at trained tokens of held-out rows, at
most LOGIT_BYTES of them on the host.  What difference is allowed is measured, not chosen.  The two models differ by two
roundings: merged weights are rounded to the dtype of the files, and an adapter beside its base to the precision of the
work.  So each is rounded once more, at random, and its logits compared with those from before; the two errors are
independent and add up in squares.  The merged model's mean difference may be RATIO times that.  docs/merge.md has the
ratios that were measured.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from onlay.data.pack import MicroBatch, collate
from onlay.training.batches import Examples

LOGIT_BYTES = 256 * 2**20
"""Host memory for the logits of one model: at 150,000 tokens of vocabulary about 450 positions."""
RATIO = 2.0
"""Largest ratio of the merged model's mean difference to the one that rounding makes; one is expected."""
PEAK_RATIO = 4.0
"""The same for the largest difference, which scatters more.  Not asked of mixtures of experts: a router that is near a tie
may choose another expert after any rounding, and then a few logits are far apart."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Logits:
    """What a model says at the trained tokens of some rows."""

    rows: tuple[Tensor, ...]
    """(C, V) float32 (float64 of a float64 model) on the CPU, for each row."""
    nats: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nats / self.tokens, 700.0)) if not math.isnan(self.nats) else math.nan


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """Of two models' logits, over all positions and the whole vocabulary.  NaN where one is not finite."""

    largest: float
    mean: float
    top1_agreement: float
    """Share of the positions at which both find the same token likeliest."""

    def and_independent(self, other: Difference) -> Difference:
        """What two independent errors do together."""
        return Difference(
            largest=math.hypot(self.largest, other.largest),
            mean=math.hypot(self.mean, other.mean),
            top1_agreement=self.top1_agreement * other.top1_agreement,
        )


def choose_rows(examples: Examples, *, rows: int, vocabulary_size: int, seed: int) -> list[MicroBatch]:
    """At most `rows` examples that have a trained token, each a batch of its own.

    Of each the same number of trained tokens at most, spread evenly, so that all logits fit into LOGIT_BYTES.
    """
    order = np.random.default_rng(seed).permutation(len(examples))
    chosen = [int(i) for i in order if examples.trained_counts[i]][:rows]
    positions = max(1, LOGIT_BYTES // (4 * vocabulary_size) // max(1, len(chosen)))
    return [collate([_thinned(*examples.example(i), positions)], packed=False, pad_token_id=0) for i in sorted(chosen)]


def _thinned(ids: np.ndarray, trained: np.ndarray, positions: int) -> tuple[np.ndarray, np.ndarray]:
    flags = np.array(trained, dtype=bool)
    flags[0] = False  # Nothing comes before it that could predict it.
    places = np.flatnonzero(flags)
    if len(places) > positions:
        flags[:] = False
        flags[places[np.linspace(0, len(places) - 1, positions).round().astype(int)]] = True
    return np.asarray(ids), flags


@torch.no_grad()
def logits_of(
    model: nn.Module, batches: Sequence[MicroBatch], *, compute_dtype: torch.dtype, progress: Progress
) -> Logits:
    """Runs the rows one by one, in the arithmetic of training (autocast in 16 bit)."""
    rows: list[Tensor] = []
    nats, tokens = 0.0, 0
    for number, (batch, logits) in enumerate(_forward(model, batches, compute_dtype), start=1):
        targets = batch.targets[0].to(logits.device)
        nats += float(functional.cross_entropy(logits, targets, reduction="sum"))
        tokens += batch.num_trained
        rows.append(logits.cpu())
        progress(number, len(batches))
    return Logits(rows=tuple(rows), nats=nats, tokens=tokens)


def _forward(
    model: nn.Module, batches: Sequence[MicroBatch], compute_dtype: torch.dtype
) -> Iterator[tuple[MicroBatch, Tensor]]:
    base: Any = model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model  # type: ignore[operator]
    keeps_some = "logits_to_keep" in inspect.signature(base.forward).parameters
    device = next(model.parameters()).device
    mixed = compute_dtype in (torch.bfloat16, torch.float16)
    for batch in batches:
        columns = batch.columns.to(device)
        arguments: dict[str, Any] = {"input_ids": batch.input_ids.to(device), "use_cache": False}
        if keeps_some:
            arguments["logits_to_keep"] = columns
        with torch.autocast(device.type, dtype=compute_dtype) if mixed else nullcontext():
            logits = model(**arguments).logits
        logits = (logits if keeps_some else logits[:, columns])[0]
        yield batch, logits if logits.dtype == torch.float64 else logits.float()


def difference(found: Logits, expected: Logits) -> Difference:
    largest, total, count, same, positions = 0.0, 0.0, 0, 0, 0
    for mine, other in zip(found.rows, expected.rows, strict=True):
        apart = (mine - other).abs()
        # NaN is larger than everything to torch's max, and must not get lost in Python's.
        peak = float(apart.max())
        largest = peak if math.isnan(peak) or math.isnan(largest) else max(largest, peak)
        total += float(apart.sum(dtype=torch.float64))
        count += apart.numel()
        same += int((mine.argmax(-1) == other.argmax(-1)).sum())
        positions += len(mine)
    return Difference(largest=largest, mean=total / count, top1_agreement=same / positions)


@torch.no_grad()
def round_again(model: nn.Module, parameters: Iterable[str], *, stored: torch.dtype, seed: int) -> None:
    """Changes weights, in place, by errors of the size that rounding them to `stored` makes.

    Rounding to nearest leaves an error spread evenly over one unit in the last place, of variance ulp**2 / 12.  A weight
    that is rounded already cannot move by less than one unit: each moves by +-1 ulp with probability 1 / 24, which has
    the same mean and variance.  Where the model computes in a coarser dtype than the files have, that one's units count.
    """
    for number, name in enumerate(parameters):
        weight = model.get_parameter(name)
        digits = max(torch.finfo(stored).eps, torch.finfo(weight.dtype).eps)
        generator = torch.Generator(device=weight.device).manual_seed(seed * 1_000_003 + number)
        for part in weight if weight.ndim == 3 else [weight]:
            draw = torch.rand(part.shape, generator=generator, device=part.device)
            sign = (draw < 1 / 24).to(torch.int8) - (draw > 1 - 1 / 24).to(torch.int8)
            # The unit in the last place of m * 2**e, 0.5 <= m < 1, is 2**(e - 1) * eps.
            exponent = torch.frexp(part.float() if part.dtype != torch.float64 else part).exponent
            unit = torch.ldexp(torch.full_like(part, digits, dtype=torch.float32), exponent - 1)
            part.add_((unit * sign).to(part.dtype))


def judge(
    *,
    seen: Difference,
    proven: Difference,
    from_base: Difference,
    effect: Difference,
    noise: Difference,
    max_difference: float | None,
    with_peaks: bool,
) -> str | None:
    """Why a merged model is not what it should be, in words; None when it is.

    seen        merged against base and adapter as trained; what `max_difference` bounds
    proven      merged against the adapter on the very weights that it was merged into
    from_base   merged against those weights without the adapter
    effect      the adapter on those weights against them alone
    noise       what a rounding of the changed weights does
    """
    if not all(math.isfinite(value) for value in (seen.largest, proven.largest, noise.largest)):
        return "its logits are not finite"
    if not from_base.largest > 0:
        return "it is no different from the base: the adapter's change was lost"
    # Where the adapter changes less than rounding does, nothing can be said about which of the two is nearer.
    if effect.mean > RATIO * noise.mean and proven.mean >= from_base.mean:
        return f"it is nearer to the base ({from_base.mean:.3g} in the mean) than to the adapter ({proven.mean:.3g})"
    if max_difference is not None:
        over = seen.largest > max_difference
        return f"its logits are up to {seen.largest:.3g} off, --max-difference is {max_difference:g}" if over else None
    if proven.mean > RATIO * noise.mean:
        return f"its logits are {proven.mean:.3g} off in the mean, rounding explains {RATIO * noise.mean:.3g}"
    if with_peaks and proven.largest > PEAK_RATIO * noise.largest:
        return f"its logits are up to {proven.largest:.3g} off, rounding explains {PEAK_RATIO * noise.largest:.3g}"
    return None
