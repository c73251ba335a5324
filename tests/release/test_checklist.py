"""Every item of the production checklist, in every state that it can be in, from made-up records."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from onlay.recipe import parse_recipe
from onlay.records import AdapterVersion, Checkpoint, Dataset, Finding, ModelFacts, Recovery, Run, SplitFacts
from onlay.release.checklist import CHECKS, Item, has_failed, is_ready, walk
from onlay.release.evidence import Evidence
from onlay.release.history import Event
from onlay.release.licences import STRICTEST, terms_of
from onlay.release.release_checks import alias_trail
from onlay.release.servers import Verdicts
from onlay.release.training_checks import spike_steps
from tests.evaluation.reports import comparison, full_report

Change = Callable[[Evidence], Evidence]


def recipe_with(**sections: dict[str, Any]) -> Any:
    gates = {"exact_match": 0.05, "trained_rows": 90}
    evaluation = {"gates": gates, "patience": 3} | sections.pop("evaluation", {})
    data = sections.pop("data", {"train": "rows.jsonl"})
    return parse_recipe({"model": {"base": "b"}, "data": data, "evaluation": evaluation, **sections})


def split(rows: int) -> SplitFacts:
    return SplitFacts(rows=rows, examples=rows, tokens=50 * rows, trained_tokens=20 * rows, longest_tokens=80)


def dataset_with(**changes: Any) -> Dataset:
    values: dict[str, Any] = {
        "path": "prepared", "source": "rows.jsonl", "source_digest": "s", "format": "messages", "template": "plain",
        "template_digest": "t", "tokenizer_digest": "k", "max_tokens": 512, "stop_token_ids": [1],
        "splits": {"train": split(95), "evaluation": split(5)}, "findings": [],
    }  # fmt: skip
    return Dataset(**(values | changes))


def facts_with(licence: str | None) -> ModelFacts:
    return ModelFacts(
        name="Qwen/Qwen3-8B", path="/models/b", revision="c", licence=licence, architecture="Qwen3ForCausalLM",
        model_type="qwen3", num_parameters=1, weight_bytes=2, vocabulary_size=3, context_tokens=4, hidden_size=5,
        num_layers=6, linear_shapes={}, weight_fingerprint="f",
    )  # fmt: skip


def run_with(**changes: Any) -> Run:
    values: dict[str, Any] = {
        "path": "runs/a", "status": "finished", "started": "2026-11-22", "seconds": 60.0, "steps": 40, "total_steps": 40,
        "examples": 95, "trained_tokens": 1900, "first_loss": 2.0, "last_loss": 0.5, "base_evaluation_loss": 2.1,
        "evaluation_loss": 0.7, "selected_step": 40, "checkpoints": [Checkpoint(step=40, path="runs/a/checkpoints/step-0000040")],
        "peak_memory_bytes": 8 * 2**30, "environment": {"device": "NVIDIA H200"},
        "proofs": {"movement": {"moved_modules": 7, "modules_without_tokens": []}, "finite": True, "base_unchanged": True},
    }  # fmt: skip
    return Run(**(values | changes))


def steps(norms: list[float]) -> list[dict[str, Any]]:
    return [{"event": "step", "step": n, "loss": 1.0, "grad_norm": norm} for n, norm in enumerate(norms, start=1)]


def verdicts(verdict: Any = "accepted") -> list[Verdicts]:
    return [Verdicts(server="vLLM", verdict=verdict, flags="vllm serve", reasons=["why"])]


def report_with(**changes: Any) -> Any:
    """A Report of an adapter that may ship: better, nothing forgotten, no refusal lost, all gates passed."""
    good = full_report()
    values: dict[str, Any] = {
        "comparisons": good.comparisons[:1], "gates": good.gates[:2], "forgetting": good.forgetting[1:], "verdict": "ship",
        "scores": {"adapter": {"exact_match": 0.7, "loop": 0.0, "no_stop": 0.01}},
        "failures": 20, "likely_causes": [],
    }  # fmt: skip
    return full_report(**(values | changes))


def version_with(number: int = 2) -> AdapterVersion:
    return AdapterVersion(
        name="support", version=number, path="p", origin="runs/a", registered_at="2026-11-22T10:00:00", registered_by="u@h",
        method="lora", files={}, weight_digest="w", rank=8, base="b", base_revision=None, base_weight_fingerprint="f",
        storage="bf16", tokenizer_digest="k", template_digest="t", evaluation_loss=0.7, scores={}, gates=[], verdict="ship",
    )  # fmt: skip


def event(action: str, to: int, alias: str = "live") -> Event:
    return Event(
        name="support", action=action, alias=alias, from_version=None, to_version=to, forced=False, reason=None, at="", by=""
    )  # fmt: skip


def sound(**changes: Any) -> Evidence:
    """A run of which everything holds, registered, promoted after another version, not deployed."""
    values: dict[str, Any] = {
        "place": "runs/a", "run": run_with(), "recipe": recipe_with(), "dataset": dataset_with(),
        "facts": facts_with("apache-2.0"), "metrics": steps([1.0 + 0.01 * n for n in range(40)]),
        "checkpoint": "step-0000040", "data_licence": "cc-by-4.0", "report": report_with(), "failures": 20,
        "failures_seen": 12, "servers": verdicts(), "version": version_with(), "aliases": {"live": 2},
        "history": [event("promote", 1), event("promote", 2)],
    }  # fmt: skip
    return Evidence(**(values | changes))


def found(seen: Evidence) -> dict[str, Item]:
    return {item.name: item for item in walk(seen)}


def test_a_sound_run_is_ready() -> None:
    items = walk(sound())
    assert {item.name: item.state for item in items if item.state != "passed"} == {
        "A/B test": "not yet applicable", "monitoring": "not yet applicable",
    }  # fmt: skip
    assert is_ready(items) and not has_failed(items)
    assert [item.name for item in items] == [name for checks in CHECKS.values() for name in checks]


def test_each_item_names_its_record_and_only_what_is_not_passed_has_a_remedy() -> None:
    for seen in (
        sound(),
        sound(report=None, version=None, history=[], aliases={}),
        sound(run=run_with(status="failed")),
    ):
        for item in walk(seen):
            assert item.record is not None and item.digest is not None and item.evidence
            assert (item.remedy is None) == (item.state == "passed")
    assert found(sound())["losses"].digest == run_with().digest
    assert found(sound())["domain scores"].digest == report_with().digest
    assert found(sound())["early stopping"].digest == recipe_with().digest


OUT_OF_MEMORY = Recovery(step=3, reason="out_of_memory", detail="memory ran out", action="cut finer")
SPIKE = Recovery(step=9, reason="loss_spike", detail="rose", action="went back")
WITH_GENERAL = recipe_with(data={"train": "rows.jsonl", "general": "general.jsonl"})
LEFT_OUT = dataset_with(
    findings=[
        Finding(code="duplicates_dropped", count=100, message="rows that repeat another; left out"),
        Finding(code="general_not_drawn", count=7, message="general rows that were not needed"),
    ]
)
FAILED_DATA = dataset_with(
    findings=[Finding(code="overlong_dropped", count=6, message="rows longer than 512 tokens; dropped")]
)
FEW_LOST = dataset_with(
    findings=[Finding(code="overlong_cut", count=5, message="cut"), Finding(code="masked_turns", count=50, message="x")]
)
NO_HELD_OUT = dataset_with(splits={"train": split(100)})
ONE_SPIKE = steps([1.0] * 20 + [50.0] + [1.0] * 9)


@pytest.mark.parametrize(
    ("name", "changes", "state", "said"),
    [
        ("data quality", {"dataset": FAILED_DATA}, "failed", "6 lost, none cut (5.7%)"),
        ("data quality", {"dataset": LEFT_OUT}, "passed", "none lost, none cut (0.0%); left out by the recipe's choice: 100 duplicates_dropped, 7 general_not_drawn"),
        ("data quality", {"dataset": FEW_LOST}, "passed", "5 cut (5.0%)"),
        ("trained rows", {"recipe": recipe_with(evaluation={"gates": {"trained_rows": 96}})}, "failed", "at least 96"),
        ("trained rows", {"recipe": recipe_with(evaluation={"gates": {}})}, "passed", "no least number"),
        ("licence of the base", {"facts": facts_with("llama3.1")}, "passed", "with conditions"),
        ("licence of the base", {"facts": facts_with("cc-by-nc-4.0")}, "failed", "commercial use no"),
        ("licence of the base", {"facts": facts_with("other")}, "not done", "unknown"),
        ("licence of the base", {"facts": facts_with(None), "stated_base_licence": "mit"}, "passed", "mit, as stated now"),
        ("licence of the base", {"facts": facts_with("cc-by-nc-4.0"), "stated_base_licence": "mit"}, "failed", "cc-by-nc-4.0"),
        ("licence of the data", {"recipe": WITH_GENERAL}, "passed", "rows.jsonl, general.jsonl (data.general): cc-by-4.0"),
        ("licence of the data", {"data_licence": None}, "not done", "no licence is stated"),
        ("licence of the data", {"data_licence": "cc-by-nc-sa-4.0"}, "failed", "non-commercial"),
        ("licence of the data", {"data_licence": None, "stated_data_licence": "own"}, "passed", "own"),
        ("separate evaluation set", {"dataset": NO_HELD_OUT}, "not done", "no rows were held out"),
        ("separate evaluation set", {"recipe": recipe_with(evaluation={"file": "held.jsonl"})}, "passed", "held.jsonl"),
        ("memory", {"run": run_with(recoveries=[OUT_OF_MEMORY])}, "passed", "ran out 1 time"),
        ("memory", {"device_memory_bytes": 24 * 2**30}, "passed", "8.0 GiB in use of 24.0 GiB on NVIDIA H200"),
        ("memory", {"run": run_with(status="failed", error="e", recoveries=[OUT_OF_MEMORY])}, "failed", "memory ran out"),
        ("memory", {"run": run_with(status="running", peak_memory_bytes=None)}, "not done", "no peak"),
        ("training", {"run": run_with(status="interrupted", steps=9)}, "not done", "interrupted after 9 of 40"),
        ("training", {"run": run_with(status="failed", error="diverged")}, "failed", "diverged"),
        ("training", {"run": run_with(fast_paths={"stopped_early": "no better loss"})}, "passed", "early: no better loss"),
        ("records", {"damage": ["recipe.yaml was edited", "x"]}, "failed", "recipe.yaml was edited"),
        ("losses", {"run": run_with(last_loss=2.0)}, "failed", "it did not fall"),
        ("losses", {"run": run_with(evaluation_loss=2.2)}, "failed", "held-out loss did not fall"),
        ("losses", {"run": run_with(first_loss=None)}, "not done", "no step"),
        ("losses", {"metrics": [{"event": "evaluation", "step": 1, "loss": math.nan}]}, "failed", "not finite"),
        ("gradient norms", {"metrics": ONE_SPIKE}, "failed", "1 spike in 30 steps"),
        ("gradient norms", {"metrics": steps([1.0] * 9 + [math.inf])}, "failed", "not finite"),
        ("gradient norms", {"metrics": steps([0.5, 1.5, 2.0, 0.1])}, "passed", "50% above 1 and clipped"),
        ("gradient norms", {"recipe": recipe_with(training={"max_grad_norm": None})}, "passed", "clipping off"),
        ("gradient norms", {"metrics": None}, "not done", "not here"),
        ("gradient norms", {"metrics": []}, "not done", "no step"),
        ("checkpoints", {"checkpoint": None, "checkpoint_problem": "torn"}, "failed", "torn"),
        ("checkpoints", {"checkpoint": None}, "failed", "none on the disk"),
        ("checkpoints", {"checkpoint": None, "metrics": None}, "not done", "not here"),
        ("checkpoints", {"checkpoint": None, "run": run_with(checkpoints=[])}, "not done", "none was written"),
        ("early stopping", {"recipe": recipe_with(evaluation={"patience": None, "select": "last"})}, "not done", "neither"),
        ("early stopping", {"dataset": NO_HELD_OUT}, "not done", "without held-out rows"),
        ("recoveries", {"run": run_with(recoveries=[SPIKE])}, "passed", "1 recovery, and the run finished"),
        ("recoveries", {"run": run_with(recoveries=[SPIKE] * 5, status="failed")}, "failed", "5 recoveries"),
        ("proofs", {"run": run_with(proofs={})}, "not done", "it moved"),
        ("proofs", {"run": run_with(proofs=run_with().proofs | {"base_unchanged": False})}, "failed", "base is unchanged"),
        ("proofs", {"run": run_with(proofs=run_with().proofs | {"movement": {"moved_modules": 0}})}, "failed", "nothing moved"),
        ("proofs", {"run": run_with(status="failed", error="the base changed", proofs={})}, "failed", "the base changed"),
        ("proofs", {"run": run_with(method="full", proofs={"movement": {"moved_weights": 3}, "finite": True})}, "passed", "3 weights"),
    ],
)  # fmt: skip
def test_before_and_during(name: str, changes: dict[str, Any], state: str, said: str) -> None:
    item = found(sound(**changes))[name]
    assert (item.state, said in item.evidence) == (state, True), item


WORSE = {"difference": -0.1, "low": -0.15, "high": -0.05, "p_value": 0.001, "verdict": "worse by 10 points"}
UNSURE = {"difference": 0.01, "low": -0.02, "high": 0.04, "p_value": 0.5, "verdict": "no difference shown"}
FORGOT = [comparison("nats_per_token", higher_is_better=False, verdict="worse by 0.1 nats")]
FAILED_GATE = full_report().gates[2:3]
HEAD_SCORES = {"rows": 20.0, "accuracy": 0.9, "majority_accuracy": 0.6, "macro_f1": 0.8}


@pytest.mark.parametrize(
    ("name", "changes", "state", "said"),
    [
        ("domain scores", {"report": None}, "not done", "no Report"),
        ("domain scores", {"report": None, "report_note": "on another record"}, "not done", "on another record"),
        ("domain scores", {"report": None, "run": run_with(scores=HEAD_SCORES)}, "passed", "90.0%"),
        ("domain scores", {"report": None, "run": run_with(scores=HEAD_SCORES | {"accuracy": 0.6})}, "failed", "60.0%"),
        ("domain scores", {"report": report_with(comparisons=[comparison(**UNSURE)])}, "failed", "0 better"),
        ("domain scores", {"report": report_with(comparisons=[comparison(), comparison("bleu", **WORSE)])}, "failed", "1 worse"),
        ("domain scores", {"report": report_with(comparisons=[comparison(against="prompt")])}, "not done", "no score"),
        # An adapter that loops less is not better at its task for it.
        ("domain scores", {"report": report_with(comparisons=[comparison("loop", higher_is_better=False)])}, "not done", "no score"),
        ("general abilities", {"report": report_with(forgetting=[])}, "not done", "not measured"),
        ("general abilities", {"report": report_with(forgetting=FORGOT, gates=[])}, "failed", "no gate says"),
        ("general abilities", {"report": report_with(forgetting=FORGOT)}, "passed", "gate forgetting"),
        ("safety", {"report": report_with(safety=[])}, "not done", "not measured"),
        ("safety", {"report": report_with(safety=[comparison("refused_harmful", **WORSE)])}, "failed", "refused harmful"),
        ("safety", {"report": None}, "not done", "no Report"),
        ("gates", {"report": report_with(gates=[], verdict="no gates")}, "not done", "has none"),
        ("gates", {"report": report_with(gates=FAILED_GATE, verdict="do not ship")}, "failed", "0 of 1 passed"),
        ("answers stop and do not repeat", {"report": report_with(scores={"adapter": {"loop": 0.06}})}, "failed", "6.0%"),
        ("answers stop and do not repeat", {"report": report_with(scores={"adapter": {}})}, "not done", "neither"),
        ("answers stop and do not repeat", {"report": report_with(scores={"adapter": {"no_stop": 0.05}})}, "passed", "5.0%"),
        ("failures looked at", {"failures_seen": 9}, "not done", "9 of 20 rows"),
        ("failures looked at", {"failures": 3, "failures_seen": 3}, "passed", "3 of 3"),
        ("failures looked at", {"failures": 0, "report": report_with(failures=0)}, "passed", "there are none"),
        ("merge or serve decided", {"version": None}, "not done", "neither merged nor registered"),
        ("merge or serve decided", {"version": None, "run": run_with(method="full")}, "passed", "nothing to merge"),
        ("serving compatibility", {"servers": verdicts("not accepted")}, "failed", "no server"),
        ("serving compatibility", {"misfit": "trained on other weights"}, "failed", "other weights"),
        ("serving compatibility", {"run": run_with(method="head")}, "not yet applicable", "head"),
        ("gates", {"run": run_with(method="head"), "report": None}, "not yet applicable", "writes nothing"),
        ("registered version", {"version": None, "run": run_with(method="full")}, "not yet applicable", "a whole model"),
        ("serving compatibility", {"run": run_with(status="running"), "servers": []}, "not done", "no adapter yet"),
        ("registered version", {"version": None}, "not yet applicable", "not registered"),
        ("registered version", {"version_problems": ["onlay.json was changed"]}, "failed", "onlay.json was changed"),
        ("rollback target", {}, "passed", "gives support@1"),
        ("rollback target", {"history": []}, "not yet applicable", "no alias live"),
        ("rollback target", {"history": [event("promote", 2)]}, "not yet applicable", "never another"),
        ("rollback target", {"history": [event("promote", 5)]}, "passed", "live is support@5"),
        ("version map", {"aliases": {"live": 2, "next": 3}}, "passed", "live is support@2, next is support@3"),
        ("version map", {"aliases": {}}, "not yet applicable", "no alias"),
        ("A/B test", {}, "not yet applicable", "no Deployment record"),
        ("monitoring", {"deployments": ["d" * 64]}, "not done", "does not tell"),
    ],
)  # fmt: skip
def test_after_and_deployment(name: str, changes: dict[str, Any], state: str, said: str) -> None:
    item = found(sound(**changes))[name]
    assert (item.state, said in item.evidence) == (state, True), item


def test_likely_causes_stand_under_the_item() -> None:
    causes = ["90% do not stop", "likely: end token untrained: 0% of the trained examples have one"]
    report = report_with(scores={"adapter": {"no_stop": 0.9}}, likely_causes=causes)
    item = found(sound(report=report))["answers stop and do not repeat"]
    assert (item.state, item.details) == ("failed", causes)


def test_edited_gates_are_shown() -> None:
    report = report_with(gate_edits=["exact_match: 0.05 when training began, 0.0 now"])
    assert any("0.0 now" in line for line in found(sound(report=report))["gates"].details)


def test_deployment_holds_nothing_up_and_what_is_not_done_is_no_failure() -> None:
    broken = walk(sound(version_problems=["changed"]))
    assert is_ready(broken) and not has_failed(broken)
    open_items = walk(sound(report=None))
    assert not is_ready(open_items) and not has_failed(open_items)
    wrong = walk(sound(damage=["changed"]))
    assert not is_ready(wrong) and has_failed(wrong)


def test_a_repeated_step_counts_once_and_the_last_counts() -> None:
    again = steps([1.0] * 20) + [{"event": "step", "step": 20, "loss": 1.0, "grad_norm": 400.0}]
    assert "in 20 steps" in found(sound(metrics=again))["gradient norms"].evidence
    assert "1 spike" in found(sound(metrics=again))["gradient norms"].evidence
    mended = steps([1.0] * 19 + [400.0]) + [{"event": "step", "step": 20, "loss": 1.0, "grad_norm": 1.0}]
    assert found(sound(metrics=mended))["gradient norms"].state == "passed"


def test_spikes_are_told_from_a_slow_rise() -> None:
    assert spike_steps([1.0] * 8 + [10.1]) == [8]
    assert spike_steps([1.0] * 8 + [9.9]) == []
    assert spike_steps([1.0] * 7 + [100.0]) == []
    assert spike_steps([1.1**n for n in range(100)]) == []


def test_the_trail_of_an_alias_is_what_rolling_back_goes_through() -> None:
    history = [event("promote", 1), event("promote", 2), event("promote", 3), event("rollback", 2), event("promote", 4)]
    assert alias_trail(history, "live") == [1, 2, 4]
    assert alias_trail(history, "next") == []
    assert alias_trail([*history, event("rollback", 2), event("rollback", 1)], "live") == [1]


@pytest.mark.parametrize(
    ("names", "commercial"),
    [
        (("apache-2.0", "Apache License 2.0", "MIT", "mit license", "bsd-3-clause-clear", "BSD", "cc0-1.0", "CC-BY-4.0"), "yes"),
        (("cc by 4.0", "odc-by", "cdla-permissive-2.0", "isc", "own", "bsl-1.0", "etalab-2.0"), "yes"),
        (("cc-by-sa-4.0", "llama2", "llama3", "llama3.1", "Llama-3.2", "llama3.3", "llama4", "gemma", "qwen"), "with conditions"),
        (("openrail", "openrail++", "bigscience-bloom-rail-1.0", "bigcode-openrail-m", "creativeml-openrail-m"), "with conditions"),
        (("gpl-3.0", "GPL-3.0-only", "agpl-3.0", "lgpl-2.1", "odbl", "mpl-2.0", "cc-by-nd-4.0"), "with conditions"),
        (("['apache-2.0', 'gemma']", "mit, llama3.1"), "with conditions"),
        (("cc-by-nc-4.0", "cc-by-nc-sa-4.0", "CC-BY-NC-ND-3.0", "apple-amlr", "intel-research", "qwen-research"), "no"),
        (("fair-noncommercial-research-license", "deepfloyd-if-license", "mit and cc-by-nc-4.0"), "no"),
        ((None, "", "other", "unknown", "cc", "proprietary", "mit-like", "llama5", "mit, other", "no-apache-2.0"), "unknown"),
    ],
)  # fmt: skip
def test_licences(names: tuple[str | None, ...], commercial: str) -> None:
    assert {name: terms_of(name).commercial for name in names} == dict.fromkeys(names, commercial)
    assert all(terms_of(name).condition for name in names)


def test_what_is_strict_comes_first() -> None:
    assert set(STRICTEST) == {"yes", "no", "with conditions", "unknown"}
    assert terms_of("apache-2.0, cc-by-nc-4.0").commercial == "no"


def test_a_change_of_the_evidence_is_seen() -> None:
    seen = sound()
    assert found(replace(seen, servers=()))["serving compatibility"].state == "not done"
