"""The engine against transformers' own generate on each row alone, and what it promises about batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import GenerationConfig

from onlay.errors import BaseModelError, DataError
from onlay.generation.engine import Answer, Engine, Request, Sampling
from onlay.model.adapter import attach
from onlay.recipe import parse_recipe
from onlay.stages.answering import _TextStream
from tests.builders import ARCHITECTURES, CONTEXT_TOKENS, shake, tiny_model, tiny_tokenizer

STOP = 257
PAD = 256
PROMPTS = [[65], [66, 67, 68], list(range(70, 100)), [101, 102], list(range(20, 35))]
GREEDY = Sampling(max_new_tokens=12)
WARM = Sampling(max_new_tokens=12, temperature=2.0, top_p=0.95, repetition_penalty=1.1, seed=1)


def adapters_on(model: Any, *, method: str = "lora", targets: str = "all-linear") -> Any:
    """PEFT's model with three different adapters: one, two, three."""
    section = parse_recipe({
        "model": {"base": "x"}, "data": {"train": "x"}, "adapter": {"method": method, "rank": 2, "targets": targets}
    }).adapter  # fmt: skip
    adapted, _ = attach(model, section, seed=0)  # type: ignore[arg-type]
    first = adapted.peft_config["default"]
    for rank, name in enumerate(("one", "two", "three"), start=2):
        options = {key: getattr(first, key) for key in ("target_modules", "use_dora", "fan_in_fan_out")}
        adapted.add_adapter(name, LoraConfig(r=rank, lora_alpha=3 * rank, task_type="CAUSAL_LM", **options))
    adapted.delete_adapter("default")
    kept = [p for n, p in adapted.named_parameters() if "lora_" in n and "magnitude" not in n]
    adapted.requires_grad_(False)
    for parameter in kept:
        parameter.requires_grad_(True)
        parameter.data = parameter.data.to(next(model.parameters()).dtype)
    shake(adapted, scale=0.3)
    adapted.requires_grad_(False)
    adapted.set_adapter("one")
    return adapted.eval()


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def several() -> Any:
    return adapters_on(tiny_model("llama"))


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few rows and columns that rows wait, are admitted late, and move."""
    monkeypatch.setattr("onlay.generation.engine.ROWS_CPU", 2)
    monkeypatch.setattr("onlay.generation.engine.SPARE_COLUMNS", 1)


def engine(model: nn.Module, **options: Any) -> Engine:
    return Engine(model, **({"stop_token_ids": [STOP], "pad_token_id": PAD, "context_tokens": CONTEXT_TOKENS} | options))  # fmt: skip


def answers(model: nn.Module, prompts: Any = PROMPTS, sampling: Sampling = GREEDY, **options: Any) -> list[list[int]]:
    return [
        answer.ids for answer in engine(model, **options).generate([Request(p) for p in prompts], sampling=sampling)
    ]


def by_transformers(model: Any, prompt: list[int], tokens: int, **options: Any) -> list[int]:
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    for module in model.modules():  # RecurrentGemma's are not reset by itself.
        if vars(module).get("recurrent_states") is not None:
            module.recurrent_states = None
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=tokens, do_sample=False, eos_token_id=[STOP], pad_token_id=PAD, use_cache=True, **options
    )
    ids = torch.tensor([prompt])
    out: list[int] = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)[
        0, len(prompt) :
    ].tolist()
    return out[: out.index(STOP)] if STOP in out else out


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_is_transformers_on_each_row_alone(name: str, narrow: None) -> None:
    model = tiny_model(name)
    # RecurrentGemma's cached prefill of a single token is not its forward's.
    prompts = [*(PROMPTS[1:] if name == "recurrent_gemma" else PROMPTS), [7, 8, 9, 10], list(range(2, 40))]
    made = engine(model)
    found = [
        answer.ids for answer in made.generate([Request(p) for p in prompts], sampling=Sampling(max_new_tokens=25))
    ]
    assert found == [by_transformers(model, prompt, 25) for prompt in prompts]
    assert len({tuple(answer) for answer in found}) > 1
    fixed = name in ("bloom", "mamba", "recurrent_gemma", "falcon_h1")
    assert ("fixed groups" in made.notes.get("batch", "")) == fixed


def test_the_penalty_is_transformers(base: nn.Module, narrow: None) -> None:
    sampling = Sampling(max_new_tokens=20, repetition_penalty=3.0)
    assert answers(base, sampling=sampling) == [by_transformers(base, p, 20, repetition_penalty=3.0) for p in PROMPTS]
    assert answers(base, sampling=sampling) != answers(base, sampling=Sampling(max_new_tokens=20))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mixtral", "bloom", "mamba"])
@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "drawn"])
def test_a_batch_of_several_adapters_is_each_alone(name: str, sampling: Sampling, narrow: None) -> None:
    """Row by row where that can be, adapter by adapter where it cannot: fused experts, states, other caches."""
    model = adapters_on(tiny_model(name), targets="attention" if name != "mamba" else "all-linear")
    names = ["one", None, "two", "three", "two"]
    requests = [Request(prompt, adapter) for prompt, adapter in zip(PROMPTS, names, strict=True)]
    made = engine(model)
    assert made.adapters == ("one", "two", "three")
    assert ("adapters" in made.notes) == (name in ("bloom", "mamba"))
    together = made.generate(requests, sampling=sampling)
    for index, request in enumerate(requests):
        # At its own index: prompts of other rows are a single token, which ends at once.
        alone = [request if i == index else Request([1]) for i in range(index + 1)]
        assert made.generate(alone, sampling=sampling)[index] == together[index]
        if sampling is GREEDY and request.adapter is None:
            plain = tiny_model(name)
            assert together[index].ids == by_transformers(plain, list(request.prompt), 12)
    base_only = made.generate([Request(prompt) for prompt in PROMPTS], sampling=sampling)
    assert sum(a != b for a, b in zip(together, base_only, strict=True)) >= 3


def test_an_adapter_is_what_transformers_generates_with_it(several: Any, narrow: None) -> None:
    found = engine(several).generate([Request(p, "two") for p in PROMPTS], sampling=GREEDY)
    several.set_adapter("two")
    assert [answer.ids for answer in found] == [by_transformers(several.get_base_model(), p, 12) for p in PROMPTS]
    several.set_adapter("one")


def test_an_unknown_adapter_is_an_error(several: Any, base: nn.Module) -> None:
    with pytest.raises(DataError, match="adapter four, which is not loaded") as error:
        engine(several).generate([Request([1], "one"), Request([1], "four")], sampling=GREEDY)
    assert error.value.remedy == "Loaded are: one, two, three."
    with pytest.raises(DataError, match="not loaded"):
        engine(base).generate([Request([1], "one")], sampling=GREEDY)


def test_a_base_whose_biases_are_gone_is_not_asked() -> None:
    section = parse_recipe({
        "model": {"base": "x"}, "data": {"train": "x"}, "adapter": {"bias": "all", "rank": 2}
    }).adapter  # fmt: skip
    model, _ = attach(tiny_model("gpt2"), section, seed=0)  # type: ignore[arg-type]
    made = engine(model)
    with pytest.raises(BaseModelError, match="biases have taken the place"):
        made.generate([Request([1])], sampling=GREEDY)
    assert len(made.generate([Request([1], "default")], sampling=GREEDY)[0].ids) <= 12


def test_everything_is_put_back_on_an_exception(several: Any) -> None:
    before = several.get_base_model().config._attn_implementation

    def fail(done: int, total: int) -> None:
        raise ZeroDivisionError

    several.train()
    with pytest.raises(ZeroDivisionError):
        engine(several).generate([Request([1], "two")], sampling=GREEDY, progress=fail)
    assert several.training
    several.eval()
    assert not [name for name, module in several.named_modules() if "forward" in vars(module)]
    assert several.get_base_model().config._attn_implementation == before
    assert several.active_adapters == ["one"]


def test_order_progress_and_nothing_to_do(base: nn.Module, narrow: None) -> None:
    seen: list[tuple[int, int]] = []
    made = engine(base)
    found = made.generate([Request(p) for p in PROMPTS], sampling=GREEDY, progress=lambda *at: seen.append(at))
    assert [answer.ids for answer in found] == [by_transformers(base, p, 12) for p in PROMPTS]
    assert seen == [(i, 5) for i in range(1, 6)]
    assert made.generate([], sampling=GREEDY) == []
    assert made.generate([Request([1])], sampling=Sampling(max_new_tokens=0)) == [Answer([], stopped=False)]


def test_stop_tokens_end_an_answer_and_are_not_in_it(base: nn.Module, narrow: None) -> None:
    free = answers(base, stop_token_ids=[])
    stop = free[2][4]  # a token that is said on the way
    cut = engine(base, stop_token_ids=[stop]).generate([Request(p) for p in PROMPTS], sampling=GREEDY)
    for whole, answer in zip(free, cut, strict=True):
        assert answer == (Answer(whole[: whole.index(stop)], True) if stop in whole else Answer(whole, False))
    assert {answer.stopped for answer in cut} == {True, False} or all(stop in whole for whole in free)


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_a_draw_does_not_depend_on_the_batch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(name)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    wide = answers(model, sampling=WARM)
    assert torch.equal(torch.get_rng_state(), state), "torch's own random state is left alone"
    monkeypatch.setattr("onlay.generation.engine.ROWS_CPU", 1)
    assert answers(model, sampling=WARM) == wide
    assert answers(model, PROMPTS[:3], sampling=WARM) == wide[:3]
    assert answers(model, sampling=Sampling(max_new_tokens=12, temperature=2.0, seed=2)) != wide
    assert wide != answers(model)


def test_the_same_prompt_is_drawn_anew_at_every_index(base: nn.Module) -> None:
    assert len({tuple(ids) for ids in answers(base, [[65, 66]] * 6, sampling=WARM)}) > 3


def test_top_p_near_zero_is_greedy(base: nn.Module) -> None:
    assert answers(base, sampling=Sampling(max_new_tokens=12, temperature=1.5, top_p=1e-6)) == answers(base)


def test_what_the_base_would_rather_do_is_not_done() -> None:
    """Bases ship a generation_config.json; a recipe's user asked for none of it."""
    for name in ("llama", "mamba"):
        expected = answers(tiny_model(name))
        wilful = tiny_model(name)
        wilful.generation_config = GenerationConfig(
            do_sample=True, temperature=0.1, top_k=3, repetition_penalty=3.0, no_repeat_ngram_size=1, min_new_tokens=12,
            suppress_tokens=[expected[0][0]], eos_token_id=[expected[1][0]], max_new_tokens=3, num_beams=2,
        )  # type: ignore[no-untyped-call]  # fmt: skip
        assert answers(wilful) == expected


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_answers_end_with_the_context(name: str, narrow: None) -> None:
    model = tiny_model(name)
    long = [5] * (CONTEXT_TOKENS - 3)
    found = answers(model, [PROMPTS[0], long, *PROMPTS], stop_token_ids=[])
    assert [len(answer) for answer in found] == [12, 3, *[12] * 5]
    assert found[2:] == answers(model, stop_token_ids=[])
    assert found[1] == by_transformers(model, long, 3)


