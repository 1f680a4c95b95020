"""At most 27 scales for all groups: points on a line that hit every set of ranges.

Each group of a matrix allows certain scales, one range or several; a codebook must have an entry in one range of
every group. With one range each this is interval stabbing, which the greedy method solves exactly. Where groups
allow several ranges, a search decides between them, and it may give up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_EXCHANGES = 4000  # after which the search gives up
_WORK = 1 << 29  # pairs of a point and a set, after which it does so too: a second or two


@dataclass(frozen=True)
class ScaleRange:
    """Scales from `low` to `high`, both included."""

    low: int
    high: int

    @property
    def middle(self) -> int:
        """The scale that is farthest from both ends."""
        return (self.low + self.high) // 2


@dataclass(frozen=True)
class NoCover:
    """There are not so few points, or, if not `proven`, none were found within reasonable time."""

    proven: bool


def cover(sets: Sequence[np.ndarray], limit: int) -> list[ScaleRange] | NoCover:
    """Find at most `limit` ranges, ascending, such that any choice of a scale from each hits every set.

    Args:
        sets: int64 [ranges of the set, 2]: first and last scale, ascending and disjoint; no set is empty.
        limit: how many ranges there may be.

    """
    simple = _innermost(np.array([ranges[0] for ranges in sets if len(ranges) == 1], np.int64).reshape(-1, 2))
    found = _stab(simple)
    if len(found) > limit:
        return NoCover(proven=True)
    several = [ranges for ranges in sets if len(ranges) > 1 and not _holds_one(ranges, simple)]
    if not several:
        return found
    return _search([*simple[:, np.newaxis], *several], limit)


def _innermost(ranges: np.ndarray) -> np.ndarray:
    """Leave out ranges that hold another one: what hits that one hits them. The rest ascends at both ends."""
    ranges = ranges[np.lexsort((-ranges[:, 1], ranges[:, 0]))]
    lowest_end_behind = np.minimum.accumulate(ranges[::-1, 1])[::-1]
    is_needed = np.ones(len(ranges), bool)
    is_needed[:-1] = ranges[:-1, 1] < lowest_end_behind[1:]
    return ranges[is_needed]


def _holds_one(ranges: np.ndarray, innermost: np.ndarray) -> bool:
    """Tell whether one of the ranges holds one of the innermost ones."""
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
    """The points that may be chosen, and which sets each of them hits.

    A point that hits some sets can be moved up to the first end of their ranges and still hits them: these ends are
    all the points that need to be looked at.
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
        """Tell which sets these points hit: 0 or 1, int64 [points, sets]."""
        return np.unpackbits(self._bits[points], axis=1, count=self.set_count, bitorder="little").astype(np.int64)

    def gains(self, is_missing: np.ndarray) -> np.ndarray:
        """Count the missing sets (bool [sets]) that each point hits."""
        return np.bitwise_count(self._bits & np.packbits(is_missing, bitorder="little")).sum(axis=1, dtype=np.int64)


def _search(sets: Sequence[np.ndarray], limit: int) -> list[ScaleRange] | NoCover:
    """Choose points greedily, then exchange them one by one until they hit every set, or give up.

    The exchange is row-weighting local search (Gao, Yao, Weise and Li, "An Efficient Local Search Heuristic with Row
    Weighting for the Unicost Set Covering Problem", 2015): a set counts more the longer it is missed.
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
        times = hits.sum(axis=0)
        if times.all():
            return _around(np.sort(points.scales[chosen]), sets)
        # The last one chosen stays for now: taking it back would undo the exchange before.
        removed = int(np.argmin(hits[:-1] @ (weights * (times == 1)))) if limit > 1 else 0
        times -= hits[removed]
        del chosen[removed]
        weights += times == 0
        candidates = points.of_set[generator.choice(np.flatnonzero(times == 0))]
        chosen.append(int(candidates[np.argmax(points.hits(candidates) @ (weights * (times == 0)))]))
        work += candidates.size * len(sets)
        if work > _WORK:
            break
    return NoCover(proven=False)


def _around(chosen: np.ndarray, sets: Sequence[np.ndarray]) -> list[ScaleRange]:
    """Widen points that hit every set to the ranges in which they may move."""
    lows, highs = np.zeros_like(chosen), np.full_like(chosen, np.iinfo(np.int64).max)
    for ranges in sets:
        place = np.searchsorted(ranges[:, 1], chosen)  # the first range that does not end below the point
        inside = np.flatnonzero((place < len(ranges)) & (ranges[np.minimum(place, len(ranges) - 1), 0] <= chosen))
        low, high = ranges[place[inside[0]]]
        lows[inside[0]], highs[inside[0]] = max(lows[inside[0]], low), min(highs[inside[0]], high)
    is_needed = highs < np.iinfo(np.int64).max
    return [ScaleRange(int(low), int(high)) for low, high in zip(lows[is_needed], highs[is_needed], strict=True)]
