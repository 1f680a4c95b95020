"""The heart of the kernels: how digits come out of packed words, for each depth.

The planes and the fields of their words are those of `docs/format.md` section 3; each function below reads them in
the order in which the document lists them. What its vectors' lanes stand for is the `Step`'s business: `PackedGroups`
has neighbouring groups of one row side by side, for decode, and `RowLanes` one group of neighbouring rows, for
prefill.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from llvmlite import ir

from cpu_kernels.simd.vectors import I16, I32, I64, Vectors, vector


class Step(ABC):
    """One vector step: where its words are, and what becomes of the levels.

    Vectors of 16-bit lanes come in two lengths: `lanes` of them, or pairs of them, whose low lane belongs to a weight
    of the first half of its group and whose high lane to the weight eight places behind.
    """

    def __init__(self, vectors: Vectors, lanes: int) -> None:
        self.vectors, self.lanes = vectors, lanes

    @abstractmethod
    def plane(self, words_per_group: int, start_in_words_per_group: int) -> ir.Value:
        """Load the words of a plane with 2 words a group, as pairs, or 1; it starts at a multiple of the groups."""

    @abstractmethod
    def shared_plane(self, groups_per_word: int, start_in_half_words_per_group: int) -> ir.Value:
        """Load a plane with one word for 2 or 4 groups and give every group its copy: <lanes x i16>."""

    @abstractmethod
    def for_groups(self, factors: Sequence[int]) -> Sequence[int]:
        """Return the constants for the lanes, given those for groups 0, 1 ... of a word that several share."""

    @abstractmethod
    def take(self, pair: int, levels: ir.Value) -> None:
        """Take the levels of weights `pair` and `pair + 8`: pairs of 16-bit lanes. Called with pair 0 to 7."""

    def digits(self, fraction: ir.Value, radix: int, pairs: range) -> ir.Value:
        """Take one digit for each of `pairs`; return the fraction behind them."""
        for pair in pairs:
            self.take(pair, self.vectors.multiply_high(fraction, radix))
            fraction = self.vectors.multiply_low(fraction, radix)
        return fraction

    def both_halves(self, words: ir.Value) -> ir.Value:
        """Copy 16-bit lanes into both halves of 32-bit lanes: <lanes x i16> -> <2 * lanes x i16>."""
        builder = self.vectors.builder
        wide = self.vectors.widen(words)
        return self.halves(builder.or_(wide, builder.shl(wide, self.vectors.constant(I32, 16, self.lanes))))

    def pair_up(self, low: ir.Value, high: ir.Value) -> ir.Value:
        """Join two <lanes x i32> of 16-bit values to <2 * lanes x i16>, low first."""
        builder = self.vectors.builder
        return self.halves(builder.or_(low, builder.shl(high, self.vectors.constant(I32, 16, self.lanes))))

    def halves(self, value: ir.Value) -> ir.Value:
        """View <lanes x i32> as <2 * lanes x i16>."""
        return self.vectors.builder.bitcast(value, vector(I16, 2 * self.lanes))

    def wholes(self, value: ir.Value) -> ir.Value:
        """View <2 * lanes x i16> as <lanes x i32>."""
        return self.vectors.builder.bitcast(value, vector(I32, self.lanes))

    def weigh(self, value: ir.Value, weights: tuple[int, int], onto: ir.Value | None = None) -> ir.Value:
        """Return low * weights[0] + high * weights[1] of each 32-bit lane's halves, plus `onto`."""
        zero = self.vectors.constant(I32, 0, self.lanes)
        factors = self.vectors.constant(I16, weights, 2 * self.lanes)
        return self.vectors.dot_pairs(zero if onto is None else onto, value, factors)


