"""What is done with one chunk of rows, in this process or in a worker process; and the worker process itself.

    python -c "from onlay.data.audit.worker import main; main()"      messages on standard input and output:
                                                                      8 bytes of length, then a pickle

A chunk of rows goes in, numbers come out: texts do not leave it, but for openings and the reasons of what is wrong.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Literal

import numpy as np

from onlay.data.audit import shape
from onlay.data.audit.balance import domain_of
from onlay.data.audit.languages import language_of
from onlay.data.audit.overlap import SharedNgrams, ngrams_of, shared_ngrams
from onlay.data.audit.similar import Fingerprints, fingerprint, keys_of
from onlay.data.audit.texts import Terms, check_texts, opening_of
from onlay.data.audit.words import rows_of_texts
from onlay.data.privacy.detect import find
from onlay.data.read import Conversation, Document, parse, prompt_key
from onlay.data.rows import RowTable
from onlay.data.sources import Row
from onlay.errors import DataError
from onlay.recipe import DataSection

Role = Literal["train", "evaluation", "benchmark"]
SECRETS = ("url_credentials", "key")
LENGTH_BYTES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """What every chunk is examined with."""

    section: DataSection
    near_threshold: float | None
    """None: no fingerprints."""
    texts: bool
    privacy: bool
    terms: Terms | None
    boilerplate: np.ndarray | None = None
    known: dict[Role, np.ndarray] = field(default_factory=dict)
    """By role: n-grams of the evaluation and benchmark rows, to look for in training rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    source: int
    role: Role
    format: str
    domain_field: str | None
    """None: a column of a usual name."""
    rows: list[Row]


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    source: int
    seen: int
    """Rows that went in; those of `table` could be parsed, `bad` holds the others."""
    bad: list[tuple[int, str, str, str]]
    """Row number, code, problem, remedy."""
    table: RowTable
    fingerprints: Fingerprints | None
    ngrams: np.ndarray | None
    """Of evaluation and benchmark rows."""
    shared: dict[Role, SharedNgrams]
    """Of training rows, by the role that they share with."""
    found: dict[str, list[int]]
    """Row numbers by code."""
    reasons: list[tuple[str, int, str]]
    """Code, row number, why."""
    openings: Counter[str]
    opening_keys: np.ndarray
    """(rows of `table`,) uint64: `opening_key` of each row's opening, 0 for none; empty where texts are not examined."""
    languages: list[str]
    """Of each row of `table`, `` for unknown; empty where texts are not examined."""
    personal: Counter[str]
    """Occurrences by kind."""
    roles: Counter[str]
    """Turns by role."""


def work(chunk: Chunk, setup: Setup) -> Result:
    """Parses and examines the rows of a chunk."""
    rows: list[Row] = []
    items: list[Conversation | Document] = []
    bad = []
    for row in chunk.rows:
        try:
            item = parse(row, chunk.format, setup.section)
        except DataError as error:
            if error.code is None:
                raise
            bad.append((row.number, error.code, error.problem, error.remedy))
        else:
            rows.append(row)
            items.append(item)
    found: dict[str, list[int]] = {}
    reasons = []
    openings: list[str | None] = []
    languages: list[str] = []
    personal: Counter[str] = Counter()
    roles: Counter[str] = Counter()
    is_train = chunk.role == "train"
    texts = rows_of_texts(items)
    for row, item in zip(rows, items, strict=True):
        problem = shape.order_problem(item)
        codes = ["roles_order"] if problem is not None else []
        if problem is not None:
            reasons.append(("roles_order", row.number, f"{row.place}: {problem}."))
        if isinstance(item, Conversation) and is_train:
            roles.update(turn.role for turn in item.turns)
        if setup.texts and is_train:
            codes += check_texts(item, terms=setup.terms)
            openings.append(opening_of(item))
            languages.append(language_of(_answer_of(item)) or "")
        if setup.privacy and is_train:
            kinds = Counter(span.kind for span in find(whole_text(item), names=None))
            personal += kinds
            codes += [code_of_kind(kind) for kind in kinds]
        for code in codes:
            found.setdefault(code, []).append(row.number)
    return Result(
        source=chunk.source, seen=len(chunk.rows), bad=bad, table=table_of(chunk, rows, items, texts),
        fingerprints=None if setup.near_threshold is None
        else fingerprint(items, texts=texts, boilerplate=setup.boilerplate),
        ngrams=None if is_train or setup.near_threshold is None else ngrams_of(items),
        shared={role: shared_ngrams(items, known) for role, known in setup.known.items()} if is_train else {},
        found=found, reasons=reasons, openings=Counter(opening for opening in openings if opening is not None),
        opening_keys=np.array([opening_key(opening) for opening in openings], dtype=np.uint64), languages=languages,
        personal=personal, roles=roles,
    )  # fmt: skip


