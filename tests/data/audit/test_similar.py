from __future__ import annotations

import pickle
import random
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

import onlay.data.audit.similar as similar
from onlay.data.audit.similar import Fingerprints, find_clusters, fingerprint, similarity
from onlay.data.audit.words import find_boilerplate
from onlay.data.read import Conversation, Document, Turn
from tests.data.audit.rows import WORDS, Rows, edited, many_rows, sentence, truly_similar


@pytest.mark.parametrize(
    ("threshold", "words", "edits"),
    [(0.5, (20, 40), 5), (0.8, (20, 40), 3), (0.8, (3, 9), 1), (0.8, (80, 200), 12), (0.95, (80, 200), 2)],
)
def test_similar_rows_are_found_and_no_others(threshold: float, words: tuple[int, int], edits: int) -> None:
    rows = many_rows(rows=1200, words=words, edits=edits, seed=3)
    clusters = find_clusters(rows.fingerprints(), rows.table(), threshold=threshold, read_texts=rows.read_texts)
    pairs = truly_similar(rows, threshold)
    assert len(pairs) > 20
    found = sum(clusters[one] == clusters[two] for one, two in pairs)
    assert found >= 0.98 * len(pairs)
    reported = {row for row in range(len(rows.texts)) if clusters[row] != row}
    assert len(reported & {row for pair in pairs for row in pair}) >= 0.98 * len(reported)
    assert (clusters <= np.arange(len(clusters))).all()
    assert np.array_equal(clusters[clusters], clusters), "a cluster is named by its first row"


def test_threshold_one_takes_equal_sets_of_shingles_alone() -> None:
    rows = Rows([("a b c " * 2, "x"), ("a b c " * 3, "x"), ("a b c " * 3, "x y")])
    clusters = find_clusters(rows.fingerprints(), rows.table(), threshold=1.0, read_texts=rows.read_texts)
    assert clusters.tolist() == [0, 0, 2]


def test_only_rows_near_the_threshold_are_read_again() -> None:
    chance = random.Random(1)
    text = sentence(chance, 100)
    rows = Rows(
        [(text, "a b c d e"), (text + " end", "a b c d e"), *((sentence(chance, 50), "x y z") for _ in range(200))]
    )
    clusters = find_clusters(rows.fingerprints(), rows.table(), threshold=0.8, read_texts=rows.read_texts)
    assert clusters[1] == 0
    assert rows.read == []


def test_equal_rows_cluster_without_any_shingles() -> None:
    rows = Rows([("?", "!"), ("a b c", "d"), ("?", "!"), ("!", "?"), ("A, b c", "d.")])
    clusters = find_clusters(rows.fingerprints(), rows.table(), threshold=0.8, read_texts=rows.read_texts)
    assert clusters.tolist() == [0, 1, 0, 3, 1]


def test_rows_outside_among_stay_alone() -> None:
    text = " ".join(WORDS[:40])
    rows = Rows([(text, "a"), (text, "a"), (text + " end", "a"), (text, "a")])
    among = np.array([False, True, True, True])
    clusters = find_clusters(rows.fingerprints(), rows.table(), threshold=0.8, among=among, read_texts=rows.read_texts)
    assert clusters.tolist() == [0, 1, 1, 1]


def test_other_questions_with_the_same_answer_are_other_rows() -> None:
    answer = " ".join(WORDS[:60])
    rows = Rows([("hi", answer), ("Who are you?", answer), ("Who are you, please?", answer), ("hi", answer + " end")])
    clusters = find_clusters(rows.fingerprints(), rows.table(), threshold=0.8, read_texts=rows.read_texts)
    assert clusters.tolist() == [0, 1, 1, 0]


def test_a_chain_of_templated_rows_does_not_become_one_cluster() -> None:
    words = WORDS[:400]
    rows = Rows([(" ".join(words[start : start + 60]), "x y z") for start in range(0, 300, 4)])
    clusters = find_clusters(rows.fingerprints(), rows.table(), threshold=0.8, read_texts=rows.read_texts)
    assert similarity(rows.texts[0], rows.texts[1]) >= 0.8
    assert len(set(clusters.tolist())) > 5
    for row, first in enumerate(clusters.tolist()):
        assert similarity(rows.texts[row], rows.texts[first]) >= 0.4


def test_boilerplate_of_prompts_makes_no_duplicates() -> None:
    chance = random.Random(2)
    instruction = " ".join(WORDS[:80])
    rows = Rows([(f"{instruction} {sentence(chance, 8)}", "yes") for _ in range(300)])
    without = find_clusters(rows.fingerprints(), rows.table(), threshold=0.8, read_texts=rows.read_texts)
    assert len(set(without.tolist())) < 50, "the instruction alone makes them similar"
    boilerplate = find_boilerplate(rows.items)
    fingerprints = rows.fingerprints(boilerplate=boilerplate)
    clusters = find_clusters(fingerprints, rows.table(), threshold=0.8, read_texts=rows.read_texts)
    assert len(set(clusters.tolist())) == 300
    assert similarity(rows.texts[0], rows.texts[1]) > 0.8 > similarity(*rows.texts[:2], boilerplate=boilerplate)


def test_rows_with_other_tools_are_no_duplicates() -> None:
    text = sentence(random.Random(3), 60)
    turns = [(Turn("user", text), Turn("assistant", answer)) for answer in ("yes", "yes", "yes and no", "yes and no")]
    tools = [{"name": "find"}, {"name": "seek"}, {"name": "find"}, {"name": "seek"}]
    rows = Rows([Conversation(some, (tool,)) for some, tool in zip(turns, tools, strict=True)])
    clusters = find_clusters(rows.fingerprints(), rows.table(), threshold=0.8, read_texts=rows.read_texts)
    assert clusters.tolist() == [0, 1, 0, 1]


