"""Transposing a 16 x 16 matrix in registers."""

from __future__ import annotations

from llvmlite import ir

from cpu_kernels.simd.vectors import I32, Vectors, vector


def transpose(vectors: Vectors, rows: list[ir.Value]) -> list[ir.Value]:
    """Return the columns of a 16 x 16 matrix of 32-bit lanes; each shuffle is a single instruction on x86."""

    def shuffled(a: ir.Value, b: ir.Value, lanes: list[int]) -> ir.Value:
        return vectors.builder.shuffle_vector(a, b, ir.Constant(vector(I32, 16), lanes))

    def interleaved(a: ir.Value, b: ir.Value, width: int) -> list[ir.Value]:
        """Interleave elements of `width` lanes within each quad of lanes; return the lower and the upper halves."""
        results = []
        for half in (0, 2):
            lanes = []
            for quad in range(0, 16, 4):
                for element in range(0, 2, width):
                    start = quad + half + element
                    lanes += [*range(start, start + width), *range(16 + start, 16 + start + width)]
            results.append(shuffled(a, b, lanes))
        return results

    quads = []  # quads[4 * b + c]: columns c, c + 4, c + 8 and c + 12 of rows 4 * b to 4 * b + 3
    for first in range(0, 16, 4):
        low, high = interleaved(rows[first], rows[first + 1], 1), interleaved(rows[first + 2], rows[first + 3], 1)
        for a, b in zip(low, high, strict=True):
            quads += interleaved(a, b, 2)
    columns: list[ir.Value] = [None] * 16
    even = [*range(0, 4), *range(8, 12), *range(16, 20), *range(24, 28)]
    odd = [lane + 4 for lane in even]
    for c in range(4):
        a, b, d, e = quads[c::4]
        for first, pattern in ((0, even), (1, odd)):
            left, right = shuffled(a, b, pattern), shuffled(d, e, pattern)
            columns[4 * first + c] = shuffled(left, right, even)
            columns[4 * (first + 2) + c] = shuffled(left, right, odd)
    return columns
