"""Builds the token sequences of a recipe on disk, once for each content: a folder of flat files, read by memory map.

    <cache>/<digest16>/<split>.tokens.npy    int32, all examples one after another
                       <split>.trained.npy   bool, the same length: which tokens are targets
                       <split>.offsets.npy   int64, examples + 1: where each begins
                       <split>.places.npy    int64: the source and row number that each example was made from
                       sources.json          the sources' paths
                       evaluation.jsonl      the held-out rows as {place, messages, tools} or {place, text}
                       removed.jsonl         the rows that are in no split: {file, row, reason}, of a duplicate also `kept`
                       dataset.json          the Dataset record, written last

Rows stream through in chunks, so memory does not grow with the files.  The folder's name is a digest of everything the
tokens depend on; a second call with the same inputs only reads the record.  It is built under another name and renamed
when it is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np

from onlay.data.labels import LabelledText
from onlay.data.material import Material, row_section
from onlay.data.read import Conversation, Document, parse
from onlay.data.select import REASONS, SELECTION_NOTES, Selection
from onlay.data.sources import Row, read_rows
from onlay.data.split import SOURCES_FILE, canonical
from onlay.data.template import NOTES, ChatTemplate, Encoded
from onlay.data.writer import Counts, RemovedRows, SplitWriter
from onlay.errors import DataError, OutputError, RecipeError
from onlay.recipe import Recipe, digest_of
from onlay.records import Dataset, Finding, SplitFacts

if TYPE_CHECKING:
    from onlay.data.cleaning import Cleaner

FORMAT_VERSION = 3
"""Raise it when the files below would differ for the same inputs."""
CHUNK_ROWS = 1000
CHUNK_CHARACTERS = 1 << 19
"""Rows are tokenized together up to whichever comes first; a token takes about 200 bytes on the way."""
MOST_TOKENS = 4096
"""Default of data.max_tokens, where the base's context is longer."""
ENCODING_NOTES = {
    "overlong_dropped": "rows longer than {max_tokens} tokens; dropped (data.overlong: drop)",
    "overlong_cut": "rows longer than {max_tokens} tokens; their end was cut off (data.overlong: cut)",
    "nothing_trained": "rows in which no token trains; dropped",
    "documents_split": "documents longer than {max_tokens} tokens; split into pieces, no token lost",
    "anonymised": "rows in which personal data was replaced (data.anonymise: {anonymise})",
}
BUILD_NOTES = SELECTION_NOTES | ENCODING_NOTES

Progress = Callable[[int, int], None]
Item = Conversation | Document


# ------------------------------------------------------------------------------------------------------------ build


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoding:
    """How chosen rows become token sequences."""

    template: ChatTemplate | LabelledText
    max_tokens: int
    overlong: str
    cleaner: Cleaner | None = None


