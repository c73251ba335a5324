"""The one generation engine: one base, and for each row of a batch another adapter or none.

`generate`, `chat`, `evaluate` and the server all ask here.  Waiting prompts take the place of finished ones while the
others go on (decode.py, slots.py), adapters are added row by row (adapters.py), and each row draws from its own
stream (sampling.py).  What a base or an adapter does not allow is done the slower way, and said in `notes`:
a base whose rows cannot be slots answers in fixed groups with its own cache (fixed.py); adapters that are more than
factors beside linear layers are switched, and the rows grouped by adapter.  torch is imported inside the functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from onlay.errors import DataError
from onlay.generation.sampling import Sampling

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Answer", "Engine", "Request", "Sampling"]

ROWS_CPU = 128
ROWS_CUDA = 128
"""Of a batch; on a CPU the products of fewer rows take as long.  Measured with pocket on two cores: docs/log.md."""
FIXED_ROWS = 64
PIECE_TOKENS_CPU = 4096
"""Of prompts in one forward."""
PIECE_TOKENS_CUDA = 8192
CACHE_BYTES_CPU = 2 << 30
SPARE_COLUMNS = 64
"""Columns beyond the longest row: the rows move left each time these are used up."""


@dataclass(frozen=True, slots=True)
class Request:
    prompt: Sequence[int]
    adapter: str | None = None
    """Name of a loaded adapter; None: the base alone."""


@dataclass(frozen=True, slots=True)
class Answer:
    ids: list[int]
    """Without the stop token."""
    stopped: bool
    """By a stop token, not by max_new_tokens or the end of the context."""


class Engine:
    """Answers requests on a loaded base, with or without adapters."""

    def __init__(
        self, model: nn.Module, *, stop_token_ids: Sequence[int], pad_token_id: int, context_tokens: int | None
    ) -> None:
        """model: plain, or PEFT's with any number of adapters loaded.  Answers end where `context_tokens` ends.

        Whether the base's rows can be slots is not believed but tried, with a few small forwards.
        """
        from onlay.generation.prove import Proven, prove_slots

        self.model = model
        self._stops, self._pad, self._context = frozenset(stop_token_ids), pad_token_id, context_tokens
        self.notes: dict[str, str] = {}
        """What is not done the fast way, and why: `batch`, `adapters`, `fused_steps`, `cuda_graph`."""
        self._slots: Proven = prove_slots(model, context_tokens=context_tokens)
        if self._slots.failure is not None:
            self.notes["batch"] = f"fixed groups with the base's own cache, because {self._slots.failure}"
        elif self._slots.fused is not None and next(model.parameters()).device.type == "cuda":
            self.notes["fused_steps"] = f"steps run on the base's own modules: {self._slots.fused}"
        self._by_row = False
        self._look()

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the loaded adapters, as they are now."""
        from onlay.generation.adapters import loaded_adapters

        return loaded_adapters(self.model)

    def generate(
        self,
        requests: Sequence[Request],
        *,
        sampling: Sampling,
        on_token: Callable[[int, int], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Answer]:
        """Answers in the order of the requests.

        An answer is a function of sampling, the request and its index, but for the rounding of batches of other sizes.
        `on_token(index, id)` is called with each new id but the stop token; `progress(done, total)` counts requests.
        Raises DataError for an adapter that is not loaded and a prompt that is empty or fills the context, and
        BaseModelError for a base that an adapter's biases have overwritten.
        """
        import torch

        from onlay.generation.adapters import RowAdapters, base_of, refuse_mixing, switched

        self._look()
        self._check(requests)
        refuse_mixing(self.model, {request.adapter for request in requests})
        answers: dict[int, Answer] = {}

        def done(index: int, ids: list[int], stopped: bool) -> None:
            answers[index] = Answer(ids, stopped)
            if progress is not None:
                progress(len(answers), len(requests))

        tell: dict[str, Any] = {"sampling": sampling, "on_token": on_token, "on_done": done}
        groups = self._groups(requests)
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode():
                for adapter, indices in groups:
                    jobs = {i: requests[i] for i in indices}
                    with ExitStack() as stack:
                        rows, base = None, base_of(self.model)
                        # Switched adapters compute in two precisions, which the fused steps were not tried with.
                        fused = self._slots.steps if self._by_row or not self.adapters else None
                        if self._by_row:
                            shared = fused.groups if fused is not None else []
                            rows = stack.enter_context(RowAdapters(self.model, groups=shared))
                            rows.expect([request.adapter for request in jobs.values()])
                        else:
                            stack.enter_context(switched(self.model, adapter))
                            stack.enter_context(_sixteen_bit(self.model))
                        if fused is not None:
                            stack.enter_context(fused.use(rows))
                        self._answer(base, jobs, rows, tell)
        finally:
            self.model.train(was_training)
        return [answers[i] for i in range(len(requests))]

    def _look(self) -> None:
        """How the adapters that are loaded now are told apart in a batch."""
        from onlay.generation.adapters import why_not_by_row

        reason = why_not_by_row(self.model) if self.adapters else None
        if self._slots.failure is not None:
            reason = "the base answers in fixed groups"
        self._by_row = bool(self.adapters) and reason is None
        self.notes.pop("adapters", None)
        if self.adapters and reason is not None:
            self.notes["adapters"] = f"one adapter at a time, because {reason}"

    def _check(self, requests: Sequence[Request]) -> None:
        loaded = self.adapters
        for index, request in enumerate(requests):
            if request.adapter is not None and request.adapter not in loaded:
                raise DataError(
                    f"Request {index} asks for adapter {request.adapter}, which is not loaded.",
                    f"Loaded are: {', '.join(loaded)}." if loaded else "Load it first: this is the base alone.",
                )
            if not request.prompt:
                raise DataError(f"The prompt of request {index} has no tokens.", "Give at least one token.")
            if self._context is not None and len(request.prompt) >= self._context:
                raise DataError(
                    f"The prompt of request {index} has {len(request.prompt):,} tokens; the context is {self._context:,}, "
                    "answer included.",
                    "Shorten it.",
                )

    def _groups(self, requests: Sequence[Request]) -> list[tuple[str | None, list[int]]]:
        """Which requests are answered together: all of them, or those of each adapter."""
        if self._by_row:
            return [(None, list(range(len(requests))))] if requests else []
        groups: dict[str | None, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(request.adapter, []).append(index)
        return list(groups.items())

    def _answer(self, base: Any, jobs: dict[int, Request], rows: Any, tell: dict[str, Any]) -> None:
        from onlay.generation.decode import Job, Loop
        from onlay.generation.fixed import generate_fixed
        from onlay.generation.slots import Slots, attention

        sampling: Sampling = tell["sampling"]
        if sampling.max_new_tokens == 0:
            for index in jobs:
                tell["on_done"](index, [], False)
            return
        on_cuda = next(base.parameters()).device.type == "cuda"
        longest = max(len(request.prompt) for request in jobs.values()) + sampling.max_new_tokens
        longest = min(longest, self._context or longest)
        if self._slots.failure is not None or longest > (self._slots.alone_over or longest):
            # Rotary frequencies that change with the longest row of a batch: such rows are answered alone.
            alone = longest > (self._slots.alone_over or longest)
            if alone:
                self.notes["batch"] = (
                    f"each row alone, because rows of over {self._slots.alone_over:,} tokens change the others"
                )
            generate_fixed(
                base, {i: request.prompt for i, request in jobs.items()}, stops=self._stops, pad=self._pad,
                context_tokens=self._context, rows=1 if alone else min(ROWS_CPU, FIXED_ROWS), pads=self._slots.pads, **tell,
            )  # fmt: skip
            return
        piece_tokens = PIECE_TOKENS_CUDA if on_cuda else PIECE_TOKENS_CPU
        columns = longest + 1 + SPARE_COLUMNS
        columns += -columns % (64 if on_cuda else 1)
        width = min(len(jobs), self._width(columns))
        order = sorted(jobs, key=lambda i: -len(jobs[i].prompt))
        if rows is not None and not rows.all_stacked:
            # Few adapters in a batch at a time.
            order = sorted(order, key=lambda i: jobs[i].adapter or "")
        slots = Slots(base, rows=width, columns=columns, longest=longest, piece_tokens=piece_tokens, graphs=on_cuda)
        with attention(base, self._slots.attention):
            Loop(
                slots=slots, stops=self._stops, piece_tokens=piece_tokens, adapters=rows, lag=int(on_cuda),
                jobs={i: Job(
                    prompt=jobs[i].prompt, adapter=jobs[i].adapter,
                    max_tokens=min(sampling.max_new_tokens, (self._context or longest) - len(jobs[i].prompt)),
                ) for i in order},
                **tell,
            ).run()  # fmt: skip
        if slots.graph_failure is not None:
            self.notes["cuda_graph"] = f"a step is not captured: {slots.graph_failure}"

    def _width(self, columns: int) -> int:
        """Rows of a batch: as many as pay, and as the memory has room for."""
        import torch

        device = next(self.model.parameters()).device
        if device.type != "cuda":
            rows, room = ROWS_CPU, CACHE_BYTES_CPU
        else:
            rows, room = ROWS_CUDA, torch.cuda.mem_get_info(device)[0] // 2
        return max(1, min(rows, room // max(1, columns * self._slots.bytes_a_token)))


def _sixteen_bit(model: nn.Module) -> AbstractContextManager[Any]:
    """The precision of training: adapters in float32 over a 16-bit base work through autocast there too."""
    import torch

    dtypes = {p.dtype for p in model.parameters()}
    device: torch.device = next(model.parameters()).device
    half = next((d for d in (torch.bfloat16, torch.float16) if d in dtypes), None)
    return torch.autocast(device.type, dtype=half) if half is not None and len(dtypes) > 1 else nullcontext()
