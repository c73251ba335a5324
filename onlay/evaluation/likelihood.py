"""How likely a model finds a text: nats, perplexity, bits per byte.

    nats_per_token = sum over scored tokens of -log p(token | tokens before it) / scored tokens
    perplexity     = exp(nats_per_token)
    bits_per_byte  = sum of nats / ln 2 / UTF-8 bytes of the scored text

Sums run over tokens, never over rows or batches, so a long row counts for what it is.  Perplexities of two tokenizers
cannot be compared, bits per byte can.

What is scored.  Of held-out rows, the trained tokens: what the model itself has to write, the end token with them (it has
nats, but no bytes).  Of plain text every token, cut into windows as long as the context: each window begins with BOS where
the tokenizer has one, else with the last token of the window before, so that each token is scored exactly once.  Without
BOS the very first token of a text has nothing before it and is not scored, nor are its bytes counted.

How.  Rows padded on the right, as many a batch as the budget of tokens allows.  The model's decoder gives hidden states;
its own output head turns those at scored places into logits, some CHUNK_BYTES of them at a time, so that logits never exist
whole.  Whether decoder, head and what the config says of the logits (a cap, a factor) make the model's logits is asked of
the model first; where they do not, its own forward is used, for fewer rows at a time.  log-softmax is in float32 (float64
for a float64 model), sums in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from onlay.data.pack import IGNORED, MicroBatch, collate, plan_micro_batches
from onlay.errors import ProofError
from onlay.evaluation.scores import Measured, Score
from onlay.records import Likelihood

CHUNK_BYTES = 128 * 2**20
"""Logits in float32 alive at a time."""
WHOLE_BYTES = 4 * CHUNK_BYTES
"""The same for a model whose logits cannot be had in pieces."""
BUDGET_TOKENS = 8192
PLANNED_TOGETHER = 1024
"""Grouping takes time that grows faster than the number of rows."""
PROBE_TOKENS = 12

Example = tuple[Sequence[int] | np.ndarray, Sequence[bool] | np.ndarray]
"""Token ids and which of them are scored; the first never is."""


@dataclass(frozen=True, slots=True, eq=False)
class Passage:
    """One row: a held-out example, or a text in windows."""

    windows: tuple[Example, ...]
    bytes: int
    """UTF-8 bytes of the scored text."""


@dataclass(frozen=True, slots=True, eq=False)
class RowNats:
    """Of each passage, in order."""

    nats: np.ndarray
    """(rows,) float64: -log p of its scored tokens, summed."""
    tokens: np.ndarray
    """(rows,) int64"""
    bytes: np.ndarray
    """(rows,) int64"""
    greedy: np.ndarray
    """(rows,) bool: whether each of its scored tokens is the likeliest one at its place."""
    note: str
    """How logits were computed, in words."""


# ------------------------------------------------------------------------------------------------- what is to be scored


def passages_of_examples(examples: Iterable[Example], *, decode: Callable[[list[int]], str]) -> list[Passage]:
    """Held-out rows as they were prepared for training.  `decode` is the tokenizer's, special tokens left out."""
    return [Passage(((ids, trained),), _bytes_scored(ids, trained, decode)) for ids, trained in examples]


def _bytes_scored(
    ids: Sequence[int] | np.ndarray, trained: Sequence[bool] | np.ndarray, decode: Callable[[list[int]], str]
) -> int:
    flags = np.asarray(trained, dtype=np.int8)
    flags = np.concatenate([[0], flags[1:], [0]])  # The first token is never scored.
    borders = np.flatnonzero(np.diff(flags)) + 1
    runs = [np.asarray(ids[begin:end]).tolist() for begin, end in zip(borders[::2], borders[1::2], strict=True)]
    return sum(len(decode(run).encode()) for run in runs)


def passages_of_texts(
    texts: Iterable[str],
    *,
    encode: Callable[[str], list[int]],
    decode: Callable[[list[int]], str],
    window_tokens: int,
    bos_id: int | None,
) -> list[Passage]:
    """Plain texts in windows of at most `window_tokens`; `encode` adds no special tokens.  An empty text scores nothing."""
    if window_tokens < 2:
        raise ValueError(f"window_tokens = {window_tokens} must be at least 2: one to see and one to score")
    found = []
    for text in texts:
        ids = encode(text)
        size = len(text.encode())
        if bos_id is None:
            starts = range(0, max(len(ids) - 1, 0), window_tokens - 1)
            pieces = [ids[start : start + window_tokens] for start in starts]
            size -= len(decode(ids[:1]).encode()) if pieces else size
        else:
            step = window_tokens - 1
            pieces = [[bos_id, *ids[start : start + step]] for start in range(0, len(ids), step)]
        windows = tuple((piece, [False] + [True] * (len(piece) - 1)) for piece in pieces)
        found.append(Passage(windows, size))
    return found


