"""`audit`: what is wrong with data, where, how bad, and what to do; nothing is changed, nothing is trained."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from onlay import ledger
from onlay.errors import RecipeError
from onlay.recipe import DataSection, Recipe, apply_overrides, read_recipe
from onlay.records import Audit, Distribution, Finding, Group
from onlay.stages.events import Loading, Report, silent

if TYPE_CHECKING:
    import numpy as np

    from onlay.data.audit.engine import AuditSource, Examined
    from onlay.data.audit.masks import PlacedItem
    from onlay.stages.knowledge import BaseFindings

RECIPE_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Asked:
    recipe: Recipe
    section: DataSection
    """How rows are read: a head reads texts and labels."""
    sources: list[AuditSource]
    with_base: bool
    """The base's tokenizer and template are looked through too."""
    is_recipe: bool


def audit(
    target: str | Path,
    *,
    overrides: Sequence[str] = (),
    against: Sequence[str] = (),
    base: str | None = None,
    known: bool = False,
    shown: int | None = 20,
    workers: int | None = None,
    page: Path | None = None,
    report: Report = silent,
) -> Audit:
    """Reads every row and says what is wrong.  Raises OnlayError for what cannot be looked at at all.

    `target`: a data file, a hub data set, or a recipe (.yaml), whose sources, evaluation.file, base and method then count.
    `against`: benchmark files whose rows should not be in the training rows.  `base`: whose tokenizer and template tell
    tokens and masks (default: the recipe's); `known` also loads its weights and asks what it knows.  `shown`: most rows
    named with each finding (None: all).  `workers`: processes for large inputs (None: one for each core).  `page`: where a
    page will be written afterwards: refused before a row is read where that is what the audit reads, or anything but a page.
    Rows that cannot be read are counted and named, and do not stop it; `Audit.ok` then is false.
    """
    from onlay.data.audit.comparison import compare_rows
    from onlay.data.audit.destination import check_destination
    from onlay.data.audit.engine import Settings, examine
    from onlay.data.audit.handled import tell_handled
    from onlay.data.audit.size import few_rows

    began = time.monotonic()
    asked = _ask(str(target), overrides, against, base, known)
    data = asked.recipe.data
    if page is not None:
        check_destination(page, used=_used(str(target), asked))
    examined = examine(
        asked.sources, asked.section,
        settings=Settings(near_threshold=data.near_threshold, terms=data.terms, workers=workers),
        progress=lambda done, total: report(Loading("reading rows", done, total)),
    )  # fmt: skip
    if _training_rows(examined):
        report("comparing rows")
    compared = compare_rows(examined, threshold=data.near_threshold)
    with_base = _ask_base(asked, examined, known, report) if asked.with_base else None
    files = [file.path for file in examined.files]
    told = compared.told | (with_base.told if with_base is not None else {})
    found = [
        *examined.tally.findings(files, shown=shown, told=told),
        *few_rows(_training_rows(examined), method=asked.recipe.adapter.method),
        *(with_base.findings if with_base is not None else ()),
    ]
    findings = tell_handled(found, data)
    made = _record(
        examined, findings=findings, groups=[*examined.groups, *compared.groups],
        distributions=[*examined.distributions, *compared.distributions],
        shares=examined.shares | compared.shares, measures=compared.measures,
        with_base=with_base, recipe_digest=asked.recipe.digest if asked.is_recipe else None,
        seconds=round(time.monotonic() - began, 3),
    )  # fmt: skip
    ledger.append(made, target)
    return made


def _ask(target: str, overrides: Sequence[str], against: Sequence[str], base: str | None, known: bool) -> _Asked:
    from onlay.data.audit.engine import AuditSource
    from onlay.data.material import row_section, sources_of

    is_recipe = Path(target).suffix.lower() in RECIPE_SUFFIXES
    if is_recipe:
        changed = [*overrides, *([f"model.base={base}"] if base is not None else [])]
        recipe = read_recipe(target, changed)
    else:
        # The base of a bare data file is looked at only where one is given.
        recipe = apply_overrides({"model": {"base": base or "pocket"}, "data": {"train": target}}, overrides)
    with_base = (is_recipe or base is not None) and recipe.adapter.method != "head"
    if known and not with_base:
        why = "a classification head writes no answers" if recipe.adapter.method == "head" else "no base is named"
        raise RecipeError(
            f"--known asks what the base knows, and {why}.", "Give --base NAME, or a recipe with model.base."
        )
    sources = [
        AuditSource(path=one.path, role="evaluation" if one.use == "evaluation" else "train", limit=one.limit)
        for one in sources_of(recipe)
    ]
    sources += [AuditSource(path=path, role="benchmark") for path in against]
    return _Asked(recipe=recipe, section=row_section(recipe), sources=sources, with_base=with_base, is_recipe=is_recipe)


def _used(target: str, asked: _Asked) -> dict[str, str]:
    """Files that the audit, or its recipe, reads or keeps: path to what it is."""
    data = asked.recipe.data
    roles = {"train": "audited", "evaluation": "the evaluation file", "benchmark": "a benchmark file (--against)"}
    used = {source.path: roles[source.role] for source in asked.sources}
    if asked.is_recipe:
        used[target] = "the recipe"
    if data.terms is not None:
        used[data.terms] = "the list of terms"
    if data.anonymise_key is not None and not data.anonymise_key.startswith("env:"):
        used |= {data.anonymise_key: "the key of pseudonyms", f"{data.anonymise_key}.vault": "the vault of pseudonyms"}
    return used


def _ask_base(asked: _Asked, examined: Examined, known: bool, report: Report) -> BaseFindings | None:
    import numpy as np

    from onlay.stages.knowledge import examine_with_base

    rows = np.flatnonzero(examined.among("train"))
    if not len(rows):
        return None
    return examine_with_base(
        _placed(examined, rows), files=[file.path for file in examined.files], rows=len(rows),
        base=asked.recipe.model, section=asked.recipe.data, tally=examined.tally, known=known,
        seed=asked.recipe.training.seed, report=report,
    )  # fmt: skip


def _placed(examined: Examined, rows: np.ndarray) -> Iterator[PlacedItem]:
    table = examined.table
    for index, item in examined.read_items(rows):
        yield int(table.source[index]), int(table.number[index]), item


def _training_rows(examined: Examined) -> int:
    return sum(file.rows for file in examined.files if file.role == "train")


def _record(
    examined: Examined,
    *,
    findings: list[Finding],
    groups: list[Group],
    distributions: list[Distribution],
    shares: dict[str, dict[str, int]],
    measures: dict[str, float],
    with_base: BaseFindings | None,
    recipe_digest: str | None,
    seconds: float,
) -> Audit:
    from onlay.data.audit.catalogue import worst_first

    findings = worst_first(findings)
    severities = {name: sum(one.severity == name for one in findings) for name in ("error", "warning", "note")}
    sources = {f"data {number}": file.digest for number, file in enumerate(examined.files, 1)}
    return Audit(
        sources=sources | ({"recipe": recipe_digest} if recipe_digest is not None else {}),
        files=examined.files,
        rows=_training_rows(examined),
        unreadable=sum(file.unreadable for file in examined.files),
        base=with_base.base if with_base is not None else None,
        tokens=with_base.tokens if with_base is not None else None,
        trained_tokens=with_base.trained_tokens if with_base is not None else None,
        findings=findings,
        distributions=[*distributions, *(with_base.distributions if with_base is not None else ())],
        shares=shares | {"severities": {name: count for name, count in severities.items() if count}},
        measures=measures | (with_base.measures if with_base is not None else {}),
        groups=groups,
        seconds=seconds,
    )
