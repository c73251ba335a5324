"""Very long conversations are cut before they are tokenized; tests/data/audit/test_masks.py has what is counted of them."""

from __future__ import annotations

from onlay.data.audit.beginnings import characters_of, cut_item, encode_beginnings
from onlay.data.read import Conversation, Turn
from onlay.data.template import ChatTemplate
from onlay.errors import DataError
from tests.data.test_template import ONE, byte_level, talk


def test_what_is_left_of_a_cut_conversation_keeps_its_form() -> None:
    item = talk(Turn("system", "Be brief."), Turn("user", "u" * 500), Turn("assistant", "a" * 500), Turn("user", "v"), Turn("assistant", "b"))  # fmt: skip
    turns = cut_item(item, 100).turns
    assert [(turn.role, len(turn.content)) for turn in turns] == [("system", 9), ("user", 91), ("assistant", 16)]
    assert cut_item(item, 5000) == item


def test_the_first_tokens_are_those_of_the_whole_row() -> None:
    template = ChatTemplate(byte_level(), template="chatml")
    long = talk(Turn("user", "much asked " * 5000), Turn("assistant", "many words " * 9000), *ONE)
    for item in (long, talk(ONE[0], Turn("assistant", "x y " * 30_000))):
        [found], cut = encode_beginnings(template, [item], max_tokens=300)
        whole = template.encode(item)
        assert list(cut) == [0] and characters_of(cut[0]) < characters_of(item)
        assert (found.ids[:600], found.trained[:600]) == (whole.ids[:600], whole.trained[:600])


def test_short_rows_and_refused_ones_are_as_without() -> None:
    template = ChatTemplate(byte_level(), template="chatml")
    encoded, cut = encode_beginnings(template, [talk(*ONE)], max_tokens=3)
    assert (encoded, cut) == (template.encode_batch([talk(*ONE)]), {})
    refused: dict[int, DataError] = {}
    empty = Conversation((Turn("function", "x" * 100_000), ONE[1]))
    for items in ([talk(*ONE), empty], [empty]):
        refused.clear()
        template.encode_batch(items, refused=refused)
        expected = set(refused)
        refused.clear()
        encode_beginnings(template, items, max_tokens=3, refused=refused)
        assert set(refused) == expected
