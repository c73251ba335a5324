"""Decides what becomes of every row that was read: it trains (how often), is held out, or is left out and why.

In this order: duplicates go; rows are held out; domains are balanced; weights repeat or thin what trains; general rows
are drawn.  So the same rows are held out whatever the weights and the balance are.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from onlay.data.groups import choose_split, join_groups
from onlay.data.material import Material
from onlay.data.mix import balance, general_total, rank_rows, spread
from onlay.data.rows import RowTable
from onlay.errors import DataError
from onlay.recipe import Recipe
from onlay.records import Finding

REASONS = ("", "duplicates_dropped", "balanced_away", "thinned", "general_held_out", "general_not_drawn")
"""Why a row is in no split; a number in `Selection.reason`."""
SELECTION_NOTES = {
    "duplicates_dropped": "rows that repeat another; left out (data.duplicates: {duplicates}), the one with the longest answer stays",
    "balanced_away": "rows of large domains; left out (data.balance: {balance})",
    "thinned": "rows of sources with a weight below 1; left out",
    "repeated": "training examples more, because sources with a weight above 1 train several times an epoch",
    "mixed_in": "general examples mixed in (data.general)",
    "general_held_out": "general rows with the prompt of a held-out row, or nearly equal to one; left out",
    "general_not_drawn": "general rows that were not needed for data.general_share; not listed in removed.jsonl",
    "split_by_prompt": "rows in clusters of near-duplicates too large to be held out whole; divided by prompt, so that a held-out row may nearly repeat a training row",
}
SHOWN_PLACES = 5
_PURPOSES = ("split", "balance", "weights", "general")
"""What is drawn for one purpose is independent of what is drawn for another."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Selection:
    """What becomes of the N rows of a Material."""

    times: np.ndarray
    """(N,) int32: how often a row trains in an epoch; 0 for rows that do not train."""
    held_out: np.ndarray
    """(N,) bool."""
    reason: np.ndarray
    """(N,) uint8: place in REASONS; 0 for rows that train or are held out."""
    kept: np.ndarray
    """(N,) int64: of a duplicate that was dropped, the row that stayed; elsewhere the row itself."""
    findings: tuple[Finding, ...]

    @property
    def digest(self) -> str:
        arrays = (self.times.astype("<i4"), self.held_out.astype("?"), self.reason.astype("u1"))
        return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def select_rows(material: Material, recipe: Recipe) -> Selection:
    """Raises DataError where nothing can be held out, where held-out rows of a file are also trained on, and where nothing
    of a source would train."""
    _refuse_evaluation_file(material)
    table, data, evaluation, seed = material.table, recipe.data, recipe.evaluation, recipe.training.seed
    reason = np.zeros(len(table), dtype=np.uint8)
    held_out = material.rows_for("evaluation")
    general, trains = material.rows_for("general"), material.rows_for("train")
    kept = np.arange(len(table))
    if data.duplicates != "keep":
        same = table.row_key if data.duplicates == "drop_exact" else join_groups(table.row_key, material.clusters)
        kept = keep_longest(table, same, precedence=np.where(held_out, 0, np.where(trains, 1, 2)))
        kept = np.where(held_out, np.arange(len(table)), kept)
        _leave_out(reason, kept != np.arange(len(table)), "duplicates_dropped")
        _refuse_repeated_source(material, held_out, kept)
    trains, general = trains & (reason == 0), general & (reason == 0)
    divided = np.zeros(len(table), dtype=bool)
    if evaluation.file is not None:
        _refuse_shared_prompts(material, held_out, trains)
    elif evaluation.split is not None:
        rows = np.flatnonzero(trains)
        clusters = material.clusters[rows] if evaluation.split_by == "cluster" else None
        chosen, _, apart = choose_split(table.taken(rows), clusters=clusters, share=evaluation.split, seed=seed)
        _refuse_no_split(material, recipe, chosen)
        held_out, trains = held_out.copy(), trains.copy()
        held_out[rows[chosen]], trains[rows[chosen]], divided[rows[apart]] = True, False, True
    if data.balance != "none":
        rank = rank_rows(table, seed=_seed(recipe, "balance"))
        goes = balance(table, trains, rank, how=data.balance, domain_cap=data.domain_cap)
        _leave_out(reason, goes, "balanced_away")
        trains &= ~goes
    times = trains.astype(np.int32)
    _weigh(material, times, reason, seed=_seed(recipe, "weights"))
    if data.general is not None:
        _mix_in(material, times, reason, held_out, general, recipe)
    return Selection(
        times=times, held_out=held_out, reason=reason, kept=kept,
        findings=_findings(material, recipe, times, reason, divided),
    )  # fmt: skip


def _seed(recipe: Recipe, purpose: str) -> int:
    return recipe.training.seed * len(_PURPOSES) + _PURPOSES.index(purpose)


def keep_longest(table: RowTable, same: np.ndarray, *, precedence: np.ndarray) -> np.ndarray:
    """(N,) int64: the row that stays for each row; rows with equal `same` are duplicates of each other.

    The least `precedence` stays, of those the longest answer, of those the longest prompt, then the least prompt key: nothing
    hangs on the rows' order but the choice between rows that differ in case, punctuation or white space alone.
    """
    _, number, counts = np.unique(same, return_inverse=True, return_counts=True)
    rows = np.flatnonzero(counts[number] > 1)
    keys = (table.prompt_key, -table.prompt_characters, -table.answer_characters, precedence, number)
    order = rows[np.lexsort(tuple(key[rows] for key in keys))]
    firsts = order[np.unique(number[order], return_index=True)[1]]
    stays = np.arange(len(table))
    first_of = np.zeros(len(counts), dtype=np.int64)
    first_of[number[firsts]] = firsts
    stays[rows] = first_of[number[rows]]
    return stays