# ----------------------------------------------------------------------------------------------------------- the score


def row_nats(
    model: nn.Module,
    passages: Sequence[Passage],
    *,
    pad_token_id: int,
    budget_tokens: int = BUDGET_TOKENS,
    within: Callable[[], AbstractContextManager[Any]] = nullcontext,
    mask_padding: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> RowNats:
    """Nats of each passage under a causal language model of transformers, or PEFT's wrapping of one.

    `within` is entered for the work: `model.disable_adapter` gives the base.  `mask_padding` False saves the mask where
    training's layout found that it changes nothing.  `progress(done, total)` counts windows.  The model's mode is left as it
    was.  Raises ProofError for nats that are not finite, ValueError for a passage without tokens to see.
    """
    windows = [(row, window) for row, passage in enumerate(passages) for window in passage.windows]
    nats = np.zeros(len(passages))
    tokens = np.zeros(len(passages), dtype=np.int64)
    greedy = np.ones(len(passages), dtype=bool)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), within():
            output = _Output(model, mask_padding=mask_padding)
            done = 0
            for start in range(0, len(windows), PLANNED_TOGETHER):
                some = windows[start : start + PLANNED_TOGETHER]
                lengths = [len(ids) for _, (ids, _) in some]
                budget = min(budget_tokens, output.most_tokens or budget_tokens)
                for group in plan_micro_batches(lengths, budget_tokens=budget, packed=False):
                    batch = collate([_arrays(some[i][1]) for i in group], packed=False, pad_token_id=pad_token_id)
                    sums, counts, likeliest = output.nats(batch)
                    rows = [some[i][0] for i in group]
                    np.logical_and.at(greedy, rows, likeliest)
                    np.add.at(nats, rows, sums)
                    np.add.at(tokens, rows, counts)
                    done += len(group)
                    if progress is not None:
                        progress(done, len(windows))
    finally:
        model.train(was_training)
    broken = np.flatnonzero(~np.isfinite(nats))
    if len(broken):
        raise ProofError(
            f"The loss of {len(broken)} of {len(nats)} rows is not a finite number; the first is row {broken[0] + 1}.",
            "Its weights are damaged or overflow: run `onlay verify`, or load the base in bfloat16 instead of float16.",
        )
    sizes = np.array([passage.bytes for passage in passages], dtype=np.int64)
    return RowNats(nats, tokens, sizes, greedy, output.note)


def total(rows: RowNats, *, text: str, system: str) -> Likelihood:
    """The record of all rows together.  Raises ValueError where no token, or no byte, was scored."""
    tokens, size = int(rows.tokens.sum()), int(rows.bytes.sum())
    if not tokens or not size:
        raise ValueError(f"{text}: {tokens} tokens and {size} bytes were scored, so there is nothing to tell")
    nats = math.fsum(rows.nats)
    try:
        perplexity = math.exp(nats / tokens)
    except OverflowError:
        raise ProofError(
            f"{text}: {nats / tokens:,.0f} nats a token are no language model's.",
            "Its weights are damaged: run `onlay verify`.",
        ) from None
    return Likelihood(
        text=text, system=system, rows=int((rows.tokens > 0).sum()), tokens=tokens, bytes=size,
        nats_per_token=nats / tokens, perplexity=perplexity, bits_per_byte=nats / math.log(2) / size,
    )  # fmt: skip


def measured_nats(rows: RowNats) -> Measured:
    """For `compare`: nats a token, resampled by rows and weighted by their tokens.  Rows without scored tokens count out."""
    per_token = np.where(rows.tokens > 0, rows.nats / np.maximum(rows.tokens, 1), math.nan)
    return Measured(score=NATS, values=per_token, statistics=np.stack([rows.nats, rows.tokens.astype(np.float64)], 1))


def _per_token(sums: np.ndarray) -> np.ndarray:
    per_token: np.ndarray = sums[:, 0] / sums[:, 1]
    return per_token


NATS = Score(name="nats_per_token", kind="corpus", unit="nats", higher_is_better=False, total=_per_token)


def _arrays(window: Example) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(window[0], dtype=np.int64), np.asarray(window[1], dtype=bool)


# ------------------------------------------------------------------------------------------------ the model's two parts


