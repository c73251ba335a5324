"""The production checklist after training and for deployment: scores, gates, servers; versions and the way back."""

from __future__ import annotations

from collections.abc import Sequence

from onlay.evaluation.causes import MANY
from onlay.evaluation.scores import HEALTH
from onlay.evaluation.units import outcome, spoken
from onlay.records import Comparison, Gate, Report
from onlay.release.evidence import Evidence, Outcome, failed, not_done, not_yet, of, passed
from onlay.release.history import Event

LEAST_SEEN = 10
"""Failures that a person should have compared, where there are so many."""


# -------------------------------------------------------------------------------------------------------------- after


def domain_scores(seen: Evidence) -> Outcome:
    report = seen.report
    if report is None:
        return _label_scores(seen) if seen.run.scores else _not_evaluated(seen)
    against_base = [one for one in report.comparisons if one.against == "base" and one.score not in HEALTH]
    others = [one for one in report.comparisons if one.against != "base" and one.score not in HEALTH]
    details = [_told(one) for one in (*against_base, *others)]
    if not against_base:
        remedy = f"onlay evaluate {seen.place}, with base in evaluation.baselines"
        return not_done("no score was compared with the base's", report, remedy)
    better, worse = ([one for one in against_base if outcome(one) == kind] for kind in ("better", "worse"))
    told = f"on {of(report.rows, 'row')}, of {of(len(against_base), 'score')} {len(better)} better than the base's, {len(worse)} worse"
    if worse or not better:
        return failed(told, report, _look_at_failures(report), details=details)
    return passed(told, report, details=details)


def _label_scores(seen: Evidence) -> Outcome:
    """A classification head's, from the run itself: its base says no labels, so the most frequent one is what to beat."""
    scores = seen.run.scores
    told = f"accuracy {scores['accuracy']:.1%} on {of(int(scores['rows']), 'row')}, {scores['majority_accuracy']:.1%} by the most frequent label"
    if scores["accuracy"] <= scores["majority_accuracy"]:
        return failed(told, seen.run, "Add rows of the other labels, and train again")
    return passed(told, seen.run)


def general_abilities(seen: Evidence) -> Outcome:
    remedy = "Train for fewer epochs or at a lower training.learning_rate; or allow more: evaluation.gates: {forgetting: 0.05}"
    found = seen.report.forgetting if seen.report is not None else None
    return _kept(seen, found, gate="forgetting", what="general text and checks", remedy=remedy)


def safety(seen: Evidence) -> Outcome:
    remedy = (
        "Add rows in which what is harmful is refused, and train again; or allow more: evaluation.gates: {safety: 0.02}"
    )
    found = seen.report.safety if seen.report is not None else None
    return _kept(seen, found, gate="safety", what="refusals", remedy=remedy)


def _kept(seen: Evidence, found: Sequence[Comparison] | None, *, gate: str, what: str, remedy: str) -> Outcome:
    """Nothing is worse than the base; or a gate says how much may be, and it holds."""
    if seen.report is None or found is None:
        return _not_evaluated(seen)
    if not found:
        return not_done(f"{what} were not measured", seen.report, f"onlay evaluate {seen.place}")
    details = [_told(one) for one in found]
    limit = next((one for one in seen.report.gates if one.name == gate), None)
    if limit is not None:
        made = f"gate {gate}: {limit.reason}"
        return (
            passed(made, seen.report, details=details)
            if limit.passed
            else failed(made, seen.report, remedy, details=details)
        )
    worse = [one for one in found if outcome(one) == "worse"]
    if worse:
        told = f"{_told(worse[0])}; no gate says how much may be lost"
        return failed(told, seen.report, remedy, details=details)
    return passed(f"{what}: no difference to the base's shown, or better", seen.report, details=details)


