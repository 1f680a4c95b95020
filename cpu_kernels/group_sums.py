"""The heart of the kernels: integer dot products of packed groups with int16 activations, for each depth.

A vector step covers `lanes` groups (16, 8 or 4); the 32-bit lane g is group g. Activations come as pairs: vector j
holds, in neighbouring 16-bit lanes, weights j and j + 8 of every group (`quantize_row` lays them out so).
The planes and the fields of their words are those of `docs/format.md` section 3; each function below reads them in
the order in which the document lists them.
"""

from __future__ import annotations

from dataclasses import dataclass

from llvmlite import ir

from cpu_kernels.simd import I16, I32, I64, Vectors, vector


@dataclass
class Step:
    """One vector step: where its words and activations are, and the running integer sums."""

    vectors: Vectors
    words: ir.Value  # address of the row
    activations: ir.Value  # address of the int16 pairs [8, groups, 2]
    groups: ir.Value  # groups in a row
    first_group: ir.Value  # group of lane 0
    lanes: int
    sums: ir.Value  # <lanes x i32>

    def plane(self, words_per_group: int, start_in_words_per_group: float, doubled: bool = False) -> ir.Value:
        """Load this step's words of a plane with 2 or 1 words a group; the plane starts at a multiple of `groups`."""
        builder = self.vectors.builder
        start = builder.mul(self.groups, I64(int(2 * start_in_words_per_group)))
        offset = builder.add(start, builder.mul(self.first_group, I64(2 * words_per_group)))
        return self.vectors.load(builder.add(self.words, offset), I16, words_per_group * self.lanes)

    def shared_plane(self, groups_per_word: int, start_in_half_words_per_group: int) -> ir.Value:
        """Load a plane with one word for 2 or 4 groups and give every group its copy: <lanes x i16>."""
        builder = self.vectors.builder
        start = builder.mul(self.groups, I64(start_in_half_words_per_group))
        shift = {2: 0, 4: 1}[groups_per_word]  # bytes = 2 * group / groups_per_word
        offset = builder.add(start, builder.lshr(self.first_group, I64(shift)))
        count = self.lanes // groups_per_word
        words = self.vectors.load(builder.add(self.words, offset), I16, count)
        return self.vectors.shuffle(words, [lane // groups_per_word for lane in range(self.lanes)])

    def accumulate(self, pair: int, levels: ir.Value) -> None:
        """Add levels [2 * lanes x i16] times the activations of weights `pair` and `pair + 8`."""
        builder = self.vectors.builder
        plane = builder.mul(self.groups, I64(4 * pair))
        offset = builder.add(plane, builder.mul(self.first_group, I64(4)))
        x = self.vectors.load(builder.add(self.activations, offset), I16, 2 * self.lanes)
        self.sums = self.vectors.dot_pairs(self.sums, levels, x)

    def digits(self, fraction: ir.Value, radix: int, pairs: range) -> ir.Value:
        """Accumulate one digit for each of `pairs`; return the fraction behind them."""
        for pair in pairs:
            self.accumulate(pair, self.vectors.multiply_high(fraction, radix))
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


def depth_1(step: Step) -> ir.Value:
    """Accumulate a step of depth 1; return the scale indices <lanes x i32>."""
    rest = step.digits(step.plane(2, 0), 3, range(8))
    return step.weigh(step.vectors.multiply_high(rest, (9, 3)), (3, 1))


def depth_2(step: Step) -> ir.Value:
    """Accumulate a step of depth 2; return the scale indices <lanes x i32>."""
    vectors = step.vectors
    step.digits(step.plane(2, 0), 9, range(5))
    b = step.plane(1, 2)
    both = step.both_halves(b)
    for pair in (5, 6):
        power = 81 ** (pair - 5)
        fraction = vectors.multiply_low(both, (power, 9 * power))
        step.accumulate(pair, vectors.multiply_high(fraction, 9))
    c = step.shared_plane(2, 6)
    last = vectors.multiply_high(vectors.multiply_low(c, (1, 9)), 9)
    seventh = vectors.multiply_high(vectors.multiply_low(step.halves(vectors.widen(b)), 9**4), 9)
    step.accumulate(7, step.pair_up(step.wholes(seventh), vectors.widen(last)))
    return vectors.widen(vectors.multiply_high(vectors.multiply_low(c, (81, 81 * 27)), 27))


def depth_3(step: Step) -> ir.Value:
    """Accumulate a step of depth 3; return the scale indices <lanes x i32>."""
    vectors = step.vectors
    trits_0 = vectors.multiply_high(step.digits(step.plane(2, 0), 27, range(3)), 3)
    trits_1 = vectors.multiply_high(step.digits(step.plane(2, 2), 27, range(3, 6)), 3)
    b = step.plane(1, 4)
    fraction = vectors.multiply_low(step.both_halves(b), (1, 27))
    step.accumulate(6, vectors.multiply_high(fraction, 27))
    alone = step.halves(vectors.widen(b))
    seventh = vectors.multiply_high(vectors.multiply_low(alone, 27**2), 27)
    last = step.weigh(trits_1, (1, 0), onto=step.weigh(trits_0, (9, 3)))
    step.accumulate(7, step.pair_up(step.wholes(seventh), last))
    middle = vectors.multiply_high(vectors.multiply_low(alone, 27**3), 3)
    d = vectors.multiply_high(vectors.multiply_low(step.shared_plane(4, 10), (1, 3, 9, 27)), 3)
    return step.weigh(middle, (3, 0), onto=step.weigh(trits_1, (0, 9), onto=vectors.widen(d)))


def depth_4(step: Step) -> ir.Value:
    """Accumulate a step of depth 4; return the scale indices <lanes x i32>."""
    vectors = step.vectors
    joined = []
    for plane in range(3):
        rest = step.digits(step.plane(2, 2 * plane), 81, range(2 * plane, 2 * plane + 2))
        joined.append(step.weigh(vectors.multiply_high(rest, 9), (9, 1)))
    step.accumulate(6, step.pair_up(joined[0], joined[1]))
    c = step.shared_plane(2, 12)
    last = vectors.multiply_high(vectors.multiply_low(c, (1, 81)), 81)
    step.accumulate(7, step.pair_up(joined[2], vectors.widen(last)))
    high = vectors.multiply_high(vectors.multiply_low(c, (81**2, 3 * 81**2)), 3)
    low = vectors.multiply_high(vectors.multiply_low(step.shared_plane(4, 13), (1, 9, 81, 729)), 9)
    return vectors.widen(vectors.builder.add(vectors.multiply_low(high, 9), low))


GROUP_SUMS = {1: depth_1, 2: depth_2, 3: depth_3, 4: depth_4}
