from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from onlay.errors import BaseModelError
from onlay.model.tokenizer import load_tokenizer, pad_token_id, tokenizer_digest, tokens_outside
from onlay.records import ModelFacts

WORDS = ["<unk>", "<s>", "</s>", "hello", "world"]


def write_tokenizer(folder: Path, *, added: tuple[str, ...] = (), template: str | None = None) -> Path:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    model.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=template
    )
    tokenizer.add_tokens(list(added), special_tokens=True)
    tokenizer.save_pretrained(folder)
    return folder


def facts(folder: Path, *, vocabulary_size: int = len(WORDS)) -> ModelFacts:
    return ModelFacts(
        name="made", path=str(folder), revision=None, licence=None, architecture="LlamaForCausalLM", model_type="llama",
        num_parameters=1, weight_bytes=4, vocabulary_size=vocabulary_size, context_tokens=8, hidden_size=1,
        num_layers=1, linear_shapes={}, weight_fingerprint="0",
    )  # fmt: skip


def test_it_loads_from_the_folder_and_knows_where_tokens_lie(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(facts(write_tokenizer(tmp_path)))
    encoded = tokenizer("hello  world", return_offsets_mapping=True)
    assert encoded["offset_mapping"][-2:] == [(0, 5), (7, 12)]


def test_a_vocabulary_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"token 'world' = 4, but the base has embeddings for 4 tokens") as caught:
        load_tokenizer(facts(write_tokenizer(tmp_path), vocabulary_size=4))
    assert len(str(caught.value).splitlines()) == 2


def test_an_added_token_past_the_end_is_refused_only_where_it_is_used(tmp_path: Path) -> None:
    load_tokenizer(facts(write_tokenizer(tmp_path / "unused", added=("<image>",))))
    used = write_tokenizer(tmp_path / "used", added=("<turn>",), template="<turn>{{ messages[0].content }}")
    with pytest.raises(BaseModelError, match="'<turn>' = 5"):
        load_tokenizer(facts(used))
    tokenizer = load_tokenizer(facts(used, vocabulary_size=6))
    assert tokens_outside(tokenizer, 6) == {}
    assert tokens_outside(tokenizer, 3) == {"hello": 3, "world": 4, "<turn>": 5}


def test_a_tokenizer_without_offsets_is_refused(tmp_path: Path) -> None:
    from transformers import ByT5Tokenizer

    ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(BaseModelError, match="does not tell where its tokens lie"):
        load_tokenizer(facts(tmp_path, vocabulary_size=1000))


def test_files_that_cannot_be_read_are_two_lines(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{ broken")
    with pytest.raises(BaseModelError, match="cannot be loaded") as caught:
        load_tokenizer(facts(tmp_path))
    assert len(str(caught.value).splitlines()) == 2


def fake(*, eos: int | None = None, pad: int | None = None, unk: int | None = None, **added: int) -> Any:
    names = {number: name for name, number in added.items()}
    return SimpleNamespace(
        eos_token_id=eos,
        pad_token_id=pad,
        unk_token_id=unk,
        pad_token=names.get(pad) if pad is not None else None,
        get_added_vocab=lambda: added,
    )


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (fake(eos=2, pad=5), 5),
        (fake(eos=2, pad=2, unk=0), 0),
        (fake(eos=2, unk=0), 0),
        (fake(eos=0, pad=0), 1),
        (fake(eos=0, pad=0, unk=0), 1),
        (fake(), 0),
        (fake(eos=1, pad=1, unk=0, **{"<|endoftext|>": 0, "<|im_end|>": 1}), 2),
        (fake(eos=7, pad=6, **{"<|endoftext|>": 6, "<|im_end|>": 7}), 6),
    ],
    ids=["own", "pad-is-end", "no-pad", "end-is-0", "all-0", "nothing", "smollm", "qwen"],
)
def test_padding_is_never_an_end_token(tokenizer: Any, expected: int) -> None:
    assert pad_token_id(tokenizer) == expected


def test_the_digest_follows_content_and_templates_but_not_the_place(tmp_path: Path) -> None:
    first = write_tokenizer(tmp_path / "a", template="{{ messages }}")
    second = write_tokenizer(tmp_path / "b", template="{{ messages }}")
    original = tokenizer_digest(first)
    assert tokenizer_digest(second) == original
    (second / "config.json").write_text("{}")
    (second / "model.safetensors").write_bytes(b"x")
    assert tokenizer_digest(second) == original
    (second / "chat_template.jinja").write_text("{{ messages[0] }}")
    assert tokenizer_digest(second) != original
    settings = json.loads((first / "tokenizer_config.json").read_text())
    (first / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": True}))
    assert tokenizer_digest(first) != original


def test_real_tokenizer() -> None:
    root = os.environ.get("ONLAY_TEST_DATA")
    if not root:
        pytest.skip("ONLAY_TEST_DATA is not set: no real tokenizer to load")
    folder = Path(root) / "models" / "stories260K" / "hf"
    tokenizer = load_tokenizer(facts(folder, vocabulary_size=512))
    assert tokenizer.eos_token_id == 2
    assert pad_token_id(tokenizer) == 0
