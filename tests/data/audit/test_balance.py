from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from onlay.data.audit.balance import (
    RARE_ROWS,
    SAMPLE_ROWS,
    Balance,
    cluster_texts,
    domain_of,
    measure_clusters,
    measure_domains,
)
from onlay.data.audit.catalogue import Tally
from tests.data.audit.rows import Rows

TOPICS = {
    "cooking": "bake oven flour sugar butter dough knead whisk recipe simmer",
    "sailing": "mast sail harbour anchor tide rudder keel wind rigging deck",
    "law": "court judge statute appeal verdict contract plaintiff clause tort evidence",
}


def domains(counts: dict[str | None, int]) -> tuple[Balance | None, Tally]:
    names = [name for name, count in counts.items() for _ in range(count)]
    rows = Rows([(f"q {number}", "a") for number in range(len(names))], domains=names)
    tally = Tally()
    return measure_domains(rows.table(), among=np.ones(len(names), dtype=bool), tally=tally), tally


@pytest.mark.parametrize(
    ("values", "field", "domain"),
    [
        ({"prompt": "x", "category": "qa"}, None, "qa"),
        ({"label": 3, "domain": " law "}, None, "law"),
        ({"label": True}, None, "true"),
        ({"domain": "", "topic": "tea"}, None, "tea"),
        ({"topic": "a" * 65}, None, None),
        ({"topic": "two\nlines"}, None, None),
        ({"topic": ["a"], "task": 1.5}, None, None),
        ({"prompt": "x"}, None, None),
        ({"category": "qa", "kind": "bank"}, "kind", "bank"),
        ({"category": "qa"}, "kind", None),
        ({"meta": {"kind": "bank"}}, "meta.kind", "bank"),
        ({"meta": "bank"}, "meta.kind", None),
        ({"meta.kind": "flat"}, "meta.kind", "flat"),
        ({"domain": "half \ud800"}, None, "half ?"),
    ],
)
def test_the_domain_of_a_row(values: dict[str, Any], field: str | None, domain: str | None) -> None:
    assert domain_of(values, field=field) == domain


def test_even_domains_have_all_the_entropy_there_can_be() -> None:
    balance, tally = domains({"a": 50, "b": 50, "c": 50, "d": 50})
    assert balance is not None
    assert balance.kind == "domains"
    assert balance.shares == {"a": 50, "b": 50, "c": 50, "d": 50}
    assert balance.measures["domain_entropy_bits"] == pytest.approx(2)
    assert balance.measures["domain_entropy_share"] == pytest.approx(1)
    assert tally.findings(["f"], told=balance.told) == []


def test_one_domain_that_rules_is_named() -> None:
    balance, tally = domains({"rare": 4, "most": 180, "some": 16, None: 7})
    assert balance is not None
    assert list(balance.shares.items()) == [("most", 180), ("some", 16), ("rare", 4)]
    assert balance.measures["rows_without_domain"] == 7
    assert balance.measures["domains"] == 3
    found = {finding.code: finding for finding in tally.findings(["f"], told=balance.told)}
    assert set(found) == {"domain_imbalance", "rare_domains"}
    assert found["domain_imbalance"].count == 180
    assert "most: 90%" in found["domain_imbalance"].message
    assert found["rare_domains"].count == 4
    assert str(RARE_ROWS) in found["rare_domains"].message


def test_more_than_half_is_no_imbalance_among_many_domains() -> None:
    _, tally = domains({"big": 55, **{f"d{number}": 15 for number in range(3)}})
    assert tally.count("domain_imbalance") == 0
    _, tally = domains({"big": 85, "small": 15})
    assert tally.count("domain_imbalance") == 85


@pytest.mark.parametrize("counts", [{"only": 30}, {None: 30}, {f"d{number}": 1 for number in range(30)}, {}])
def test_a_column_that_divides_nothing_is_no_domain_column(counts: dict[str | None, int]) -> None:
    balance, tally = domains(counts)
    assert balance is None
    assert tally.findings(["f"]) == []


def test_domains_of_other_rows_do_not_count() -> None:
    rows = Rows([(f"q {number}", "a") for number in range(40)], domains=["a", "b"] * 15 + ["c"] * 10)
    among = np.arange(40) < 30
    balance = measure_domains(rows.table(), among=among, tally=Tally())
    assert balance is not None
    assert balance.shares == {"a": 15, "b": 15}


def topical(rows: int, *, seed: int = 0) -> tuple[list[tuple[str, str]], list[str]]:
    chance = random.Random(seed)
    names = [chance.choice(list(TOPICS)) for _ in range(rows)]
    texts = [(" ".join(chance.choices(TOPICS[name].split(), k=6)), "the same answer to all") for name in names]
    return texts, names


def test_clusters_are_the_topics_and_named_by_their_words() -> None:
    texts, topics = topical(300)
    names, labels = cluster_texts([" ".join(text) for text in texts], count=3)
    assert len(names) == len(set(names)) == 3
    for cluster, name in enumerate(names):
        mine = {topic for topic, label in zip(topics, labels.tolist(), strict=True) if label == cluster}
        assert len(mine) == 1
        assert set(name.split(", ")) <= set(TOPICS[mine.pop()].split())
    again, same = cluster_texts([" ".join(text) for text in texts], count=3)
    assert again == names
    assert np.array_equal(same, labels)


def test_rows_without_a_domain_are_balanced_by_cluster() -> None:
    texts, _ = topical(400)
    rows = Rows([*texts, ("?", "!")])
    balance = measure_clusters(rows.table(), among=np.ones(401, dtype=bool), read_texts=rows.read_texts)
    assert balance is not None
    assert balance.kind == "clusters"
    assert sum(balance.shares.values()) == balance.measures["clustered_rows"] == 400
    assert list(balance.shares.values()) == sorted(balance.shares.values(), reverse=True)
    assert 0 < balance.measures["cluster_entropy_share"] <= 1
    assert balance.told == {}


@pytest.mark.parametrize("texts", [[], [("a", "b")], [("same words", "here")] * 50, [("1 2 3", "4")] * 50])
def test_too_little_to_cluster_gives_none(texts: list[tuple[str, str]]) -> None:
    rows = Rows(texts)
    assert measure_clusters(rows.table(), among=np.ones(len(texts), dtype=bool), read_texts=rows.read_texts) is None


def test_large_data_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    assert SAMPLE_ROWS >= 1000
    monkeypatch.setattr("onlay.data.audit.balance.SAMPLE_ROWS", 100)
    texts, _ = topical(500)
    rows = Rows(texts)
    balance = measure_clusters(rows.table(), among=np.arange(500) >= 50, read_texts=rows.read_texts)
    assert balance is not None
    assert len(rows.read) == balance.measures["clustered_rows"] == 100
    assert min(rows.read) >= 50
