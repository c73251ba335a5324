"""Builds the token sequences of a recipe on disk, once for each content: a folder of flat files, read by memory map.

    <cache>/<digest16>/<split>.tokens.npy    int32, all examples one after another
                       <split>.trained.npy   bool, the same length: which tokens are targets
                       <split>.offsets.npy   int64, examples + 1: where each begins
                       <split>.places.npy    int64: the source and row number that each example was made from
                       sources.json          the sources' paths
                       evaluation.jsonl      the held-out rows as {place, messages, tools} or {place, text}
                       pseudonyms.txt        with data.anonymise: pseudonyms, the tokens that were put into the vault
                       removed.jsonl         the rows that are in no split: {file, row, reason}, of a duplicate also `kept`
                       dataset.json          the Dataset record, written last

Rows stream through in chunks, so memory does not grow with the files.  The folder's name is a digest of everything the
tokens depend on; a second call with the same inputs only reads the record.  It is built under another name and renamed
when it is whole.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from onlay.data.audit.beginnings import encode_beginnings
from onlay.data.audit.size import few_rows
from onlay.data.chosen import Chosen, chosen_rows, chunks
from onlay.data.labels import LabelledText
from onlay.data.material import Material, Use
from onlay.data.mix import GENERAL_SHARE
from onlay.data.read import Conversation, Document
from onlay.data.select import SELECTION_NOTES, Selection
from onlay.data.sources import Row
from onlay.data.split import SOURCES_FILE, canonical
from onlay.data.template import NOTES, ChatTemplate, Encoded
from onlay.data.writer import Counts, RemovedRows, SplitWriter
from onlay.errors import DataError, OutputError, RecipeError
from onlay.recipe import Recipe, digest_of
from onlay.records import Dataset, Finding, SplitFacts

if TYPE_CHECKING:
    from onlay.data.cleaning import Cleaner

FORMAT_VERSION = 5
"""Raise it when the files below would differ for the same inputs."""
TOKENS_FILE = "pseudonyms.txt"
TOKENS_LOOKED_UP = 10_000
"""In the vault, at once."""
MOST_TOKENS = 4096
"""Default of data.max_tokens, where the base's context is longer."""
ENCODING_NOTES = {
    "overlong_dropped": "rows longer than {max_tokens} tokens; dropped (data.overlong: drop)",
    "overlong_cut": "rows longer than {max_tokens} tokens; their end was cut off (data.overlong: cut)",
    "nothing_trained": "rows in which no token trains; dropped",
    "documents_split": "documents longer than {max_tokens} tokens; split into pieces, no token lost",
    "anonymised": "rows in which personal data was replaced (data.anonymise: {anonymise})",
}
SHARE_NOTES = {
    "general_share_missed": "general examples, which make {found_share} of the training examples, not the {share} of data.general_share",
}
SHARE_TOLERANCE = 0.01
"""By how much the share of general examples may be another than was asked for without a word."""
BUILD_NOTES = SELECTION_NOTES | ENCODING_NOTES | SHARE_NOTES

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
    A vault that was lost, or lies elsewhere now, is filled again also where the data comes from the cache.
    Raises DataError and RecipeError where nothing could be learned or measured from the result.
    """
    encoding = Encoding(
        template=template, max_tokens=resolve_max_tokens(recipe, context_tokens), overlong=recipe.data.overlong,
        cleaner=cleaner,
    )  # fmt: skip
    sources = source_digests(material, selection) | {"template": template.digest, "tokenizer": tokenizer_digest}
    folder = Path(cache_folder).absolute() / _key(recipe, material, encoding, sources)[:16]
    if (folder / "dataset.json").is_file():
        _refill_vault(folder, material, selection, recipe, cleaner, progress)
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
            "method": recipe.adapter.method,  # What `few_rows` tells hangs on it.
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


@dataclass(frozen=True, kw_only=True)
class _Outputs:
    train: SplitWriter
    evaluation: SplitWriter
    evaluation_rows: TextIO
    pseudonyms: TextIO
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
        (folder / TOKENS_FILE).open("w", encoding="utf-8") as pseudonyms,
        RemovedRows(folder / "removed.jsonl") as removed,
    ):
        out = _Outputs(
            train=train, evaluation=evaluation, evaluation_rows=evaluation_rows, pseudonyms=pseudonyms,
            removed=removed, counts=counts,
        )  # fmt: skip
        done = 0
        for number in range(len(material.sources)):
            for chunk, read in chunks(chosen_rows(material, selection, recipe, number, removed)):
                _encode(chunk, material, selection, encoding, out)
                done += read
                if progress is not None:
                    progress(done, len(material.table))
    if encoding.cleaner is None or encoding.cleaner.vault is None:
        (folder / TOKENS_FILE).unlink()
    evaluated = bool(selection.held_out.any())
    _refuse_useless(material, train, evaluation if evaluated else None, encoding, counts)
    splits = {"train": train.facts}
    if evaluated:
        splits["evaluation"] = evaluation.facts
    else:
        for path in folder.glob("evaluation.*"):
            path.unlink()
    told = {"max_tokens": encoding.max_tokens, "anonymise": recipe.data.anonymise}
    of_training = few_rows(_of_use(material, train.rows_of, "train"), method=recipe.adapter.method)
    return splits, [
        *of_training,
        *counts.listed(NOTES | BUILD_NOTES, told=told),
        *_missed_share(material, train, recipe),
    ]


def _of_use(material: Material, of_source: Mapping[int, int], use: Use) -> int:
    return sum(of_source.get(number, 0) for number, source in enumerate(material.sources) if source.use == use)


def _missed_share(material: Material, train: SplitWriter, recipe: Recipe) -> list[Finding]:
    """A warning where the general examples that were written are another share than the recipe asks for: of few rows, of
    long texts that became several examples, of rows that were too long."""
    if recipe.data.general is None:
        return []
    share = GENERAL_SHARE if recipe.data.general_share is None else recipe.data.general_share
    count = _of_use(material, train.examples_of, "general")
    found = count / train.examples_of.total()
    if abs(found - share) <= SHARE_TOLERANCE:
        return []
    told = {"found_share": f"{found:.1%}", "share": f"{share:.1%}"}
    return [
        Finding(
            code="general_share_missed", count=count, severity="warning",
            message=SHARE_NOTES["general_share_missed"].format(**told),
            remedy="Add training rows, name general rows that fit data.max_tokens, or accept the share.",
        )
    ]  # fmt: skip


def _refill_vault(
    folder: Path,
    material: Material,
    selection: Selection,
    recipe: Recipe,
    cleaner: Cleaner | None,
    progress: Progress | None,
) -> None:
    """Cleans the rows once more where the vault does not hold every token of a folder that was built before."""
    if cleaner is None or cleaner.vault is None:
        return
    with (folder / TOKENS_FILE).open(encoding="utf-8") as lines:
        batches = iter(lambda: [line.rstrip("\n") for line in itertools.islice(lines, TOKENS_LOOKED_UP)], [])
        if all(cleaner.vault.holds(tokens) for tokens in batches):
            return
    done = 0
    for number in range(len(material.sources)):
        for chunk, read in chunks(chosen_rows(material, selection, recipe, number, None)):
            for one in chunk:
                cleaner.clean(one.item)
            cleaner.store()
            done += read
            if progress is not None:
                progress(done, len(material.table))


def _encode(chunk: list[Chosen], material: Material, selection: Selection, encoding: Encoding, out: _Outputs) -> None:
    """Tokenizes rows and adds them to their splits, under the length policy."""
    items = [_cleaned(one, encoding.cleaner, out.counts) for one in chunk]
    if encoding.cleaner is not None:
        out.pseudonyms.writelines(f"{token}\n" for token in encoding.cleaner.store())
    template = encoding.template
    if isinstance(template, LabelledText):
        examples = template.encode_batch(items)
    else:
        examples, _ = encode_beginnings(template, items, max_tokens=encoding.max_tokens)
    for one, item, example in zip(chunk, items, examples, strict=True):
        held_out = bool(selection.held_out[one.index])
        writer = out.evaluation if held_out else out.train
        writer.given += 1
        pieces, dropped = _pieces(one.row, example, encoding, out.counts)
        if dropped is not None:
            out.removed.add(one.row, dropped)
            continue
        source = int(material.table.source[one.index])
        writer.rows_of[source] += 1
        for ids, trained in pieces * (1 if held_out else int(selection.times[one.index])):
            writer.add(ids, trained, source=source, number=one.row.number)
            if not writer.has_end:
                stops = encoding.template.stop_token_ids
                writer.has_end = any(flag and token in stops for token, flag in zip(ids, trained, strict=True))
        if held_out:
            out.evaluation_rows.write(json.dumps(canonical(item), ensure_ascii=False) + "\n")


def _cleaned(one: Chosen, cleaner: Cleaner | None, counts: Counts) -> Item:
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
                f"{row.place}: it has more tokens than data.max_tokens = {max_tokens}.",
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
    if not train.trained_tokens or not _of_use(material, train.rows_of, "train"):
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
