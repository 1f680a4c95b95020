"""The codec: one matrix in, one QuantizedMatrix out.

Groups of 16 weights of a row share a scale, an entry of the matrix's 27-entry codebook; a weight is a level from
-h to h, h = (3**depth - 1) / 2, and decodes to scale / h * level (`docs/format.md` section 4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cpu_kernels import pack as packing
from cpu_kernels.crew import Crew, default_crew
from cpu_kernels.layout import CODEBOOK_SIZE, GROUP_SIZE, level_offset
from cpu_kernels.quantize import as_stored, best_candidates, round_to_codebook
from tritgguf.matrix_rows import MatrixRows

DEFAULT_ENCODER = "v2"


@dataclass(frozen=True)
class QuantizedMatrix:
    """A quantized matrix, not yet packed.

    Attributes:
        depth: trits per weight, 1 to 4.
        levels: uint8 [rows, columns], level + h.
        scale_indices: uint8 [rows, columns / 16].
        codebook: float32 [27], ascending scales.
        squared_error: sum of (weight - decoded weight)**2.
        squared_weights: sum of weight**2.

    """

    depth: int
    levels: np.ndarray
    scale_indices: np.ndarray
    codebook: np.ndarray
    squared_error: float
    squared_weights: float

    def pack(self, crew: Crew | None = None) -> np.ndarray:
        """Return the packed rows: uint8 [rows, bytes of a row]."""
        return packing.pack(self.levels, self.scale_indices, self.depth, crew)


@dataclass(frozen=True)
class QuantizedRows:
    """A quantized matrix in parts, which are made as they are taken.

    Attributes:
        codebook: float32 [27], that of every part.
        parts: the matrix's rows, in their order; each part counts its own errors.

    """

    codebook: np.ndarray
    parts: Iterator[QuantizedMatrix]


def quantize(
    weights: np.ndarray, depth: int, encoder: str = DEFAULT_ENCODER, crew: Crew | None = None
) -> QuantizedMatrix:
    """Quantize a matrix [rows, columns], columns a multiple of 64, at `depth` trits per weight.

    `weights` are float32, float16, or uint16, which stands for the bits of bfloat16: as a checkpoint stores them.
    Raises ValueError for NaN or infinite weights: no scale fits them.
    """
    return ENCODERS[encoder](weights, depth, crew or default_crew())


def quantize_rows(
    matrix: MatrixRows, depth: int, encoder: str = DEFAULT_ENCODER, crew: Crew | None = None
) -> QuantizedRows:
    """Quantize a matrix as `quantize` does, to the bit, in blocks of rows where the encoder can.

    Raises ValueError as `quantize` does, before the first part.
    """
    in_blocks = ENCODERS_IN_BLOCKS.get(encoder)
    if in_blocks is not None:
        return in_blocks(matrix, depth, crew or default_crew())
    quantized = quantize(matrix.whole(), depth, encoder, crew)
    return QuantizedRows(quantized.codebook, iter([quantized]))


def _quantize_rows_v2(matrix: MatrixRows, depth: int, crew: Crew) -> QuantizedRows:
    """Encode as the published codec does: four candidate scales, a log-spaced codebook up to the largest magnitude.

    How the codebook's lowest entry is chosen is not public. `LOWEST_QUANTILE` says what is done here, and
    `docs/quality.md` what was measured for it. The matrix is read twice; in between, its wanted scales are kept.
    """
    offset = np.float32(level_offset(depth))
    wanted: list[np.ndarray] = []
    largest = np.float32(0)
    for block in matrix.blocks():
        stored, kind = as_stored(block)
        scales = np.empty((len(stored), stored.shape[1] // GROUP_SIZE), np.float32)
        largest = np.max([largest, *crew.run(best_candidates, stored, kind, offset, scales)])
        if np.isnan(largest):
            raise ValueError("has a weight that is NaN or infinite")
        wanted.append(scales)
    codebook = _log_spaced_codebook(wanted, float(largest))
    # The nearest entry on the logarithmic scale changes at the geometric mean of its neighbours.
    thresholds = np.sqrt(codebook[1:].astype(np.float64) * codebook[:-1]).astype(np.float32)
    steps = codebook / offset

    def parts() -> Iterator[QuantizedMatrix]:
        for block, scales in zip(matrix.blocks(), wanted, strict=True):
            stored, kind = as_stored(block)
            levels = np.empty(stored.shape, np.uint8)
            indices = np.empty(scales.shape, np.uint8)
            sums = crew.run(round_to_codebook, stored, kind, scales, thresholds, steps, offset, levels, indices)
            error, power = np.sum(sums, axis=0)
            yield QuantizedMatrix(depth, levels, indices, codebook, float(error), float(power))

    return QuantizedRows(codebook, parts())


def _quantize_v2(weights: np.ndarray, depth: int, crew: Crew) -> QuantizedMatrix:
    """Encode a matrix that is in memory, which is a single block."""
    (quantized,) = _quantize_rows_v2(MatrixRows.of(weights), depth, crew).parts
    return quantized


LOWEST_QUANTILE = 0.005


def _log_spaced_codebook(wanted: Sequence[np.ndarray], largest: float) -> np.ndarray:
    """Return 27 log-spaced scales from a low quantile of the wanted scales to the largest magnitude.

    `wanted` are float32 [rows, groups] of each block; a group of zeros wants no scale and has 0.
    """
    total = sum(scales.size for scales in wanted)
    above_zero = int(sum(np.count_nonzero(scales) for scales in wanted))
    if above_zero == 0:
        return np.zeros(CODEBOOK_SIZE, np.float32)
    rank = int(LOWEST_QUANTILE * (above_zero - 1))
    lowest = float(_in_ascending_order(wanted, total - above_zero + rank))
    codebook = np.geomspace(lowest, largest, CODEBOOK_SIZE).astype(np.float32)
    codebook[-1] = largest
    return codebook


def _in_ascending_order(blocks: Sequence[np.ndarray], place: int) -> np.float32:
    """Return the number at a place, from 0, of float32 numbers that are not negative, without sorting them.

    As integers, their bits have the same order: the upper halves are counted first, then the lower halves below the
    upper one that was found.
    """
    bits = [block.reshape(-1).view(np.uint32) for block in blocks]
    uppers = np.cumsum(sum(np.bincount(part >> 16, minlength=1 << 16) for part in bits))
    upper = int(np.searchsorted(uppers, place, side="right"))
    same = (part[part >> 16 == upper] & 0xFFFF for part in bits)
    lowers = np.cumsum(sum(np.bincount(part, minlength=1 << 16) for part in same))
    if upper:
        place -= int(uppers[upper - 1])
    lower = int(np.searchsorted(lowers, place, side="right"))
    return np.uint32(upper << 16 | lower).view(np.float32)


ENCODERS: dict[str, Callable[[np.ndarray, int, Crew], QuantizedMatrix]] = {"v2": _quantize_v2}
ENCODERS_IN_BLOCKS: dict[str, Callable[[MatrixRows, int, Crew], QuantizedRows]] = {"v2": _quantize_rows_v2}
"""Those of the encoders that need no matrix as a whole."""
