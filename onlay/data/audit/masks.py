"""What a base's template makes of rows: how many tokens, which of them train, whether the answer ends, whether it reads back.

Rows are tokenized in batches, exactly as `prepare` does it, and cut or left out by the same policy; only numbers are kept.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from onlay.data.audit.beginnings import characters_of, encode_beginnings, unseen_tokens
from onlay.data.audit.catalogue import Tally
from onlay.data.audit.statistics import distribution_of
from onlay.data.build import split_document
from onlay.data.read import Conversation, Document
from onlay.data.round_trip import RoundTrip
from onlay.data.template import NOTES, ChatTemplate, Encoded
from onlay.errors import DataError
from onlay.records import Distribution, Finding, RowAt

CHUNK_ROWS = 1000
CHUNK_CHARACTERS = 1 << 19
"""Rows are tokenized together up to whichever comes first; a token takes about 200 bytes on the way."""
LITTLE_TRAINED = 0.05
"""Share of trained tokens below which nineteen of twenty tokens are computed for nothing but context."""
SHOWN_ROWS = 20

Item = Conversation | Document
PlacedItem = tuple[int, int, Item]
"""Source, row number, item."""
Example = tuple[list[int], list[bool]]
"""Token ids, and which of them train."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskStatistics:
    rows: int
    tokens: int
    """Of the rows as `prepare` would keep them: dropped rows have none, cut rows max_tokens."""
    trained_tokens: int
    distributions: list[Distribution]
    """tokens (of whole rows, before any cut); of conversations answer_tokens (trained ones of the whole row) and
    trained_share (trained tokens over all)."""
    measures: dict[str, float]
    """max_tokens; trained_share (of all kept tokens); round_trip_unchecked where there were such rows."""
    told: dict[str, dict[str, object]]
    """By code, what fills the {names} of the catalogue's messages."""
    about_template: list[Finding]
    noted: dict[str, tuple[int, list[tuple[int, int]]]]
    """By code of template.NOTES: how many rows, and the first few."""

    def findings(self, files: Sequence[str]) -> list[Finding]:
        """What is worth telling of the template, and what it had to change in rows."""
        return [
            *self.about_template,
            *(
                Finding(
                    code=code, count=count, message=NOTES[code],
                    rows=[RowAt(file=files[source], row=number) for source, number in rows],
                )
                for code, (count, rows) in sorted(self.noted.items())
            ),
        ]  # fmt: skip


def check_masks(
    items: Iterable[PlacedItem],
    template: ChatTemplate,
    *,
    max_tokens: int,
    overlong: str,
    tally: Tally,
    progress: Callable[[int], None] | None = None,
) -> MaskStatistics:
    """Tokenizes every row and judges its mask.  `overlong` is data.overlong; `progress(done)` counts rows.

    Adds rows to the tally: overlong_rows; template_refused; no_trained_tokens; end_not_trained (the last trained answer
    of a row that is not cut
    has no end token that trains); little_trained (a share below LITTLE_TRAINED); round_trip_failed (onlay.data.round_trip;
    of documents: special tokens in the text).  Nothing but overlong_rows is said of a row that `prepare` would leave out
    for its length.  Of a conversation many times as long as max_tokens only the beginning is tokenized and read back
    (length_estimated): its tokens are then estimated by its characters.
    """
    counting = _Counting(template, max_tokens=max_tokens, overlong=overlong, tally=tally)
    for chunk in _chunks(items):
        counting.add(chunk)
        if progress is not None:
            progress(counting.rows)
    return counting.result()


def examples_of(encoded: Encoded, *, max_tokens: int, overlong: str) -> list[Example]:
    """What of a row is trained on: itself, its beginning, nothing, or the pieces of a document."""
    ids, trained = encoded.ids, encoded.trained
    if encoded.is_document:
        return [(piece, [False] + [True] * (len(piece) - 1)) for piece in split_document(ids, max_tokens)]
    if len(ids) > max_tokens:
        return [(ids[:max_tokens], trained[:max_tokens])] if overlong == "cut" else []
    return [(ids, trained)] if ids else []


