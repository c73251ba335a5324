"""The base's tokenizer, from its local folder; its digest without loading anything; a pad token that costs nothing."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onlay.errors import BaseModelError
from onlay.hardware import quick_import
from onlay.records import ModelFacts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)


def load_tokenizer(facts: ModelFacts, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in `facts.path`; nothing is fetched.  Imports transformers (seconds).

    Raises BaseModelError when it cannot be loaded, cannot tell where in the text a token lies (the masks of trained
    tokens are made from that), or has tokens that the base has no embedding for.
    """
    try:
        with quick_import():
            from transformers import AutoTokenizer

            # The first call imports much of transformers.
            tokenizer = AutoTokenizer.from_pretrained(
                facts.path, local_files_only=True, trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BaseModelError(
            f"The tokenizer of {facts.name} cannot be loaded: {first}",
            "Use a base with a tokenizer.json; a tokenizer with code of its own needs model.trust_remote_code: true.",
        ) from None
    if not tokenizer.is_fast:
        raise BaseModelError(
            f"The tokenizer of {facts.name} ({type(tokenizer).__name__}) does not tell where its tokens lie in the text.",
            "Use a base with a tokenizer.json.",
        )
    outside = tokens_outside(tokenizer, facts.vocabulary_size)
    if outside:
        token, number = next(iter(outside.items()))
        raise BaseModelError(
            f"The tokenizer of {facts.name} has token {token!r} = {number}, but the base has embeddings for "
            f"{facts.vocabulary_size:,} tokens only.",
            "Tokenizer and weights do not belong together: use those of one base.",
        )
    return tokenizer


def tokens_outside(tokenizer: Any, vocabulary_size: int) -> dict[str, int]:
    """Tokens of use that have no embedding.

    Added tokens that nothing writes are let pass: Gemma 3's text-only bases carry an image token one past the end.
    """
    added = tokenizer.get_added_vocab()
    used = str(tokenizer.chat_template or "")
    outside = {}
    for token, number in tokenizer.get_vocab().items():
        if number < vocabulary_size:
            continue
        if token not in added or token in (tokenizer.bos_token, tokenizer.eos_token) or token in used:
            outside[token] = number
    return outside


def tokenizer_digest(folder: str | Path) -> str:
    """SHA-256 over the tokenizer's files, by name: vocabulary, configuration, chat templates.  Loads nothing."""
    folder = Path(folder)
    paths = [folder / name for name in _FILES if (folder / name).is_file()]
    paths += sorted((folder / "additional_chat_templates").glob("*.jinja"))
    digest = hashlib.sha256()
    for path in paths:
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder)}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def pad_token_id(tokenizer: Any) -> int:
    """The id that fills padded places: the tokenizer's pad token, unless that is also the token that ends an answer.

    Padding is masked and has no loss, so any token does; only the end token would be a trap, because code that masks
    "all padding" would then never train it.  No token is added: the embeddings stay as they are, and so does the
    adapter's size.  The choice: pad, else unk, else the smallest id that is no end token.
    """
    ends = _end_token_ids(tokenizer)
    for candidate in (tokenizer.pad_token_id, getattr(tokenizer, "unk_token_id", None)):
        if candidate is not None and candidate not in ends:
            return int(candidate)
    return next(number for number in range(len(ends) + 1) if number not in ends)


def _end_token_ids(tokenizer: Any) -> set[int]:
    """The end-of-text token, and the tokens that chat templates end a turn with."""
    ends = {tokenizer.eos_token_id} - {None}
    vocabulary = tokenizer.get_added_vocab()
    names = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "</s>", "<|end_of_text|>")
    # Qwen pads with <|endoftext|>, which ends nothing there: an end only where the tokenizer says so.
    ends.update(vocabulary[name] for name in names if name in vocabulary and name != tokenizer.pad_token)
    return {int(end) for end in ends}
