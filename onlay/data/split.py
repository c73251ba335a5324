"""A prepared split, opened: token sequences by memory map, the places they came from, the held-out rows.

The files are those that onlay/data/build.py describes.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onlay.data.read import Conversation, Document, ToolCall, Turn
from onlay.errors import OutputError
from onlay.records import Dataset

if TYPE_CHECKING:
    from rich.text import Text

    from onlay.data.labels import LabelledText
    from onlay.data.template import ChatTemplate

ARRAYS = {
    "tokens": np.dtype("<i4"),
    "trained": np.dtype("?"),
    "offsets": np.dtype("<i8"),
    "places": np.dtype("<i8"),
}
"""Of each split, NAME.ARRAY.npy."""
SOURCES_FILE = "sources.json"
"""Paths of the sources, in the order that `places` counts them in."""
PLACE_BITS = 40
"""A place is the number of the source, shifted by this, and the row's number in it."""


class Split:
    """One split of a Dataset, memory-mapped."""

    def __init__(self, folder: Path, name: str, sources: Sequence[str]) -> None:
        self.folder, self.name, self.sources = folder, name, tuple(sources)
        self._tokens, self._trained, self._offsets, self._places = map(self._load, ARRAYS)
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
        source, number = divmod(int(self._places[index]), 1 << PLACE_BITS)
        return f"{self.sources[source]}:{number}"

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
    if (folder / SOURCES_FILE).is_file():
        return Split(folder, name, json.loads((folder / SOURCES_FILE).read_text(encoding="utf-8")))
    # Prepared before there could be several sources: one for each split.
    rows = folder / f"{name}.jsonl"
    if not rows.is_file():
        return Split(folder, name, [dataset.source])
    with rows.open(encoding="utf-8") as lines:
        return Split(folder, name, [json.loads(next(lines))["place"].rsplit(":", 1)[0]])


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


def canonical(item: Conversation | Document) -> dict[str, Any]:
    """A row as a line of evaluation.jsonl."""
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
