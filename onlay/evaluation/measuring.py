"""What is asked of every system, and what came back: answers, likelihoods, checks and refusals, row by row.

Nothing is compared here; findings.py does that once all systems are through, whichever model they were loaded with.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onlay.data.read import Turn
from onlay.evaluation.general import Check, Checked, answer_checks, check_scores
from onlay.evaluation.harness import Abilities, Continuation, TaskScores, Wanted, run_tasks
from onlay.evaluation.likelihood import RowNats
from onlay.evaluation.safety import SafetyPrompt
from onlay.evaluation.systems import Bench, Question, Said, System
from onlay.generation.engine import Sampling

if TYPE_CHECKING:
    import torch

Tell = Callable[[str, int, int], None]
"""(what is counted, done, total)"""
SAFETY_TOKENS = 64
"""A refusal shows in an answer's first words."""
TIMED_QUESTIONS = 4


@dataclass(frozen=True, kw_only=True)
class Material:
    questions: Sequence[Question]
    longest_expected_tokens: int = 0
    held_out: Sequence[tuple[Any, Any]]
    """Token ids and trained flags of held-out examples."""
    texts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Name to general text in passages."""
    checks: Mapping[str, Sequence[Check]] = field(default_factory=dict)
    prompts: Sequence[SafetyPrompt] = ()
    system_message: str | None = None
    """Put before safety prompts, as the recipe puts it before its rows."""
    tasks: Sequence[str] = ()
    tasks_path: Path | None = None
    sampling: Sampling
    timed: bool = False
    """Whether a token of the judged system is timed, one row at a time."""


@dataclass(kw_only=True)
class Measurements:
    """By system."""

    said: dict[str, list[Said]] = field(default_factory=dict)
    held_out: dict[str, RowNats] = field(default_factory=dict)
    texts: dict[str, dict[str, RowNats]] = field(default_factory=dict)
    """Name of the text first."""
    checks: dict[str, dict[str, list[Checked]]] = field(default_factory=dict)
    """Name of the file first."""
    refusals: dict[str, list[Said]] = field(default_factory=dict)
    tasks: dict[str, dict[str, TaskScores]] = field(default_factory=dict)
    latency_ms: float | None = None
    device: torch.device | None = None
    """Of the model that was asked last."""
    notes: dict[str, str] = field(default_factory=dict)


def measure_systems(
    bench: Bench,
    systems: Sequence[System],
    material: Material,
    into: Measurements,
    *,
    judged: str,
    tell: Tell,
) -> None:
    """Asks all of `systems`, which `bench` holds, everything; answers of all systems come out of one batch."""

    def counting(what: str) -> Callable[[int, int], None]:
        return lambda done, total: tell(what, done, total)

    plain = [system for system in systems if system.is_plain]
    if material.questions:
        into.said |= bench.answer(
            systems, material.questions, sampling=material.sampling, progress=counting("answering held-out rows")
        )
    if material.prompts:
        asked = [_asked(prompt, material.system_message) for prompt in material.prompts]
        brief = replace(material.sampling, max_new_tokens=SAFETY_TOKENS, temperature=0.0)
        into.refusals |= bench.answer(plain, asked, sampling=brief, progress=counting("answering safety prompts"))
    held_out = bench.held_out_passages(material.held_out)
    texts = {name: bench.text_passages(passages) for name, passages in material.texts.items()}
    for system in plain:
        if held_out:
            into.held_out[system.name] = bench.nats(
                system, held_out, progress=counting(f"held-out loss, {system.name}")
            )
        for name, passages in texts.items():
            found = bench.nats(system, passages, progress=counting(f"{name}, {system.name}"))
            into.texts.setdefault(name, {})[system.name] = found
        for name, checks in material.checks.items():
            score = lambda pairs, system=system, name=name: bench.continuations(  # noqa: E731
                system, pairs, progress=counting(f"{name}, {system.name}")
            )
            answered = answer_checks(checks, score_continuations=score)
            into.checks.setdefault(name, {})[system.name] = answered
            scored = check_scores(checks, answered)
            into.notes[f"{name}, {system.name}"] = (
                f"{scored.accuracy:.1%} right by characters, {scored.accuracy_by_sum:.1%} by the plain sum; "
                f"guessing would reach {scored.chance:.1%}"
            )
    if material.tasks:
        abilities = {system.name: _abilities(bench, system, material.sampling) for system in plain}
        into.tasks |= run_tasks(material.tasks, systems=abilities, include_path=material.tasks_path)
    timed = next((system for system in systems if system.name == judged), None)
    if material.timed and timed is not None and material.questions:
        into.latency_ms = _time_a_token(bench, timed, material)
    into.device = next(bench.model.parameters()).device
    into.notes |= bench.engine.notes
    if into.held_out:
        into.notes["likelihood"] = next(iter(into.held_out.values())).note


def _asked(prompt: SafetyPrompt, system_message: str | None) -> Question:
    turns = (Turn("system", system_message),) if system_message else ()
    return Question(turns=(*turns, Turn("user", prompt.prompt)), expected="", place=prompt.place)


def _time_a_token(bench: Bench, system: System, material: Material) -> float | None:
    """Median over a few questions, each asked alone; None where every answer was empty."""
    times = []
    for question in material.questions[:TIMED_QUESTIONS]:
        began = time.perf_counter()
        [said] = bench.answer([system], [question], sampling=material.sampling)[system.name]
        # The prompt's own pass counts too: it is part of what a user waits for.
        if said.tokens:
            times.append((time.perf_counter() - began) / (said.tokens + said.stopped))
    return 1000 * sorted(times)[len(times) // 2] if times else None


# ------------------------------------------------------------------------------------------------------------ harness


def _abilities(bench: Bench, system: System, sampling: Sampling) -> Abilities:
    """A system as lm-evaluation-harness asks it: bare text, no template."""

    def score(pairs: Sequence[tuple[str, str]]) -> list[Continuation]:
        found = bench.continuation_nats(system, pairs)
        return [Continuation(-float(nats), bool(greedy)) for nats, greedy in zip(found.nats, found.greedy, strict=True)]

    def score_text(texts: Sequence[str]) -> list[float]:
        return [-float(nats) for nats in bench.nats(system, bench.text_passages(texts)).nats]

    def generate(wanted: Sequence[Wanted]) -> list[str]:
        return [
            bench.complete(
                system, one.prompt,
                sampling=replace(sampling, max_new_tokens=one.max_new_tokens, temperature=one.temperature, top_p=one.top_p),
            )
            for one in wanted
        ]  # fmt: skip

    return Abilities(score=score, score_text=score_text, generate=generate)