def opening_key(opening: str | None) -> int:
    if opening is None:
        return 0
    return int.from_bytes(hashlib.blake2b(opening.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def code_of_kind(kind: str) -> str:
    """The finding's code of a kind of personal data."""
    return f"secret_{kind}" if kind in SECRETS else f"personal_{kind}"


def whole_text(item: Conversation | Document) -> str:
    """All texts that `data.anonymise` would look through: also reasoning, the texts of tool calls and tools."""
    if isinstance(item, Document):
        return item.text
    if item.tools or any(turn.tool_calls or turn.reasoning or turn.name for turn in item.turns):
        from onlay.data.privacy.anonymise import texts_of  # Most data has no such rows, and need not wait for it.

        return "\n\n".join(texts_of(item))
    return "\n\n".join(turn.content for turn in item.turns)


def _answer_of(item: Conversation | Document) -> str:
    if isinstance(item, Document):
        return item.text
    return "\n".join(turn.content for turn in item.turns if turn.role == "assistant")


def table_of(
    chunk: Chunk, rows: Sequence[Row], items: Sequence[Conversation | Document], texts: Sequence[bytes]
) -> RowTable:
    """`texts`: rows_of_texts of the items."""
    domains: dict[str, int] = {}
    domain = np.full(len(rows), -1, dtype=np.int32)
    for index, row in enumerate(rows):
        name = domain_of(row.values, field=chunk.domain_field)
        if name is not None:
            name = name.encode("utf-8", "replace").decode()  # JSON may hold half of an escaped pair.
            domain[index] = domains.setdefault(name, len(domains))
    normal = zip(items, texts[::2], texts[1::2], strict=True)
    keys = np.array([keys_of(item, normal=pair) for item, *pair in normal], dtype=np.uint64).reshape(-1, 3)
    lengths = np.array([_lengths(item) for item in items], dtype=np.int32).reshape(-1, 2)
    return RowTable(
        source=np.full(len(rows), chunk.source, dtype=np.uint16),
        number=np.array([row.number for row in rows], dtype=np.int64),
        prompt_key=np.frombuffer(b"".join(map(prompt_key, items)), dtype="<u8").astype(np.uint64),
        loose_prompt_key=keys[:, 0].copy(), answer_key=keys[:, 1].copy(), row_key=keys[:, 2].copy(),
        prompt_characters=lengths[:, 0].copy(), answer_characters=lengths[:, 1].copy(), domain=domain,
        domains=tuple(domains),
    )  # fmt: skip


def _lengths(item: Conversation | Document) -> tuple[int, int]:
    """Characters of what is asked and of what is answered; a document is all prompt."""
    if isinstance(item, Document):
        return len(item.text), 0
    answers = sum(len(turn.content) for turn in item.turns if turn.role == "assistant")
    return sum(len(turn.content) for turn in item.turns) - answers, answers


# ---------------------------------------------------------------------------------------------------------- messages


def send(pipe: BinaryIO, message: object) -> None:
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    pipe.write(len(data).to_bytes(LENGTH_BYTES, "little"))
    pipe.write(data)
    pipe.flush()


def receive(pipe: BinaryIO) -> Any:
    """The next message.  Raises EOFError where the other side is gone."""
    head = pipe.read(LENGTH_BYTES)
    if len(head) < LENGTH_BYTES:
        raise EOFError
    length = int.from_bytes(head, "little")
    data = pipe.read(length)
    if len(data) < length:
        raise EOFError
    return pickle.loads(data)


def _messages(pipe: BinaryIO) -> Iterator[Setup | Chunk]:
    while True:
        try:
            yield receive(pipe)
        except EOFError:
            return


def main() -> None:
    """Answers every Chunk with its Result, by the latest Setup, until the other side closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which ends this one.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # What a library prints must not come between the answers.
    setup: Setup | None = None
    with suppress(BrokenPipeError):  # The main process is gone: nobody waits for the answer.
        for message in _messages(sys.stdin.buffer):
            if isinstance(message, Setup):
                setup = message
            else:
                assert setup is not None
                send(answers, work(message, setup))
