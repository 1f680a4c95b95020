"""Is every word of packed rows one that an encoder writes, and every other weight a number?

A word w is a code c stored as ceil(c * 65536 / 59049), so w * 59049 = c * 65536 + r with r below 59049: the lower half
of the product tells. Words with a trailing digit that no weight uses have a code that is a multiple of its radix.
"""

from __future__ import annotations

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

from cpu_kernels.instruction_set import PORTABLE
from cpu_kernels.layout import WORDS_PER_BLOCK
from cpu_kernels.simd import I16, I32, I64, Vectors, vector

_CODES = np.uint16(3**10)
_BYTES_AT_ONCE = 1024
# By depth: the radix of the digit that is zero, and in which words: the odd ones, or the last one of each block.
_ZERO_RADIX = np.array([0, 3, 0, 729, 9], np.uint16)
# A multiple of 3, and no other number, is at most a third of 65535 when it is multiplied with 3's inverse mod 65536.
_THIRD, _THIRD_OF_ALL = np.uint16(43691), np.uint16(21845)
_WORDS_PER_BLOCK = np.array([1, *(WORDS_PER_BLOCK[depth] for depth in (1, 2, 3, 4))])
_IN_ODD_WORDS = np.array([False, True, False, False, False])


@numba.njit(cache=True, nogil=True)
def first_damaged_row(rows, depth):
    """Return the number of the first row with a word that no encoder writes, or -1.

    rows: uint16 [rows, words], depth: 1 to 4.
    """
    words = rows.shape[1]
    radix = _ZERO_RADIX[depth]
    tail = words if not radix or _IN_ODD_WORDS[depth] else words - words // _WORDS_PER_BLOCK[depth]
    for row in range(len(rows)):
        wrong = np.uint16(0)
        for k in range(words):
            wrong |= np.uint16(np.uint16(rows[row, k] * _CODES) >= _CODES)
        if _IN_ODD_WORDS[depth]:
            for k in range(words // 2 * 2):
                product = np.uint32(rows[row, k]) * np.uint32(_CODES)
                is_multiple = np.uint16(np.uint16(product >> np.uint32(16)) * _THIRD) <= _THIRD_OF_ALL
                wrong |= np.uint16(k & 1) & np.uint16(not is_multiple)
        for k in range(tail, words):
            code = (np.uint32(rows[row, k]) * np.uint32(_CODES)) >> np.uint32(16)
            wrong |= np.uint16(code % np.uint32(radix) != 0)
        if wrong:
            return row
    return -1


def _largest_of(element):
    """Return an intrinsic: the largest of 1,024 bytes of unsigned integers at an address, other bits masked away."""

    @intrinsic
    def emit(typing_context, address, mask):
        def generate(context, builder, signature, arguments):
            vectors = Vectors(builder, PORTABLE)
            lanes = 64 // (element.width // 8)
            kind = vector(element, lanes)
            kept = vectors.fill(builder.trunc(arguments[1], element), lanes)
            largest = vectors.constant(element, 0, lanes)
            for offset in range(0, _BYTES_AT_ONCE, 64):
                masked = builder.and_(vectors.load(arguments[0], element, lanes, offset), kept)
                largest = vectors.call(f"llvm.umax.v{lanes}i{element.width}", kind, largest, masked)
            found = vectors.call(f"llvm.vector.reduce.umax.v{lanes}i{element.width}", element, largest)
            return builder.zext(found, I64)

        return types.int64(types.intp, types.int64), generate

    return emit


_largest_of_16_bits, _largest_of_32_bits = _largest_of(I16), _largest_of(I32)


@numba.njit(cache=True, nogil=True)
def first_not_finite(bits, exponent):
    """Return the place of the first NaN or infinity, or -1.

    bits: uint16 or uint32 [n], the bits of float16 or float32; exponent: those of its exponent, all set.
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
    for place in range(first, len(bits)):
        if (np.int64(bits[place]) & exponent) == exponent:
            return place
    return -1
