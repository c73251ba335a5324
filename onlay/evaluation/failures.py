"""The worst rows of a system, written so that they can become training rows: the right answer with its prompt, the bad
answer beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onlay.records import write_whole


@dataclass(frozen=True, slots=True)
class Failures:
    """What was written, and what was not."""

    rows: tuple[int, ...]
    """`row` of each one written, worst first."""
    failed: int
    """Rows with a score below `good`, those beyond the limit included."""
    without_expected: int
    """Of them: no right answer is known, so they are not written."""
    without_score: int
    """Rows that the score does not apply to."""


def write_failures(
    path: Path,
    rows: Sequence[dict[str, Any]],
    *,
    system: str,
    score: str,
    against: str | None = "base",
    limit: int = 100,
    good: float = 1.0,
) -> Failures:
    """Writes at most `limit` of the rows whose `score` of `system` is below `good`, the worst first.

    `rows` are those of answers.jsonl; `score` is one of which more is better.  The order: lowest score, then the largest
    loss against `against` (None, or a row without its score: no loss), then the row's number.  Each line is a training row
    in the messages format (`messages`, and `tools` where the row has them); `bad_answer`, `score`, `score_of_<against>` and
    `place` stand beside, and readers of training data pass over them.  Raises OutputError where it cannot be written.
    """
    ranked, without_expected, without_score = [], 0, 0
    for row in rows:
        value = row["scores"][system].get(score)
        if value is None:
            without_score += 1
            continue
        if value >= good:
            continue
        other = row["scores"].get(against, {}).get(score) if against is not None else None
        loss = other - value if other is not None else 0.0
        ranked.append((value, -loss, row["row"], other, row))
        without_expected += not _is_known(row)
    ranked.sort(key=lambda item: item[:3])
    kept = [item for item in ranked if _is_known(item[4])][:limit]
    lines = [_line(row, system=system, value=value, against=against, other=other) for value, _, _, other, row in kept]
    write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return Failures(tuple(item[2] for item in kept), len(ranked), without_expected, without_score)


def _is_known(row: dict[str, Any]) -> bool:
    expected = row.get("expected")
    return isinstance(expected, str) and bool(expected.strip())


def _line(
    row: dict[str, Any], *, system: str, value: float, against: str | None, other: float | None
) -> dict[str, Any]:
    line: dict[str, Any] = {"messages": [*row["prompt"], {"role": "assistant", "content": row["expected"]}]}
    if row.get("tools"):
        line["tools"] = row["tools"]
    line |= {"bad_answer": row["answers"][system], "score": value}
    if other is not None:
        line[f"score_of_{against}"] = other
    return line | {"place": row["place"]}
