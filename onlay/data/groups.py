"""Which rows must stay on one side of a split, and which groups of them are held out.

Rows stay together when their prompts are equal (after normalising) or when they are in one cluster of near-duplicates;
both relations chain.  A cluster of templated rows may chain until it holds most of a file: one that is too large to be
held out is divided by prompt, and counted.  Everything hangs on the rows' contents, never on their order.
"""

from __future__ import annotations

import numpy as np

from onlay.data.rows import RowTable

SMALL_CLUSTER = 4
"""Rows of a cluster that is never too large."""
LARGE_SHARE = 0.1
"""A cluster with more of the rows than this, and more than are to be held out, is divided by prompt."""


def mixed(keys: np.ndarray, *, seed: int) -> np.ndarray:
    """splitmix64 of key and seed (N,) uint64: the same on every machine and numpy."""
    with np.errstate(over="ignore"):
        z = keys.astype(np.uint64) ^ (np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(z ^ (z >> np.uint64(31)))


def join_groups(keys: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """(N,) int64: a number for each row, equal where rows belong together: equal key (of the prompt), or equal cluster.

    Source: union-find with path halving over the pairs of prompt and cluster.
    """
    _, prompt = np.unique(keys, return_inverse=True)
    _, cluster = np.unique(clusters, return_inverse=True)
    pairs = _pairs(cluster, prompt)
    chained = np.bincount(pairs[:, 0]) > 1
    parent = np.arange(int(prompt.max(initial=-1)) + 1)
    # Only clusters of several prompts join anything: in most files they are few.
    first: dict[int, int] = {}
    for number, member in pairs[chained[pairs[:, 0]]].tolist():
        a, b = _root(parent, first.setdefault(number, member)), _root(parent, member)
        parent[max(a, b)] = min(a, b)
    joined = np.flatnonzero(parent != np.arange(len(parent)))
    for member in joined.tolist():
        parent[member] = _root(parent, member)
    return np.asarray(parent[prompt], dtype=np.int64)


def _pairs(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(P, 2) the different pairs of two arrays of numbers from 0, sorted."""
    width = int(second.max(initial=0)) + 1
    return np.stack(np.divmod(np.unique(first.astype(np.int64) * width + second), width), axis=1)


def _root(parent: np.ndarray, member: int) -> int:
    while parent[member] != member:
        parent[member] = parent[parent[member]]
        member = int(parent[member])
    return member


def divide_clusters(clusters: np.ndarray, *, most_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Clusters without those of more rows: each of their rows is then alone.  Also (N,) bool: the rows of those."""
    _, cluster, counts = np.unique(clusters, return_inverse=True, return_counts=True)
    too_large = counts[cluster] > most_rows
    return np.where(too_large, np.arange(len(clusters)), clusters), too_large


def choose_split(
    table: RowTable, *, clusters: np.ndarray | None, share: float, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which rows are held out, each row's group, and the rows whose cluster was divided by prompt: (N,) bool, int64, bool.

    `clusters` None: only equal prompts stay together.
    """
    count = len(table)
    target = max(1, round(share * count))
    alone = np.arange(count)

    def choose(most_rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        kept, too_large = (alone, np.zeros(count, bool)) if clusters is None else divide_clusters(clusters, most_rows=most_rows)  # fmt: skip
        group = join_groups(table.loose_prompt_key, kept)
        held_out = choose_held_out(group_keys(group, table.prompt_key), share, seed, domains=_by_name(table))
        return held_out, group, too_large & _is_apart(clusters, group)

    chosen = choose(max(target, round(LARGE_SHARE * count), SMALL_CLUSTER))
    taken = int(chosen[0].sum())
    if clusters is not None and not target / 2 <= taken <= 2 * target:
        finer = choose(target)
        if abs(int(finer[0].sum()) - target) < abs(taken - target):
            return finer
    return chosen


def _is_apart(clusters: np.ndarray | None, group: np.ndarray) -> np.ndarray:
    """(N,) bool: rows whose cluster lies in several groups."""
    if clusters is None:
        return np.zeros(len(group), dtype=bool)
    _, cluster = np.unique(clusters, return_inverse=True)
    pairs = _pairs(cluster, group)
    return np.asarray((np.bincount(pairs[:, 0]) > 1)[cluster])


def group_keys(group: np.ndarray, prompt_keys: np.ndarray) -> np.ndarray:
    """(N,) uint64: the least prompt key of each row's group, which does not depend on the rows' order."""
    _, number = np.unique(group, return_inverse=True)
    least = np.full(int(number.max(initial=-1)) + 1, np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(least, number, prompt_keys.astype(np.uint64))
    return np.asarray(least[number])


def _by_name(table: RowTable) -> np.ndarray:
    """(N,) int64: domains numbered by name, -1 for none, so that nothing hangs on which came first."""
    rank = np.empty(len(table.domains) + 1, dtype=np.int64)
    rank[np.argsort(np.array(table.domains, dtype=object), kind="stable")] = np.arange(len(table.domains))
    rank[-1] = -1
    return np.asarray(rank[table.domain])


def choose_held_out(keys: np.ndarray, share: float, seed: int, *, domains: np.ndarray | None = None) -> np.ndarray:
    """Bool for each row: held out or not.  Rows with equal keys stay together; at least one row on each side if possible.

    Groups are ordered by a hash of key and seed, so that a row's side does not depend on the rows' order; they are taken
    while they fit, which gives `share` of the rows exactly, up to the size of the last group.  With `domains` (N,) each
    domain first gives its own share, rounded down; a group belongs to the domain of most of its rows.
    """
    unique, group, counts = np.unique(keys, return_inverse=True, return_counts=True)
    chosen = np.zeros(len(unique), dtype=bool)
    if len(unique) < 2:
        return chosen[group]
    target = min(max(1, round(share * len(keys))), len(keys) - 1)
    order = np.argsort(mixed(unique, seed=seed), kind="stable")
    taken = 0
    if domains is not None and len(np.unique(domains)) > 1:
        of_group = _domain_of_groups(group, domains)
        for domain in np.unique(of_group).tolist():
            members = order[of_group[order] == domain]
            taken += _take(chosen, members, counts, room=target * int(counts[members].sum()) // len(keys))
    taken += _take(chosen, order, counts, room=target - taken)
    left = order[~chosen[order]]
    smallest = left[np.argmin(counts[left])] if len(left) else None
    if smallest is not None and (not taken or (taken < target / 2 and taken + counts[smallest] <= 2 * target)):
        chosen[smallest] = True
    return chosen[group]


def _take(chosen: np.ndarray, order: np.ndarray, counts: np.ndarray, *, room: int) -> int:
    """Takes groups that are not taken yet, in order, while they fit; how many rows that are."""
    taken = 0
    for index in order.tolist():
        if taken == room:
            break
        if not chosen[index] and taken + counts[index] <= room:
            chosen[index] = True
            taken += int(counts[index])
    return taken


def _domain_of_groups(group: np.ndarray, domains: np.ndarray) -> np.ndarray:
    """(G,) the domain of most rows of each group; of several, the first by name."""
    width = int(domains.max(initial=0)) + 2
    pairs, counts = np.unique(group.astype(np.int64) * width + domains + 1, return_counts=True)
    groups, of_pair = np.divmod(pairs, width)
    order = np.lexsort((of_pair, -counts, groups))
    first = np.unique(groups[order], return_index=True)[1]
    return np.asarray(of_pair[order[first]] - 1)
