"""Builds the token sequences of a recipe on disk, once for each content: a folder of flat files, read by memory map.

    <cache>/<digest16>/<split>.tokens.npy    int32, all examples one after another
                       <split>.trained.npy   bool, the same length: which tokens are targets
                       <split>.offsets.npy   int64, examples + 1: where each begins
                       <split>.places.npy    int64: row number of each example in its source
                       evaluation.jsonl      the held-out rows as {place, messages, tools} or {place, text}
                       dataset.json          the Dataset record, written last

Rows stream through in chunks, so memory does not grow with the file.  The folder's name is a digest of everything the
tokens depend on; a second call with the same inputs only reads the record.  It is built under another name and renamed
when it is whole.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Self

import numpy as np

from onlay.data.labels import LabelledText
from onlay.data.read import Conversation, Document, Scan, ToolCall, Turn, read_items, scan
from onlay.data.sources import Row
from onlay.data.template import NOTES, ChatTemplate, Encoded
from onlay.errors import DataError, OutputError, RecipeError
from onlay.recipe import Recipe, digest_of
from onlay.records import Dataset, Finding, RowAt, SplitFacts

if TYPE_CHECKING:
    from rich.text import Text

FORMAT_VERSION = 2
"""Raise it when the files below would differ for the same inputs."""
CHUNK_ROWS = 1000
CHUNK_CHARACTERS = 1 << 19
"""Rows are tokenized together up to whichever comes first; a token takes about 200 bytes on the way."""
MOST_TOKENS = 4096
"""Default of data.max_tokens, where the base's context is longer."""
SHOWN_PLACES = 5
BUILD_NOTES = {
    "overlong_dropped": "rows longer than {max_tokens} tokens; dropped (data.overlong: drop)",
    "overlong_cut": "rows longer than {max_tokens} tokens; their end was cut off (data.overlong: cut)",
    "nothing_trained": "rows in which no token trains; dropped",
    "documents_split": "documents longer than {max_tokens} tokens; split into pieces, no token lost",
}
_ARRAYS = {"tokens": np.dtype("<i4"), "trained": np.dtype("?"), "offsets": np.dtype("<i8"), "places": np.dtype("<i8")}

Progress = Callable[[int, int], None]


# ------------------------------------------------------------------------------------------------------------ build


