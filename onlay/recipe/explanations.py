"""The two lines for what pydantic found wrong: what was given, what is allowed, what to do."""

from __future__ import annotations

import difflib
import json
import re
from datetime import date
from typing import Any

from onlay.recipe.sections import METHODS, Recipe, field_paths

_KINDS = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "list_type": "a list",
    "too_short": "a list with an entry",
    "dict_type": "lines of name: number",
}
_REQUIRED = {"model": "model.base", "data": "data.train"}


def _location(detail: Any) -> list[str]:
    """Section, field and position in a list.  Unions add the tried types' names to it; those are dropped."""
    loc = detail["loc"]
    if len(loc) > 1 and loc[0] == "adapter":
        loc = (loc[0], *loc[2:]) if loc[1] in METHODS else loc
    return [str(part) for part in loc[:2]]


def name_of(detail: Any) -> str:
    return ".".join(_location(detail))


def explain(detail: Any, values: dict[str, Any]) -> tuple[str, str]:
    """The two lines for one pydantic error."""
    location, name = _location(detail), name_of(detail)
    given, kind = detail.get("input"), detail["type"]
    if name == "data.train" and isinstance(values["data"].get("train"), list | dict):
        return _wrong_source(detail, given)
    if kind == "extra_forbidden":
        return _unknown_field(location, values)
    if kind == "missing":
        name = _REQUIRED.get(name, name)
        return f"{name} is missing.", f"Add it to the recipe, or pass --set {name}=..."
    if kind == "union_tag_invalid":
        return (
            f"adapter.method = {show_value(given.get('method'))} is not a method.",
            f"Use {', '.join(METHODS[:-1])} or {METHODS[-1]}.",
        )
    if len(location) < 2:
        return (
            f"{name} = {show_value(given)} is not a section.",
            "A section holds lines of field: value, indented below its name.",
        )
    info = field_paths().get(name)
    default = _default_of(info)
    if name == "adapter.targets" and len(detail["loc"]) <= 4:
        return (
            f"adapter.targets = {show_value(given)} is neither a preset nor a list of modules.",
            "Use all-linear, attention, mlp, qv, or a list such as [q_proj, v_proj].",
        )
    if name == "evaluation.scores" and kind == "literal_error" and not isinstance(given, list):
        named = given if isinstance(given, str) else "exact_match"
        return (
            f"evaluation.scores = {show_value(given)} is neither auto nor a list of scores.",
            f"Use auto, or a list such as [{named}].",
        )
    if name == "training.recompute":
        return (
            f"training.recompute = {show_value(given)} is neither auto, none, all nor a number of layers.",
            "Use all, a number such as 16 (the first layers), or delete the line to get the default.",
        )
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        use = (
            f"Use {info.default}, or {default}."
            if info is not None and info.default is not None
            else f"{_capital(default)}."
        )
        return f"{name} = {given} is {_outside(info)}.", use
    if kind == "literal_error":
        allowed = detail["ctx"]["expected"].replace("'", "")
        return f"{name} = {show_value(given)} is not one of {allowed}.", f"Choose one of them, or {default}."
    if kind == "string_too_short":
        return f"{name} is empty.", f"Fill it, or {default}."
    wanted = _KINDS.get(kind, detail["msg"])
    quotes = "Put it in quotes" if kind == "string_type" and isinstance(given, int | float | date) else "Correct it"
    shown = f'"{show_value(given)}"' if isinstance(given, str) else show_value(given)
    return f"{name} = {shown} is not {wanted}.", f"{quotes}, or {default}."


def _wrong_source(detail: Any, given: Any) -> tuple[str, str]:
    """For an entry of a list of sources, by its place in the list."""
    remedy = "Each is a name, or {file: NAME, weight: 2.0}; the weight is above 0 and at most 1000."
    place, field = detail["loc"], detail["loc"][-1]
    number = next((part + 1 for part in place if isinstance(part, int)), None)
    if number is None:
        return f"data.train = {show_value(given)} is neither a source nor a list of sources.", remedy
    if detail["type"] == "extra_forbidden":
        return f"data.train, source {number}: {field} is not a field of a source.", remedy
    if detail["type"] == "missing":
        return f"data.train, source {number}: {field} is missing.", remedy
    named = f"{field} = {show_value(given)}" if field in ("file", "weight") else show_value(given)
    return f"data.train, source {number}: {named} is not allowed.", remedy


def _default_of(info: Any) -> str:
    if info is None or info.is_required():
        return "name another"
    words = re.search(r"Default: (.+?)\.(?:\s|$)", info.description or "")
    return "delete the line to get the default" + (f" ({words[1]})" if words else "")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def show_value(value: Any) -> str:
    """A value as the recipe would write it, on one line and not too long."""
    text = json.dumps(value, ensure_ascii=False, default=str) if not isinstance(value, str) else value
    text = " ".join(text.split()) or '""'
    return text if len(text) <= 60 else text[:57] + "..."


def _unknown_field(location: list[str], values: dict[str, Any]) -> tuple[str, str]:
    name = ".".join(location)
    fields = field_paths()
    if name in fields:  # of another method
        method = values["adapter"].get("method", "lora")
        return f"{name} does not go with adapter.method = {method}.", "Delete one of the two lines."
    leaf = location[-1]
    near = [path for path in fields if path.split(".")[1] == leaf]  # the right field in the wrong section, or in none
    if not near and len(location) == 1:
        near = difflib.get_close_matches(leaf, Recipe.model_fields, n=1)
    own = [path.split(".")[1] for path in fields if path.startswith(location[0] + ".")]
    if not near and len(location) > 1:
        near = [f"{location[0]}.{field}" for field in difflib.get_close_matches(leaf, own, n=1)]
        anywhere = {path.split(".")[1]: path for path in fields}
        near = near or [anywhere[field] for field in difflib.get_close_matches(leaf, anywhere, n=1)]
    if near:
        return f"{name} is not a recipe field.", f"Did you mean {near[0]}?"
    if len(location) > 1:
        return f"{name} is not a recipe field.", f"Fields of {location[0]}: {', '.join(own)}."
    return f"{name} is not a section.", f"Sections: {', '.join(Recipe.model_fields)}."


def _outside(info: Any) -> str:
    """`outside 1..1024`, in the words that the field's bounds ask for."""
    bounds: dict[str, Any] = {}
    for constraint in getattr(info, "metadata", []):
        bounds |= {
            key: getattr(constraint, key)
            for key in ("ge", "gt", "le", "lt")
            if getattr(constraint, key, None) is not None
        }
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
    if high is None:
        return f"not above {low:g}" if "gt" in bounds else f"less than {low}"
    excluded = [f"{bounds[key]:g}" for key in ("gt", "lt") if key in bounds and bounds[key] < 2**31]
    high = f"{high:g}" if high < 2**31 else str(high - 1)
    return f"outside {low:g}..{high}" + (f" ({' and '.join(excluded)} excluded)" if excluded else "")
