"""Trains the tokenizer of the pocket model and writes a folder that transformers loads.

    python recipes/pocket/tokenizer.py --books books_train.jsonl --exercises exercises_train.jsonl --out tokenizer/

Byte-level BPE with exactly 4,096 entries, so that any UTF-8 text goes in and comes out unchanged.  Digits stay single
tokens: a number is then copied digit by digit and never hides in a token that was seen once.  Plain text gets no
special tokens; the chat template writes the first token itself.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY_SIZE = 4096
CONTEXT_TOKENS = 1024
SPECIAL_TOKENS = (
    "<|pad|>", "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>",
    *(f"<|reserved_{index}|>" for index in range(9)),
)  # fmt: skip
"""Their ids are 0 to 15, in this order; config.json names the first three."""

# A message is <|role|>content<|end|>, without line breaks of its own.  Tools and calls are JSON without spaces.  A
# prefix of a conversation renders to a prefix of the whole; with the generation prompt it ends where the answer begins.
CHAT_TEMPLATE = """
{%- macro text(content) -%}
{%- if content is string -%}{{ content }}
{%- elif content -%}{%- for part in content -%}{{ part.text }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{{ bos_token }}
{%- if tools %}{% set listing = "Tools: " ~ (tools | tojson(separators=(",", ":"))) %}{% endif -%}
{%- if tools and (not messages or messages[0].role != "system") -%}
{{ "<|system|>" ~ listing ~ "<|end|>" }}
{%- endif -%}
{%- for message in messages -%}
{{ "<|" ~ message.role ~ "|>" ~ text(message.content) }}
{%- if tools and loop.first and message.role == "system" -%}
{{ ("\\n" if text(message.content) else "") ~ listing }}
{%- endif -%}
{%- for call in message.tool_calls or [] -%}
{%- set call = call.function or call -%}
{{ ("" if loop.first and not text(message.content) else "\\n") ~ '{"name":' ~ (call.name | tojson) ~ ',"arguments":' }}
{%- if call.arguments is string -%}{{ call.arguments }}
{%- else -%}{{ call.arguments | tojson(separators=(",", ":")) }}
{%- endif -%}
{{ "}" }}
{%- endfor -%}
{{ "<|end|>" }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<|assistant|>" }}{%- endif -%}
""".strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--books", type=Path, required=True, help="JSON lines of {text}")
    parser.add_argument("--exercises", type=Path, required=True, help="JSON lines of {messages}")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--book-chars", type=int, default=14_000_000)
    parser.add_argument("--exercise-chars", type=int, default=11_000_000)
    arguments = parser.parse_args()
    tokenizer = train_tokenizer(
        sample_books(arguments.books, num_chars=arguments.book_chars),
        sample_exercises(arguments.exercises, num_chars=arguments.exercise_chars),
    )
    save(tokenizer, arguments.out)
    check(arguments.out)


def sample_books(path: Path, *, num_chars: int) -> Iterator[str]:
    """Documents from the start of the file, which books.py has shuffled."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            text = json.loads(line)["text"]
            yield text
            num_chars -= len(text)
            if num_chars <= 0:
                return


def sample_exercises(path: Path, *, num_chars: int) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            for message in json.loads(line)["messages"]:
                yield message["content"]
                num_chars -= len(message["content"])
            if num_chars <= 0:
                return


def train_tokenizer(*samples: Iterator[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for sample in samples for text in sample), trainer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT_TOKENS,
        "pad_token": SPECIAL_TOKENS[0],
        "bos_token": SPECIAL_TOKENS[1],
        "eos_token": SPECIAL_TOKENS[2],
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_eos_token": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def check(folder: Path) -> None:
    """What a change of the template or of the training must not break."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if len(tokenizer) != VOCABULARY_SIZE or tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) != list(range(16)):
        raise SystemExit(f"{folder}: {len(tokenizer)} entries instead of {VOCABULARY_SIZE}, or special tokens moved.")
    every_kind = "Grüße, 你好 🙂\r\n\ttabs  two spaces \x00\x7f don't {\"a\":[1, 2.50]} QX-4821 \u2028 é e\u0301 'S"
    if tokenizer.decode(tokenizer(every_kind)["input_ids"]) != every_kind:
        raise SystemExit(f"{folder}: text does not come back unchanged.")
    call = {"type": "function", "function": {"name": "add", "arguments": {"text": "Grüße", "count": 2}}}
    conversation = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": '{"done":true}'},
        {"role": "assistant", "content": "Done."},
    ]
    for tools in (None, [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]):
        for start in (0, 1):
            check_prefixes(tokenizer, conversation[start:], tools)
    print(tokenizer.apply_chat_template(conversation, tools=tools, tokenize=False))


def check_prefixes(tokenizer, messages: list[dict], tools: list[dict] | None) -> None:
    whole = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    ids = tokenizer.apply_chat_template(messages, tools=tools, return_dict=False)
    if ids.count(tokenizer.bos_token_id) != 1 or tokenizer.decode(ids) != whole:
        raise SystemExit("The chat template writes the first token more or less than once.")
    for end, message in enumerate(messages):
        prompt = message["role"] == "assistant"
        part = messages[:end]
        if part and not whole.startswith(
            tokenizer.apply_chat_template(part, tools=tools, tokenize=False, add_generation_prompt=prompt)
        ):
            raise SystemExit(f"The first {end} messages do not render to a prefix of the whole.")


if __name__ == "__main__":
    main()