def prepare_dataset(
    recipe: Recipe,
    material: Material,
    selection: Selection,
    template: ChatTemplate | LabelledText,
    *,
    tokenizer_digest: str,
    context_tokens: int | None,
    cache_folder: Path,
    cleaner: Cleaner | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """The Dataset of a recipe: from the cache where it was built before, else built.

    `selection` is `select_rows(material, recipe)`.  `progress(done, total)` counts rows.
    Raises DataError and RecipeError where nothing could be learned or measured from the result.
    """
    encoding = Encoding(
        template=template, max_tokens=resolve_max_tokens(recipe, context_tokens), overlong=recipe.data.overlong,
        cleaner=cleaner,
    )  # fmt: skip
    sources = source_digests(material, selection) | {"template": template.digest, "tokenizer": tokenizer_digest}
    folder = Path(cache_folder).absolute() / _key(recipe, material, encoding, sources)[:16]
    if (folder / "dataset.json").is_file():
        return Dataset.load(folder).model_copy(update={"path": str(folder)})
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        splits, findings = _write(unfinished, material, selection, recipe, encoding, progress)
        dataset = Dataset(
            sources=sources,
            path=str(folder),
            source=material.train_told,
            source_digest=sources["data"],
            format=" + ".join(dict.fromkeys(file.format for file in material.files_for("train"))),
            template=template.name,
            template_digest=template.digest,
            tokenizer_digest=tokenizer_digest,
            max_tokens=encoding.max_tokens,
            stop_token_ids=template.stop_token_ids,
            labels=template.labels if isinstance(template, LabelledText) else [],
            splits=splits,
            findings=[*material.findings, *template.findings, *selection.findings, *findings],
        )
        dataset.save(unfinished)
        _rename_whole(unfinished, folder)
    except OSError as error:
        raise OutputError(
            f"{folder} could not be written: {error.strerror or error}.",
            "Free disk space, or set another cache folder.",
        ) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return dataset


def source_digests(material: Material, selection: Selection) -> dict[str, str]:
    """Of everything that decides which rows are used: `data` (of several sources, of all together), `selection` and others."""
    train = [file.digest for file in material.files_for("train")]
    others = {"general": material.files_for("general"), "evaluation_data": material.files_for("evaluation")}
    named = {name: file.digest for name, files in others.items() for file in files}
    return {"data": train[0] if len(train) == 1 else digest_of(train), **named, "selection": selection.digest}


def _key(recipe: Recipe, material: Material, encoding: Encoding, sources: dict[str, str]) -> str:
    """Digest of everything that the folder's files depend on; of the key of pseudonyms only what names it."""
    data = recipe.data.model_dump(mode="json", exclude={"licence", "terms", "anonymise_key"})
    return digest_of(
        {
            "version": FORMAT_VERSION,
            "sources": sources,
            "data": data,
            "cleaner": None if encoding.cleaner is None else encoding.cleaner.digest,
            "evaluation": [recipe.evaluation.split, recipe.evaluation.split_by, recipe.evaluation.file],
            "seed": recipe.training.seed,
            "max_tokens": encoding.max_tokens,
            "loss_on": encoding.template.loss_on,
            # The audit's lists of terms and its thresholds show in what it found.
            "findings": [finding.model_dump(mode="json") for finding in material.findings],
        }
    )


def resolve_max_tokens(recipe: Recipe, context_tokens: int | None) -> int:
    """The longest example: data.max_tokens, or the base's context but at most 4,096.  Raises RecipeError."""
    asked = recipe.data.max_tokens
    if asked is None:
        return min(context_tokens or MOST_TOKENS, MOST_TOKENS)
    if context_tokens is not None and asked > context_tokens:
        raise RecipeError(
            f"data.max_tokens = {asked} is more than the base's context of {context_tokens} tokens.",
            f"Use at most {context_tokens}, or delete the line to get the default.",
        )
    return asked


def _rename_whole(unfinished: Path, folder: Path) -> None:
    try:
        unfinished.rename(folder)
    except OSError:
        if not (folder / "dataset.json").is_file():  # Not another process that built the same: a leftover.
            shutil.rmtree(folder, ignore_errors=True)
            unfinished.rename(folder)


# ------------------------------------------------------------------------------------------------------------ write


@dataclass(frozen=True, kw_only=True, slots=True)
class _Chosen:
    """A row that trains or is held out; `index` counts through all rows of all sources."""

    index: int
    row: Row
    item: Item


@dataclass(frozen=True, kw_only=True)
class _Outputs:
    train: SplitWriter
    evaluation: SplitWriter
    evaluation_rows: TextIO
    removed: RemovedRows
    counts: Counts


def _write(
    folder: Path,
    material: Material,
    selection: Selection,
    recipe: Recipe,
    encoding: Encoding,
    progress: Progress | None,
) -> tuple[dict[str, SplitFacts], list[Finding]]:
    """Streams the rows of all sources into the split files."""
    (folder / SOURCES_FILE).write_text(json.dumps([source.path for source in material.sources]), encoding="utf-8")
    counts = Counts()
    with (
        SplitWriter(folder, "train") as train,
        SplitWriter(folder, "evaluation") as evaluation,
        (folder / "evaluation.jsonl").open("w", encoding="utf-8") as evaluation_rows,
        RemovedRows(folder / "removed.jsonl") as removed,
    ):
        out = _Outputs(
            train=train, evaluation=evaluation, evaluation_rows=evaluation_rows, removed=removed, counts=counts
        )
        done = 0
        for number in range(len(material.sources)):
            for chunk, read in _chunks(_chosen_rows(material, selection, recipe, number, out)):
                _encode(chunk, material, selection, encoding, out)
                done += read
                if progress is not None:
                    progress(done, len(material.table))
    evaluated = bool(selection.held_out.any())
    _refuse_useless(material, train, evaluation if evaluated else None, encoding, counts)
    splits = {"train": train.facts}
    if evaluated:
        splits["evaluation"] = evaluation.facts
    else:
        for path in folder.glob("evaluation.*"):
            path.unlink()
    told = {"max_tokens": encoding.max_tokens, "anonymise": recipe.data.anonymise}
    return splits, counts.listed(NOTES | BUILD_NOTES, told=told)


def _chosen_rows(
    material: Material, selection: Selection, recipe: Recipe, number: int, out: _Outputs
) -> Iterator[_Chosen | None]:
    """The rows of a source in order, None for one that is left out, which is listed.  Raises DataError if it changed."""
    source, file, section = material.sources[number], material.files[number], row_section(recipe)
    rows = np.flatnonzero(material.table.source == number)
    numbers, first = material.table.number[rows], int(rows[0])
    read = 0
    for read, row in enumerate(read_rows(source.path, section, limit=source.limit), 1):
        if read > len(numbers) or row.number != numbers[read - 1]:
            break
        index = first + read - 1
        why = REASONS[selection.reason[index]]
        if not why:
            yield _Chosen(index=index, row=row, item=parse(row, file.format, section))
            continue
        kept = int(selection.kept[index])
        if why != "general_not_drawn":
            out.removed.add(row, why, kept=material.at(kept) if kept != index else None)
        yield None
    else:
        if read == len(numbers):
            return
    raise DataError(
        f"{source.path} had {len(numbers)} rows when it was checked; now it has not.",
        "Run again when nothing writes to the file.",
    )


def _chunks(rows: Iterator[_Chosen | None]) -> Iterator[tuple[list[_Chosen], int]]:
    """Rows to tokenize together, and how many were read for them: few enough that memory stays bounded, enough that the
    tokenizer runs in parallel."""
    chunk: list[_Chosen] = []
    read = characters = 0
    for chosen in rows:
        read += 1
        if chosen is not None:
            item = chosen.item
            chunk.append(chosen)
            characters += (
                len(item.text) if isinstance(item, Document) else sum(len(turn.content) for turn in item.turns)
            )
        if read >= CHUNK_ROWS or characters >= CHUNK_CHARACTERS:
            yield chunk, read
            chunk, read, characters = [], 0, 0
    if read:
        yield chunk, read


def _encode(chunk: list[_Chosen], material: Material, selection: Selection, encoding: Encoding, out: _Outputs) -> None:
    """Tokenizes rows and adds them to their splits, under the length policy."""
    items = [_cleaned(one, encoding.cleaner, out.counts) for one in chunk]
    if encoding.cleaner is not None:
        encoding.cleaner.store()
    for one, item, example in zip(chunk, items, encoding.template.encode_batch(items), strict=True):
        held_out = bool(selection.held_out[one.index])
        writer = out.evaluation if held_out else out.train
        writer.given += 1
        pieces, dropped = _pieces(one.row, example, encoding, out.counts)
        if dropped is not None:
            out.removed.add(one.row, dropped)
            continue
        writer.rows += 1
        for ids, trained in pieces * (1 if held_out else int(selection.times[one.index])):
            writer.add(ids, trained, source=int(material.table.source[one.index]), number=one.row.number)
            if not writer.has_end:
                stops = encoding.template.stop_token_ids
                writer.has_end = any(flag and token in stops for token, flag in zip(ids, trained, strict=True))
        if held_out:
            out.evaluation_rows.write(json.dumps(canonical(item), ensure_ascii=False) + "\n")


def _cleaned(one: _Chosen, cleaner: Cleaner | None, counts: Counts) -> Item:
    if cleaner is None:
        return one.item
    cleaned = cleaner.clean(one.item)
    if cleaned is not one.item:
        counts.add("anonymised", one.row)
    return cleaned


def _pieces(
    row: Row, example: Encoded, encoding: Encoding, counts: Counts
) -> tuple[list[tuple[list[int], list[bool]]], str | None]:
    """A row's token sequences with their trained flags; or none, and why it is dropped."""
    max_tokens = encoding.max_tokens
    for code, count in example.notes.items():
        counts.add(code, row, count)
    ids, trained = example.ids, example.trained
    if example.is_document:
        pieces = split_document(ids, max_tokens)
        if len(pieces) > 1:
            counts.add("documents_split", row)
        return [(piece, [False] + [True] * (len(piece) - 1)) for piece in pieces], None
    if len(ids) > max_tokens:
        if encoding.overlong == "error":
            raise DataError(
                f"{row.place}: it has {len(ids)} tokens, more than data.max_tokens = {max_tokens}.",
                "Shorten the row, raise data.max_tokens, or set data.overlong to drop or cut.",
            )
        counts.add(f"overlong_{'dropped' if encoding.overlong == 'drop' else 'cut'}", row)
        if encoding.overlong == "drop":
            return [], "overlong_dropped"
        kept = max_tokens - example.kept_at_end
        end = len(ids) - example.kept_at_end
        ids, trained = ids[:kept] + ids[end:], trained[:kept] + trained[end:]
    if not any(trained):
        counts.add("nothing_trained", row)
        return [], "nothing_trained"
    return [(ids, trained)], None


def split_document(ids: list[int], max_tokens: int) -> list[list[int]]:
    """Pieces of at most `max_tokens`, no token lost; the last never has one token alone, which trains nothing."""
    pieces = [ids[at : at + max_tokens] for at in range(0, len(ids), max_tokens)]
    if len(pieces) > 1 and len(pieces[-1]) == 1:
        pieces[-1].insert(0, pieces[-2].pop())
    return pieces


def _refuse_useless(
    material: Material, train: SplitWriter, evaluation: SplitWriter | None, encoding: Encoding, counts: Counts
) -> None:
    told, max_tokens = material.train_told, encoding.max_tokens
    if not train.trained_tokens:
        raise DataError(
            f"{told}: no token would be trained ({train.given} rows; {counts.words}; max_tokens {max_tokens}).",
            "Raise data.max_tokens, set data.overlong: cut, or check the rows' weights and the template.",
        )
    # Text goes on, and a label is read off, not written: neither has an end to learn.
    has_answers = any(file.format != "text" for file in material.files_for("train"))
    if has_answers and not isinstance(encoding.template, LabelledText) and not train.has_end:
        raise DataError(
            f"{told}: no end token would be trained, so the model would not learn to stop ({counts.words}).",
            "Raise data.max_tokens, set data.overlong: drop, or choose a data.template that ends its answers.",
        )
    if evaluation is not None and not evaluation.trained_tokens:
        raise DataError(
            f"No evaluation rows are left of {evaluation.given} ({counts.words}; max_tokens {max_tokens}).",
            "Raise data.max_tokens, hold out more with evaluation.split, or set evaluation.split: null.",
        )
