"""What a version is, told from its files alone.

The description is a function of the files, so one that came from elsewhere can be checked against them: nothing in it
has to be believed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from onlay.errors import OutputError
from onlay.model.tokenizer import tokenizer_digest
from onlay.recipe import read_recipe
from onlay.records import AdapterVersion, Dataset, ModelFacts, Report, Run

TOKENIZER, RECIPE, REPORT = "tokenizer", "recipe.yaml", "report.json"
RECORDS = ("run.json", "dataset.json", "model.json")
ADAPTER_FILES = {
    "adapter": ("adapter_model.safetensors", "adapter_config.json", "onlay.json"),
    "head": ("head.safetensors", "head.json"),
}
"""Of each artefact: the weights first, then what must lie beside them."""


def artefact_of(files: Mapping[str, object]) -> str:
    """adapter or head.  Raises OutputError when the files are neither, or a record that a version has is missing."""
    kind = "head" if "head.safetensors" in files else "adapter"
    missing = [name for name in (*ADAPTER_FILES[kind], RECIPE, *RECORDS) if name not in files]
    if missing:
        raise OutputError(f"{missing[0]} is missing: a version is not whole without it.", "Give a finished run folder.")
    return kind


def describe(folder: Path, files: Mapping[str, str]) -> AdapterVersion:
    """The version that these files are.

    `folder` holds them under the names that `files` maps to their SHA-256; a report.json among them is its Report.
    Raises OnlayError for a record that cannot be read.
    """
    kind = artefact_of(files)
    weights, *beside = ADAPTER_FILES[kind]
    notes = json.loads((folder / beside[-1]).read_text(encoding="utf-8"))
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")) if kind == "adapter" else {}
    recipe = read_recipe(folder / RECIPE)
    run, dataset, facts = Run.load(folder), Dataset.load(folder), ModelFacts.load(folder)
    report = Report.load(folder) if REPORT in files else None
    records = {"run": run, "dataset": dataset, "model": facts} | ({"report": report} if report is not None else {})
    return AdapterVersion(
        sources={name: record.digest for name, record in records.items()} | {"recipe": recipe.digest},
        method=run.method,
        files=dict(files),
        weight_digest=files[weights],
        rank=config.get("r"),
        base=notes["base"],
        base_revision=notes["base_revision"],
        base_weight_fingerprint=notes["base_weight_fingerprint"],
        storage=notes.get("storage") or "bf16",
        tokenizer_digest=tokenizer_digest(folder / TOKENIZER),
        template_digest=dataset.template_digest,
        evaluation_loss=run.evaluation_loss,
        scores=report.scores.get(report.system, {}) if report is not None else {},
        gates=report.gates if report is not None else [],
        verdict=report.verdict if report is not None else None,
    )
