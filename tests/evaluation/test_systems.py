"""Base, adapters, prompt and examples asked from one load; log-probabilities against transformers' own logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from onlay.data.read import Conversation, ToolCall, Turn
from onlay.data.template import ChatTemplate
from onlay.errors import DataError, RecipeError
from onlay.evaluation.systems import Bench, Question, System, questions_of
from onlay.generation.adapters import switched
from onlay.generation.engine import Sampling
from onlay.model.adapter import attach
from onlay.recipe import parse_recipe
from tests.builders import CHAT_TEMPLATE, CONTEXT_TOKENS, shake, tiny_model, tiny_pad_token_id, tiny_tokenizer

SHORT = Sampling(max_new_tokens=6)
BASE = System(name="base", told="")
ADAPTER = System(name="adapter", told="", adapter="default")
SHOT = Conversation((Turn("system", "of the shot"), Turn("user", "one?"), Turn("assistant", "1")))
QUESTION = Question(turns=(Turn("system", "Be brief."), Turn("user", "two?")), expected="2", place="rows:1")
QUESTIONS = [
    QUESTION, *(Question(turns=(Turn("user", f"{i} boats?"),), expected="", place=f"rows:{i}") for i in range(3))
]  # fmt: skip


def spanning_tokenizer(*, bos: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte, but `bc` and ` r` are one; with `bos` it puts `<s>` before a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate([*letters, "bc", "Ġr"])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[("b", "c"), ("Ġ", "r")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in ("<s>", "</s>")])
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 258)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    )


def bench(*, tokenizer: Any = None, adapter: bool = True, context_tokens: int | None = CONTEXT_TOKENS) -> Bench:
    model: Any = tiny_model("llama")
    if adapter:
        section = parse_recipe({"model": {"base": "x"}, "data": {"train": "x"}, "adapter": {"rank": 4}}).adapter
        model, _ = attach(model, section, seed=0)  # type: ignore[arg-type]
        shake(model, scale=0.3)
        model.requires_grad_(False).eval()
    template = ChatTemplate(tokenizer or tiny_tokenizer(), template="auto", loss_on="assistant")
    return Bench(
        model, template=template, stop_token_ids=template.stop_token_ids, pad_token_id=tiny_pad_token_id(),
        context_tokens=context_tokens,
    )  # fmt: skip


@pytest.fixture(scope="module")
def adapted() -> Bench:
    return bench()


def text_of(made: Bench, system: System, question: Question) -> str:
    return str(made.tokenizer.decode(made.encode(system, question)))


# ---------------------------------------------------------------------------------------------------------- questions


def test_the_last_answer_is_expected_and_what_asks_nothing_is_left_out() -> None:
    user, answer = Turn("user", "Hi?"), Turn("assistant", " Yes. ")
    rows = [
        Conversation((user, answer), place="a:1"),
        Conversation((user, answer, Turn("user", "And?"), Turn("assistant", "No.")), place="a:2"),
        Conversation((user, answer, Turn("user", "And?")), place="a:3"),
        Conversation((answer,), place="a:4"),
    ]
    template = ChatTemplate(tiny_tokenizer(), template="auto", loss_on="assistant")
    one, two = questions_of(rows, template=template)
    assert (one.turns, one.expected, one.place) == ((user,), "Yes.", "a:1")
    assert (len(two.turns), two.turns[1], two.expected) == (3, answer, "No.")


def test_a_tool_call_is_expected_as_the_template_writes_it() -> None:
    call = Turn("assistant", "", (ToolCall("boats", {"on": 3}, "c1"),))
    tools = ({"name": "boats", "parameters": {"type": "object", "properties": {}}},)
    template = ChatTemplate(tiny_tokenizer(), template="auto", loss_on="assistant")
    [one] = questions_of([Conversation((Turn("user", "How many?"), call), tools)], template=template)
    assert one.expected.startswith("<tool_call>{") and one.expected.endswith("}</tool_call>")
    assert '"name": "boats"' in one.expected and '"on": 3' in one.expected
    assert one.tools == tools


# ------------------------------------------------------------------------------------------------------------ prompts


def test_prompt_takes_the_place_of_the_system_message_and_examples_come_before_the_question(adapted: Bench) -> None:
    def turn(role: str, content: str) -> str:
        return f"<|im_start|>{role}\n{content}<|im_end|>\n"

    end = turn("user", "two?") + "<|im_start|>assistant\n"
    assert text_of(adapted, BASE, QUESTION) == turn("system", "Be brief.") + end
    assert text_of(adapted, ADAPTER, QUESTION) == text_of(adapted, BASE, QUESTION)
    prompt = System(name="prompt", told="", prompt="Be kind.")
    assert text_of(adapted, prompt, QUESTION) == turn("system", "Be kind.") + end
    few = System(name="few-shot", told="", shots=(SHOT, SHOT))
    shown = (turn("user", "one?") + turn("assistant", "1")) * 2
    assert text_of(adapted, few, QUESTION) == turn("system", "Be brief.") + shown + end
    assert (BASE.is_plain, ADAPTER.is_plain, prompt.is_plain, few.is_plain) == (True, True, False, False)


def test_room_counts_the_longest_prompt_and_the_new_tokens() -> None:
    prompt = System(name="prompt", told="", prompt="x" * 40)
    made = bench(adapter=False)
    size = len(made.encode(prompt, QUESTION))
    for context, fits in ((size + 5, [True]), (size + 4, [False]), (None, [True])):
        made.context_tokens = context
        assert made.room([BASE, prompt], [QUESTION], new_tokens=5) == fits


def test_as_many_examples_as_fit_before_every_question_that_can_be_asked() -> None:
    made = bench(adapter=False)
    shots = (SHOT, SHOT, SHOT)
    size = len(made.encode(System(name="x", told="", shots=(SHOT, SHOT)), QUESTION))
    made.context_tokens = size + 5
    assert made.shots_that_fit(shots, [QUESTION], new_tokens=5) == (SHOT, SHOT)
    # A question that does not fit by itself is not asked, and takes no examples away.
    endless = Question(turns=(Turn("user", "x" * 500),), expected="", place="")
    assert made.shots_that_fit(shots, [QUESTION, endless], new_tokens=5) == (SHOT, SHOT)
    made.context_tokens = len(made.encode(BASE, QUESTION)) + 6
    with pytest.raises(RecipeError, match="not one example fits before the longest question"):
        made.shots_that_fit(shots, [QUESTION], new_tokens=5)


# ------------------------------------------------------------------------------------------------------------ answers


def test_all_systems_of_one_batch_say_what_each_says_alone(adapted: Bench) -> None:
    systems = [
        ADAPTER, BASE, System(name="prompt", told="", prompt="Be kind."), System(name="few-shot", told="", shots=(SHOT,))
    ]  # fmt: skip
    together = adapted.answer(systems, QUESTIONS, sampling=SHORT)
    assert list(together) == [system.name for system in systems]
    for system in systems:
        assert adapted.answer([system], QUESTIONS, sampling=SHORT)[system.name] == together[system.name]
    texts = {name: [one.text for one in said] for name, said in together.items()}
    assert len({tuple(answers) for answers in texts.values()}) == 4
    plain = bench(adapter=False).answer([BASE], QUESTIONS, sampling=SHORT)
    assert plain["base"] == together["base"]


def test_an_adapter_that_is_not_loaded_is_no_base(adapted: Bench) -> None:
    with pytest.raises(DataError, match="asks for adapter other, which is not loaded"):
        adapted.answer([System(name="x", told="", adapter="other")], [QUESTION], sampling=SHORT)


def test_progress_counts_answers_of_all_systems(adapted: Bench) -> None:
    counted: list[tuple[int, int]] = []
    adapted.answer([BASE, ADAPTER], QUESTIONS, sampling=SHORT, progress=lambda *one: counted.append(one))
    assert counted[-1] == (8, 8)


# ---------------------------------------------------------------------------------------------------- log-probabilities


def by_hand(made: Bench, adapter: str | None, ids: list[int], scored: int) -> float:
    """Summed log-probability of the last `scored` tokens, from the model's own logits."""
    with switched(made.model, adapter), torch.no_grad():
        logits = made.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(logits[at - 1, ids[at]]) for at in range(len(ids) - scored, len(ids)))


