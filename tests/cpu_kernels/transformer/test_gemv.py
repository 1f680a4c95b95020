"""Matrix times vector, in every instruction-set variant, against exact integers and float64."""

from __future__ import annotations

import ctypes
import mmap
import sys

import numpy as np
import pytest
from random_inputs import (
    CODEBOOK,
    THREAD_POOL,
    assert_close,
    batch_of,
    damaged_matrix,
    half_matrix,
    products,
    rounded_once,
    trit_matrix,
    vector_integers,
    vectors,
)

from cpu_kernels.simd import instruction_set, variants
from cpu_kernels.threads.thread_pool import ThreadPool
from cpu_kernels.transformer.projection import Matrix, Projection
from tritgguf.formats.trit_types import DEPTHS

depths = pytest.mark.parametrize("depth", DEPTHS)
COLUMNS = (64, 128, 192, 256, 320, 448, 576, 1536)  # whole steps of 16 groups, and remainders of 4, 8 and 12


def multiply(matrices: list[Matrix], x: np.ndarray, thread_pool: ThreadPool = THREAD_POOL) -> np.ndarray:
    """Multiply a vector [columns], and check that the memory before and after the output is not changed."""
    projection = Projection(matrices)
    around = np.full(projection.rows + 32, np.nan, np.float32)
    projection.multiply_vector(x, around[16:-16], thread_pool)
    assert np.isnan(around[:16]).all()
    assert np.isnan(around[-16:]).all()
    return around[16:-16]


def expected_product(matrices: list[tuple[Matrix, np.ndarray]], x: np.ndarray) -> np.ndarray:
    return products(matrices, x[np.newaxis], *vector_integers(x))[0]


@depths
def test_trit_matrix(variant: str, depth: int) -> None:
    for columns in COLUMNS:
        matrix, x = trit_matrix(depth, 21, columns), vectors(1, columns)[0]
        assert_close(multiply([matrix[0]], x), expected_product([matrix], x))


@depths
def test_integer_sums_are_exact(variant: str, depth: int) -> None:
    """A vector with one non-zero group gives a result that is rounded once, so its bits are known."""
    matrix, _ = trit_matrix(depth, 33, 448)
    for group in range(448 // 16):
        x = np.zeros(448, np.float32)
        x[16 * group : 16 * group + 16] = vectors(1, 16, seed=group)[0]
        integers, step_sizes = vector_integers(x)
        expected = rounded_once(matrix, group, integers[0], step_sizes[0, group])
        np.testing.assert_array_equal(multiply([matrix], x), expected)


@depths
def test_damaged_rows_multiply_as_dequantized(variant: str, depth: int) -> None:
    # Invalid words must give the same digits in every decoder, and no digit out of range.
    matrix, x = damaged_matrix(depth), vectors(1, 192)[0]
    assert_close(multiply([matrix[0]], x), expected_product([matrix], x))


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 63, 64, 65, 97, 130, 192])
def test_half_matrix(variant: str, columns: int) -> None:
    matrix, x = half_matrix(11, columns), vectors(1, columns)[0]
    assert_close(multiply([matrix[0]], x), expected_product([matrix], x))


def test_half_matrix_of_extreme_halves(variant: str) -> None:
    halves = np.array([[65504, 6e-8, -6e-5, 0.0], [-65504, 1.0, 2.0**-14, -0.0]], np.float16)
    matrix = Matrix(halves.reshape(-1).view(np.uint8), 2, 4, depth=0)
    for column in range(4):
        x = np.zeros(4, np.float32)
        x[column] = 1.0
        np.testing.assert_array_equal(multiply([matrix], x), halves[:, column].astype(np.float32))


def test_several_matrices(variant: str) -> None:
    matrices = [trit_matrix(depth, rows, 320) for depth, rows in ((3, 7), (1, 1), (2, 40), (4, 16))]
    matrices.insert(2, half_matrix(5, 320))
    x = vectors(1, 320)[0]
    together = [matrix for matrix, _ in matrices]
    result, expected = multiply(together, x), expected_product(matrices, x)
    start = 0
    for matrix in together:
        rows = slice(start, start + matrix.rows)
        assert_close(result[rows], expected[rows])
        start += matrix.rows


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_the_number_of_threads_changes_no_bit(threads: int) -> None:
    matrices = [trit_matrix(2, 5, 192)[0], half_matrix(1, 192)[0], trit_matrix(3, 4, 192)[0]]
    x = vectors(1, 192)[0]
    np.testing.assert_array_equal(multiply(matrices, x, ThreadPool(threads)), multiply(matrices, x, ThreadPool(1)))


