"""What is evaluated: a run, an adapter, a registered version or a model; on which rows; against what."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onlay import ledger
from onlay.errors import DataError, OutputError, RecipeError
from onlay.recipe import DataSection, ModelSection, Recipe, apply_overrides, read_recipe
from onlay.records import Dataset, ModelFacts, Run
from onlay.stages.answering import open_model, trained_storage
from onlay.stages.events import Report, silent
from onlay.stages.places import check_adapter, is_adapter, is_reference, resolve

if TYPE_CHECKING:
    from onlay.data.read import Conversation, Document
    from onlay.evaluation.systems import Bench, Question, System

SECTIONS = ("evaluation", "release")
"""What `--set` may change: the rest is what was trained."""
OF_TRAINING = ("split", "file", "every_steps", "max_rows", "patience", "select")
"""Fields of evaluation that are read while training; `gates` are fixed when it begins."""
MOST_SHOT_ROWS = 2000
"""Training rows that examples are drawn from."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    what: str
    """As the user named it."""
    folder: Path
    """Where the report goes if nothing else is said."""
    recipe: Recipe
    section: ModelSection
    """The base, stored as it was in training."""
    run: Run | None = None
    dataset: Dataset | None = None
    facts: ModelFacts | None = None
    """What the run was trained on."""
    adapters: dict[str, Path] = field(default_factory=dict)
    """Name to folder; the first is judged."""
    weights: str | None = None
    """SHA-256 of the judged adapter's weights."""
    live: Path | None = None
    """The version in use, where it is among the baselines."""
    tuned: Path | None = None
    """A base tuned in full: a model of its own, in place of adapters."""
    records: Path | None = None
    """Folder with the records of what is judged; None: it has none."""
    data: str | None = None
    """A file of rows in place of the run's own held-out ones."""
    gates: dict[str, float] = field(default_factory=dict)
    gate_edits: list[str] = field(default_factory=list)

    @property
    def judged(self) -> str:
        return next(iter(self.adapters), "tuned" if self.tuned is not None else "base")

    # --------------------------------------------------------------------------------------------------------- rows

    def rows(self) -> tuple[list[Conversation | Document], str, str]:
        """The held-out rows, where they come from, and a digest of that.  Raises DataError when there are none."""
        from onlay.data.read import scan
        from onlay.data.split import open_split

        if self.data is not None:
            section = self._section_of_data()
            found = scan(self.data, section, limit=None)
            return list(_parsed(self.data, found.format, section)), self.data, found.digest
        if self.dataset is None or "evaluation" not in self.dataset.splits:
            raise DataError(
                f"{self.what} has no held-out rows.", f"Give some: onlay evaluate {self.what} --data rows.jsonl"
            )
        rows = list(open_split(self.dataset, "evaluation").rows())
        return rows, f"{self.recipe.evaluation.file or self.dataset.source}, held out", self.dataset.digest

    def _section_of_data(self) -> DataSection:
        """Read as the run's rows were, where the file has the same columns; formats are found again."""
        return self.recipe.data.model_copy(update={"train": str(self.data), "format": "auto", "max_rows": None})

    def shot_rows(self, questions: Sequence[Question]) -> list[Conversation]:
        """Training rows that may be shown as examples: none of them asks what is asked."""
        from onlay.data.cleaning import open_cleaner
        from onlay.data.read import Conversation, Turn, prompt_key, scan

        if self.run is None:
            raise RecipeError(
                f"evaluation.baselines holds few-shot, and {self.what} has no training rows to show.",
                "Take few-shot off the list, or evaluate a run folder.",
            )
        section, answer = self.recipe.data, Turn("assistant", "")
        asked = {prompt_key(Conversation((*question.turns, answer))) for question in questions}
        cleaner = open_cleaner(self.recipe, home=ledger.home())
        found = []
        for source in section.train_sources:
            format = scan(source.file, section, limit=MOST_SHOT_ROWS).format
            for row in _parsed(source.file, format, section, limit=MOST_SHOT_ROWS):
                # What was trained on and what is asked has no personal data in it: neither has what is shown.
                shown = row if cleaner is None else cleaner.clean(row)
                if (
                    isinstance(shown, Conversation)
                    and shown.turns[-1].role == "assistant"
                    and prompt_key(shown) not in asked
                ):
                    found.append(shown)
        if not found:
            raise RecipeError(
                f"evaluation.baselines holds few-shot, but every row of {section.train_told} is asked itself.",
                "Take few-shot off the list.",
            )
        return found

    # ------------------------------------------------------------------------------------------------------- loading

    def benches(self, *, report: Report) -> Iterator[tuple[Bench, list[System]]]:
        """Each model that has to be loaded, one at a time, with the systems it can be asked as."""
        from onlay.evaluation.systems import System

        evaluation = self.recipe.evaluation
        base = System(name="base", told=f"{self.section.base}, as it is")
        baselines = [base] if "base" in evaluation.baselines or not (self.adapters or self.tuned) else []
        if "prompt" in evaluation.baselines:
            baselines.append(System(name="prompt", told="the base with evaluation.prompt", prompt=evaluation.prompt))
        if "few-shot" in evaluation.baselines:
            baselines.append(System(name="few-shot", told=f"the base with {evaluation.shots} examples in context"))
        folders = dict(self.adapters)
        if self.live is not None:
            folders["live"] = self.live
        told = {name: str(folder) for name, folder in folders.items()}
        adapted = [System(name=name, told=told[name], adapter=name) for name in folders]
        if folders or baselines:
            yield self._bench(self.section, folders, report=report), [*adapted, *baselines]
        if self.tuned is not None:
            section = self.section.model_copy(
                update={"base": str(self.tuned), "weights": "pretrained", "revision": None, "storage": "bf16"}
            )
            yield self._bench(section, {}, report=report), [System(name="tuned", told=str(self.tuned))]

    def _bench(self, section: ModelSection, adapters: dict[str, Path], *, report: Report) -> Bench:
        from onlay.data.template import ChatTemplate
        from onlay.evaluation.systems import Bench
        from onlay.model.tokenizer import pad_token_id

        opened = open_model(section, adapters, report=report)
        data = self.recipe.data
        template = ChatTemplate(opened.tokenizer, template=data.template, loss_on=data.loss_on)
        stops = self.dataset.stop_token_ids if self.dataset is not None else template.stop_token_ids
        return Bench(
            opened.model, template=template, stop_token_ids=stops, pad_token_id=pad_token_id(opened.tokenizer),
            context_tokens=opened.facts.context_tokens,
        )  # fmt: skip


