"""What stays together in a split, what is held out, and that neither hangs on the rows' order."""

from __future__ import annotations

import numpy as np
import pytest

from onlay.data.groups import choose_held_out, choose_split, divide_clusters, group_keys, join_groups
from tests.data.tables import Made, clusters_of, singles, table_of


def split_of(rows: list[Made], share: float = 0.1, *, seed: int = 0, by_cluster: bool = True) -> tuple[np.ndarray, ...]:
    clusters = clusters_of(rows) if by_cluster else None
    return choose_split(table_of(rows), clusters=clusters, share=share, seed=seed)


def mixed_rows() -> list[Made]:
    """Prompts with several answers, clusters of near-duplicates, domains of several sizes, some of it chained."""
    rows = []
    for i in range(240):
        near = f"family {i % 30}" if i % 3 == 0 else None
        rows.append(Made(f"question {i // 2}", f"answer {i}", domain=["a", "b", "b", None][i % 4], near=near))
    return rows


def keys_of(groups: list[int]) -> np.ndarray:
    """A group's key as often as the group is large."""
    names = [hash((i, "group")) & (2**64 - 1) for i in range(len(groups))]
    return np.repeat(np.array(names, dtype=np.uint64), groups)


# ------------------------------------------------------------------------------------------------------------- groups


def test_groups_chain_through_prompts_and_clusters() -> None:
    rows = [
        Made("a", near="x"), Made("b", near="x"), Made("b", "other"), Made("c", near="y"), Made("C", "again"), Made("d"),
    ]  # fmt: skip
    group = join_groups(table_of(rows).loose_prompt_key, clusters_of(rows))
    assert group[0] == group[1] == group[2]
    assert group[3] == group[4], "equal up to case"
    assert len(set(group.tolist())) == 3
    # A chain of 300 clusters, each sharing a prompt with the next.
    chain = [Made(f"p{(i + 1) // 2}", near=f"c{i // 2}") for i in range(600)]
    assert len(set(join_groups(table_of(chain).loose_prompt_key, clusters_of(chain)).tolist())) == 1


def test_groups_are_those_of_a_plain_search() -> None:
    random = np.random.default_rng(3)
    for _ in range(20):
        keys, clusters = random.integers(0, 40, 60).astype(np.uint64), random.integers(0, 50, 60)
        left, want = set(range(60)), np.zeros(60, dtype=int)
        while left:
            queue, name = [min(left)], min(left)
            while queue:
                row = queue.pop()
                if row in left:
                    left.remove(row)
                    want[row] = name
                    queue += [o for o in left if keys[o] == keys[row] or clusters[o] == clusters[row]]
        found = join_groups(keys, clusters)
        assert (np.unique(found, return_inverse=True)[1][:, None] == np.unique(found, return_inverse=True)[1]).tolist() == (want[:, None] == want).tolist()  # fmt: skip


def test_large_clusters_are_divided() -> None:
    clusters = np.array([0, 0, 0, 3, 3, 5])
    kept, too_large = divide_clusters(clusters, most_rows=2)
    assert kept.tolist() == [0, 1, 2, 3, 3, 5]
    assert too_large.tolist() == [True] * 3 + [False] * 3


# -------------------------------------------------------------------------------------------------------------- split


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("seed", [0, 7])
def test_no_group_is_on_both_sides(share: float, seed: int) -> None:
    rows = mixed_rows()
    held, group, divided = split_of(rows, share, seed=seed)
    assert not divided.any()
    sides = [set(group[held].tolist()), set(group[~held].tolist())]
    assert sides[0] and sides[1] and not sides[0] & sides[1]
    assert share * len(rows) / 2 <= held.sum() <= 2 * share * len(rows)


@pytest.mark.parametrize("by_cluster", [True, False])
def test_the_order_of_the_rows_does_not_matter(by_cluster: bool) -> None:
    rows = mixed_rows()
    held = split_of(rows, 0.2, by_cluster=by_cluster)[0]
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(rows))
        again = split_of([rows[i] for i in order], 0.2, by_cluster=by_cluster)[0]
        assert (again == held[order]).all()
    assert (split_of(rows, 0.2, seed=1, by_cluster=by_cluster)[0] != held).any()


