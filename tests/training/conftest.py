"""Runs of a few tenths of a second, through the real session, with faults that a test plants in the parts of the loop."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from onlay.data.pack import collate, plan_micro_batches
from onlay.hardware import Hardware
from onlay.model.load import Base, load_base
from onlay.recipe import Recipe
from onlay.records import Dataset, ModelFacts, Recovery, Run, SplitFacts
from onlay.training import session
from onlay.training.batches import Examples
from onlay.training.devices import find_devices
from onlay.training.loop import Progress, Task, run_loop
from onlay.training.metrics_log import read_metrics
from onlay.training.optimizer import learning_rate_at
from onlay.training.session import Parts, train_adapter
from tests.builders import ListExamples, recipe_for, save_tiny_base, tiny_pad_token_id, tiny_tokenizer

Change = Callable[[Task], Task]
WORDS = 12
NO_GPU = Hardware(devices=[], cpu_cores=2, host_memory_bytes=2**33, platform="test")


def learnable(n: int, *, seed: int = 0, least: int = 8, most: int = 24) -> ListExamples:
    """Counting: each token is the one before it plus one, within a few tokens; easy, but not known beforehand."""
    draw = np.random.default_rng(seed)
    starts, lengths = draw.integers(0, WORDS, n), draw.integers(least, most + 1, n)
    return ListExamples(
        [[65 + (int(s) + i) % WORDS for i in range(int(k))] for s, k in zip(starts, lengths, strict=True)]
    )


@dataclass
class Workshop:
    """Makes runs in one folder, all from the same base."""

    folder: Path
    base: Path
    examples: Examples = field(default_factory=lambda: learnable(40))
    held_out: Examples | None = field(default_factory=lambda: learnable(8, seed=1))
    events: list[Any] = field(default_factory=list)
    """What was reported, over all runs."""

    def recipe(self, **sections: Any) -> Recipe:
        values: dict[str, dict[str, Any]] = {
            "training": {"max_steps": 10, "batch_size": 4, "learning_rate": 1e-2, "checkpoint_steps": 3},
            "evaluation": {"split": 0.1, "every_steps": 4},
        }
        for name, given in sections.items():
            values[name] = values.get(name, {}) | given
        return recipe_for(self.base, "rows.jsonl", **values)

    def parts(self, name: str, recipe: Recipe) -> Parts:
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        facts = ModelFacts(
            name="tiny", path=str(self.base), revision=None, licence=None, architecture="LlamaForCausalLM",
            model_type="llama", num_parameters=0, weight_bytes=0, vocabulary_size=272, context_tokens=512, hidden_size=32,
            num_layers=2, linear_shapes={}, weight_fingerprint="f",
        )  # fmt: skip
        split = SplitFacts(rows=1, examples=1, tokens=1, trained_tokens=1, longest_tokens=1)
        dataset = Dataset(
            path="", source="", source_digest="", format="text", template="", template_digest="", tokenizer_digest="",
            max_tokens=64, stop_token_ids=[], splits={"train": split}, findings=[],
        )  # fmt: skip
        base: Base = load_base(
            facts,
            recipe.model,
            NO_GPU,
            device="cpu",
            seed=recipe.training.seed,
            trains_weights=recipe.adapter.method == "full",
        )
        return Parts(
            recipe=recipe, facts=facts, dataset=dataset, base=base, train_examples=self.examples,
            held_out_examples=self.held_out, plan=plan_micro_batches, collate=collate, pad_token_id=tiny_pad_token_id(),
            folder=folder, devices=find_devices(trackers=recipe.training.trackers, folder=folder), report=self.events.append,
            base_weight_digest=lambda: None, save_tokenizer=lambda path: tiny_tokenizer().save_pretrained(str(path)),
        )  # fmt: skip

    def train(
        self, name: str, recipe: Recipe | None = None, *, change: Change | None = None, resume: bool = False
    ) -> Run:
        """One run; `change` is applied to the Task that the session has made."""
        with changed_task(change):
            return train_adapter(self.parts(name, recipe or self.recipe()), resume=resume)

    def weights(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / name / "adapter" / "adapter_model.safetensors")

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """The log without what the clock says."""
        events = read_metrics(self.folder / name / "metrics.jsonl")
        return [{key: value for key, value in event.items() if key != "tokens_per_second"} for event in events]

    def losses(self, name: str) -> dict[int, float]:
        return {event["step"]: event["loss"] for event in self.metrics(name) if event["event"] == "step"}

    def progress(self, name: str) -> dict[str, Any]:
        latest = max((self.folder / name / "checkpoints").glob("step-*"))
        values: dict[str, Any] = json.loads((latest / "progress.json").read_text())
        return values

    def recoveries(self) -> list[Recovery]:
        return [event for event in self.events if isinstance(event, Recovery)]

    def assert_same(self, name: str, other: str) -> None:
        """The same events in the log, and the same bits in the adapter."""
        assert self.metrics(name) == self.metrics(other)
        weights, others = self.weights(name), self.weights(other)
        assert weights.keys() == others.keys()
        assert all(torch.equal(weights[key], others[key]) for key in weights)
        assert any(bool(value.any()) for key, value in weights.items() if "lora_B" in key)


@contextmanager
def changed_task(change: Change | None) -> Iterator[None]:
    def changed(task: Task, progress: Progress) -> str:
        return run_loop(change(task) if change is not None else task, progress)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "run_loop", changed)
        yield


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base"), "llama")


@pytest.fixture(scope="session")
def trained_base(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A base that has learned half of the task: its loss is well below that of guessing (2.5)."""
    workshop = Workshop(tmp_path_factory.mktemp("trained"), tiny_base)
    training = {"max_steps": 45, "learning_rate": 3e-3, "batch_size": 8}
    run = workshop.train(
        "full", workshop.recipe(model={"weights": "random"}, adapter={"method": "full"}, training=training)
    )
    assert run.evaluation_loss is not None
    assert 0.1 < run.evaluation_loss < 1.0
    return workshop.folder / "full" / "model"