def _parsed(
    source: str, format: str, section: DataSection, *, limit: int | None = None
) -> Iterator[Conversation | Document]:
    from onlay.data.read import parse
    from onlay.data.sources import read_rows

    for row in read_rows(source, section, limit=limit):
        yield parse(row, format, section)


# -------------------------------------------------------------------------------------------------------------- finding


def find_subject(
    what: str | Path,
    *,
    others: Sequence[str | Path],
    overrides: Sequence[str],
    data: str | None,
    report: Report = silent,
) -> Subject:
    """Raises OnlayError for what is none of a run, an adapter, a registered version and a model.

    Adapters are read here, all of them: one that was changed since it was saved or registered, is not finite or did not
    move is refused before anything is loaded.
    """
    for override in overrides:
        if override.partition(".")[0].strip() not in SECTIONS:
            raise RecipeError(
                f"--set {override} would change what was trained.",
                f"Here only fields of {' and '.join(SECTIONS)} can be set.",
            )
    folder = _run_folder(Path(what))
    for override in overrides:
        name = override.partition("=")[0].strip()
        if name in {f"evaluation.{field}" for field in OF_TRAINING} or (folder and name == "evaluation.gates"):
            raise RecipeError(
                f"--set {name} comes too late: it is read when training begins.", "Set it in a recipe, and train anew."
            )
    if folder is not None:
        return _of_run(str(what), folder, others=others, overrides=overrides, data=data, report=report)
    if data is None:
        raise DataError(
            f"{what} is no run folder, so it brings no held-out rows.", f"onlay evaluate {what} --data rows.jsonl"
        )
    adapter = _adapter_folder(what)
    if adapter is None and others:
        raise OutputError(
            f"{what} is a model; --with takes adapters beside an adapter.", "Name an adapter or run first."
        )
    model = _base_of(adapter) if adapter is not None else {"base": str(what)}
    recipe = apply_overrides({"model": model, "data": {**_data_of(adapter), "train": data}}, overrides)
    section = recipe.model
    adapters: dict[str, Path] = {}
    weights = None
    if adapter is not None:
        weights = _check(what, adapter)
        adapters = _named([("adapter", adapter), *(_known_adapter(other) for other in others)])
        section = section.model_copy(update={"storage": trained_storage(adapter, section)})
    name = Path(str(what)).name.replace("@", "-")
    return Subject(
        what=str(what), folder=Path("evaluations") / name, recipe=recipe, section=section, adapters=adapters, data=data,
        dataset=Dataset.load(adapter) if adapter is not None and (adapter / "dataset.json").is_file() else None,
        gates=recipe.evaluation.gates, weights=weights, live=_live(recipe), records=adapter,
    )  # fmt: skip


