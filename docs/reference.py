"""Writes the parts of the documents that are read from the code: recipe fields, --help texts, constants, findings.

    python docs/reference.py            # exit code 1 when a page is not what the code says
    python docs/reference.py --write

A page holds `<!-- begin: NAME -->` and `<!-- end -->`; what stands between is made here, the rest is written by hand.
torch is not imported: constants are read from the source files' text.
"""

from __future__ import annotations

import ast
import re
import sys
import types
import typing
from pathlib import Path
from typing import Any, Literal

import typer.main
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from typer.testing import CliRunner

from onlay.cli import app
from onlay.data.audit.catalogue import KINDS
from onlay.data.build import BUILD_NOTES
from onlay.data.template import NOTES
from onlay.recipe import METHODS, field_paths
from onlay.recipe.sections import Section

DOCS = Path(__file__).parent
PROJECT = DOCS.parent
BLOCK = re.compile(r"<!-- begin: ([\w. -]+) -->\n.*?<!-- end -->", re.S)
HELP_WIDTH = "80"
UNSAID = {
    "adapter.method": "What trains, and how it begins: [docs/methods.md](methods.md) has one row a method. `head` and `full` take no other adapter field.",
    "training.weight_decay": "AdamW's decay, on matrices only; biases and norms are left out.",
    "training.seed": "Order of the rows, first adapter weights, dropout, split: the same seed gives the same run.",
}
"""For fields whose description is empty in the recipe."""
CONSTANTS = {
    "divergence": {
        "training/watch.py:WINDOW_STEPS": "losses that the limit is made from",
        "training/watch.py:MIN_HISTORY_STEPS": "fewer losses than this: the early rule",
        "training/watch.py:EARLY_RISE_NATS": "early rule: the limit is this far above the highest loss so far",
        "training/watch.py:SPIKE_SIGMAS": "deviations above the median that make a loss high",
        "training/watch.py:LEVEL_SIGMAS": "deviations above the lowest level that make a level high",
        "training/watch.py:LEAST_RISE_NATS": "both rises are at least this large",
        "training/watch.py:SPIKE_EXAMPLES": "a spike is at least two steps and this many examples",
        "training/watch.py:MIN_LEVEL_STEPS": "fewest steps that a level is taken over",
        "training/watch.py:LEVEL_EXAMPLES": "a level is the mean over at least MIN_LEVEL_STEPS steps and this many examples",
        "training/watch.py:Snapshots.KEEP": "good states kept in host memory",
        "training/session.py:SNAPSHOT_BYTES_A_STEP": "good states are spaced so that copying costs about this much a step",
        "training/session.py:MOST_SNAPSHOT_STEPS": "largest distance between two good states that this asks for",
        "training/loop.py:FIRST_CUT": "learning rate after a recovery from divergence",
        "training/loop.py:REPEATED_CUT": "learning rate after a high loss that follows soon",
        "training/loop.py:HEALTHY_STEPS": "what soon means, in steps",
    },
    "memory": {
        "training/session.py:CPU_BUDGET_TOKENS": "first token budget of a micro-batch on a CPU",
        "training/loop.py:MAX_REPEATS": "repeats of a step that cannot be cut finer, and of an optimizer step",
        "training/loop.py:FIRST_LOSS_SCALE": "loss scale that fp16 starts with",
        "training/loop.py:LEAST_LOSS_SCALE": "loss scale below which it is not halved any more",
        "training/loop.py:SCALE_GROWTH_STEPS": "steps after which the loss scale doubles",
        "training/session.py:CHECKPOINTS_A_RUN": "checkpoints of a run where `training.checkpoint_steps` is not set",
    },
    "audit": {
        "data/audit/size.py:FEW_ROWS": "fewer training rows than this are few",
        "data/audit/words.py:SHINGLE_WORDS": "words in a row that make a shingle",
        "data/audit/candidates.py:CANDIDATE_RECALL": "least probability that two rows at the threshold are compared at all",
        "data/audit/overlap.py:PROMPT_THRESHOLD": "similarity from which two prompts ask nearly the same",
        "data/audit/overlap.py:NGRAM_WORDS": "words in a row that a training row may not share with a held-out row",
        "data/audit/overlap.py:TEMPLATE_WORDS": "a run of so many words is a template's where at least",
        "data/audit/overlap.py:TEMPLATE_ROWS": "so many training rows hold it, and",
        "data/audit/overlap.py:TEMPLATE_SHARE": "this share of them",
        "data/audit/statistics.py:SPREADS": "a row is an outlier this many widths of the middle half beyond it, on a scale of ratios",
        "data/audit/statistics.py:LEAST_ROWS": "fewer rows have no outliers",
        "data/audit/balance.py:IMBALANCE_SHARE": "a domain of more than this share is too large where also",
        "data/audit/balance.py:IMBALANCE_ENTROPY": "the entropy is below this share of the greatest possible",
        "data/audit/balance.py:RARE_ROWS": "a domain of fewer rows is rare",
        "data/audit/texts.py:LEAST_COPIES": "repetitions in a row that make a loop",
        "data/audit/texts.py:LEAST_LOOP_WORDS": "words of a loop beyond its first copy, at least",
        "data/audit/texts.py:OPENING_SHARE": "share of the answers that begin alike, from which an opening is boilerplate",
        "data/audit/texts.py:LEAST_OPENINGS": "and the least number of them",
        "data/audit/languages.py:MAIN_SHARE": "a language that this share of the rows is in is the data's",
        "data/audit/masks.py:LITTLE_TRAINED": "share of trained tokens below which a row trains little",
        "data/privacy/detect.py:THRESHOLD": "score from which a detection counts",
        "stages/knowledge.py:KNOWN_NATS": "loss, in nats a token, up to which the base knows an answer",
        "stages/knowledge.py:FAR": "modified z-score of the loss from which an answer is beyond the base",
        "stages/knowledge.py:MOST_ROWS": "rows whose loss is measured, drawn with the seed",
    },
}


