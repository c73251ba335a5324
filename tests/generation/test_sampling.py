"""The choice of a token: what transformers' processors leave, and streams that know only of their own row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor, TopPLogitsWarper

from onlay.generation.sampling import Sampler, Sampling, _hash, _uniform

VOCABULARY = 50
PROMPTS = [[1, 2, 3], [4], [5, 6, 6]]


def logits_of(rows: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def sampler(indices: list[int] | None = None, prompts: Any = PROMPTS, **options: Any) -> Sampler:
    indices = list(range(len(prompts))) if indices is None else indices
    made = Sampler(Sampling(**options), rows=len(prompts), device=torch.device("cpu"))
    made.admit(torch.arange(len(prompts)), indices=indices, prompts=prompts, vocabulary=VOCABULARY)
    return made


def test_the_hash_is_splitmix64() -> None:
    # The generator's first outputs from seed 1234567, as its authors publish them.
    state = torch.tensor([1234567])
    golden = torch.tensor([0x9E3779B97F4A7C15 - 2**64])
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    found = [int(_hash(state + golden * i)) % 2**64 for i in range(4)]
    assert found == expected


def test_the_numbers_are_uniform_and_apart() -> None:
    streams = _hash(torch.arange(2000))
    numbers = torch.cat([_uniform(streams, torch.full_like(streams, i)) for i in range(20)])
    counts = torch.histc(numbers, bins=20, min=0.0, max=1.0)
    chi_squared = float(((counts - 2000) ** 2 / 2000).sum())
    assert chi_squared < 43.8, "one in a thousand for 19 degrees of freedom"
    assert len(numbers.unique()) == len(numbers)


def test_greedy_takes_the_largest() -> None:
    logits = logits_of(3)
    assert sampler().choose(logits).tolist() == logits.argmax(-1).tolist()


def test_draws_follow_the_probabilities() -> None:
    one = logits_of(1)
    rows = 20_000
    many = sampler(prompts=[[1]] * rows, temperature=1.3)
    counts = torch.bincount(many.choose(one.expand(rows, -1)), minlength=VOCABULARY)
    expected = (one[0] / 1.3).softmax(-1) * rows
    large = expected > 5
    chi_squared = float(((counts - expected) ** 2 / expected)[large].sum())
    assert chi_squared < 2 * int(large.sum()) + 20


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_draws_only_what_transformers_keeps(top_p: float) -> None:
    one = logits_of(1)
    kept = torch.isfinite(TopPLogitsWarper(top_p)(None, one / 0.8))[0]  # type: ignore[arg-type]
    rows = 5000
    drawn = sampler(prompts=[[1]] * rows, temperature=0.8, top_p=top_p).choose(one.expand(rows, -1)).unique()
    assert set(drawn.tolist()) <= set(kept.nonzero().flatten().tolist())
    likely = (one[0] / 0.8).softmax(-1) > 0.01
    assert set((likely & kept).nonzero().flatten().tolist()) <= set(drawn.tolist())


def test_the_penalty_is_transformers_over_prompt_and_answer() -> None:
    made = sampler(repetition_penalty=1.7)
    told = [list(prompt) for prompt in PROMPTS]
    for step in range(6):
        logits = logits_of(3, seed=step)
        penalized = torch.cat([
            RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([row]), logits[i : i + 1].clone())  # type: ignore[arg-type]
            for i, row in enumerate(told)
        ])  # fmt: skip
        found = made.choose(logits)
        assert found.tolist() == penalized.argmax(-1).tolist()
        for row, token in zip(told, found.tolist(), strict=True):
            row.append(token)


def test_a_stream_depends_on_seed_index_and_count_alone() -> None:
    options: dict[str, Any] = {"temperature": 2.0, "seed": 5, "repetition_penalty": 1.2, "top_p": 0.9}
    made = {
        "together": sampler(**options), "alone": sampler([2], PROMPTS[2:], **options),
        "other seed": sampler(**(options | {"seed": 6})), "other index": sampler([7, 8, 9], **options),
    }  # fmt: skip
    state = torch.get_rng_state()
    told: dict[str, list[list[int]]] = {name: [] for name in made}
    for step in range(12):
        logits = logits_of(3, seed=step)
        if step == 6:
            made["together"].keep(torch.tensor([1, 2]))
        for name, one in made.items():
            rows = logits[2:] if name == "alone" else logits[1:] if name == "together" and step >= 6 else logits
            told[name].append(one.choose(rows).tolist())
    last = {name: [row[-1] for row in rows] for name, rows in told.items()}
    assert last["together"] == last["alone"]
    assert last["together"] != last["other seed"]
    assert last["together"] != last["other index"]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_row_that_begins_anew_forgets_the_one_before() -> None:
    options: dict[str, Any] = {"temperature": 2.0, "seed": 5, "repetition_penalty": 5.0}
    used, fresh = sampler(**options), sampler([4], [[9]], **options)
    for step in range(5):
        used.choose(logits_of(3, seed=step))
    used.admit(torch.tensor([1]), indices=[4], prompts=[[9]], vocabulary=VOCABULARY)
    found = [int(used.choose(logits_of(3, seed=step)[1:2], torch.tensor([1]))) for step in range(20, 30)]
    assert found == [int(fresh.choose(logits_of(3, seed=step)[1:2])) for step in range(20, 30)]
