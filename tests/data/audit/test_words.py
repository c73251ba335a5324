from __future__ import annotations

from datetime import date

import numpy as np
import pytest

from onlay.data.audit.words import (
    LETTERS,
    NUMERAL,
    SHINGLE_WORDS,
    SYMBOL,
    find_boilerplate,
    hash_runs,
    hash_words,
    is_in,
    keys_of,
    loose_key,
    normalise,
    normalise_bytes,
    shingles_of,
    similarity,
    text_of,
    texts_of,
    tools_key,
)
from onlay.data.read import Conversation, Document, ToolCall, Turn


def asked(prompt: str, answer: str = "yes", *, system: str | None = None) -> Conversation:
    turns = (Turn("user", prompt), Turn("assistant", answer))
    return Conversation((Turn("system", system), *turns) if system else turns)


@pytest.mark.parametrize(
    ("given", "normal"),
    [
        ("  Hello,\tWORLD!\n", "hello world"),
        ("What is 3 - 4?", "what is 3 - 4"),
        ("What is 3+4?", "what is 3 + 4"),
        ("-5", "- 5"),
        ("well-known - yes", "well known yes"),
        ("50% of $4", "50 % of $ 4"),
        ("**bold** and *so on*", "bold and so on"),
        ("STRASSE", "strasse"),
        ("straße", "strasse"),
        ("ﬁne ｆｕｌｌ", "fine full"),
        ("café", "café"),
        ("cafe\N{COMBINING ACUTE ACCENT}", "café"),
        ("क्षेत्र।", "क्षेत्र"),
        ("今天好。", "今 天 好"),
        ("so\N{SOFT HYPHEN}ft", "soft"),
        ("good 👍", "good 👍"),
        ("\ud800 half", "half"),
        ("?!", ""),
        ("", ""),
    ],
)
def test_normalising_keeps_what_carries_meaning(given: str, normal: str) -> None:
    assert normalise(given) == normal
    assert normalise(normal) == normal


def test_the_fast_way_for_ascii_gives_what_the_slow_way_gives() -> None:
    random = np.random.default_rng(0)
    letters = np.array(list("abcXYZ0189 -*/%+=<>$^~|_.,;:!?'\"`()[]{}#&@\\\n\t"))
    for _ in range(500):
        text = "".join(random.choice(letters, size=int(random.integers(0, 30))))
        assert normalise(text + "\N{ZERO WIDTH SPACE}") == normalise(text), text


def test_keys_are_equal_up_to_case_punctuation_and_space_alone() -> None:
    assert loose_key("Hello, world") == loose_key("hello   WORLD!")
    assert loose_key("hello world") != loose_key("hello word")
    assert len({loose_key(text) for text in ("?", "!", "...", "")}) == 4
    assert loose_key("What is 3 - 4?") != loose_key("What is 3 * 4?")


def test_a_rows_keys_tell_prompt_answer_and_row() -> None:
    prompt, answer, row = keys_of(asked("A b?", "C d."))
    assert keys_of(asked("a B", "c D")) == (prompt, answer, row)
    assert keys_of(asked("a B", "other"))[0] == prompt
    assert keys_of(asked("other", "c d"))[1] == answer
    assert keys_of(asked("a b c", "d"))[2] != row
    assert keys_of(asked("A b?", "C d.", system="Be brief."))[0] != prompt
    thought = Conversation((Turn("user", "A b?"), Turn("assistant", "C d.", reasoning="because")))
    assert keys_of(thought)[:2] == (prompt, answer)
    assert keys_of(thought)[2] != row
    document = keys_of(Document("a b"))
    assert document[1] == 0
    assert document[0] == document[2]


TOOL = {"type": "function", "function": {"name": "find", "parameters": {"city": {"type": "string"}}}}


def test_tools_are_asked_for_and_calls_are_answers() -> None:
    def calling(arguments: dict[str, object], *tools: dict[str, object]) -> Conversation:
        return Conversation((Turn("user", "Where?"), Turn("assistant", "", (ToolCall("find", arguments),))), tools)

    prompt, answer, row = keys_of(calling({"city": "Bern"}, TOOL))
    same = {"function": {"parameters": {"city": {"type": "string"}}, "name": "find"}, "type": "function"}
    assert keys_of(calling({"city": "Bern"}, same)) == (prompt, answer, row)
    other = keys_of(calling({"city": "Bern"}, {"type": "function", "function": {"name": "seek"}}))
    assert (other[0] != prompt, other[1] == answer, other[2] != row) == (True, True, True)
    none = keys_of(calling({"city": "Bern"}))
    assert (none[0] != prompt, none[1] == answer, none[2] != row) == (True, True, True)
    elsewhere = keys_of(calling({"city": "Basel"}, TOOL))
    assert (elsewhere[0] == prompt, elsewhere[1] != answer, elsewhere[2] != row) == (True, True, True)
    assert tools_key(calling({}, TOOL)) == tools_key(calling({"city": "Bern"}, same)) != tools_key(calling({})) == 0
    assert tools_key(Document("a")) == 0