@pytest.mark.parametrize(("prompt", "what"), [([], "no tokens"), ([5] * CONTEXT_TOKENS, "512 tokens; the context is 512")])  # fmt: skip
def test_a_prompt_without_tokens_or_room_is_refused(base: nn.Module, prompt: list[int], what: str) -> None:
    with pytest.raises(DataError, match=what):
        answers(base, [[1], prompt])


def test_rows_that_would_change_each_other_are_answered_alone() -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    model = tiny_model("llama", rope_parameters=rope, max_position_embeddings=16)
    made = engine(model)
    found = [answer.ids for answer in made.generate([Request(p) for p in PROMPTS], sampling=GREEDY)]
    assert "alone" in made.notes["batch"]
    assert found == [by_transformers(model, prompt, 12) for prompt in PROMPTS]


def test_a_row_that_is_done_asks_for_no_position_beyond_the_base() -> None:
    """gpt2 has a table of positions: a row that ended early waits beside one that uses all of it."""
    model = tiny_model("gpt2", n_positions=64)
    early = by_transformers(model, list(range(40, 90)), 3)
    found = answers(model, [list(range(40, 90)), [7, 8]], Sampling(max_new_tokens=62), stop_token_ids=early[:1], context_tokens=64)  # fmt: skip
    assert found[0] == []
    free = answers(model, [[7, 8]], Sampling(max_new_tokens=62), stop_token_ids=[], context_tokens=64)[0]
    assert len(free) == 62
    assert found[1] == (free[: free.index(early[0])] if early[0] in free else free)
    assert len(found[1]) > 20, "longer than the table has room for beside the first row"


