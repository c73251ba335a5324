"""How often rows train: weights of sources, general examples mixed in, domains capped or made equal.  Arrays only.

What is drawn hangs on the rows' contents and the seed, not on their order: rows are ranked by a hash of both.
"""

from __future__ import annotations

import math

import numpy as np

from onlay.data.groups import mixed
from onlay.data.rows import RowTable
from onlay.errors import DataError

GENERAL_SHARE = 0.05
"""Default of data.general_share, where data.general is given."""
NO_DOMAIN = "(none)"
"""Rows without a domain are taken together as one."""


def rank_rows(table: RowTable, *, seed: int) -> np.ndarray:
    """(N,) int64: each row's place in an order drawn by the seed from what the rows hold."""
    drawn = mixed(mixed(table.prompt_key, seed=seed) ^ table.row_key.astype(np.uint64), seed=seed)
    rank = np.empty(len(drawn), dtype=np.int64)
    rank[np.argsort(drawn, kind="stable")] = np.arange(len(drawn))
    return rank


def spread(rank: np.ndarray, *, total: int) -> np.ndarray:
    """(N,) int64: how often each of N rows is used so that they make `total`: equally often, or once more for the first."""
    each, more = divmod(total, len(rank))
    times = np.full(len(rank), each, dtype=np.int64)
    times[np.argsort(rank, kind="stable")[:more]] += 1
    return times


def general_total(train_total: int, *, share: float | None) -> int:
    """General examples that are `share` of all when they are added to `train_total` others; at least one."""
    share = GENERAL_SHARE if share is None else share
    return max(1, round(share / (1.0 - share) * train_total))


def balance(table: RowTable, among: np.ndarray, rank: np.ndarray, *, how: str, domain_cap: float | None) -> np.ndarray:
    """(N,) bool: rows of `among` (N,) bool that go, so that no domain is too large.  Raises DataError.

    cap: the most rows L that a domain may have with L <= domain_cap x the rows that remain; equal: as many as the smallest.
    """
    domains = np.where(table.domain < 0, len(table.domains), table.domain)
    counts = np.bincount(domains[among], minlength=len(table.domains) + 1)
    there = counts[counts > 0]
    if not counts[:-1].any():
        raise DataError(
            f"data.balance = {how}: no training row has a domain.",
            "Name the column that says what a row is about: data.domain_field. Or set data.balance: none.",
        )
    most = int(there.min())
    if domain_cap is not None:
        if domain_cap * len(there) < 1 - 1e-9:
            names = [*table.domains, NO_DOMAIN]
            listed = ", ".join(names[i] for i in np.flatnonzero(counts)[:5].tolist())
            raise DataError(
                f"data.domain_cap = {domain_cap:g}: the rows have {len(there)} domain{'s' if len(there) > 1 else ''} "
                f"({listed}), so one of them holds at least {1 / len(there):.3g} of them.",
                f"Set it to {1 / len(there):.3g} or more, or data.balance to equal.",
            )
        most = _largest_domain(there, cap=domain_cap)
    goes = np.zeros(len(table), dtype=bool)
    for domain in np.flatnonzero(counts > most).tolist():
        members = np.flatnonzero(among & (domains == domain))
        goes[members[np.argsort(rank[members], kind="stable")[most:]]] = True
    return goes


def _largest_domain(counts: np.ndarray, *, cap: float) -> int:
    """The largest L with L <= cap x sum(min(counts, L)), found from above; at least the smallest domain's rows."""
    most = int(counts.max())
    while True:
        allowed = math.floor(cap * int(np.minimum(counts, most).sum()) + 1e-9)
        if allowed >= most or most <= counts.min():
            return max(most, int(counts.min()))
        most = max(allowed, int(counts.min()))
