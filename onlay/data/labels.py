"""Classification without words: a text's tokens, and after them one more whose id is the number of its label.

That last entry is the only one that trains, so batches, packing and counts work as for any other example: the target
at the text's last token is the label.  The body does read the number as if it were a token, but nothing that counts
comes after it.  There is no chat template: the text is tokenized as the tokenizer does by itself, with its BOS.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from onlay.data.material import Material, row_section
from onlay.data.read import Conversation, Document, read_items
from onlay.data.select import Selection
from onlay.data.template import Encoded
from onlay.errors import DataError
from onlay.recipe import Recipe, digest_of
from onlay.records import Finding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENCODING_VERSION = 1
"""Raise it when the same row would give other tokens: it is part of the digest."""


def text_and_label(item: Conversation | Document) -> tuple[str, str]:
    """Of a row that `onlay.data.read` parsed as classification; white space around a label is no part of it."""
    assert isinstance(item, Conversation)
    text = next(turn.content for turn in item.turns if turn.role == "user")
    return text, item.turns[-1].content.strip()


def find_labels(recipe: Recipe, material: Material, selection: Selection, *, vocabulary_size: int) -> list[str]:
    """The different labels of the training rows, sorted.

    Raises DataError for fewer than two labels, for more than the base has tokens, and for a held-out row whose label no
    training row has.
    """
    first: dict[str, str] = {}
    unseen: dict[str, str] = {}
    index = 0
    for source, file in zip(material.sources, material.files, strict=True):
        for row, item in read_items(source.path, file.format, row_section(recipe), limit=source.limit):
            if selection.times[index]:
                first.setdefault(text_and_label(item)[1], row.place)
            elif selection.held_out[index]:
                unseen.setdefault(text_and_label(item)[1], row.place)
            index += 1
    for label, place in unseen.items():
        if label not in first:
            raise DataError(
                f"{place}: its label {label!r} is held out, but no training row has it.",
                "Add training rows with it, correct it, or hold out other rows: evaluation.split, evaluation.file, training.seed.",
            )
    if len(first) < 2:
        [(label, place)] = first.items()
        raise DataError(
            f"{place}: its label {label!r} is that of every training row, so there is nothing to tell apart.",
            "Add rows of another label, or name the column with the labels: data.answer_field.",
        )
    if len(first) > vocabulary_size:
        raise DataError(
            f"{material.train_told} has {len(first):,} different labels; at most {vocabulary_size:,} can be told apart.",
            "Are they answers? Then train an adapter (adapter.method: lora). Else name another data.answer_field.",
        )
    return sorted(first)


class LabelledText:
    """Encodes rows for a classification head; stands where a ChatTemplate stands for the other methods."""

    name = "none"
    loss_on = "label"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str]) -> None:
        self.tokenizer: Any = tokenizer
        self.labels = list(labels)
        self.digest = digest_of(["labels", self.labels, ENCODING_VERSION])
        self.findings: list[Finding] = []
        self.stop_token_ids: list[int] = []
        """A head says one label and stops by itself."""
        self._numbers = {label: number for number, label in enumerate(self.labels)}

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of plain texts, as the head reads them."""
        ids: list[list[int]] = self.tokenizer(list(texts), return_attention_mask=False, verbose=False)["input_ids"]
        return ids

    def encode_batch(self, items: Sequence[Conversation | Document]) -> list[Encoded]:
        """Tokens and, as the last one, the label's number, which trains; a cut keeps it."""
        pairs = [text_and_label(item) for item in items]
        texts = self.encode_texts([text for text, _ in pairs])
        return [
            # A text without any token has nothing that a label could be read from: it trains nothing and is dropped.
            Encoded([*ids, self._numbers[label]], [False] * len(ids) + [bool(ids)], place=item.place, kept_at_end=1)
            for ids, (_, label), item in zip(texts, pairs, items, strict=True)
        ]

    def shown(self, ids: Sequence[int], *, trained: bool) -> str:
        """Text of neighbouring tokens that all train or all do not."""
        if trained:
            return "".join(f" → {self.labels[number]}" for number in ids)
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text
