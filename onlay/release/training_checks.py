"""The production checklist before and during training: data, licences, memory; losses, gradients, checkpoints, proofs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from onlay.records import Record
from onlay.release.evidence import Evidence, Outcome, failed, not_done, of, passed
from onlay.release.licences import terms_of

LOST_ROWS = ("overlong_dropped", "nothing_trained")
CHOSEN_AWAY = ("duplicates_dropped", "balanced_away", "thinned", "general_held_out", "general_not_drawn")
"""Rows that the recipe asked to leave out; no loss."""
CUT_ROWS = ("overlong_cut",)
MOST_LOST = 0.05
"""Share of the chosen rows that may be lost or cut: with more, the adapter learns from other data than was chosen."""
WINDOW_STEPS = 32
LEAST_WINDOW_STEPS = 8
SPIKE_FACTOR = 10.0
"""A gradient norm is a spike above so many times the median of the last WINDOW_STEPS ones."""
MOST_SPIKES = 0.02
"""Share of the steps."""


# ------------------------------------------------------------------------------------------------------------- before


def data_quality(seen: Evidence) -> Outcome:
    dataset = seen.dataset
    counts = {finding.code: finding.count for finding in dataset.findings}
    rows = sum(split.rows for split in dataset.splits.values())
    lost, cut = (sum(counts.get(code, 0) for code in codes) for codes in (LOST_ROWS, CUT_ROWS))
    share = (lost + cut) / max(1, rows + lost)
    told = f"{of(rows, 'row')}, {_count(lost)} lost, {_count(cut)} cut ({share:.1%})"
    left_out = [f"{counts[code]:,} {code}" for code in CHOSEN_AWAY if code in counts]
    if left_out:
        told += f"; left out by the recipe's choice: {', '.join(left_out)}"
    details = [f"{finding.count:,} {finding.message}" for finding in dataset.findings]
    if share > MOST_LOST:
        remedy = "Raise data.max_tokens, or shorten and correct the rows that are named: onlay prepare RECIPE"
        return failed(f"{told}; at most {MOST_LOST:.0%} may be lost or cut", dataset, remedy, details=details)
    return passed(told, dataset, details=details)


def _count(rows: int) -> str:
    return f"{rows:,}" if rows else "none"


def trained_rows(seen: Evidence) -> Outcome:
    """Rows of long text may be several examples, and dropped rows are none: the smaller number is at most what trained."""
    split = seen.dataset.splits["train"]
    rows, least = min(split.rows, split.examples), seen.recipe.evaluation.gates.get("trained_rows")
    told = f"{of(rows, 'row')}, {of(split.trained_tokens, 'trained token')} an epoch"
    if least is None:
        return passed(f"{told}; no least number is asked for (evaluation.gates: trained_rows)", seen.dataset)
    if rows < least:
        return failed(f"{told}; at least {least:g} are asked for", seen.dataset, "Add rows, and train again")
    return passed(f"{told}; at least {least:g} are asked for", seen.dataset)


def base_licence(seen: Evidence) -> Outcome:
    unknown = f"Read the base's licence and name it: onlay check {seen.place} --base-licence NAME"
    forbidden = "Train on a base whose licence allows it; `onlay init DATA` proposes one"
    recorded, stated = seen.facts.licence, seen.stated_base_licence
    return _licence(seen.facts.name, recorded, stated, source=seen.facts, unknown=unknown, forbidden=forbidden)


def data_licence(seen: Evidence) -> Outcome:
    unknown = f"Name it, own for rows of your own: data.licence in the recipe, or onlay check {seen.place} --data-licence NAME"
    forbidden, recorded, stated = "Train on rows whose licence allows it", seen.data_licence, seen.stated_data_licence
    general = seen.recipe.data.general
    what = seen.dataset.source if general is None else f"{seen.dataset.source}, {general} (data.general)"
    return _licence(what, recorded, stated, source=seen.dataset, unknown=unknown, forbidden=forbidden)


def _licence(
    what: str, recorded: str | None, stated: str | None, *, source: Record, unknown: str, forbidden: str
) -> Outcome:
    """What is recorded counts where it is known; what is stated now only fills the gap."""
    terms, named = terms_of(recorded), recorded
    if terms.commercial == "unknown" and stated is not None:
        terms, named = terms_of(stated), f"{stated}, as stated now"
    told = f"{what}: {f'{named}, ' if named else ''}commercial use {terms.commercial} ({terms.condition})"
    if terms.commercial == "unknown":
        return not_done(told, source, unknown)
    return failed(told, source, forbidden) if terms.commercial == "no" else passed(told, source)


def evaluation_set(seen: Evidence) -> Outcome:
    split, evaluation = seen.dataset.splits.get("evaluation"), seen.recipe.evaluation
    if split is None or not split.examples:
        remedy = "Set evaluation.split (0.05) or evaluation.file, and train again"
        return not_done("no rows were held out", seen.dataset, remedy)
    if evaluation.file is not None:
        proof = f"of {evaluation.file}; preparing refuses a prompt that is also among the training rows"
    else:
        proof = f"of {seen.dataset.source}, held out in groups, so that no prompt is on both sides"
    return passed(f"{of(split.rows, 'row')} {proof}", seen.dataset)


def memory(seen: Evidence) -> Outcome:
    run = seen.run
    short = [recovery for recovery in run.recoveries if recovery.reason == "out_of_memory"]
    details = [f"step {recovery.step}: {recovery.detail}; {recovery.action}" for recovery in short]
    if run.status == "failed" and run.recoveries and run.recoveries[-1].reason == "out_of_memory":
        remedy = "Lower data.max_tokens, set training.recompute to all or model.storage to nf4, and train again"
        return failed(f"memory ran out: {run.error}", run, remedy, details=details)
    if not run.peak_memory_bytes:
        return not_done("the run has recorded no peak yet", run, _go_on(seen))
    told = f"at most {_gibibytes(run.peak_memory_bytes)} in use"
    if seen.device_memory_bytes is not None:
        told += f" of {_gibibytes(seen.device_memory_bytes)} on {run.environment.get('device', 'the device')}"
    return passed(f"{told}; ran out {of(len(short), 'time')}", run, details=details)


def _gibibytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


# ------------------------------------------------------------------------------------------------------------- during


def training(seen: Evidence) -> Outcome:
    run = seen.run
    told = f"{run.status} after {run.steps:,} of {run.total_steps:,} steps"
    if run.status == "failed":
        return failed(f"{told}: {run.error}", run, _go_on(seen))
    if not seen.finished:
        return not_done(told, run, _go_on(seen))
    early = run.fast_paths.get("stopped_early")
    return passed(f"{told}, early: {early}" if early else told, run)


def records(seen: Evidence) -> Outcome:
    """That what the other checks read is what training and evaluation wrote."""
    if seen.damage:
        remedy = "Put the files back as they were, or train and evaluate again"
        return failed(f"changed since: {seen.damage[0]}", seen.run, remedy, details=seen.damage[1:])
    return passed("as they were written", seen.run, details=[f"not compared: {what}" for what in seen.unchecked])


def losses(seen: Evidence) -> Outcome:
    run = seen.run
    if run.first_loss is None or run.last_loss is None:
        return not_done("no step was taken yet", run, _go_on(seen))
    told = [f"{run.first_loss:.4f} at the first step, {run.last_loss:.4f} over the last tenth"]
    wrong = []
    held_out = [event["loss"] for event in seen.metrics or () if event["event"] == "evaluation"]
    if not all(map(math.isfinite, [run.first_loss, run.last_loss, *held_out])):
        wrong.append("a loss is not finite")
    if run.last_loss >= run.first_loss:
        wrong.append("it did not fall")
    if run.base_evaluation_loss is not None and run.evaluation_loss is not None:
        told.append(f"held out {run.base_evaluation_loss:.4f} before, {run.evaluation_loss:.4f} after")
        if run.evaluation_loss >= run.base_evaluation_loss:
            wrong.append("the held-out loss did not fall")
    evidence = "; ".join(told + wrong)
    if wrong:
        remedy = "Look at the rows (onlay prepare RECIPE --show 3), lower training.learning_rate, and train again"
        return failed(evidence, run, remedy)
    return passed(evidence, run)


def gradient_norms(seen: Evidence) -> Outcome:
    if seen.metrics is None:
        return not_done(
            "metrics.jsonl is in the run folder, which is not here", seen.run, f"onlay check RUN, where {seen.run.path} is"
        )  # fmt: skip
    # A step that was repeated after a recovery stands more than once, and the last one counts.
    of_step = {event["step"]: float(event["grad_norm"]) for event in seen.metrics if event["event"] == "step"}
    norms = [of_step[step] for step in sorted(of_step)]
    if not norms:
        return not_done("metrics.jsonl holds no step", seen.run, _go_on(seen))
    most = seen.recipe.training.max_grad_norm
    clipped = (
        "clipping off" if most is None else f"{_share([norm > most for norm in norms])} above {most:g} and clipped"
    )
    spikes = spike_steps(norms)
    middle, largest = statistics.median(norms), max(norms)
    told = (
        f"median {middle:.3g}, largest {largest:.3g}; {clipped}; {of(len(spikes), 'spike')} in {of(len(norms), 'step')}"
    )
    remedy = (
        "Lower training.learning_rate, set training.max_grad_norm, look at the rows of those steps, and train again"
    )
    if not all(map(math.isfinite, norms)):
        return failed(f"{told}; one is not finite", seen.run, remedy)
    if len(spikes) > MOST_SPIKES * len(norms):
        return failed(f"{told}; at most {MOST_SPIKES:.0%} may be", seen.run, remedy)
    return passed(told, seen.run)


def spike_steps(norms: Sequence[float]) -> list[int]:
    """Places of the norms above SPIKE_FACTOR times the median of those before."""
    found = []
    for place, norm in enumerate(norms):
        before = norms[max(0, place - WINDOW_STEPS) : place]
        if len(before) >= LEAST_WINDOW_STEPS and norm > SPIKE_FACTOR * statistics.median(before):
            found.append(place)
    return found


def _share(flags: Sequence[bool]) -> str:
    return f"{sum(flags) / len(flags):.0%}"


def checkpoints(seen: Evidence) -> Outcome:
    run = seen.run
    if seen.checkpoint_problem is not None:
        remedy = "Delete that folder to go on from the one before; a finished run can only be trained again"
        return failed(seen.checkpoint_problem, run, remedy)
    if seen.checkpoint is not None:
        return passed(f"{of(len(run.checkpoints), 'checkpoint')} recorded, the latest readable: {seen.checkpoint}", run)
    if seen.metrics is None:
        return not_done("they are in the run folder, which is not here", run, f"onlay check RUN, where {run.path} is")
    if run.checkpoints:
        evidence = f"{of(len(run.checkpoints), 'checkpoint')} recorded, none on the disk"
        return failed(evidence, run, f"Restore {run.path}/checkpoints, or train again")
    return not_done("none was written yet", run, _go_on(seen))


def early_stopping(seen: Evidence) -> Outcome:
    evaluation = seen.recipe.evaluation
    source, remedy = seen.recipe, "Hold rows out (evaluation.split), keep evaluation.select: best, and train again"
    if "evaluation" not in seen.dataset.splits:
        return not_done("without held-out rows nothing can tell when to stop", source, remedy)
    ways = []
    if evaluation.patience is not None:
        ways.append(f"stops after {of(evaluation.patience, 'evaluation')} without a better held-out loss")
    if evaluation.select == "best":
        kept = f", which is step {seen.run.selected_step:,}" if seen.run.selected_step is not None else ""
        ways.append(f"keeps the weights with the best held-out loss{kept}")
    if not ways:
        return not_done("neither evaluation.patience nor evaluation.select: best is set", source, remedy)
    return passed("; ".join(ways), source)


def recoveries(seen: Evidence) -> Outcome:
    run = seen.run
    details = [f"step {one.step}: {one.reason}, {one.detail}; {one.action}" for one in run.recoveries]
    if run.status == "failed" and run.recoveries:
        remedy = "Lower training.learning_rate, or what the last one names, and train again"
        return failed(
            f"the run failed after {of(len(details), 'recovery', 'recoveries')}", run, remedy, details=details
        )
    if not seen.finished:
        return not_done(f"{of(len(details), 'recovery', 'recoveries')} so far", run, _go_on(seen), details=details)
    told = f"{of(len(details), 'recovery', 'recoveries')}, and the run finished" if details else "none was needed"
    return passed(told, run, details=details)


def proofs(seen: Evidence) -> Outcome:
    run, found = seen.run, seen.run.proofs
    movement = found.get("movement", {})
    moved = movement.get("moved_modules", movement.get("moved_weights"))
    needed = {"finite": "every weight is finite"}
    if run.method != "full":
        needed["base_unchanged"] = "the base is unchanged"
    if "held_still" in found:
        needed["held_still"] = "what was to stay has stayed"
    wrong = [f"not proven: {what}" for name, what in needed.items() if name in found and found[name] is not True]
    if moved == 0:
        wrong.append("nothing moved")
    if run.status == "failed":
        wrong.append(f"the run failed: {run.error}" if run.error else "the run failed")
    if wrong:
        return failed("; ".join(wrong), run, "Train again; the adapter is not to be used")
    missing = [what for name, what in needed.items() if name not in found]
    if moved is None:
        missing.insert(0, "it moved (that takes 2 updates)")
    if missing:
        return not_done(f"not proven: {', '.join(missing)}", run, _go_on(seen))
    what = "modules" if "moved_modules" in movement else "weights"
    idle = movement.get(f"{what}_without_tokens", [])
    details = [f"{of(len(idle), what.removesuffix('s'))} got no token in the first steps"] if idle else []
    return passed(f"{moved:,} {what} moved, {', '.join(needed.values())}", run, details=details)


def _go_on(seen: Evidence) -> str:
    if seen.finished:
        return "Train again: onlay train RECIPE"
    return f"onlay train --resume {seen.place}"
