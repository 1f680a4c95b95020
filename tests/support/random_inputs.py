"""Random matrices and vectors for the kernels, with their weights in float64."""

from __future__ import annotations

import naive
import numpy as np

from cpu_kernels.packed_rows.pack import pack
from cpu_kernels.threads.thread_pool import ThreadPool
from cpu_kernels.transformer.projection import Activations, Batch, Matrix, quantize_vector
from tritgguf.formats.trit_types import row_bytes

THREAD_POOL = ThreadPool(2)
CODEBOOK = np.geomspace(0.01, 1.0, 27).astype(np.float32)


def random_levels(depth: int, rows: int, columns: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return uint8 levels + h [rows, columns] and scale indices [rows, columns / 16]."""
    generator = np.random.default_rng((seed, depth, rows, columns))
    levels = generator.integers(0, 3**depth, (rows, columns), dtype=np.uint8)
    return levels, generator.integers(0, 27, (rows, columns // 16), dtype=np.uint8)


def trit_matrix(depth: int, rows: int, columns: int, seed: int = 0) -> tuple[Matrix, np.ndarray]:
    """Return a packed matrix and its weights, float64 [rows, columns]."""
    levels, indices = random_levels(depth, rows, columns, seed)
    data = pack(levels, indices, depth, THREAD_POOL).reshape(-1)
    return Matrix(data, rows, columns, depth, CODEBOOK), naive.exact_steps(levels, indices, CODEBOOK, depth)


def half_matrix(rows: int, columns: int, seed: int = 0) -> tuple[Matrix, np.ndarray]:
    """Return a float16 matrix and its weights, float64 [rows, columns]."""
    halves = np.random.default_rng((seed, rows, columns)).standard_normal((rows, columns)).astype(np.float16)
    return Matrix(halves.reshape(-1).view(np.uint8), rows, columns, depth=0), halves.astype(np.float64)


def vectors(tokens: int, columns: int, seed: int = 0) -> np.ndarray:
    """Return float32 [tokens, columns] with a few outliers a hundred times the others, like real activations."""
    generator = np.random.default_rng((seed, tokens, columns))
    x = generator.standard_normal((tokens, columns)).astype(np.float32)
    x[:, :: max(1, columns // 3)] *= 100
    return x


def batch_of(x: np.ndarray, bits: int = 16) -> Batch:
    """Quantize float32 [tokens, columns] for the prefill kernels."""
    batch = Batch(*x.shape, bits=bits)
    batch.x[:] = x
    batch.quantize(THREAD_POOL)
    return batch


def batch_integers(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Return a batch's integers in column order, int64 [tokens, columns], and its step sizes [tokens, groups]."""
    blocks, groups, units, lanes, unit_size = batch.integers.shape
    by_token = batch.integers.transpose(0, 3, 1, 2, 4)  # [blocks, lanes, groups, units, unit_size]
    if unit_size == 4:  # a unit is elements 2 j, 2 j + 1, 2 j + 8, 2 j + 9
        by_token = by_token.reshape(blocks, lanes, groups, units, 2, 2).transpose(0, 1, 2, 4, 3, 5)
    else:  # a unit is elements j, j + 8
        by_token = by_token.transpose(0, 1, 2, 4, 3)
    integers = by_token.reshape(blocks * lanes, 16 * groups)
    step_sizes = batch.scales.transpose(0, 2, 1).reshape(blocks * lanes, groups)
    tokens = len(batch.x)
    return integers[:tokens].astype(np.int64), step_sizes[:tokens]


def vector_integers(x: np.ndarray, bits: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Quantize one vector, float32 [columns], for the decode kernels; return integers and step sizes, [1, ...]."""
    vector = Activations(1, len(x), bits=bits).vector(0)
    vector[0][:] = x
    quantize_vector(vector)
    _, integers, _, step_sizes = vector
    # A unit is elements j, j + 8, or of 8 bits 2 j, 2 j + 1, 2 j + 8, 2 j + 9.
    units, groups, unit_size = integers.shape
    in_order = integers.reshape(units, groups, 2, unit_size // 2).transpose(1, 2, 0, 3)
    return in_order.reshape(1, -1).astype(np.int64), step_sizes[np.newaxis]


def products(
    matrices: list[tuple[Matrix, np.ndarray]], x: np.ndarray, integers: np.ndarray, step_sizes: np.ndarray
) -> np.ndarray:
    """Return the expected product of a projection, float64 [tokens, rows of all matrices]."""
    parts = []
    for matrix, weights in matrices:
        if matrix.depth:
            parts.append(naive.trit_product(weights, integers, step_sizes))
        else:
            parts.append(x.astype(np.float64) @ weights.T)
    return np.concatenate(parts, axis=1)


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    """Assert that a float32 result has the accuracy of float32 sums: 1e-6 of the largest, or denormal steps."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6 * np.abs(expected).max() + 1e-43)


def naive_levels(matrix: Matrix) -> tuple[np.ndarray, np.ndarray]:
    """Return a packed matrix's levels + h [rows, columns] and scale indices; any bytes are valid input."""
    rows = matrix.data.reshape(matrix.rows, -1)
    unpacked = [naive.unpack_row(row.tobytes(), matrix.depth, matrix.columns // 16) for row in rows]
    return np.array([levels for levels, _ in unpacked]), np.array([indices for _, indices in unpacked])


def damaged_matrix(depth: int) -> tuple[Matrix, np.ndarray]:
    """Return 9 rows of random bytes, which include invalid words, and the weights that they decode to."""
    data = np.random.default_rng(depth).integers(0, 256, 9 * row_bytes(depth, 192), dtype=np.uint8)
    data[: row_bytes(depth, 192)] = 255
    matrix = Matrix(data, 9, 192, depth, CODEBOOK)
    return matrix, naive.exact_steps(*naive_levels(matrix), CODEBOOK, depth)


def rounded_once(matrix: Matrix, group: int, integers: np.ndarray, step_size: np.float32) -> np.ndarray:
    """Return the exact bits of a packed matrix times a vector with one non-zero group: float32 [rows]."""
    levels, indices = naive_levels(matrix)
    h = naive.largest_level(matrix.depth)
    columns = slice(16 * group, 16 * group + 16)
    sums = (levels[:, columns] - h) @ integers[columns]
    steps = CODEBOOK / np.float32(h)
    return np.asarray(sums.astype(np.float32) * (steps[indices[:, group]] * step_size))
