"""Gates of an evaluation over several seeds; what the training rows say about repetition."""

from __future__ import annotations

from pathlib import Path

import pytest

from onlay.data.split import Split
from onlay.data.writer import SplitWriter
from onlay.evaluation.gates import Found, check_gates
from onlay.records import Comparison, SeedGain
from onlay.stages.reporting import _over_seeds, _repetitions, _trained_ends


def test_gates_judge_the_gain_over_seeds_and_not_the_first_runs() -> None:
    first = Comparison(
        score="exact_match", system="adapter", against="base", rows=100, value=0.7, other=0.5, difference=0.2, low=0.1,
        high=0.3, p_value=0.001, higher_is_better=True, verdict="better",
    )  # fmt: skip
    prompt = first.model_copy(update={"against": "prompt"})
    over = SeedGain(
        score="exact_match", against="base", gains={"0": 0.2, "1": -0.1}, mean=0.05, standard_error=0.15, low=-1.9,
        high=2.0, p_value=0.8, verdict="no difference shown",
    )  # fmt: skip

    def gate(comparisons: list[Comparison]) -> bool:
        found = Found(comparisons=comparisons, forgetting=[], safety=[], latency_ms=None, trained_rows=None)
        return check_gates({"exact_match": 0.05}, found)[0].passed

    assert gate(_over_seeds([first, prompt], []))
    judged = _over_seeds([first, prompt], [over])
    assert not gate(judged)
    assert (judged[0].difference, judged[0].p_value, judged[1]) == (0.05, 0.8, prompt)


@pytest.mark.parametrize(
    ("examples", "share", "most"),
    [
        ([(1, "a"), (2, "b"), (3, "c"), (4, "d")], 0.0, 1),
        ([(1, "a"), (1, "a"), (2, "b"), (2, "b"), (2, "b")], 0.0, 3),
        ([(1, "a"), (2, "a"), (3, "b"), (4, "c")], 0.25, 1),
        ([(1, "a"), (1, "a"), (2, "a"), (2, "a"), (3, "a"), (4, "c")], 0.5, 2),
    ],
)
def test_rows_that_a_weight_repeats_are_no_duplicates(
    tmp_path: Path, examples: list[tuple[int, str]], share: float, most: int
) -> None:
    with SplitWriter(tmp_path, "train") as writer:
        for number, text in examples:
            writer.add([ord(text), 1], [False, True], source=0, number=number)
    split = Split(tmp_path, "train", ["a.jsonl"])
    assert _repetitions(split) == (share, most)
    assert _trained_ends(split, [1]) == len(examples)
    assert _trained_ends(split, [ord("a")]) == 0
