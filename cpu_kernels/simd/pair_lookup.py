"""Look-up of floats in a table of 32, with byte shuffles."""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir

from cpu_kernels.simd.variants import AVX2, AVX2_VNNI
from cpu_kernels.simd.vectors import FLOAT, I8, I16, I32, Vectors, vector

_ENTRIES = 16  # of a byte shuffle
_FLOAT_BYTES = 4
_LANE_BYTES = 16  # AVX2 shuffles within halves of a register
_BYTES = 2 * _LANE_BYTES


class PairLookup:
    """A table of 32 floats in four planes of bytes, in which two vectors of 16 indices are looked up at once.

    A permutation of floats (`vpermps`) takes four tables of 8 and six blends for 16 indices, and is slow on some
    processors. A byte shuffle takes 32 indices, but tables of 16, so a plane has two tables: the one that does not
    have an index gives zero.
    """

    ORDER = (0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15)  # of the groups in a vector of 16-bit indices

    def __init__(self, vectors: Vectors, address: ir.Value) -> None:
        """Load the table from its address."""
        self._vectors = vectors
        # A shuffle gives zero where an index has its highest bit set.
        self._constants = [vectors.keep(vectors.constant(I8, k, _BYTES)) for k in (0x80 - _ENTRIES, _ENTRIES)]
        self._planes = []
        for byte in range(_FLOAT_BYTES):
            halves = []
            for half in range(2):
                packed = vectors.load(address, I8, _ENTRIES * _FLOAT_BYTES, half * _ENTRIES * _FLOAT_BYTES)
                halves.append(vectors.shuffle(packed, [_FLOAT_BYTES * (k % _ENTRIES) + byte for k in range(_BYTES)]))
            self._planes.append(halves)

    @staticmethod
    def available(vectors: Vectors) -> bool:
        """Return whether the instruction set has byte shuffles, and no permutation of 32 floats."""
        return vectors.isa in (AVX2, AVX2_VNNI)

    def find(self, indices: Sequence[ir.Value]) -> list[ir.Value]:
        """Return the floats at two vectors of indices, <16 x i16> or <16 x i32> below 32: <16 x float> each."""
        vectors, builder = self._vectors, self._vectors.builder
        packed = self._pack(indices)
        low = builder.add(packed, self._constants[0])
        high = builder.sub(packed, self._constants[1])
        planes = [
            builder.or_(self._shuffle_bytes(first, low), self._shuffle_bytes(second, high))
            for first, second in self._planes
        ]
        rows = []
        for row in range(2):
            low_half, high_half = (vectors.interleave_halves(planes[k], planes[k + 1], row) for k in (0, 2))
            low, high = (builder.bitcast(half, vector(I16, _BYTES // 2)) for half in (low_half, high_half))
            found = [vectors.interleave_halves(low, high, half) for half in range(2)]
            floats = [builder.bitcast(half, vector(FLOAT, _BYTES // _FLOAT_BYTES)) for half in found]
            rows.append(vectors.join(*floats))
        return rows

    def _pack(self, indices: Sequence[ir.Value]) -> ir.Value:
        """Return all indices as bytes: 0 to 3 and 8 to 11 of the first vector, then of the second; then the others.

        So the interleaving of bytes and then of words, within halves of a register, puts neighbours beside each other.
        """
        vectors = self._vectors
        if indices[0].type.element == I32:
            words = vector(I16, _BYTES // 2)
            indices = [vectors.call("llvm.x86.avx2.packusdw", words, *vectors.split(row)) for row in indices]
        return vectors.call("llvm.x86.avx2.packuswb", vector(I8, _BYTES), *indices)

    def _shuffle_bytes(self, table: ir.Value, indices: ir.Value) -> ir.Value:
        return self._vectors.call("llvm.x86.avx2.pshuf.b", table.type, table, indices)