def recipe_table(section: str) -> str:
    """One row a field, in the recipe's order."""
    lines = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for path, info in field_paths().items():
        if path.split(".")[0] != section:
            continue
        words = info.description or UNSAID[path]
        kind = " or ".join(f"`{name}`" for name in METHODS) if path == "adapter.method" else type_words(info)
        lines.append(f"| `{path}` | {kind} | {default_words(path, info)} | {words} |")
    return "\n".join(lines)


def type_words(info: FieldInfo) -> str:
    words = " or ".join(_type_words(info.annotation))
    low: str | None = None
    high: str | None = None
    for bound in info.metadata:
        low = f"{bound.ge} <=" if hasattr(bound, "ge") else f"{bound.gt} <" if hasattr(bound, "gt") else low
        high = f"<= {bound.le}" if hasattr(bound, "le") else f"< {bound.lt}" if hasattr(bound, "lt") else high
    if low is None and high is None:
        return words
    return f"{words}, {' '.join(part for part in (low, 'x', high) if part)}"


def _type_words(annotation: Any) -> list[str]:
    if typing.get_origin(annotation) is Literal:
        return [f"`{choice}`" for choice in typing.get_args(annotation)]
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return [word for part in typing.get_args(annotation) for word in _type_words(part)]
    if typing.get_origin(annotation) is typing.Annotated:
        return _type_words(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) is list:
        parts = _type_words(typing.get_args(annotation)[0])
        return ["list of texts" if parts == ["text"] else f"list of {', '.join(parts)}"]
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return ["{" + ", ".join(annotation.model_fields) + "}"]
    if typing.get_origin(annotation) is dict:
        return ["lines of name: number"]
    names = {int: "whole number", float: "number", str: "text", bool: "true or false", types.NoneType: "null"}
    return [names[annotation]]


def default_words(path: str, info: FieldInfo) -> str:
    if path == "adapter.method":
        return "`lora`"
    default = info.get_default(call_default_factory=True)
    if default is PydanticUndefined:
        return "required"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return "`null`" if default is None else f"`{default}`"


def help_text(verb: str) -> str:
    result = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": HELP_WIDTH}, prog_name="onlay")
    return f"```text\n{result.output.strip()}\n```"


def verbs() -> list[str]:
    return list(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def constants_table(group: str) -> str:
    lines = ["| constant | value | what it is |", "|---|---|---|"]
    for where, words in CONSTANTS[group].items():
        file, name = where.split(":")
        lines.append(f"| `{name}` ({file}) | `{constant_source(PROJECT / 'onlay' / file, name)}` | {words} |")
    return "\n".join(lines)


def constant_source(path: Path, name: str) -> str:
    """The right-hand side of a module's (or `Class.`'s) assignment, as it is written.  Raises KeyError."""
    body: list[ast.stmt] = ast.parse(path.read_text(encoding="utf-8")).body
    *classes, leaf = name.split(".")
    for wanted in classes:
        body = next(node.body for node in body if isinstance(node, ast.ClassDef) and node.name == wanted)
    for node in body:
        if not isinstance(node, ast.Assign):
            continue
        for target in node.targets:
            if isinstance(target, ast.Name) and target.id == leaf:
                return ast.unparse(node.value)
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                for part, value in zip(target.elts, node.value.elts, strict=True):
                    if isinstance(part, ast.Name) and part.id == leaf:
                        return ast.unparse(value)
    raise KeyError(f"{path} has no constant {name}: correct CONSTANTS in docs/reference.py")


def findings_table(_: str) -> str:
    lines = ["| code | what it counts |", "|---|---|"]
    lines += [f"| `{code}` | {words} |" for code, words in (NOTES | BUILD_NOTES).items()]
    return "\n".join(lines)


def audit_table(severity: str) -> str:
    """The findings of one severity, in the catalogue's order."""
    lines = ["| code | what it counts | what to do |", "|---|---|---|"]
    for code, kind in KINDS.items():
        if kind.severity == severity:
            words = re.sub(r"{(\w+)}", lambda name: f"*{name[1].replace('_', ' ')}*", kind.message)
            lines.append(f"| `{code}` | {words} | {kind.remedy} |".replace("{", "`{").replace("}", "}`"))
    return "\n".join(lines)


def generated(name: str) -> str:
    """The content of the block NAME."""
    kind, _, what = name.partition(" ")
    makers = {
        "recipe": recipe_table,
        "help": help_text,
        "constants": constants_table,
        "findings": findings_table,
        "audit": audit_table,
    }
    return makers[kind](what)


def filled(text: str) -> str:
    """A page with its blocks made anew."""
    return BLOCK.sub(lambda match: f"<!-- begin: {match[1]} -->\n{generated(match[1])}\n<!-- end -->", text)


def pages() -> list[Path]:
    return sorted(DOCS.glob("*.md"))


def main() -> None:
    write, stale = "--write" in sys.argv[1:], []
    for path in pages():
        text = path.read_text(encoding="utf-8")
        new = filled(text)
        if new != text:
            stale.append(path.name)
            if write:
                path.write_text(new, encoding="utf-8")
    if stale:
        print(
            f"{', '.join(stale)}: {'written' if write else 'not what the code says; python docs/reference.py --write'}"
        )
    sys.exit(1 if stale and not write else 0)


if __name__ == "__main__":
    main()
