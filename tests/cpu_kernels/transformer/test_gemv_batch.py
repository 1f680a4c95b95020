"""Matrix times a few vectors, in every instruction-set variant: bit-identical to each vector alone."""

from __future__ import annotations

import ctypes
import mmap
import sys

import numpy as np
import pytest
from random_inputs import (
    THREAD_POOL,
    assert_close,
    damaged_matrix,
    half_matrix,
    products,
    rounded_once,
    trit_matrix,
    vector_integers,
    vectors,
)

from cpu_kernels.threads.thread_pool import ThreadPool
from cpu_kernels.transformer.gemv import gemv
from cpu_kernels.transformer.gemv_batch import scratch_for
from cpu_kernels.transformer.projection import Activations, Matrix, Projection, quantize_vector
from tritgguf.formats.trit_types import DEPTHS

depths = pytest.mark.parametrize("depth", DEPTHS)
widths = pytest.mark.parametrize("bits", [16, 8])
COUNTS = (1, 2, 3, 5, 8, 16, 17)
COLUMNS = (64, 128, 192, 256, 576, 1472, 1536)  # whole steps, and remainders of 4, 8 and 12 groups


def activations_of(x: np.ndarray, bits: int = 16) -> Activations:
    """Quantize float32 [vectors, columns] for the decode kernels."""
    result = Activations(*x.shape, bits=bits)
    result.x[:] = x
    for index in range(len(x)):
        quantize_vector(result.vector(index))
    return result


def multiply(
    matrices: list[Matrix], x: np.ndarray, bits: int = 16, thread_pool: ThreadPool = THREAD_POOL
) -> np.ndarray:
    """Multiply vectors [vectors, columns], and check that the memory around the output is not changed."""
    projection = Projection(matrices)
    around = np.full((len(x) + 2, projection.rows + 32), np.nan, np.float32)
    out = around[1:-1, 16:-16]
    projection.multiply_vectors(activations_of(x, bits), out, thread_pool)
    result = out.copy()
    out[:] = np.nan
    assert np.isnan(around).all()
    return result


def one_by_one(matrices: list[Matrix], x: np.ndarray, bits: int = 16) -> np.ndarray:
    """Multiply each vector alone, with `gemv`."""
    projection = Projection(matrices)
    out = np.zeros((len(x), projection.rows), np.float32)
    for index in range(len(x)):
        alone = activations_of(x[index : index + 1], bits).vector(0)
        matrix_arrays = projection.addresses, projection.matrix_rows, projection.depths, projection.steps
        THREAD_POOL.run(gemv, THREAD_POOL.isa, *matrix_arrays, alone, out[index])
    return out


def expected_product(matrices: list[tuple[Matrix, np.ndarray]], x: np.ndarray, bits: int = 16) -> np.ndarray:
    parts = [vector_integers(vector, bits) for vector in x]
    integers, step_sizes = (np.concatenate(some) for some in zip(*parts, strict=True))
    return products(matrices, x, integers, step_sizes)


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(actual.view(np.uint32), expected.view(np.uint32))


@widths
@depths
def test_result_equals_that_of_each_vector_alone(variant: str, depth: int, bits: int) -> None:
    for count, columns in zip(COUNTS, COLUMNS, strict=True):
        matrix, x = trit_matrix(depth, 21, columns), vectors(count, columns)
        result = multiply([matrix[0]], x, bits)
        assert_same_bits(result, one_by_one([matrix[0]], x, bits))
        assert_close(result, expected_product([matrix], x, bits))


@widths
@depths
@pytest.mark.parametrize("count", COUNTS)
def test_every_number_of_vectors(depth: int, count: int, bits: int) -> None:
    """The longer rows have several panels, and the last matrix several blocks of rows."""
    for rows, columns in ((1, 192), (9, 576), (16, 448), (5, 3392), (2, 6336), (70, 64)):
        matrix, x = trit_matrix(depth, rows, columns)[0], vectors(count, columns)
        assert_same_bits(multiply([matrix], x, bits), one_by_one([matrix], x, bits))


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 63, 64, 65, 97, 130, 192, 3000])
def test_half_matrix(variant: str, columns: int) -> None:
    """The longest rows have several panels."""
    for count in COUNTS:
        matrix, x = half_matrix(37, columns), vectors(count, columns)
        result = multiply([matrix[0]], x)
        assert_same_bits(result, one_by_one([matrix[0]], x))
        assert_close(result, expected_product([matrix], x))


@widths
@depths
def test_a_result_does_not_depend_on_its_neighbours(variant: str, depth: int, bits: int) -> None:
    matrices, x = [trit_matrix(depth, 10, 320)[0], half_matrix(5, 320)[0]], vectors(16, 320)
    whole = multiply(matrices, x, bits)
    order = np.random.default_rng(0).permutation(16)
    assert_same_bits(multiply(matrices, x[order], bits), whole[order])
    assert_same_bits(multiply(matrices, x[3:9], bits), whole[3:9])


