"""Which tokens train: decoded, they are the answers and their end tokens, for every template and kind of tokenizer."""

from __future__ import annotations

import itertools
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from onlay.data import template as template_module
from onlay.data.read import Conversation, Document, ToolCall, Turn, parse, read_items, scan
from onlay.data.template import NAMED, ChatTemplate, Encoded
from onlay.errors import DataError, RecipeError
from onlay.recipe import DataSection

SPECIAL = (
    "<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>", "<|end_of_turn|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>",
    "<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "<|tool_call|>",
)  # fmt: skip
TEMPLATE_FILES = (
    "alpaca", "amberchat", "chatml", "chatqa", "falcon-instruct", "gemma-it", "granite-3.0-instruct", "llama-2-chat",
    "llama-3-instruct", "mistral-instruct", "openchat-3.5", "phi-3-small", "phi-3", "qwen2.5-instruct", "saiga",
    "solar-instruct", "vicuna", "zephyr",
)  # fmt: skip
# How each ends an answer: its own token, or None where it writes none and only the last answer gets </s>.
ENDS = {
    "alpaca": "</s>", "amberchat": None, "chatml": "<|im_end|>", "chatqa": None, "falcon-instruct": None,
    "gemma-it": "<end_of_turn>", "granite-3.0-instruct": "<|end_of_text|>", "llama-2-chat": "</s>",
    "llama-3-instruct": "<|eot_id|>", "mistral-instruct": "</s>", "openchat-3.5": "<|end_of_turn|>",
    "phi-3-small": "<|end|>", "phi-3": "<|end|>", "qwen2.5-instruct": "<|im_end|>", "saiga": "</s>",
    "solar-instruct": None, "vicuna": "</s>", "zephyr": "</s>",
    "gemma": "<end_of_turn>", "llama-3": "<|eot_id|>", "mistral": "</s>", "plain": "</s>",
}  # fmt: skip
QWEN3_LIKE = """
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- set think = '' %}
{%- if m.reasoning_content %}{% set think = m.reasoning_content %}{% endif %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and loop.index0 > ns.last and (think or loop.last) %}
{{- '<think>\\n' + think + '\\n</think>\\n\\n' }}
{%- endif %}
{{- m.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

ONE = (Turn("user", "What is 2+2?"), Turn("assistant", "It is four."))
TWO = (*ONE, Turn("user", "And 3+3?"), Turn("assistant", "Six:\nthree twice."))
CALL = (
    Turn("user", "Weather in Oslo?"),
    Turn("assistant", "", (ToolCall("get_weather", {"city": "Oslo"}, "call_abc"),)),
    Turn("tool", '{"celsius": 3}', tool_call_id="call_abc"),
    Turn("assistant", "Three degrees."),
)
TOOLS = ({"type": "function", "function": {"name": "get_weather", "description": "Now.", "parameters": {}}},)


@pytest.fixture(scope="session")
def real_data() -> Path:
    folder = os.environ.get("ONLAY_TEST_DATA")
    if not folder:
        pytest.skip("ONLAY_TEST_DATA is not set: real templates and tokenizers are not tested")
    return Path(folder)


@cache
def byte_level(adds_bos: bool = False, trim: bool = False, has_bos: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte, and a few merges; like GPT-2 or Llama 3."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("Ċ", "Ċ"), ("i", "n"), ("Ġ", "S")]
    vocabulary = {piece: i for i, piece in enumerate([*alphabet, *(a + b for a, b in merges)])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return finished(core, adds_bos, trim, has_bos)


@cache
def metaspace(legacy: bool) -> PreTrainedTokenizerFast:
    """SentencePiece-like with byte fallback: legacy prepends a space to every segment, else only to the first."""
    pieces = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *(chr(i) for i in range(33, 127))]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "S"), ("▁", "I")]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, *(a + b for a, b in merges)])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if legacy:
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return finished(core, True, False, True)


def finished(core: Tokenizer, adds_bos: bool, trim: bool, has_bos: bool) -> PreTrainedTokenizerFast:
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    steps: list[Any] = [processors.ByteLevel(trim_offsets=True)] if trim else []
    if adds_bos:
        steps.append(processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", core.token_to_id("<s>"))]))
    if steps:
        core.post_processor = processors.Sequence(steps)
    names = {"bos_token": "<s>"} if has_bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>", **names)


def talk(*turns: Turn, tools: tuple[dict[str, Any], ...] = ()) -> Conversation:
    return Conversation(turns, tools, "rows.jsonl:7")


def trained_texts(template: ChatTemplate, encoded: Encoded) -> list[str]:
    """Decoded runs of trained tokens."""
    runs = itertools.groupby(zip(encoded.ids, encoded.trained, strict=True), key=lambda pair: pair[1])
    return [decode(template, [token for token, _ in run]) for flag, run in runs if flag]


def decode(template: ChatTemplate, ids: list[int]) -> str:
    text: str = template.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def squeezed(texts: list[str]) -> list[str]:
    """White space around and before an end token is the template's business."""
    return [" ".join(text.replace("</s>", " </s>").split()) for text in texts]


