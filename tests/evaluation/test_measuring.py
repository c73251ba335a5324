"""Who is asked what, with a stand-in for the loaded model; the real one is in test_systems.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from onlay.data.read import Conversation, Turn
from onlay.evaluation import measuring
from onlay.evaluation.general import Check
from onlay.evaluation.harness import Wanted
from onlay.evaluation.likelihood import RowNats
from onlay.evaluation.measuring import SAFETY_TOKENS, Material, Measurements, measure_systems
from onlay.evaluation.safety import SafetyPrompt
from onlay.evaluation.systems import Question, Said, System
from onlay.generation.engine import Sampling

ADAPTER = System(name="adapter", told="", adapter="default")
BASE = System(name="base", told="")
PROMPT = System(name="prompt", told="", prompt="Be kind.")
FEW = System(name="few-shot", told="", shots=(Conversation((Turn("user", "a"), Turn("assistant", "b"))),))
SAMPLING = Sampling(max_new_tokens=20, temperature=0.7, seed=3)
QUESTIONS = [Question(turns=(Turn("user", f"{i}?"),), expected="yes", place=f"rows:{i}") for i in range(6)]
CHECKS = [Check("1 + 1?", ("2", "three"), 0, "", "c:1"), Check("2 + 2?", ("5", "four"), 1, "", "c:2")]


class StandIn:
    """Answers with the system's name, and remembers what it was asked."""

    def __init__(self, *, tokens: int = 4, stopped: bool = True) -> None:
        self.model, self.engine = torch.nn.Linear(1, 1), SimpleNamespace(notes={"batch": "fixed groups"})
        self.asked: list[tuple[tuple[str, ...], tuple[Question, ...], Sampling]] = []
        self.completed: list[tuple[str, str, Sampling]] = []
        self.likelihoods: list[tuple[str, int]] = []
        self.said = (tokens, stopped)

    def answer(
        self, systems: Any, questions: Any, *, sampling: Sampling, progress: Any = None
    ) -> dict[str, list[Said]]:
        self.asked.append((tuple(system.name for system in systems), tuple(questions), sampling))
        if progress is not None:
            progress(len(questions), len(questions))
        return {system.name: [Said(system.name, *self.said) for _ in questions] for system in systems}

    def held_out_passages(self, examples: Any) -> list[Any]:
        return list(examples)

    def text_passages(self, texts: Any) -> list[Any]:
        return list(texts)

    def nats(self, system: System, passages: Any, *, progress: Any = None) -> RowNats:
        assert system.is_plain
        self.likelihoods.append((system.name, len(passages)))
        count = len(passages)
        return RowNats(np.full(count, 1.5), np.ones(count, dtype=np.int64), np.ones(count, dtype=np.int64),
                       np.ones(count, dtype=bool), "how")  # fmt: skip

    def continuation_nats(self, system: System, pairs: Any, *, progress: Any = None) -> RowNats:
        return self.nats(system, pairs)

    def continuations(self, system: System, pairs: Any, *, progress: Any = None) -> list[float]:
        # By the sum the longer choices are likelier, with the adapter; for the base the shorter.
        return [len(choice) ** 2 if system.adapter else -(len(choice) ** 2) for _, choice in pairs]

    def complete(self, system: System, text: str, *, sampling: Sampling) -> str:
        self.completed.append((system.name, text, sampling))
        return "done"


def material(**changes: Any) -> Material:
    return Material(**({"questions": QUESTIONS, "held_out": [], "sampling": SAMPLING} | changes))


def measured(bench: StandIn, systems: list[System], into: Measurements | None = None, **changes: Any) -> Measurements:
    found = into or Measurements()
    told = changes.pop("tell", lambda what, done, total: None)
    stand_in: Any = bench
    measure_systems(stand_in, systems, material(**changes), found, judged="adapter", tell=told)
    return found


def test_all_systems_are_asked_in_one_batch_and_only_plain_ones_the_rest() -> None:
    bench = StandIn()
    prompts = [SafetyPrompt("harm?", True, "", "s:1")]
    counted: list[str] = []
    found = measured(
        bench, [ADAPTER, BASE, PROMPT, FEW], prompts=prompts, held_out=["x", "y"], texts={"general": ["a", "b", "c"]},
        checks={"general checks": CHECKS}, tell=lambda what, done, total: counted.append(what),
    )  # fmt: skip
    assert [(names, len(questions)) for names, questions, _ in bench.asked] == [
        (("adapter", "base", "prompt", "few-shot"), 6), (("adapter", "base"), 1)
    ]  # fmt: skip
    assert set(found.said) == {"adapter", "base", "prompt", "few-shot"}
    assert set(found.refusals) == set(found.held_out) == set(found.texts["general"]) == {"adapter", "base"}
    assert bench.likelihoods == [("adapter", 2), ("adapter", 3), ("base", 2), ("base", 3)]
    assert [one.chosen for one in found.checks["general checks"]["adapter"]] == [1, 1]
    assert [one.chosen for one in found.checks["general checks"]["base"]] == [0, 0]
    assert counted == ["answering held-out rows", "answering safety prompts"]
    half = "50.0% right by characters, 50.0% by the plain sum; guessing would reach 50.0%"
    assert found.notes == {
        "batch": "fixed groups", "likelihood": "how", "general checks, adapter": half, "general checks, base": half,
    }  # fmt: skip
    assert (found.latency_ms, found.device) == (None, torch.device("cpu"))


