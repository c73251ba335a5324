"""Generation for `generate`, `chat` and the demo: batches of prompts, greedy or sampled, with or without the adapter.

Prompts are left-padded, so that every answer starts at the same column, and stop at the tokens that ended answers in
training.  torch is imported inside the functions: `Sampling` costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    context_tokens: int | None = None,
    use_adapter: bool = True,
    on_token: Callable[[int], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """New token ids for each prompt, without the stop token, in the order of the prompts.

    Answers end where the base's context of `context_tokens` ends.  Sampling is a function of `sampling.seed` and the
    prompts; torch's own random state is left as it was.  `on_token` is called with each new id but the stop token; it
    takes a single prompt.  `progress(done, total)` counts prompts.
    """
    import torch

    if on_token is not None and len(prompts) != 1:
        raise ValueError(f"on_token follows one prompt, not {len(prompts)}")
    answers: list[list[int]] = [[] for _ in prompts]
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), _adapter(model, use_adapter), _unset_defaults(model):
            done = 0
            for group in _groups([len(prompt) for prompt in prompts], sampling.max_new_tokens, context_tokens):
                longest = max(len(prompts[i]) for i in group)
                room = max(1, (context_tokens or math.inf) - longest)
                found = _generate_batch(
                    model, [prompts[i] for i in group], stops=stop_token_ids, pad=pad_token_id, on_token=on_token,
                    sampling=replace(sampling, max_new_tokens=int(min(sampling.max_new_tokens, room))),
                )  # fmt: skip
                for index, ids in zip(group, found, strict=True):
                    answers[index] = ids
                done += len(group)
                if progress is not None:
                    progress(done, len(prompts))
    finally:
        model.train(was_training)
    return answers


def _groups(lengths: Sequence[int], max_new_tokens: int, context_tokens: int | None) -> Iterator[list[int]]:
    """Prompts of like length together, for little padding; those whose answer the context may end, each alone."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    whole = [i for i in order if context_tokens is None or lengths[i] + max_new_tokens <= context_tokens]
    for start in range(0, len(whole), PROMPTS_A_BATCH):
        yield whole[start : start + PROMPTS_A_BATCH]
    for i in order[len(whole) :]:
        yield [i]


def _generate_batch(
    model: nn.Module,
    prompts: list[Sequence[int]],
    *,
    sampling: Sampling,
    stops: Sequence[int],
    pad: int,
    on_token: Callable[[int], None] | None,
) -> list[list[int]]:
    import torch

    device = next(model.parameters()).device
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(list(prompt), dtype=torch.long)
        mask[row, longest - len(prompt) :] = 1
    ends = set(stops)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), _sixteen_bit(model, device):
        torch.manual_seed(sampling.seed)
        out = model.generate(  # type: ignore[operator]
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=_config(**_options(sampling), eos_token_id=list(stops), pad_token_id=pad),
            streamer=_Stream(on_token, ends) if on_token is not None else None,
        )
    answers = []
    for row in out[:, longest:].tolist():
        end = next((i for i, token in enumerate(row) if token in ends), len(row))
        answers.append(row[:end])
    return answers


def _config(**options: Any) -> Any:
    from transformers import GenerationConfig

    make: Any = GenerationConfig  # Its __init__ has no annotations.
    return make(**options)


def _options(sampling: Sampling) -> dict[str, Any]:
    sampled = sampling.temperature > 0
    drawing = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0} if sampled else {}
    return {
        "max_new_tokens": sampling.max_new_tokens,
        "do_sample": sampled,
        "repetition_penalty": sampling.repetition_penalty,
        "use_cache": True,
        **drawing,
    }


def _sixteen_bit(model: nn.Module, device: torch.device) -> AbstractContextManager[Any]:
    """The precision of training: adapters in float32 over a 16-bit base work through autocast there too."""
    import torch

    dtypes = {p.dtype for p in model.parameters()}
    half = next((d for d in (torch.bfloat16, torch.float16) if d in dtypes), None)
    return torch.autocast(device.type, dtype=half) if half is not None and len(dtypes) > 1 else nullcontext()


@contextmanager
def _adapter(model: nn.Module, use: bool) -> Iterator[None]:
    if use:
        yield
        return
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise ValueError("this model has no adapter to leave out")
    with model.disable_adapter():
        yield


@contextmanager
def _unset_defaults(model: Any) -> Iterator[None]:
    """Without the base's generation_config.json, which would fill in what was not asked for: penalties, a least length."""
    from peft import PeftModel

    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    before = inner.generation_config
    inner.generation_config = _config()
    try:
        yield
    finally:
        inner.generation_config = before


class _Stream:
    """What transformers' generate calls with each new token; the first call brings the prompt."""

    def __init__(self, on_token: Callable[[int], None], stops: set[int]) -> None:
        self._on_token = on_token
        self._stops = stops
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            for token in value.flatten().tolist():
                if token not in self._stops:
                    self._on_token(token)
        self._prompt_seen = True

    def end(self) -> None:
        pass
