"""The detectors of texts, each on true text that it must pass by and on faults that it must find."""

from __future__ import annotations

import json
import os
import pickle
import random
from pathlib import Path

import pytest

from onlay.data.audit import refusals, texts
from onlay.data.audit.languages import STOP_WORDS, language_of, script_of
from onlay.data.read import Conversation, Document, Turn
from onlay.errors import DataError
from onlay.evaluation.safety import outcome_of
from tests.data.audit import faults
from tests.data.audit import material as m


def asked(prompt: str, answer: str, *, trained: bool = True) -> Conversation:
    return Conversation((Turn("user", prompt, trained=False), Turn("assistant", answer, trained=trained)))


PROMPT = "What became of the copper lantern, and who will mend it in the spring?"


@pytest.mark.parametrize("answer", m.PLACEHOLDERS)
def test_placeholders_are_found(answer: str) -> None:
    assert "placeholder_answer" in texts.check_texts(asked(PROMPT, answer))
    assert texts.check_texts(asked(PROMPT, answer, trained=False)) == []


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("What is the symbol of sodium?", "Na"), ("Which of these apply?", "None"), ("2 < 3?", "<"), ("How many?", "0"), ("Is it?", "No."),
        ("Show me a list", "First, see [insert](https://a.b/insert) and the docs."), ("Write code", "x = 1  # TODO: more"),
        ("Write a Jinja template that greets", "Hello {{ name }}!"), ("Fill in: Dear [insert name]", "Dear [insert name], hello."),
        ("Write placeholder text", "Lorem ipsum dolor sit amet."), ("Who leads?", "As an AI researcher, she leads the team."),
        ("Your job?", "As an aide, I carry letters."), ("Todo lists?", "A todo list holds what is to be done, and should be short enough to read in a minute."),
    ],
)  # fmt: skip
def test_answers_that_look_like_placeholders_are_passed_by(prompt: str, answer: str) -> None:
    assert texts.check_texts(asked(prompt, answer)) == []


@pytest.mark.parametrize(
    "text", [*m.ACCENTED, *m.TRICKY, *(text for all_texts in m.FOREIGN.values() for text in all_texts)]
)
def test_true_text_is_not_broken(text: str) -> None:
    assert not texts.is_broken(text)


@pytest.mark.parametrize("codec", ["latin-1", "cp1252"])
@pytest.mark.parametrize("text", m.ACCENTED)
def test_utf8_in_the_wrong_encoding_is_broken(text: str, codec: str) -> None:
    assert texts.is_broken(faults.garble(text, codec))


def test_cyrillic_in_windows_1251_is_broken() -> None:
    assert texts.is_broken(faults.garble("Привет, как твои дела?", "cp1251"))


@pytest.mark.parametrize(
    "text", ["a\x00b", "a\x07", "\x7f", "my mother\ufffds villa", "half \ud83d of a pair", "ï»¿{", "\x9d"]
)
def test_characters_that_no_text_has_are_broken(text: str) -> None:
    assert texts.is_broken(text)
    assert "broken_encoding" in texts.check_texts(Document(f"A text. {text}"))
    assert "broken_encoding" in texts.check_texts(asked(text, "A plain answer, to a broken prompt."))


@pytest.mark.parametrize("text", m.NOT_LOOPS)
def test_tables_code_poems_and_lists_are_no_loops(text: str) -> None:
    assert not texts.repeats_itself(text)


@pytest.mark.parametrize("seed", range(20))
def test_loops_are_found_wherever_they_begin(seed: int) -> None:
    rng = random.Random(seed)
    pairs = faults.clean_pairs(12, seed=seed)
    for pair in pairs:
        assert not texts.repeats_itself(pair.answer)
        assert texts.repeats_itself(faults._looping(pair.answer, rng))
    long = " ".join(pair.answer for pair in pairs)
    assert not texts.repeats_itself(long)
    assert texts.repeats_itself(f"{long} {'and so on it went ' * 8} {long}")


@pytest.mark.parametrize("answer", m.REFUSALS)
def test_refusals_are_found(answer: str) -> None:
    assert "refusals" in texts.check_texts(asked(PROMPT, answer))


@pytest.mark.parametrize("answer", m.NOT_REFUSALS)
def test_answers_with_words_of_refusals_are_passed_by(answer: str) -> None:
    assert "refusals" not in texts.check_texts(asked(PROMPT, answer))


@pytest.mark.parametrize("answer", [*m.REFUSALS, *m.NOT_REFUSALS, *m.PLACEHOLDERS, *m.ACCENTED])
def test_the_rules_say_what_evaluation_says(answer: str) -> None:
    """One set of rules: the hints that skip patterns change nothing."""
    assert refusals.refuses(answer) == (outcome_of(answer) == "refused")


def test_scripts_and_languages() -> None:
    samples = {"en": "The lantern is in the attic, and you will have to mend it with care.", **{name: " ".join(all_texts) for name, all_texts in m.FOREIGN.items()}}  # fmt: skip
    told = {name: language_of(text) for name, text in samples.items()}
    assert told == {"en": "en", "de": "de", "fr": "fr", "es": "es", "ru": "cyrillic", "zh": "han", "ja": "japanese"}
    assert [script_of(text) for text in ("hello there, friend", "12345 + 6789 = 19134", "", "oui", "Ποιος είναι ο δρόμος", "مرحبا كيف حالك", "今天", "안녕하세요")] == [
        "latin", None, None, None, "greek", "arabic", None, "hangul",
    ]  # fmt: skip
    assert language_of("print(len(rows)) if rows else None") is None


