"""Answers in fixed groups, by transformers' own generate and the base's own cache: for bases whose rows cannot be slots.

Only the choice of each token is the engine's, so that seeds, penalties and stops mean the same as everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from onlay.generation.sampling import Sampler, Sampling

OnToken = Callable[[int, int], None]


def generate_fixed(
    model: Any,
    prompts: dict[int, Sequence[int]],
    *,
    sampling: Sampling,
    stops: frozenset[int],
    pad: int,
    context_tokens: int | None,
    rows: int,
    pads: bool,
    on_token: OnToken | None,
    on_done: Callable[[int, list[int], bool], None],
) -> None:
    """Calls on_done(index, ids, stopped) for each prompt.

    rows: at most so many prompts in a group.  pads: prompts of different lengths may be in one.
    """
    make: Any = GenerationConfig  # Its __init__ has no annotations.
    device = next(model.parameters()).device
    with _unset_defaults(model, make()):
        for group in _groups(prompts, sampling.max_new_tokens, context_tokens, rows=rows, pads=pads):
            longest = max(len(prompts[i]) for i in group)
            room = int(min(sampling.max_new_tokens, (context_tokens or math.inf) - longest))
            ids = torch.full((len(group), longest), pad, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(group):
                ids[row, longest - len(prompts[i]) :] = torch.tensor(list(prompts[i]), dtype=torch.long)
                mask[row, longest - len(prompts[i]) :] = 1
            _forget_states(model)
            choose = _Choose(
                Sampler(sampling, rows=len(group), device=device), group, [prompts[i] for i in group], stops, on_token
            )
            model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device),
                logits_processor=LogitsProcessorList([choose]),
                generation_config=make(
                    max_new_tokens=room, do_sample=False, use_cache=True, eos_token_id=sorted(stops), pad_token_id=pad
                ),
            )  # fmt: skip
            for row, i in enumerate(group):
                on_done(i, choose.answers[row], choose.stopped[row])


def _forget_states(model: Any) -> None:
    """RecurrentGemma keeps its state in its modules, where the next prompt of a single token would find it."""
    for module in model.modules():
        if vars(module).get("recurrent_states") is not None:
            module.recurrent_states = None


class _Choose(LogitsProcessor):  # type: ignore[misc, unused-ignore]
    """Leaves one token a row: the one that the sampler chose."""

    def __init__(
        self, sampler: Sampler, indices: Sequence[int], prompts: Sequence[Sequence[int]], stops: frozenset[int],
        on_token: OnToken | None,
    ) -> None:  # fmt: skip
        self._sampler, self._indices, self._prompts = sampler, indices, prompts
        self._stops, self._on_token = stops, on_token
        self._begun = False
        self.answers: list[list[int]] = [[] for _ in indices]
        self.stopped = [False for _ in indices]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self._begun:
            rows = torch.arange(len(self._indices), device=scores.device)
            self._sampler.admit(rows, indices=self._indices, prompts=self._prompts, vocabulary=scores.shape[-1])
            self._begun = True
        chosen = self._sampler.choose(scores)
        for row, token in enumerate(chosen.tolist()):
            if self.stopped[row]:
                continue
            if token in self._stops:
                self.stopped[row] = True
                continue
            self.answers[row].append(token)
            if self._on_token is not None:
                self._on_token(self._indices[row], token)
        return torch.full_like(scores, -math.inf).scatter_(1, chosen[:, None], 0.0)


def _groups(
    prompts: dict[int, Sequence[int]], max_new_tokens: int, context_tokens: int | None, *, rows: int, pads: bool
) -> Iterator[list[int]]:
    """Prompts of like length together, for little padding; those whose answer the context may end, each alone."""
    group: list[int] = []
    for i in sorted(prompts, key=lambda i: len(prompts[i])):
        alone = context_tokens is not None and len(prompts[i]) + max_new_tokens > context_tokens
        other = bool(group) and not pads and len(prompts[i]) != len(prompts[group[0]])
        if group and (alone or other or len(group) == rows):
            yield group
            group = []
        if alone:
            yield [i]
        else:
            group.append(i)
    if group:
        yield group


@contextmanager
def _unset_defaults(model: Any, empty: Any) -> Iterator[None]:
    """Without the base's generation_config.json, which would fill in what was not asked for: penalties, a least length."""
    before = model.generation_config
    model.generation_config = empty
    try:
        yield
    finally:
        model.generation_config = before
