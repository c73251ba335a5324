"""Advice on a fine-tuning job: whether to train at all, with which settings, and how to serve what comes out.

What is known becomes named quantities; advice.yaml holds the rules about them, with reasons and sources.  Nothing is
guessed: a rule that would need what nobody said does not hold, and what was missing is told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from onlay.model.storage import bytes_per_weight
from onlay.planning.rules import Decision, Known, Rules, decide, read_rules
from onlay.planning.shapes import BaseShape
from onlay.recipe import LoraAdapter, Recipe
from onlay.recipe.numbers import Loader

FILE = "advice.yaml"
Task = Literal["style", "format", "classify", "extract", "chat", "skill", "domain", "facts"]
FactsChange = Literal["never", "rarely", "often"]
Prompted = Literal["good", "fair", "poor"]
Latency = Literal["relaxed", "tight"]
Tasks = Literal["one", "many"]
Verdict = Literal["same", "near", "differs"]

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
ALPHA = 32.0
"""The alpha that published learning rates are for.  One step changes scale B A by about rate x scale x rank."""
LEAST_STEPS = 100
FULL_BYTES = 16
"""A parameter in full tuning with AdamW: 16-bit weight and gradient, 32-bit weight and two moments."""
FAMILIES = {"llama": 0.781, "qwen2": 0.0775, "qwen3": 0.0775}
"""Of the width, by which the rate was fitted: model_type to the exponent."""
OFF = "off"
NEAR = 2.0
"""Numbers within this factor are near: they are nothing that one run could tell apart."""

APPROACH, SERVING = "approach", "serving"
ADAPTER_SETTINGS = ("adapter.rank", "adapter.method", "adapter.alpha", "adapter.targets", "adapter.dropout")
SETTINGS = (
    APPROACH, *ADAPTER_SETTINGS, "model.storage", "training.epochs", "training.batch_size", "training.learning_rate",
    "training.warmup_fraction", "training.max_grad_norm", SERVING,
)  # fmt: skip
"""In the order in which they are decided: later ones go by earlier ones."""
DECIDED = {
    APPROACH: "approach", "adapter.rank": "rank", "adapter.method": "method", "adapter.alpha": "alpha",
    "model.storage": "storage", "training.epochs": "epochs", "training.batch_size": "batch_size",
}  # fmt: skip
"""Settings that rules for later ones speak of, and the quantity each becomes."""

HELD_OUT = 0.05
"""Share of the rows that the steps are counted without: the recipe's default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """What the user, the data and the recipe say; None: nothing is known."""

    task: Task | None = None
    facts_change: FactsChange | None = None
    prompted: Prompted | None = None
    latency: Latency | None = None
    served_tasks: Tasks | None = None
    rows: int | None = None
    mean_tokens: float | None = None
    """Of a row, prompt and answer."""
    trained_share: float | None = None
    """Of the tokens; None: all are taken for trained."""
    has_gpu: bool | None = None
    memory_bytes: int | None = None
    """Of one GPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Advised:
    """The advice for one setting, beside what the recipe has there."""

    setting: str
    advised: Known
    recipe: Any
    """None: there is no recipe, or it has no such field."""
    verdict: Verdict | None
    """None where there is nothing to compare."""
    reason: str
    source: str
    rule: str
    overruled: tuple[Decision, ...]
    """What other rules would have said."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Advice:
    approach: Advised
    settings: tuple[Advised, ...]
    """For training; if the approach is none, for training all the same."""
    serving: Advised
    known: dict[str, Known]
    """The quantities that the rules went by."""
    unknown: tuple[str, ...]
    """Answers that nobody gave, and that would change what can be said."""

    @property
    def trains(self) -> bool:
        return self.approach.advised in TRAINING


TRAINING = ("lora", "qlora", "full", "continued-pretraining", "head")
"""Approaches that train something."""


def advise(
    answers: Answers,
    *,
    base: BaseShape | None,
    recipe: Recipe | None = None,
    accepting: Callable[[Mapping[str, Known]], int | None] | None = None,
) -> Advice:
    """Advice for every setting.

    Without a recipe, method and storage are as advised; with one, its own, and the other settings go by those.
    `accepting` gets the decided quantities and counts the servers that take such an adapter (None: it is no adapter).
    """
    rules = read_advice()
    situation = _first_quantities(answers, base, rules)
    decided: dict[str, Advised] = {}
    for setting in SETTINGS:
        if setting == SERVING and accepting is not None:
            situation["accepting_servers"] = accepting(
                {name: value for name, value in situation.items() if value is not None}
            )
        decision = decide(setting, situation, rules=rules)
        decided[setting] = _beside(decision, recipe)
        if setting in DECIDED:
            situation[DECIDED[setting]] = _kept(setting, decision.value, recipe)
            _derive(situation, base)
    # A recipe's own adapter settings are compared with those of its method; there are none for a head or a whole model.
    left_out = ADAPTER_SETTINGS if situation["method"] in ("head", "full") else ()
    settings = [
        decided[name] for name in SETTINGS if name not in (APPROACH, SERVING, *left_out) or name == "adapter.method"
    ]
    return Advice(
        approach=decided[APPROACH], settings=tuple(settings), serving=decided[SERVING],
        known={name: value for name, value in situation.items() if value is not None}, unknown=_unknown(answers, base),
    )  # fmt: skip


