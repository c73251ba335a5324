from __future__ import annotations

import random
from decimal import Decimal

import numpy as np
import pytest

from onlay.data.audit.catalogue import Tally
from onlay.data.audit.overlap import (
    NGRAM_WORDS,
    SharedNgrams,
    find_contradictions,
    find_duplicates,
    find_leakage,
    ngrams_of,
    number_in,
    shared_ngrams,
    without_boilerplate,
)
from onlay.data.audit.similar import find_clusters
from onlay.data.audit.words import find_boilerplate
from onlay.data.read import Conversation, Document, Turn
from onlay.records import Group
from tests.data.audit.rows import WORDS, Rows, conversation, sentence

FILES = ["data.jsonl"]


def numbers(tally: Tally, code: str) -> list[int]:
    """Rows by place in `Rows`, from 0."""
    return [number - 1 for _, number in tally.rows(code)]


def contradictions(rows: Rows) -> tuple[Tally, list[Group]]:
    tally = Tally()
    groups = find_contradictions(
        rows.fingerprints(), rows.table(), among=np.ones(len(rows.items), dtype=bool), read_texts=rows.read_texts,
        files=FILES, tally=tally,
    )  # fmt: skip
    return tally, groups


def leakage(
    rows: Rows,
    *,
    train: int,
    prefix: str = "leakage",
    threshold: float | None = 0.8,
    boilerplate: np.ndarray | None = None,
) -> tuple[Tally, list[Group]]:
    """The first `train` rows against the others."""
    tally = Tally()
    is_train = np.arange(len(rows.items)) < train
    known = ngrams_of(rows.items[train:])
    groups = find_leakage(
        rows.fingerprints(boilerplate=boilerplate), rows.table(), train=is_train, held_out=~is_train,
        shared=shared_ngrams(rows.items[:train], known), known=known, threshold=threshold, read_texts=rows.read_texts,
        files=FILES, tally=tally, prefix=prefix,
    )  # fmt: skip
    return tally, groups


# --------------------------------------------------------------------------------------------------------- duplicates


def test_exact_and_near_duplicates_are_counted_apart_and_shown_together() -> None:
    chance = random.Random(0)
    text = sentence(chance, 60)
    rows = Rows(
        [(text, "yes"), ("other", "row"), (text.upper(), "Yes!"), (text + " more", "yes"), (text + " More", "yes")]
    )
    tally = Tally()
    clusters = find_clusters(rows.fingerprints(), rows.table(), threshold=0.8, read_texts=rows.read_texts)
    groups, sizes = find_duplicates(
        clusters, rows.table(), among=np.ones(5, dtype=bool), read_texts=rows.read_texts, files=FILES, tally=tally
    )
    assert numbers(tally, "duplicates_exact") == [2, 4]
    assert numbers(tally, "duplicates_near") == [3]
    assert sizes.tolist() == [4]
    assert [(group.code, group.count) for group in groups] == [("duplicates_near", 4)]
    assert [row.place for row in groups[0].rows] == [f"data.jsonl:{row}" for row in (1, 3, 4, 5)]
    assert groups[0].texts[0] == f"{text}\n\nyes"


def test_the_largest_clusters_are_shown_and_rows_outside_are_not_counted() -> None:
    rows = Rows([*[("one", "1")] * 2, *[("two", "2")] * 6, ("three", "3"), *[("four", "4")] * 3])
    among = np.ones(12, dtype=bool)
    among[0] = False
    tally = Tally()
    clusters = find_clusters(rows.fingerprints(), rows.table(), threshold=0.8, among=among, read_texts=rows.read_texts)
    groups, sizes = find_duplicates(
        clusters, rows.table(), among=among, read_texts=rows.read_texts, files=FILES, tally=tally, shown=1
    )
    assert sorted(sizes.tolist()) == [3, 6]
    assert [(group.code, group.count, len(group.rows)) for group in groups] == [("duplicates_exact", 6, 4)]
    assert tally.count("duplicates_exact") == 7


def test_rows_without_duplicates_give_none() -> None:
    rows = Rows([("one", "1"), ("two", "2")])
    tally = Tally()
    groups, sizes = find_duplicates(
        np.arange(2), rows.table(), among=np.ones(2, dtype=bool), read_texts=rows.read_texts, files=FILES, tally=tally
    )
    assert (groups, len(sizes), tally.findings(FILES)) == ([], 0, [])


# ------------------------------------------------------------------------------------------------------ contradictions


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("4", "4"), ("4.0", "4"), (" $1,200.50 ", "1200.50"), ("-5", "-5"), ("50 %", "50"), ("So:\n#### 18", "18"),
        (r"Thus \boxed{7}.", "7"), ("12.", "12"), ("four", None), ("4 apples", None), ("1 2", None), ("", None),
        ("#### none", None), ("3-4", None),
    ],
)  # fmt: skip
def test_numbers_in_answers(answer: str, number: str | None) -> None:
    assert number_in(answer) == (None if number is None else Decimal(number))


