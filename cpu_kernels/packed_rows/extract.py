"""Extraction of levels and scale indices from packed words, for each depth.

`docs/format.md` section 3 specifies the planes and the fields of their words; each function below reads them in the
order in which the document lists them. The `Step` determines what the lanes are: neighbouring groups of one row
(`PackedGroups`, for decode) or one group of neighbouring rows (`RowLanes`, for prefill).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from llvmlite import ir

from cpu_kernels.simd.vectors import I8, I16, I32, I64, Vectors, vector


class Step(ABC):
    """One vector step: loads the words of its groups and uses their levels.

    Vectors of 16-bit lanes have `lanes` lanes, or pairs of lanes: the low lane belongs to weight j of its group, the
    high lane to weight j + 8, for j below 8.
    """

    def __init__(self, vectors: Vectors, lanes: int) -> None:
        self.vectors, self.lanes = vectors, lanes

    @abstractmethod
    def plane(self, words_per_group: int, start_in_words_per_group: int) -> ir.Value:
        """Load the words of a plane with 2 words per group (as pairs) or 1.

        The plane starts at word `start_in_words_per_group` * groups of the row.
        """

    @abstractmethod
    def shared_plane(self, groups_per_word: int, start_in_half_words_per_group: int) -> ir.Value:
        """Load a plane with one word per 2 or 4 groups and copy it to each of them: <lanes x i16>.

        The plane starts at word `start_in_half_words_per_group` * groups / 2 of the row.
        """

    @abstractmethod
    def lane_factors(self, factors: Sequence[int]) -> Sequence[int]:
        """Return the factors of the lanes, given those of groups 0, 1 ... that share a word."""

    def interleave_words(self, low: ir.Value, high: ir.Value) -> ir.Value:
        """Interleave two vectors of a word for each lane: <lanes x i16> -> <2 * lanes x i16>, low first."""
        order = [lane // 2 + lane % 2 * self.lanes for lane in range(2 * self.lanes)]
        return self.vectors.builder.shuffle_vector(low, high, ir.Constant(vector(I32, len(order)), order))

    def join_pairs(self, even: ir.Value, odd: ir.Value) -> ir.Value:
        """Join pairs 2 j and 2 j + 1 to 8-bit lanes: weights 2 j, 2 j + 1, 2 j + 8, 2 j + 9 of each group."""
        joined = self.vectors.builder.or_(even, self.vectors.shift_left(odd, 8))
        return self.vectors.builder.bitcast(joined, vector(I8, 4 * self.lanes))

    @abstractmethod
    def use_levels(self, pair: int, levels: ir.Value) -> None:
        """Use the levels of weights `pair` and `pair + 8`, pairs of 16-bit lanes. Called with pairs 0 to 7 in order."""

    def extract_digits(self, fraction: ir.Value, radix: int, pairs: range) -> ir.Value:
        """Extract and use one digit for each of `pairs`; return the remaining fraction."""
        for pair in pairs:
            self.use_levels(pair, self.vectors.multiply_high(fraction, radix))
            fraction = self.vectors.multiply_low(fraction, radix)
        return fraction

    def replace_high(self, value: ir.Value, high: ir.Value) -> ir.Value:
        """Return the low halves of each 32-bit lane of `value`, <2 * lanes x i16>, with `high`, <lanes x i32>."""
        lanes = 2 * self.lanes
        shifted = self.as_16_bit(self.vectors.builder.shl(high, self.vectors.constant(I32, 16, self.lanes)))
        order = [lane + lane % 2 * lanes for lane in range(lanes)]
        return self.vectors.builder.shuffle_vector(value, shifted, ir.Constant(vector(I32, lanes), order))

    def as_16_bit(self, value: ir.Value) -> ir.Value:
        """View <lanes x i32> as <2 * lanes x i16>."""
        return self.vectors.builder.bitcast(value, vector(I16, 2 * self.lanes))

    def as_32_bit(self, value: ir.Value) -> ir.Value:
        """View <2 * lanes x i16> as <lanes x i32>."""
        return self.vectors.builder.bitcast(value, vector(I32, self.lanes))

    def weighted_sum(self, value: ir.Value, weights: tuple[int, int], addend: ir.Value | None = None) -> ir.Value:
        """Return low * weights[0] + high * weights[1] of each 32-bit lane's halves, plus `addend` if it is given."""
        zero = self.vectors.constant(I32, 0, self.lanes)
        factors = self.vectors.factors(weights, 2 * self.lanes)
        return self.vectors.dot_pairs(zero if addend is None else addend, value, factors)