class _Output:
    """Nats of micro-batches; asks the model once in how many parts it can be run."""

    def __init__(self, model: nn.Module, *, mask_padding: bool) -> None:
        whole: Any = model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model  # type: ignore[operator]
        self._model = model
        self._mask_padding = mask_padding
        self._decoder: Any = whole.get_decoder()
        self._head: Any = whole.get_output_embeddings()
        self._device = whole.get_input_embeddings().weight.device
        dtypes = {parameter.dtype for parameter in model.parameters()}
        halves = [dtype for dtype in (torch.bfloat16, torch.float16) if dtype in dtypes]
        # As in training and generation: adapters in float32 over a 16-bit base.
        self._half = halves[0] if halves and len(dtypes) > 1 else None
        self._vocabulary = int(whole.config.get_text_config().vocab_size)
        self._finish, reason = self._find_finish(whole)
        self.most_tokens: int | None = None
        """Tokens a batch where the logits of all its tokens exist at once; a longer row still goes alone."""
        self.note = f"logits from hidden states, {CHUNK_BYTES >> 20} MiB at a time"
        if self._finish is None:
            self.most_tokens = max(1, WHOLE_BYTES // (4 * self._vocabulary))
            self.note = f"logits from the model's own forward, because {reason}"

    def nats(self, batch: MicroBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each row of the batch: nats summed (float64), how many tokens, and whether each is the likeliest."""
        rows, places = (batch.targets != IGNORED).nonzero(as_tuple=True)
        columns = batch.columns[places]
        targets = batch.targets[rows, places]
        arguments = self._arguments(batch.input_ids, batch.attention_mask)
        there = (rows.to(self._device), columns.to(self._device))
        found = torch.zeros(len(batch.targets), dtype=torch.float64)
        likeliest = torch.ones(len(batch.targets), dtype=torch.bool)
        if len(rows):
            with self._autocast():
                if self._finish is None:
                    logits = self._model(**arguments).logits
                    pieces = [_cross_entropy(logits[there[0].to(logits.device), there[1].to(logits.device)], targets)]
                else:
                    hidden = self._decoder(**arguments).last_hidden_state[there]
                    size = max(1, CHUNK_BYTES // (4 * self._vocabulary))
                    pieces = [
                        _cross_entropy(self._finish(self._head(hidden[i : i + size])), targets[i : i + size])
                        for i in range(0, len(hidden), size)
                    ]
            found.index_add_(0, rows, torch.cat([nats for nats, _ in pieces]).cpu().double())
            likeliest[rows[~torch.cat([hits for _, hits in pieces]).cpu()]] = False
        return found.numpy(), torch.bincount(rows, minlength=len(batch.targets)).numpy(), likeliest.numpy()

    def _arguments(self, input_ids: Tensor, mask: Tensor | None) -> dict[str, Any]:
        arguments: dict[str, Any] = {"input_ids": input_ids.to(self._device), "use_cache": False}
        if mask is not None and self._mask_padding:
            arguments["attention_mask"] = mask.to(self._device)
        return arguments

    def _autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._half is None else torch.autocast(self._device.type, dtype=self._half)

    def _find_finish(self, whole: Any) -> tuple[Callable[[Tensor], Tensor] | None, str]:
        """What is done to the head's logits, such that decoder, head and it give the model's own, bit for bit; else None
        and why."""
        if self._head is None or self._decoder is whole:
            return None, "it shows no decoder and head by themselves"
        ids = torch.arange(PROBE_TOKENS)[None] * 37 % self._vocabulary
        with self._autocast():
            logits = self._model(**self._arguments(ids, None)).logits
            hidden = self._decoder(**self._arguments(ids, None)).last_hidden_state
            plain = self._head(hidden)
        for finish in _finishes(whole.config.get_text_config()):
            if torch.equal(finish(plain).to(logits), logits):
                return finish, ""
        return None, "what it does to logits after its head is not known"


def _cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(N, V), (N,) on the CPU -> (N,) nats, (N,) whether the target is the likeliest."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    targets = targets.to(wide.device)
    return functional.cross_entropy(wide, targets, reduction="none"), wide.argmax(-1) == targets


def _finishes(config: Any) -> list[Callable[[Tensor], Tensor]]:
    """What architectures of transformers do to logits, by their configs' fields; the first is nothing."""

    def nothing(logits: Tensor) -> Tensor:
        return logits

    found: list[Callable[[Tensor], Tensor]] = [nothing]
    cap = getattr(config, "final_logit_softcapping", None)
    divisor = getattr(config, "logits_scaling", None)
    if cap:
        found.append(lambda logits: torch.tanh(logits / cap) * cap)
    if divisor:
        found.append(lambda logits: logits / divisor)
    for name in ("logit_scale", "lm_head_multiplier"):
        factor = getattr(config, name, None)
        if factor:
            found.append(partial(torch.mul, other=factor))
    return found