@pytest.mark.parametrize("language", STOP_WORDS)
def test_a_language_is_told_by_its_commonest_words(language: str) -> None:
    assert language_of(" ".join(STOP_WORDS[language].split()[:25])) == language


def test_an_answer_in_another_language() -> None:
    german = " ".join(m.FOREIGN["de"])
    assert texts.check_texts(asked(PROMPT, german)) == ["language_mix"]
    assert texts.check_texts(asked("Translate to German: " + PROMPT, german)) == []
    assert texts.check_texts(asked(PROMPT, "```python\nfor der in die: und = das\n```")) == []
    assert texts.check_texts(asked("这是村里人经常问的一个好问题。怎么办？", "def f(rows):\n    return rows")) == []
    assert texts.check_texts(asked("Write a function", " ".join(m.FOREIGN["zh"]))) == []


def test_languages_of_rows_are_judged_over_all() -> None:
    assert texts.judge_languages({"en": 950, "de": 30, "han": 20}) == {"de", "han"}
    assert texts.judge_languages({"en": 600, "de": 400}) == set()
    assert texts.judge_languages({}) == set()


def test_openings() -> None:
    answer = "**Great question, thank** you for asking! The lantern is in the attic."
    assert texts.opening_of(asked(PROMPT, answer)) == "great question, thank** you"
    assert texts.opening_of(asked(PROMPT, "It is there.")) is None
    assert texts.opening_of(Document(answer)) is None
    assert texts.judge_openings({"great question thank you": 30, "it is in the": 9, "there are two of": 15}, rows=1000) == {"great question thank you"}  # fmt: skip
    assert texts.judge_openings({"a b c d": 9}, rows=12) == set()


def terms_file(folder: Path, *lines: str) -> Path:
    path = folder / "terms.txt"
    path.write_text("# words to look at\n\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_terms_are_whole_words_and_phrases_in_any_case(tmp_path: Path) -> None:
    terms = pickle.loads(pickle.dumps(texts.read_terms(terms_file(tmp_path, *m.TERMS, "C++", "蠢货", "Straße", "💩"))))
    for term in (*m.TERMS, "c++", "蠢货", "straße", "💩"):
        for text in (term, f"A {term.upper()}, here", f"so: {term}!", term.replace(" ", "\n  ")):
            assert terms.found_in(text) == [term.replace("ß", "ss")], text
    for text in (*m.NOT_TERMS, "C is a letter", "c+", "strassen", "A scurvy, dog"):
        assert terms.found_in(text) == []
    assert terms.found_in("这个蠢货在说话") == ["蠢货"]
    assert texts.check_texts(asked("Zounds!", "What is it now, then?"), terms=terms) == ["listed_terms"]


def test_ten_thousand_terms_are_all_found(tmp_path: Path) -> None:
    listed = [f"term{number} of" if number % 2 else f"word{number}" for number in range(10_000)]
    terms = texts.read_terms(terms_file(tmp_path, *listed))
    assert all(terms.found_in(f"here is {term} course") == [term] for term in listed)
    assert terms.found_in("term1 or word3") == []


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "cannot be read"), (b"\xff\xfe\xff", "not UTF-8"), (b"# nothing\n\n", "holds no terms")],
)
def test_a_file_of_terms_that_cannot_be_used(tmp_path: Path, content: bytes | None, problem: str) -> None:
    path = tmp_path / "terms.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=problem) as caught:
        texts.read_terms(path)
    assert "one word or phrase a line" in caught.value.remedy


def test_tool_calls_reasoning_and_codes_once() -> None:
    loop = "so I think again about it and " * 9
    item = Conversation((
        Turn("user", "Look it up.", trained=False), Turn("assistant", ""), Turn("tool", "broken \ufffd", trained=False),
        Turn("assistant", "It is there.", reasoning=loop), Turn("assistant", "TODO"), Turn("assistant", "TBD"),
    ))  # fmt: skip
    assert texts.check_texts(item) == ["repetition", "placeholder_answer", "broken_encoding"]


@pytest.mark.parametrize("format", ["gsm8k", "alpaca", "self_instruct"])
def test_real_rows_give_only_true_findings(format: str) -> None:
    folder = os.environ.get("ONLAY_TEST_DATA")
    if not folder:
        pytest.skip("ONLAY_TEST_DATA is not set: the real data files are not tested")
    if format == "gsm8k":
        rows = [json.loads(line) for line in (Path(folder) / "gsm8k/test.jsonl").open(encoding="utf-8")]
        found = [texts.check_texts(asked(row["question"], row["answer"])) for row in rows]
        assert not any(found)
    elif format == "alpaca":
        rows = json.loads((Path(folder) / "instruct_demo/alpaca_en_demo.json").read_text(encoding="utf-8"))
        found = [texts.check_texts(asked(f"{row['instruction']}\n{row['input']}", row["output"])) for row in rows]
        codes = [code for codes in found for code in codes]
        # Each was looked at: 21 answers speak of being an AI, one has gaps to fill in, four refuse.
        assert {code: codes.count(code) for code in codes} == {"placeholder_answer": 22, "refusals": 4}
    else:
        files = [Path(folder) / f"self_instruct/{name}.jsonl" for name in ("seed_tasks", "user_oriented_instructions")]
        tasks = [json.loads(line) for path in files for line in path.open(encoding="utf-8")]
        found = [
            texts.check_texts(asked(task["instruction"], one["output"])) for task in tasks for one in task["instances"]
        ]
        assert [codes for codes in found if codes] == [["refusals"]]