def _of_run(
    what: str, folder: Path, *, others: Sequence[str | Path], overrides: Sequence[str], data: str | None, report: Report
) -> Subject:
    run = Run.load(folder)
    recipe = read_recipe(folder / "recipe.yaml", overrides)
    artefact = recipe.adapter.artefact
    if artefact == "head":
        scores = ", ".join(f"{name} {value:.3f}" for name, value in run.scores.items() if name != "rows")
        raise OutputError(
            f"{folder} is a classification head, which says labels and writes nothing: on its held-out rows {scores}.",
            f"onlay show {folder} has its scores.",
        )
    if run.status != "finished" or not (folder / artefact).is_dir():
        raise OutputError(
            f"{folder} is {run.status}: there is nothing to evaluate yet.", f"onlay train --resume {folder}"
        )
    trained = read_recipe(folder / "recipe.yaml")
    gates, edits = _fixed_gates(run, trained)
    section = recipe.model
    if artefact == "model":
        if others:
            raise OutputError(
                f"{folder} was tuned in full; --with takes adapters beside an adapter.", "Leave --with out."
            )
        more: dict[str, Any] = {"tuned": folder / "model"}
        if section.weights == "random":
            raise OutputError(
                f"{folder} was trained from random weights, so there is no base to compare with.",
                f"onlay evaluate {folder / 'model'} --data rows.jsonl",
            )
    else:
        section = section.model_copy(update={"storage": trained_storage(folder / "adapter", section)})
        if "artefact_sha256" not in run.proofs:
            report(f"{folder} recorded no digests of its files: that they are as they were saved cannot be checked")
        weights = check_adapter(folder / "adapter", run=run)
        named = [("adapter", folder / "adapter"), *(_known_adapter(other) for other in others)]
        more = {"weights": weights, "adapters": _named(named)}
    return Subject(
        what=what, folder=folder, recipe=recipe, section=section, run=run, dataset=Dataset.load(folder),
        facts=ModelFacts.load(folder), data=data, gates=gates, gate_edits=edits, records=folder, live=_live(recipe), **more,
    )  # fmt: skip


