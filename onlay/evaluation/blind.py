"""A blind comparison by a person: two answers to one prompt, in random order and without names; which is better?

Every choice is written down before the next question, so that a comparison can be left and taken up again.  Answers that are
the same are ties without being asked.  A person is asked each pair once; `again` pairs are asked a second time, the other way
round, which measures how far the person can be relied on.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from onlay.errors import DataError, OutputError
from onlay.evaluation.compare import sign_test
from onlay.recipe import digest_of
from onlay.records import Judged

WORDS = {
    "a": "a", "b": "b", "t": "tie", "tie": "tie", "=": "tie", "s": "skip", "skip": "skip", "q": "quit", "quit": "quit",
}  # fmt: skip
"""What a person may type, in any case."""
HOW = "Which is better?  a, b, t (tie), s (skip), q (stop here and go on later): "
UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Characters with which an answer could move the cursor, change colours or turn the text round."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two systems' answers to a row, in the order in which they are shown."""

    row: int
    place: str
    again: bool
    """Asked before, the other way round."""
    first: str
    second: str
    prompt: Sequence[Mapping[str, Any]]
    expected: str
    answers: tuple[str, str]
    """Of `first` and `second`."""

    @property
    def same(self) -> bool:
        return self.answers[0].strip() == self.answers[1].strip()

    @property
    def digest(self) -> str:
        """Of what is judged, whichever answer comes first."""
        return digest_of([list(self.prompt), *sorted(self.answers)])


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One line of choices.jsonl."""

    row: int
    place: str
    again: bool
    first: str
    second: str
    digest: str
    choice: str
    """a (the first), b, tie, skip, or same: equal answers, not asked."""

    @property
    def winner(self) -> str | None:
        return {"a": self.first, "b": self.second}.get(self.choice)


def draw_pairs(
    rows: Sequence[Mapping[str, Any]], *, system: str, against: str, seed: int, most: int | None = None, again: int = 0
) -> list[Pair]:
    """Pairs in the order of asking.  The same arguments draw the same.

    `rows`: lines of answers.jsonl.  `most`: no more than so many rows, drawn at random.  Each system is shown first in half
    of the rows, give or take one.  `again`: so many of the rows, at most all that differ, are asked once more at the end.
    Raises DataError for a row that one of the two did not answer.
    """
    for row in rows:
        for name in (system, against):
            if name not in row["answers"]:
                raise DataError(
                    f"{row['place']}: no answer of {name!r}; there are answers of {', '.join(sorted(row['answers']))}.",
                    "Name two of those, or evaluate again with this one.",
                )
    stream = random.Random(seed)
    drawn = stream.sample(list(rows), min(len(rows), most if most is not None else len(rows)))
    ours_first = [place % 2 == 0 for place in range(len(drawn))]
    stream.shuffle(ours_first)
    pairs = []
    for row, ours in zip(drawn, ours_first, strict=True):
        order = (system, against) if ours else (against, system)
        pairs.append(_pair(row, order, again=False))
    differing = [place for place, pair in enumerate(pairs) if not pair.same]
    repeated = stream.sample(differing, min(again, len(differing)))
    return pairs + [_pair(drawn[place], (pairs[place].second, pairs[place].first), again=True) for place in repeated]


def _pair(row: Mapping[str, Any], order: tuple[str, str], *, again: bool) -> Pair:
    answers = (row["answers"][order[0]], row["answers"][order[1]])
    return Pair(
        row=row["row"],
        place=row["place"],
        again=again,
        first=order[0],
        second=order[1],
        prompt=row["prompt"],
        expected=row["expected"],
        answers=answers,
    )


def question(pair: Pair, *, number: int, total: int, reference: bool = True) -> str:
    """What the person reads: the prompt, what was expected if `reference`, and two answers; no system's name."""
    parts = [f"── {number} of {total} " + "─" * 40]
    parts += [f"{message['role']}:\n{message.get('content') or json.dumps(dict(message))}" for message in pair.prompt]
    if reference:
        parts.append(f"expected:\n{pair.expected}")
    parts += [f"{letter}:\n{answer}" for letter, answer in zip("AB", pair.answers, strict=True)]
    return UNSAFE.sub("\ufffd", "\n\n".join(parts)) + "\n\n" + HOW


