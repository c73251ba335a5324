"""Seed tasks, out of any file whose rows have a prompt and an answer.  Raises DataError."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from onlay.data.read import ALPACA_INPUTS, DETECTION_ROWS, Conversation, detect_format, parse
from onlay.data.sources import Row, read_rows, source_digest, type_name
from onlay.errors import DataError
from onlay.recipe import DataSection

FEW_SEEDS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What is asked, of which text (empty: of none), and a good answer."""

    instruction: str
    input: str
    answer: str
    place: str
    """`file:row`, or the number of the row that was made from 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seeds:
    tasks: tuple[Task, ...]
    digest: str
    """SHA-256 of the file's bytes."""
    notes: tuple[str, ...]
    """What of the file is not used, in words."""


UNUSED = {
    "no_exchange": "have no question followed by an answer in words, and are left out",
    "longer": "are longer conversations: their first question and answer are used",
    "system": "have a system message, which is used neither in asking nor in the rows that are made",
}


def read_seeds(source: str, section: DataSection) -> Seeds:
    """The tasks of a file in any format that `onlay.data.read` knows, or in self-instruct's own: `instruction` and
    `instances`, a list of {input, output}, of which each instance becomes a task of alpaca's form."""
    rows = read_rows(source, section, limit=section.max_rows)
    first = list(itertools.islice(rows, DETECTION_ROWS))
    if not first:
        raise DataError(f"{source} holds no rows.", "Give a file with at least one task and its answer.")
    of_instances = section.format == "auto" and _has_instances(first[0])
    format = "alpaca" if of_instances else detect_format(first, section)
    found: list[Task] = []
    counted: Counter[str] = Counter()
    for row in itertools.chain(first, rows):
        for one in _instances(row) if of_instances else (row,):
            task = _task(one, format, section, counted)
            if task is not None:
                found.append(task)
    if not found:
        raise DataError(
            f"{source} has no row with a question and an answer in words.",
            "Seed tasks are pairs such as instruction + output, prompt + completion, or messages.",
        )
    notes = [f"{count} seed {'row' if count == 1 else 'rows'} {UNUSED[why]}" for why, count in counted.items()]
    if len(found) < FEW_SEEDS:
        notes.append(f"{len(found)} seed tasks are few: what is made will stay close to them; 100 or more vary it")
    return Seeds(tasks=tuple(found), digest=source_digest(source, section), notes=tuple(notes))


def _has_instances(row: Row) -> bool:
    return isinstance(row.values.get("instances"), list) and "instruction" in row.values


def _instances(row: Row) -> Iterator[Row]:
    remedy = "Each row needs `instruction` and `instances`: a list of {input, output}."
    instances = row.values.get("instances")
    if not isinstance(instances, list) or not instances:
        what = type_name(instances) if instances != [] else "an empty list"
        raise DataError(f"{row.place}, field instances: it is {what}, not a list of {{input, output}}.", remedy)
    for place, instance in enumerate(instances):
        if not isinstance(instance, dict):
            raise DataError(f"{row.place}, field instances[{place}]: it is {type_name(instance)}.", remedy)
        values = {"instruction": row.values.get("instruction")}
        values |= {name: instance[name] for name in ("input", "output") if name in instance}
        yield Row(row.file, row.number, values)


def _task(row: Row, format: str, section: DataSection, counted: Counter[str]) -> Task | None:
    item = parse(row, format, section)
    if not isinstance(item, Conversation):
        raise DataError(
            f"{row.place}: it is plain text, and a seed task needs a question and an answer.",
            "Give pairs such as instruction + output, or prompt + completion.",
        )
    system = [turn for turn in item.turns if turn.role == "system"]
    turns = [turn for turn in item.turns if turn.role != "system"]
    at = next((i for i, turn in enumerate(turns) if turn.role == "user" and turn.content.strip()), None)
    answer = turns[at + 1] if at is not None and at + 1 < len(turns) else None
    if at is None or answer is None or answer.role != "assistant" or not answer.content.strip():
        counted["no_exchange"] += 1
        return None
    if system:
        counted["system"] += 1
    if len(turns) > 2:
        counted["longer"] += 1
    instruction, given = turns[at].content, ""
    if format == "alpaca":  # Read together, written apart: tasks are compared by what they ask, not by their texts.
        instruction = row.values[section.prompt_field or "instruction"]
        given = next((row.values[name] for name in ALPACA_INPUTS if row.values.get(name) is not None), "")
    return Task(instruction=instruction.strip(), input=given.strip(), answer=answer.content.strip(), place=row.place)