class _Counting:
    def __init__(self, template: ChatTemplate, *, max_tokens: int, overlong: str, tally: Tally) -> None:
        self._template, self._max_tokens, self._overlong, self._tally = template, max_tokens, overlong, tally
        self._round_trip = RoundTrip(template)
        self._stops = frozenset(template.stop_token_ids)
        self.lengths, self.answers, self.talk_lengths = array("i"), array("i"), array("i")
        self.rows = self.tokens = self.trained_tokens = self.unchecked = 0
        self.noted: dict[str, tuple[int, list[tuple[int, int]]]] = {}

    def add(self, chunk: Sequence[PlacedItem]) -> None:
        self.rows += len(chunk)
        refused: dict[int, DataError] = {}
        items: list[Item] = [item for _, _, item in chunk]
        encoded, cut = encode_beginnings(self._template, items, max_tokens=self._max_tokens, refused=refused)
        items = [cut.get(i, item) for i, item in enumerate(items)]
        taken = [i for i in range(len(chunk)) if i not in refused]
        verdicts = self._round_trip.check([items[i] for i in taken], [encoded[i] for i in taken])
        for i in refused:
            self._tell("template_refused", chunk[i])
        for i, reads_back in zip(taken, verdicts, strict=True):
            unseen = 0, 0
            if i in cut:
                self._tell("length_estimated", chunk[i])
                unseen = unseen_tokens(chunk[i][2], cut[i], encoded[i], loss_on=self._template.loss_on)
            if not self._add_row(chunk[i], encoded[i], unseen=unseen):
                continue
            if reads_back is None:
                self.unchecked += 1
            elif not reads_back:
                self._tell("round_trip_failed", chunk[i])

    def _tell(self, code: str, placed: PlacedItem) -> None:
        self._tally.add(code, source=placed[0], number=placed[1])

    def _add_row(self, placed: PlacedItem, encoded: Encoded, *, unseen: tuple[int, int]) -> bool:
        """Whether `prepare` would keep it.  `unseen`: how many more tokens it has, all and trained."""
        for code in encoded.notes:
            count, rows = self.noted.setdefault(code, (0, []))
            if len(rows) < SHOWN_ROWS:
                rows.append(placed[:2])
            self.noted[code] = (count + 1, rows)
        length = len(encoded.ids) + unseen[0]
        self.lengths.append(length)
        if not encoded.is_document:
            self.talk_lengths.append(length)
            self.answers.append(sum(encoded.trained) + unseen[1])
            if length > self._max_tokens:
                self._tell("overlong_rows", placed)
        examples = examples_of(encoded, max_tokens=self._max_tokens, overlong=self._overlong)
        if not examples:
            return False
        tokens, trained = sum(len(ids) for ids, _ in examples), sum(sum(flags) for _, flags in examples)
        self.tokens += tokens
        self.trained_tokens += trained
        if not trained:
            self._tell("no_trained_tokens", placed)
        elif not encoded.is_document:
            # A row that is cut loses its end by the recipe's own choice, and is told as overlong.
            if length <= self._max_tokens and not self._ends(placed[2], *examples[0]):
                self._tell("end_not_trained", placed)
            if trained < LITTLE_TRAINED * tokens:
                self._tell("little_trained", placed)
        return True

    def _ends(self, item: Conversation | Document, ids: list[int], trained: list[bool]) -> bool:
        """Whether the end token of the last trained answer trains."""
        if self._template.loss_on == "all":
            if isinstance(item, Conversation) and item.turns[-1].role != "assistant":
                return any(token in self._stops for token in ids[1:])
            # Where all tokens train, white space after the end token does too.
            tail = next((token for token in reversed(ids) if token in self._stops or not self._is_blank(token)), None)
            return tail in self._stops
        last = len(trained) - 1 - trained[::-1].index(True)
        return ids[last] in self._stops

    def _is_blank(self, token: int) -> bool:
        return not self._template.tokenizer.decode([token]).strip()

    def result(self) -> MaskStatistics:
        answers, whole = np.array(self.answers), np.array(self.talk_lengths)
        distributions = [
            distribution_of(np.array(self.lengths), name="tokens", unit="tokens"),
            distribution_of(answers, name="answer_tokens", unit="tokens"),
            distribution_of(answers / whole, name="trained_share", unit="share"),
        ]
        measures = {"max_tokens": float(self._max_tokens)}
        if self.tokens:
            measures["trained_share"] = self.trained_tokens / self.tokens
        if self.unchecked:
            measures["round_trip_unchecked"] = float(self.unchecked)
        told: dict[str, dict[str, object]] = {
            "overlong_rows": {"max_tokens": f"{self._max_tokens:,}", "overlong": self._overlong},
            "little_trained": {"share": f"{LITTLE_TRAINED:.0%}"},
        }
        return MaskStatistics(
            rows=self.rows, tokens=self.tokens, trained_tokens=self.trained_tokens,
            distributions=[one for one in distributions if one is not None], measures=measures, told=told, about_template=self._template.findings, noted=self.noted,
        )  # fmt: skip


def _chunks(items: Iterable[PlacedItem]) -> Iterator[list[PlacedItem]]:
    """Rows to tokenize together: few enough that memory stays bounded, enough that the tokenizer runs in parallel."""
    chunk: list[PlacedItem] = []
    characters = 0
    for placed in items:
        chunk.append(placed)
        characters += characters_of(placed[2])
        if len(chunk) >= CHUNK_ROWS or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk
