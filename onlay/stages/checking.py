"""`check`: the production checklist of a run or a registered version, from what lies on the disk and in the ledger.

Nothing is loaded and nothing is written.  No torch is imported.
"""

from __future__ import annotations

import glob
import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onlay import ledger
from onlay.errors import BaseModelError, OutputError, ProofError
from onlay.recipe import Recipe, digest_of, parse_recipe, read_recipe
from onlay.records import AdapterVersion, Dataset, Merge, ModelFacts, Run
from onlay.records import Report as EvaluationReport
from onlay.stages.registering import find_version, run_folder
from onlay.stages.reports import find_report

if TYPE_CHECKING:
    from onlay.release.checklist import Item
    from onlay.release.servers import Verdicts

_CHECKPOINT = re.compile(r"step-\d{7}")
_UNHASHED = "README.md"
"""PEFT's: empty but for the base's place on this machine; no part of an adapter's digests."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checklist:
    run: str
    """As the user named it."""
    ready: bool
    """Nothing before deployment failed or is left to do."""
    failed: bool
    """Something before deployment failed."""
    items: list[Item]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where the records and files lie."""

    named: str
    records: Path
    """Run folder, or a version's folder."""
    artefact: Path
    run_folder: Path | None
    """None for a version whose run folder is not here."""
    version: AdapterVersion | None


def check(what: str | Path, *, base_licence: str | None = None, data_licence: str | None = None) -> Checklist:
    """Walks the production checklist of a run folder or a registered version.

    `base_licence` and `data_licence` are read where the records name none that is known.  Raises OutputError for what is
    neither a run nor a version, and OnlayError for records that cannot be read.
    """
    from onlay.release.checklist import has_failed, is_ready, walk
    from onlay.release.evidence import Evidence

    place = _find(str(what))
    folder = place.records
    run, recipe = Run.load(folder), read_recipe(folder / "recipe.yaml")
    dataset, facts = Dataset.load(folder), ModelFacts.load(folder)
    damage, unchecked = _compare_records(place, run, recipe, dataset, facts)
    report, report_folder, note, odd = _find_report(place, run)
    misfit, servers = _compatibility(place, run, facts)
    damage += odd
    items = walk(
        Evidence(
            place=place.named, run=run, recipe=recipe, dataset=dataset, facts=facts, damage=damage, unchecked=unchecked,
            device_memory_bytes=_device_memory(run), data_licence=recipe.data.licence,
            stated_base_licence=base_licence, stated_data_licence=data_licence, report=report, report_note=note,
            merge=_find_merge(run), misfit=misfit, servers=servers, **_training_files(place), **_failures(report_folder),
            **_registered(place, run),
        )
    )  # fmt: skip
    return Checklist(run=place.named, ready=is_ready(items), failed=has_failed(items), items=items)


# ------------------------------------------------------------------------------------------------------------ finding


def _find(what: str) -> _Place:
    given = Path(what)
    if given.is_dir():
        folder = run_folder(given)
        recipe = read_recipe(folder / "recipe.yaml") if (folder / "run.json").is_file() else None
        artefact = folder / recipe.adapter.artefact if recipe is not None else folder
        return _Place(named=str(folder), records=folder, artefact=artefact, run_folder=folder, version=None)
    if given.exists() or "/" in what:
        raise OutputError(
            f"{what} is neither a run folder nor a registered version.",
            "`onlay log` lists the runs, `onlay versions` the versions.",
        )
    version = find_version(what)
    folder, origin = Path(version.path), Path(version.origin)
    here = (origin / "run.json").is_file() and Run.load(origin).digest == version.sources.get("run")
    return _Place(
        named=version.id, records=folder, artefact=folder, run_folder=origin if here else None, version=version
    )