def test_more_memory_than_there_is_makes_the_batch_narrower(base: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = answers(base)
    monkeypatch.setattr("onlay.generation.engine.CACHE_BYTES_CPU", 1)
    assert engine(base)._width(100) == 1
    assert answers(base) == expected


def test_the_mode_of_the_model_is_left_as_it_was(base: nn.Module) -> None:
    base.train()
    made = engine(base)
    made.generate([Request([1])], sampling=GREEDY)
    assert base.training
    base.eval()


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_streaming_brings_every_token_but_the_stop(name: str) -> None:
    model = tiny_model(name)
    seen: dict[int, list[int]] = {i: [] for i in range(len(PROMPTS))}
    stop = answers(model)[2][4]
    found = engine(model, stop_token_ids=[stop]).generate(
        [Request(p) for p in PROMPTS], sampling=GREEDY, on_token=lambda index, token: seen[index].append(token)
    )
    assert [seen[i] for i in range(len(PROMPTS))] == [answer.ids for answer in found]
    assert any(answer.stopped for answer in found)


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


def test_an_adapter_that_took_the_place_of_another_is_looked_at_again() -> None:
    model = adapters_on(tiny_model("llama"))
    engine = Engine(model, stop_token_ids=[STOP], pad_token_id=PAD, context_tokens=CONTEXT_TOKENS)
    engine.generate([Request(PROMPTS[0], "one")], sampling=GREEDY)
    assert "adapters" not in engine.notes
    model.delete_adapter("one")
    model.add_adapter("one", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False))
    engine.generate([Request(PROMPTS[0], "one")], sampling=GREEDY)
    assert "adapters" not in engine.notes
    model.base_model.set_adapter("two")
    model.base_model.merge_adapter(["two"])
    engine.generate([Request(PROMPTS[0], "one")], sampling=GREEDY)
    assert "an adapter is merged" in engine.notes["adapters"]