@widths
@depths
def test_damaged_rows(variant: str, depth: int, bits: int) -> None:
    matrix, x = damaged_matrix(depth), vectors(4, 192)
    result = multiply([matrix[0]], x, bits)
    assert_same_bits(result, one_by_one([matrix[0]], x, bits))
    assert_close(result, expected_product([matrix], x, bits))


@depths
@widths
def test_sums_of_a_group_are_exact(variant: str, depth: int, bits: int) -> None:
    """The largest levels and activations overflow nothing; float32 rounds each sum once."""
    matrix = damaged_matrix(depth)[0]
    for group in (0, 5, 11):
        x = np.zeros((5, 192), np.float32)
        x[:, 16 * group : 16 * group + 16] = vectors(5, 16)
        x[0, x[0] != 0], x[1, x[1] != 0] = 2.0, -2.0
        result = multiply([matrix], x, bits)
        for vector, found in zip(x, result, strict=True):
            integers, step_sizes = vector_integers(vector, bits)
            np.testing.assert_array_equal(found, rounded_once(matrix, group, integers[0], step_sizes[0, group]))


@widths
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_several_matrices_on_threads(threads: int, bits: int) -> None:
    parts = ((3, 7), (1, 1), (2, 40), (4, 16))
    matrices = [trit_matrix(depth, rows, 320)[0] for depth, rows in parts]
    matrices.insert(2, half_matrix(5, 320)[0])
    for count in (2, 7):
        x = vectors(count, 320)
        assert_same_bits(multiply(matrices, x, bits, ThreadPool(threads)), one_by_one(matrices, x, bits))


@widths
@depths
@pytest.mark.parametrize("value", [0.0, 1e-42, 1e-30, 1e30])
def test_extreme_activations(variant: str, depth: int, value: float, bits: int) -> None:
    x = vectors(5, 192)
    x[1] = -value
    x[3, 77] = value
    for matrix in (trit_matrix(depth, 9, 192)[0], half_matrix(9, 192)[0]):
        result = multiply([matrix], x, bits)
        assert np.isfinite(result).all()
        assert_same_bits(result, one_by_one([matrix], x, bits))


def test_nan_and_infinity_affect_only_their_vector(variant: str) -> None:
    x = vectors(4, 192)
    x[1, 5], x[2, 6] = np.inf, np.nan
    matrix = half_matrix(9, 192)[0]
    result, expected = multiply([matrix], x), one_by_one([matrix], x)
    np.testing.assert_array_equal(result, expected)
    assert np.isfinite(result[[0, 3]]).all()


@widths
def test_a_scratch_may_be_shared_and_larger(variant: str, bits: int) -> None:
    scratch, x = scratch_for(3, 1024), vectors(6, 192)
    scratch[:] = np.nan
    for matrix in (trit_matrix(2, 9, 192)[0], half_matrix(9, 192)[0], trit_matrix(4, 9, 192)[0]):
        out = np.zeros((6, 9), np.float32)
        Projection([matrix]).multiply_vectors(activations_of(x, bits), out, THREAD_POOL, scratch)
        assert_same_bits(out, one_by_one([matrix], x, bits))


@widths
@pytest.mark.skipif(sys.platform != "linux", reason="protects a page with mprotect")
def test_nothing_is_read_after_the_last_row(variant: str, bits: int) -> None:
    page = mmap.PAGESIZE
    pages = mmap.mmap(-1, 3 * page)
    memory = np.frombuffer(pages, np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(memory.ctypes.data + 2 * page), ctypes.c_size_t(page), 0) == 0
    try:
        for columns in (64, 128, 192, 320):
            halves = [half_matrix(3, columns), half_matrix(3, columns + 5)]
            for matrix, _ in [*(trit_matrix(depth, 3, columns) for depth in DEPTHS), *halves]:
                last = memory[2 * page - matrix.data.size : 2 * page]
                last[:] = matrix.data
                moved = Matrix(last, 3, matrix.columns, matrix.depth, matrix.codebook)
                x = vectors(3, matrix.columns)
                assert_same_bits(multiply([moved], x, bits), multiply([matrix], x, bits))
    finally:
        libc.mprotect(ctypes.c_void_p(memory.ctypes.data + 2 * page), ctypes.c_size_t(page), mmap.PROT_READ)


def test_shapes_must_fit_each_other() -> None:
    projection = Projection([trit_matrix(2, 4, 64)[0]])
    activations = activations_of(vectors(3, 64))
    for shape in ((2, 4), (3, 5)):
        with pytest.raises(ValueError):
            projection.multiply_vectors(activations, np.zeros(shape, np.float32), THREAD_POOL)
    with pytest.raises(ValueError):
        projection.multiply_vectors(activations_of(vectors(3, 128)), np.zeros((3, 4), np.float32), THREAD_POOL)
    for scratch in (scratch_for(1, 64), scratch_for(2, 48)):
        with pytest.raises(ValueError):
            projection.multiply_vectors(activations, np.zeros((3, 4), np.float32), THREAD_POOL, scratch)