class PackedGroups(Step):
    """Neighbouring groups of one packed row: 16, 8 or 4 lanes."""

    def __init__(self, vectors: Vectors, lanes: int, row: ir.Value, groups: ir.Value, first_group: ir.Value) -> None:
        """Take the address of the row, its number of groups, and the group of lane 0."""
        super().__init__(vectors, lanes)
        self._row, self._groups, self._first_group = row, groups, first_group

    def plane(self, words_per_group: int, start_in_words_per_group: int) -> ir.Value:
        """Load a plane with 2 words a group or 1."""
        builder = self.vectors.builder
        start = builder.mul(self._groups, I64(2 * start_in_words_per_group))
        offset = builder.add(start, builder.mul(self._first_group, I64(2 * words_per_group)))
        return self.vectors.load(builder.add(self._row, offset), I16, words_per_group * self.lanes)

    def shared_plane(self, groups_per_word: int, start_in_half_words_per_group: int) -> ir.Value:
        """Load a plane with one word for 2 or 4 groups."""
        builder = self.vectors.builder
        start = builder.mul(self._groups, I64(start_in_half_words_per_group))
        shift = {2: 0, 4: 1}[groups_per_word]  # bytes = 2 * group / groups_per_word
        offset = builder.add(start, builder.lshr(self._first_group, I64(shift)))
        count = self.lanes // groups_per_word
        words = self.vectors.load(builder.add(self._row, offset), I16, count)
        return self.vectors.shuffle(words, [lane // groups_per_word for lane in range(self.lanes)])

    def for_groups(self, factors: Sequence[int]) -> Sequence[int]:
        """Return all of them: lane g is group g."""
        return factors


class GroupLanes(PackedGroups):
    """Neighbouring groups of one row whose levels are multiplied with activations at once.

    The activations come as pairs: vector j holds, in neighbouring 16-bit lanes, weights j and j + 8 of every group
    (`quantize_row` lays them out so).

    Attributes:
        sums: the running integer sums of the groups, <lanes x i32>.

    """

    def __init__(
        self, vectors: Vectors, row: ir.Value, pairs: ir.Value, groups: ir.Value, first_group: ir.Value, sums: ir.Value
    ) -> None:
        """Take the addresses of the row and of int16 pairs [8, groups, 2], and the group of lane 0."""
        super().__init__(vectors, sums.type.count, row, groups, first_group)
        self._pairs = pairs
        self.sums = sums

    def take(self, pair: int, levels: ir.Value) -> None:
        """Multiply with the activations of weights `pair` and `pair + 8`, and add to the sums."""
        builder = self.vectors.builder
        plane = builder.mul(self._groups, I64(4 * pair))
        offset = builder.add(plane, builder.mul(self._first_group, I64(4)))
        x = self.vectors.load(builder.add(self._pairs, offset), I16, 2 * self.lanes)
        self.sums = self.vectors.dot_pairs(self.sums, levels, x)


class StoredGroups(PackedGroups):
    """Neighbouring groups of one row whose levels are kept, to be multiplied with several vectors: [8, lanes, 2]."""

    def __init__(
        self, vectors: Vectors, lanes: int, row: ir.Value, groups: ir.Value, first_group: ir.Value, target: ir.Value
    ) -> None:
        """Take the address to store at, too."""
        super().__init__(vectors, lanes, row, groups, first_group)
        self._target = target

    def take(self, pair: int, levels: ir.Value) -> None:
        """Store them."""
        self.vectors.store(levels, self._target, 4 * self.lanes * pair)


class RowLanes(Step):
    """One group of 16 neighbouring rows. The levels go into a tile.

    The words come turned, 16 rows side by side for each place in a row, and in a plane with two words a group both
    words of a row beside each other (`unpack.turn` lays them out so). A tile of 16-bit numbers has pairs as they
    are; one of 8-bit numbers has weights j, j + 1, j + 8, j + 9 in neighbouring lanes, for even j.
    """

    def __init__(
        self,
        vectors: Vectors,
        turned: ir.Value,
        groups: ir.Value,
        block: ir.Value,
        place: int,
        tile: ir.Value,
        bits: int,
    ) -> None:
        """Take group `place` (0 to 3) of a block: addresses of the turned words and of the group's part of the tile."""
        super().__init__(vectors, 16)
        self._turned, self._groups, self._block, self._place = turned, groups, block, place
        self._tile, self._bits = tile, bits
        self._even = None

    def _words(self, start: ir.Value, words_per_block: int, place: int, count: int) -> ir.Value:
        """Load `count` words a row, from word `place` of the block's part of a plane that begins with word `start`."""
        builder = self.vectors.builder
        number = builder.add(start, builder.add(builder.mul(self._block, I64(words_per_block)), I64(place)))
        address = builder.add(self._turned, builder.mul(number, I64(2 * self.lanes)))
        return self.vectors.load(address, I16, count * self.lanes)

    def plane(self, words_per_group: int, start_in_words_per_group: int) -> ir.Value:
        """Load a plane with 2 words a group or 1."""
        start = self.vectors.builder.mul(self._groups, I64(start_in_words_per_group))
        return self._words(start, 4 * words_per_group, self._place * words_per_group, words_per_group)

    def shared_plane(self, groups_per_word: int, start_in_half_words_per_group: int) -> ir.Value:
        """Load a plane with one word for 2 or 4 groups."""
        builder = self.vectors.builder
        start = builder.lshr(builder.mul(self._groups, I64(start_in_half_words_per_group)), I64(1))
        return self._words(start, 4 // groups_per_word, self._place // groups_per_word, 1)

    def for_groups(self, factors: Sequence[int]) -> Sequence[int]:
        """Return the one of this group."""
        return [factors[self._place % len(factors)]]

    def take(self, pair: int, levels: ir.Value) -> None:
        """Store them, two pairs at a time in a tile of 8-bit numbers."""
        builder = self.vectors.builder
        row_bytes = 4 * self.lanes
        if self._bits == 16:
            self.vectors.store(levels, self._tile, pair * row_bytes)
        elif pair % 2 == 0:
            self._even = levels
        else:
            odd = builder.shl(levels, self.vectors.constant(I16, 8, 2 * self.lanes))
            self.vectors.store(builder.or_(self._even, odd), self._tile, pair // 2 * row_bytes)


def depth_1(step: Step) -> ir.Value:
    """Take a step of depth 1; return the scale indices <lanes x i32>."""
    rest = step.digits(step.plane(2, 0), 3, range(8))
    return step.weigh(step.vectors.multiply_high(rest, (9, 3)), (3, 1))


def depth_2(step: Step) -> ir.Value:
    """Take a step of depth 2; return the scale indices <lanes x i32>."""
    vectors = step.vectors
    step.digits(step.plane(2, 0), 9, range(5))
    b = step.plane(1, 2)
    both = step.both_halves(b)
    for pair in (5, 6):
        power = 81 ** (pair - 5)
        fraction = vectors.multiply_low(both, (power, 9 * power))
        step.take(pair, vectors.multiply_high(fraction, 9))
    c = step.shared_plane(2, 6)
    last = vectors.multiply_high(vectors.multiply_low(c, step.for_groups((1, 9))), 9)
    seventh = vectors.multiply_high(vectors.multiply_low(step.halves(vectors.widen(b)), 9**4), 9)
    step.take(7, step.pair_up(step.wholes(seventh), vectors.widen(last)))
    return vectors.widen(vectors.multiply_high(vectors.multiply_low(c, step.for_groups((81, 81 * 27))), 27))


def depth_3(step: Step) -> ir.Value:
    """Take a step of depth 3; return the scale indices <lanes x i32>."""
    vectors = step.vectors
    trits_0 = vectors.multiply_high(step.digits(step.plane(2, 0), 27, range(3)), 3)
    trits_1 = vectors.multiply_high(step.digits(step.plane(2, 2), 27, range(3, 6)), 3)
    b = step.plane(1, 4)
    fraction = vectors.multiply_low(step.both_halves(b), (1, 27))
    step.take(6, vectors.multiply_high(fraction, 27))
    alone = step.halves(vectors.widen(b))
    seventh = vectors.multiply_high(vectors.multiply_low(alone, 27**2), 27)
    last = step.weigh(trits_1, (1, 0), onto=step.weigh(trits_0, (9, 3)))
    step.take(7, step.pair_up(step.wholes(seventh), last))
    middle = vectors.multiply_high(vectors.multiply_low(alone, 27**3), 3)
    d = vectors.multiply_high(vectors.multiply_low(step.shared_plane(4, 10), step.for_groups((1, 3, 9, 27))), 3)
    return step.weigh(middle, (3, 0), onto=step.weigh(trits_1, (0, 9), onto=vectors.widen(d)))


def depth_4(step: Step) -> ir.Value:
    """Take a step of depth 4; return the scale indices <lanes x i32>."""
    vectors = step.vectors
    joined = []
    for plane in range(3):
        rest = step.digits(step.plane(2, 2 * plane), 81, range(2 * plane, 2 * plane + 2))
        joined.append(step.weigh(vectors.multiply_high(rest, 9), (9, 1)))
    step.take(6, step.pair_up(joined[0], joined[1]))
    c = step.shared_plane(2, 12)
    last = vectors.multiply_high(vectors.multiply_low(c, step.for_groups((1, 81))), 81)
    step.take(7, step.pair_up(joined[2], vectors.widen(last)))
    high = vectors.multiply_high(vectors.multiply_low(c, step.for_groups((81**2, 3 * 81**2))), 3)
    factors = step.for_groups((1, 9, 81, 729))
    low = vectors.multiply_high(vectors.multiply_low(step.shared_plane(4, 13), factors), 9)
    return vectors.widen(vectors.builder.add(vectors.multiply_low(high, 9), low))


D1, D2, D3, D4 = ((0,), (0,) * 2, (0,) * 3, (0,) * 4)  # a depth as a type, see `instruction_set`
EXTRACT = {1: depth_1, 2: depth_2, 3: depth_3, 4: depth_4}
