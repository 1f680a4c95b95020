"""Test exact recovery on a real model: trits -> FP16 -> trits -> FP16, and count the numbers that differ.

    python -m tools.recovery.recover_roundtrip build/smollm2-135m-d2.gguf
    python -m tools.recovery.recover_roundtrip models/SmolLM2-135M-Instruct

A trit file is dequantized tensor by tensor and rounded to FP16, like published checkpoints; a Hugging Face folder has
FP16 or BF16 already. docs/reference_decoder.py decodes and NumPy compares, so the codec's own decoder is not used.
Prints a line for each tensor without an exact fit.
"""

from __future__ import annotations

import argparse
import runpy
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cpu_kernels.threads.thread_pool import ThreadPool
from tritgguf.architectures.tensor_names import quantized_tensor
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.formats.stacks import matrix_names
from tritgguf.formats.trit_types import TritType, is_trit_type, row_bytes
from tritgguf.quantization.quantized_matrix import QuantizedMatrix
from tritgguf.quantization.recover import NoFit, recover_matrix
from tritgguf.sources.open import open_source

_reference = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "reference_decoder.py"))["decode"]
_WEIGHTS_AT_ONCE = 1 << 20


def reference_halves(rows: np.ndarray, columns: int, depth: int, codebook: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Decode packed rows, uint8 [rows, bytes of a row], with the reference decoder and round them to 16 bits.

    Returns [rows, columns] of the dtype: float16, or uint16 for the bits of bfloat16.
    """
    halves = np.empty((len(rows), columns), dtype)
    step = max(1, _WEIGHTS_AT_ONCE // columns)
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        weights = _reference(part.tobytes(), columns, depth, codebook)
        halves[start : start + step] = weights.astype(np.float16) if dtype == np.float16 else bfloat16_bits(weights)
    return halves


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """Round to the nearest bfloat16, ties to even, and return its bits, uint16."""
    exact = values.astype(np.float32).astype(np.float64)
    # Eight significant bits; subnormal numbers end at 2**-133.
    exponent = np.maximum(np.frexp(exact)[1] - 8, -133)
    rounded = np.ldexp(np.rint(np.ldexp(exact, -exponent)), exponent).astype(np.float32)
    return (rounded.view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def differing_numbers(matrix: QuantizedMatrix, weights: np.ndarray) -> int:
    """Count the numbers of a recovered matrix that differ from its source; -0.0 equals 0.0."""
    decoded = reference_halves(
        matrix.pack(ThreadPool(1)), weights.shape[1], matrix.depth, matrix.codebook, weights.dtype
    )
    if weights.dtype == np.float16:
        return int(np.count_nonzero(decoded != weights))
    return int(np.count_nonzero((decoded != weights) & ((decoded | weights) != 0x8000)))


def published_matrices(location: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield a trit file's packed matrices as a producer publishes them, or those of a Hugging Face folder."""
    if location.is_dir():
        source = open_source(location)
        for tensor in source.tensors:
            if quantized_tensor(tensor.name):
                yield from ((matrix, source.rows(matrix).whole()) for matrix in tensor.matrices)
        return
    file = GgufFile(location)
    for name, info in file.tensors.items():
        if is_trit_type(info.type_id):
            depth, columns = TritType(info.type_id).depth, info.shape[-1]
            matrices = file.raw(name).reshape(info.n_matrices, -1, row_bytes(depth, columns))
            for matrix, rows, codebook in zip(
                matrix_names(name, info.shape), matrices, file.codebooks(name), strict=True
            ):
                yield matrix, reference_halves(rows, columns, depth, codebook, np.dtype(np.float16))
            file.release(name)


def main() -> None:
    """Parse the command line, recover, compare, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("location", type=Path, help="trit file or Hugging Face folder")
    parser.add_argument("--threads", type=int, default=None, help="threads of the recovery (default: all cores)")
    options = parser.parse_args()
    thread_pool = ThreadPool(options.threads)
    depths, weights, differing, refused, seconds = Counter[int](), 0, 0, 0, 0.0
    for name, halves in published_matrices(options.location):
        started = time.perf_counter()
        matrix = recover_matrix(halves, thread_pool)
        seconds += time.perf_counter() - started
        weights += halves.size
        if isinstance(matrix, NoFit):
            refused += 1
            print(f"{name} {matrix.reason}")
        else:
            depths[matrix.depth] += 1
            differing += differing_numbers(matrix, halves)
    recovered = ", ".join(f"{count} at depth {depth}" for depth, count in sorted(depths.items())) or "none"
    print(f"recovered {recovered}; no exact fit {refused}; differing numbers {differing} of {weights}")
    print(f"recovery {seconds:.1f} s on {thread_pool.threads} threads: {weights / seconds / 1e6:.0f} M weights/s")


if __name__ == "__main__":
    main()
