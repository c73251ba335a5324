"""`register`, `promote`, `rollback` and what looks at versions: from a finished run to the one that is live.

No torch is imported: weights are looked at as bytes, bases by their headers.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onlay import ledger
from onlay.errors import BaseModelError, OutputError, ProofError
from onlay.recipe import Recipe, digest_of, read_recipe
from onlay.records import Dataset, ModelFacts, Run
from onlay.stages.events import Loading, Report, silent
from onlay.stages.places import PEFT_CARD
from onlay.stages.reports import check_report, find_report

if TYPE_CHECKING:
    from onlay.records import AdapterVersion
    from onlay.release.history import Event
    from onlay.release.registry import Damage, DamagedVersion


@dataclass(frozen=True, kw_only=True, slots=True)
class Registered:
    version: AdapterVersion
    new: bool
    """False: this content was registered under this name before, and this is that version."""
    notes: list[str] = field(default_factory=list)
    """What could not be checked, or is worth knowing."""


def register(
    run: str | Path, *, name: str, evaluation: str | Path | None = None, report: Report = silent
) -> Registered:
    """Makes an immutable version of a finished run's adapter.  `evaluation` is the folder of its Report.

    Without it the Report in RUN/report is taken, else the newest that the ledger knows on this run and its own held-out
    rows; of either, one that measured the weights that are there.
    Refuses, each with its reason, an unfinished run, another run's Report, weights that are not finite, did not move or
    were changed since they were saved, and another base.  Raises OnlayError.
    """
    from onlay.model.facts import read_facts
    from onlay.release.names import check_name
    from onlay.release.registry import Registry

    check_name(name)
    folder = run_folder(Path(run))
    done, recipe, notes = Run.load(folder), read_recipe(folder / "recipe.yaml"), []
    artefact = _check_registrable(folder, done, recipe)
    notes += _check_record(folder, done)
    section = recipe.model.model_copy(update={"revision": ModelFacts.load(folder).revision or recipe.model.revision})
    facts = read_facts(section, progress=lambda so_far, total: report(Loading("fetching the base", so_far, total)))
    notes += _check_base(artefact, facts, trained_on=ModelFacts.load(folder))
    found, told = _choose_report(folder, done, evaluation)
    notes += told
    with _files(folder, artefact, facts, recipe, found) as files:
        report(f"registering {folder}")
        version, new = Registry().add(
            name, files, describe=_describing(done, notes), origin=str(folder.absolute())
        )  # fmt: skip
    ledger.append(version, version.path)
    return Registered(version=version, new=new, notes=notes)


def run_folder(given: Path) -> Path:
    """The run folder, where its adapter/ or head/ was named."""
    return given.parent if given.name in ("adapter", "head") and not (given / "run.json").is_file() else given


def _check_registrable(folder: Path, run: Run, recipe: Recipe) -> Path:
    """The folder with what was trained."""
    if run.status != "finished":
        raise OutputError(
            f"{folder} is {run.status}: only a finished run has a version.", f"onlay train --resume {folder}"
        )
    if recipe.adapter.artefact == "model":
        raise OutputError(
            f"{folder} was trained with method {recipe.adapter.method}: its model/ is a whole model, no adapter of a base.",
            f"Serve {folder / 'model'} as it is; the registry keeps adapters and heads.",
        )
    artefact = folder / recipe.adapter.artefact
    if not artefact.is_dir():
        raise OutputError(f"{artefact} does not exist.", f"It was moved or removed; train again, or restore {folder}.")
    moved = run.proofs.get("movement", {})
    if moved.get("moved_modules", moved.get("moved_weights")) == 0:
        raise ProofError(f"{folder}: by its own record no module moved.", "Train on rows that reach the adapter.")
    if not moved and recipe.adapter.method in ("pissa", "loftq"):
        raise ProofError(
            f"{folder} has too few updates to prove that its adapter moved, and {recipe.adapter.method} does not begin at zero.",
            "Train for at least 2 updates.",
        )
    return artefact


def _check_record(folder: Path, run: Run) -> list[str]:
    """Refuses a run.json that is not the record that training left in the ledger; says when the ledger knows none."""
    place = str(folder.absolute())
    known = [row.digest for row in ledger.Ledger().rows("run") if row.path == place]
    if known and run.digest not in known:
        raise ProofError(
            f"{folder / 'run.json'} was changed: it is not the record that training left in the ledger.",
            "Restore the run folder, or train again.",
        )
    return [] if known else [f"this machine's ledger does not know {folder}: its record is taken as it is"]


def _check_base(artefact: Path, facts: ModelFacts, *, trained_on: ModelFacts) -> list[str]:
    from onlay.model.compatibility import check

    if facts.weight_fingerprint != trained_on.weight_fingerprint:
        raise BaseModelError(
            f"{artefact} was trained on other weights of {trained_on.name} than {facts.path} holds now.",
            "Put the base back as it was, or train again on this one.",
        )
    if artefact.name == "adapter":
        return check(artefact, facts)
    notes = json.loads((artefact / "head.json").read_text(encoding="utf-8"))
    if notes["base_weight_fingerprint"] != facts.weight_fingerprint:
        raise BaseModelError(
            f"{artefact} was trained on {notes['base']} with other weights than {facts.path}.", "Use its own base."
        )
    return []


def _choose_report(folder: Path, run: Run, given: str | Path | None) -> tuple[Path | None, list[str]]:
    """The folder of the Report that the version gets, and what is said about it and others."""
    if given is not None:
        check_report(Path(given), folder, run)
        return Path(given), []
    found = find_report(folder, run)
    told = [f"with the Report in {found.folder}"] if found.folder is not None else []
    return found.folder, [*told, *found.damage, *(f"no Report of the run: {note}" for note in found.notes)]


@contextmanager
def _files(
    folder: Path, artefact: Path, facts: ModelFacts, recipe: Recipe, report: Path | None
) -> Iterator[dict[str, Path]]:
    """Path in the version to path on disk: the adapter at the top, where PEFT and servers look; the rest beside it."""
    from onlay.model.hub import wanted_files
    from onlay.model.tokenizer import tokenizer_digest
    from onlay.release.describe import RECIPE, RECORDS, REPORT, TOKENIZER

    dataset = Dataset.load(folder)
    if tokenizer_digest(facts.path) != dataset.tokenizer_digest:
        raise BaseModelError(
            f"The tokenizer in {facts.path} is not the one that {folder} was trained with.",
            "Put the base's tokenizer back as it was, or train again.",
        )
    found = [path for path in sorted(artefact.iterdir()) if path.is_file() and path.name != PEFT_CARD]
    files = {path.name: path for path in found if not path.name.startswith(".")}
    files |= {name: folder / name for name in (RECIPE, *RECORDS)}
    base = Path(facts.path)
    # A folder of its own: servers take a tokenizer or added tokens beside an adapter for the adapter's own.
    names = wanted_files(
        [str(p.relative_to(base)) for p in base.rglob("*")], shards=None, remote_code=False, weights=False
    )
    kept = [name for name in names if not name.startswith(("README", "LICENSE")) and not name.endswith(".index.json")]
    files |= {f"{TOKENIZER}/{name}": base / name for name in kept}
    if report is not None:
        files |= {name: report / name for name in (REPORT, "report.html") if (report / name).is_file()}
    with tempfile.TemporaryDirectory() as temporary:
        template = _template(dataset, recipe)
        if template is not None:
            path = Path(temporary) / "chat_template.jinja"
            path.write_text(template, encoding="utf-8")
            files[path.name] = path
        yield files


def _template(dataset: Dataset, recipe: Recipe) -> str | None:
    """The chat template that the run was trained with; None where it is the tokenizer's own, or there is none."""
    if dataset.template == "base" or dataset.format == "text" or recipe.adapter.method == "head":
        return None
    from onlay.data.template import ENCODING_VERSION, PINNED_DATE, read_template

    source = read_template(dataset.template)
    # A template that asks for the date was given one before its digest was taken, and cannot be compared.
    comparable = "strftime_now" not in source
    if comparable and digest_of([source, PINNED_DATE.isoformat(), ENCODING_VERSION]) != dataset.template_digest:
        raise OutputError(
            f"data.template = {dataset.template} was changed since the run.", "Put it back as it was, or train again."
        )
    return source


