"""How rows spread over domains; over clusters of words where no column names a domain.

A domain column is the one that `data.domain_field` names, otherwise the first of DOMAIN_FIELDS that a row has: text of
at most NAME_CHARACTERS on one line, a whole number, or true/false.  A column is taken for domains only where it says
something: two values or more, and no more than one for ROWS_A_DOMAIN rows.

Entropy is in bits, and as a share of the greatest possible, log2 of the number of domains.

Clusters are of words, cheap and honest about it: TF-IDF of the commonest telling words, k-means on the unit sphere over at
most SAMPLE_ROWS rows, seeded.  They are named by the words that set them apart, and say what rows are about, roughly; no
finding is made of them.

Sources: Sparck Jones 1972 (inverse document frequency); Dhillon and Modha 2001 (spherical k-means); Arthur and
Vassilvitskii 2007 (k-means++).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from onlay.data.audit.catalogue import Tally
from onlay.data.audit.similar import ReadTexts
from onlay.data.audit.words import normalise
from onlay.data.rows import RowTable

DOMAIN_FIELDS = ("domain", "category", "topic", "subject", "intent", "task", "label_text", "label", "language")
NAME_CHARACTERS = 64
ROWS_A_DOMAIN = 3
IMBALANCE_SHARE, IMBALANCE_ENTROPY = 0.5, 0.7
"""Imbalance: one domain holds more than this share, and the entropy is below this share of the greatest possible."""
RARE_ROWS = 10
"""A domain of fewer rows is rare."""
SAMPLE_ROWS, WORDS, ROUNDS = 10_000, 1000, 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Balance:
    kind: Literal["domains", "clusters"]
    """Its name among Audit.shares."""
    shares: dict[str, int]
    """Rows by domain or cluster, most first."""
    measures: dict[str, float]
    told: dict[str, dict[str, object]] = field(default_factory=dict)
    """By code of a finding: what its message names (Tally.findings)."""


def domain_of(values: Mapping[str, Any], *, field: str | None) -> str | None:
    """The domain of a row with these columns; None where it has none.  `field`: data.domain_field; dots step into objects."""
    if field is None:
        return next((name for name in map(_name, map(values.get, DOMAIN_FIELDS)) if name is not None), None)
    if field in values:
        return _name(values[field])
    found: Any = values
    for part in field.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return _name(found)


def _name(value: Any) -> str | None:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if not isinstance(value, str) or not 0 < len(value.strip()) <= NAME_CHARACTERS or "\n" in value.strip():
        return None
    return value.strip().encode("utf-8", "replace").decode()


def measure_domains(table: RowTable, *, among: np.ndarray, tally: Tally) -> Balance | None:
    """Rows by domain, entropy, imbalance and rare domains of the rows of `among` ((N,) bool); None where none are named."""
    members = np.flatnonzero(among & (table.domain >= 0))
    counts = np.bincount(table.domain[members], minlength=len(table.domains))
    number = int(np.count_nonzero(counts))
    if number < 2 or number * ROWS_A_DOMAIN > len(members):
        return None
    order = [at for at in np.argsort(-counts, kind="stable").tolist() if counts[at]]
    measures = _entropy(counts[order], name="domain")
    measures |= {"domains": float(number), "rows_without_domain": float(np.count_nonzero(among) - len(members))}
    told: dict[str, dict[str, object]] = {}
    share = counts[order[0]] / len(members)
    if share > IMBALANCE_SHARE and measures["domain_entropy_share"] < IMBALANCE_ENTROPY:
        _add(tally, "domain_imbalance", members[table.domain[members] == order[0]], table)
        told["domain_imbalance"] = {"domain": table.domains[order[0]], "share": f"{share:.0%}"}
    rare = members[counts[table.domain[members]] < RARE_ROWS]
    if len(rare):
        _add(tally, "rare_domains", rare, table)
        told["rare_domains"] = {"least": RARE_ROWS}
    shares = {table.domains[at]: int(counts[at]) for at in order}
    return Balance(kind="domains", shares=shares, measures=measures, told=told)


def _add(tally: Tally, code: str, rows: np.ndarray, table: RowTable) -> None:
    tally.add_many(code, sources=table.source[rows], numbers=table.number[rows])


def _entropy(counts: np.ndarray, *, name: str) -> dict[str, float]:
    """Of positive counts: bits, and the share of the greatest possible (1 where there is but one)."""
    shares = counts / counts.sum()
    bits = float(-(shares * np.log2(shares)).sum()) if len(counts) > 1 else 0.0
    return {
        f"{name}_entropy_bits": bits, f"{name}_entropy_share": bits / math.log2(len(counts)) if len(counts) > 1 else 1.0
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- clusters


def measure_clusters(table: RowTable, *, among: np.ndarray, read_texts: ReadTexts, seed: int = 0) -> Balance | None:
    """Rows by cluster of words, over all rows of `among` or a seeded sample; None where too few rows have words.

    `measures["clustered_rows"]`: how many rows that is.
    """
    members = np.flatnonzero(among)
    if len(members) > SAMPLE_ROWS:
        members = np.sort(np.random.default_rng(seed).choice(members, SAMPLE_ROWS, replace=False))
    texts = [f"{prompt}\n{answer}" for _, prompt, answer in read_texts(members)]
    names, labels = cluster_texts(texts, seed=seed)
    if len(names) < 2:
        return None
    counts = np.bincount(labels[labels >= 0], minlength=len(names))
    order = np.argsort(-counts, kind="stable").tolist()
    measures = _entropy(counts[order], name="cluster") | {"clustered_rows": float(counts.sum())}
    return Balance(kind="clusters", shares={names[at]: int(counts[at]) for at in order}, measures=measures)


def cluster_texts(texts: Sequence[str], *, seed: int = 0, count: int | None = None) -> tuple[list[str], np.ndarray]:
    """Names of clusters, and (N,) int64: the cluster of each text, -1 where it holds none of the telling words.

    `count`: how many (None: the square root of a fiftieth of the rows, 2 to 12); fewer come out where some stay empty.
    """
    words = [
        Counter(word for word in normalise(text).split() if len(word) > 1 and not word.isdigit()) for text in texts
    ]
    features, vocabulary = _weigh(words)
    labels = np.full(len(texts), -1, dtype=np.int64)
    filled = np.flatnonzero(features.any(axis=1))
    count = count or min(12, max(2, round(math.sqrt(len(filled) / 50))))
    if len(filled) < 2 * count:
        return [], labels
    labels[filled] = _spherical_kmeans(features[filled], count=count, seed=seed)
    used, place = np.unique(labels[filled], return_inverse=True)
    labels[filled] = place
    return _name_clusters(features[filled], place, vocabulary, number=len(used)), labels


def _weigh(words: Sequence[Counter[str]]) -> tuple[np.ndarray, list[str]]:
    """TF-IDF (N, W) float32 with rows of length 1 (or 0), and the W words: in two texts or more, and in at most a quarter."""
    documents: Counter[str] = Counter()
    for counts in words:
        documents.update(counts.keys())
    most = max(2, len(words) // 4)
    telling = [word for word, number in documents.items() if 2 <= number <= most]
    vocabulary = sorted(sorted(telling), key=lambda word: -documents[word])[:WORDS]
    place = {word: at for at, word in enumerate(vocabulary)}
    features = np.zeros((len(words), len(vocabulary)), dtype=np.float32)
    for row, counts in enumerate(words):
        for word, times in counts.items():
            if word in place:
                features[row, place[word]] = (1 + math.log(times)) * math.log(len(words) / documents[word])
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    return np.divide(features, lengths, out=features, where=lengths > 0), vocabulary


def _spherical_kmeans(features: np.ndarray, *, count: int, seed: int) -> np.ndarray:
    """(N,) int64: the nearest of `count` centres by cosine; at most ROUNDS rounds from a k-means++ start."""
    random = np.random.default_rng(seed)
    centres = features[[int(random.integers(len(features)))]]
    for _ in range(count - 1):
        far = np.clip(1 - (features @ centres.T).max(axis=1), 0, None).astype(np.float64)
        if not far.any():
            break
        centres = np.concatenate([centres, features[[int(random.choice(len(features), p=far / far.sum()))]]])
    labels = np.full(len(features), -1, dtype=np.int64)
    for _ in range(ROUNDS):
        nearest = (features @ centres.T).argmax(axis=1)
        if np.array_equal(nearest, labels):
            break
        labels = nearest
        for at in range(len(centres)):
            total = features[labels == at].sum(axis=0)
            length = float(np.linalg.norm(total))
            if length:
                centres[at] = total / length
    return labels


def _name_clusters(features: np.ndarray, labels: np.ndarray, vocabulary: list[str], *, number: int) -> list[str]:
    """Three words each: those whose mean weight inside the cluster most exceeds that over all rows; every name once."""
    overall = features.mean(axis=0)
    names: list[str] = []
    for at in range(number):
        ranked = np.argsort(overall - features[labels == at].mean(axis=0), kind="stable").tolist()
        words = [vocabulary[place] for place in ranked[:3]]
        name = ", ".join(words)
        names.append(name if name not in names else f"{name} ({names.count(name) + 1})")
    return names