def check_answers(template: ChatTemplate, turns: tuple[Turn, ...], end: str | None) -> None:
    encoded = template.encode(talk(*turns))
    answers = [turn.content for turn in turns if turn.role == "assistant"]
    expected = [answer + (end or ("</s>" if i == len(answers) - 1 else "")) for i, answer in enumerate(answers)]
    assert squeezed(trained_texts(template, encoded)) == squeezed(expected)
    assert "masked_turns" not in encoded.notes
    prompt = template.encode_prompt(turns[:-1])
    if "boundary_merges" not in encoded.notes:  # A template that indents its answers: white space merges across.
        assert encoded.ids[: len(prompt)] == prompt
    assert not any(encoded.trained[i] for i in range(encoded.trained.index(True)))
    assert "boundary_merges" in encoded.notes or encoded.trained[len(prompt)], (
        "training starts where the prompt of generation ends"
    )
    end_id = template.tokenizer.convert_tokens_to_ids(end or "</s>")
    assert end_id in template.stop_token_ids
    assert template.tokenizer.pad_token_id not in template.stop_token_ids
    assert [token for token, flag in zip(encoded.ids, encoded.trained, strict=True) if flag][-1] == end_id


# ---------------------------------------------------------------------------------------------------- every template


@pytest.mark.parametrize("turns", [ONE, TWO, (Turn("system", "Be brief."), *TWO)], ids=["one", "two", "system"])
@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("name", NAMED)
def test_named_templates(name: str, adds_bos: bool, turns: tuple[Turn, ...]) -> None:
    check_answers(ChatTemplate(byte_level(adds_bos), template=name), turns, ENDS[name])


@pytest.mark.parametrize("compact", [False, True], ids=["as it is", "white space removed"])
@pytest.mark.parametrize("name", TEMPLATE_FILES)
def test_template_files(real_data: Path, tmp_path: Path, name: str, compact: bool) -> None:
    source = (real_data / "chat_templates" / "chat_templates" / f"{name}.jinja").read_text()
    if compact and "{%-" in source:
        pytest.skip(f"{name} controls its white space itself")
    path = tmp_path / f"{name}.jinja"
    path.write_text(source.replace("    ", "").replace("\n", "") if compact else source)
    for turns in (ONE, TWO, (Turn("system", "Be brief."), *TWO)):
        template = ChatTemplate(byte_level(), template=str(path))
        assert template.name == str(path)
        check_answers(template, turns, ENDS[name])


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("legacy", [False, True])
def test_metaspace_tokenizers(name: str, legacy: bool) -> None:
    check_answers(ChatTemplate(metaspace(legacy), template=name), TWO, ENDS[name])


