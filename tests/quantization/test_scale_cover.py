"""Points that hit every set of ranges, against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tritgguf.quantization import scale_cover
from tritgguf.quantization.scale_cover import NoCover, ScaleRange, cover

END = 14  # scales of the random sets are below


@st.composite
def ranges(draw: st.DrawFn, most: int) -> np.ndarray:
    """Draw a set: one to `most` disjoint ranges, not next to each other, ascending."""
    count = draw(st.integers(1, most))
    ends = sorted(draw(st.sets(st.integers(0, END - 1), min_size=2 * count, max_size=2 * count)))
    return np.array(ends, np.int64).reshape(-1, 2)


def hits(point: int, ranges_of_set: np.ndarray) -> bool:
    return any(low <= point <= high for low, high in ranges_of_set)


def exists(sets: list[np.ndarray], limit: int) -> bool:
    """Try all choices of points."""
    return any(
        all(any(hits(point, ranges_of_set) for point in points) for ranges_of_set in sets)
        for points in itertools.combinations(range(END), limit)
    )


def assert_covers(found: list[ScaleRange], sets: list[np.ndarray], limit: int) -> None:
    assert len(found) <= limit
    assert found == sorted(found, key=lambda scale_range: scale_range.low)
    for choose in (lambda r: r.low, lambda r: r.high, lambda r: r.middle):
        points = [choose(scale_range) for scale_range in found]
        assert all(any(hits(point, ranges_of_set) for point in points) for ranges_of_set in sets)


@given(sets=st.lists(ranges(most=1), max_size=8), limit=st.integers(1, 4))
def test_single_ranges(sets: list[np.ndarray], limit: int) -> None:
    found = cover(sets, limit)
    if isinstance(found, NoCover):
        assert found.proven
        assert not exists(sets, limit)
    else:
        assert_covers(found, sets, limit)


@given(sets=st.lists(ranges(most=3), min_size=1, max_size=8), limit=st.integers(1, 4))
def test_several_ranges(sets: list[np.ndarray], limit: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scale_cover, "_EXCHANGES", 300)
        found = cover(sets, limit)
    if isinstance(found, NoCover):
        assert not exists(sets, limit)
    else:
        assert_covers(found, sets, limit)


def test_greedy_choice_is_improved() -> None:
    # The point at 5 hits four sets, but then two points are needed for the rest.
    sets = [np.array(r) for r in ([[1, 1], [5, 5]], [[1, 1], [5, 5]], [[5, 5], [9, 9]], [[5, 5], [9, 9]])]
    sets += [np.array([[1, 1], [12, 12]]), np.array([[9, 9], [13, 13]])]
    found = cover(sets, 2)
    assert not isinstance(found, NoCover)
    assert [scale_range.middle for scale_range in found] == [1, 9]


def test_nothing_to_cover() -> None:
    assert cover([], 27) == []