@depths
def test_variants_agree(monkeypatch: pytest.MonkeyPatch, depth: int) -> None:
    matrix, x = trit_matrix(depth, 50, 576)[0], vectors(1, 576)[0]
    results = []
    for name, isa in variants.NAMES.items():
        if isa in instruction_set.supported():
            monkeypatch.setenv(instruction_set.ENVIRONMENT_VARIABLE, name)
            results.append(multiply([matrix], x))
    for result in results:
        assert_close(result, results[0])


@depths
@pytest.mark.parametrize("value", [0.0, 1e-42, 1e-30, 1e30])
def test_extreme_activations(variant: str, depth: int, value: float) -> None:
    matrix = trit_matrix(depth, 8, 192)
    everywhere, alone = np.full(192, -value, np.float32), vectors(1, 192)[0]
    alone[77] = value
    for x in (everywhere, alone):
        result = multiply([matrix[0]], x)
        assert np.isfinite(result).all()
        assert_close(result, expected_product([matrix], x))


def test_a_codebook_of_zeros_gives_zeros(variant: str) -> None:
    matrix, _ = trit_matrix(2, 4, 64)
    zeros = Matrix(matrix.data, 4, 64, 2, np.zeros(27, np.float32))
    np.testing.assert_array_equal(multiply([zeros], vectors(1, 64)[0]), np.zeros(4))


@pytest.mark.skipif(sys.platform != "linux", reason="protects a page with mprotect")
def test_nothing_is_read_after_the_last_row(variant: str) -> None:
    """The last tensor of a mapped file may end at a page border; reading further would crash the process."""
    page = mmap.PAGESIZE
    pages = mmap.mmap(-1, 3 * page)
    memory = np.frombuffer(pages, np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(memory.ctypes.data + 2 * page), ctypes.c_size_t(page), 0) == 0
    try:
        for columns in (64, 128, 192, 320):
            for matrix, _ in [*(trit_matrix(depth, 3, columns) for depth in DEPTHS), half_matrix(3, columns)]:
                last = memory[2 * page - matrix.data.size : 2 * page]
                last[:] = matrix.data
                moved = Matrix(last, 3, columns, matrix.depth, matrix.codebook)
                x = vectors(3, columns)
                np.testing.assert_array_equal(multiply([moved], x[0]), multiply([matrix], x[0]))
                batch, out = batch_of(x), np.zeros((2, 3, 3), np.float32)
                Projection([moved]).multiply(batch, out[0], THREAD_POOL)
                Projection([matrix]).multiply(batch, out[1], THREAD_POOL)
                np.testing.assert_array_equal(out[0], out[1])
    finally:
        libc.mprotect(ctypes.c_void_p(memory.ctypes.data + 2 * page), ctypes.c_size_t(page), mmap.PROT_READ)


def test_data_must_have_the_length_of_the_shape() -> None:
    matrix, _ = trit_matrix(2, 4, 64)
    for rows, columns, depth, codebook in (
        (5, 64, 2, CODEBOOK),
        (4, 128, 2, CODEBOOK),
        (4, 64, 3, CODEBOOK),
        (4, 64, 2, None),
        (4, 64, 2, CODEBOOK[:26]),
        (4, 63, 2, CODEBOOK),
        (4, 64, 0, None),
    ):
        with pytest.raises(ValueError):
            Matrix(matrix.data, rows, columns, depth, codebook)
    with pytest.raises(ValueError):
        Matrix(matrix.data.reshape(4, -1), 4, 64, 2, CODEBOOK)
    with pytest.raises(ValueError):
        Matrix(matrix.data.view(np.uint16), 4, 64, 2, CODEBOOK)


def test_shapes_must_fit_each_other() -> None:
    narrow, wide = trit_matrix(2, 4, 64)[0], trit_matrix(2, 4, 128)[0]
    with pytest.raises(ValueError):
        Projection([narrow, wide])
    projection = Projection([narrow])
    for columns, rows in ((128, 4), (64, 5), (64, 3)):
        with pytest.raises(ValueError):
            projection.multiply_vector(vectors(1, columns)[0], np.zeros(rows, np.float32), THREAD_POOL)
    for tokens, columns, out_shape in ((1, 128, (1, 4)), (2, 64, (1, 4)), (1, 64, (1, 5))):
        with pytest.raises(ValueError):
            projection.multiply(batch_of(vectors(tokens, columns)), np.zeros(out_shape, np.float32), THREAD_POOL)
