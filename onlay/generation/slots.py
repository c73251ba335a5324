"""Rows of one batch that share the column they write to, over preallocated keys and values.

    column        0 1 2 3 4 5 6 7 8
    row 0             p p p p a a      every row is right-aligned at the write column; what is left of its first
    row 1         p p p p p p a a      token is masked
    row 2                 p p p p      just admitted: its prompt was computed on its own and put here
                                ^ the next token of all rows goes here

So a step is one forward with static shapes: no row has its own length, and a window of W columns is a window of W
positions.  When the columns run out all rows move left together by as many columns as the longest leaves free.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicCache

SLOT_ATTENTION = "onlay_slots"
_GRAPH_COLUMNS = 128
"""A captured step looks at the columns up to the next multiple of this: a graph for each."""


class SlotCache(Cache):
    """Keys and values (rows, heads, columns, width) of each layer.  `update` writes one column and returns those up to `end`."""

    def __init__(self, prefilled: DynamicCache, *, rows: int, columns: int) -> None:
        """Memory for as many layers, heads and numbers as `prefilled` has."""
        super().__init__(layers=[])
        layers: list[Any] = prefilled.layers
        self.keys = [_room(layer.keys, rows, columns) for layer in layers]
        self.values = [_room(layer.values, rows, columns) for layer in layers]
        self.column = torch.zeros(1, dtype=torch.long, device=self.keys[0].device)
        self.end = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys.index_copy_(2, self.column, key_states.to(keys.dtype))
        values.index_copy_(2, self.column, value_states.to(values.dtype))
        return keys[:, :, : self.end], values[:, :, : self.end]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.end - 1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.end, 0


def _room(like: Tensor, rows: int, columns: int) -> Tensor:
    return like.new_zeros(rows, like.shape[1], columns, like.shape[3])


class Slots:
    """One batch: which columns each row has, and the forwards that fill and extend them."""

    def __init__(self, model: Any, *, rows: int, columns: int, longest: int, piece_tokens: int, graphs: bool) -> None:
        """model: the base, without PEFT's wrapper.  columns must hold the longest row and the token after it.

        longest: tokens that a row may come to; no position beyond them is asked for.
        """
        self.model = model
        self.rows, self.columns = rows, columns
        self.column = 0
        self.starts = [0] * rows
        """Column of each row's first token; of a free row anything up to `column`."""
        self._piece_tokens = piece_tokens
        self._last_position = longest - 1
        self._masks = MaskForm(model.config)
        embedding = model.get_input_embeddings().weight
        self._dtype, self.device = embedding.dtype, next(model.parameters()).device
        self._last_only: dict[str, Any] = (
            {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        )
        self._cache: SlotCache | None = None
        self._ids = torch.zeros(rows, dtype=torch.long, device=self.device)
        self._positions = torch.zeros(rows, dtype=torch.long, device=self.device)
        self._starts = torch.zeros(rows, dtype=torch.long, device=self.device)
        self._graphs: Graphs | None = Graphs() if graphs else None
        self.graph_failure: str | None = None

    @property
    def bytes_a_token(self) -> int:
        """Of keys and values in all layers."""
        assert self._cache is not None
        stored = (*self._cache.keys, *self._cache.values)
        return sum(tensor.shape[1] * tensor.shape[3] * tensor.element_size() for tensor in stored)

    def lengths(self, rows: Sequence[int]) -> list[int]:
        return [self.column - self.starts[row] for row in rows]

    def admit(self, rows: Sequence[int], prompts: Sequence[Sequence[int]], *, active: Sequence[int]) -> Tensor:
        """Computes these prompts and gives them these rows.  Logits (n, V) of what follows each."""
        longest = max(len(prompt) for prompt in prompts)
        logits, prefilled = self._prefill(prompts, longest)
        if self._cache is None:
            self._cache = SlotCache(prefilled, rows=self.rows, columns=self.columns)
        if self.column < longest:
            self._move(max([longest, *self.lengths(active)]))
        at = torch.tensor(list(rows), device=self.device)
        layers: list[Any] = prefilled.layers
        for layer, keys, values in zip(layers, self._cache.keys, self._cache.values, strict=True):
            keys[at, :, self.column - longest : self.column] = layer.keys.to(keys.dtype)
            values[at, :, self.column - longest : self.column] = layer.values.to(values.dtype)
        lengths = [len(prompt) for prompt in prompts]
        for row, length in zip(rows, lengths, strict=True):
            self.starts[row] = self.column - length
        self._starts[at] = torch.tensor([self.starts[row] for row in rows], device=self.device)
        self._positions[at] = torch.tensor(lengths, device=self.device)
        return logits

    def step(self, ids: Tensor, *, active: Sequence[int]) -> Tensor:
        """Logits (rows, V) after one more token of each row; of rows that are not active they mean nothing."""
        assert self._cache is not None
        if self.column == self.columns:
            self._move(max(self.lengths(active)))
        self._ids.copy_(ids)
        self._cache.column.fill_(self.column)
        stride = _GRAPH_COLUMNS if self._graphs is not None else 1
        self._cache.end = min(self.columns, (self.column // stride + 1) * stride)
        logits = self._run()
        self.column += 1
        self._positions += 1
        return logits

    def probe(self, ids: Tensor, *, position: int, active: Sequence[int]) -> Tensor:
        """Logits (rows, V) of a step that is not kept, as if every row's next token were at `position`."""
        assert self._cache is not None
        if self.column == self.columns:
            self._move(max(self.lengths(active)))
        before = self._positions.clone()
        self._ids.copy_(ids)
        self._positions.fill_(position)
        self._cache.column.fill_(self.column)
        self._cache.end = self.column + 1
        logits = self._forward()
        self._positions.copy_(before)
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        """The batch goes on with these rows only, in this order, right-aligned at the longest of them."""
        assert self._cache is not None
        at = torch.tensor(list(rows), device=self.device)
        first = self.column - max(self.lengths(rows))
        for stored in (self._cache.keys, self._cache.values):
            for i, tensor in enumerate(stored):
                kept = tensor.new_zeros(len(rows), *tensor.shape[1:])
                kept[:, :, : self.column - first] = tensor[at, :, first : self.column]
                stored[i] = kept
        self.column -= first
        self.starts = [self.starts[row] - first for row in rows]
        self.rows = len(rows)
        self._ids, self._positions = self._ids[at], self._positions[at]
        self._starts = torch.tensor(self.starts, device=self.device)
        self.forget_graphs()

    def forget_graphs(self) -> None:
        """What a captured step reads has moved."""
        if self._graphs is not None:
            self._graphs = Graphs()

    def _move(self, to: int) -> None:
        """All rows are right-aligned at another column.  `to` is at least the length of the longest row in use."""
        assert self._cache is not None
        by = to - self.column
        width = min(self.column, to)
        for tensor in (*self._cache.keys, *self._cache.values):
            # The two places overlap.
            tensor[:, :, to - width : to] = tensor[:, :, self.column - width : self.column].clone()
        self.column = to
        self.starts = [max(0, start + by) for start in self.starts]
        self._starts += by
        self._starts.clamp_(0, to)

    # ------------------------------------------------------------------------------------------------------- forwards

    def _prefill(self, prompts: Sequence[Sequence[int]], longest: int) -> tuple[Tensor, DynamicCache]:
        """Left-padded, in pieces of at most `piece_tokens` tokens.  Logits (n, V) of the last position, and the cache."""
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(list(prompt), dtype=torch.long)
        ids = ids.to(self.device)
        starts = torch.tensor([longest - len(prompt) for prompt in prompts], device=self.device)
        positions = (torch.arange(longest, device=self.device) - starts[:, None]).clamp_(min=0)
        padded = any(len(prompt) != longest for prompt in prompts)
        cache = DynamicCache()
        piece = max(1, self._piece_tokens // len(prompts))
        for begin in range(0, longest, piece):
            end = min(longest, begin + piece)
            queries = torch.arange(begin, end, device=self.device)
            # Without padding, window or past, "causal" says it all, and faster.
            plain = not padded and begin == 0 and not self._masks.reaches(end)
            mask = None if plain else self._masks.make(queries, starts, end=end, dtype=self._dtype)
            out = self.model(
                input_ids=ids[:, begin:end], attention_mask=mask, position_ids=positions[:, begin:end],
                past_key_values=cache, use_cache=True, **self._last_only,
            )  # fmt: skip
        return out.logits[:, -1], cache

    def _forward(self) -> Tensor:
        cache = self._cache
        assert cache is not None
        # Free rows, and those whose end the host has not seen yet, may be past what the base has positions for.
        positions = self._positions.clamp(max=self._last_position)
        mask = self._masks.make(cache.column, self._starts, end=cache.end, dtype=self._dtype)
        out = self.model(
            input_ids=self._ids[:, None], attention_mask=mask, position_ids=positions[:, None],
            past_key_values=cache, use_cache=True, **self._last_only,
        )  # fmt: skip
        logits: Tensor = out.logits[:, -1]
        return logits

    def _run(self) -> Tensor:
        if self._graphs is None:
            return self._forward()
        assert self._cache is not None
        try:
            return self._graphs.run(self._cache.end, self._forward)
        except CaptureError as error:
            self._graphs, self.graph_failure = None, str(error)
            return self._forward()


class CaptureError(Exception):
    """A step cannot be captured: it waits for the device, or its shapes depend on its numbers."""


class Graphs:
    """Captured decoding steps, one for each number of columns, over the same static memory."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._captured: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def run(self, end: int, forward: Callable[[], Tensor]) -> Tensor:
        if end not in self._captured:
            self._captured[end] = self._capture(forward)
        graph, logits = self._captured[end]
        graph.replay()
        return logits

    def _capture(self, forward: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        # Kernels that are chosen or loaded at their first use must not be so while capturing.  Running the step
        # several times writes the same keys to the same column.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                forward()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                logits = forward()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            torch.cuda.synchronize()
            raise CaptureError(str(error).splitlines()[0]) from error
        self._pool = self._pool or graph.pool()
        return graph, logits


# ---------------------------------------------------------------------------------------------------- masks, attention


class MaskForm:
    """Masks as the model's forward takes them ready-made: one tensor, or one for each kind of layer."""

    KINDS = ("full_attention", "sliding_attention")

    def __init__(self, config: Any) -> None:
        config = config.get_text_config()
        self._window: int | None = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None)
        self._kinds = tuple(dict.fromkeys(kinds)) if kinds is not None else None

    @staticmethod
    def failure(config: Any) -> str | None:
        """What of this base's attention is neither causal nor a window."""
        config = config.get_text_config()
        odd = [kind for kind in getattr(config, "layer_types", None) or () if kind not in MaskForm.KINDS]
        if odd:
            return f"it has layers of the kind {odd[0]}"
        return "it attends in chunks" if getattr(config, "attention_chunk_size", None) is not None else None

    def reaches(self, tokens: int) -> bool:
        """Whether a window hides anything in a row of so many tokens."""
        return self._window is not None and tokens > self._window

    def make(self, queries: Tensor, starts: Tensor, *, end: int, dtype: torch.dtype) -> Any:
        """Additive masks (rows, 1, queries, end): 0 for the columns from a row's start to the query's own."""
        columns = torch.arange(end, device=starts.device)
        seen = (columns >= starts[:, None])[:, None, None, :] & (columns <= queries[:, None])
        near = seen & (columns > queries[:, None] - self._window) if self._window is not None else seen
        # The least number instead of minus infinity: a padded query that sees nothing stays a number.
        least = torch.finfo(dtype).min
        zeros = torch.zeros((), dtype=dtype, device=starts.device)

        def additive(allowed: Tensor) -> Tensor:
            return torch.where(allowed, zeros, least)

        if self._kinds is None:
            return additive(near)
        return {kind: additive(near if kind == "sliding_attention" else seen) for kind in self._kinds}


def slot_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    *, dropout: float = 0.0, scaling: float | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention over slots.  query (B, H, T, D), key and value (B, G, C, D) -> (B, T, H, D).

    One query of each head against keys that several heads share: the heads of a group are taken as queries of one head, so
    that keys and values are read once and never repeated.  Raises NotImplementedError for what it does not have.
    """
    refused = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if refused or dropout or not getattr(module, "is_causal", True):
        raise NotImplementedError(f"slot attention does not have {', '.join(refused) or 'dropout or bidirectionality'}")
    if attention_mask is not None and attention_mask.dtype != query.dtype:
        attention_mask = attention_mask.to(query.dtype)
    rows, heads, tokens, width = query.shape
    groups = key.shape[1]
    shared = heads // groups
    if tokens == 1 and attention_mask is not None:
        out = functional.scaled_dot_product_attention(
            query.reshape(rows, groups, shared, width), key, value, attn_mask=attention_mask, scale=scaling
        )
        return out.reshape(rows, 1, heads, value.shape[-1]), None
    if shared > 1 and attention_mask is not None and query.device.type != "cpu":
        # Off a CPU the fast kernels do not take a mask and shared heads at once.
        key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    out = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, is_causal=attention_mask is None and tokens > 1,
        enable_gqa=key.shape[1] != heads,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


@contextmanager
def attention(model: Any, name: str | None) -> Iterator[None]:
    """The model with this attention; None: its own."""
    if name is None:
        yield
        return
    AttentionInterface.register(SLOT_ATTENTION, slot_attention)
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
