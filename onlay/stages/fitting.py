"""`compatible`: whether an adapter fits a base and which servers take it, told before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from onlay.errors import BaseModelError, OutputError
from onlay.recipe import ModelSection
from onlay.stages.events import Loading, Report, silent
from onlay.stages.registering import find_version, run_folder

if TYPE_CHECKING:
    from onlay.release.servers import Verdicts


@dataclass(frozen=True, kw_only=True, slots=True)
class Compatibility:
    adapter: str
    """Its folder."""
    base: str | None
    """None: the adapter names none and none was given."""
    fits: bool | None
    """None: there was no base to look at."""
    notes: list[str]
    """Why it does not fit, or what could not be checked."""
    servers: list[Verdicts]
    """Empty where it does not fit."""


def compatible(what: str, *, base: str | None = None, report: Report = silent) -> Compatibility:
    """Whether an adapter (a folder, a run, or a version) fits a base, and which servers take it; no weight is loaded.

    `base` is a hub name or folder; without it, the adapter's own.  Raises OnlayError for what is no adapter, and for a
    base that cannot be found.
    """
    from onlay.model.compatibility import check, read_adapter
    from onlay.model.facts import read_facts
    from onlay.release.servers import judge, read_features

    folder, name = _adapter_of(what)
    adapter = read_adapter(folder)
    notes, revision = adapter.notes or {}, None
    if base is None:
        base = notes.get("base") or adapter.config.get("base_model_name_or_path")
        revision = notes.get("base_revision") or adapter.config.get("revision")
    if not base:
        told = ["the adapter does not name its base; --base BASE compares it with one"]
        verdicts = judge(read_features(folder), base="BASE", name=name)
        return Compatibility(adapter=str(folder), base=None, fits=None, notes=told, servers=verdicts)
    section = ModelSection.model_validate({"base": base, "revision": revision})
    facts = read_facts(section, progress=lambda so_far, total: report(Loading("fetching the base", so_far, total)))
    try:
        told = check(folder, facts)
    except BaseModelError as error:
        told = [error.problem, error.remedy]
        return Compatibility(adapter=str(folder), base=facts.name, fits=False, notes=told, servers=[])
    place = facts.name if facts.revision else facts.path
    verdicts = judge(read_features(folder, facts=facts), base=place, name=name)
    return Compatibility(adapter=str(folder), base=facts.name, fits=True, notes=told, servers=verdicts)


def _adapter_of(what: str) -> tuple[Path, str]:
    """The adapter's folder and what to call it."""
    path = Path(what)
    if path.is_dir():
        folder = run_folder(path)
        if (folder / "adapter").is_dir():
            return folder / "adapter", folder.resolve().name
        return path, path.resolve().name
    version = find_version(what)
    if version.rank is None:
        raise OutputError(f"{version.id} is a classification head, which no such server takes.", "onlay generate RUN")
    return Path(version.path), version.name