@cache
def read_advice() -> Rules:
    """The rules of advice.yaml, checked."""
    text = Path(__file__).with_name(FILE).read_text(encoding="utf-8")
    return read_rules(yaml.load(text, Loader), settings=SETTINGS)


# --------------------------------------------------------------------------------------------------------- quantities


def _first_quantities(answers: Answers, base: BaseShape | None, rules: Rules) -> dict[str, Known | None]:
    situation: dict[str, Known | None] = dict.fromkeys(rules.quantities)
    for name in ("task", "facts_change", "prompted", "latency", "served_tasks", "rows", "has_gpu"):
        situation[name] = getattr(answers, name)
    if answers.rows is not None and answers.mean_tokens is not None:
        tokens = round(answers.rows * answers.mean_tokens)
        situation |= {
            "tokens": tokens,
            "trained_tokens": round(tokens * (1.0 if answers.trained_share is None else answers.trained_share)),
        }
    if base is not None:
        situation |= _base_quantities(base, answers.memory_bytes, situation["trained_tokens"])
    return situation


def _base_quantities(
    base: BaseShape, memory_bytes: int | None, trained_tokens: Known | None
) -> dict[str, Known | None]:
    parameters = base.num_parameters
    per_rank = sum(one.count * one.matrices * (one.inputs + one.outputs) for one in base.linears)
    found: dict[str, Known | None] = {
        "parameters": parameters, "hidden_size": base.hidden_size, "parameters_per_rank": per_rank,
    }  # fmt: skip
    if memory_bytes is not None:
        packed = sum(one.num_parameters for one in base.linears if not one.is_expert)
        nf4 = 2 * (parameters - packed) + bytes_per_weight("nf4", True) * packed
        found["bf16_share"] = 2 * parameters / memory_bytes
        found["nf4_share"] = nf4 / memory_bytes
        found["full_share"] = FULL_BYTES * parameters / memory_bytes
    if trained_tokens is not None and per_rank:
        tokens = cast(int, trained_tokens)
        found["capacity_rank"] = next((rank for rank in RANKS if rank * per_rank >= tokens), RANKS[-1])
        found["capacity_share"] = tokens / (RANKS[-1] * per_rank)
    return found


def _derive(situation: dict[str, Known | None], base: BaseShape | None) -> None:
    """Quantities that go by what was decided so far."""

    def number(name: str) -> float | None:
        return cast("float | None", situation[name])

    rows, epochs, batch_size, rank, alpha = (number(name) for name in ("rows", "epochs", "batch_size", "rank", "alpha"))
    if rows is not None and epochs is not None:
        examples = rows * (1 - HELD_OUT) * epochs
        situation["batch_for_100_steps"] = 2 ** max(0, math.floor(math.log2(max(1.0, examples / LEAST_STEPS))))
        if batch_size is not None:
            situation["steps"] = max(1, math.ceil(examples / batch_size))
    if rank is not None and alpha is not None:
        scale = alpha * (math.sqrt(rank) if situation["method"] == "rslora" else 1.0)
        situation |= {"update_scale": scale, "scale_correction": ALPHA / scale}
        if base is not None and base.architecture in FAMILIES:
            fitted = 5e-4 * (2000 / base.hidden_size) ** FAMILIES[base.architecture]
            situation["calibrated_rate"] = fitted * ALPHA / scale


def _unknown(answers: Answers, base: BaseShape | None) -> tuple[str, ...]:
    # That all tokens train is an assumption on the safe side, and has_gpu is known once the memory is.
    aside = {"trained_share"} | ({"memory_bytes"} if answers.has_gpu is False else set())
    missing = [one.name for one in fields(answers) if one.name not in aside and getattr(answers, one.name) is None]
    return (*missing, *(("base",) if base is None else ()))


# --------------------------------------------------------------------------------------------------------- the recipe


def _kept(setting: str, value: Known, recipe: Recipe | None) -> Known:
    """What later rules go by: the recipe's own method and storage, elsewhere the advice."""
    if recipe is None or setting not in ("adapter.method", "model.storage"):
        return value
    own = recipe_value(setting, recipe)
    return value if own == "auto" else cast(Known, own)


def recipe_value(setting: str, recipe: Recipe) -> Any:
    """What the recipe has there, defaults worked out and null as `off`; None for what is no field of its method."""
    if setting == "training.learning_rate":
        return recipe.learning_rate
    section, _, name = setting.partition(".")
    if not name:
        return None
    values = getattr(recipe, section).model_dump()
    if name == "alpha" and isinstance(recipe.adapter, LoraAdapter):
        return recipe.adapter.resolved_alpha
    return (OFF if values[name] is None else values[name]) if name in values else None


def _beside(decision: Decision, recipe: Recipe | None) -> Advised:
    own = None if recipe is None else recipe_value(decision.setting, recipe)
    return Advised(
        setting=decision.setting, advised=decision.value, recipe=own, verdict=_compare(decision.value, own),
        reason=decision.reason, source=decision.source, rule=decision.rule, overruled=decision.overruled,
    )  # fmt: skip


def _compare(advised: Known, own: Any) -> Verdict | None:
    """`auto` leaves the choice open."""
    if own is None or own == "auto":
        return None
    if own == advised:
        return "same"
    numbers = isinstance(advised, int | float) and isinstance(own, int | float)
    if numbers and min(advised, own) > 0 and max(advised, own) <= NEAR * min(advised, own):  # type: ignore[type-var]
        return "near"
    return "differs"
