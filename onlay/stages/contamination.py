"""Whether rows that are given were trained on: then a score says what was remembered, and no gate can go by it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from onlay import ledger
from onlay.errors import OnlayError, OutputError
from onlay.recipe import Recipe, parse_recipe, read_recipe
from onlay.records import Dataset, Gate, Run

if TYPE_CHECKING:
    import numpy as np

    from onlay.data.read import Conversation, Document

UNCHECKED = "whether the rows were trained on could not be checked"


def find_trained(
    rows: Sequence[Conversation | Document], *, records: Path | None, own: bool, data: str | None
) -> str | None:
    """Why no gate may pass on these rows, in words; None where none of them was trained on.

    `records`: the folder with recipe.yaml, run.json and dataset.json of what is judged; None: it has none.  `own`: the rows
    are those that the run held out, which share no prompt with its training rows.  A row was trained on when a training
    row has its prompt: all before the last answer, up to white space.  The training file is read once, as a stream.
    """
    import numpy as np

    from onlay.data.read import prompt_key

    if own:
        return None
    if records is None or not (records / "recipe.yaml").is_file():
        return f"{UNCHECKED}: the adapter does not say what it was trained on"
    try:
        known = _trained_keys(records)
    except OnlayError as error:
        return f"{UNCHECKED}: {error.problem.rstrip('.')}"
    asked = np.frombuffer(b"".join(map(prompt_key, rows)), dtype="<u8")
    count = int(np.isin(asked, known).sum())
    return f"{count:,} of {len(rows):,} rows of {data} were trained on" if count else None


def _trained_keys(records: Path) -> np.ndarray:
    """Keys (uint64) of the prompts that were trained on.  Raises OnlayError where the files are not those of the training."""
    import numpy as np

    from onlay.data.build import source_digests
    from onlay.data.material import read_material
    from onlay.data.select import select_rows

    dataset = Dataset.load(records)
    recipe = _trained_recipe(records)
    if "selection" not in dataset.sources:
        raise OutputError(
            f"{records} was trained by an earlier version, which chose its rows otherwise.", "Train anew."
        )
    material = read_material(recipe, audit=False)
    selection = select_rows(material, recipe)
    found = source_digests(material, selection)
    files = {"data": recipe.data.train_told, "general": recipe.data.general, "evaluation_data": recipe.evaluation.file}
    for name, told in files.items():
        if dataset.sources.get(name) != found.get(name):
            what = "are not the files" if name == "data" and len(recipe.data.train_sources) > 1 else "is not the file"
            raise OutputError(f"{told} {what} any more that was trained on.", "Put it back.")
    if dataset.sources["selection"] != found["selection"]:
        raise OutputError(
            f"{files['data']} gives other training rows than {records} records.", "Restore the recipe, or train anew."
        )
    return np.unique(material.table.prompt_key[selection.times > 0])


def _trained_recipe(records: Path) -> Recipe:
    """As it was when training began, where the ledger knows that: what was held out hangs on it."""
    run, recipe = Run.load(records), read_recipe(records / "recipe.yaml")
    digest = run.sources.get("recipe")
    if recipe.digest == digest:
        return recipe
    row = next((row for row in ledger.Ledger().rows("recipe") if row.digest == digest), None)
    if row is None:
        raise OutputError(
            f"{records / 'recipe.yaml'} is not the recipe that training began with, and the ledger does not hold that one.",
            "Restore it.",
        )
    return parse_recipe(row.values)


def hold_back(gates: Sequence[Gate], problem: str | None) -> list[Gate]:
    """No gate passes where rows were trained on, or where that is not known."""
    if problem is None:
        return list(gates)
    return [
        gate.model_copy(update={"passed": False, "reason": f"{gate.reason}, but {problem}"}) if gate.passed else gate
        for gate in gates
    ]
