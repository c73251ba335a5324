"""`plan`: memory, time and cost of a run before anything is rented, and the settings that `train` follows; nothing is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onlay.errors import BaseModelError, OnlayError, RecipeError, SetupError
from onlay.recipe import Recipe, apply_overrides, field_paths, read_recipe
from onlay.stages.advising import CHARACTERS_PER_TOKEN, look_at_rows, refuse_no_length
from onlay.stages.lengths import recall_lengths
from onlay.stages.plans import ASK_FOR_LESS, Wanted, as_known, plan_wanted

if TYPE_CHECKING:
    from onlay.planning.devices import GpuGroup
    from onlay.planning.lengths import Lengths
    from onlay.planning.shapes import BaseShape
    from onlay.records import Plan

DECLARED = "declared"
"""data.train of a job that has no recipe."""
MOST_TOKENS = 4096
"""Default of data.max_tokens (onlay/data/build.py)."""
SHORT = {"gpu": "gpu", "model": "model.base", "base": "model.base"}
"""Keys of --compare that are no recipe field's last word."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Declared:
    """What is known of the data without looking at them; None: look."""

    rows: int | None = None
    mean_tokens: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """A plan for one value of what is compared, or why there is none: a plan for other settings than were asked for is none."""

    value: str
    plan: Plan | None
    problem: str | None
    remedy: str | None


def plan(
    recipe: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    model: str | None = None,
    declared: Declared | None = None,
    epochs: float | None = None,
    gpu: str | None = None,
    prices: str | Path | None = None,
) -> Plan:
    """The plan of a recipe, or of a well-known base and declared rows, on one GPU (default: this machine's).

    No weights, no network, no torch for bases of known families.  Raises OnlayError; SetupError where nothing fits, which names
    what would.
    """
    wanted = _wanted(recipe, overrides, model=model, declared=declared or Declared(), epochs=epochs)
    group, found, notes = _group(gpu, prices)
    return plan_wanted(replace(wanted, notes=(*wanted.notes, *notes)), group, found=found, prices=prices)


def compare_plans(
    key: str,
    values: Sequence[str],
    recipe: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    model: str | None = None,
    declared: Declared | None = None,
    epochs: float | None = None,
    gpu: str | None = None,
    prices: str | Path | None = None,
) -> list[Compared]:
    """A plan for each value of a recipe field (its path, or its last word), of `gpu` or of `model`."""
    field = _field_of(key)
    rows = []
    for value in values:
        more = dict[str, Any](overrides=overrides, model=model, gpu=gpu)
        if field == "gpu":
            more["gpu"] = value
        elif field == "model.base" and recipe is None:
            more["model"] = value
        else:
            more["overrides"] = [*overrides, f"{field}={value}"]
        try:
            made = plan(recipe, declared=declared, epochs=epochs, prices=prices, **more)
        except OnlayError as error:
            rows.append(Compared(value=value, plan=None, problem=error.problem, remedy=error.remedy))
        else:
            rows.append(_compared(value, made))
    if all(row.plan is None for row in rows):
        raise RecipeError(str(rows[0].problem), str(rows[0].remedy))
    return rows


def plan_all_gpus(
    recipe: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    model: str | None = None,
    declared: Declared | None = None,
    epochs: float | None = None,
    prices: str | Path | None = None,
) -> list[Compared]:
    """A plan for every GPU of the table, smallest memory first.  Raises SetupError where none takes it."""
    from onlay.planning.devices import GpuGroup, read_gpus

    wanted = _wanted(recipe, overrides, model=model, declared=declared or Declared(), epochs=epochs)
    rows = []
    for gpu in read_gpus(prices).values():
        try:
            made = plan_wanted(wanted, GpuGroup(gpu=gpu, count=1), found=None, prices=prices, suggests=False)
        except SetupError as error:
            rows.append(Compared(value=gpu.name, plan=None, problem=error.problem, remedy=error.remedy))
        else:
            rows.append(_compared(gpu.name, made))
    if all(row.plan is None for row in rows):
        raise SetupError(
            f"No GPU of the table takes this run. Of the largest: {rows[-1].problem}",
            "Take a smaller base, ask for less, or name several GPUs or your own: --gpu, --prices FILE.",
        )
    return rows