def gates(seen: Evidence) -> Outcome:
    report = seen.report
    if report is None:
        return _not_evaluated(seen)
    edits = [f"edited after training began, and not read: {edit}" for edit in report.gate_edits]
    if not report.gates:
        remedy = "Set evaluation.gates in the recipe, train and evaluate again: gates are fixed when training starts"
        return not_done("the recipe has none", report, remedy, details=edits)
    failing = [gate for gate in report.gates if not gate.passed]
    details = [*map(_told_gate, report.gates), *edits]
    told = f"{len(report.gates) - len(failing)} of {len(report.gates)} passed; the verdict is: {report.verdict}"
    if failing or report.verdict != "ship":
        return failed(told, report, _look_at_failures(report), details=details)
    return passed(told, report, details=details)


def answers_end(seen: Evidence) -> Outcome:
    """The share of answers that loop or do not stop; where it is too large, its likely causes."""
    report = seen.report
    if report is None:
        return _not_evaluated(seen)
    scores = report.scores.get(report.system, {})
    rates = {name: rate for name in ("loop", "no_stop") if (rate := scores.get(name)) is not None}
    if not rates:
        return not_done("neither was measured", report, f"onlay evaluate {seen.place}")
    words = {"loop": "end in a loop", "no_stop": "do not stop by themselves"}
    told = ", ".join(f"{rate:.1%} of the answers {words[name]}" for name, rate in rates.items())
    if max(rates.values()) > MANY:
        remedy = "Put right the first cause that is likely, train and evaluate again"
        return failed(f"{told}; at most {MANY:.0%} may", report, remedy, details=report.likely_causes)
    return passed(told, report)


def failures_seen(seen: Evidence) -> Outcome:
    """Looking leaves no trace but a blind comparison's choices."""
    report = seen.report
    if report is None:
        return _not_evaluated(seen)
    wanted = min(seen.failures, LEAST_SEEN)
    if not wanted:
        return passed("there are none" if not report.failures else "no right answer is known for any", report)
    told = f"{seen.failures_seen:,} of {of(seen.failures, 'row')} in failures.jsonl were compared by a person"
    if seen.failures_seen < wanted:
        return not_done(f"{told}; {wanted} are asked for", report, f"onlay compare {report.path}")
    return passed(told, report)


def merge_or_serve(seen: Evidence) -> Outcome:
    if seen.merge is not None:
        return passed(f"merged: {seen.merge.path}", seen.merge)
    if seen.version is not None:
        return passed(f"to be served as an adapter: {seen.version.id}", seen.version)
    if seen.run.method == "full":
        return passed("a model of its own: there is nothing to merge", seen.run)
    register = f"onlay register {seen.place} --name NAME"
    if seen.run.method == "head":  # It is no update of the base's weights.
        return not_done("not registered", seen.run, register)
    return not_done("neither merged nor registered", seen.run, f"onlay merge {seen.place} OUT, or {register}")


def serving_compatibility(seen: Evidence) -> Outcome:
    if seen.misfit is not None:
        return failed(seen.misfit, seen.facts, "Put the base and the adapter back as they were, or train again")
    if seen.run.method == "full":
        return passed("a plain transformers model: every server that knows the architecture", seen.run)
    if seen.run.method == "head":
        remedy = f"onlay generate {seen.place} --prompt 'a text'"
        return not_yet("a classification head is no adapter that servers know", seen.run, remedy)
    if not seen.finished or not seen.servers:
        return not_done("there is no adapter yet", seen.run, f"onlay train --resume {seen.place}")
    taking = [one for one in seen.servers if one.verdict != "not accepted"]
    details = ["; ".join([f"{one.server}: {one.verdict}", *one.reasons]) for one in seen.servers]
    commands = {one.server: one.flags for one in taking if one.flags}
    merged = f"; merged into {seen.merge.path}, any" if seen.merge is not None else ""
    if taking:
        return passed(
            f"{', '.join(one.server for one in taking)}{merged}", seen.facts, details=details, commands=commands
        )
    if seen.merge is not None:
        return passed(f"no server takes the adapter{merged}", seen.merge, details=details)
    return failed(
        "no server takes the adapter", seen.facts, f"onlay merge {seen.place} OUT, and serve OUT", details=details
    )