def _describing(run: Run, notes: list[str]) -> Callable[[Path, dict[str, str]], AdapterVersion]:
    """Checks the copies, so that what is registered is what was looked at."""
    recorded: Mapping[str, str] | None = run.proofs.get("artefact_sha256")

    def describe_run(copies: Path, digests: dict[str, str]) -> AdapterVersion:
        if recorded is None:
            notes.append("the run recorded no digests of its files: that they are as they were saved cannot be checked")
        for name, digest in (recorded or {}).items():
            if name != PEFT_CARD and digests.get(name) != digest:
                what = "is missing" if name not in digests else "was changed on disk"
                raise ProofError(f"{name} {what} since the run saved it.", "Restore it, or train again.")
        version, odd = _described(copies, digests)
        notes.extend(odd)
        return version

    return describe_run


def _described(copies: Path, digests: dict[str, str]) -> tuple[AdapterVersion, list[str]]:
    from onlay.release.describe import ADAPTER_FILES, artefact_of, describe
    from onlay.release.weights import check_weights

    odd = check_weights(copies / ADAPTER_FILES[artefact_of(digests)][0])
    return describe(copies, digests), odd


# ------------------------------------------------------------------------------------------------------------- moving


def promote(
    reference: str, *, alias: str = "live", force: bool = False, reason: str | None = None
) -> tuple[AdapterVersion, bool]:
    """Points an alias at a version whose gates were passed; whether it moved.  Raises OnlayError."""
    from onlay.release.registry import Registry

    return Registry().promote(reference, alias=alias, force=force, reason=reason)