def test_safety_prompts_are_asked_briefly_and_as_the_recipe_asks_its_rows() -> None:
    bench = StandIn()
    prompts = [SafetyPrompt("harm?", True, "", "s:1")]
    measured(bench, [BASE], questions=[], prompts=prompts, system_message="Be brief.")
    [(_, [question], sampling)] = bench.asked
    assert question.turns == (Turn("system", "Be brief."), Turn("user", "harm?"))
    assert (sampling.max_new_tokens, sampling.temperature, sampling.seed) == (SAFETY_TOKENS, 0.0, 3)


def test_nothing_is_asked_where_there_is_nothing_to_ask() -> None:
    bench = StandIn()
    found = measured(bench, [ADAPTER, BASE], questions=[], timed=True)
    assert (bench.asked, bench.likelihoods, found.said, found.held_out, found.latency_ms) == ([], [], {}, {}, None)


def test_a_second_model_adds_its_systems() -> None:
    found = measured(StandIn(), [BASE], held_out=["x"], texts={"general": ["a"]}, checks={"all": CHECKS})
    measured(StandIn(), [ADAPTER], into=found, held_out=["x"], texts={"general": ["a"]}, checks={"all": CHECKS})
    assert list(found.said) == list(found.held_out) == list(found.texts["general"]) == list(found.checks["all"])
    assert list(found.said) == ["base", "adapter"]


# -------------------------------------------------------------------------------------------------------------- latency


@pytest.mark.parametrize(("tokens", "stopped", "expected"), [(4, True, 600.0), (4, False, 750.0), (0, False, None)])
def test_a_token_is_timed_one_row_at_a_time_for_the_judged_system_alone(
    tokens: int, stopped: bool, expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Answers take 1, 2, 3 and 9 seconds: the upper of the middle two counts, its stop token with it.
    now = iter([0.0, 1.0, 10.0, 12.0, 20.0, 23.0, 30.0, 39.0])
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: next(now))
    bench = StandIn(tokens=tokens, stopped=stopped)
    found = measured(bench, [BASE, ADAPTER], timed=True)
    assert found.latency_ms == (pytest.approx(expected) if expected is not None else None)
    assert [(names, len(questions)) for names, questions, _ in bench.asked[1:]] == [(("adapter",), 1)] * 4
    other = StandIn()
    assert measured(other, [BASE], timed=True).latency_ms is None
    assert len(other.asked) == 1


def test_no_answer_is_timed_unasked() -> None:
    bench = StandIn()
    assert measured(bench, [ADAPTER]).latency_ms is None
    assert len(bench.asked) == 1


# ---------------------------------------------------------------------------------------------------------------- tasks


def test_tasks_are_asked_of_plain_systems_by_the_loaded_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: dict[str, Any] = {}

    def run_tasks(tasks: Any, *, systems: Any, include_path: Path | None) -> dict[str, Any]:
        given.update(tasks=tasks, systems=systems, path=include_path)
        return {name: {"task": name} for name in systems}

    monkeypatch.setattr(measuring, "run_tasks", run_tasks)
    bench = StandIn()
    found = measured(bench, [ADAPTER, BASE, PROMPT], tasks=["own"], tasks_path=tmp_path)
    assert (given["tasks"], given["path"], list(given["systems"])) == (["own"], tmp_path, ["adapter", "base"])
    assert set(found.tasks) == {"adapter", "base"}
    abilities = given["systems"]["adapter"]
    [one] = abilities.score([("a", " b")])
    assert (one.log_probability, one.greedy) == (-1.5, True)
    assert abilities.score_text(["a", "b"]) == [-1.5, -1.5]
    assert {name for name, _ in bench.likelihoods} == {"adapter"}
    wanted = Wanted(prompt="Q:", max_new_tokens=9, stops=("\n",), temperature=0.5, top_p=0.8)
    assert abilities.generate([wanted]) == ["done"]
    [(name, text, sampling)] = bench.completed
    assert (name, text) == ("adapter", "Q:")
    assert sampling == Sampling(max_new_tokens=9, temperature=0.5, top_p=0.8, seed=3)
