"""Exact recovery of dequantized matrices: halves -> depth, levels, scale indices and codebook, without any change.

Some published checkpoints contain the decoded weights of a ternary quantizer, rounded to float16 or bfloat16. A matrix
has an exact fit if there are levels and at most 27 scales that decode (`docs/format.md` section 4) and round to exactly
its weights. `docs/recovery.md` describes the method and when it fails.

A half is a float16 or bfloat16 number as its bit pattern, uint16. A scale is the bit pattern of a float32 number as an
integer (`cpu_kernels/encoding/recover.py`). Matrices have dtype float16, uint16 for the bits of bfloat16, or float32 if
every weight is a half: checkpoints that were widened, and GGUF's ternary types TQ1_0 and TQ2_0.
"""

from __future__ import annotations

import enum
import itertools
import math
from dataclasses import dataclass

import numpy as np

from cpu_kernels.encoding.recover import allowed_scales, encode_halves, find_misfits
from cpu_kernels.packed_rows.layout import CODEBOOK_SIZE, GROUP_SIZE, level_offset
from cpu_kernels.threads.thread_pool import ThreadPool, default_thread_pool
from tritgguf.formats.dtypes import to_float32
from tritgguf.formats.matrix_rows import MatrixRows
from tritgguf.formats.trit_types import DEPTHS
from tritgguf.quantization.quantized_matrix import QuantizedMatrix, QuantizedRows
from tritgguf.quantization.scale_cover import NoCover, cover

_SIGN = 0x8000
_PROBES = 16  # groups to test first; they suffice to reject a matrix that was never quantized
_SAMPLE = 4096  # groups for the first codebook
_MISFITS = 4096  # misfits to collect before the codebook is updated
_LARGEST_FINITE = 0x7F7FFFFF  # as a float32


class NotHalvesError(ValueError):
    """A number is no half, so the matrix was not rounded to halves."""