def rollback(name: str, *, alias: str = "live", reason: str | None = None) -> AdapterVersion:
    """Points an alias at the version that it had before.  Raises OnlayError."""
    from onlay.release.registry import Registry

    return Registry().rollback(name, alias=alias, reason=reason)


# ------------------------------------------------------------------------------------------------------------ looking


def find_version(reference: str) -> AdapterVersion:
    """What `name`, `name@4`, `name@live` or `name@latest` means; its `path` is the adapter's folder.  Raises OnlayError."""
    from onlay.release.registry import Registry

    return Registry().resolve(reference)


def versions(name: str | None = None) -> list[tuple[AdapterVersion | DamagedVersion, list[str]]]:
    """The versions of a name, or of all, and the aliases of each."""
    from onlay.release.registry import Registry

    registry = Registry()
    found = registry.versions(name)
    aliases = {one: registry.aliases(one) for one in {version.name for version in found}}
    return [(v, [alias for alias, number in aliases[v.name].items() if number == v.version]) for v in found]


def history(name: str) -> list[Event]:
    """Every registration and every move of an alias, oldest first.  Raises OutputError for an unknown name."""
    from onlay.release.registry import Registry

    return Registry().history(name)


def verify(reference: str | None = None) -> tuple[list[AdapterVersion], list[Damage]]:
    """Recomputes every digest of a version, a name, or everything."""
    from onlay.release.registry import Registry

    return Registry().verify(reference)


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """Two versions compared: each value is what the one has and what the other has; what is equal is left out."""

    one: str
    other: str
    recipe: dict[str, tuple[Any, Any]]
    data: dict[str, tuple[Any, Any]]
    scores: dict[str, tuple[Any, Any]]
    base: dict[str, tuple[Any, Any]]
    files: dict[str, tuple[str | None, str | None]]


def diff(one: str, other: str) -> Difference:
    """What two versions differ in: recipe fields, rows and digests of the data, scores, base, files.  Raises OnlayError."""
    a, b = find_version(one), find_version(other)
    bases = [
        {key: getattr(v, key) for key in ("base", "base_revision", "base_weight_fingerprint", "storage")}
        for v in (a, b)
    ]
    recipes = [_flat(read_recipe(Path(v.path) / "recipe.yaml").model_dump(mode="json")) for v in (a, b)]
    return Difference(
        one=a.id, other=b.id, recipe=_changed(*recipes), data=_changed(_data(a), _data(b)),
        scores=_changed(
            a.scores | {"evaluation_loss": a.evaluation_loss}, b.scores | {"evaluation_loss": b.evaluation_loss}
        ),
        base=_changed(*bases), files=_changed(a.files, b.files),
    )  # fmt: skip


def _data(version: AdapterVersion) -> dict[str, Any]:
    dataset = Dataset.load(Path(version.path))
    values = {
        key: getattr(dataset, key)
        for key in ("source", "source_digest", "template", "template_digest", "tokenizer_digest")
    }
    return values | {
        f"{split}.{key}": value for split, facts in dataset.splits.items() for key, value in facts.model_dump().items()
    }


def _flat(sections: Mapping[str, Any]) -> dict[str, Any]:
    return {
        f"{section}.{key}": value
        for section, values in sections.items()
        for key, value in (values.items() if isinstance(values, dict) else [("", values)])
    }


def _changed(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = list(dict.fromkeys([*one, *other]))
    return {name: (one.get(name), other.get(name)) for name in names if one.get(name) != other.get(name)}


# ------------------------------------------------------------------------------------------------------------- moving on


def push(reference: str, target: str) -> tuple[AdapterVersion, str]:
    """Writes a version to a new folder or to `hf://owner/name`; the version and where it is.  Raises OnlayError."""
    from onlay.release.registry import Registry
    from onlay.release.remote import push as send

    return send(Registry(), reference, target)


def pull(source: str, *, name: str | None = None) -> Registered:
    """Registers what `push` wrote.  It is checked as a run is, but for its base, which need not be here.  Raises OnlayError."""
    from onlay.release.registry import Registry
    from onlay.release.remote import pull as fetch

    notes: list[str] = []

    def describe(copies: Path, digests: dict[str, str]) -> AdapterVersion:
        version, odd = _described(copies, digests)
        notes.extend(odd)
        return version

    version, new = fetch(Registry(), source, describe=describe, name=name)
    ledger.append(version, version.path)
    return Registered(version=version, new=new, notes=notes)
