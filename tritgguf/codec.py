"""The codec: one matrix in, one QuantizedMatrix out.

Groups of 16 weights of a row share a scale, an entry of the matrix's 27-entry codebook; a weight is a level from
-h to h, h = (3**depth - 1) / 2, and decodes to scale / h * level (`docs/format.md` section 4).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cpu_kernels import pack as packing
from cpu_kernels.crew import Crew, default_crew
from cpu_kernels.layout import CODEBOOK_SIZE, GROUP_SIZE, level_offset
from cpu_kernels.quantize import as_stored, best_candidates, round_to_codebook

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


def quantize(
    weights: np.ndarray, depth: int, encoder: str = DEFAULT_ENCODER, crew: Crew | None = None
) -> QuantizedMatrix:
    """Quantize a matrix [rows, columns], columns a multiple of 64, at `depth` trits per weight.

    `weights` are float32, float16, or uint16, which stands for the bits of bfloat16: as a checkpoint stores them.
    Raises ValueError for NaN or infinite weights: no scale fits them.
    """
    return ENCODERS[encoder](weights, depth, crew or default_crew())


def _quantize_v2(weights: np.ndarray, depth: int, crew: Crew) -> QuantizedMatrix:
    """Encode as the published codec does: four candidate scales, a log-spaced codebook up to the largest magnitude.

    How the codebook's lowest entry is chosen is not public. `LOWEST_QUANTILE` says what is done here, and
    `docs/quality.md` what was measured for it.
    """
    stored, kind = as_stored(weights)
    offset = np.float32(level_offset(depth))
    scales = np.empty((len(stored), stored.shape[1] // GROUP_SIZE), np.float32)
    largest = np.max(crew.run(best_candidates, stored, kind, offset, scales))
    if np.isnan(largest):
        raise ValueError("has a weight that is NaN or infinite")
    codebook = _log_spaced_codebook(scales, float(largest))
    # The nearest entry on the logarithmic scale changes at the geometric mean of its neighbours.
    thresholds = np.sqrt(codebook[1:].astype(np.float64) * codebook[:-1]).astype(np.float32)
    levels = np.empty(stored.shape, np.uint8)
    indices = np.empty(scales.shape, np.uint8)
    steps = codebook / offset
    sums = crew.run(round_to_codebook, stored, kind, scales, thresholds, steps, offset, levels, indices)
    error, power = np.sum(sums, axis=0)
    return QuantizedMatrix(depth, levels, indices, codebook, float(error), float(power))


LOWEST_QUANTILE = 0.005


def _log_spaced_codebook(scales: np.ndarray, largest: float) -> np.ndarray:
    """Return 27 log-spaced scales from a low quantile of the wanted scales to the largest magnitude."""
    wanted = scales[scales > 0]
    if wanted.size == 0:
        return np.zeros(CODEBOOK_SIZE, np.float32)
    rank = int(LOWEST_QUANTILE * (wanted.size - 1))
    lowest = float(np.partition(wanted, rank)[rank])
    codebook = np.geomspace(lowest, largest, CODEBOOK_SIZE).astype(np.float32)
    codebook[-1] = largest
    return codebook


ENCODERS: dict[str, Callable[[np.ndarray, int, Crew], QuantizedMatrix]] = {"v2": _quantize_v2}