def _find_report(place: _Place, run: Run) -> tuple[EvaluationReport | None, Path | None, str | None, list[str]]:
    """The Report, its folder, why one that is there does not count, and which was changed.

    A version has its own or none: that is what promoting it goes by.  Of a run it is the one that registering would take.
    """
    if place.version is not None:
        if "report.json" not in place.version.files:
            return None, None, "it was registered without one", []
        report = EvaluationReport.load(place.records)
        folder = Path(report.path)
        same = (folder / "report.json").is_file() and EvaluationReport.load(folder).digest == report.digest
        other = report.sources.get("weights", place.version.weight_digest) != place.version.weight_digest
        return report, folder if same else None, None, ["its Report measured other weights"] if other else []
    found = find_report(place.records, run)
    return found.report, found.folder, "; ".join(found.notes) or None, found.damage


def _find_merge(run: Run) -> Merge | None:
    """The latest that was proven and is still there."""
    for row in reversed(ledger.Ledger().rows("merge")):
        values = row.values
        of_run = values.get("sources", {}).get("run") == run.digest and values.get("status") == "merged"
        if of_run and (Path(row.path) / "config.json").is_file():
            return Merge.model_validate(values)
    return None


def _registered(place: _Place, run: Run) -> dict[str, Any]:
    """The version (of a run: the latest registered here), what is wrong with its files, its aliases and history."""
    from onlay.release.registry import Registry

    registry = Registry()
    version = place.version or _version_of(run)
    if version is None:
        return {}
    _, damaged = registry.verify(version.id)
    deployments = [row.digest for row in ledger.Ledger().rows("deployment") if version.digest in _sources(row)]
    return {
        "version": version, "version_problems": [problem for damage in damaged for problem in damage.problems],
        "aliases": registry.aliases(version.name), "history": registry.history(version.name), "deployments": deployments,
    }  # fmt: skip


def _version_of(run: Run) -> AdapterVersion | None:
    from onlay.release.registry import Registry

    names = Registry().names()
    for row in reversed(ledger.Ledger().rows("version")):
        if row.values.get("sources", {}).get("run") == run.digest and row.values["name"] in names:
            return find_version(f"{row.values['name']}@{row.values['version']}")
    return None


def _sources(row: ledger.Row) -> set[str]:
    return set(row.values.get("sources", {}).values())


# ---------------------------------------------------------------------------------------------------------- comparing


def _compare_records(
    place: _Place, run: Run, recipe: Recipe, dataset: Dataset, facts: ModelFacts
) -> tuple[list[str], list[str]]:
    """What was changed since it was written, and what cannot be told."""
    damage, unchecked = [], []
    recorded = run.sources
    for record in (dataset, facts):
        if recorded.get(record.kind) != record.digest:
            damage.append(f"{record.kind}.json is not the one that the run was made from")
    same = _is_same_recipe(recipe, recorded.get("recipe"))
    if same is None:
        unchecked.append("recipe.yaml has another digest than the run recorded, and the ledger does not know that one")
    elif not same:
        damage.append("recipe.yaml was edited after training began")
    if place.version is None and run.status != "running":
        known = {row.digest for row in ledger.Ledger().rows("run") if row.path == str(place.records.absolute())}
        if not known:
            unchecked.append("run.json: this machine's ledger does not know the run")
        elif run.digest not in known:
            damage.append("run.json is not the record that training left in the ledger")
    if place.artefact.is_dir() and run.status == "finished" and run.method != "full":
        damage += _artefact_damage(place.artefact, run, unchecked)
    return damage, unchecked


def _is_same_recipe(recipe: Recipe, digest: str | None) -> bool | None:
    """None: not known.  A version of onlay with more fields gives the same recipe another digest."""
    if recipe.digest == digest:
        return True
    row = next((row for row in ledger.Ledger().rows("recipe") if row.digest == digest), None)
    return None if row is None else parse_recipe(row.values).digest == recipe.digest


def _artefact_damage(artefact: Path, run: Run, unchecked: list[str]) -> list[str]:
    from onlay.release.describe import ADAPTER_FILES
    from onlay.release.store import file_digest
    from onlay.release.weights import check_weights

    damage = []
    recorded: Mapping[str, str] | None = run.proofs.get("artefact_sha256")
    if recorded is None:
        unchecked.append(f"the files in {artefact}: the run recorded no digests of them")
    for name, digest in (recorded or {}).items():
        path = artefact / name
        if name != _UNHASHED and (not path.is_file() or file_digest(path) != digest):
            damage.append(f"{path} {'was changed' if path.is_file() else 'is missing'} since the run saved it")
    weights = artefact / ADAPTER_FILES["head" if run.method == "head" else "adapter"][0]
    try:
        check_weights(weights)
    except (ProofError, OutputError) as error:
        damage.append(error.problem)
    return damage