@pytest.mark.parametrize(("context", "continuation", "scored"), [
    ("Q: 1\nA:", " 2", 2),
    ("a", "xyz", 3),
    ("ab", "cd", 2),  # `bc` spans the border: it is scored, `d` after it, and `a` is what is seen.
    ("the ", "river", 5),  # ` r` spans it: ` r`, i, v, e, r.
    ("ab", "c", 1),
])  # fmt: skip
@pytest.mark.parametrize("bos", [False, True])
def test_continuations_are_summed_log_probabilities(context: str, continuation: str, scored: int, bos: bool) -> None:
    made = bench(tokenizer=spanning_tokenizer(bos=bos))
    ids = ([258] if bos else []) + made.tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
    for system in (BASE, ADAPTER):
        expected = by_hand(made, system.adapter, ids, scored)
        pairs = [(context, continuation), ("other", " one")]
        found = made.continuations(system, pairs)
        assert found[0] == pytest.approx(expected, rel=1e-5)
        assert made.continuation_nats(system, pairs).tokens[0] == scored


def test_a_continuation_beyond_the_context_is_an_error() -> None:
    made = bench(adapter=False, context_tokens=16)
    made.continuations(BASE, [("x" * 10, "y" * 6)])
    with pytest.raises(DataError, match="A check of 17 tokens is longer than the context of 16"):
        made.continuations(BASE, [("x" * 10, "y" * 7)])


def test_nats_of_texts_and_examples_are_of_the_system_that_is_asked(adapted: Bench) -> None:
    [passage] = adapted.text_passages(["seven boats"])
    ids = adapted.tokenizer("seven boats")["input_ids"]
    for system in (BASE, ADAPTER):
        expected = -by_hand(adapted, system.adapter, ids, len(ids) - 1)
        assert float(adapted.nats(system, [passage]).nats[0]) == pytest.approx(expected, rel=1e-5)
    flags = [False] * 6 + [True] * (len(ids) - 6)
    [example] = adapted.held_out_passages([(ids, flags)])
    rows = adapted.nats(ADAPTER, [example])
    assert float(rows.nats[0]) == pytest.approx(-by_hand(adapted, "default", ids, 5), rel=1e-5)
    assert (rows.tokens[0], rows.bytes[0]) == (5, 5)


def test_bare_text_is_completed_without_the_template() -> None:
    made = bench(tokenizer=spanning_tokenizer(bos=True))
    text = made.complete(ADAPTER, "seven", sampling=SHORT)
    ids = [258, *made.tokenizer("seven", add_special_tokens=False)["input_ids"]]
    with switched(made.model, "default"), torch.no_grad():
        for _ in range(6):
            token = int(made.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if token in made.template.stop_token_ids:
                break
            ids.append(token)
    assert text == made.tokenizer.decode(ids[6:], skip_special_tokens=True)
