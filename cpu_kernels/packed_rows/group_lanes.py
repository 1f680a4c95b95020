"""Steps along packed rows whose levels are multiplied with a vector's activations in registers, for decode."""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir

from cpu_kernels.packed_rows.extract import PackedGroups
from cpu_kernels.packed_rows.layout import QUADS
from cpu_kernels.simd.pair_lookup import PairLookup
from cpu_kernels.simd.vectors import I8, I16, I64, Vectors


class GroupLanes(PackedGroups):
    """Neighbouring groups of one row whose levels are multiplied with activations in registers.

    `quantize_row` lays out the activations in planes: of 16 bits, plane j has elements j and j + 8 of every group in
    neighbouring lanes; of 8 bits, elements 2 j, 2 j + 1, 2 j + 8 and 2 j + 9.

    Attributes:
        sums: the groups' integer dot products so far, <lanes x i32>.

    """

    def __init__(
        self,
        vectors: Vectors,
        row: ir.Value,
        integers: ir.Value,
        bits: int,
        groups: ir.Value,
        first_group: ir.Value,
        sums: ir.Value,
    ) -> None:
        """Start at group `first_group` of `row` and of `integers`, both addresses; these have 8 or 16 `bits`."""
        super().__init__(vectors, sums.type.count, row, groups, first_group)
        self._integers, self._bits = integers, bits
        self._even: ir.Value | None = None
        self.sums = sums

    def _plane_of_vector(self, number: int) -> ir.Value:
        """Return where the groups' activations of a plane lie."""
        builder = self.vectors.builder
        plane = builder.mul(self._groups, I64(4 * number))
        return builder.add(self._integers, builder.add(plane, builder.mul(self._first_group, I64(4))))

    def _activations(self, plane: int, element: ir.Type) -> ir.Value:
        return self.vectors.load(self._plane_of_vector(plane), element, 32 * self.lanes // element.width)

    def use_levels(self, pair: int, levels: ir.Value) -> None:
        """Multiply the levels with the activations of the same elements, and add the products to `sums`."""
        if self._bits == 16:
            x = self._activations(pair, I16)
            self.sums = self.vectors.dot_pairs(self.sums, levels, x)
        elif pair % 2 == 0:
            self._even = levels
        else:
            self._add_quads(pair // 2, self.join_pairs(self._even, levels), self._activations(pair // 2, I8))

    def _add_quads(self, plane: int, levels: ir.Value, x: ir.Value) -> None:
        self.sums = self.vectors.dot_quads(self.sums, levels, x)


class RowPair(GroupLanes):
    """Eight neighbouring groups of two rows, those of the second row behind those of the first, as in `GroupLanes`.

    Each activation is loaded once for both rows. Vectors of a word for each group are in the order of `PairLookup`.
    """

    def __init__(
        self,
        vectors: Vectors,
        rows: Sequence[ir.Value],
        integers: ir.Value,
        bits: int,
        groups: ir.Value,
        first_group: ir.Value,
        sums: ir.Value,
        *,
        small_levels: bool,
    ) -> None:
        """Start at group `first_group` of both rows, see `GroupLanes`; `sums` are <16 x i32>.

        `small_levels` means that a group's products with activations of 8 bits, added in pairs, fit 16 bits.
        """
        super().__init__(vectors, rows[0], integers, bits, groups, first_group, sums)
        self._rows = rows
        self._adds_products = small_levels and not vectors.has_quads
        self._products: ir.Value | None = None

    def _both(self, offset: ir.Value, count: int) -> list[ir.Value]:
        builder = self.vectors.builder
        return [self.vectors.load(builder.add(row, offset), I16, count) for row in self._rows]

    def plane(self, words_per_group: int, start_in_words_per_group: int) -> ir.Value:
        """Load a plane with 2 words per group or 1."""
        offset = self._place_of_plane(words_per_group, start_in_words_per_group)
        words = self.vectors.join(*self._both(offset, words_per_group * self.lanes // 2))
        return words if words_per_group == 2 else self.vectors.shuffle(words, PairLookup.ORDER)

    def shared_plane(self, groups_per_word: int, start_in_half_words_per_group: int) -> ir.Value:
        """Load a plane with one word per 2 or 4 groups."""
        offset = self._place_of_shared_plane(groups_per_word, start_in_half_words_per_group)
        words = self.vectors.join(*self._both(offset, self.lanes // 2 // groups_per_word))
        return self.vectors.spread(words, [group // groups_per_word for group in PairLookup.ORDER])

    def interleave_words(self, low: ir.Value, high: ir.Value) -> ir.Value:
        """Interleave two vectors of a word for each group; the result is in the groups' order."""
        return self.vectors.join(*[self.vectors.interleave_halves(low, high, half) for half in range(2)])

    def _activations(self, plane: int, element: ir.Type) -> ir.Value:
        x = self.vectors.load(self._plane_of_vector(plane), element, 16 * self.lanes // element.width)
        return self.vectors.join(x, x)

    def _add_quads(self, plane: int, levels: ir.Value, x: ir.Value) -> None:
        if not self._adds_products:
            super()._add_quads(plane, levels, x)
            return
        products = self.vectors.multiply_quads(levels, x)
        self._products = self.vectors.builder.add(self._products, products) if self._products else products
        if plane == QUADS - 1:
            self.sums = self.weighted_sum(self._products, (1, 1), addend=self.sums)
