"""Matrices like those of published checkpoints: quantized to trits, and dequantized."""

from __future__ import annotations

import numpy as np

from tools.recovery.simulated_producer import produce
from tritgguf.formats.dtypes import to_float32


def dequantized(shape: tuple[int, ...], depth: int, half: str, seed: int) -> np.ndarray:
    """Return a matrix that was quantized and dequantized, float32 [rows, columns]."""
    generator = np.random.default_rng(seed)
    rows, groups = shape[0], shape[1] // 16
    trits = generator.integers(-1, 2, (rows, groups, 16, depth)).astype(np.float64)
    codebook = np.geomspace(0.01, 0.1, 27).astype(np.float32)
    scales = codebook[generator.integers(0, 27, (rows, groups))]
    return to_float32(produce(scales, trits, "scale * level / h", "float32", half))
