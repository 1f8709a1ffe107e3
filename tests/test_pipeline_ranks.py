"""How layers are given to pipeline ranks: no layer group is split, and as evenly as that allows."""

from __future__ import annotations

from itertools import accumulate, combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clla.serving.pipeline_parallel import even_partition, groups_of_ranks


def consecutive(sizes: list[int]) -> list[list[int]]:
    """Groups of so many layers, one after the other."""
    return [list(range(start, stop)) for start, stop in pairwise(accumulate(sizes, initial=0))]


@given(st.lists(st.integers(1, 7), min_size=1, max_size=9), st.integers(1, 6))
def test_the_partition_nearest_to_even(sizes: list[int], ranks: int) -> None:
    groups, found = consecutive(sizes), even_partition(consecutive(sizes), ranks)
    if found is None:
        assert len(sizes) < ranks
        return
    assert len(found) == ranks and min(found) > 0 and sum(found) == sum(sizes)
    owned = groups_of_ranks(groups, found)
    assert [i for own in owned for i in own] == list(range(len(sizes)))
    ends = list(accumulate(sizes, initial=0))
    possible = (pairwise([0, *cuts, ends[-1]]) for cuts in combinations(ends[1:-1], ranks - 1))
    least = min(sum((stop - start) ** 2 for start, stop in one) for one in possible)
    assert sum(count**2 for count in found) == least


@pytest.mark.parametrize(
    ("sizes", "ranks", "wanted"),
    [
        ([2, 2, 2], 2, [4, 2]),  # as well as 2, 4: the last rank has the logits to compute
        ([3, 1], 2, [3, 1]),
        ([1, 6, 6, 6, 6, 5], 2, [13, 17]),
        ([5, 5], 3, None),
        ([1] * 5, 2, [3, 2]),
    ],
)
def test_partitions(sizes: list[int], ranks: int, wanted: list[int] | None) -> None:
    assert even_partition(consecutive(sizes), ranks) == wanted


def test_groups_that_lie_between_each_other() -> None:
    groups = [[0, 2], [1], [3]]
    assert even_partition(groups, 2) == [3, 1]
    assert even_partition(groups, 3) is None  # three groups, but only one place to cut
    assert groups_of_ranks(groups, [2, 2]) == [[1], [2]]
