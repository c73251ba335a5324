"""Lengths of a recipe's rows, remembered from when they were tokenized: a later plan needs no tokenizer, and so no torch."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from onlay import ledger
from onlay.errors import OutputError
from onlay.recipe import Recipe, digest_of
from onlay.records import write_whole

if TYPE_CHECKING:
    from onlay.planning.lengths import Lengths
    from onlay.stages.preparing import Prepared

FOLDER = "lengths"


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownLengths:
    lengths: Lengths
    """Of the training rows."""
    trained_share: float
    """Of their tokens."""
    held_out_rows: int


def lengths_of(prepared: Prepared) -> KnownLengths:
    """Of the training rows of a prepared data set."""
    from onlay.planning.lengths import Lengths

    split = prepared.split("train")
    counts = Counter(int(length) for length in split.lengths)
    facts = prepared.dataset.splits["train"]
    told = f"{len(split):,} examples of {facts.tokens / max(1, facts.examples):,.0f} tokens on average, tokenized"
    held_out = prepared.dataset.splits.get("evaluation")
    return KnownLengths(
        lengths=Lengths(counts=dict(sorted(counts.items())), told=told), held_out_rows=held_out.examples if held_out else 0,
        trained_share=facts.trained_tokens / max(1, facts.tokens),
    )  # fmt: skip


def remember_lengths(recipe: Recipe, known: KnownLengths) -> None:
    """Keeps them under $ONLAY_HOME/lengths, by recipe and files.  Raises OutputError."""
    values = {
        "counts": known.lengths.counts,
        "trained_share": known.trained_share,
        "told": known.lengths.told,
        "held_out": known.held_out_rows,
    }
    write_whole(_place(recipe), json.dumps(values))


def recall_lengths(recipe: Recipe) -> KnownLengths | None:
    """None where these rows were not tokenized before, as they are now and for this base."""
    from onlay.planning.lengths import Lengths

    place = _place(recipe)
    if not place.is_file():
        return None
    try:
        values = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(f"{place} cannot be read: {error}.", "Delete it; `onlay prepare` writes it again.") from None
    counts = {int(length): int(count) for length, count in values["counts"].items()}
    return KnownLengths(
        lengths=Lengths(counts=counts, told=f"{values['told']} before"), trained_share=float(values["trained_share"]),
        held_out_rows=int(values["held_out"]),
    )  # fmt: skip


def _place(recipe: Recipe) -> Path:
    """By what the lengths depend on: base, data section, split, seed, and the files as they are."""
    files = [source.file for source in recipe.data.train_sources]
    files += [file for file in (recipe.data.general, recipe.evaluation.file) if file is not None]
    states = []
    for file in files:
        path = Path(file)
        found = path.stat() if path.is_file() else None
        states.append([str(path.absolute()), *([] if found is None else [found.st_size, found.st_mtime_ns])])
    key = digest_of(
        {
            "base": [recipe.model.base, recipe.model.revision], "data": recipe.data.model_dump(mode="json"), "files": states,
            "evaluation": [recipe.evaluation.split, recipe.evaluation.split_by, recipe.evaluation.file],
            "seed": recipe.training.seed, "method": recipe.adapter.method,
        }
    )  # fmt: skip
    return ledger.home() / FOLDER / f"{key[:16]}.json"
