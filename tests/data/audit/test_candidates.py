from __future__ import annotations

import random

import numpy as np
import pytest

import onlay.data.audit.candidates as candidates
from onlay.data.audit.candidates import Pairs, choose_bands, estimate, similar_across, similar_pairs
from onlay.data.audit.similar import PROMPT_SLOTS, find_clusters, similarity
from tests.data.audit.rows import WORDS, Rows, edited, many_rows, sentence, truly_similar


def test_a_bucket_of_all_rows_is_not_compared_with_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(WORDS[:60])
    rows = Rows([(f"{text} {number}", "a b c") for number in range(3000)])
    compared = 0
    real = estimate

    def counting(slots: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        nonlocal compared
        compared += len(first)
        return real(slots, first, second)

    fingerprints, table = rows.fingerprints(), rows.table()
    monkeypatch.setattr(candidates, "estimate", counting)
    clusters = find_clusters(fingerprints, table, threshold=0.8, read_texts=rows.read_texts)
    assert set(clusters.tolist()) == {0}
    bands, _ = choose_bands(0.8, slots=candidates.ROW_SLOTS)
    assert compared <= len(table) * bands * (candidates.WINDOW + 2)


def test_across_finds_the_held_out_row() -> None:
    chance = random.Random(4)
    texts = [(sentence(chance, 50), sentence(chance, 20)) for _ in range(300)]
    texts += [(edited(chance, prompt, edits=1), answer) for prompt, answer in texts[:40]]
    rows = Rows(texts)
    held_out = np.arange(300, 340)
    pairs = similar_across(rows.fingerprints().rows, np.arange(300), held_out, threshold=0.8)
    assert set(zip(pairs.row.tolist(), pairs.other.tolist(), strict=True)) == {(row, 300 + row) for row in range(40)}
    none = similar_across(rows.fingerprints().rows, np.arange(300), held_out[:0], threshold=0.8)
    assert len(none) == 0


def test_bands_are_long_and_miss_little() -> None:
    assert choose_bands(0.8, slots=128) == (21, 6)
    assert choose_bands(1.0, slots=128) == (1, 128)
    for threshold in np.linspace(0.5, 0.99, 20).tolist():
        for slots in (candidates.ROW_SLOTS, PROMPT_SLOTS):
            bands, length = choose_bands(threshold, slots=slots)
            assert bands * length <= slots
            assert 1 - (1 - threshold**length) ** bands >= candidates.CANDIDATE_RECALL


def test_estimates_are_near_the_truth() -> None:
    rows = many_rows(rows=300, words=(30, 60), edits=8, seed=11)
    fingerprints = rows.fingerprints()
    pairs = sorted(truly_similar(rows, 0.3))
    one, other = np.array(pairs).T
    true = np.array([similarity(rows.texts[first], rows.texts[second]) for first, second in pairs])
    errors = estimate(fingerprints.rows, one, other) - true
    assert abs(errors.mean()) < 0.01
    assert errors.std() < 0.044


def test_of_a_rows_pairs_the_likeliest_stay_each_once() -> None:
    slots = np.zeros((20, candidates.ROW_SLOTS), dtype=np.uint8)
    for row in range(20):
        slots[row, :row] = 1
    first, second = np.full(24, 10), np.array([*range(10), *range(10), *range(4)])
    found = Pairs.none().with_more(slots, first, second, least=0).pruned()
    assert found.row.tolist() == [10] * 4
    assert found.other.tolist() == [9, 8, 7, 6]
    assert found.estimate.tolist() == sorted(found.estimate.tolist(), reverse=True)
    assert found.rows.tolist() == [6, 7, 8, 9, 10]


def test_pruning_on_the_way_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = many_rows(rows=500, words=(20, 40), edits=3, seed=9).fingerprints().rows
    at_the_end = similar_pairs(slots, np.arange(500), threshold=0.5)
    monkeypatch.setattr(candidates, "MANY_PAIRS", 0)
    on_the_way = similar_pairs(slots, np.arange(500), threshold=0.5)
    assert len(at_the_end) > 100
    for name in ("row", "other", "estimate"):
        assert np.array_equal(getattr(at_the_end, name), getattr(on_the_way, name))
    assert len(similar_pairs(slots, np.arange(0), threshold=0.8)) == 0