def _compatibility(place: _Place, run: Run, facts: ModelFacts) -> tuple[str | None, list[Verdicts]]:
    """Why the adapter does not fit the base it was trained on, and which servers take it; from headers alone."""
    from onlay.model.compatibility import check as check_base
    from onlay.release.servers import judge, read_features

    if run.status != "finished" or run.method in ("full", "head") or not place.artefact.is_dir():
        return None, []
    try:
        check_base(place.artefact, facts)
        features = read_features(place.artefact, facts=facts)
    except (BaseModelError, OutputError) as error:
        return error.problem, []
    base = facts.name if facts.revision else facts.path
    name = place.version.name if place.version is not None else place.records.resolve().name
    return None, judge(features, base=base, name=name)


# ------------------------------------------------------------------------------------------------------ files of a run


def _training_files(place: _Place) -> dict[str, Any]:
    """metrics.jsonl and the latest checkpoint."""
    from onlay.training.metrics_log import read_metrics

    if place.run_folder is None:
        return {}
    path = place.run_folder / "metrics.jsonl"
    try:
        metrics = read_metrics(path)
    except ValueError as error:
        raise OutputError(f"{path} cannot be read: {error}.", "Was it edited?") from None
    folders = sorted(p for p in (place.run_folder / "checkpoints").glob("step-*") if _CHECKPOINT.fullmatch(p.name))
    if not folders:
        return {"metrics": metrics}
    problem = _checkpoint_problem(folders[-1])
    return {
        "metrics": metrics,
        "checkpoint": folders[-1].name if problem is None else None,
        "checkpoint_problem": problem,
    }


def _checkpoint_problem(folder: Path) -> str | None:
    """Why a checkpoint cannot be read: its weights by header and length, its other files by their own form."""
    from onlay.release.weights import read_header

    try:
        read_header(folder / "weights.safetensors")
        json.loads((folder / "progress.json").read_text(encoding="utf-8"))
        with zipfile.ZipFile(folder / "optimizer.pt"):
            pass
    except OutputError as error:
        return error.problem
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        return f"{folder} cannot be read: {error}"
    return None


def _device_memory(run: Run) -> int | None:
    """Where this machine has the device that the run names."""
    import platform

    from onlay.hardware import find_hardware_light

    hardware, named = find_hardware_light(), run.environment.get("device")
    if hardware.has_cuda:
        return next((device.memory_bytes for device in hardware.devices if device.name == named), None)
    return hardware.host_memory_bytes if named in (platform.processor(), platform.machine()) else None


def _failures(folder: Path | None) -> dict[str, Any]:
    """Rows of failures.jsonl, and how many of them a person has compared, by choices on the answers that are there now."""
    from onlay.evaluation.blind import read_choices

    if folder is None or not (folder / "failures.jsonl").is_file():
        return {}
    failing = {line["place"] for line in _lines(folder / "failures.jsonl")}
    answers = {row["row"]: row for row in _lines(folder / "answers.jsonl")}
    seen = set()
    for path in sorted(folder.parent.glob(f"choices-{glob.escape(folder.resolve().name)}-*.jsonl")):
        for choice in read_choices(path):
            row = answers.get(choice.row, {"answers": {}})
            pair = [row["answers"].get(name) for name in (choice.first, choice.second)]
            # A choice between answers that were given anew since is none about these.
            current = None not in pair and digest_of([list(row["prompt"]), *sorted(pair)]) == choice.digest
            if current and choice.choice in ("a", "b", "tie"):
                seen.add(choice.place)
    return {"failures": len(failing), "failures_seen": len(failing & seen)}


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} cannot be read: {error}.", "Evaluate again.") from None
