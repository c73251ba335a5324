"""Systems that answer the same questions from one loaded base: the base, its adapters, the base with a prompt or examples.

A system is an adapter (or none) and what is put before a question.  All of them answer in one batch of the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from onlay.data.read import Conversation, Turn
from onlay.errors import DataError, RecipeError
from onlay.generation.engine import Engine, Request, Sampling

if TYPE_CHECKING:
    from torch import nn

    from onlay.data.template import ChatTemplate
    from onlay.evaluation.likelihood import Passage, RowNats

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class System:
    name: str
    told: str
    """What it is, in words."""
    adapter: str | None = None
    """Its name in the engine; None: the base alone."""
    prompt: str | None = None
    """System message in place of the question's own."""
    shots: tuple[Conversation, ...] = ()
    """Shown before the question, answers included."""

    @property
    def is_plain(self) -> bool:
        """Whether it is a model of its own: nothing is put before a question."""
        return self.prompt is None and not self.shots


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What is asked, and what should be answered."""

    turns: tuple[Turn, ...]
    tools: tuple[dict[str, Any], ...] = ()
    expected: str
    place: str


@dataclass(frozen=True, slots=True)
class Said:
    text: str
    tokens: int
    stopped: bool


def questions_of(rows: Sequence[Conversation], *, template: ChatTemplate) -> list[Question]:
    """Each conversation up to its last answer, which is expected; those that end otherwise ask nothing and are left out."""
    found = []
    for row in rows:
        *turns, last = row.turns
        if last.role != "assistant" or not turns:
            continue
        expected = last.content
        if last.tool_calls or last.reasoning:  # As the template writes them.
            ids = template.encode(row).ids[len(template.encode_prompt(turns, row.tools)) :]
            expected = template.tokenizer.decode(ids, skip_special_tokens=True)
        found.append(Question(turns=tuple(turns), tools=row.tools, expected=expected.strip(), place=row.place))
    return found


class Bench:
    """A loaded model, asked as several systems."""

    def __init__(
        self,
        model: nn.Module,
        *,
        template: ChatTemplate,
        stop_token_ids: Sequence[int],
        pad_token_id: int,
        context_tokens: int | None,
    ) -> None:
        """`context_tokens`: of the base; None where it has no limit."""
        self.model, self.template, self.tokenizer = model, template, template.tokenizer
        self._pad, self.context_tokens = pad_token_id, context_tokens
        self.engine = Engine(
            model, stop_token_ids=stop_token_ids, pad_token_id=pad_token_id, context_tokens=context_tokens
        )

    # ------------------------------------------------------------------------------------------------------ answers

    def encode(self, system: System, question: Question) -> list[int]:
        turns = list(question.turns)
        if system.prompt is not None:
            turns = [Turn("system", system.prompt), *(turn for turn in turns if turn.role != "system")]
        own = [turn for turn in turns if turn.role == "system"]
        shown = [turn for shot in system.shots for turn in shot.turns if turn.role != "system"]
        return self.template.encode_prompt(
            [*own, *shown, *(turn for turn in turns if turn.role != "system")], question.tools
        )

    def room(self, systems: Sequence[System], questions: Sequence[Question], *, new_tokens: int) -> list[bool]:
        """Which questions every system can answer with `new_tokens` within the context."""
        if self.context_tokens is None:
            return [True] * len(questions)
        longest = [max(len(self.encode(system, question)) for system in systems) for question in questions]
        return [tokens + new_tokens <= self.context_tokens for tokens in longest]

    def shots_that_fit(
        self, shots: Sequence[Conversation], questions: Sequence[Question], *, new_tokens: int
    ) -> tuple[Conversation, ...]:
        """The first of `shots`, as many as leave room for every question that fits without them.  Raises RecipeError."""
        plain = System(name="base", told="")
        fits = self.room([plain], questions, new_tokens=new_tokens)
        asked = [question for question, fit in zip(questions, fits, strict=True) if fit]
        for count in range(len(shots), 0, -1):
            some = System(name="few-shot", told="", shots=tuple(shots[:count]))
            if all(self.room([some], asked, new_tokens=new_tokens)):
                return tuple(shots[:count])
        raise RecipeError(
            f"evaluation.baselines holds few-shot, but not one example fits before the longest question: the context is {self.context_tokens:,} tokens.",
            "Take few-shot off the list, or lower evaluation.max_new_tokens.",
        )

    def answer(
        self,
        systems: Sequence[System],
        questions: Sequence[Question],
        *,
        sampling: Sampling,
        progress: Progress | None = None,
    ) -> dict[str, list[Said]]:
        """By system, in the order of the questions; all in one batch.  Raises DataError for a question beyond the context."""
        requests = [
            Request(self.encode(system, question), system.adapter) for system in systems for question in questions
        ]
        answers = self.engine.generate(requests, sampling=sampling, progress=progress)
        said = [
            Said(self.tokenizer.decode(answer.ids, skip_special_tokens=True), len(answer.ids), answer.stopped)
            for answer in answers
        ]
        size = len(questions)
        return {system.name: said[i * size : (i + 1) * size] for i, system in enumerate(systems)}

    # --------------------------------------------------------------------------------------------------- likelihoods

    def nats(self, system: System, passages: Sequence[Passage], *, progress: Progress | None = None) -> RowNats:
        """How likely a plain system finds passages."""
        from onlay.evaluation.likelihood import row_nats
        from onlay.generation.adapters import switched

        assert system.is_plain
        within = partial(switched, self.model, system.adapter)
        return row_nats(self.model, passages, pad_token_id=self._pad, within=within, progress=progress)

    def held_out_passages(self, examples: Sequence[tuple[Any, Any]]) -> list[Passage]:
        from onlay.evaluation.likelihood import passages_of_examples

        return passages_of_examples(examples, decode=self._decode)

    def text_passages(self, texts: Sequence[str]) -> list[Passage]:
        from onlay.evaluation.likelihood import passages_of_texts

        return passages_of_texts(
            texts, encode=self._encode, decode=self._decode, window_tokens=self._window, bos_id=self._bos
        )

    def continuations(
        self, system: System, pairs: Sequence[tuple[str, str]], *, progress: Progress | None = None
    ) -> list[float]:
        """Log-probability in nats of each continuation after its context."""
        return [-float(nats) for nats in self.continuation_nats(system, pairs, progress=progress).nats]

    def continuation_nats(
        self, system: System, pairs: Sequence[tuple[str, str]], *, progress: Progress | None = None
    ) -> RowNats:
        """Nats of each continuation after its context.  Raises DataError for one beyond the base's context."""
        from onlay.evaluation.likelihood import Passage

        passages = []
        for context, continuation in pairs:
            before = self._encode(context)
            ids = self._encode(context + continuation)
            # Tokens may span the border: whatever differs from the context alone is of the continuation.
            shared = next((i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), len(before))
            shared = min(shared, len(ids) - 1)
            if self._bos is not None:
                ids, shared = [self._bos, *ids], shared + 1
            if self.context_tokens is not None and len(ids) > self.context_tokens:
                raise DataError(
                    f"A check of {len(ids):,} tokens is longer than the context of {self.context_tokens:,}: {context[:60]!r}.",
                    "Shorten it, or leave its file out.",
                )
            flags = [False] * max(shared, 1) + [True] * (len(ids) - max(shared, 1))
            passages.append(Passage(((ids, flags),), len(continuation.encode())))
        return self.nats(system, passages, progress=progress)

    def complete(self, system: System, text: str, *, sampling: Sampling) -> str:
        """What follows a bare text, without the template."""
        ids = self._encode(text)
        ids = [self._bos, *ids] if self._bos is not None else ids
        [answer] = self.engine.generate([Request(ids, system.adapter)], sampling=sampling)
        return self._decode(answer.ids)

    @property
    def _window(self) -> int:
        """Longest piece of plain text: that of training's default, where the context is longer."""
        return min(self.context_tokens or 4096, 4096)

    @cached_property
    def _bos(self) -> int | None:
        """What the tokenizer puts before plain text itself; where it does not, the base never saw one there."""
        first = self.tokenizer("a")["input_ids"][:1]
        bos = self.tokenizer.bos_token_id
        return bos if first == [bos] and bos is not None else None

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))
