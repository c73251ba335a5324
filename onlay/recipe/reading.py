"""From a YAML file, or nested dictionaries, to a Recipe."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from onlay.errors import RecipeError
from onlay.recipe.contradictions import refuse_contradictions
from onlay.recipe.explanations import explain, name_of, show_value
from onlay.recipe.numbers import Loader
from onlay.recipe.sections import Recipe


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a YAML recipe and applies `section.field=value` overrides.  Raises RecipeError.

    Paths in the recipe stay as written: they are relative to the folder the command runs in.
    """
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        hint = f"Did you mean {path.parent / near[0]}?" if near else "Write one with: onlay init YOUR_DATA.jsonl"
        raise RecipeError(f"There is no recipe at {path}.", hint)
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        what = getattr(error, "problem", None) or "not YAML"
        hint = (
            "Delete one of the two."
            if "given twice" in what
            else "Indent with spaces, and quote texts that contain ': '."
        )
        raise RecipeError(f"{path}{line}: {what}.", hint) from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path} is not UTF-8 text.", "Give a YAML recipe; `onlay init DATA` writes one.") from None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}.", "Check the file and its permissions.") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path} holds no sections.", "A recipe has at least model.base and data.train.")
    return apply_overrides(values, overrides)


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> Recipe:
    """A validated Recipe from nested dictionaries, changed by `section.field=value`.  Raises RecipeError."""
    for override in overrides:
        _apply_override(values, override)
    return parse_recipe(values)


def parse_recipe(values: dict[str, Any]) -> Recipe:
    """A validated Recipe from nested dictionaries.  Raises RecipeError naming the first field that is wrong."""
    values = {key: section for key, section in values.items() if section is not None}
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        # Where a field may be of several types, each of them complains: count fields.
        details = {name_of(detail): detail for detail in reversed(error.errors())}
        problem, remedy = explain(error.errors()[0], values)
        if len(details) > 1:
            remedy += f" ({len(details) - 1} more after this one.)"
        raise RecipeError(problem, remedy) from None
    refuse_contradictions(recipe)
    return recipe


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) != 2 or not all(parts):
        raise RecipeError(f"--set {override} is not section.field=value.", "Example: --set training.learning_rate=1e-4")
    if values.get(parts[0]) is None:
        values[parts[0]] = {}
    section = values[parts[0]]
    if not isinstance(section, dict):
        raise RecipeError(
            f"{parts[0]} = {show_value(section)} is not a section.", "A section holds lines of field: value."
        )
    try:
        value = yaml.load(text, Loader)
    except yaml.YAMLError:
        value = text
    # Only gates are a mapping: `Be brief: always` is a text.
    section[parts[1]] = text if isinstance(value, dict) and key.strip() != "evaluation.gates" else value