@pytest.fixture
def workshop(tmp_path: Path, tiny_base: Path) -> Workshop:
    return Workshop(tmp_path, tiny_base)


@dataclass
class Countdown:
    """Says yes (or raises) at the n-th call, once."""

    n: int
    error: BaseException | None = None
    calls: int = 0
    fired: bool = False

    def __call__(self) -> bool:
        self.calls += 1
        if self.fired or self.calls != self.n:
            return False
        self.fired = True
        if self.error is not None:
            raise self.error
        return True


def failing_backward(loss: Tensor, error: BaseException) -> Tensor:
    """The same value, whose backward raises."""

    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor) -> Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: Any, *_gradients: Tensor) -> Tensor:
            raise error

    result: Tensor = Failing.apply(loss)
    return result


def failing_optimizer(task: Task, fails: Callable[[], bool], error: BaseException, *, updated: int) -> Task:
    """A step of the optimizer that `fails()` breaks off with `error` after the first `updated` weights were changed."""
    step = task.optimizer.step

    def broken(*arguments: Any, **keywords: Any) -> Any:
        if not fails():
            return step(*arguments, **keywords)
        later: Sequence[torch.nn.Parameter] = list(task.trainable.values())[updated:]
        gradients = [p.grad for p in later]
        for parameter in later:
            parameter.grad = None
        if updated:
            step()
        for parameter, gradient in zip(later, gradients, strict=True):
            parameter.grad = gradient
        raise error

    task.optimizer.step = broken  # type: ignore[method-assign]
    return task


def with_loss(task: Task, around: Callable[[Tensor], Tensor]) -> Task:
    """`around` gets each micro-batch's loss in training (not in evaluations) and returns what is used instead."""
    loss = task.loss
    return replace(task, loss=lambda model, batch: around(loss(model, batch)))


def uncalled(value: Any, fault: Callable[[], bool]) -> Any:
    """The value, after the fault had its chance to raise."""
    fault()
    return value


def planted(steps: tuple[int, ...], factor: float) -> Callable[..., float]:
    return lambda step, **keywords: learning_rate_at(step, **keywords) * (factor if step in steps else 1.0)
