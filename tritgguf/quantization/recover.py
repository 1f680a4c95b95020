"""Exact recovery: dequantized halves -> depth, levels, scale indices and codebook, with no weight changed.

Published checkpoints hold what a quantizer decoded, rounded to float16 or bfloat16. A matrix has an exact fit when
levels and at most 27 scales exist that decode (`docs/format.md` section 4) and round to each of its numbers again.
How it is found, and when there is none, is told in `docs/recovery.md`.

A half is a bit pattern, uint16, and so is a scale: that of a float32 number, as an integer (`encoding/recover.py`).
Matrices come as checkpoints store them: float16, or uint16, which stands for the bits of bfloat16.
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
_PROBES = 16  # groups that are looked at first: a matrix that never was quantized ends here
_SAMPLE = 4096  # groups that the first codebook is made from
_MISFITS = 4096  # groups that a codebook may miss before a better one is made
_LARGEST_FINITE = 0x7F7FFFFF  # as a float32


class HalfType(enum.Enum):
    """How halves are to be read; its value is the dtype of the arrays that hold them."""

    FLOAT16 = np.dtype(np.float16)
    BFLOAT16 = np.dtype(np.uint16)

    @property
    def infinity(self) -> int:
        """The bit pattern of infinity; those above it are NaN, all below are finite."""
        return 0x7C00 if self is HalfType.FLOAT16 else 0x7F80

    def round(self, values: np.ndarray) -> np.ndarray:
        """Round float32 numbers that are not NaN to halves, to nearest even: uint16 of the same shape."""
        if self is HalfType.FLOAT16:
            with np.errstate(over="ignore"):
                return values.astype(np.float16).view(np.uint16)
        bits = values.view(np.uint32)
        return ((bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)

    def widen(self, halves: np.ndarray) -> np.ndarray:
        """Return the float32 numbers that halves, uint16, stand for."""
        return to_float32(halves.view(self.value))


@dataclass(frozen=True)
class NoFit:
    """A matrix has no exact fit.

    Attributes:
        reason: why, as a sentence that goes on after "tensor NAME".

    """

    reason: str


@dataclass(frozen=True)
class Fit:
    """What a matrix decodes from.

    Attributes:
        depth: the least number of trits per weight that gives it.
        codebook: float32 [27], ascending scales; entries that are not needed repeat the last one.

    """

    depth: int
    codebook: np.ndarray

    def encode(self, weights: np.ndarray, thread_pool: ThreadPool | None = None) -> QuantizedMatrix:
        """Encode the matrix that the fit was found for: float16 or the bits of bfloat16 [rows, columns].

        Decoding it and rounding to halves gives every number again. The sign of a zero is not kept: the format has
        no level for -0.0. Raises ValueError if a weight is another.
        """
        half_type, groups = HalfType(weights.dtype), _groups(weights)
        offset = level_offset(self.depth)
        entries, table = _decoding_tables(self, half_type)
        levels, indices = np.empty(groups.shape, np.uint8), np.empty(groups.shape[:2], np.uint8)
        results = (thread_pool or default_thread_pool()).run(encode_halves, groups, entries, table, levels, indices)
        counts = np.sum([counts for counts, _ in results], axis=0)
        if sum(misfits for _, misfits in results):
            raise ValueError("is not the matrix that the fit was found for")
        with np.errstate(invalid="ignore", over="ignore"):  # levels that do not occur may overflow
            decoded = _decode(self.codebook, np.arange(81) - offset, offset)
            rounded = half_type.widen(half_type.round(decoded)).astype(np.float64)
            error = np.sum((rounded - decoded) ** 2 * counts, where=counts > 0)
            power = np.sum(rounded**2 * counts, where=counts > 0)
        return QuantizedMatrix(
            self.depth, levels.reshape(weights.shape), indices, self.codebook, float(error), float(power)
        )

    def encode_rows(self, matrix: MatrixRows, thread_pool: ThreadPool | None = None) -> QuantizedRows:
        """Encode the matrix as `encode` does, block by block; the parts raise ValueError as it does."""
        return QuantizedRows(self.codebook, (self.encode(block, thread_pool) for block in matrix.blocks()))


def recover_matrix(weights: np.ndarray, thread_pool: ThreadPool | None = None) -> QuantizedMatrix | NoFit:
    """Recover a dequantized matrix, as `find_fit` takes it, at the least depth that fits; or say why there is none."""
    fit = find_fit(weights, thread_pool=thread_pool)
    return fit if isinstance(fit, NoFit) else fit.encode(weights, thread_pool)


def find_fit(
    weights: np.ndarray | MatrixRows, *, deepest: int = DEPTHS[-1], thread_pool: ThreadPool | None = None
) -> Fit | NoFit:
    """Find the least depth, and a codebook for it, that give every weight of a matrix; or say why there is none.

    Args:
        weights: [rows, columns], columns a multiple of 64: float16, or uint16, which stands for the bits of bfloat16.
            Any other dtype has no fit: nothing was rounded to halves. `MatrixRows` are read once for every codebook.
        deepest: the greatest depth to try.
        thread_pool: the threads to use; None for all cores.

    """
    if weights.dtype not in [half_type.value for half_type in HalfType]:
        return NoFit(f"is stored as {weights.dtype}, not as halves")
    matrix = MatrixRows.of(weights) if isinstance(weights, np.ndarray) else weights
    found: Fit | NoFit = NoFit("has no weights")
    for depth in range(DEPTHS[0], deepest + 1) if math.prod(matrix.shape) else ():
        found = _find_fit_of_depth(matrix, HalfType(matrix.dtype), depth, thread_pool or default_thread_pool())
        if isinstance(found, Fit):
            break
    return found


def _groups(weights: np.ndarray) -> np.ndarray:
    """Return halves [rows, groups, 16], read-only as those of a mapped file are: Numba would compile for either."""
    halves = np.ascontiguousarray(weights).view(np.uint16).reshape(len(weights), -1, GROUP_SIZE)
    halves.flags.writeable = False
    return halves


def _find_fit_of_depth(matrix: MatrixRows, half_type: HalfType, depth: int, thread_pool: ThreadPool) -> Fit | NoFit:
    """Make a codebook for a few groups, look for groups that it misses, make one for these too, and so on.

    What the few groups do not allow, the matrix does not, so a matrix without a fit need not be read to its end.
    """
    count = math.prod(matrix.shape) // GROUP_SIZE
    constraints = _Constraints(half_type, depth)
    numbers = _spread(count, _PROBES)
    groups = _groups_with(matrix, numbers)
    is_sampled = False
    while True:
        refusal = constraints.add(groups, numbers, matrix.shape[1] // GROUP_SIZE)
        if refusal is not None:
            return refusal
        codebook = constraints.codebook()
        if isinstance(codebook, NoFit):
            return codebook
        if is_sampled:
            fit = Fit(depth, codebook)
            numbers, groups = _misfits(matrix, fit, half_type, thread_pool)
            if not numbers.size:
                return fit
        else:
            numbers, is_sampled = _spread(count, _SAMPLE), True
            groups = _groups_with(matrix, numbers)


def _groups_with(matrix: MatrixRows, numbers: np.ndarray) -> np.ndarray:
    """Return the groups that have these numbers, which ascend: uint16 [numbers, 16]."""
    groups_per_row = matrix.shape[1] // GROUP_SIZE
    found = []
    for first_row, part in matrix.parts_with(numbers // groups_per_row):
        flat = _groups(part).reshape(-1, GROUP_SIZE)
        places = numbers - first_row * groups_per_row
        found.append(flat[places[(places >= 0) & (places < len(flat))]])
    return np.concatenate(found)


def _misfits(
    matrix: MatrixRows, fit: Fit, half_type: HalfType, thread_pool: ThreadPool
) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of groups that no codebook entry gives, int64 [n], and these groups, uint16 [n, 16].

    There may be more of them: no block is read after the first `_MISFITS`.
    """
    entries, _ = _decoding_tables(fit, half_type)
    room = np.empty((thread_pool.threads, -(-_MISFITS // thread_pool.threads)), np.int64)
    numbers, found = [np.empty(0, np.int64)], [np.empty((0, GROUP_SIZE), np.uint16)]
    first = 0
    for block in matrix.blocks():
        groups = _groups(block)
        counts = thread_pool.run(find_misfits, groups, entries, room)
        places = np.concatenate([room[thread, :count] for thread, count in enumerate(counts)])
        flat = groups.reshape(-1, GROUP_SIZE)
        numbers.append(first + places)
        found.append(flat[places])
        first += len(flat)
        if sum(map(len, numbers)) >= _MISFITS:
            break
    return np.concatenate(numbers), np.concatenate(found)


def _spread(count: int, wanted: int) -> np.ndarray:
    """Return about `wanted` numbers below `count`, evenly spread, in ascending order."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).astype(np.int64))


class _Constraints:
    """Which scales the groups that were looked at allow, for one depth."""

    def __init__(self, half_type: HalfType, depth: int) -> None:
        self._half_type = half_type
        self._depth = depth
        self._offset = level_offset(depth)
        self._sets: dict[bytes, np.ndarray] = {}

    def add(self, groups: np.ndarray, numbers: np.ndarray, groups_per_row: int) -> NoFit | None:
        """Add groups, uint16 [n, 16], which have these numbers in the matrix; NoFit if one allows no scale."""
        magnitudes = np.sort(groups & np.uint16(_SIGN - 1), axis=1)
        if (magnitudes[:, -1] >= self._half_type.infinity).any():
            return NoFit("has a weight that is NaN or infinite")
        patterns, first = np.unique(magnitudes, axis=0, return_index=True)
        ranges, ends = self._allowed(patterns)
        parts = np.split(ranges, ends[:-1])
        is_zero = patterns[:, -1] == 0
        is_impossible = (np.diff(ends, prepend=0) == 0) & ~is_zero
        if is_impossible.any():
            row, group = divmod(int(numbers[first[is_impossible]].min()), groups_per_row)
            columns = f"{GROUP_SIZE * group} to {GROUP_SIZE * group + GROUP_SIZE - 1}"
            return NoFit(
                f"has a group of weights (row {row}, columns {columns}) that no scale gives at depth {self._depth}"
            )
        for part in itertools.compress(parts, ~is_zero):
            self._sets.setdefault(part.tobytes(), part)
        return None

    def _allowed(self, patterns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the ranges of scales that groups of ascending magnitudes allow, and where each group's end."""
        values, places = np.unique(patterns, return_inverse=True)
        places = places.reshape(patterns.shape).astype(np.int32)
        if values[0] == 0:
            values, places = values[1:], places - 1
        lows = _first_scales(values, self._half_type, self._offset)
        highs = _first_scales(values + np.uint16(1), self._half_type, self._offset) - 1
        ends = np.empty(len(patterns), np.int64)
        ranges = np.empty((patterns.size * self._offset, 2), np.int64)
        allowed_scales(places, lows, highs, ends, ranges)
        return ranges[: ends[-1]].copy(), ends

    def codebook(self) -> np.ndarray | NoFit:
        """Return a codebook that gives all groups: float32 [27]."""
        found = cover(list(self._sets.values()), CODEBOOK_SIZE)
        if isinstance(found, NoCover):
            if found.proven:
                return NoFit("needs more than 27 scales")
            return NoFit("has groups that several scales give, and no 27 for all of them were found")
        scales = [scale_range.middle for scale_range in found] or [0]
        scales += [scales[-1]] * (CODEBOOK_SIZE - len(scales))
        return np.array(scales, np.uint32).view(np.float32)


def _first_scales(halves: np.ndarray, half_type: HalfType, offset: int) -> np.ndarray:
    """Return the least scale that gives a half or more: int64 [halves, h], at the levels 1 to h; halves above zero."""
    target = halves[:, np.newaxis]
    levels = np.arange(1, offset + 1)

    def reaches(scales: np.ndarray) -> np.ndarray:
        values = scales.astype(np.uint32).view(np.float32) / np.float32(offset) * levels.astype(np.float32)
        return half_type.round(values) >= target

    # Halfway to the half below, rounding changes; the three roundings of `_decode` move that by a few scales at most.
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
    """Return what each half is decoded from.

    Returns:
        uint32 [65536], the codebook entries that give a half, a bit each, and uint8 [27, 65536], the level + h at
        which they do. Every entry gives zero, at level zero.

    """
    offset = level_offset(fit.depth)
    entries = np.zeros(1 << 16, np.uint32)
    table = np.full((CODEBOOK_SIZE, 1 << 16), offset, np.uint8)
    with np.errstate(over="ignore"):
        halves = half_type.round(_decode(fit.codebook, np.arange(offset + 1), offset))
    entry, level = np.nonzero((halves > 0) & (halves < half_type.infinity))
    # Assigned backwards, the lowest of several levels that give the same half stays.
    entry, level = entry[::-1], level[::-1]
    for sign, half in (1, halves[entry, level]), (-1, halves[entry, level] | np.uint16(_SIGN)):
        np.bitwise_or.at(entries, half, np.uint32(1) << entry.astype(np.uint32))
        table[entry, half] = offset + sign * level
    entries[[0, _SIGN]] = (1 << CODEBOOK_SIZE) - 1
    return entries, table


def _decode(codebook: np.ndarray, levels: np.ndarray, offset: int) -> np.ndarray:
    """Return float32 [27, levels], decoded as `docs/format.md` section 4 demands."""
    return (codebook / np.float32(offset))[:, np.newaxis] * levels.astype(np.float32)