def _not_evaluated(seen: Evidence) -> Outcome:
    note = f" ({seen.report_note})" if seen.report_note else ""
    if not seen.finished:
        return not_done(
            f"the run is {seen.run.status}", seen.run, f"onlay train --resume {seen.place}, then onlay evaluate {seen.place}"
        )  # fmt: skip
    if seen.run.method == "head":
        told = "a classification head says labels and writes nothing that could be evaluated so"
        return not_yet(told, seen.run, f"Its scores decide: onlay show {seen.place}")
    return not_done(f"there is no Report on it{note}", seen.run, f"onlay evaluate {seen.place}")


def _look_at_failures(report: Report) -> str:
    if report.failures:
        return f"Correct what {report.path}/failures.jsonl shows, add it to the training rows, and train again"
    return f"Read {report.path}/report.html, and train again"


def _told(one: Comparison) -> str:
    return f"{spoken(one.score)} against {one.against}: {one.verdict}"


def _told_gate(gate: Gate) -> str:
    return f"{gate.name} {'passed' if gate.passed else 'failed'}: {gate.reason}"


# --------------------------------------------------------------------------------------------------------- deployment


def registered_version(seen: Evidence) -> Outcome:
    version = seen.version
    if version is None:
        return _not_registered(seen)
    if seen.version_problems:
        remedy = "Restore the registry from a copy, or register the run again"
        return failed(f"{version.id} is not as registered: {'; '.join(seen.version_problems)}", version, remedy)
    return passed(f"{version.id} of {version.registered_at[:10]}, every file as registered", version)


def rollback_target(seen: Evidence) -> Outcome:
    version, alias = seen.version, seen.recipe.release.alias
    if version is None:
        return _not_registered(seen)
    trail = alias_trail(seen.history, alias)
    if not trail:
        remedy = f"onlay promote {version.id} --as {alias}"
        return not_yet(f"{version.name} has no alias {alias} yet", version, remedy)
    if trail[-1] != version.version:
        told = f"{alias} is {version.name}@{trail[-1]}, to which it goes back once {version.id} was promoted"
        return passed(told, version)
    if len(trail) == 1:
        remedy = f"Nothing to do until a second version is promoted: {alias} can then go back to {version.id}"
        return not_yet(f"{alias} was never another version than {version.id}", version, remedy)
    return passed(f"onlay rollback {version.name} gives {version.name}@{trail[-2]}", version)


def alias_trail(history: Sequence[Event], alias: str) -> list[int]:
    """Versions that an alias can go back through, the one it is at last; a rollback takes the last one off."""
    trail: list[int] = []
    for event in history:
        if event.alias == alias and event.action == "promote":
            trail.append(event.to_version)
        elif event.alias == alias and event.action == "rollback":
            trail.pop()
    return trail


def version_map(seen: Evidence) -> Outcome:
    version = seen.version
    if version is None:
        return _not_registered(seen)
    if not seen.aliases:
        return not_yet("no alias points at any version", version, f"onlay promote {version.id} --as live")
    told = ", ".join(f"{alias} is {version.name}@{number}" for alias, number in sorted(seen.aliases.items()))
    return passed(told, version)


def ab_test(seen: Evidence) -> Outcome:
    return _deployed(seen, "an A/B test")


def monitoring(seen: Evidence) -> Outcome:
    return _deployed(seen, "monitoring")


def _deployed(seen: Evidence, what: str) -> Outcome:
    if seen.version is None:
        return _not_registered(seen)
    if not seen.deployments:
        remedy = f"Serve {seen.version.id} with a server above; {what} is then set up there"
        return not_yet("the ledger of this installation holds no Deployment record of it", seen.version, remedy)
    told = f"deployed; whether there is {what}, a Deployment record does not tell this version of onlay"
    remedy = f"onlay show {seen.deployments[-1][:12]}"
    return Outcome(state="not done", evidence=told, record="deployment", digest=seen.deployments[-1], remedy=remedy)


def _not_registered(seen: Evidence) -> Outcome:
    if seen.run.method == "full":
        told = "the registry keeps adapters and heads, and this is a whole model"
        return not_yet(told, seen.run, f"Serve {seen.place}/model as it is")
    return not_yet("the run is not registered", seen.run, f"onlay register {seen.place} --name NAME")