def test_values_without_a_json_form_are_compared_as_text() -> None:
    days = [Conversation((Turn("assistant", "", (ToolCall("at", {"day": date(2026, 1, day)}),)),)) for day in (1, 1, 2)]
    assert keys_of(days[0]) == keys_of(days[1]) != keys_of(days[2])


def test_texts_leave_system_turns_out_and_say_who_spoke() -> None:
    assert texts_of(asked("q", "a", system="s")) == ("q", "a")
    assert texts_of(Document("all of it")) == ("all of it", "")
    call = Turn("assistant", "", (ToolCall("find", {"b": 1, "a": "ü"}),))
    turns = (Turn("user", "q"), call, Turn("tool", "found"), Turn("assistant", "a"))
    assert texts_of(Conversation(turns)) == ('user: q\nassistant: find {"a": "ü", "b": 1}\ntool: found', "a")
    assert texts_of(Conversation((Turn("user", "q"), Turn("assistant", "a"), Turn("user", "more")))) == (
        "q",
        "assistant: a\nuser: more",
    )
    assert texts_of(Conversation((Turn("user", "q"),))) == ("q", "")


def test_words_hash_alike_wherever_they_stand() -> None:
    words, kinds, offsets = hash_words([b"a bc a", b"", "bc 12 = 1a é".encode()])
    assert kinds.tolist() == [LETTERS] * 4 + [NUMERAL, SYMBOL, LETTERS, LETTERS]
    assert offsets.tolist() == [0, 3, 3, 8]
    assert words[0] == words[2]
    assert words[1] == words[3]
    assert words[0] != words[1]


def test_long_texts_are_hashed_in_pieces_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [b"alpha beta gamma", b"a" * 50 + b" delta", b"epsilon"]
    whole = hash_words(texts)
    monkeypatch.setattr("onlay.data.audit.words.PIECE_BYTES", 8)
    pieces = hash_words(texts)
    for one, other in zip(whole, pieces, strict=True):
        assert np.array_equal(one, other)


def test_runs_stay_inside_their_text() -> None:
    words, _, offsets = hash_words([b"a b c d", b"e f", b"", b"a b c"])
    runs, first = hash_runs(words, offsets, length=3, short=True)
    assert first.tolist() == [0, 1, 4, 6]
    assert text_of(first, offsets).tolist() == [0, 0, 1, 3]
    assert runs[0] == runs[3]
    assert len(set(runs.tolist())) == 3
    long, first = hash_runs(words, offsets, length=3, short=False)
    assert text_of(first, offsets).tolist() == [0, 0, 3]
    assert long.tolist() == [runs[0], runs[1], runs[3]]
    for texts in ([b"a"], []):
        words, _, offsets = hash_words(texts)
        assert len(hash_runs(words, offsets, length=13, short=False)[0]) == 0


def test_hashes_do_not_collide_on_many_words() -> None:
    words = [f"{number:x}" for number in range(100_000)]
    assert len(np.unique(hash_words([" ".join(words).encode()])[0])) == len(words)


def test_what_many_prompts_share_is_boilerplate_and_no_answer_is() -> None:
    rows = [asked(f"Sort this mail into a folder: {number} mail", "the same long answer here") for number in range(200)]
    boilerplate = find_boilerplate(rows)
    assert len(boilerplate) == 6 - SHINGLE_WORDS + 1, "sort this mail into a folder"
    texts = [normalise_bytes(text) for text in texts_of(rows[0])]
    shingles, text = shingles_of(texts, boilerplate=boilerplate)
    everything, _ = shingles_of(texts, boilerplate=None)
    assert len(everything) - len(shingles) == len(boilerplate)
    assert (text == 1).sum() == 3
    assert not len(find_boilerplate(rows[:99])), "too few rows to tell a template"
    assert not len(find_boilerplate([]))


def test_documents_have_no_boilerplate() -> None:
    notes = [Document(f"All rights are reserved by us: {number} note") for number in range(200)]
    assert not len(find_boilerplate(notes))
    mails = [asked(f"All rights are reserved by us: {number} mail") for number in range(200)]
    boilerplate = find_boilerplate([*notes, *mails])
    assert len(boilerplate) == 6 - SHINGLE_WORDS + 1
    note, mail = texts_of(notes[0]), texts_of(mails[0])
    whole = np.array([True, False])
    texts = [normalise_bytes(text) for text in (*note, *mail)]
    _, text = shingles_of(texts, boilerplate=boilerplate, whole=whole)
    assert np.bincount(text, minlength=4).tolist() == [6, 0, 2, 1]
    others = texts_of(notes[1])
    assert similarity(note, others, boilerplate=boilerplate) == similarity(note, others) > 0


def test_a_shingle_repeated_in_one_prompt_counts_once() -> None:
    rows = [asked("a b c " * 200 if number == 0 else f"{number} x y") for number in range(150)]
    assert not len(find_boilerplate(rows))


def test_is_in_works_on_nothing() -> None:
    known = np.array([2, 5], dtype=np.uint64)
    assert is_in(np.array([1, 2, 9, 5], dtype=np.uint64), known).tolist() == [False, True, False, True]
    assert is_in(known, known[:0]).tolist() == [False, False]
    assert is_in(known[:0], known).tolist() == []