def test_equal_prompts_with_other_answers_are_grouped() -> None:
    rows = Rows(
        [
            ("Is it open?", "Yes."), ("What is 2+2?", "4"), ("is it open", "No."), ("What is 2 + 2?", "4.0"),
            ("Is it  OPEN?", "yes"), ("What is 2-2?", "0"), ("alone", "here"),
        ]
    )  # fmt: skip
    tally, groups = contradictions(rows)
    assert numbers(tally, "contradictory_answers") == [0, 2, 4]
    assert len(groups) == 1
    assert groups[0].prompt == "Is it open?"
    assert groups[0].count == 3
    assert groups[0].texts == ["Yes.", "No.", "yes"]
    assert [row.row for row in groups[0].rows] == [1, 3, 5]


def test_worked_answers_that_end_in_the_same_number_agree() -> None:
    rows = Rows([("q", "3 and 4 make 7.\n#### 7"), ("q", "It is seven: 7.0\n#### 7.0")])
    assert contradictions(rows)[0].findings(FILES) == []
    assert contradictions(Rows([("q", "x\n#### 7"), ("q", "x\n#### -7")]))[0].count("contradictory_answers") == 2


def test_another_system_message_may_ask_for_another_answer() -> None:
    rows = Rows([conversation("Hello", "Yes", system="Be kind."), conversation("Hello", "No", system="Be rude.")])
    assert contradictions(rows)[0].count("contradictory_answers") == 0


def test_other_tools_may_ask_for_another_answer() -> None:
    prompt = sentence(random.Random(0), 40)
    turns = [(Turn("user", prompt), Turn("assistant", answer)) for answer in ("yes", "no", "no")]
    tools: list[dict[str, object]] = [{"name": "find"}, {"name": "seek"}, {"name": "find"}]
    rows = Rows([Conversation(some, (tool,)) for some, tool in zip(turns, tools, strict=True)])
    assert numbers(contradictions(rows)[0], "contradictory_answers") == [0, 2]
    ends = ("", "", " x")
    longer = [(Turn("user", prompt + more), answered) for (_, answered), more in zip(turns, ends, strict=True)]
    rows = Rows([Conversation(some, (tool,)) for some, tool in zip(longer, tools, strict=True)])
    assert numbers(contradictions(rows)[0], "contradictory_answers_near") == [0, 2]


def test_a_group_shows_its_different_answers_first() -> None:
    rows = Rows([*[("Which?", "this")] * 50, ("Which?", "that")])
    tally, groups = contradictions(rows)
    assert tally.count("contradictory_answers") == 51
    assert "that" in groups[0].texts
    assert len(groups[0].texts) == 4


def test_documents_have_no_answers_to_contradict() -> None:
    tally, groups = contradictions(Rows([Document("one text"), Document("one text")]))
    assert (tally.findings(FILES), groups) == ([], [])


def test_nearly_equal_prompts_with_other_answers_are_a_note() -> None:
    chance = random.Random(1)
    text, other = sentence(chance, 80), sentence(chance, 80)
    rows = Rows(
        [
            (text, "yes"), (text + " please", "no"),
            (other + " for 3 people", "yes"), (other + " for 4 people", "no"),
            (sentence(chance, 80), "maybe"),
        ]
    )  # fmt: skip
    tally, groups = contradictions(rows)
    assert numbers(tally, "contradictory_answers_near") == [0, 1], "other numbers ask something else"
    assert [group.code for group in groups] == ["contradictory_answers_near"]
    assert groups[0].texts == [f"{text}\n\nyes", f"{text} please\n\nno"]
    assert tally.count("contradictory_answers") == 0


# ------------------------------------------------------------------------------------------------------------ leakage


def test_a_row_is_reported_under_its_worst_tier_alone() -> None:
    chance = random.Random(2)
    exact, near, answer, quoted = (sentence(chance, 60) for _ in range(4))
    passage = sentence(chance, NGRAM_WORDS)
    train = [
        (exact.upper() + "!", "another answer"),
        (near + " extra", "another answer"),
        ("How come?", answer),
        (f"{sentence(chance, 30)} {passage} {sentence(chance, 30)}", "yes"),
        (f"{sentence(chance, 30)} {quoted.rsplit(' ', 49)[0]}", sentence(chance, 30)),
        (sentence(chance, 60), sentence(chance, 20)),
    ]
    held_out = [
        (exact, "yes"), (near, "no"), ("Why is that so?", answer), (f"{passage} and then", "no"), (quoted, "right"),
    ]  # fmt: skip
    rows = Rows(train + held_out)
    for prefix in ("leakage", "benchmark"):
        tally, groups = leakage(rows, train=len(train), prefix=prefix)
        assert numbers(tally, f"{prefix}_exact") == [0]
        assert numbers(tally, f"{prefix}_near") == [1, 2]
        assert numbers(tally, f"{prefix}_ngrams") == [3], "11 words in a row are too few"
        tiers = [group.code.removeprefix(f"{prefix}_") for group in groups]
        assert tiers == ["exact", "near", "near", "ngrams"]
        assert groups[3].texts == [passage]
        assert [row.row for row in groups[3].rows] == [4]
        assert [row.row for row in groups[0].rows] == [1, 7]
        assert groups[1].texts[1] == f"{near}\n\nno"


