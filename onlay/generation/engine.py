"""Generation for `generate`, `chat` and the demo: batches of prompts, greedy or sampled, with or without the adapter.

Prompts are left-padded, so that every answer starts at the same column, and stop at the tokens that ended answers in
training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

PROMPTS_A_BATCH = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    max_new_tokens: int = 256
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    stop_token_ids: Sequence[int],
    pad_token_id: int,
    use_adapter: bool = True,
    on_token: Callable[[int], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """New token ids for each prompt, without the stop token, in the order of the prompts.

    `on_token` is called with each new id; it takes a single prompt.  `progress(done, total)` counts prompts.
    """
    if on_token is not None and len(prompts) != 1:
        raise ValueError(f"on_token follows one prompt, not {len(prompts)}")
    answers: list[list[int]] = [[] for _ in prompts]
    # Prompts of like length together: little padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), _adapter(model, use_adapter):
            for start in range(0, len(order), PROMPTS_A_BATCH):
                group = order[start : start + PROMPTS_A_BATCH]
                found = _generate_batch(model, [prompts[i] for i in group], sampling, stop_token_ids, pad_token_id, on_token)
                for index, ids in zip(group, found, strict=True):
                    answers[index] = ids
                if progress is not None:
                    progress(start + len(group), len(prompts))
    finally:
        model.train(was_training)
    return answers


def _generate_batch(
    model: nn.Module,
    prompts: list[Sequence[int]],
    sampling: Sampling,
    stops: Sequence[int],
    pad: int,
    on_token: Callable[[int], None] | None,
) -> list[list[int]]:
    from transformers import GenerationConfig

    device = next(model.parameters()).device
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(list(prompt), dtype=torch.long)
        mask[row, longest - len(prompt) :] = 1
    sampled = sampling.temperature > 0
    options: dict[str, Any] = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0} if sampled else {}
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens, do_sample=sampled, eos_token_id=list(stops), pad_token_id=pad,
        repetition_penalty=sampling.repetition_penalty, use_cache=True, **options,
    )  # fmt: skip
    torch.manual_seed(sampling.seed)
    with _sixteen_bit(model, device):
        out = model.generate(  # type: ignore[operator]
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=config,
            streamer=_Stream(on_token) if on_token is not None else None,
        )
    ends = set(stops)
    answers = []
    for row in out[:, longest:].tolist():
        end = next((i for i, token in enumerate(row) if token in ends), len(row))
        answers.append(row[:end])
    return answers


def _sixteen_bit(model: nn.Module, device: torch.device) -> AbstractContextManager[Any]:
    """The precision of training: adapters in float32 over a 16-bit base work through autocast there too."""
    dtypes = {p.dtype for p in model.parameters()}
    half = next((d for d in (torch.bfloat16, torch.float16) if d in dtypes), None)
    return torch.autocast(device.type, dtype=half) if half is not None and len(dtypes) > 1 else nullcontext()


@contextmanager
def _adapter(model: nn.Module, use: bool) -> Iterator[None]:
    if use:
        yield
        return
    disable = getattr(model, "disable_adapter", None)
    if disable is None:
        raise ValueError("this model has no adapter to leave out")
    with disable():
        yield


class _Stream:
    """What transformers' generate calls with each new token; the first call brings the prompt."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self._on_token = on_token
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            for token in value.flatten().tolist():
                self._on_token(token)
        self._prompt_seen = True

    def end(self) -> None:
        pass