def ask_pairs(pairs: Sequence[Pair], *, path: Path, ask: Callable[[str], str], reference: bool = True) -> list[Choice]:
    """Asks for what `path` (choices.jsonl) does not hold yet, and returns all choices; fewer than pairs after `q`.

    `ask` shows a text and returns what the person typed; EOFError from it means `q`.  Raises OutputError when the file cannot
    be written, or when its choices are about other systems or other answers.
    """
    known = {(pair.row, pair.again): pair for pair in pairs}
    choices = read_choices(path)
    _take_out_torn_line(path)
    for choice in choices:
        _check(
            choice, known.get((choice.row, choice.again)), path, {pairs[0].first, pairs[0].second} if pairs else set()
        )
    made = {(choice.row, choice.again) for choice in choices}
    to_ask = [(pair.row, pair.again) for pair in pairs if not pair.same]
    for pair in pairs:
        if (pair.row, pair.again) in made:
            continue
        word = "same"
        if not pair.same:
            number = to_ask.index((pair.row, pair.again)) + 1
            word = _ask_one(question(pair, number=number, total=len(to_ask), reference=reference), ask)
        if word == "quit":
            break
        chosen = Choice(
            row=pair.row,
            place=pair.place,
            again=pair.again,
            first=pair.first,
            second=pair.second,
            digest=pair.digest,
            choice=word,
        )
        _append(path, chosen)
        choices.append(chosen)
    return choices


def _ask_one(text: str, ask: Callable[[str], str]) -> str:
    """a, b, tie, skip or quit; anything else is asked again."""
    while True:
        try:
            typed = ask(text).strip().lower()
        except EOFError:
            return "quit"
        if typed in WORDS:
            return WORDS[typed]
        text = HOW


def _check(choice: Choice, pair: Pair | None, path: Path, systems: set[str]) -> None:
    remedy = f"Move {path} away to begin again."
    if systems and {choice.first, choice.second} != systems:
        told = " and ".join(sorted((choice.first, choice.second)))
        raise OutputError(f"{path} holds choices between {told}, not {' and '.join(sorted(systems))}.", remedy)
    if pair is not None and pair.digest != choice.digest:
        raise OutputError(f"{path} holds a choice about {choice.place}, whose answers have changed since.", remedy)


def read_choices(path: Path) -> list[Choice]:
    """The lines of choices.jsonl; none where there is no file.  Raises OutputError for a line that is not a choice.

    What follows the last line end was being written when the program was killed, and is not a line.
    """
    if not path.is_file():
        return []
    choices = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            choice = Choice(**json.loads(line))
            if choice.choice not in ("a", "b", "tie", "skip", "same"):
                raise ValueError(choice.choice)
        except (ValueError, TypeError):
            raise OutputError(
                f"{path}:{number} is not a choice.", "Was it edited?  Move it away to begin again."
            ) from None
        choices.append(choice)
    return choices


def _take_out_torn_line(path: Path) -> None:
    """So that the next line does not go on where a killed program stopped."""
    if path.is_file():
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)


def _append(path: Path, choice: Choice) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(json.dumps(asdict(choice)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        remedy = "Free disk space, or choose another folder; the choices before this one are kept."
        raise OutputError(f"{path} could not be written: {error.strerror}.", remedy) from None


def judged_by_person(choices: Sequence[Choice], *, system: str, against: str) -> Judged:
    """Wins, losses and ties of the rows that were judged.  Skipped rows are not among them.

    A pair asked twice counts once, and as a tie where the two choices differ.  `consistency` is the share of those pairs with
    equal choices, and None when none was asked twice.  `first_slot_wins` is None when nothing was decided.
    """
    given = [choice for choice in choices if choice.choice != "skip"]
    later = {choice.row: choice.winner for choice in given if choice.again}
    once = {choice.row: choice.winner for choice in given if not choice.again}
    both = [row for row in later if row in once]
    agreed = {row for row in both if later[row] == once[row]}
    winners = [None if row in later and row not in agreed else winner for row, winner in (later | once).items()]
    decided = [choice for choice in given if choice.winner is not None]
    first = sum(choice.winner == choice.first for choice in decided)
    wins, losses = winners.count(system), winners.count(against)
    return Judged(
        judge="person",
        system=system,
        against=against,
        rows=len(winners),
        wins=wins,
        losses=losses,
        ties=len(winners) - wins - losses,
        consistency=len(agreed) / len(both) if both else None,
        first_slot_wins=first / len(decided) if decided else None,
        unreadable=0,
        p_value=sign_test(wins, losses),
    )
