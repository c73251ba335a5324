"""Conversations many times as long as max_tokens: only their beginnings are tokenized.

A tokenizer takes some 200 bytes for each token on the way, so that one row of many megabytes takes gigabytes, to be left out
or cut in the end.  That a beginning is more than long enough is seen by its tokens, not taken for granted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from onlay.data.read import Conversation, Document, Turn
from onlay.data.template import ChatTemplate, Encoded
from onlay.errors import DataError

LONG_CHARACTERS, LONG_TOKENS = 1 << 16, 16
"""A conversation of more characters than the first, and than the second for each of max_tokens, is tokenized up to there;"""
SURELY_OVERLONG = 2
"""where that gives less than this many times max_tokens, whole."""
LEAST_TURN = 16
"""Characters that are left of a turn after the cut."""

Item = Conversation | Document


def encode_beginnings(
    template: ChatTemplate, items: Sequence[Item], *, max_tokens: int, refused: dict[int, DataError] | None = None
) -> tuple[list[Encoded], dict[int, Conversation]]:
    """`template.encode_batch(items, refused=refused)`, but of very long conversations only the beginning; and, by index,
    what of those was encoded.  The first 2 max_tokens tokens are those of the whole row, but for the cut's own."""
    most = max(LONG_CHARACTERS, LONG_TOKENS * max_tokens)
    taken, cut = list(items), {}
    for i, item in enumerate(items):
        if isinstance(item, Conversation) and characters_of(item) > most:
            taken[i] = cut[i] = cut_item(item, most)
    encoded = template.encode_batch(taken, refused=refused)
    for i in list(cut):
        if refused is not None and i in refused:
            continue
        if len(encoded[i].ids) < SURELY_OVERLONG * max_tokens:  # Few tokens for so many characters.
            del cut[i]
            again: dict[int, DataError] | None = None if refused is None else {}
            [encoded[i]] = template.encode_batch([items[i]], refused=again)
            if refused is not None and again:
                refused[i] = again[0]
    return encoded, cut


def unseen_tokens(whole: Item, beginning: Conversation, encoded: Encoded, *, loss_on: str) -> tuple[int, int]:
    """About how many tokens a whole row has beyond those of its beginning, all and trained, by its characters."""
    assert isinstance(whole, Conversation)
    tokens = len(encoded.ids) / characters_of(beginning)
    more = round((characters_of(whole) - characters_of(beginning)) * tokens)
    if loss_on == "all":
        return more, more
    return more, round((_trained_characters(whole) - _trained_characters(beginning)) * tokens)


def cut_item(item: Conversation, characters: int) -> Conversation:
    """The beginning of a conversation, up to so many characters of its contents, and up to the answer after that, of whose
    turns only a word is left: its form stays what it was."""
    turns: list[Turn] = []
    left = characters
    for turn in item.turns:
        size = max(left, LEAST_TURN)
        reasoning = None if turn.reasoning is None else turn.reasoning[:size]
        turns.append(replace(turn, content=turn.content[:size], reasoning=reasoning))
        left -= len(turn.content) + len(turn.reasoning or "")
        if left <= 0 and turn.role == "assistant":
            break
    return replace(item, turns=tuple(turns))


def characters_of(item: Item) -> int:
    """Of all contents and reasoning."""
    if isinstance(item, Document):
        return len(item.text)
    return sum(len(turn.content) + len(turn.reasoning or "") for turn in item.turns)


def _trained_characters(item: Conversation) -> int:
    turns = (turn for turn in item.turns if turn.role == "assistant" and turn.trained)
    return sum(len(turn.content) + len(turn.reasoning or "") for turn in turns)
