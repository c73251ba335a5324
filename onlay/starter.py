"""What `onlay init DATA` writes: a recipe that suits the data and the device in which every field is explained.

Lines that begin with `#name:` hold a field's default; without the `#` they are read.
"""

from __future__ import annotations

import itertools
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from onlay.data.read import DETECTION_ROWS, detect_format
from onlay.data.sources import read_rows
from onlay.errors import DataError
from onlay.hardware import Hardware
from onlay.recipe import (
    DataSection,
    EvaluationSection,
    LoraAdapter,
    ModelSection,
    ReleaseSection,
    Section,
    TrainingSection,
)

MOST_ROWS = 200_000
"""Rows that are counted; of larger files the rest is not read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    name: str
    num_parameters: int
    licence: str

    @property
    def needed_bytes(self) -> int:
        """16-bit weights, and a quarter more for adapter, optimizer and activations."""
        return int(self.num_parameters * 2 * 1.25)


# Ungated bases with an Apache-2.0 licence, smallest first, as of November 2026.
CANDIDATES = (
    Candidate(name="Qwen/Qwen3-0.6B", num_parameters=596_000_000, licence="Apache-2.0"),
    Candidate(name="Qwen/Qwen3-1.7B", num_parameters=1_721_000_000, licence="Apache-2.0"),
    Candidate(name="Qwen/Qwen3-4B", num_parameters=4_022_000_000, licence="Apache-2.0"),
    Candidate(name="Qwen/Qwen3-8B", num_parameters=8_191_000_000, licence="Apache-2.0"),
    Candidate(name="Qwen/Qwen3-14B", num_parameters=14_768_000_000, licence="Apache-2.0"),
    Candidate(name="Qwen/Qwen3-32B", num_parameters=32_762_000_000, licence="Apache-2.0"),
)
SMALL_CANDIDATE = Candidate(
    name="HuggingFaceTB/SmolLM2-360M-Instruct", num_parameters=361_800_000, licence="Apache-2.0"
)
CPU_CANDIDATE = Candidate(name="HuggingFaceTB/SmolLM2-135M-Instruct", num_parameters=134_500_000, licence="Apache-2.0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """What a first look at the data found."""

    format: str
    rows: int
    all_rows: bool
    """False where there are more than were counted."""
    mean_characters: float

    @property
    def words(self) -> str:
        more = "" if self.all_rows else "more than "
        return f"{more}{self.rows:,} rows, {self.format}, {self.mean_characters:,.0f} characters on average"


def look_at(data: str, section: DataSection) -> Look:
    """Format, number and mean length of the rows.  Raises DataError."""
    rows = read_rows(data, section, limit=MOST_ROWS + 1)
    first = list(itertools.islice(rows, DETECTION_ROWS))
    if not first:
        raise DataError(f"{data} holds no rows.", "Give a file with at least a few examples.")
    format = section.format if section.format != "auto" else detect_format(first, section)
    count = characters = 0
    for row in itertools.chain(first, rows):
        count += 1
        characters += sum(map(len, _texts(row.values)))
    return Look(
        format=format,
        rows=min(count, MOST_ROWS),
        all_rows=count <= MOST_ROWS,
        mean_characters=characters / count,
    )


def choose_base(hardware: Hardware) -> Candidate:
    """The largest base of the table that fits the smallest GPU; the smallest of all on a CPU."""
    if not hardware.has_cuda:
        return CPU_CANDIDATE
    fitting = [one for one in (SMALL_CANDIDATE, *CANDIDATES) if one.needed_bytes <= hardware.device_memory_bytes]
    return fitting[-1] if fitting else CPU_CANDIDATE


def propose(
    data: str | Path, hardware: Hardware, *, section: DataSection | None = None, base: str | None = None
) -> tuple[str, list[str]]:
    """A recipe for `data` as commented YAML, and a summary in three sentences.  Raises DataError.

    `section` carries what the user said about the data (column names, format); `base` overrides the choice.
    """
    data = str(data)
    section = section or DataSection.model_validate({"train": data})
    look = look_at(data, section)
    candidate = None if base is not None else choose_base(hardware)
    name = base if candidate is None else candidate.name
    active = _active_fields(look, section, str(name))
    steps = _steps(look, active)
    why = _why(candidate, hardware)
    summary = [f"{data}: {look.words}.", f"Base: {name}{why}.", f"About {steps:,} optimizer steps."]
    return _render(active, header=summary), summary


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _why(candidate: Candidate | None, hardware: Hardware) -> str:
    if candidate is None:
        return ""
    millions = candidate.num_parameters / 1e6
    size = f"{millions:.0f} million" if millions < 1000 else f"{millions / 1000:.1f} billion"
    gibibytes = f"{hardware.device_memory_bytes / 2**30:.0f} GiB"
    place = f"{hardware.devices[0].name} with {gibibytes}" if hardware.has_cuda else "a CPU"
    return f" ({size} parameters, {candidate.licence}, no access request needed), chosen for {place}"


def _active_fields(look: Look, section: DataSection, base: str) -> dict[str, Any]:
    """The fields that are worth a look, with values for this number of rows."""
    rows = look.rows
    epochs = 5.0 if rows < 300 else 3.0 if rows < 5_000 else 2.0 if rows < 20_000 else 1.0
    batch_size = 4 if rows < 100 else 8 if rows < 500 else 16
    # Enough held-out rows to tell a difference, and not more than evaluations during training look at.
    split = None if rows < 10 else 0.2 if rows < 50 else 0.1 if rows < 500 else 0.05 if rows < 10_000 else 0.01
    given = {f"data.{name}": value for name, value in section.model_dump(exclude_unset=True).items()}
    return {
        "model.base": base,
        "adapter.rank": 16,
        "adapter.targets": "all-linear",
        "data.format": look.format,
        **given,
        **({"data.format": look.format} if section.format == "auto" else {}),
        "training.epochs": epochs,
        "training.batch_size": batch_size,
        "training.learning_rate": 2e-4,
        "evaluation.split": split,
    }


def _steps(look: Look, active: dict[str, Any]) -> int:
    rows = look.rows * (1.0 - float(active["evaluation.split"] or 0.0))
    return max(1, round(rows * float(active["training.epochs"]) / int(active["training.batch_size"])))


def _render(active: dict[str, Any], *, header: list[str]) -> str:
    lines = [f"# {line}" for line in header]
    lines += [
        "# Train with: onlay train THIS_FILE",
        "# Lines that begin with #name: hold a default; delete the # to change it.",
    ]
    sections: dict[str, type[Section]] = {
        "model": ModelSection,
        "adapter": LoraAdapter,
        "data": DataSection,
        "training": TrainingSection,
        "evaluation": EvaluationSection,
        "release": ReleaseSection,
    }
    for name, section in sections.items():
        lines += ["", f"{name}:"]
        for field, info in section.model_fields.items():
            key = f"{name}.{field}"
            lines += [f"  # {line}" for line in _explain(key, info)]
            value = active.get(key, info.get_default(call_default_factory=True))
            if value is PydanticUndefined:
                raise AssertionError(f"{key} has no default and was given no value")
            lines.append(f"  {'' if key in active else '#'}{field}: {_scalar(value)}")
    return "\n".join(lines) + "\n"


def _explain(key: str, info: FieldInfo) -> list[str]:
    if key == "adapter.method":
        return ["lora trains small matrices beside the frozen base; full trains every weight (no other field then)."]
    words = str(info.description)
    choices = _choices(info.annotation)
    if choices and not all(choice in words for choice in choices):
        words += f" One of: {', '.join(choices)}."
    return _wrapped(words)


def _choices(annotation: Any) -> list[str]:
    if typing.get_origin(annotation) is Literal:
        return [str(choice) for choice in typing.get_args(annotation)]
    if isinstance(annotation, types.UnionType):
        return [choice for part in typing.get_args(annotation) for choice in _choices(part)]
    return []


def _wrapped(words: str, width: int = 110) -> list[str]:
    lines = [""]
    for word in words.split():
        if lines[-1] and len(lines[-1]) + len(word) + 1 > width:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return lines


def _scalar(value: Any) -> str:
    """YAML of a simple value on one line."""
    return yaml.safe_dump([value], default_flow_style=True, width=10**6, allow_unicode=True).strip()[1:-1]