def prepare_dataset(
    recipe: Recipe,
    scanned: Scan,
    template: ChatTemplate | LabelledText,
    *,
    tokenizer_digest: str,
    context_tokens: int | None,
    cache_folder: Path,
    evaluation_scan: Scan | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """The Dataset of a recipe: from the cache where it was built before, else built.

    `scanned` is `scan(recipe.data.train, recipe.data, recipe.data.max_rows)`; `evaluation_scan` that of
    `evaluation.file`, made here where it is not given.  `progress(done, total)` counts rows.
    Raises DataError and RecipeError where nothing could be learned or measured from the result.
    """
    max_tokens = resolve_max_tokens(recipe, context_tokens)
    file = recipe.evaluation.file
    if file is not None and evaluation_scan is None:
        evaluation_scan = scan(file, recipe.data)
    sources = {"data": scanned.digest, "template": template.digest, "tokenizer": tokenizer_digest}
    if evaluation_scan is not None:
        sources["evaluation_data"] = evaluation_scan.digest
    key = digest_of(
        {
            "version": FORMAT_VERSION,
            "sources": sources,
            "data": recipe.data.model_dump(mode="json", exclude={"licence"}),
            "evaluation": [recipe.evaluation.split, file],
            "seed": recipe.training.seed,
            "max_tokens": max_tokens,
            "loss_on": template.loss_on,
        }
    )
    folder = Path(cache_folder).absolute() / key[:16]
    if (folder / "dataset.json").is_file():
        return Dataset.load(folder).model_copy(update={"path": str(folder)})
    held_out = hold_out(recipe, scanned, evaluation_scan)
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        splits, findings = _write(
            unfinished, recipe, scanned, evaluation_scan, held_out, template, max_tokens, progress
        )
        dataset = Dataset(
            sources=sources,
            path=str(folder),
            source=scanned.source,
            source_digest=scanned.digest,
            format=scanned.format,
            template=template.name,
            template_digest=template.digest,
            tokenizer_digest=tokenizer_digest,
            max_tokens=max_tokens,
            stop_token_ids=template.stop_token_ids,
            labels=template.labels if isinstance(template, LabelledText) else [],
            splits=splits,
            findings=findings,
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


def hold_out(recipe: Recipe, scanned: Scan, evaluation_scan: Scan | None) -> np.ndarray | None:
    """Which training rows are held out (bool, one a row); None where none are.  Raises DataError."""
    if evaluation_scan is not None:
        _refuse_shared_prompts(recipe, scanned, evaluation_scan)
        return None
    if recipe.evaluation.split is None:
        return None
    held_out = choose_held_out(scanned.prompt_keys, recipe.evaluation.split, recipe.training.seed)
    if not held_out.any():
        what = f"{scanned.source} has {scanned.rows} row{'s' if scanned.rows > 1 else ''}"
        same = " with one prompt" if scanned.rows > 1 else ""
        raise DataError(
            f"evaluation.split = {recipe.evaluation.split}: {what}{same}, so no rows are left for evaluation.",
            "Add rows, name held-out rows with evaluation.file, or set evaluation.split: null.",
        )
    return held_out


def choose_held_out(prompt_keys: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Bool for each row: held out or not.  Equal prompts stay together; at least one row on each side if possible.

    Prompts are ordered by a hash of key and seed, so that a row's side does not depend on the rows' order; they are
    taken while they fit, which gives `share` of the rows exactly, up to the size of the last group.
    """
    unique, group, counts = np.unique(prompt_keys, return_inverse=True, return_counts=True)
    target = max(1, round(share * len(prompt_keys)))
    chosen = np.zeros(len(unique), dtype=bool)
    if len(unique) < 2:
        return chosen[group]
    target = min(target, len(prompt_keys) - 1)
    order = np.argsort(_mixed(unique, seed), kind="stable")
    taken = 0
    for index in order.tolist():
        if taken + counts[index] <= target:
            chosen[index] = True
            taken += int(counts[index])
            if taken == target:
                break
    if not taken:
        chosen[order[np.argmin(counts[order])]] = True
    return chosen[group]


def _mixed(keys: np.ndarray, seed: int) -> np.ndarray:
    """splitmix64 of key and seed: the same on every machine and numpy."""
    with np.errstate(over="ignore"):
        z = keys.astype(np.uint64) ^ (np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(z ^ (z >> np.uint64(31)))


def _refuse_shared_prompts(recipe: Recipe, scanned: Scan, evaluation_scan: Scan) -> None:
    shared = np.isin(evaluation_scan.prompt_keys, scanned.prompt_keys)
    count = int(shared.sum())
    if not count:
        return
    wanted = set(np.flatnonzero(shared)[:SHOWN_PLACES].tolist())
    rows = enumerate(read_items(evaluation_scan.source, evaluation_scan.format, recipe.data))
    places = [
        row.place for i, (row, _) in itertools.takewhile(lambda found: found[0] <= max(wanted), rows) if i in wanted
    ]
    more = f" and {count - len(places)} more" if count > len(places) else ""
    raise DataError(
        f"{count} of {evaluation_scan.rows} evaluation rows have a prompt that is also in {scanned.source}: "
        f"{', '.join(places)}{more}.",
        "Delete them from one of the two files: an answer seen in training measures nothing.",
    )


@dataclass
class _Findings:
    """Counts by code, with the first few places."""

    counts: dict[str, int] = field(default_factory=dict)
    rows: dict[str, list[RowAt]] = field(default_factory=dict)

    def add(self, code: str, row: Row, count: int = 1) -> None:
        self.counts[code] = self.counts.get(code, 0) + count
        rows = self.rows.setdefault(code, [])
        at = RowAt(file=row.file, row=row.number)
        if len(rows) < SHOWN_PLACES and at not in rows:
            rows.append(at)

    def listed(self, max_tokens: int) -> list[Finding]:
        messages = NOTES | BUILD_NOTES
        return [
            Finding(code=code, count=count, message=messages[code].format(max_tokens=max_tokens), rows=self.rows[code])
            for code, count in sorted(self.counts.items())
        ]


class _SplitWriter:
    """Appends examples to a split's files."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.files: dict[str, BinaryIO] = {}
        self.written = dict.fromkeys(_ARRAYS, 0)
        self.rows = self.trained_tokens = self.longest = 0
        self.has_end = False

    def __enter__(self) -> Self:
        for array in _ARRAYS:
            self.files[array] = (self.folder / f"{self.name}.{array}.npy").open("w+b")
            self._header(array)
        self._append("offsets", np.zeros(1, dtype=np.int64))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for array, out in self.files.items():
            if kind is None:
                begun = out.tell()
                out.seek(0)
                self._header(array)
                out.seek(begun)
            out.close()

    def _header(self, array: str) -> None:
        # numpy pads the header so that the length can grow in place.
        described = {
            "descr": np.lib.format.dtype_to_descr(_ARRAYS[array]),
            "fortran_order": False,
            "shape": (self.written[array],),
        }
        np.lib.format.write_array_header_1_0(self.files[array], described)

    def _append(self, array: str, values: np.ndarray) -> None:
        self.files[array].write(np.ascontiguousarray(values, dtype=_ARRAYS[array]).tobytes())
        self.written[array] += len(values)

    def add(self, ids: Sequence[int], trained: Sequence[bool], place: int) -> None:
        self._append("tokens", np.array(ids, dtype=np.int32))
        self._append("trained", np.array(trained, dtype=bool))
        self._append("offsets", np.array([self.written["tokens"]], dtype=np.int64))
        self._append("places", np.array([place], dtype=np.int64))
        self.trained_tokens += sum(trained)
        self.longest = max(self.longest, len(ids))

    @property
    def facts(self) -> SplitFacts:
        return SplitFacts(
            rows=self.rows,
            examples=self.written["places"],
            tokens=self.written["tokens"],
            trained_tokens=self.trained_tokens,
            longest_tokens=self.longest,
        )


def _write(
    folder: Path,
    recipe: Recipe,
    scanned: Scan,
    evaluation_scan: Scan | None,
    held_out: np.ndarray | None,
    template: ChatTemplate | LabelledText,
    max_tokens: int,
    progress: Progress | None,
) -> tuple[dict[str, SplitFacts], list[Finding]]:
    """Streams the rows of both sources into the split files."""
    total = scanned.rows + (evaluation_scan.rows if evaluation_scan else 0)
    found = _Findings()
    evaluated = held_out is not None or evaluation_scan is not None
    done = 0
    with (
        _SplitWriter(folder, "train") as train,
        _SplitWriter(folder, "evaluation") as evaluation,
        (folder / "evaluation.jsonl").open("w", encoding="utf-8") as rows_out,
    ):
        for scanned_source in (scanned, evaluation_scan):
            if scanned_source is None:
                continue
            limit = recipe.data.max_rows if scanned_source is scanned else None
            items = read_items(scanned_source.source, scanned_source.format, recipe.data, limit=limit)
            at = 0
            for chunk in _chunks(items):
                if at + len(chunk) > scanned_source.rows:
                    break
                encoded = template.encode_batch([item for _, item in chunk])
                for (row, item), example in zip(chunk, encoded, strict=True):
                    to_evaluation = scanned_source is not scanned or (held_out is not None and bool(held_out[at]))
                    writer = evaluation if to_evaluation else train
                    kept = _add_example(writer, row, example, recipe, template, max_tokens, found)
                    if to_evaluation and kept:
                        rows_out.write(json.dumps(_canonical(item), ensure_ascii=False) + "\n")
                    at += 1
                done += len(chunk)
                if progress is not None:
                    progress(done, total)
            if at != scanned_source.rows:
                raise DataError(
                    f"{scanned_source.source} had {scanned_source.rows} rows when it was checked; now it has not.",
                    "Run again when nothing writes to the file.",
                )
    _refuse_useless(recipe, scanned, train, evaluation if evaluated else None, template, found, max_tokens)
    splits = {"train": train.facts}
    if evaluated:
        splits["evaluation"] = evaluation.facts
    else:
        for path in folder.glob("evaluation.*"):
            path.unlink()
    return splits, [*template.findings, *found.listed(max_tokens)]


def _chunks(
    items: Iterator[tuple[Row, Conversation | Document]],
) -> Iterator[list[tuple[Row, Conversation | Document]]]:
    """Rows to tokenize together: few enough that memory stays bounded, enough that the tokenizer runs in parallel."""
    chunk: list[tuple[Row, Conversation | Document]] = []
    characters = 0
    for row, item in items:
        chunk.append((row, item))
        characters += len(item.text) if isinstance(item, Document) else sum(len(turn.content) for turn in item.turns)
        if len(chunk) >= CHUNK_ROWS or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _add_example(
    writer: _SplitWriter,
    row: Row,
    example: Encoded,
    recipe: Recipe,
    template: ChatTemplate | LabelledText,
    max_tokens: int,
    found: _Findings,
) -> bool:
    """Adds a row's examples under the length policy; whether any was added."""
    writer.rows += 1
    for code, count in example.notes.items():
        found.add(code, row, count)
    ids, trained = example.ids, example.trained
    if example.is_document:
        pieces = split_document(ids, max_tokens)
        if len(pieces) > 1:
            found.add("documents_split", row)
        for piece in pieces:
            writer.add(piece, [False] + [True] * (len(piece) - 1), row.number)
        return True
    if len(ids) > max_tokens:
        if recipe.data.overlong == "error":
            raise DataError(
                f"{row.place}: it has {len(ids)} tokens, more than data.max_tokens = {max_tokens}.",
                "Shorten the row, raise data.max_tokens, or set data.overlong to drop or cut.",
            )
        found.add(f"overlong_{'dropped' if recipe.data.overlong == 'drop' else 'cut'}", row)
        if recipe.data.overlong == "drop":
            return False
        kept = max_tokens - example.kept_at_end
        end = len(ids) - example.kept_at_end
        ids, trained = ids[:kept] + ids[end:], trained[:kept] + trained[end:]
    if not any(trained):
        found.add("nothing_trained", row)
        return False
    writer.add(ids, trained, row.number)
    if not writer.has_end:
        stops = template.stop_token_ids
        writer.has_end = any(flag and token in stops for token, flag in zip(ids, trained, strict=True))
    return True


def split_document(ids: list[int], max_tokens: int) -> list[list[int]]:
    """Pieces of at most `max_tokens`, no token lost; the last never has one token alone, which trains nothing."""
    pieces = [ids[at : at + max_tokens] for at in range(0, len(ids), max_tokens)]
    if len(pieces) > 1 and len(pieces[-1]) == 1:
        pieces[-1].insert(0, pieces[-2].pop())
    return pieces


def _refuse_useless(
    recipe: Recipe,
    scanned: Scan,
    train: _SplitWriter,
    evaluation: _SplitWriter | None,
    template: ChatTemplate | LabelledText,
    found: _Findings,
    max_tokens: int,
) -> None:
    dropped = ", ".join(f"{count} {code}" for code, count in found.counts.items()) or "none dropped"
    if not train.trained_tokens:
        raise DataError(
            f"{scanned.source}: no token would be trained ({train.rows} rows; {dropped}; max_tokens {max_tokens}).",
            "Raise data.max_tokens, set data.overlong: cut, or check the rows' weights and the template.",
        )
    # Text goes on, and a label is read off, not written: neither has an end to learn.
    if scanned.format != "text" and not isinstance(template, LabelledText) and not train.has_end:
        raise DataError(
            f"{scanned.source}: no end token would be trained, so the model would not learn to stop ({dropped}).",
            "Raise data.max_tokens, set data.overlong: drop, or choose a data.template that ends its answers.",
        )
    if evaluation is not None and not evaluation.trained_tokens:
        raise DataError(
            f"No evaluation rows are left of {evaluation.rows} ({dropped}; max_tokens {max_tokens}).",
            "Raise data.max_tokens, hold out more with evaluation.split, or set evaluation.split: null.",
        )


# ------------------------------------------------------------------------------------------------------------- rows


def _canonical(item: Conversation | Document) -> dict[str, Any]:
    if isinstance(item, Document):
        return {"place": item.place, "text": item.text}
    return {"place": item.place, "messages": [message_of(turn) for turn in item.turns], "tools": list(item.tools)}


def message_of(turn: Turn) -> dict[str, Any]:
    """A turn as a message of the messages format, which reads back as the same turn."""
    calls = [{"id": c.id, "name": c.name, "arguments": c.arguments} for c in turn.tool_calls]
    message = {
        "role": turn.role,
        "content": turn.content,
        "reasoning": turn.reasoning,
        "tool_calls": calls or None,
        "name": turn.name,
        "tool_call_id": turn.tool_call_id,
        "weight": 0 if turn.role == "assistant" and not turn.trained else None,
    }
    return {key: value for key, value in message.items() if value is not None}


def _from_canonical(values: dict[str, Any]) -> Conversation | Document:
    if "text" in values:
        return Document(values["text"], values["place"])
    turns = tuple(
        Turn(
            message["role"],
            message["content"],
            tuple(ToolCall(call["name"], call["arguments"], call["id"]) for call in message.get("tool_calls", ())),
            message.get("reasoning"),
            message["role"] == "assistant" and message.get("weight", 1) != 0,
            message.get("name"),
            message.get("tool_call_id"),
        )
        for message in values["messages"]
    )
    return Conversation(turns, tuple(values["tools"]), values["place"])


# ------------------------------------------------------------------------------------------------------------- open


class Split:
    """One split of a Dataset, memory-mapped."""

    def __init__(self, folder: Path, name: str, source: str) -> None:
        self.folder, self.name, self.source = folder, name, source
        self._tokens, self._trained, self._offsets, self._places = (self._load(array) for array in _ARRAYS)
        self.lengths = np.diff(self._offsets).astype(np.int32)
        """Tokens of each example."""
        sums = (
            np.concatenate([[0], np.cumsum(self._trained, dtype=np.int64)])
            if len(self._trained)
            else np.zeros(1, dtype=np.int64)
        )
        self.trained_counts = np.diff(sums[self._offsets]).astype(np.int32)
        """Trained tokens of each example."""

    def _load(self, array: str) -> np.ndarray:
        path = self.folder / f"{self.name}.{array}.npy"
        try:
            loaded: np.ndarray = np.load(path, mmap_mode="r")
        except FileNotFoundError:
            raise OutputError(
                f"{path} does not exist.", "Run `onlay prepare` again; the cache folder was cleared."
            ) from None
        except ValueError as error:
            if path.stat().st_size > 128:
                raise OutputError(
                    f"{path} cannot be read: {error}.", "Delete its folder and run `onlay prepare` again."
                ) from None
            loaded = np.load(path)  # An empty file cannot be mapped.
        return loaded

    def __len__(self) -> int:
        return len(self.lengths)

    def example(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (int32) and trained flags (bool) of one example; views of the map."""
        begin, end = int(self._offsets[index]), int(self._offsets[index + 1])
        return self._tokens[begin:end], self._trained[begin:end]

    def place(self, index: int) -> str:
        """`file:row` that the example was made from."""
        return f"{self.source}:{int(self._places[index])}"

    def rows(self) -> Iterator[Conversation | Document]:
        """The conversations or documents of the evaluation split, in order; a document may be several examples."""
        path = self.folder / f"{self.name}.jsonl"
        if not path.is_file():
            raise OutputError(f"{path} does not exist.", "Rows are kept for the evaluation split only.")
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                yield _from_canonical(json.loads(line))


def open_split(dataset: Dataset, name: str) -> Split:
    """A split of a prepared Dataset.  Raises OutputError where it is not there."""
    if name not in dataset.splits:
        raise OutputError(f"The data set {dataset.path} has no split {name}.", f"It has: {', '.join(dataset.splits)}.")
    folder = Path(dataset.path)
    rows = folder / f"{name}.jsonl"
    if not rows.is_file():
        return Split(folder, name, dataset.source)
    with rows.open(encoding="utf-8") as lines:  # Held-out rows may come from a file of their own.
        return Split(folder, name, json.loads(next(lines))["place"].rsplit(":", 1)[0])


def coloured(
    template: ChatTemplate | LabelledText, ids: Sequence[int] | np.ndarray, trained: Sequence[bool] | np.ndarray
) -> Text:
    """The text of an example as rich Text, trained tokens coloured; nothing in the data is read as markup."""
    from rich.text import Text

    text = Text(no_wrap=False)
    pairs = zip((int(token) for token in ids), (bool(flag) for flag in trained), strict=True)
    for flag, run in itertools.groupby(pairs, key=lambda pair: pair[1]):
        shown = template.shown([token for token, _ in run], trained=flag)
        text.append(shown.replace("\x1b", "␛"), style="bold green" if flag else "dim")
    return text