@pytest.mark.parametrize(
    "folder", ["models/stories260K/hf", "tokenizers/gpt2", "tokenizers/mistral_hf", "tokenizers/torchtitan_debug_2k"]
)
def test_real_tokenizers(real_data: Path, folder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(real_data / folder)
    for name in ("auto", "plain", "alpaca", "vicuna"):
        template = ChatTemplate(tokenizer, template=name)
        encoded = template.encode(talk(*TWO))
        texts = ["".join(text.split()) for text in trained_texts(template, encoded)]
        assert texts == ["".join(turn.content.split()) + tokenizer.eos_token for turn in TWO[1::2]]
        prompt = template.encode_prompt(TWO[:-1])
        assert encoded.ids[: len(prompt)] == prompt
        assert encoded.trained[len(prompt)]
        if name == "auto" or tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
            assert encoded.ids.count(tokenizer.bos_token_id) == 1 or tokenizer.bos_token_id == tokenizer.eos_token_id


def test_real_rows_with_every_kind_of_turn(real_data: Path) -> None:
    template = ChatTemplate(byte_level(), template="chatml")
    for file in ("glaive_toolcall_en_demo.json", "reason_tool_use_demo_50.jsonl", "alpaca_en_demo.json"):
        path = str(real_data / "instruct_demo" / file)
        section = DataSection(train=path)
        items = [item for _, item in read_items(path, scan(path, section).format, section, limit=40)]
        for item, encoded in zip(items, template.encode_batch(items), strict=True):
            assert isinstance(item, Conversation)
            assert "masked_turns" not in encoded.notes
            answers = [turn for turn in item.turns if turn.role == "assistant"]
            texts = trained_texts(template, encoded)
            assert len(texts) == len(answers)
            for text, turn in zip(texts, answers, strict=True):
                assert text.endswith("<|im_end|>")
                assert text.startswith(turn.content.strip())
                assert all(f'{{"name": "{call.name}", "arguments"' in text for call in turn.tool_calls)


# ------------------------------------------------------------------------------------------------------- begin and end


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("start", ["", "{{ bos_token }}", "{{ bos_token }}{{ bos_token }}", "\n  {{ bos_token }}"])
def test_there_is_never_a_double_bos(tmp_path: Path, start: str, adds_bos: bool) -> None:
    path = tmp_path / "t.jinja"
    path.write_text(
        start + "{% for m in messages %}{{ m.role + ':' + m.content + (eos_token if m.role == 'assistant' else '') }}"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    template = ChatTemplate(byte_level(adds_bos), template=str(path))
    encoded = template.encode(talk(*ONE))
    wanted = 1 if adds_bos or "bos_token" in start else 0
    bos = template.bos_id
    assert encoded.ids.count(bos) == wanted
    assert (encoded.ids[0] == bos) == bool(wanted)
    assert trained_texts(template, encoded) == ["It is four.</s>"]
    prompt = template.encode_prompt(ONE[:1])
    assert encoded.ids[: len(prompt)] == prompt


def test_a_template_may_name_tokens_the_tokenizer_lacks() -> None:
    template = ChatTemplate(byte_level(has_bos=False), template="llama-3")
    assert trained_texts(template, template.encode(talk(*ONE))) == ["It is four.<|eot_id|>"]


def test_marks_that_are_no_tokens_are_told_and_the_answer_still_ends() -> None:
    core = Tokenizer.from_str(byte_level().backend_tokenizer.to_str())
    vocabulary = {p: i for p, i in core.get_vocab().items() if p not in SPECIAL}
    bare = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bare.pre_tokenizer, bare.decoder = core.pre_tokenizer, core.decoder
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="</s>")
    template = ChatTemplate(tokenizer, template="chatml")
    assert [finding.code for finding in template.findings] == ["template_tokens_missing"]
    assert trained_texts(template, template.encode(talk(*ONE))) == ["It is four.<|im_end|></s>"]
    assert template.stop_token_ids == [tokenizer.eos_token_id]


def test_no_end_token_at_all_is_refused() -> None:
    core = Tokenizer(models.BPE(vocab=byte_level().get_vocab(), merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    with pytest.raises(RecipeError, match="no token that ends an answer"):
        ChatTemplate(PreTrainedTokenizerFast(tokenizer_object=core), template="plain")


def test_documents_end_with_the_end_token() -> None:
    for adds_bos in (False, True):
        template = ChatTemplate(byte_level(adds_bos), template="plain")
        encoded = template.encode(Document("Once upon"))
        assert decode(template, encoded.ids) == ("<s>" if adds_bos else "") + "Once upon</s>"
        assert encoded.is_document
        assert encoded.trained == [False] + [True] * (len(encoded.ids) - 1)


def test_long_documents_are_tokenized_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(f"line {i} of the text\n" for i in range(200)) + "x" * 500
    template = ChatTemplate(byte_level(), template="plain")
    whole = template.encode(Document(text))
    monkeypatch.setattr(template_module, "DOCUMENT_CHARACTERS", 100)
    assert template.encode(Document(text)).ids == whole.ids
    assert "".join(template_module._parts(text)) == text


def test_loss_on_all_trains_everything_but_bos() -> None:
    template = ChatTemplate(byte_level(True), template="plain", loss_on="all")
    encoded = template.encode(talk(*ONE))
    assert encoded.ids[0] == template.bos_id
    assert encoded.trained == [False] + [True] * (len(encoded.ids) - 1)


def test_untrained_turns_stay_untrained() -> None:
    template = ChatTemplate(byte_level(), template="chatml")
    turns = (ONE[0], Turn("assistant", "Wrong.", trained=False), *TWO[2:])
    assert trained_texts(template, template.encode(talk(*turns))) == ["Six:\nthree twice.<|im_end|>"]
    nothing = template.encode(talk(ONE[0], Turn("assistant", "Wrong.", trained=False)))
    assert not any(nothing.trained)


def test_turns_after_the_last_answer_are_left_out_and_counted() -> None:
    template = ChatTemplate(byte_level(), template="plain")
    encoded = template.encode(talk(*ONE, Turn("user", "Thanks")))
    assert encoded.ids == template.encode(talk(*ONE)).ids
    assert encoded.notes == {"trailing_turns_cut": 1}


def test_a_batch_gives_what_each_gives_alone() -> None:
    template = ChatTemplate(byte_level(), template="chatml")
    items = [talk(*ONE), Document("Text."), talk(*TWO), talk(*CALL, tools=TOOLS)]
    assert template.encode_batch(items) == [template.encode(item) for item in items]


# -------------------------------------------------------------------------------------------------------- boundaries


def test_a_token_across_the_boundary_is_masked_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_text(
        "{% for m in messages %}{{ m.role + ':\\n' + m.content + (eos_token if m.role == 'assistant' else '') }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
    )
    template = ChatTemplate(byte_level(), template=str(path))
    encoded = template.encode(talk(ONE[0], Turn("assistant", "\n\nHm.")))  # Two line ends are one token.
    assert encoded.notes == {"boundary_merges": 1}
    assert trained_texts(template, encoded) == ["\nHm.</s>"]


def test_a_hidden_leading_space_counts_as_across_the_boundary(tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_text(
        "{% for m in messages %}{{ m.role + ': ' + m.content + (eos_token if m.role == 'assistant' else '') }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    for trim in (False, True):  # `ĠS` holds the prompt's last space; trimmed offsets hide that.
        template = ChatTemplate(byte_level(trim=trim), template=str(path))
        encoded = template.encode(talk(ONE[0], Turn("assistant", "Sure.")))
        assert encoded.notes == {"boundary_merges": 1}
        assert trained_texts(template, encoded) == ["ure.</s>"]


def test_answers_beyond_ascii() -> None:
    for tokenizer in (byte_level(), metaspace(True), metaspace(False)):
        template = ChatTemplate(tokenizer, template="zephyr")
        answer = "Grüße 👩‍🚀 — 漢字"
        texts = trained_texts(template, template.encode(talk(Turn("user", "ß👍"), Turn("assistant", answer))))
        assert squeezed(texts) == squeezed([answer + "</s>"])


# ------------------------------------------------------------------------------------- templates that change or refuse


def qwen3_like(tmp_path: Path) -> ChatTemplate:
    path = tmp_path / "qwen3.jinja"
    path.write_text(QWEN3_LIKE)
    return ChatTemplate(byte_level(), template=str(path))


def test_reasoning_that_is_dropped_from_history_masks_the_turn(tmp_path: Path) -> None:
    template = qwen3_like(tmp_path)
    assert template.accepts.reasoning
    turns = (ONE[0], Turn("assistant", "Four.", reasoning="2+2"), TWO[2], Turn("assistant", "Six.", reasoning="3+3"))
    encoded = template.encode(talk(*turns))
    assert encoded.notes == {"masked_turns": 1}
    assert trained_texts(template, encoded) == ["<think>\n3+3\n</think>\n\nSix.<|im_end|>"]


def test_history_without_reasoning_still_trains(tmp_path: Path) -> None:
    template = qwen3_like(tmp_path)
    encoded = template.encode(talk(*TWO))
    assert trained_texts(template, encoded) == [
        "It is four.<|im_end|>",
        "<think>\n\n</think>\n\nSix:\nthree twice.<|im_end|>",
    ]
    prompt = template.encode_prompt(TWO[:-1])
    assert encoded.ids[: len(prompt)] == prompt


def test_reasoning_is_kept_within_one_exchange(tmp_path: Path) -> None:
    template = qwen3_like(tmp_path)
    turns = (
        ONE[0],
        Turn("assistant", "A call.", reasoning="First"),
        Turn("tool", "4"),
        Turn("assistant", "Four.", reasoning="Then"),
    )
    encoded = template.encode(talk(*turns))
    assert "masked_turns" not in encoded.notes
    assert [text.split("\n")[1] for text in trained_texts(template, encoded)] == ["First", "Then"]


def test_reasoning_that_is_never_printed_is_counted() -> None:
    template = ChatTemplate(byte_level(), template="plain")
    encoded = template.encode(talk(ONE[0], Turn("assistant", "Four.", reasoning="2+2")))
    assert encoded.notes == {"reasoning_not_rendered": 1}
    assert trained_texts(template, encoded) == [" Four.</s>"]


def test_a_refused_system_role_is_folded_into_the_first_user_turn() -> None:
    template = ChatTemplate(byte_level(), template="gemma")
    turns = (Turn("system", "Be brief."), *ONE)
    encoded = template.encode(talk(*turns))
    assert encoded.notes == {"system_folded": 1}
    assert "user\nBe brief.\n\nWhat is 2+2?<end_of_turn>" in decode(template, encoded.ids)


def test_a_template_that_needs_a_system_message_gets_an_empty_one(tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_text(
        "{% if messages[0]['role'] == 'system' %}{% set system_message = messages[0]['content'] %}{% endif %}"
        "{{ '<s>' + system_message }}{% for m in messages %}{% if m.role == 'user' %}{{ '[' + m.content + ']' }}"
        "{% elif m.role == 'assistant' %}{{ m.content + '</s>' }}{% endif %}{% endfor %}"
    )
    check_answers(ChatTemplate(byte_level(), template=str(path)), TWO, "</s>")


def test_a_conversation_the_template_refuses_names_the_row(real_data: Path) -> None:
    path = real_data / "chat_templates" / "chat_templates" / "llama-3-instruct.jinja"
    template = ChatTemplate(byte_level(), template=str(path))
    with pytest.raises(DataError) as caught:
        template.encode(talk(ONE[0], ONE[0], ONE[1]))
    assert "rows.jsonl:7: the template" in caught.value.problem
    assert "roles must alternate" in caught.value.problem
    assert "user user assistant" in caught.value.remedy


def test_an_answer_to_nothing_is_masked() -> None:
    template = ChatTemplate(byte_level(), template="chatml")
    encoded = template.encode(talk(Turn("assistant", "Welcome."), *ONE))
    assert encoded.notes == {"masked_turns": 1}
    assert trained_texts(template, encoded) == ["It is four.<|im_end|>"]


def test_a_generation_prompt_with_more_than_the_answer_has_is_cut_and_told(tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_text(
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|><think>\\n' }}{% endif %}"
    )
    template = ChatTemplate(byte_level(), template=str(path))
    assert [finding.code for finding in template.findings] == ["generation_prompt_cut"]
    check_answers(template, TWO, "</s>")


def test_a_template_without_a_generation_prompt_does_not_train_the_header(tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    )
    template = ChatTemplate(byte_level(), template=str(path))
    assert [finding.code for finding in template.findings] == ["generation_prompt_unused"]
    check_answers(template, TWO, "<|im_end|>")


def test_the_last_answer_may_end_with_another_token(tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|end_header_id|>' + m.content }}"
        "{{ '<|end_of_text|>' if loop.last and m.role == 'assistant' else '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant<|end_header_id|>{% endif %}"
    )
    template = ChatTemplate(byte_level(), template=str(path))
    encoded = template.encode(talk(*TWO))
    assert trained_texts(template, encoded) == ["It is four.<|im_end|>", "Six:\nthree twice.<|end_of_text|>"]


# -------------------------------------------------------------------------------------------------------------- tools


def test_tool_calls_are_rendered_by_the_template() -> None:
    template = ChatTemplate(byte_level(), template="chatml")
    encoded = template.encode(talk(*CALL, tools=TOOLS))
    assert encoded.notes == {}
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>'
    assert trained_texts(template, encoded) == [call, "Three degrees.<|im_end|>"]
    text = decode(template, encoded.ids)
    assert '"description": "Now."' in text
    assert '<tool_response>\n{"celsius": 3}' in text


@pytest.mark.parametrize("name", ["mistral", "gemma", "plain", "alpaca"])
def test_tool_calls_as_text_where_the_template_has_none(name: str) -> None:
    template = ChatTemplate(byte_level(), template=name)
    encoded = template.encode(talk(*CALL, tools=TOOLS))
    assert encoded.notes["tool_calls_as_text"] == 1
    assert encoded.notes["tools_in_system"] == 1
    assert encoded.notes.get("tool_results_as_user", 0) == (1 if name in ("mistral", "gemma") else 0)
    end = ENDS[name] or ""
    texts = [text.strip() for text in trained_texts(template, encoded)]
    assert texts == ['{"name": "get_weather", "arguments": {"city": "Oslo"}}' + end, "Three degrees." + end]
    text = decode(template, encoded.ids)
    assert "Now." in text
    assert '{"celsius": 3}' in text


def test_qwen_renders_tool_calls(real_data: Path) -> None:
    path = real_data / "chat_templates" / "chat_templates" / "qwen2.5-instruct.jinja"
    template = ChatTemplate(byte_level(), template=str(path))
    assert template.accepts.tools
    assert template.accepts.tool_calls
    assert template.accepts.tool_role
    encoded = template.encode(talk(*CALL, tools=TOOLS))
    assert encoded.notes == {}
    assert [text.count("<|im_end|>") for text in trained_texts(template, encoded)] == [1, 1]


def test_granite_ignores_the_tool_role_so_results_become_user_turns(real_data: Path) -> None:
    path = real_data / "chat_templates" / "chat_templates" / "granite-3.0-instruct.jinja"
    template = ChatTemplate(byte_level(), template=str(path))
    encoded = template.encode(talk(*CALL, tools=TOOLS))
    assert encoded.notes == {"tool_calls_as_text": 1, "tool_results_as_user": 1}
    assert '{"celsius": 3}' in decode(template, encoded.ids)


@pytest.mark.parametrize("form", ["text", "printed"])
def test_arguments_are_given_in_the_form_the_template_wants(tmp_path: Path, form: str) -> None:
    arguments = "c.function.arguments" if form == "printed" else "'' + c.function.arguments"
    path = tmp_path / "t.jinja"
    path.write_text(
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% for c in m.tool_calls or [] %}"
        "{% if c.id|length != 9 %}{{ raise_exception('ids have 9 letters') }}{% endif %}"
        "{{ c.function.name }}({{ " + arguments + " }}){% endfor %}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    template = ChatTemplate(byte_level(), template=str(path))
    assert template.accepts.arguments_as_text
    assert trained_texts(template, template.encode(talk(*CALL)))[0] == 'get_weather({"city": "Oslo"})</s>'


def test_results_are_matched_to_calls_by_identity(tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_text(
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.id + c.function.name + (c.function.arguments | tojson) }}{% endfor %}"
        "{% if m.role == 'tool' %}{{ m.tool_call_id + m.name }}{% endif %}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    template = ChatTemplate(byte_level(), template=str(path))
    turns = (
        Turn("user", "Go"),
        Turn("assistant", "", (ToolCall("f", {}, "x"), ToolCall("g", {}, "y"))),
        Turn("tool", "second ", tool_call_id="y"),
        Turn("tool", "first ", tool_call_id="x"),
        Turn("assistant", "Done"),
    )
    text = template.render(turns)
    assert "second call00001g" in text
    assert "first call00000f" in text


# ------------------------------------------------------------------------------------------------- names, date, errors


def test_the_date_is_pinned(tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_text(
        "  {% if strftime_now is defined %}{% set today = strftime_now('%d %b %Y') %}"
        "{% else %}{% set today = '?' %}{% endif %}"
        "{{ today + '|' + strftime_now(\"%Y-%m-%d\") + '|' + date_string }}\n"
        "{% for m in messages %}{{ m.role + ':' + m.content + (eos_token if m.role == 'assistant' else '') }}"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    template = ChatTemplate(byte_level(), template=str(path))
    assert template.render(ONE).startswith("26 Jul 2024|2024-07-26|26 Jul 2024\nuser:")
    assert trained_texts(template, template.encode(talk(*ONE))) == ["It is four.</s>"]


def test_auto_takes_the_tokenizers_own_template_else_plain() -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level().backend_tokenizer, eos_token="</s>", bos_token="<s>"
    )
    plain = ChatTemplate(tokenizer)
    assert plain.name == "plain"
    tokenizer.chat_template = QWEN3_LIKE
    own = ChatTemplate(tokenizer)
    assert own.name == "base"
    assert own.digest != plain.digest
    tokenizer.chat_template = {"tool_use": "x", "default": QWEN3_LIKE}
    assert ChatTemplate(tokenizer).digest == own.digest


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("chatmll", None, "data.template = chatmll is not a template"),
        ("missing.jinja", None, "is not a file"),
        ("t.jinja", "{% for m in messages %}", "t.jinja"),
        ("t.jinja", "{{ raise_exception('never') }}", "cannot render one user turn: never"),
        (
            "t.jinja",
            "{% if add_generation_prompt %}one{% else %}{{ messages[-1].content }}two{% endif %}",
            "does not print a user turn",
        ),
    ],
)
def test_a_template_that_cannot_be_used(tmp_path: Path, name: str, content: str | None, expected: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
        name = str(tmp_path / name)
    with pytest.raises(RecipeError) as caught:
        ChatTemplate(byte_level(), template=name)
    assert expected in caught.value.problem
    assert str(caught.value).count("\n") == 1


def test_rows_reach_the_template_with_their_place(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "P", "completion": "C"}\n')
    section = DataSection(train=str(path))
    (_, item), *_ = read_items(str(path), "prompt_completion", section)
    assert ChatTemplate(byte_level(), template="plain").encode(item).place == f"{path}:1"
    assert parse.__doc__


def test_parts_of_a_long_document_go_to_the_tokenizer_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_module, "DOCUMENT_CHARACTERS", 10)
    parts = ["a" * 10, "b" * 10, "c" * 10, "d", "e" * 25, "f"]
    assert list(template_module._together(parts)) == [parts[:2], parts[2:4], parts[4:5], parts[5:]]
    assert list(template_module._together([])) == []
