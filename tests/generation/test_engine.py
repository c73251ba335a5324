from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GenerationConfig

from onlay.generation.engine import Sampling, generate
from onlay.model.adapter import attach
from onlay.recipe import LoraAdapter
from onlay.stages.answering import _TextStream
from tests.builders import CONTEXT_TOKENS, shake, tiny_model, tiny_tokenizer

STOP = 257
PAD = 256
PROMPTS = [[65], [66, 67, 68], list(range(70, 100)), [101, 102], list(range(20, 35))]
GREEDY = Sampling(max_new_tokens=12)


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return tiny_model("llama")


@pytest.fixture
def adapted() -> Any:
    model, _ = attach(tiny_model("llama"), LoraAdapter(rank=4), seed=0)
    shake(model, scale=0.5)
    return model


def answers(model: nn.Module, prompts: Any = PROMPTS, sampling: Sampling = GREEDY, **options: Any) -> list[list[int]]:
    return generate(model, prompts, sampling=sampling, **({"stop_token_ids": [STOP], "pad_token_id": PAD} | options))


def by_hand(model: nn.Module, prompt: list[int], tokens: int) -> list[int]:
    """Greedy decoding without cache, padding or batch."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(tokens):
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            if token == STOP:
                break
            ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba"])
def test_a_batch_of_different_lengths_equals_each_alone(name: str) -> None:
    model = tiny_model(name, dtype=torch.float32)
    together = answers(model)
    assert together == [by_hand(model, prompt, 12) for prompt in PROMPTS]
    assert len({tuple(answer) for answer in together}) > 1


def test_more_prompts_than_a_batch_keep_their_order(base: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onlay.generation.engine.PROMPTS_A_BATCH", 2)
    seen: list[tuple[int, int]] = []
    assert answers(base, progress=lambda done, total: seen.append((done, total))) == answers(base)[:5]
    assert seen[:3] == [(2, 5), (4, 5), (5, 5)]
    assert answers(base, []) == []


def test_stop_tokens_end_an_answer_and_are_not_in_it(base: nn.Module) -> None:
    free = answers(base)
    stop = free[2][4]  # a token that is said on the way
    cut = answers(base, stop_token_ids=[stop, STOP])
    for whole, ended in zip(free, cut, strict=True):
        assert ended == (whole[: whole.index(stop)] if stop in whole else whole)
    assert cut[2] == free[2][:4] or stop in free[2][:4]
    assert all(stop not in answer for answer in cut)


def test_sampling_follows_the_seed(base: nn.Module) -> None:
    warm = Sampling(max_new_tokens=12, temperature=2.0, seed=1)
    first = answers(base, sampling=warm)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert answers(base, sampling=warm) == first
    assert torch.equal(torch.get_rng_state(), state), "torch's own random state is left alone"
    assert answers(base, sampling=Sampling(max_new_tokens=12, temperature=2.0, seed=2)) != first
    assert first != answers(base)


def test_top_p_near_zero_is_greedy(base: nn.Module) -> None:
    assert answers(base, sampling=Sampling(max_new_tokens=12, temperature=1.5, top_p=1e-6)) == answers(base)


def test_a_repetition_penalty_makes_said_tokens_rarer(base: nn.Module) -> None:
    plain, penalized = answers(base), answers(base, sampling=Sampling(max_new_tokens=12, repetition_penalty=5.0))
    assert sum(len(set(a)) for a in penalized) > sum(len(set(a)) for a in plain)


def test_without_the_adapter_it_is_the_base(adapted: nn.Module, base: nn.Module) -> None:
    assert answers(adapted, use_adapter=False) == answers(base)
    assert answers(adapted) != answers(base)
    assert answers(adapted, use_adapter=False) != answers(adapted)
    with pytest.raises(ValueError, match="no adapter"):
        answers(base, use_adapter=False)


def test_what_the_base_would_rather_do_is_not_done(base: nn.Module) -> None:
    """Bases ship a generation_config.json; a recipe's user asked for none of it."""
    expected = answers(base)
    wilful = tiny_model("llama")
    wilful.generation_config = GenerationConfig(
        do_sample=True, temperature=0.1, top_k=3, repetition_penalty=3.0, no_repeat_ngram_size=1, min_new_tokens=12,
        suppress_tokens=[expected[0][0]], eos_token_id=[expected[1][0]], max_new_tokens=3, num_beams=2,
    )  # type: ignore[no-untyped-call]  # fmt: skip
    assert answers(wilful) == expected


def test_answers_end_with_the_context(base: nn.Module) -> None:
    long = [5] * (CONTEXT_TOKENS - 3)
    found = answers(base, [long, *PROMPTS], context_tokens=CONTEXT_TOKENS, stop_token_ids=[])
    assert len(found[0]) == 3
    assert [len(answer) for answer in found[1:]] == [12] * 5
    assert found[1:] == answers(base, stop_token_ids=[])


def test_the_mode_of_the_model_is_left_as_it_was(adapted: nn.Module) -> None:
    adapted.train()
    answers(adapted)
    assert adapted.training


def test_streaming_brings_every_token_but_the_stop(base: nn.Module) -> None:
    seen: list[int] = []
    [whole] = answers(base, PROMPTS[:1], on_token=seen.append)
    assert seen == whole
    stop = whole[5]
    seen.clear()
    [cut] = answers(base, PROMPTS[:1], on_token=seen.append, stop_token_ids=[stop])
    assert seen == cut == whole[: whole.index(stop)]
    with pytest.raises(ValueError, match="one prompt"):
        answers(base, PROMPTS, on_token=seen.append)


def streamed(tokenizer: Any, ids: list[int]) -> list[str]:
    pieces: list[str] = []
    add: Callable[[str], None] = pieces.append
    stream = _TextStream(tokenizer, add)
    for token in ids:
        stream.add(token)
    stream.finish()
    return pieces


@pytest.mark.parametrize("text", ["plain", "Zürich 東京 🙂🙃 é", "🙂", "a\n\tb  c ", ""])
def test_streamed_pieces_join_to_the_answer_and_hold_whole_characters(text: str) -> None:
    tokenizer = tiny_tokenizer()  # one token a byte: every such character takes several
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True) == text
    assert pieces == list(text)


def test_an_answer_that_ends_within_a_character_is_streamed_to_its_end() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("ab🙂", add_special_tokens=False)["input_ids"][:-1]
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)