class HalfType(enum.Enum):
    """The type of halves; its value is the dtype of arrays that store them."""

    FLOAT16 = np.dtype(np.float16)
    BFLOAT16 = np.dtype(np.uint16)

    @property
    def infinity(self) -> int:
        """The bit pattern of infinity; larger patterns are NaN, smaller ones are finite."""
        return 0x7C00 if self is HalfType.FLOAT16 else 0x7F80

    def round(self, values: np.ndarray) -> np.ndarray:
        """Round float32 values (not NaN) to halves, ties to even: uint16 of the same shape."""
        if self is HalfType.FLOAT16:
            with np.errstate(over="ignore"):
                return values.astype(np.float16).view(np.uint16)
        bits = values.view(np.uint32)
        return ((bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)

    def widen(self, halves: np.ndarray) -> np.ndarray:
        """Convert halves, uint16, to float32."""
        return to_float32(halves.view(self.value))

    def narrow(self, weights: np.ndarray) -> np.ndarray:
        """Return weights in the dtype of this type; NotHalvesError unless it holds them."""
        if weights.dtype == self.value:
            return weights
        if weights.dtype == np.float32 and not np.isnan(weights).any():
            halves = self.round(weights)
            if np.array_equal(self.widen(halves), weights):
                return halves.view(self.value)
        raise NotHalvesError("has weights that are no halves")


@dataclass(frozen=True)
class NoFit:
    """A matrix has no exact fit.

    Attributes:
        reason: why; it continues a message that begins with "tensor NAME".

    """

    reason: str


@dataclass(frozen=True)
class Fit:
    """An exact fit of a matrix.

    Attributes:
        depth: the least depth that reproduces the matrix.
        codebook: float32 [27], ascending scales; unused entries repeat the last one.
        half_type: the type of the weights, also if they are stored as float32.

    """

    depth: int
    codebook: np.ndarray
    half_type: HalfType

    def encode(self, weights: np.ndarray, thread_pool: ThreadPool | None = None) -> QuantizedMatrix:
        """Encode the matrix that the fit was found for: float16, the bits of bfloat16 or float32 [rows, columns].

        Decoding and rounding to halves reproduces every weight, except that -0.0 becomes 0.0: the format has no level
        for it. Raises ValueError if the fit does not reproduce a weight.
        """
        half_type = self.half_type
        groups = _groups(half_type.narrow(weights))
        offset = level_offset(self.depth)
        entries, table = _decoding_tables(self, half_type)
        levels, indices = np.empty(groups.shape, np.uint8), np.empty(groups.shape[:2], np.uint8)
        thread_pool = thread_pool or default_thread_pool()
        counts_of_threads = np.zeros((thread_pool.threads, len(self.codebook), 81), np.int64)
        arrays = groups, entries, table, levels, indices, counts_of_threads
        if sum(thread_pool.run(encode_halves, *arrays)):
            raise ValueError("is not the matrix that the fit was found for")
        counts = counts_of_threads.sum(axis=0)
        with np.errstate(invalid="ignore", over="ignore"):  # unused levels may overflow
            decoded = _decode(self.codebook, np.arange(81) - offset, offset)
            rounded = half_type.widen(half_type.round(decoded)).astype(np.float64)
            error = np.sum((rounded - decoded) ** 2 * counts, where=counts > 0)
            power = np.sum(rounded**2 * counts, where=counts > 0)
        return QuantizedMatrix(
            self.depth, levels.reshape(weights.shape), indices, self.codebook, float(error), float(power)
        )

    def encode_rows(self, matrix: MatrixRows, thread_pool: ThreadPool | None = None) -> QuantizedRows:
        """Encode the matrix block by block; the parts raise ValueError as `encode` does."""
        return QuantizedRows(self.codebook, (self.encode(block, thread_pool) for block in matrix.blocks()))


def recover_matrix(weights: np.ndarray, thread_pool: ThreadPool | None = None) -> QuantizedMatrix | NoFit:
    """Recover a dequantized matrix at the least depth that fits; takes and returns NoFit as `find_fit` does."""
    fit = find_fit(weights, thread_pool=thread_pool)
    return fit if isinstance(fit, NoFit) else fit.encode(weights, thread_pool)


def find_fit(
    weights: np.ndarray | MatrixRows,
    *,
    shallowest: int = DEPTHS[0],
    deepest: int = DEPTHS[-1],
    thread_pool: ThreadPool | None = None,
) -> Fit | NoFit:
    """Find the least depth that reproduces every weight of a matrix, and its codebook; NoFit says why there is none.

    Args:
        weights: [rows, columns], columns a multiple of 64: float16, uint16 for the bits of bfloat16, or float32 whose
            numbers are all halves. Others have no fit. A `MatrixRows` is read once per codebook.
        shallowest, deepest: the least and the greatest depth to try.
        thread_pool: the threads to use; None for all cores.

    """
    matrix = MatrixRows.of(weights) if isinstance(weights, np.ndarray) else weights
    found: Fit | NoFit | None = None if math.prod(matrix.shape) else NoFit("has no weights")
    for half_type in HalfType if found is None else ():  # numbers may be halves of both types, but fit only one
        try:
            narrowed = _narrowed(matrix, half_type)
            for depth in range(shallowest, deepest + 1):
                found = _find_fit_of_depth(narrowed, half_type, depth, thread_pool or default_thread_pool())
                if isinstance(found, Fit):
                    return found
        except NotHalvesError:
            continue
    return found or NoFit(f"is stored as {matrix.dtype}, and its numbers are no halves")


def _narrowed(matrix: MatrixRows, half_type: HalfType) -> MatrixRows:
    """Return a matrix with its rows as halves, checked as they are read; NotHalvesError if a first one is not."""
    if matrix.dtype == half_type.value:
        return matrix
    half_type.narrow(matrix.read(0, min(matrix.multiple, matrix.shape[0]))[:1])

    def read(first: int, last: int) -> np.ndarray:
        return half_type.narrow(matrix.read(first, last))

    return MatrixRows(matrix.shape, half_type.value, read, matrix.multiple)


def _groups(weights: np.ndarray) -> np.ndarray:
    """Return halves [rows, groups, 16], read-only like a mapped file, so that Numba compiles kernels only once."""
    halves = np.ascontiguousarray(weights).view(np.uint16).reshape(len(weights), -1, GROUP_SIZE)
    halves.flags.writeable = False
    return halves


def _find_fit_of_depth(matrix: MatrixRows, half_type: HalfType, depth: int, thread_pool: ThreadPool) -> Fit | NoFit:
    """Find a codebook for a sample of groups, then add misfits of the matrix to the sample until there are none.

    If the sample has no codebook, the matrix has none, so a matrix without a fit is often rejected early.
    """
    count = math.prod(matrix.shape) // GROUP_SIZE
    constraints = _Constraints(half_type, depth)
    indices = _spread(count, _PROBES)
    groups = _groups_with(matrix, indices)
    is_sampled = False
    while True:
        no_fit = constraints.add(groups, indices, matrix.shape[1] // GROUP_SIZE)
        if no_fit is not None:
            return no_fit
        codebook = constraints.codebook()
        if isinstance(codebook, NoFit):
            return codebook
        if is_sampled:
            fit = Fit(depth, codebook, half_type)
            indices, groups = _misfits(matrix, fit, half_type, thread_pool)
            if not indices.size:
                return fit
        else:
            indices, is_sampled = _spread(count, _SAMPLE), True
            groups = _groups_with(matrix, indices)


def _groups_with(matrix: MatrixRows, indices: np.ndarray) -> np.ndarray:
    """Return the groups with these indices, which ascend: uint16 [indices, 16]."""
    groups_per_row = matrix.shape[1] // GROUP_SIZE
    found = []
    for first_row, part in matrix.blocks_containing(indices // groups_per_row):
        flat = _groups(part).reshape(-1, GROUP_SIZE)
        offsets = indices - first_row * groups_per_row
        found.append(flat[offsets[(offsets >= 0) & (offsets < len(flat))]])
    return np.concatenate(found)


def _misfits(
    matrix: MatrixRows, fit: Fit, half_type: HalfType, thread_pool: ThreadPool
) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of groups that no codebook entry reproduces, int64 [n], and the groups, uint16 [n, 16].

    The list may be incomplete: reading stops after the block in which the number of misfits reaches `_MISFITS`.
    """
    entries, _ = _decoding_tables(fit, half_type)
    buffer = np.empty((thread_pool.threads, -(-_MISFITS // thread_pool.threads)), np.int64)
    indices, found = [np.empty(0, np.int64)], [np.empty((0, GROUP_SIZE), np.uint16)]
    first = 0
    for block in matrix.blocks():
        groups = _groups(block)
        counts = thread_pool.run(find_misfits, groups, entries, buffer)
        offsets = np.concatenate([buffer[thread, :count] for thread, count in enumerate(counts)])
        flat = groups.reshape(-1, GROUP_SIZE)
        indices.append(first + offsets)
        found.append(flat[offsets])
        first += len(flat)
        if sum(map(len, indices)) >= _MISFITS:
            break
    return np.concatenate(indices), np.concatenate(found)


def _spread(count: int, wanted: int) -> np.ndarray:
    """Return about `wanted` evenly spaced indices below `count`, ascending."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).astype(np.int64))


class _Constraints:
    """The scales that the sampled groups allow at one depth."""

    def __init__(self, half_type: HalfType, depth: int) -> None:
        self._half_type = half_type
        self._depth = depth
        self._offset = level_offset(depth)
        self._sets: dict[bytes, np.ndarray] = {}

    def add(self, groups: np.ndarray, indices: np.ndarray, groups_per_row: int) -> NoFit | None:
        """Add groups, uint16 [n, 16], with these indices in the matrix; return NoFit if one allows no scale."""
        magnitudes = np.sort(groups & np.uint16(_SIGN - 1), axis=1)
        if (magnitudes[:, -1] >= self._half_type.infinity).any():
            return NoFit("has a weight that is NaN or infinite")
        patterns, first = np.unique(magnitudes, axis=0, return_index=True)
        ranges, ends = self._allowed(patterns)
        parts = np.split(ranges, ends[:-1])
        is_zero = patterns[:, -1] == 0
        is_impossible = (np.diff(ends, prepend=0) == 0) & ~is_zero
        if is_impossible.any():
            row, group = divmod(int(indices[first[is_impossible]].min()), groups_per_row)
            columns = f"{GROUP_SIZE * group} to {GROUP_SIZE * group + GROUP_SIZE - 1}"
            return NoFit(
                f"has a group of weights (row {row}, columns {columns}) that no scale reproduces at depth {self._depth}"
            )
        for part in itertools.compress(parts, ~is_zero):
            self._sets.setdefault(part.tobytes(), part)
        return None

    def _allowed(self, patterns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the ranges of scales that groups of sorted magnitudes allow, int64 [n, 2], and each group's end."""
        values, value_indices = np.unique(patterns, return_inverse=True)
        value_indices = value_indices.reshape(patterns.shape).astype(np.int32)
        if values[0] == 0:
            values, value_indices = values[1:], value_indices - 1
        lows = _first_scales(values, self._half_type, self._offset)
        highs = _first_scales(values + np.uint16(1), self._half_type, self._offset) - 1
        ends = np.empty(len(patterns), np.int64)
        ranges = np.empty((patterns.size * self._offset, 2), np.int64)
        allowed_scales(value_indices, lows, highs, ends, ranges)
        return ranges[: ends[-1]].copy(), ends

    def codebook(self) -> np.ndarray | NoFit:
        """Return a codebook that reproduces all sampled groups: float32 [27]."""
        found = cover(list(self._sets.values()), CODEBOOK_SIZE)
        if isinstance(found, NoCover):
            if found.proven:
                return NoFit("needs more than 27 scales")
            return NoFit("has groups that several scales reproduce, and no 27 scales for all groups were found")
        scales = [scale_range.middle for scale_range in found] or [0]
        scales += [scales[-1]] * (CODEBOOK_SIZE - len(scales))
        return np.array(scales, np.uint32).view(np.float32)


def _first_scales(halves: np.ndarray, half_type: HalfType, offset: int) -> np.ndarray:
    """Return the least scale at which each level 1 to h rounds to at least each half (> 0): int64 [halves, h]."""
    target = halves[:, np.newaxis]
    levels = np.arange(1, offset + 1)

    def reaches(scales: np.ndarray) -> np.ndarray:
        values = scales.astype(np.uint32).view(np.float32) / np.float32(offset) * levels.astype(np.float32)
        return half_type.round(values) >= target

    # Rounding changes halfway to the half below; the three roundings of `_decode` shift this by a few scales at most.
    edge = (half_type.widen(halves) + half_type.widen(halves - np.uint16(1)).astype(np.float64)) / 2
    guess = (edge[:, np.newaxis] * offset / levels).astype(np.float32).view(np.uint32).astype(np.int64)
    low, high = np.maximum(guess - 8, 0), np.minimum(guess + 8, _LARGEST_FINITE)
    with np.errstate(over="ignore"):
        low[reaches(low)] = 0
        high[~reaches(high)] = _LARGEST_FINITE + 1
        while (high - low > 1).any():
            middle = (low + high) // 2
            is_high = reaches(middle)
            high, low = np.where(is_high, middle, high), np.where(is_high, low, middle)
    return high


def _decoding_tables(fit: Fit, half_type: HalfType) -> tuple[np.ndarray, np.ndarray]:
    """Return, for each half, the codebook entries and levels that reproduce it.

    Returns:
        uint32 [65536], a bit mask of the codebook entries that reproduce a half, and uint8 [27, 65536], the level + h
        at which they do. Every entry reproduces zero at level 0.

    """
    offset = level_offset(fit.depth)
    entries = np.zeros(1 << 16, np.uint32)
    table = np.full((CODEBOOK_SIZE, 1 << 16), offset, np.uint8)
    with np.errstate(over="ignore"):
        halves = half_type.round(_decode(fit.codebook, np.arange(offset + 1), offset))
    entry, level = np.nonzero((halves > 0) & (halves < half_type.infinity))
    # Reversed, so that the lowest of several levels that reproduce a half is written last.
    entry, level = entry[::-1], level[::-1]
    for sign, half in (1, halves[entry, level]), (-1, halves[entry, level] | np.uint16(_SIGN)):
        np.bitwise_or.at(entries, half, np.uint32(1) << entry.astype(np.uint32))
        table[entry, half] = offset + sign * level
    entries[[0, _SIGN]] = (1 << CODEBOOK_SIZE) - 1
    return entries, table


def _decode(codebook: np.ndarray, levels: np.ndarray, offset: int) -> np.ndarray:
    """Return float32 [27, levels], decoded as in `docs/format.md` section 4."""
    return (codebook / np.float32(offset))[:, np.newaxis] * levels.astype(np.float32)