def test_documents_are_compared_with_what_they_have_in_common() -> None:
    chance = random.Random(4)
    licence, body = " ".join(WORDS[:40]), sentence(chance, 40)
    rows = Rows(
        [
            *[Document(f"{licence} {sentence(chance, 40)}") for _ in range(200)],
            Document(f"{licence} {body}"),
            Document(f"{licence} {edited(chance, body, edits=2)}"),
            *[(f"{licence} {sentence(chance, 40)}", "yes") for _ in range(200)],
        ]
    )
    boilerplate = find_boilerplate(rows.items)
    assert len(boilerplate) and similarity(rows.texts[200], rows.texts[201]) >= 0.8
    fingerprints = rows.fingerprints(boilerplate=boilerplate)
    clusters = find_clusters(fingerprints, rows.table(), threshold=0.8, read_texts=rows.read_texts)
    assert clusters[201] == 200 and len(set(clusters.tolist())) == 401
    # The same where rows are read again to be compared exactly.
    shingles = similar.Shingles(
        np.array([200, 201]), read_texts=rows.read_texts, boilerplate=boilerplate, prompts=False
    )
    measured = shingles.jaccard(np.array([200]), np.array([201]))[0]
    assert measured == pytest.approx(similarity(rows.texts[200], rows.texts[201]))


def test_when_too_many_rows_are_unsure_the_estimate_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = many_rows(rows=600, words=(20, 40), edits=3, seed=5)
    fingerprints, table = rows.fingerprints(), rows.table()
    exact = find_clusters(fingerprints, table, threshold=0.8, read_texts=rows.read_texts)
    everything = len(rows.read)
    monkeypatch.setattr(similar, "ROWS_READ_AGAIN", 10)
    rows.read.clear()
    rough = find_clusters(fingerprints, table, threshold=0.8, read_texts=rows.read_texts)
    assert 0 < len(rows.read) <= 10 < everything
    assert (exact == rough).mean() > 0.95


def test_long_rows_are_compared_by_a_sketch_of_known_error(monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(7)
    text = sentence(chance, 5000)
    texts = [(text, "a"), (edited(chance, text, edits=150), "a"), (edited(chance, text, edits=1500), "a")]
    rows = Rows(texts)
    for most, error in ((similar.SKETCH_SHINGLES, 0.06), (1 << 20, 1e-9)):
        monkeypatch.setattr(similar, "SKETCH_SHINGLES", most)
        monkeypatch.setattr(similar, "SKETCH_BYTES", most * 12)
        shingles = similar.Shingles(
            np.arange(3), read_texts=rows.read_texts, boilerplate=np.zeros(0, dtype=np.uint64), prompts=False
        )
        for one, other in ((0, 1), (0, 2), (1, 2)):
            measured = shingles.jaccard(np.array([one]), np.array([other]))[0]
            assert measured == pytest.approx(similarity(texts[one], texts[other]), abs=error)


def test_pairs_compared_together_are_as_pairs_compared_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows([("a b c d", "e"), ("a b c d", "f"), ("", ""), ("x", "y"), ("a b c d e f g", "")])
    monkeypatch.setattr(similar, "ROWS_AT_ONCE", 2)
    shingles = similar.Shingles(
        np.arange(5), read_texts=rows.read_texts, boilerplate=np.zeros(0, dtype=np.uint64), prompts=False
    )
    pairs = np.array([(one, other) for one in range(5) for other in range(5) if one != other])
    together = shingles.jaccard(pairs[:, 0], pairs[:, 1])
    for (one, other), measured in zip(pairs.tolist(), together.tolist(), strict=True):
        assert measured == pytest.approx(similarity(rows.texts[one], rows.texts[other])), (one, other)


def test_parts_of_several_workers_join_to_the_same_fingerprints() -> None:
    rows = many_rows(rows=100, words=(5, 20), edits=2, seed=1)
    boilerplate = find_boilerplate(rows.items)
    whole = rows.fingerprints(boilerplate=boilerplate)
    parts = [fingerprint(rows.items[start : start + 30], boilerplate=boilerplate) for start in range(0, 100, 30)]
    joined = Fingerprints.joined([pickle.loads(pickle.dumps(part)) for part in parts])
    assert len(joined) == 100
    for name in ("rows", "prompts", "row_shingles", "prompt_shingles", "asked", "tools", "boilerplate"):
        assert np.array_equal(getattr(joined, name), getattr(whole, name)), name
    assert len(fingerprint([])) == 0


def test_nothing_is_similar_to_nothing() -> None:
    def unread(rows: np.ndarray) -> Iterator[tuple[int, str, str]]:
        assert not len(rows)
        return iter(())

    rows = Rows([])
    assert find_clusters(rows.fingerprints(), rows.table(), threshold=0.8, read_texts=unread).tolist() == []


def test_rows_with_fewer_words_than_a_shingle_compare_whole() -> None:
    texts: Sequence[tuple[str, str]] = [("hi", ""), ("Hi!", ""), ("hi there", ""), ("there hi", "")]
    assert similarity(texts[0], texts[1]) == 1
    assert similarity(texts[0], texts[2]) == 0
    assert similarity(texts[2], texts[3]) == 0
    assert similarity(("", ""), ("", "")) == 0
