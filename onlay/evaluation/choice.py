"""Which scores suit a set of rows, from what their expected answers look like."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from onlay.evaluation import structure
from onlay.evaluation.scores import SCORES, Row
from onlay.evaluation.text import label_of, words

SOME = 0.1
"""Share of rows from which a kind of answer is taken to be meant."""
NEARLY_ALL = 0.9
LABEL_WORDS = 5
PROSE_WORDS = 8


def choose_scores(rows: Sequence[Row]) -> tuple[str, ...]:
    """The task scores that suit what is expected (answers are not looked at), in the order of SCORES.

    exact_match always; json_schema_match and regex_match where rows bring a schema or a pattern.  Where at least a tenth of
    the rows expect tool calls: tool_call_match and valid_json; JSON otherwise: json_equal and valid_json; a number after
    `####`, or nothing but a number: number_match.  The rest, where it is nearly all rows, are labels if they are single lines
    of at most 5 words that each come twice on average: label_accuracy and macro_f1; else, where it is a tenth, text: rougeL
    and chrf from 8 words on (in the median), token_f1 below.
    """
    if not rows:
        return ("exact_match",)
    chosen, texts = {"exact_match"}, []
    found: Counter[str] = Counter()
    for row in rows:
        kind = _kind_of(row.expected)
        found[kind] += 1
        found["schema"] += row.schema is not None
        found["pattern"] += row.pattern is not None
        if kind == "text":
            texts.append(row.expected)
    named = {
        "call": ("tool_call_match", "valid_json"), "json": ("json_equal", "valid_json"), "number": ("number_match",),
    }  # fmt: skip
    for kind, names in named.items():
        if found[kind] >= SOME * len(rows):
            chosen.update(names)
    chosen.update(name for kind, name in (("schema", "json_schema_match"), ("pattern", "regex_match")) if found[kind])
    if len(texts) >= SOME * len(rows):
        chosen.update(_scores_of_text(texts, alone=len(texts) >= NEARLY_ALL * len(rows)))
    return tuple(name for name in SCORES if name in chosen)


def _kind_of(expected: str) -> str:
    if structure.tool_calls(expected):
        return "call"
    if structure.is_json(expected):
        return "json"
    alone = structure.final_number(expected) is not None and not any(c.isalpha() for c in expected)
    return "number" if alone or _marks_number(expected) else "text"


def _marks_number(expected: str) -> bool:
    return "####" in expected and structure.final_number(expected) is not None


def _scores_of_text(texts: Sequence[str], *, alone: bool) -> tuple[str, ...]:
    lengths = [len(words(text)) for text in texts]
    labels = {label_of(text) for text in texts}
    short = max(lengths) <= LABEL_WORDS and not any("\n" in text.strip() for text in texts)
    if alone and short and 2 <= len(labels) <= len(texts) / 2:
        return ("label_accuracy", "macro_f1")
    return ("rougeL", "chrf") if float(np.median(lengths)) >= PROSE_WORDS else ("token_f1",)
