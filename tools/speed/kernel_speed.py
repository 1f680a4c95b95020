"""Measure the speed of the matrix kernels alone, on one thread and in cache.

    python -m tools.speed.kernel_speed [--json]

Decode (`gemv`) in 10^9 weights per second, prefill (`gemm`, 256 tokens) in 10^9 integer operations per second,
for every depth and every instruction set that the processor has. Times are CPU times of the thread, so other programs
disturb them less; still, compare only figures of one run.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable

import numpy as np

from cpu_kernels.packed_rows.pack import pack
from cpu_kernels.simd import instruction_set, variants
from cpu_kernels.threads.thread_pool import ThreadPool
from cpu_kernels.transformer.gemm import trit_gemm
from cpu_kernels.transformer.gemv import gemv
from cpu_kernels.transformer.projection import Activations, Batch, Matrix, Projection, quantize_vector

ROWS, COLUMNS, TOKENS = 1024, 1536, 256


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    as_json = parser.parse_args().json
    rates = {
        name: {depth: measure(depth, variants.as_type(isa)) for depth in (1, 2, 3, 4)}
        for name, isa in variants.NAMES.items()
        if isa in instruction_set.supported()
    }
    if as_json:
        print(json.dumps(rates))
        return
    print("instructions   depth  decode Gweights/s  prefill Gops/s, 16 bits  8 bits")
    for name, depths in rates.items():
        for depth, (decode, prefill, prefill_8) in depths.items():
            print(f"{name:13}  {depth:5}  {decode:17.1f}  {prefill:23.0f}  {prefill_8:6.0f}")


def measure(depth: int, isa: tuple[int, ...]) -> tuple[float, float, float]:
    """Return the rate of decode in 10^9 weights/s, and of prefill with 16 and 8 bits in 10^9 operations/s."""
    generator = np.random.default_rng(0)
    levels = generator.integers(0, 3**depth, (ROWS, COLUMNS), dtype=np.uint8)
    indices = generator.integers(0, 27, (ROWS, COLUMNS // 16), dtype=np.uint8)
    codebook = np.geomspace(0.01, 1, 27).astype(np.float32)
    matrix = Matrix(pack(levels, indices, depth).reshape(-1), ROWS, COLUMNS, depth, codebook)
    part = Projection([matrix])
    out = np.zeros((TOKENS, ROWS), np.float32)
    x = generator.standard_normal((TOKENS, COLUMNS)).astype(np.float32)
    vector = Activations(1, COLUMNS).vector(0)
    vector[0][:] = x[0]
    quantize_vector(vector)
    decode = best_time(
        lambda: gemv(isa, part.addresses, part.matrix_rows, part.depths, part.steps, vector, out[0], 0, 1), 50
    )
    weights = ROWS * COLUMNS
    prefill, prefill_8 = (2 * weights * TOKENS / seconds / 1e9 for seconds in prefill_times(matrix, isa, x, out))
    return weights / decode / 1e9, prefill, prefill_8


def prefill_times(matrix: Matrix, isa: tuple[int, ...], x: np.ndarray, out: np.ndarray) -> list[float]:
    """Return the seconds of a matrix times a batch with activations of 16 and of 8 bits."""
    words, steps, times = matrix.data.view(np.uint16), Projection([matrix]).steps[0], []
    for bits in (16, 8):
        batch = Batch(*x.shape, bits=bits)
        batch.x[:] = x
        batch.quantize(ThreadPool(1))
        arguments = (isa, words, matrix.rows, matrix.depth, steps, *batch.buffers[1:], out, 0, 0, 1)
        times.append(best_time(functools.partial(trit_gemm, *arguments), 5))
    return times


def best_time(call: Callable[[], object], repeats: int) -> float:
    """Return the shortest time of several calls, in seconds; the first call, which may compile, is not counted."""
    call()
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        call()
        times.append(time.thread_time() - start)
    return min(times)


if __name__ == "__main__":
    main()