def _leave_out(reason: np.ndarray, rows: np.ndarray, why: str) -> None:
    reason[rows] = REASONS.index(why)


def _weigh(material: Material, times: np.ndarray, reason: np.ndarray, *, seed: int) -> None:
    """Each source's rows train round(weight x rows) times in all: all equally often, or once more for those drawn."""
    for number, source in enumerate(material.sources):
        if source.use != "train" or source.weight == 1:
            continue
        rows = np.flatnonzero((material.table.source == number) & (times > 0))
        if len(rows):
            drawn = rank_rows(material.table.taken(rows), seed=seed)
            total = round(source.weight * len(rows))
            if not total:
                raise DataError(
                    f"{source.path}: weight {source.weight:g} leaves 0 examples of its {len(rows):,} rows that could train.",
                    f"Raise the weight to {1 / len(rows):.2g} or more, or take the source off data.train.",
                )
            times[rows] = spread(drawn, total=total)
            _leave_out(reason, rows[times[rows] == 0], "thinned")


def _mix_in(
    material: Material,
    times: np.ndarray,
    reason: np.ndarray,
    held_out: np.ndarray,
    general: np.ndarray,
    recipe: Recipe,
) -> None:
    group = join_groups(material.table.loose_prompt_key, material.clusters)
    measured = general & np.isin(group, group[held_out])
    _leave_out(reason, measured, "general_held_out")
    rows = np.flatnonzero(general & ~measured)
    if not len(rows):
        raise DataError(
            f"data.general = {recipe.data.general}: all of its {int(material.rows_for('general').sum()):,} rows are held out or repeat others.",
            "Name another source, or delete data.general.",
        )
    total = general_total(int(times.sum()), share=recipe.data.general_share)
    drawn = rank_rows(material.table.taken(rows), seed=_seed(recipe, "general"))
    times[rows] = spread(drawn, total=total)
    _leave_out(reason, rows[times[rows] == 0], "general_not_drawn")


def _refuse_no_split(material: Material, recipe: Recipe, chosen: np.ndarray) -> None:
    if chosen.any():
        return
    rows = len(chosen)
    what = f"{material.train_told} has {rows} row{'s' if rows > 1 else ''}"
    same = " with one prompt" if rows > 1 else ""
    raise DataError(
        f"evaluation.split = {recipe.evaluation.split}: {what}{same}, so no rows are left for evaluation.",
        "Add rows, name held-out rows with evaluation.file, or set evaluation.split: null.",
    )


def _refuse_evaluation_file(material: Material) -> None:
    """A source of training rows that is the evaluation file, under whatever name."""
    measured = {file.digest: file.path for file in material.files_for("evaluation")}
    for source, file in zip(material.sources, material.files, strict=True):
        if source.use == "evaluation" or file.digest not in measured:
            continue
        other = measured[file.digest]
        same = f" ({other} holds the same)" if other != file.path else ""
        raise DataError(
            f"{file.path} is named as training rows and as evaluation.file{same}: what was trained on measures nothing.",
            f"Take it off data.{source.use}, or delete evaluation.file: evaluation.split then holds rows of data.train out.",
        )


def _refuse_repeated_source(material: Material, measured: np.ndarray, kept: np.ndarray) -> None:
    for number, source in enumerate(material.sources):
        rows = material.table.source == number
        if source.use == "train" and measured[kept[rows]].all():
            raise DataError(
                f"{source.path}: each of its {int(rows.sum()):,} rows repeats a row of evaluation.file, so none is left to train.",
                "Take it off data.train, or name other held-out rows with evaluation.file.",
            )


def _refuse_shared_prompts(material: Material, held_out: np.ndarray, trains: np.ndarray) -> None:
    keys = material.table.prompt_key
    shared = np.flatnonzero(held_out & np.isin(keys, keys[trains]))
    if not len(shared):
        return
    places = [material.at(index).place for index in shared[:SHOWN_PLACES].tolist()]
    more = f" and {len(shared) - len(places)} more" if len(shared) > len(places) else ""
    raise DataError(
        f"{len(shared)} of {int(held_out.sum())} evaluation rows have a prompt that is also in {material.train_told}: "
        f"{', '.join(places)}{more}.",
        "Delete them from one of the two files: an answer seen in training measures nothing. (data.duplicates drops "
        "training rows that repeat an evaluation row, answer included.)",
    )


def _findings(
    material: Material, recipe: Recipe, times: np.ndarray, reason: np.ndarray, divided: np.ndarray
) -> tuple[Finding, ...]:
    data, is_general = recipe.data, material.rows_for("general")
    repeated = ~is_general & (times > 1)
    found = {code: (reason == number, None) for number, code in enumerate(REASONS) if number}
    counted: dict[str, tuple[np.ndarray, int]] = {code: (rows, int(rows.sum())) for code, (rows, _) in found.items()}
    counted["repeated"] = repeated, int((times[repeated] - 1).sum())
    counted["mixed_in"] = is_general & (times > 0), int(times[is_general].sum())
    counted["split_by_prompt"] = divided, int(divided.sum())
    told = {"duplicates": data.duplicates, "balance": data.balance}
    return tuple(
        Finding(
            code=code, count=count, message=SELECTION_NOTES[code].format(**told),
            severity="warning" if code == "split_by_prompt" else "note",
            rows=[material.at(index) for index in np.flatnonzero(rows)[:SHOWN_PLACES].tolist()],
            remedy="Look at the clusters: onlay audit." if code == "split_by_prompt" else "",
        )
        for code, (rows, count) in counted.items()
        if count
    )  # fmt: skip