def _compared(value: str, made: Plan) -> Compared:
    if made.refused is not None:
        return Compared(value=value, plan=None, problem=made.refused, remedy=ASK_FOR_LESS)
    return Compared(value=value, plan=made, problem=None, remedy=None)


# ------------------------------------------------------------------------------------------------------- what is wanted


def _wanted(
    recipe: str | Path | None, overrides: Sequence[str], *, model: str | None, declared: Declared, epochs: float | None
) -> Wanted:  # fmt: skip
    refuse_no_length(declared.mean_tokens)
    more = [
        *([f"model.base={model}"] if model is not None else []),
        *([f"training.epochs={epochs}"] if epochs is not None else []),
    ]
    if recipe is None:
        if model is None or declared.rows is None or declared.mean_tokens is None:
            raise RecipeError(
                "There is nothing to plan: a RECIPE, or --model, --rows and --mean-tokens are needed.",
                "Example: onlay plan --model llama-3.1-8b --rows 5000 --mean-tokens 300 --gpu h100",
            )
        read = apply_overrides({"model": {"base": model}, "data": {"train": DECLARED}}, [*overrides, *more])
    else:
        read = read_recipe(recipe, [*overrides, *more])
    shape = _shape(read)
    most = read.data.max_tokens or min(shape.context_tokens or MOST_TOKENS, MOST_TOKENS)
    known = recall_lengths(read) if declared == Declared() else None
    if known is not None:
        return Wanted(
            recipe=read, shape=shape, lengths=known.lengths, trained_share=known.trained_share,
            held_out_rows=min(known.held_out_rows, read.evaluation.max_rows), notes=(),
        )  # fmt: skip
    found = _declared_lengths(declared, most) or _found_lengths(read, declared, most)
    train, held_out = _split(found.lengths, read)
    share = found.trained_share if read.data.loss_on == "assistant" else 1.0
    return Wanted(
        recipe=read,
        shape=shape,
        lengths=train,
        trained_share=share,
        held_out_rows=held_out,
        notes=(*found.notes, *_cut_notes(read, declared, most)),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    lengths: Lengths
    trained_share: float = 1.0
    notes: tuple[str, ...] = ()


def _shape(recipe: Recipe) -> BaseShape:
    from onlay.model.hub import POCKET, find_base
    from onlay.planning.shapes import find_shape, is_known, read_shape

    name = recipe.model.base
    if name == POCKET or Path(name).is_dir():
        place = find_base(recipe.model, check_config=lambda _config, _name: None)
        return replace(read_shape(place.path, trust_remote_code=recipe.model.trust_remote_code), name=name)
    if not is_known(name):
        raise BaseModelError(
            f"{name} is neither a folder nor a well-known base, and nothing is downloaded to plan.",
            "Give --model with a well-known base of its size, or download it and name the folder.",
        )
    return find_shape(name)


def _declared_lengths(declared: Declared, most: int) -> _Found | None:
    from onlay.planning.lengths import declared_lengths

    if declared.rows is None or declared.mean_tokens is None:
        return None
    return _Found(lengths=declared_lengths(declared.rows, declared.mean_tokens, most_tokens=most))


def _cut_notes(recipe: Recipe, declared: Declared, most: int) -> list[str]:
    """What becomes in training of declared rows that are longer than the cut."""
    from onlay.planning.lengths import declared_lengths

    if declared.mean_tokens is None or declared_lengths(declared.rows or 1000, declared.mean_tokens).longest <= most:
        return []
    does = {"drop": "drops them", "cut": "cuts them", "error": "stops at them"}[recipe.data.overlong]
    return [f"declared rows over {most:,} tokens (data.max_tokens) count as that long; data.overlong = {recipe.data.overlong} {does}"]  # fmt: skip


def _found_lengths(recipe: Recipe, declared: Declared, most: int) -> _Found:
    """Of the recipe's rows by their characters, in place of what was not declared."""
    from onlay.planning.lengths import declared_lengths, measured_lengths

    files = [source.file for source in recipe.data.train_sources]
    absent = next((file for file in files if not Path(file).is_file()), None)
    if absent is not None:
        raise RecipeError(
            f"data.train: {absent} is no file here, so rows and lengths are not known.",
            "Declare them: --rows 5000 --mean-tokens 300",
        )
    looks = [look_at_rows(file, recipe) for file in files]
    rows = sum(look.rows for look in looks) if declared.rows is None else declared.rows
    characters = [length for look in looks for length in look.lengths]
    share = sum(look.trained for look in looks) / max(1, sum(characters))
    if declared.mean_tokens is not None:
        return _Found(lengths=declared_lengths(rows, declared.mean_tokens, most_tokens=most), trained_share=share)
    tokens = [max(1, round(length / CHARACTERS_PER_TOKEN)) for length in characters]
    kept = [length for length in tokens if length <= most or recipe.data.overlong != "drop"] or [most]
    told = f"about {rows:,} rows of {sum(kept) / len(kept):,.0f} tokens on average ({CHARACTERS_PER_TOKEN:g} characters a token)"
    notes: tuple[str, ...] = ()
    if long := sum(length > most for length in tokens):
        done = "dropped" if recipe.data.overlong == "drop" else "cut to that"
        notes = (f"about {long:,} of {len(tokens):,} rows that were measured are longer than {most:,} tokens: {done}",)
    found = measured_lengths(kept, told=told, most_tokens=most)
    return _Found(
        lengths=_scaled(found, max(1, round(rows * len(kept) / len(tokens)))), trained_share=share, notes=notes
    )


def _scaled(lengths: Lengths, rows: int) -> Lengths:
    """As many rows, of the same lengths: the measured ones stand for all."""
    if rows == lengths.rows:
        return lengths
    counts: dict[int, int] = {}
    so_far = given = 0
    for length, count in lengths.counts.items():
        so_far += count
        share = rows * so_far // lengths.rows
        if share > given:
            counts[length] = share - given
        given = share
    return replace(lengths, counts=counts or {lengths.longest: max(1, rows)})


def _split(lengths: Lengths, recipe: Recipe) -> tuple[Lengths, int]:
    """The training rows, and how many held-out rows an evaluation reads."""
    evaluation = recipe.evaluation
    if evaluation.file is not None:
        return lengths, evaluation.max_rows
    if evaluation.split is None or lengths.rows < 2:
        return lengths, 0
    held_out = max(1, round(evaluation.split * lengths.rows))
    return _scaled(lengths, max(1, lengths.rows - held_out)), min(held_out, evaluation.max_rows)


# --------------------------------------------------------------------------------------------------------------- GPU


def _group(name: str | None, prices: str | Path | None) -> tuple[GpuGroup, str | None, tuple[str, ...]]:
    """The GPU that was named, or this machine's; the name that a found one has where the table does not know it."""
    from onlay.hardware import find_hardware_light
    from onlay.planning.devices import GpuGroup, find_gpu, read_gpus

    if name is not None:
        return find_gpu(name, gpus=read_gpus(prices)), None, ()
    hardware = find_hardware_light()
    if not hardware.has_cuda:
        raise SetupError("This machine has no GPU to plan for.", "Name one: --gpu rtx4090, or all of them: --all-gpus")
    gpu, found, notes = as_known(hardware.devices[0], prices)
    if len(hardware.devices) > 1:
        notes = (
            *notes,
            f"for one of the {len(hardware.devices)} GPUs here; --gpu '{len(hardware.devices)}x{gpu.name}' plans for all",
        )
    return GpuGroup(gpu=gpu, count=1), found, notes


def _field_of(key: str) -> str:
    """`rank` is adapter.rank.  Raises RecipeError for what no field is called."""
    if key in SHORT:
        return SHORT[key]
    paths = list(field_paths())
    if key in paths:
        return key
    found = [path for path in paths if path.endswith(f".{key}")]
    if len(found) == 1:
        return found[0]
    if found:
        raise RecipeError(
            f"--compare {key} may be any of {', '.join(found)}.", f"Write one of them: --compare {found[0]}=..."
        )
    raise RecipeError(
        f"--compare {key} is no recipe field.",
        "Compare rank, targets, storage, epochs, gpu, model, or any section.field.",
    )
