"""Choice of at most 27 scales for all groups: points on a line that hit every set of ranges.

Each group of a matrix allows one or several ranges of scales, and the codebook needs an entry in one range of every
group. If every group has one range, this is interval stabbing, which a greedy method solves exactly. If groups have
several ranges, it is a set cover problem, solved by a local search that may give up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_EXCHANGES = 4000  # maximum steps of the search
_WORK = 1 << 29  # maximum pairs of a point and a set that the search tests: a second or two


@dataclass(frozen=True)
class ScaleRange:
    """Scales from `low` to `high`, both included."""

    low: int
    high: int

    @property
    def middle(self) -> int:
        """The middle of the range."""
        return (self.low + self.high) // 2


@dataclass(frozen=True)
class NoCover:
    """No cover was found; if `proven`, none exists."""

    proven: bool


def cover(sets: Sequence[np.ndarray], limit: int) -> list[ScaleRange] | NoCover:
    """Find at most `limit` ranges, ascending, such that any choice of a scale from each hits every set.

    Args:
        sets: int64 [ranges of the set, 2]: first and last scale, ascending and disjoint; no set is empty.
        limit: maximum number of ranges.

    """
    simple = _innermost(np.array([ranges[0] for ranges in sets if len(ranges) == 1], np.int64).reshape(-1, 2))
    found = _stab(simple)
    if len(found) > limit:
        return NoCover(proven=True)
    several = [ranges for ranges in sets if len(ranges) > 1 and not _contains_one(ranges, simple)]
    if not several:
        return found
    return _search([*simple[:, np.newaxis], *several], limit)


def _innermost(ranges: np.ndarray) -> np.ndarray:
    """Drop ranges that contain another one, since its points hit them too. Both ends of the rest ascend."""
    ranges = ranges[np.lexsort((-ranges[:, 1], ranges[:, 0]))]
    lowest_following_end = np.minimum.accumulate(ranges[::-1, 1])[::-1]
    is_needed = np.ones(len(ranges), bool)
    is_needed[:-1] = ranges[:-1, 1] < lowest_following_end[1:]
    return ranges[is_needed]


def _contains_one(ranges: np.ndarray, innermost: np.ndarray) -> bool:
    """Tell whether one of the ranges contains an innermost one."""
    first = np.searchsorted(innermost[:, 0], ranges[:, 0])
    is_inside = first < len(innermost)
    return bool((innermost[first[is_inside], 1] <= ranges[is_inside, 1]).any())


def _stab(innermost: np.ndarray) -> list[ScaleRange]:
    """Return the fewest ranges whose points hit all of the innermost ranges."""
    found: list[ScaleRange] = []
    start = 0
    while start < len(innermost):
        high = innermost[start, 1]
        end = int(np.searchsorted(innermost[:, 0], high, side="right"))
        found.append(ScaleRange(int(innermost[end - 1, 0]), int(high)))
        start = end
    return found


class _Points:
    """The candidate points and the sets that each of them hits.

    A point can be moved up to the nearest end of the ranges that it is in and still hits the same sets, so these ends
    are the only candidates.
    """

    def __init__(self, sets: Sequence[np.ndarray]) -> None:
        ranges = np.concatenate(sets)
        owners = np.repeat(np.arange(len(sets)), [len(ranges) for ranges in sets])
        self.set_count = len(sets)
        self.scales = np.unique(ranges[:, 1])
        first = np.searchsorted(self.scales, ranges[:, 0])
        last = np.searchsorted(self.scales, ranges[:, 1], side="right")
        self._bits = np.zeros((len(self.scales), -(-len(sets) // 8)), np.uint8)
        self.of_set: list[np.ndarray] = [np.empty(0, np.int64)] * len(sets)
        for owner, start, end in zip(owners, first, last, strict=True):
            self._bits[start:end, owner // 8] |= np.uint8(1 << (owner % 8))
            self.of_set[owner] = np.concatenate([self.of_set[owner], np.arange(start, end)])

    def hits(self, points: np.ndarray | list[int]) -> np.ndarray:
        """Return which sets these points hit: 0 or 1, int64 [points, sets]."""
        return np.unpackbits(self._bits[points], axis=1, count=self.set_count, bitorder="little").astype(np.int64)

    def gains(self, is_missing: np.ndarray) -> np.ndarray:
        """Count the missing sets (bool [sets]) that each point hits: int64 [points]."""
        return np.bitwise_count(self._bits & np.packbits(is_missing, bitorder="little")).sum(axis=1, dtype=np.int64)


def _search(sets: Sequence[np.ndarray], limit: int) -> list[ScaleRange] | NoCover:
    """Choose points greedily, then exchange them one by one until they hit every set, or give up.

    The exchange is row-weighting local search (Gao, Yao, Weise and Li, "An Efficient Local Search Heuristic with Row
    Weighting for the Unicost Set Covering Problem", 2015): the weight of a set grows with every step that misses it.
    """
    points = _Points(sets)
    if np.sort(points.gains(np.ones(len(sets), bool)))[-limit:].sum() < len(sets):
        return NoCover(proven=True)
    chosen: list[int] = []
    is_missing = np.ones(len(sets), bool)
    while is_missing.any() and len(chosen) < limit:
        chosen.append(int(np.argmax(points.gains(is_missing))))
        is_missing &= points.hits(chosen[-1:])[0] == 0
    weights = np.ones(len(sets), np.int64)
    generator = np.random.default_rng(0)
    work = 0
    for _ in range(_EXCHANGES):
        hits = points.hits(chosen)
        hit_counts = hits.sum(axis=0)
        if hit_counts.all():
            return _widened(np.sort(points.scales[chosen]), sets)
        # The last chosen point stays, because removing it would undo the previous exchange.
        removed = int(np.argmin(hits[:-1] @ (weights * (hit_counts == 1)))) if limit > 1 else 0
        hit_counts -= hits[removed]
        del chosen[removed]
        weights += hit_counts == 0
        candidates = points.of_set[generator.choice(np.flatnonzero(hit_counts == 0))]
        chosen.append(int(candidates[np.argmax(points.hits(candidates) @ (weights * (hit_counts == 0)))]))
        work += candidates.size * len(sets)
        if work > _WORK:
            break
    return NoCover(proven=False)


def _widened(chosen: np.ndarray, sets: Sequence[np.ndarray]) -> list[ScaleRange]:
    """Widen points that hit every set to the ranges within which they still do."""
    lows, highs = np.zeros_like(chosen), np.full_like(chosen, np.iinfo(np.int64).max)
    for ranges in sets:
        index = np.searchsorted(ranges[:, 1], chosen)  # the first range that does not end below the point
        inside = np.flatnonzero((index < len(ranges)) & (ranges[np.minimum(index, len(ranges) - 1), 0] <= chosen))
        low, high = ranges[index[inside[0]]]
        lows[inside[0]], highs[inside[0]] = max(lows[inside[0]], low), min(highs[inside[0]], high)
    is_needed = highs < np.iinfo(np.int64).max
    return [ScaleRange(int(low), int(high)) for low, high in zip(lows[is_needed], highs[is_needed], strict=True)]
