"""MMLU, HellaSwag or any other task of lm-evaluation-harness, by the functions of a model that is loaded already.

The harness (pip install "onlay[harness]") brings the tasks and their scores; base and adapters answer from one load.
Tasks fetch their data from the hub; without a network, give `include_path`: a folder of YAML tasks whose data are local,

    task: my_task
    dataset_path: json
    dataset_kwargs: {data_files: {test: /data/my_task.jsonl}}
    test_split: test
    output_type: multiple_choice
    doc_to_text: "{{question}}"
    doc_to_choice: "{{choices}}"
    doc_to_target: answer
"""

from __future__ import annotations

import difflib
import importlib.util
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onlay.errors import DataError, SetupError

INSTALL = 'pip install "onlay[harness]"'
MAX_NEW_TOKENS = 256
"""Where a task does not say how long an answer may be: the harness's own default."""
LENGTH_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@dataclass(frozen=True, slots=True)
class Continuation:
    """How likely a continuation is after its context."""

    log_probability: float
    """Nats, summed over its tokens."""
    greedy: bool
    """Whether each of its tokens is the likeliest one at its place."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """One answer that a task asks for, cut by this module at the first of its stop texts."""

    prompt: str
    max_new_tokens: int
    stops: tuple[str, ...]
    """An engine that can stop at texts may stop there; it need not."""
    temperature: float
    top_p: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Abilities:
    """What one system can do, as functions of a loaded model.  Prompts are taken as they are, without a template."""

    score: Callable[[Sequence[tuple[str, str]]], Sequence[Continuation]]
    """(context, continuation); an empty context stands for the beginning of a text."""
    score_text: Callable[[Sequence[str]], Sequence[float]]
    """Nats of whole texts, each on its own, longer ones in windows in which each token counts once."""
    generate: Callable[[Sequence[Wanted]], Sequence[str]]
    apply_template: Callable[[list[dict[str, str]], bool], str] | None = None
    """(messages, whether the assistant's turn begins after them) to a prompt; None: `chat` is refused."""
    template_name: str = ""


@dataclass(frozen=True, slots=True)
class TaskScores:
    task: str
    rows: int
    metrics: dict[str, float]
    """Such as `acc,none`: metric and filter, as the harness names them; its standard errors are left out, since systems
    are compared row by row."""
    higher_is_better: dict[str, bool]
    """By metric, without the filter."""
    per_row: dict[str, list[float]]
    """By metric and filter, in the order of the task's documents, for metrics that have one number a row."""
    version: str


def run_tasks(
    tasks: Sequence[str],
    *,
    systems: Mapping[str, Abilities],
    include_path: Path | None = None,
    limit: int | None = None,
    examples_in_context: int | None = None,
    chat: bool = False,
) -> dict[str, dict[str, TaskScores]]:
    """System to task to scores; every system answers the same documents.

    `limit`: the first documents of each task; `examples_in_context`: few-shot examples, None: as the task says; `chat`:
    prompts through the system's template.  Random states of Python, numpy and torch are left as they were.

    Raises SetupError where lm_eval is missing, and DataError for an unknown task or one whose data cannot be read.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise SetupError(
            "Tasks of lm-evaluation-harness need the package lm_eval, which is not installed.", f"{INSTALL}."
        )
    for name, abilities in systems.items():
        if chat and abilities.apply_template is None:
            raise SetupError(f"{name} has no chat template, so the tasks cannot be asked as a chat.", "Leave chat off.")
    from lm_eval.evaluator import simple_evaluate  # type: ignore[import-not-found,unused-ignore]
    from lm_eval.tasks import TaskManager  # type: ignore[import-not-found,unused-ignore]

    own = str(include_path) if include_path is not None else None
    manager = TaskManager(include_path=own, include_defaults=False)
    if not set(tasks) <= set(manager.all_tasks):  # Reading the thousands that it brings takes seconds.
        manager = TaskManager(include_path=own)
    _check_names(tasks, manager.all_tasks)
    found = {}
    for name, abilities in systems.items():
        with _same_random_state():
            try:
                results = simple_evaluate(
                    model=_language_model(abilities), tasks=list(tasks), task_manager=manager, limit=limit,
                    num_fewshot=examples_in_context, apply_chat_template=chat, bootstrap_iters=0, log_samples=True,
                    torch_random_seed=None,
                )  # fmt: skip
            except (
                OSError
            ) as error:  # The hub's and `datasets`' errors of missing data and missing network are OSErrors.
                what = " ".join(str(error).split())[:300]
                raise DataError(
                    f"The data of {', '.join(tasks)} cannot be read: {what}.",
                    "Check the network and HF_HUB_OFFLINE; without a network, name tasks with local data (include_path).",
                ) from None
        found[name] = _scores(results)
    return found


def _check_names(tasks: Sequence[str], known: Sequence[str]) -> None:
    if not tasks:
        raise DataError("No task is named.", "Name one or more, such as hellaswag.")
    for task in tasks:
        if task not in known:
            near = difflib.get_close_matches(task, known, n=3)
            hint = f"Did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists those that it brings."
            raise DataError(f"lm-evaluation-harness has no task {task}.", hint)


@contextmanager
def _same_random_state() -> Iterator[None]:
    """The harness seeds Python's and numpy's global states."""
    import torch

    python, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)


def _scores(results: dict[str, Any]) -> dict[str, TaskScores]:
    """By task; groups such as mmlu beside their parts, without rows of their own."""
    found = {}
    for task, values in {**results["results"], **results.get("groups", {})}.items():
        samples = sorted(results["samples"].get(task, []), key=lambda sample: int(sample["doc_id"]))
        metrics = {
            name: float(value)
            for name, value in values.items()
            if "," in name and "_stderr," not in name and isinstance(value, int | float)
        }
        per_row = {}
        for name in metrics:
            metric, _, filtered = name.partition(",")
            rows = [sample.get(metric) for sample in samples if sample.get("filter", "none") == filtered]
            if rows and all(isinstance(value, int | float) for value in rows):
                per_row[name] = [float(value) for value in rows]
        counts = results["n-samples"].get(task)
        found[task] = TaskScores(
            task=task,
            rows=int(counts["effective"]) if counts else int(values.get("sample_len", 0)),
            metrics=metrics,
            higher_is_better={
                name: better for name, better in results["higher_is_better"].get(task, {}).items() if better is not None
            },
            per_row=per_row,
            version=str(results["versions"].get(task, "")),
        )
    return found


def _language_model(abilities: Abilities) -> Any:
    """The harness's view of a system.  A class inside a function, since its parent may not be installed."""
    from lm_eval.api.model import LM  # type: ignore[import-not-found,unused-ignore]

    class Loaded(LM):  # type: ignore[misc,unused-ignore]
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            scored = abilities.score([request.args for request in requests])
            return [(one.log_probability, one.greedy) for one in scored]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return list(abilities.score_text([request.args[0] for request in requests]))

        def generate_until(self, requests: list[Any]) -> list[str]:
            wanted = [wanted_of(*request.args) for request in requests]
            answers = abilities.generate(wanted)
            return [cut(answer, one.stops) for answer, one in zip(answers, wanted, strict=True)]

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            assert abilities.apply_template is not None
            return abilities.apply_template(chat_history, add_generation_prompt)

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            return abilities.template_name if chat_template else None

        @property
        def tokenizer_name(self) -> str:
            return abilities.template_name or "onlay"

    return Loaded()


def wanted_of(prompt: str, options: Mapping[str, Any]) -> Wanted:
    """A task's generation options.  Raises DataError for one that would be lost: none is left out in silence."""
    given = dict(options)
    stops = given.pop("until", None) or []
    lengths = [given.pop(key) for key in LENGTH_KEYS if given.get(key) is not None]
    sampled = bool(given.pop("do_sample", float(given.get("temperature") or 0) > 0))
    temperature, top_p = float(given.pop("temperature", 1.0) or 0.0), float(given.pop("top_p", 1.0))
    lost = [key for key, value in given.items() if value is not None]
    if lost:
        raise DataError(
            f"The task sets generation_kwargs.{lost[0]}, which this engine does not have.",
            f"Known: until, do_sample, temperature, top_p, {', '.join(LENGTH_KEYS)}; change them in a YAML of your own.",
        )
    return Wanted(
        prompt=prompt,
        max_new_tokens=int(lengths[0]) if lengths else MAX_NEW_TOKENS,
        stops=tuple([stops] if isinstance(stops, str) else stops),
        temperature=temperature if sampled else 0.0,
        top_p=top_p if sampled else 1.0,
    )


def cut(answer: str, stops: Sequence[str]) -> str:
    """The answer up to the first of the stop texts."""
    ends = [at for stop in stops if stop and (at := answer.find(stop)) >= 0]
    return answer[: min(ends)] if ends else answer
