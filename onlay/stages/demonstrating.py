"""`demo`: the bundled base trained on the bundled examples, before and after."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from onlay.recipe import read_recipe
from onlay.records import Dataset
from onlay.stages.answering import open_run
from onlay.stages.events import Report, silent
from onlay.stages.training import train

if TYPE_CHECKING:
    from onlay.data.read import Conversation


@dataclass(frozen=True, kw_only=True, slots=True)
class Demo:
    """What the demo measured on rows that were held out of its training."""

    run: str
    train_seconds: float
    rows: int
    base: dict[str, float | None]
    adapter: dict[str, float | None]
    examples: list[dict[str, str]]
    """Three held-out rows: prompt, expected, base, adapter."""


def demo(*, output: str | None = None, report: Report = silent) -> Demo:
    """Trains the bundled base on the bundled support desk and compares both on held-out rows."""
    from onlay.evaluation.scores import exact_match, valid_json
    from onlay.generation.engine import Sampling as Settings

    package = resources.files("onlay")
    with resources.as_file(package / "examples") as examples:
        recipe = read_recipe(examples / "demo.yaml", [f"data.train={examples / 'support.jsonl'}"])
        folder = output or str(Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}")
        recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update={"output": folder})})
        began = time.perf_counter()
        run = train(recipe, report=report)
        train_seconds = time.perf_counter() - began
    loaded = open_run(run.path, report=report)
    rows = held_out_rows(loaded.dataset)
    prompts = [row.turns[:-1] for row in rows]
    expected = [row.turns[-1].content for row in rows]
    longest = max(len(loaded.tokenizer(text)["input_ids"]) for text in expected)
    sampling = Settings(max_new_tokens=longest + 8)
    texts = {
        name: loaded.answer(prompts, sampling=sampling, use_adapter=name == "adapter", report=report)
        for name in ("base", "adapter")
    }
    scores: dict[str, dict[str, float | None]] = {
        name: {"exact_match": exact_match(answers, expected), "valid_json": valid_json(answers, expected)}
        for name, answers in texts.items()
    }
    kinds = _one_of_each_kind(expected)
    return Demo(
        run=run.path, train_seconds=round(train_seconds, 2), rows=len(rows),
        base=scores["base"] | {"evaluation_loss": run.base_evaluation_loss},
        adapter=scores["adapter"] | {"evaluation_loss": run.evaluation_loss},
        examples=[
            {"prompt": prompts[i][-1].content, "expected": expected[i], "base": texts["base"][i], "adapter": texts["adapter"][i]}
            for i in kinds
        ],
    )  # fmt: skip


def held_out_rows(dataset: Dataset) -> list[Conversation]:
    from onlay.data.read import Conversation
    from onlay.data.split import open_split

    return [row for row in open_split(dataset, "evaluation").rows() if isinstance(row, Conversation)]


def _one_of_each_kind(expected: Sequence[str]) -> list[int]:
    """Three rows to show, as different as there are: first those that begin differently, such as tool calls."""
    chosen: list[int] = []
    for characters in (8, 24, None):
        seen = {expected[index][:characters] for index in chosen}
        for index, text in enumerate(expected):
            if len(chosen) < 3 and index not in chosen and text[:characters] not in seen:
                seen.add(text[:characters])
                chosen.append(index)
    return chosen
