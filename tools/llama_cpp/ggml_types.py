"""llama.cpp's quantization of a matrix, through the library that `referee.py` builds."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from cpu_kernels.threads.thread_pool import ThreadPool


class GgmlQuantizer:
    """Quantizes with ggml and dequantizes with gguf-py: the weights that a llama.cpp file would have."""

    def __init__(self, library: Path, thread_pool: ThreadPool) -> None:
        self._function = ctypes.CDLL(str(library)).ggml_quantize_chunk
        floats = ctypes.POINTER(ctypes.c_float)
        self._function.argtypes = [
            ctypes.c_int,
            floats,
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_int64,
            floats,
        ]
        self._function.restype = ctypes.c_size_t
        self._thread_pool = thread_pool

    def round_trip(self, weights: np.ndarray, type_name: str, importance: np.ndarray | None = None) -> np.ndarray:
        """Return a matrix after quantization and dequantization: float32 [rows, columns].

        If the row length is not a multiple of the type's block, rows are joined until it is. llama-quantize would
        choose another type, and the bits would not be equal. Importance, float32 [columns], is repeated.
        """
        kind = GGMLQuantizationType[type_name]
        block, n_bytes = GGML_QUANT_SIZES[kind]
        rows, columns = weights.shape
        joined = block // math.gcd(block, columns)
        if rows % joined:
            raise ValueError(f"{rows} rows of {columns} do not make whole blocks of {block}")
        source = np.ascontiguousarray(weights, np.float32).reshape(rows // joined, joined * columns)
        factors = None if importance is None else np.ascontiguousarray(np.tile(importance, joined), np.float32)
        target = np.empty((len(source), source.shape[1] // block * n_bytes), np.uint8)
        self._thread_pool.run(self._quantize, int(kind), source, target, factors)
        return dequantize(target, kind).reshape(rows, columns)

    def _quantize(
        self, kind: int, source: np.ndarray, target: np.ndarray, factors: np.ndarray | None, thread: int, threads: int
    ) -> None:
        """Quantize a thread's share of the rows; ctypes releases the interpreter's lock."""
        first, last = (len(source) * share // threads for share in (thread, thread + 1))
        if first == last:
            return
        floats = ctypes.POINTER(ctypes.c_float)
        pointer = None if factors is None else factors.ctypes.data_as(floats)
        part, columns = np.ascontiguousarray(source[first:last]), source.shape[1]
        written = self._function(
            kind, part.ctypes.data_as(floats), target[first:last].ctypes.data, 0, last - first, columns, pointer
        )
        if written != target[first:last].nbytes:
            raise RuntimeError(f"ggml wrote {written} bytes instead of {target[first:last].nbytes}")


def bits_per_weight(type_name: str) -> float:
    """Return the bits per weight of a llama.cpp type."""
    block, n_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    return 8 * n_bytes / block