def test_without_clusters_and_domains_prompts_alone_decide() -> None:
    rows = singles(300)
    held, _, divided = split_of(rows, 0.05)
    assert held.sum() == 15
    assert (held == choose_held_out(table_of(rows).prompt_key, 0.05, 0)).all()
    assert not divided.any()


def test_each_domain_gives_its_share() -> None:
    rows = [Made(f"q{i}", domain="large" if i % 4 else "small") for i in range(400)]
    held = split_of(rows, 0.1)[0]
    small = np.array([row.domain == "small" for row in rows])
    assert (held[small].sum(), held[~small].sum()) == (10, 30)


def test_a_file_of_templates_is_divided_by_prompt_and_told() -> None:
    """One cluster with nearly all rows cannot be held out whole; its prompts can."""
    rows = [Made(f"convert {i // 2} miles", f"{i}", near="template") for i in range(180)] + singles(20)
    held, group, divided = split_of(rows, 0.1)
    assert held.sum() == 20
    assert divided.sum() == 180
    assert held[:180].any(), "templated rows are measured too"
    assert not set(group[held].tolist()) & set(group[~held].tolist())
    prompts = [{row.prompt for row, side in zip(rows, held, strict=True) if side == want} for want in (True, False)]
    assert not prompts[0] & prompts[1]


def test_families_that_fill_the_file_are_divided_only_where_nothing_fits() -> None:
    rows = [Made(f"q{i}", near=f"family {i // 8}") for i in range(96)]
    held, _, divided = split_of(rows, 0.1)
    assert (held.sum(), divided.sum()) == (8, 0)
    held, _, divided = split_of(rows, 0.01)
    assert (held.sum(), divided.sum()) == (1, 96), "a family of 8 is far more than the one row asked for"


def test_pairs_in_small_files_stay_together() -> None:
    rows = [Made(f"q{i}", near=f"pair {i // 2}") for i in range(20)]
    held, _, divided = split_of(rows, 0.05)
    assert (held.sum(), divided.sum()) == (2, 0)


def test_group_keys_are_the_least() -> None:
    keys = group_keys(np.array([4, 4, 9]), np.array([7, 3, 5], dtype=np.uint64))
    assert keys.tolist() == [3, 3, 5]


# ----------------------------------------------------------------------------------------------------- choose_held_out


@pytest.mark.parametrize("share", [0.01, 0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_split_is_exact_for_single_prompts(share: float, seed: int) -> None:
    keys = keys_of([1] * 300)
    held = choose_held_out(keys, share, seed)
    assert held.sum() == max(1, round(300 * share))
    assert (held == choose_held_out(keys, share, seed)).all()
    order = np.random.default_rng(0).permutation(300)
    assert (choose_held_out(keys[order], share, seed) == held[order]).all(), (
        "a row's side must not depend on its position"
    )
    assert (held != choose_held_out(keys, share, seed + 1)).any() or seed == 2**32 - 1


def test_equal_prompts_stay_together() -> None:
    groups = [1, 5, 2, 40, 3, 3, 7, 1, 1, 2] * 3
    keys = keys_of(groups)
    for share in (0.02, 0.1, 0.3):
        held = choose_held_out(keys, share, 0)
        for key in np.unique(keys):
            assert len(set(held[keys == key].tolist())) == 1
        assert 1 <= held.sum() <= max(1, round(share * len(keys)))
        assert held.sum() >= round(share * len(keys)) - 1


def test_at_least_one_row_is_held_out_and_one_stays() -> None:
    assert choose_held_out(keys_of([1, 1]), 0.05, 0).sum() == 1
    assert choose_held_out(keys_of([1, 1]), 0.99, 0).sum() == 1
    assert choose_held_out(keys_of([5, 9]), 0.01, 0).sum() == 5, "the smallest group, where none fits"
    assert not choose_held_out(keys_of([5]), 0.5, 0).any()
