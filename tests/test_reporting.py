"""Gates of an evaluation over several seeds."""

from __future__ import annotations

from onlay.evaluation.gates import Found, check_gates
from onlay.records import Comparison, SeedGain
from onlay.stages.reporting import _over_seeds


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
