"""The plan that `train` makes and follows: from prepared rows to a Plan, to the recipe of the run, to what became of it."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from onlay.errors import BaseModelError, RecipeError
from onlay.recipe import Recipe
from onlay.stages.events import Report
from onlay.stages.lengths import KnownLengths, lengths_of, remember_lengths
from onlay.stages.plans import ASK_FOR_LESS, Wanted, as_known, plan_wanted

if TYPE_CHECKING:
    from onlay.hardware import Device
    from onlay.planning.forecast import ForecastWatch
    from onlay.planning.shapes import BaseShape
    from onlay.records import Plan, Run
    from onlay.stages.preparing import Prepared


def plan_run(prepared: Prepared, *, device: Device | None, gpus: int, report: Report) -> Plan | None:
    """The plan of a run on these GPUs, told in ten lines; None on a CPU and for a base without a closed form.

    Also keeps the lengths of the rows for later plans.  Raises SetupError where nothing fits, RecipeError for what the recipe asks
    for and does not fit, and OutputError.
    """
    from onlay.planning.families import ruled_families
    from onlay.planning.forecast import summary_lines
    from onlay.planning.shapes import PLAIN_FAMILIES, shape_of_facts

    recipe, facts = prepared.source.recipe, prepared.source.facts
    known = lengths_of(prepared)
    remember_lengths(recipe, known)
    if device is None:
        return None
    if facts.model_type not in {*ruled_families(), *PLAIN_FAMILIES}:
        report(f"no plan: there is no closed form for {facts.model_type}")
        return None
    try:
        made = plan_known(recipe, shape_of_facts(facts), known, device=device, gpus=gpus)
    except BaseModelError as error:
        report(f"no plan: {error.problem}")
        return None
    for line in summary_lines(made):
        report(line)
    return made


def plan_known(recipe: Recipe, shape: BaseShape, known: KnownLengths, *, device: Device, gpus: int) -> Plan:
    """The plan for rows that were read.  Raises BaseModelError for a base without a closed form, otherwise as `plan_run`."""
    from onlay.planning.devices import GpuGroup

    gpu, found, notes = as_known(device, None)
    wanted = Wanted(
        recipe=recipe, shape=shape, lengths=known.lengths, trained_share=known.trained_share, notes=notes,
        held_out_rows=min(known.held_out_rows, recipe.evaluation.max_rows),
        has_bitsandbytes=importlib.util.find_spec("bitsandbytes") is not None,
    )  # fmt: skip
    made = plan_wanted(wanted, GpuGroup(gpu=gpu, count=gpus), found=found, prices=None)
    if made.refused is not None:
        raise RecipeError(made.refused, ASK_FOR_LESS)
    return made


def follow_plan(recipe: Recipe, made: Plan) -> Recipe:
    """The recipe of the run: what it left open is what the plan decided.  What layers keep is no field of it, and the session's."""
    settings = made.settings
    model = recipe.model.model_copy(update={"storage": settings.storage})
    training = recipe.training.model_copy(
        update={
            "optimizer": settings.optimizer, "offload_activations": settings.offload_activations,
            "micro_batch_tokens": settings.micro_batch_tokens,
        }
    )  # fmt: skip
    return recipe.model_copy(update={"model": model, "training": training})


def follow_steps(report: Report, made: Plan) -> tuple[Report, ForecastWatch]:
    """A report that also tells, after the first steps, how long the run will take now; and what has watched them."""
    from onlay.planning.forecast import ForecastWatch
    from onlay.training.loop import StepReport

    watch = ForecastWatch(made)

    def told(event: object) -> None:
        report(event)
        if isinstance(event, StepReport):
            said = watch.note(
                tokens=event.tokens, seconds=event.seconds, step=event.step, total_steps=event.total_steps
            )
            if said is not None:
                report(said)

    return told, watch


def with_forecast(run: Run, watch: ForecastWatch) -> Run:
    """The Run with what was planned beside what was measured."""
    seconds = run.seconds if run.status == "finished" else None
    return run.model_copy(update={"forecast": watch.check(peak_bytes=run.peak_memory_bytes, training_seconds=seconds)})
