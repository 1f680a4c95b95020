"""How much faster is a small batch of vectors than the same vectors one by one, from memory?

    python -m tools.speed.batch_kernels [--depth 2] [--threads 2] [--turns 7]

For the shapes of a 1.5B model (or `--shape ROWSxCOLUMNS`): milliseconds of `gemv` with one vector, and what batches of
1 to 16 vectors take as a multiple of it, with activations of 16 and of 8 bits (`gemv_batch`) and as a prompt of 8 bits
(`trit_gemm`); of the head of halves with float32. "speed-up" is over so many calls of `gemv`. Matrices are repeated
until they fill no cache; times are medians over turns in which every call has its own, so that other programs disturb
all of them alike. TRITGGUF_ISA chooses the instruction set.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np

from cpu_kernels.packed_rows.layout import BLOCK_SIZE, WORDS_PER_BLOCK
from cpu_kernels.simd import instruction_set, variants
from cpu_kernels.threads.thread_pool import ThreadPool
from cpu_kernels.transformer.projection import Activations, Batch, Matrix, Projection

COUNTS = (1, 2, 4, 8, 16)
SHAPES = ("8960x1536", "1536x8960")
HEAD = (151936, 1536)
_BYTES = 100 << 20  # of a matrix, at least: more than a cache holds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--depth", type=int, default=2, choices=(1, 2, 3, 4))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--shape", action="append", help="rows x columns of a packed matrix; may be given again")
    options = parser.parse_args()
    thread_pool = ThreadPool(options.threads)
    print(f"{variants.name_of(instruction_set.choose())}, {options.threads} threads, median of {options.turns} turns")
    for shape in options.shape or SHAPES:
        rows, columns = map(int, shape.split("x"))
        measure(
            packed_matrix(rows, columns, options.depth), f"{shape}, depth {options.depth}", thread_pool, options.turns
        )
    if not options.shape:
        measure(head(*HEAD), f"{HEAD[0]}x{HEAD[1]}, halves", thread_pool, options.turns)


def packed_matrix(rows: int, columns: int, depth: int) -> Matrix:
    """Return a packed matrix of random words, repeated until it is large."""
    row_bytes = columns // BLOCK_SIZE * 2 * WORDS_PER_BLOCK[depth]
    rows *= -(-_BYTES // (rows * row_bytes))
    words = np.random.default_rng(0).integers(0, 256, 1 << 20, dtype=np.uint8)
    codebook = np.geomspace(0.01, 1, 27).astype(np.float32)
    return Matrix(np.resize(words, rows * row_bytes), rows, columns, depth, codebook)


def head(rows: int, columns: int) -> Matrix:
    """Return a matrix of float16."""
    halves = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float16)
    return Matrix(np.resize(halves, rows * columns).view(np.uint8), rows, columns, 0)


def measure(matrix: Matrix, name: str, thread_pool: ThreadPool, turns: int) -> None:
    """Print the times of one matrix."""
    projection, x = Projection([matrix]), np.random.default_rng(1).standard_normal((max(COUNTS), matrix.columns))
    out = np.zeros((max(COUNTS), matrix.rows), np.float32)
    calls: dict[tuple[str, int], Callable[[], None]] = {}
    for count in COUNTS:
        for kind, bits in (("16 bits", 16), ("8 bits", 8)) if matrix.depth else (("float32", 16),):
            activations = Activations(count, matrix.columns, bits=bits)
            activations.x[:] = x[:count]
            activations.quantize(thread_pool)
            calls[kind, count] = _vectors(projection, activations, out[:count], thread_pool)
        if matrix.depth:
            batch = Batch(count, matrix.columns, bits=8)
            batch.x[:] = x[:count]
            batch.quantize(thread_pool)
            calls["prompt", count] = _batch(projection, batch, out[:count], thread_pool)
    times = medians(calls, turns)
    kinds = dict.fromkeys(kind for kind, _ in calls)
    alone = times[next(iter(kinds)), 1]  # which goes to `gemv`
    print(f"\n{name}: one vector {1000 * alone:.2f} ms")
    print("vectors " + "".join(f"{kind:>10}{'speed-up':>10}" for kind in kinds))
    for count in COUNTS:
        columns = [f"{times[kind, count] / alone:10.2f}{count * alone / times[kind, count]:10.2f}" for kind in kinds]
        print(f"{count:7} " + "".join(columns))


def _vectors(
    projection: Projection, activations: Activations, out: np.ndarray, thread_pool: ThreadPool
) -> Callable[[], None]:
    return lambda: projection.multiply_vectors(activations, out, thread_pool)


def _batch(projection: Projection, batch: Batch, out: np.ndarray, thread_pool: ThreadPool) -> Callable[[], None]:
    return lambda: projection.multiply(batch, out, thread_pool)


def medians(calls: dict[tuple[str, int], Callable[[], None]], turns: int) -> dict[tuple[str, int], float]:
    """Return the median seconds of each call; the first turn, which may compile, does not count."""
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in calls}
    for _ in range(turns + 1):
        for key, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[key].append(time.perf_counter() - start)
    return {key: statistics.median(times[1:]) for key, times in seconds.items()}


if __name__ == "__main__":
    main()
