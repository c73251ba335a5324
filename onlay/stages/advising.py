"""`advise`: should one fine-tune at all, with which settings, and who will serve what comes out; nothing is loaded."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onlay.errors import RecipeError
from onlay.recipe import DataSection, LoraAdapter, ModelSection, Recipe, apply_overrides, read_recipe

if TYPE_CHECKING:
    from onlay.planning.advice import Advice, Answers
    from onlay.planning.rules import Known
    from onlay.planning.shapes import BaseShape
    from onlay.release.servers import Features, Verdicts

CHARACTERS_PER_TOKEN = 4.0
"""Of English with a vocabulary of 32,000 to 150,000; other languages have fewer.  Rules go by powers of two and ten."""
MEASURED_ROWS = 2_000
"""Rows whose lengths are taken; the rest is counted."""
NO_GPU = "none"
TRANSPOSED = ("gpt2", "openai-gpt")
"""Architectures whose linear layers are Conv1D."""
REFUSED = "not accepted"


@dataclass(frozen=True, kw_only=True, slots=True)
class Advising:
    recipe: str | None
    base: str | None
    gpu: str | None
    """What the advice is for; None: there is no GPU."""
    advice: Advice
    servers: list[Verdicts]
    """What each server would do with the adapter; empty for a head and a whole model."""
    notes: list[str]
    """Where numbers come from, and what could not be looked at."""


def advise(
    recipe: str | Path | None = None,
    *,
    answers: Answers,
    overrides: Sequence[str] = (),
    model: str | None = None,
    gpu: str | None = None,
    prices: str | Path | None = None,
) -> Advising:
    """Advice on a recipe, or on answers alone.  No weights, no network, no torch for bases of known families.

    `answers` go before what is found: rows and lengths of the recipe's files, the GPU of this machine.  `model`: a
    well-known base, or a folder (default: the recipe's); `gpu`: a name such as rtx4090, or `none` (default: this machine's);
    `prices`: a table of GPUs of one's own.  Raises OnlayError for a recipe, model or GPU that is not one, and for a recipe
    that starts from random weights.
    """
    from onlay.planning.advice import advise as advise_on

    if recipe is None and overrides:
        raise RecipeError(
            "--set changes a recipe, and none is given.", "Example: onlay advise RECIPE --set adapter.rank=8"
        )
    refuse_no_length(answers.mean_tokens)
    if answers.rows is not None and answers.rows < 1:
        raise RecipeError(f"--rows {answers.rows} are no rows to advise on.", "Give 1 or more, or leave it out.")
    read = None if recipe is None else read_recipe(recipe, overrides)
    if read is not None and model is not None:
        read = apply_overrides(read.model_dump(mode="json", exclude_defaults=True), [f"model.base={model}"])
    if read is not None and read.model.weights == "random":
        raise RecipeError(
            "model.weights = random trains a model from nothing, and advice is about tuning one that can speak.",
            "Advise on a recipe with pretrained weights, or with `--set model.weights=pretrained`.",
        )
    notes: list[str] = []
    shape = find_base_shape(read, model, notes)
    answers, device = _with_gpu(answers, gpu, prices, notes)
    if read is not None:
        answers = _with_data(answers, read, notes)
        if read.training.max_steps is not None:
            notes.append(
                f"training.max_steps = {read.training.max_steps} sets the length of the run; epochs are not read"
            )
    servers: list[Verdicts] = []

    def accepting(known: Mapping[str, Known]) -> int | None:
        from onlay.release.servers import judge

        features = adapter_features(read, shape, known)
        if features is None:
            return None
        base = read.model.base if read is not None else model
        servers.extend(
            judge(features, base=base or "BASE", name=(read.release.name if read is not None else None) or "NAME")
        )
        return sum(one.verdict != REFUSED for one in servers)

    advice = advise_on(answers, base=shape, recipe=read, accepting=accepting)
    return Advising(
        recipe=None if recipe is None else str(recipe), base=shape.name if shape is not None else model, gpu=device,
        advice=advice, servers=servers, notes=notes,
    )  # fmt: skip


def refuse_no_length(mean_tokens: float | None) -> None:
    """Raises RecipeError for a declared mean that no rows can have."""
    if mean_tokens is not None and not (math.isfinite(mean_tokens) and mean_tokens >= 1):
        raise RecipeError(
            f"--mean-tokens {mean_tokens} is not the length of rows: a finite number from 1 on is.",
            "Example: --mean-tokens 300",
        )


# --------------------------------------------------------------------------------------------------------------- base


def find_base_shape(recipe: Recipe | None, model: str | None, notes: list[str]) -> BaseShape | None:
    """By folder or well-known name; a base that would have to be fetched is left out, unless it was asked for by --model."""
    from onlay.model.hub import POCKET, find_base
    from onlay.planning.shapes import find_shape, is_known, read_shape

    name = recipe.model.base if recipe is not None else model
    if name is None:
        return None
    if name == POCKET or Path(name).is_dir():
        place = find_base(ModelSection(base=name), check_config=lambda _config, _name: None)
        return replace(read_shape(place.path), name=name)
    if is_known(name) or model is not None:
        return find_shape(name)
    notes.append(
        f"{name} is neither a folder nor a well-known base: advice that goes by its size is left out (--model)"
    )
    return None


# ---------------------------------------------------------------------------------------------------------------- GPU


def _with_gpu(
    answers: Answers, name: str | None, prices: str | Path | None, notes: list[str]
) -> tuple[Answers, str | None]:
    from onlay.hardware import find_hardware_light
    from onlay.planning.devices import find_gpu, read_gpus

    if name is not None and name.lower() == NO_GPU:
        return replace(answers, has_gpu=False), None
    if name is not None:
        group = find_gpu(name, gpus=read_gpus(prices))
        if group.count > 1:
            notes.append(f"{group.name}: shares of the memory are those of one of them")
        return replace(answers, has_gpu=True, memory_bytes=group.gpu.memory_bytes), group.name
    hardware = find_hardware_light()
    if not hardware.has_cuda:
        notes.append("this machine has no GPU; --gpu NAME advises for another")
        return replace(answers, has_gpu=False), None
    return replace(answers, has_gpu=True, memory_bytes=hardware.device_memory_bytes), hardware.devices[0].name


# --------------------------------------------------------------------------------------------------------------- data


def _with_data(answers: Answers, recipe: Recipe, notes: list[str]) -> Answers:
    """Rows and lengths of the recipe's files where they were not declared, and the task where its format says it."""
    if answers.task is None and (recipe.adapter.method == "head" or recipe.data.format == "classification"):
        answers = replace(answers, task="classify")
    if answers.rows is not None and answers.mean_tokens is not None:
        return answers
    files = [source.file for source in recipe.data.train_sources]
    absent = [file for file in files if not Path(file).is_file()]
    if absent:
        notes.append(f"{absent[0]} is no file here: rows and lengths are not known (--rows, --mean-tokens)")
        return answers
    looks = [look_at_rows(file, recipe) for file in files]
    rows = sum(look.rows for look in looks)
    measured = sum(look.measured for look in looks)
    characters = sum(look.characters for look in looks)
    share = sum(look.trained for look in looks) / characters if characters else 1.0
    mean = characters / measured / CHARACTERS_PER_TOKEN if measured else 0.0
    notes.append(
        f"{rows:,} rows in {', '.join(files)}, about {mean:,.0f} tokens each and {share:.0%} of them trained "
        f"({CHARACTERS_PER_TOKEN:g} characters a token, from {measured:,} rows)"
    )
    every_text = bool(looks) and all(look.format == "text" for look in looks)
    return replace(
        answers,
        task="domain" if answers.task is None and every_text else answers.task,
        rows=rows if answers.rows is None else answers.rows,
        mean_tokens=mean if answers.mean_tokens is None else answers.mean_tokens,
        trained_share=share if answers.trained_share is None else answers.trained_share,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """What a file's rows are like."""

    format: str
    rows: int
    lengths: tuple[int, ...]
    """Characters of each of the measured rows, and of all of these together, those that train:"""
    trained: int

    @property
    def measured(self) -> int:
        return len(self.lengths)

    @property
    def characters(self) -> int:
        return sum(self.lengths)


def look_at_rows(file: str, recipe: Recipe) -> Look:
    """Raises DataError for a source without rows and for one of the first rows that cannot be used."""
    from onlay.data.material import row_section
    from onlay.data.read import DETECTION_ROWS, detect_format, parse
    from onlay.data.sources import read_rows
    from onlay.errors import DataError

    section = row_section(recipe)
    rows = read_rows(file, section, limit=recipe.data.max_rows)
    first = list(itertools.islice(rows, DETECTION_ROWS))
    if not first:
        raise DataError(f"{file} holds no rows.", "Give a file with at least a few examples.")
    format = detect_format(first, section)
    count = trained = 0
    lengths: list[int] = []
    for row in itertools.chain(first, rows):
        count += 1
        if count <= MEASURED_ROWS:
            whole, answer = _lengths(parse(row, format, section), section)
            lengths.append(whole)
            trained += answer
    return Look(format=format, rows=count, lengths=tuple(lengths), trained=trained)


def _lengths(item: Any, section: DataSection) -> tuple[int, int]:
    """Characters of a row, and of what trains in it."""
    from onlay.data.turns import Document

    if isinstance(item, Document):
        return len(item.text), len(item.text)
    whole = sum(len(turn.content) for turn in item.turns)
    if section.loss_on == "all":
        return whole, whole
    return whole, sum(len(turn.content) for turn in item.turns if turn.role == "assistant" and turn.trained)


# ------------------------------------------------------------------------------------------------------------- servers


def adapter_features(recipe: Recipe | None, shape: BaseShape | None, known: Mapping[str, Known]) -> Features | None:
    """What servers would find in the adapter: the one that the recipe makes, else the one that is advised."""
    from onlay.planning.parameters import choose_linears
    from onlay.release.servers import Features

    method = str(known["method"])
    if method in ("head", "full"):
        return None
    if recipe is not None and isinstance(recipe.adapter, LoraAdapter):
        section = recipe.adapter
    else:
        section = LoraAdapter(rank=int(known["rank"]))
    chosen = [] if shape is None else choose_linears(shape, section.targets)
    layers: dict[str, int] = {}
    for linear in chosen:
        leaf = linear.name.rpartition(".")[2]
        layers[leaf] = layers.get(leaf, 0) + linear.count
    return Features(
        folder=Path("ADAPTER"),
        # PiSSA's adapter is saved with the part that it takes away again: twice the rank.
        ranks=(2 * section.rank if method == "pissa" else section.rank,),
        rslora=method == "rslora", dora=method == "dora", bias=section.bias != "none", whole_modules=(),
        # The output head and embeddings are no targets here, and every module has the same rank and alpha.
        head=False, embedding=False, alpha_pattern=False, regex_targets=False,
        experts=any(linear.is_expert for linear in chosen),
        transposed=shape is not None and shape.architecture in TRANSPOSED,
        leaves=tuple(sorted(layers)),
        partial=tuple(sorted(leaf for leaf, count in layers.items() if shape is not None and count < shape.num_layers)),
        storage=str(known["storage"]), loftq=method == "loftq",
    )  # fmt: skip