class PackedGroups(Step):
    """Neighbouring groups of one packed row: 16, 8 or 4 lanes."""

    def __init__(
        self,
        vectors: Vectors,
        lanes: int,
        row: ir.Value,
        groups: ir.Value,
        first_group: ir.Value,
        ahead: ir.Value | None = None,
    ) -> None:
        """Start at group `first_group` (lane 0) of the row at address `row`, which has `groups` groups.

        Memory is asked for `ahead` bytes behind what is read, if that is given.
        """
        super().__init__(vectors, lanes)
        self._row, self._groups, self._first_group, self._ahead = row, groups, first_group, ahead

    def _load_words(self, offset: ir.Value, count: int) -> ir.Value:
        address = self.vectors.builder.add(self._row, offset)
        if self._ahead is not None:
            self.vectors.prefetch(self.vectors.builder.add(address, self._ahead))
        return self.vectors.load(address, I16, count)

    def plane(self, words_per_group: int, start_in_words_per_group: int) -> ir.Value:
        """Load a plane with 2 words per group or 1."""
        offset = self._place_of_plane(words_per_group, start_in_words_per_group)
        return self._load_words(offset, words_per_group * self.lanes)

    def _place_of_plane(self, words_per_group: int, start_in_words_per_group: int) -> ir.Value:
        builder = self.vectors.builder
        start = builder.mul(self._groups, I64(2 * start_in_words_per_group))
        return builder.add(start, builder.mul(self._first_group, I64(2 * words_per_group)))

    def shared_plane(self, groups_per_word: int, start_in_half_words_per_group: int) -> ir.Value:
        """Load a plane with one word per 2 or 4 groups."""
        offset = self._place_of_shared_plane(groups_per_word, start_in_half_words_per_group)
        words = self._load_words(offset, self.lanes // groups_per_word)
        return self.vectors.shuffle(words, [lane // groups_per_word for lane in range(self.lanes)])

    def _place_of_shared_plane(self, groups_per_word: int, start_in_half_words_per_group: int) -> ir.Value:
        builder = self.vectors.builder
        start = builder.mul(self._groups, I64(start_in_half_words_per_group))
        shift = {2: 0, 4: 1}[groups_per_word]  # bytes = 2 * group / groups_per_word
        return builder.add(start, builder.lshr(self._first_group, I64(shift)))

    def lane_factors(self, factors: Sequence[int]) -> Sequence[int]:
        """Return all factors: lane g is group g."""
        return factors


class StoredGroups(PackedGroups):
    """Neighbouring groups of one row whose levels are stored, to multiply them several times.

    They are stored as the activations of `GroupLanes` lie: int16 [8, lanes, 2] or uint8 [4, lanes, 4].
    """

    def __init__(
        self,
        vectors: Vectors,
        lanes: int,
        row: ir.Value,
        groups: ir.Value,
        first_group: ir.Value,
        target: ir.Value,
        bits: int,
        ahead: ir.Value,
    ) -> None:
        """Store levels of 8 or 16 `bits` at address `target`; the other arguments are as in `PackedGroups`."""
        super().__init__(vectors, lanes, row, groups, first_group, ahead)
        self._target, self._bits = target, bits
        self._even: ir.Value | None = None

    def use_levels(self, pair: int, levels: ir.Value) -> None:
        """Store the levels; of 8 bits, two pairs at a time."""
        plane_bytes = 4 * self.lanes
        if self._bits == 16:
            self.vectors.store(levels, self._target, plane_bytes * pair)
        elif pair % 2 == 0:
            self._even = levels
        else:
            self.vectors.store(self.join_pairs(self._even, levels), self._target, plane_bytes * (pair // 2))


class RowLanes(Step):
    """One group of 16 neighbouring rows; the levels are stored in a tile.

    The words are transposed: each word's 16 rows are neighbours. In a plane with two words per group, both words of a
    row are neighbours (see `unpack._transpose`). A tile of 16-bit levels keeps the pairs; a tile of 8-bit levels has
    weights j, j + 1, j + 8, j + 9 in neighbouring lanes, for even j.
    """

    def __init__(
        self,
        vectors: Vectors,
        transposed: ir.Value,
        groups: ir.Value,
        block: ir.Value,
        group_in_block: int,
        tile: ir.Value,
        bits: int,
    ) -> None:
        """Process one group of a block, number 0 to 3.

        `transposed` and `tile` are the addresses of the transposed words and of the group's part of the tile, whose
        levels have 8 or 16 `bits`.
        """
        super().__init__(vectors, 16)
        self._transposed, self._groups = transposed, groups
        self._block, self._group_in_block = block, group_in_block
        self._tile, self._bits = tile, bits
        self._even: ir.Value | None = None

    def _words(self, start: ir.Value, words_per_block: int, index: int, count: int) -> ir.Value:
        """Load `count` words per row from word `index` of the block, in the plane that starts at word `start`."""
        builder = self.vectors.builder
        number = builder.add(start, builder.add(builder.mul(self._block, I64(words_per_block)), I64(index)))
        address = builder.add(self._transposed, builder.mul(number, I64(2 * self.lanes)))
        return self.vectors.load(address, I16, count * self.lanes)

    def plane(self, words_per_group: int, start_in_words_per_group: int) -> ir.Value:
        """Load a plane with 2 words per group or 1."""
        start = self.vectors.builder.mul(self._groups, I64(start_in_words_per_group))
        return self._words(start, 4 * words_per_group, self._group_in_block * words_per_group, words_per_group)

    def shared_plane(self, groups_per_word: int, start_in_half_words_per_group: int) -> ir.Value:
        """Load a plane with one word per 2 or 4 groups."""
        builder = self.vectors.builder
        start = builder.lshr(builder.mul(self._groups, I64(start_in_half_words_per_group)), I64(1))
        return self._words(start, 4 // groups_per_word, self._group_in_block // groups_per_word, 1)

    def lane_factors(self, factors: Sequence[int]) -> Sequence[int]:
        """Return the factor of this group."""
        return [factors[self._group_in_block % len(factors)]]

    def use_levels(self, pair: int, levels: ir.Value) -> None:
        """Store the levels; a tile of 8-bit levels stores two pairs at a time."""
        row_bytes = 4 * self.lanes
        if self._bits == 16:
            self.vectors.store(levels, self._tile, pair * row_bytes)
        elif pair % 2 == 0:
            self._even = levels
        else:
            self.vectors.store(self.join_pairs(self._even, levels), self._tile, pair // 2 * row_bytes)


def depth_1(step: Step) -> ir.Value:
    """Extract a step of depth 1; return the scale indices <lanes x i32>."""
    rest = step.extract_digits(step.plane(2, 0), 3, range(8))
    return step.weighted_sum(step.vectors.multiply_high(rest, (9, 3)), (3, 1))


def depth_2(step: Step) -> ir.Value:
    """Extract a step of depth 2; return the scale indices <lanes x i16>."""
    vectors = step.vectors
    step.extract_digits(step.plane(2, 0), 9, range(5))
    b, c = step.plane(1, 2), step.shared_plane(2, 6)
    fraction = step.interleave_words(b, vectors.multiply_low(b, 9))
    step.use_levels(5, vectors.multiply_high(fraction, 9))
    step.use_levels(6, vectors.multiply_high(vectors.multiply_low(fraction, 81), 9))
    factors = [factor for own in step.lane_factors((1, 9)) for factor in (9**4, own)]
    last = vectors.multiply_low(step.interleave_words(b, c), factors)
    step.use_levels(7, vectors.multiply_high(last, 9))
    return vectors.multiply_high(vectors.multiply_low(c, step.lane_factors((81, 81 * 27))), 27)


def depth_3(step: Step) -> ir.Value:
    """Extract a step of depth 3; return the scale indices <lanes x i32>."""
    vectors = step.vectors
    trits_0 = vectors.multiply_high(step.extract_digits(step.plane(2, 0), 27, range(3)), 3)
    trits_1 = vectors.multiply_high(step.extract_digits(step.plane(2, 2), 27, range(3, 6)), 3)
    b = step.plane(1, 4)
    fraction = step.interleave_words(b, vectors.multiply_low(b, 27))
    step.use_levels(6, vectors.multiply_high(fraction, 27))
    last_two = vectors.multiply_high(vectors.multiply_low(fraction, 27**2), (27, 3))
    last = step.weighted_sum(trits_1, (1, 0), addend=step.weighted_sum(trits_0, (9, 3)))
    step.use_levels(7, step.replace_high(last_two, last))
    d = vectors.multiply_high(vectors.multiply_low(step.shared_plane(4, 10), step.lane_factors((1, 3, 9, 27))), 3)
    low = step.as_32_bit(step.interleave_words(d, vectors.constant(I16, 0, step.lanes)))
    return step.weighted_sum(last_two, (0, 3), addend=step.weighted_sum(trits_1, (0, 9), addend=low))


def depth_4(step: Step) -> ir.Value:
    """Extract a step of depth 4; return the scale indices <lanes x i16>."""
    vectors = step.vectors
    joined = []
    for plane in range(3):
        rest = step.extract_digits(step.plane(2, 2 * plane), 81, range(2 * plane, 2 * plane + 2))
        joined.append(step.weighted_sum(vectors.multiply_high(rest, 9), (9, 1)))
    step.use_levels(6, step.replace_high(step.as_16_bit(joined[0]), joined[1]))
    c = step.shared_plane(2, 12)
    last = vectors.multiply_high(vectors.multiply_low(c, step.lane_factors((1, 81))), 81)
    seventh = step.interleave_words(vectors.constant(I16, 0, step.lanes), last)
    step.use_levels(7, vectors.builder.or_(step.as_16_bit(joined[2]), seventh))
    high = vectors.multiply_high(vectors.multiply_low(c, step.lane_factors((81**2, 3 * 81**2))), 3)
    factors = step.lane_factors((1, 9, 81, 729))
    low = vectors.multiply_high(vectors.multiply_low(step.shared_plane(4, 13), factors), 9)
    return vectors.builder.add(vectors.multiply_low(high, 9), low)


D1, D2, D3, D4 = ((0,), (0,) * 2, (0,) * 3, (0,) * 4)  # depths as types, like the variants of `instruction_set`
EXTRACT = {1: depth_1, 2: depth_2, 3: depth_3, 4: depth_4}
