"""Matrix times a batch of vectors, in every instruction-set variant."""

from __future__ import annotations

import numpy as np
import pytest
from random_inputs import (
    THREAD_POOL,
    assert_close,
    batch_integers,
    batch_of,
    damaged_matrix,
    half_matrix,
    products,
    rounded_once,
    trit_matrix,
    vectors,
)

from cpu_kernels.threads.thread_pool import ThreadPool
from cpu_kernels.transformer.projection import Batch, Matrix, Projection
from tritgguf.formats.trit_types import DEPTHS

depths = pytest.mark.parametrize("depth", DEPTHS)
bit_counts = pytest.mark.parametrize("bits", [16, 8])
TOKENS = (1, 5, 6, 7, 19)  # the kernel multiplies six at a time


def multiply(matrices: list[Matrix], batch: Batch, thread_pool: ThreadPool = THREAD_POOL) -> np.ndarray:
    """Multiply a batch, and check that the rows before and after the output are not changed."""
    projection = Projection(matrices)
    tokens = len(batch.x)
    around = np.full((tokens + 2, projection.rows), np.nan, np.float32)
    projection.multiply(batch, around[1:-1], thread_pool)
    assert np.isnan(around[[0, -1]]).all()
    return around[1:-1]


def expected_product(matrices: list[tuple[Matrix, np.ndarray]], batch: Batch) -> np.ndarray:
    return products(matrices, batch.x, *batch_integers(batch))


def one_by_one(matrices: list[Matrix], x: np.ndarray) -> np.ndarray:
    """Multiply each vector of a batch alone, with the decode kernel."""
    projection = Projection(matrices)
    out = np.zeros((len(x), projection.rows), np.float32)
    for token in range(len(x)):
        projection.multiply_vector(x[token], out[token], THREAD_POOL)
    return out


@depths
@bit_counts
def test_trit_matrix(variant: str, depth: int, bits: int) -> None:
    for tokens, columns in zip(TOKENS, (64, 192, 576, 128, 3200), strict=True):
        matrix, x = trit_matrix(depth, 37, columns), vectors(tokens, columns)
        batch = batch_of(x, bits)
        result = multiply([matrix[0]], batch)
        assert_close(result, expected_product([matrix], batch))
        if bits == 16:
            assert_close(result, one_by_one([matrix[0]], x))


@depths
@bit_counts
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 31, 32, 33, 64, 600])
def test_rows_around_a_tile(depth: int, rows: int, bits: int) -> None:
    matrix, batch = trit_matrix(depth, rows, 64), batch_of(vectors(7, 64), bits)
    assert_close(multiply([matrix[0]], batch), expected_product([matrix], batch))


@depths
@bit_counts
def test_integer_sums_are_exact(variant: str, depth: int, bits: int) -> None:
    """Every vector has one non-zero group, so each result is rounded once and its bits are known."""
    matrix, _ = trit_matrix(depth, 20, 192)
    x = np.zeros((12, 192), np.float32)
    for group in range(12):
        x[group, 16 * group : 16 * group + 16] = vectors(1, 16, seed=group)[0]
    x[:2] = np.abs(x[:2]).max() * np.sign(x[:2])  # the largest possible sums
    batch = batch_of(x, bits)
    integers, step_sizes = batch_integers(batch)
    result = multiply([matrix], batch)
    for group in range(12):
        expected = rounded_once(matrix, group, integers[group], step_sizes[group, group])
        np.testing.assert_array_equal(result[group], expected)


@depths
@bit_counts
def test_damaged_rows_multiply_as_dequantized(depth: int, bits: int) -> None:
    matrix, batch = damaged_matrix(depth), batch_of(vectors(3, 192), bits)
    assert_close(multiply([matrix[0]], batch), expected_product([matrix], batch))


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 63, 97, 130, 192])
def test_half_matrix(variant: str, columns: int) -> None:
    matrix, x = half_matrix(11, columns), vectors(5, columns)
    batch = batch_of(x)
    result = multiply([matrix[0]], batch)
    assert_close(result, expected_product([matrix], batch))
    np.testing.assert_array_equal(result, one_by_one([matrix[0]], x))


@depths
@bit_counts
def test_a_block_that_is_not_full_changes_no_bit(variant: str, depth: int, bits: int) -> None:
    matrix, x = trit_matrix(depth, 37, 192)[0], vectors(12, 192)
    whole = multiply([matrix], batch_of(x, bits))
    for tokens in (1, 2, 3, 4, 5, 7, 11):
        np.testing.assert_array_equal(multiply([matrix], batch_of(x[:tokens], bits)), whole[:tokens])


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_several_matrices_on_threads(threads: int) -> None:
    matrices = [trit_matrix(depth, rows, 128) for depth, rows in ((3, 7), (1, 1), (2, 40), (4, 16))]
    matrices.insert(2, half_matrix(5, 128))
    batch = batch_of(vectors(6, 128))
    together = [matrix for matrix, _ in matrices]
    result = multiply(together, batch, ThreadPool(threads))
    np.testing.assert_array_equal(result, multiply(together, batch, ThreadPool(1)))
    expected = expected_product(matrices, batch)
    start = 0
    for matrix in together:
        rows = slice(start, start + matrix.rows)
        assert_close(result[:, rows], expected[:, rows])
        start += matrix.rows


def test_a_reused_batch_gives_the_same_result() -> None:
    """A smaller batch in the buffers of a larger one gives the same result as in its own buffers."""
    matrix, x = trit_matrix(2, 8, 64)[0], vectors(11, 64)
    large = batch_of(vectors(16, 64, seed=1))
    view = large.first(11)
    view.x[:] = x
    view.quantize(THREAD_POOL)
    np.testing.assert_array_equal(multiply([matrix], view), multiply([matrix], batch_of(x)))


@depths
@pytest.mark.parametrize("columns", [64, 576])
def test_exact_products(variant: str, depth: int, columns: int) -> None:
    """With the quantization error, the product is that of the unquantized vectors."""
    matrices = [trit_matrix(depth, 20, columns), half_matrix(3, columns), trit_matrix(depth, 7, columns, seed=1)]
    x = vectors(9, columns)
    batch, out = batch_of(x), np.full((9, 30), np.nan, np.float32)
    Projection([matrix for matrix, _ in matrices]).multiply(batch, out, THREAD_POOL, exact=True)
    expected = np.concatenate([x.astype(np.float64) @ weights.T for _, weights in matrices], axis=1)
    for rows in (slice(0, 20), slice(20, 23), slice(23, 30)):
        assert_close(out[:, rows], expected[:, rows])
        if rows.start != 20:
            quantized = expected_product(matrices, batch)[:, rows]
            assert np.abs(out[:, rows] - expected[:, rows]).max() < 0.1 * np.abs(quantized - expected[:, rows]).max()


@pytest.mark.parametrize("value", [0.0, 1e-42, 1e30])
def test_extreme_activations(variant: str, value: float) -> None:
    x = vectors(3, 64)
    x[0] = value
    x[2, 5] = -value
    batch = batch_of(x)
    for matrix in (trit_matrix(2, 8, 64), half_matrix(8, 64)):
        result, expected = multiply([matrix[0]], batch), expected_product([matrix], batch)
        assert np.isfinite(result).all()
        for token in range(3):
            assert_close(result[token], expected[token])
