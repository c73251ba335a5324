"""The decoding loop over slots: waiting prompts take the rows of finished ones while the others go on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from onlay.generation.sampling import Sampler, Sampling
from onlay.generation.slots import Slots


class Rows(Protocol):
    """What is told which adapter each row has: onlay/generation/adapters.py."""

    def put(self, rows: Sequence[str | None]) -> bool: ...

    def only(self, rows: Sequence[str | None]) -> Any: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    prompt: Sequence[int]
    adapter: str | None
    max_tokens: int
    """New ones, as many as were asked for and the context has room for."""


@dataclass(slots=True)
class Loop:
    """Answers jobs, a batch of rows at a time."""

    slots: Slots
    sampling: Sampling
    jobs: dict[int, Job]
    """By the index of the request, in the order in which they are admitted."""
    stops: frozenset[int]
    piece_tokens: int
    adapters: Rows | None
    """None: all jobs have what the model has switched on."""
    on_token: Callable[[int, int], None] | None
    on_done: Callable[[int, list[int], bool], None]
    lag: int
    """Steps by which tokens are read late, so that the device does not wait for the host: 1 on a GPU, else 0."""
    _owners: list[int | None] = field(init=False)
    """The job of each row."""
    _worn: list[str | None] = field(init=False)
    """The adapter of each row; a free one keeps its last."""
    _answers: dict[int, list[int]] = field(init=False)
    _unread: deque[tuple[list[int | None], Tensor, Any]] = field(init=False)

    def run(self) -> None:
        rows, device = self.slots.rows, self.slots.device
        self._owners, self._worn = [None] * rows, [None] * rows
        self._answers, self._unread = {}, deque()
        waiting = deque(self.jobs)
        sampler = Sampler(self.sampling, rows=rows, device=device)
        ids = torch.zeros(rows, dtype=torch.long, device=device)
        # One prompt at a time would make every step wait for a small prefill.
        least = max(1, rows // 8)
        while waiting or self._active():
            free = [row for row, owner in enumerate(self._owners) if owner is None]
            if waiting and (len(free) >= min(least, len(waiting)) or len(free) == self.slots.rows):
                while waiting and free:
                    self._admit(waiting, free, sampler, ids)
            elif not waiting and len(free) > self.slots.rows // (2 if self.lag else 4):
                ids = self._shrink(sampler, ids)
            if active := self._active():
                ids = sampler.choose(self.slots.step(ids, active=active))
                self._unread.append((list(self._owners), *_begin_read(ids)))
            self._read(self.lag if self._active() else 0)

    def _active(self) -> list[int]:
        return [row for row, owner in enumerate(self._owners) if owner is not None]

    def _admit(self, waiting: deque[int], free: list[int], sampler: Sampler, ids: Tensor) -> None:
        """As many waiting jobs as there are free rows for and one forward takes."""
        indices: list[int] = []
        longest = 0
        while waiting and len(indices) < len(free):
            longest = max(longest, len(self.jobs[waiting[0]].prompt))
            if indices and longest * (len(indices) + 1) > self.piece_tokens:
                break
            indices.append(waiting.popleft())
        rows, active = free[: len(indices)], self._active()
        del free[: len(indices)]
        prompts = [self.jobs[i].prompt for i in indices]
        worn = [self.jobs[i].adapter for i in indices]
        for row, i, adapter in zip(rows, indices, worn, strict=True):
            self._owners[row], self._worn[row] = i, adapter
            self._answers[i] = []
        if self.adapters is None:
            logits = self.slots.admit(rows, prompts, active=active)
        else:
            used = [name if self._owners[row] is not None else None for row, name in enumerate(self._worn)]
            if self.adapters.put(used):
                self.slots.forget_graphs()
            with self.adapters.only(worn):
                logits = self.slots.admit(rows, prompts, active=active)
        at = torch.tensor(rows, device=ids.device)
        sampler.admit(at, indices=indices, prompts=prompts, vocabulary=logits.shape[-1])
        first = sampler.choose(logits, at)
        ids[at] = first
        for i, row, token in zip(indices, rows, first.tolist(), strict=True):
            self._take(i, row, token)

    def _shrink(self, sampler: Sampler, ids: Tensor) -> Tensor:
        """Nothing waits any more: the rows that are done need not be computed along."""
        self._read(0)
        active = self._active()
        if not active:
            return ids
        at = torch.tensor(active, device=ids.device)
        self.slots.keep(active)
        sampler.keep(at)
        self._owners = [self._owners[row] for row in active]
        self._worn = [self._worn[row] for row in active]
        if self.adapters is not None:
            self.adapters.put(self._worn)
        return ids[at]

    def _read(self, keep: int) -> None:
        """Takes the tokens of all steps but the last `keep`."""
        while len(self._unread) > keep:
            owners, ids, event = self._unread.popleft()
            if event is not None:
                event.synchronize()
            for row, (owner, token) in enumerate(zip(owners, ids.tolist(), strict=True)):
                # A row may have ended, and begun another job, since this step was begun.
                if owner is not None and self._owners[row] == owner:
                    self._take(owner, row, token)

    def _take(self, index: int, row: int, token: int) -> None:
        answer = self._answers[index]
        stopped = token in self.stops
        if not stopped:
            answer.append(token)
            if self.on_token is not None:
                self.on_token(index, token)
        if stopped or len(answer) == self.jobs[index].max_tokens:
            self._owners[row] = None
            self.on_done(index, self._answers.pop(index), stopped)


def _begin_read(ids: Tensor) -> tuple[Tensor, Any]:
    """The ids on their way to the host, and what says that they have arrived."""
    if ids.device.type != "cuda":
        return ids, None
    host = torch.empty(ids.shape, dtype=ids.dtype, pin_memory=True).copy_(ids, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event