def test_a_system_message_does_not_hide_leakage() -> None:
    rows = Rows([conversation("What is it?", "a", system="Be brief."), conversation("what is it", "b")])
    assert numbers(leakage(rows, train=1)[0], "leakage_exact") == [0]


def test_without_a_threshold_or_n_grams_the_first_tier_remains() -> None:
    chance = random.Random(3)
    text = sentence(chance, 60)
    rows = Rows([(text, "a"), (text + " end", "a"), (text, "b")])
    tally = Tally()
    is_train = np.array([True, True, False])
    find_leakage(
        rows.fingerprints(), rows.table(), train=is_train, held_out=~is_train, shared=None,
        known=np.zeros(0, dtype=np.uint64), threshold=None, read_texts=rows.read_texts, files=FILES, tally=tally,
        prefix="leakage",
    )  # fmt: skip
    assert [finding.code for finding in tally.findings(FILES)] == ["leakage_exact"]
    assert numbers(tally, "leakage_exact") == [0]


def test_nothing_held_out_leaks_nothing() -> None:
    rows = Rows([("a b c", "d")])
    assert leakage(rows, train=1)[0].findings(FILES) == []
    assert leakage(rows, train=0)[0].findings(FILES) == []


def test_an_instruction_that_most_rows_share_does_not_leak() -> None:
    chance = random.Random(4)
    instruction = sentence(chance, 60)
    rows = Rows([(f"{instruction} {sentence(chance, 12)}", "yes") for _ in range(300)])
    boilerplate = find_boilerplate(rows.items[:280])
    tally, _ = leakage(rows, train=280, boilerplate=boilerplate)
    assert tally.findings(FILES) == []
    leaked = Rows([*rows.items[:279], rows.items[299], *rows.items[280:]])
    tally, _ = leakage(leaked, train=280, boilerplate=boilerplate)
    assert [(finding.code, finding.count) for finding in tally.findings(FILES)] == [("leakage_exact", 1)]


def test_a_shared_passage_is_found_beside_a_template() -> None:
    chance = random.Random(5)
    template, passage = sentence(chance, 40), sentence(chance, NGRAM_WORDS + 2)
    train = [(f"{template} {sentence(chance, 40)}", "yes") for _ in range(200)]
    train[77] = (f"{template} {sentence(chance, 20)} {passage} {sentence(chance, 20)}", "yes")
    rows = Rows([*train, (f"{template} {passage} {sentence(chance, 30)}", "no")])
    tally, _ = leakage(rows, train=200, boilerplate=find_boilerplate(rows.items[:200]))
    assert numbers(tally, "leakage_ngrams") == [77]


def test_sums_that_are_alike_are_no_leakage() -> None:
    sums = "5 + 5 = <<5+5=10>>10, 10 * 2 = <<10*2=20>>20, 20 - 1 = <<20-1=19>>19"
    rows = Rows([("Ann has coins", f"Then {sums}"), ("Bob buys tea", f"So {sums}")])
    assert leakage(rows, train=1, threshold=None)[0].findings(FILES) == []


def test_long_documents_share_passages() -> None:
    chance = random.Random(6)
    book = sentence(chance, 20_000)
    words = book.split()
    rows = Rows([Document(book), Document(sentence(chance, 20_000)), Document(" ".join(words[9000:9013]))])
    tally, _ = leakage(rows, train=2)
    assert numbers(tally, "leakage_ngrams") == [0]
    rows = Rows([Document(book), Document(book + " the end")])
    assert numbers(leakage(rows, train=1)[0], "leakage_near") == [0]


def test_parts_of_several_workers_join() -> None:
    chance = random.Random(7)
    passages = [sentence(chance, NGRAM_WORDS + number % 3) for number in range(30)]
    train = [conversation(chance.choice(passages), sentence(chance, 20)) for _ in range(100)]
    known = ngrams_of([Document(" ".join(passages[:15]))])
    assert (np.diff(known.astype(object)) > 0).all()
    whole = shared_ngrams(train, known)
    joined = SharedNgrams.joined([shared_ngrams(train[start : start + 33], known) for start in range(0, 100, 33)])
    assert 0 < whole.rows.sum() < 100
    assert np.array_equal(whole.rows, joined.rows)


def test_an_n_gram_repeated_in_one_row_is_no_template() -> None:
    passage = " ".join(WORDS[:NGRAM_WORDS])
    rows = Rows([Document(f"{passage} x " * 50), Document(f"y {passage} z z z z z z z z z z z z")])
    assert numbers(leakage(rows, train=1)[0], "leakage_ngrams") == [0]


def test_n_grams_of_templates_are_not_looked_for() -> None:
    passage, rare = " ".join(WORDS[:NGRAM_WORDS]), " ".join(WORDS[50 : 50 + NGRAM_WORDS])
    sample = [conversation(f"{passage} {number}", f"{rare} y" if number < 3 else "z") for number in range(100)]
    known = ngrams_of([Document(passage), Document(rare)])
    assert len(known) == 2
    kept = without_boilerplate(known, sample)
    assert np.array_equal(kept, ngrams_of([Document(rare)]))
