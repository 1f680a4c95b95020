"""Validation of weights: packed rows have only words that an encoder writes, and float weights are finite.

A code c is stored as the word w = ceil(c * 65536 / 59049). So w is valid if w * 59049 = c * 65536 + r with r below
59049: r is the lower half of the product. If a word's last digit is unused, its code is a multiple of that radix.
"""

from __future__ import annotations

import numpy as np

from cpu_kernels.compilation import lazy_numba as numba
from cpu_kernels.compilation.lazy_numba import intrinsic, types
from cpu_kernels.packed_rows.layout import WORDS_PER_BLOCK
from cpu_kernels.simd.variants import PORTABLE
from cpu_kernels.simd.vectors import I16, I32, I64, Vectors, vector

_CODES = np.uint16(3**10)
_BYTES_AT_ONCE = 1024
# By depth: the radix of the unused digit, which is zero (1: there is none), and the words that have it: those with odd
# numbers, or the last word of each block.
_ZERO_RADIX = [1, 3, 1, 729, 9]
_IN_ODD_WORDS = np.array([False, True, False, False, False])
_WORDS_PER_BLOCK = np.array([1, *(WORDS_PER_BLOCK[depth] for depth in (1, 2, 3, 4))])
# A number is a multiple of an odd radix if and only if its product with the radix's inverse modulo 65536 is at most
# 65535 / radix. So every test is an upper bound, and only the largest products of a row are needed.
_INVERSE = np.array([pow(radix, -1, 1 << 16) for radix in _ZERO_RADIX], np.uint16)
_LARGEST_MULTIPLE = np.array([65535 // radix for radix in _ZERO_RADIX], np.uint16)


@numba.njit(cache=True, nogil=True)
def first_damaged_row(rows, depth):
    """Return the index of the first row with an invalid word, or -1.

    rows: uint16 [rows, words]; depth: 1 to 4.
    """
    words = rows.shape[1]
    inverse, in_odd_words = _INVERSE[depth], _IN_ODD_WORDS[depth]
    last_words = 0 if in_odd_words or inverse == 1 else words // _WORDS_PER_BLOCK[depth]
    for row in range(len(rows)):
        remainder = multiple = np.uint16(0)
        for k in range(words):
            remainder = max(remainder, np.uint16(rows[row, k] * _CODES))
        if in_odd_words:
            for k in range(words):
                code = (np.uint32(rows[row, k]) * np.uint32(_CODES)) >> np.uint32(16)
                multiple = max(multiple, np.uint16(np.uint16(code) * inverse * np.uint16(k & 1)))
        for k in range(words - last_words, words):
            code = (np.uint32(rows[row, k]) * np.uint32(_CODES)) >> np.uint32(16)
            multiple = max(multiple, np.uint16(np.uint16(code) * inverse))
        if remainder >= _CODES or multiple > _LARGEST_MULTIPLE[depth]:
            return row
    return -1


def _largest_of(element):
    """Return an intrinsic that returns the largest of 1,024 bytes of masked unsigned integers at an address."""

    @intrinsic
    def emit(typing_context, address, mask):
        def generate(context, builder, signature, arguments):
            vectors = Vectors(builder, PORTABLE)
            lanes = 64 // (element.width // 8)
            vector_type = vector(element, lanes)
            kept = vectors.fill(builder.trunc(arguments[1], element), lanes)
            largest = vectors.constant(element, 0, lanes)
            for offset in range(0, _BYTES_AT_ONCE, 64):
                masked = builder.and_(vectors.load(arguments[0], element, lanes, offset), kept)
                largest = vectors.call(f"llvm.umax.v{lanes}i{element.width}", vector_type, largest, masked)
            found = vectors.call(f"llvm.vector.reduce.umax.v{lanes}i{element.width}", element, largest)
            return builder.zext(found, I64)

        return types.int64(types.intp, types.int64), generate

    return emit


_largest_of_16_bits, _largest_of_32_bits = _largest_of(I16), _largest_of(I32)


@numba.njit(cache=True, nogil=True)
def first_not_finite(bits, exponent):
    """Return the index of the first NaN or infinity, or -1.

    bits: uint16 or uint32 [n], the bits of float16 or float32; exponent: the mask of the exponent's bits.
    """
    at_once = _BYTES_AT_ONCE // bits.itemsize
    whole = len(bits) // at_once * at_once
    first = whole
    for start in range(0, whole, at_once):
        address = bits.ctypes.data + start * bits.itemsize
        if bits.itemsize == 2:
            largest = _largest_of_16_bits(address, exponent)
        else:
            largest = _largest_of_32_bits(address, exponent)
        if largest == exponent:
            first = start
            break
    for index in range(first, len(bits)):
        if (np.int64(bits[index]) & exponent) == exponent:
            return index
    return -1
