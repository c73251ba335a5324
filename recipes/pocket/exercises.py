"""Writes the exercises that teach the pocket model the skills a LoRA adapter can later steer.

    python recipes/pocket/exercises.py --rows 300000 --seed 1 --out exercises_train.jsonl
    python recipes/pocket/exercises.py --rows 2000 --seed 2 --out exercises_heldout.jsonl --skills

A row is {"messages": [...], "skill": name}.  Every answer follows from the messages before it, so exact match is a fair
score.  The same seed gives the same rows; another seed gives a held-out set.  Standard library only.
"""

from __future__ import annotations

import argparse
import json
import sys
from bisect import bisect
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import exercise_facts as facts
import exercise_forms as forms
import exercise_talk as talk
import exercise_tools as tools
from exercise_values import Dice

SKILLS = {
    facts.copy_value: 5, facts.fact_answer: 16, facts.fact_missing: 6, facts.several_questions: 4,
    facts.passage_question: 5, facts.table_lookup: 4, facts.extract: 6, facts.find_all: 2, tools.tool_call: 6,
    tools.tool_call_inline: 3, tools.tool_result: 2.5, tools.arguments_only: 1.5, forms.list_format: 3,
    forms.list_order: 2, forms.list_item: 2, forms.count_items: 1, forms.list_edit: 2.5, forms.change_case: 2,
    forms.wrap: 2, forms.fill_template: 4, forms.tone_rule: 5, forms.tone_with_missing: 3, forms.follow_style: 3.5,
    forms.few_shot: 3, talk.arithmetic: 1.5, talk.compare: 1, talk.entailment: 2, talk.choose_category: 1,
    talk.route_message: 1, talk.rewrite: 1.5, talk.definition: 1.5, talk.dialogue: 3, talk.pick_by_rule: 1,
}
"""Share of the rows by skill, in arbitrary units."""


def generate(num_rows: int, *, seed: int) -> Iterator[dict]:
    """`num_rows` rows {"messages", "skill"}, the same for the same seed."""
    dice = Dice(seed)
    skills, limits = list(SKILLS), list(accumulate(SKILLS.values()))
    for _ in range(num_rows):
        skill = skills[bisect(limits, dice.unit() * limits[-1])]
        yield {"messages": skill(dice), "skill": skill.__name__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON lines; standard output without it")
    parser.add_argument("--skills", action="store_true", help="print how many rows each skill has got")
    arguments = parser.parse_args()
    counts: Counter[str] = Counter()
    stream = arguments.out.open("w", encoding="utf-8") if arguments.out else sys.stdout
    encode = json.JSONEncoder(ensure_ascii=False).encode
    for row in generate(arguments.rows, seed=arguments.seed):
        counts[row["skill"]] += 1
        stream.write(encode(row) + "\n")
    if arguments.out:
        stream.close()
    if arguments.skills:
        for name, count in counts.most_common():
            print(f"{count:>8,} {name}", file=sys.stderr)


if __name__ == "__main__":
    main()