def _fixed_gates(run: Run, recipe: Recipe) -> tuple[dict[str, float], list[str]]:
    """The gates as they were when training began, and in words what was changed in the run's recipe since."""
    now = recipe.evaluation.gates
    digest = run.sources.get("recipe")
    if digest == recipe.digest:
        return now, []
    row = next((row for row in ledger.Ledger().rows("recipe") if row.digest == digest), None)
    if row is None:
        return now, ["the run's recipe is not the one that training began with, and the ledger does not hold that one"]
    before = dict(row.values.get("evaluation", {}).get("gates", {}))
    edits = [
        f"{name}: {before.get(name, 'none')} when training began, {now.get(name, 'none')} in recipe.yaml now"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    return before, edits


def _run_folder(given: Path) -> Path | None:
    if (given / "run.json").is_file() and not is_adapter(given):  # With one at its top it is a version.
        return given
    inside = given.name in ("adapter", "model", "head") and (given.parent / "run.json").is_file()
    return given.parent if inside else None


def _adapter_folder(what: str | Path) -> Path | None:
    """The folder of an adapter, also of a registered version; None for what is neither."""
    path = Path(what)
    run = _run_folder(path)
    if run is not None:
        return run / "adapter"
    if is_adapter(path):
        return _no_head(what, path)
    return _no_head(what, Path(resolve(what).path)) if is_reference(what) else None


def _no_head(what: str | Path, folder: Path) -> Path:
    if (folder / "head.json").is_file():
        raise OutputError(
            f"{what} is a classification head, which says labels and writes nothing.",
            "It was scored on its held-out rows when it was trained: onlay show RUN.",
        )
    return folder


def _check(what: str | Path, adapter: Path) -> str:
    """SHA-256 of an adapter's weights, after it was compared with what is recorded of it."""
    if is_reference(what):
        return check_adapter(adapter, version=resolve(what))
    run = _run_folder(Path(what))
    return check_adapter(adapter, run=Run.load(run) if run is not None else None)


def _live(recipe: Recipe) -> Path | None:
    """The version in use, where it is to be compared with."""
    if "live" not in recipe.evaluation.baselines:
        return None
    version = resolve(f"{recipe.release.name}@{recipe.release.alias}")
    folder = _no_head(version.id, Path(version.path))
    check_adapter(folder, version=version)
    return folder


def _known_adapter(what: str | Path) -> tuple[str | None, Path]:
    """Its folder, and its name where that is not the folder's: a registered version's is a digest."""
    found = _adapter_folder(what)
    if found is None or not found.is_dir():
        raise OutputError(
            f"{what} is no adapter, run or registered version.", "`onlay versions` lists those there are."
        )
    _check(what, found)
    return (None if Path(what).exists() else str(what)), found


def _named(folders: Sequence[tuple[str | None, Path]]) -> dict[str, Path]:
    """Names for adapters, by their runs' folders; without dots, which PEFT cannot take."""
    found: dict[str, Path] = {}
    for given, folder in folders:
        plain = given or (folder.parent.name if folder.name == "adapter" else folder.name)
        plain = plain.replace(".", "_")
        name, count = plain, 2
        while name in found or name in ("base", "prompt", "few-shot", "live"):
            name, count = f"{plain}-{count}", count + 1
        found[name] = folder
    return found


def _data_of(adapter: Path | None) -> dict[str, Any]:
    """How a registered version's rows were read and written for its training; {} where nothing says it."""
    if adapter is None or not (adapter / "recipe.yaml").is_file():
        return {}
    section = read_recipe(adapter / "recipe.yaml").data
    template = adapter / "chat_template.jinja"
    kept = {"template": str(template) if template.is_file() else section.template, "system": section.system}
    return kept | {"loss_on": section.loss_on}


def _base_of(adapter: Path) -> dict[str, Any]:
    """`base` of the model section, and `revision` where it is known."""
    notes = adapter / "onlay.json"
    if notes.is_file():
        values = json.loads(notes.read_text(encoding="utf-8"))
        return {"base": values["base"], "revision": values["base_revision"]}
    base = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise OutputError(f"{adapter} does not say which base it belongs to.", "Evaluate the run it came from.")
    return {"base": str(base)}
