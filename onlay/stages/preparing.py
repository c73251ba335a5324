"""`prepare`: from a recipe to token sequences on disk.

What is cheap to check is checked before torch is imported, so a wrong recipe, file or base is reported at once.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onlay import ledger
from onlay.doctor import install_line
from onlay.errors import RecipeError, SetupError
from onlay.recipe import LoraAdapter, Recipe, read_recipe
from onlay.records import Dataset, ModelFacts
from onlay.stages.events import Loading, Report, silent
from onlay.stages.lengths import lengths_of, remember_lengths

if TYPE_CHECKING:
    from onlay.data.cleaning import Cleaner
    from onlay.data.labels import LabelledText
    from onlay.data.material import Material
    from onlay.data.select import Selection
    from onlay.data.split import Split
    from onlay.data.template import ChatTemplate


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A recipe whose data and base were looked at, without anything heavy."""

    recipe: Recipe
    material: Material
    selection: Selection
    facts: ModelFacts
    labels: list[str]
    """What a classification head tells apart; empty for the other methods."""


def look(recipe: Recipe, *, report: Report = silent) -> Source:
    """Reads every row, unless the same were read before, and the base's headers.  Raises OnlayError, within seconds, for all that shows without torch."""
    from onlay.data.audited import read_audited
    from onlay.data.build import resolve_max_tokens
    from onlay.data.labels import find_labels
    from onlay.data.material import refuse_errors
    from onlay.data.select import select_rows
    from onlay.data.template import read_template
    from onlay.model.facts import check_targets, read_facts

    _check_trackers(recipe)
    if recipe.data.template != "auto":
        read_template(recipe.data.template)
    material = read_audited(
        recipe,
        folder=ledger.home() / "audited",
        progress=lambda done, total: report(Loading("reading rows", done, total)),
    )
    refuse_errors(material, recipe)
    selection = select_rows(material, recipe)
    facts = read_facts(recipe.model, progress=lambda done, total: report(Loading("fetching the base", done, total)))
    if isinstance(recipe.adapter, LoraAdapter):
        check_targets(facts, recipe.adapter.targets)
    resolve_max_tokens(recipe, facts.context_tokens)
    labels = (
        find_labels(recipe, material, selection, vocabulary_size=facts.vocabulary_size)
        if recipe.adapter.method == "head"
        else []
    )
    return Source(recipe=recipe, material=material, selection=selection, facts=facts, labels=labels)


def check_device(recipe: Recipe) -> None:
    """Fields of `training` that this machine has no use for.  The data can be prepared without it, so `look` does not ask."""
    from onlay.hardware import find_hardware_light

    training = recipe.training
    if training.optimizer != "adamw" and importlib.util.find_spec("bitsandbytes") is None:
        raise SetupError(
            f"training.optimizer = {training.optimizer} needs bitsandbytes, which is not installed.",
            f"{install_line('bitsandbytes')}, or delete the line to get adamw.",
        )
    wants_gpu = [f"training.optimizer = {training.optimizer}"] if training.optimizer.startswith("paged") else []
    wants_gpu += ["training.offload_activations"] if training.offload_activations else []
    if wants_gpu and not find_hardware_light().has_cuda:
        raise RecipeError(
            f"{wants_gpu[0]} needs a GPU: it moves what the GPU has no room for to the host, and here is no GPU.",
            "Delete the line, or train on a machine with a CUDA GPU (onlay doctor tells what this one has).",
        )


def _check_trackers(recipe: Recipe) -> None:
    """Accelerate leaves a tracker that is not installed out without a word."""
    for tracker in recipe.training.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise SetupError(
                f"training.trackers: {tracker} is not installed.", f"{install_line(tracker)}, or take it off the list."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    source: Source
    tokenizer: Any
    template: ChatTemplate | LabelledText
    dataset: Dataset

    def split(self, name: str) -> Split:
        from onlay.data.split import open_split

        return open_split(self.dataset, name)


def prepare_source(source: Source, *, report: Report = silent) -> Prepared:
    """Tokenizes, or finds what was tokenized before from the same rows, recipe and tokenizer."""
    from onlay.data.build import prepare_dataset
    from onlay.data.labels import LabelledText
    from onlay.data.template import ChatTemplate
    from onlay.model.tokenizer import load_tokenizer, tokenizer_digest

    recipe, facts = source.recipe, source.facts
    tokenizer = load_tokenizer(facts, trust_remote_code=recipe.model.trust_remote_code)
    template = (
        LabelledText(tokenizer, source.labels)
        if recipe.adapter.method == "head"
        else ChatTemplate(tokenizer, template=recipe.data.template, loss_on=recipe.data.loss_on)
    )
    dataset = prepare_dataset(
        recipe,
        source.material,
        source.selection,
        template,
        tokenizer_digest=tokenizer_digest(facts.path),
        context_tokens=facts.context_tokens,
        cache_folder=ledger.home() / "prepared",
        cleaner=_open_cleaner(recipe),
        progress=lambda done, total: report(Loading("preparing rows", done, total)),
    )
    return Prepared(source=source, tokenizer=tokenizer, template=template, dataset=dataset)


def _open_cleaner(recipe: Recipe) -> Cleaner | None:
    if recipe.data.anonymise == "off":
        return None
    from onlay.data.cleaning import open_cleaner

    return open_cleaner(recipe, home=ledger.home())


def prepare(recipe: str | Path | Recipe, *, overrides: Sequence[str] = (), report: Report = silent) -> Prepared:
    """Reads, checks, templates and tokenizes what a recipe names; cached by content.  Raises OnlayError."""
    prepared = prepare_source(look(as_recipe(recipe, overrides), report=report), report=report)
    ledger.append(prepared.source.facts, prepared.source.facts.path)
    ledger.append(prepared.dataset, prepared.dataset.path)
    remember_lengths(prepared.source.recipe, lengths_of(prepared))
    return prepared


def as_recipe(recipe: str | Path | Recipe, overrides: Sequence[str]) -> Recipe:
    if not isinstance(recipe, Recipe):
        return read_recipe(recipe, overrides)
    if overrides:
        raise ValueError("overrides go with a recipe file; change a Recipe itself with model_copy")
    return recipe
