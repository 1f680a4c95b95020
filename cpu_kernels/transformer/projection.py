"""Interface of the matrix kernels: matrices that share an input, and quantized activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cpu_kernels.packed_rows.layout import (
    BLOCK_SIZE,
    BLOCK_TOKENS,
    CODEBOOK_SIZE,
    GROUP_SIZE,
    TABLE_SIZE,
    WORDS_PER_BLOCK,
    level_offset,
)
from cpu_kernels.threads.thread_pool import ThreadPool
from cpu_kernels.transformer.activations import (
    VectorBuffers,
    quantization_error_of_batch,
    quantize_batch,
    quantize_vectors,
)
from cpu_kernels.transformer.aligned import aligned_zeros
from cpu_kernels.transformer.gemm import half_gemm, trit_gemm
from cpu_kernels.transformer.gemv import HALVES, gemv
from cpu_kernels.transformer.gemv_batch import gemv_batch, scratch_for


class Activations:
    """Activations for the decode kernels, one vector after the other.

    Attributes:
        x: float32 [vectors, columns].
        integers, offsets, scales: [vectors, ...], see `quantize_row`.

    """

    def __init__(self, vectors: int, columns: int, *, bits: int = 16) -> None:
        """Allocate zeros; `bits` are those of the integers, 16 or 8."""
        groups = columns // GROUP_SIZE
        self.x = aligned_zeros((vectors, columns), np.float32)
        self.integers = aligned_zeros((vectors, GROUP_SIZE * bits // 32, groups, 32 // bits), np.dtype(f"int{bits}"))
        self.offsets = aligned_zeros((vectors, 4, groups), np.int32)
        self.scales = aligned_zeros((vectors, groups), np.float32)

    @property
    def buffers(self) -> VectorBuffers:
        """All four arrays, in the order in which kernels take them."""
        return self.x, self.integers, self.offsets, self.scales

    def first(self, vectors: int) -> Activations:
        """Return the first vectors, as a view."""
        view = Activations.__new__(Activations)
        view.x, view.integers = self.x[:vectors], self.integers[:vectors]
        view.offsets, view.scales = self.offsets[:vectors], self.scales[:vectors]
        return view

    def quantize(self, thread_pool: ThreadPool) -> None:
        """Quantize `x`."""
        thread_pool.run(quantize_vectors, *self.buffers)

    def vector(self, index: int) -> VectorBuffers:
        """Return views of one vector's arrays."""
        return self.x[index], self.integers[index], self.offsets[index], self.scales[index]


def quantize_vector(vector: VectorBuffers) -> None:
    """Quantize one vector, a result of `Activations.vector`, in this thread."""
    quantize_vectors(*(array[np.newaxis] for array in vector), 0, 1)


class Batch:
    """Activations for the prefill kernels, quantized in blocks of six tokens.

    Attributes:
        x: float32 [tokens, columns].
        integers, offsets, scales: see `quantize_batch`; lanes beyond the last token are not used.

    """

    def __init__(self, tokens: int, columns: int, *, bits: int = 16) -> None:
        """Allocate zeros; `bits` are those of the integers, 16 or 8."""
        groups, blocks = columns // GROUP_SIZE, -(-tokens // BLOCK_TOKENS)
        self.x = aligned_zeros((tokens, columns), np.float32)
        shape = (blocks, groups, GROUP_SIZE * bits // 32, BLOCK_TOKENS, 32 // bits)
        self.integers = aligned_zeros(shape, np.dtype(f"int{bits}"))
        self.offsets = aligned_zeros((blocks, 4, groups, BLOCK_TOKENS), np.int32)
        self.scales = aligned_zeros((blocks, groups, BLOCK_TOKENS), np.float32)

    @property
    def buffers(self) -> VectorBuffers:
        """All four arrays, in the order in which kernels take them."""
        return self.x, self.integers, self.offsets, self.scales

    def quantize(self, thread_pool: ThreadPool) -> None:
        """Quantize `x`."""
        thread_pool.run(quantize_batch, *self.buffers)

    def quantization_error(self, thread_pool: ThreadPool) -> Batch:
        """Return the quantization error, quantized to 16 bits: 15 more bits of every vector."""
        result = Batch(*self.x.shape)
        thread_pool.run(quantization_error_of_batch, self.x, self.integers, self.scales, result.x)
        result.quantize(thread_pool)
        return result

    def first(self, tokens: int) -> Batch:
        """Return the first tokens of the batch, as a view."""
        view, blocks = Batch.__new__(Batch), -(-tokens // BLOCK_TOKENS)
        view.x, view.integers = self.x[:tokens], self.integers[:blocks]
        view.offsets, view.scales = self.offsets[:blocks], self.scales[:blocks]
        return view


def row_bytes(columns: int, depth: int) -> int:
    """Return the size of a row: packed of whole blocks of 64 columns, or float16 if the depth is 0.

    ValueError for columns that are no whole blocks.
    """
    if depth == HALVES:
        return 2 * columns
    if columns % BLOCK_SIZE:
        raise ValueError("packed rows have whole blocks of 64 columns")
    return columns // BLOCK_SIZE * 2 * WORDS_PER_BLOCK[depth]


@dataclass(frozen=True)
class Matrix:
    """A matrix as it is stored in the file.

    Attributes:
        data: uint8, 1-D: packed rows of `depth`, or float16 rows if depth is 0.
        rows, columns: the shape.
        depth: trits per weight, or 0 for float16.
        codebook: float32 [27] for a trit matrix.

    """

    data: np.ndarray
    rows: int
    columns: int
    depth: int
    codebook: np.ndarray | None = None

    def __post_init__(self) -> None:
        """Check the length of the data, because the kernels read it by address; ValueError if it is wrong."""
        if self.depth != HALVES and (self.codebook is None or len(self.codebook) != CODEBOOK_SIZE):
            raise ValueError("a trit matrix needs a codebook of 27 entries")
        n_bytes = self.rows * row_bytes(self.columns, self.depth)
        if self.data.dtype != np.uint8 or self.data.ndim != 1 or self.data.nbytes != n_bytes:
            raise ValueError("the matrix's data does not have the length of its shape")

    @property
    def steps(self) -> np.ndarray:
        """The steps, codebook / h: float32 [32], padded with zeros."""
        table = np.zeros(TABLE_SIZE, np.float32)
        if self.codebook is not None:
            table[:CODEBOOK_SIZE] = self.codebook / np.float32(level_offset(self.depth))
        return table


class Projection:
    """Matrices that are multiplied with the same input; their outputs are concatenated."""

    def __init__(self, matrices: Sequence[Matrix]) -> None:
        self.columns = matrices[0].columns
        if any(matrix.columns != self.columns for matrix in matrices):
            raise ValueError("the matrices of a projection must have the same number of columns")
        self.matrices = list(matrices)
        self.addresses = np.array([matrix.data.ctypes.data for matrix in matrices], np.int64)
        self.matrix_rows = np.array([matrix.rows for matrix in matrices], np.int64)
        self.depths = np.array([matrix.depth for matrix in matrices], np.int64)
        self.steps = np.stack([matrix.steps for matrix in matrices])
        self.rows = int(self.matrix_rows.sum())
        self._scratch: np.ndarray | None = None  # for `multiply_vectors`

    @property
    def reads_floats(self) -> bool:
        """Whether a matrix is multiplied with the float `x` of a batch instead of its integers."""
        return bool((self.depths == HALVES).any())

    def multiply(self, batch: Batch, out: np.ndarray, thread_pool: ThreadPool, *, exact: bool = False) -> None:
        """Multiply every vector of a batch.

        Args:
            batch: [tokens, columns], quantized.
            out: float32 [tokens, rows of all matrices].
            thread_pool: the threads to use.
            exact: whether to also multiply the quantization error of the batch: it takes twice the time, and the only
                remaining error is the rounding of float32.

        """
        if batch.x.shape != (len(out), self.columns) or out.shape[1] != self.rows:
            raise ValueError("the shapes of batch, matrices and output do not match")
        x, *integers = batch.buffers
        error = batch.quantization_error(thread_pool).buffers[1:] if exact else ()
        first = 0
        for matrix, steps in zip(self.matrices, self.steps, strict=True):
            words = matrix.data.view(np.uint16)
            if matrix.depth == HALVES:
                thread_pool.run(half_gemm, thread_pool.isa, words, matrix.rows, x, out, first)
            else:
                arguments = (thread_pool.isa, words, matrix.rows, matrix.depth, steps)
                thread_pool.run(trit_gemm, *arguments, *integers, out, first)
                if exact:
                    result = np.zeros((len(out), matrix.rows), np.float32)
                    thread_pool.run(trit_gemm, *arguments, *error, result, 0)
                    out[:, first : first + matrix.rows] += result
            first += matrix.rows

    def multiply_vector(self, x: np.ndarray, out: np.ndarray, thread_pool: ThreadPool, *, exact: bool = False) -> None:
        """Multiply one vector: float32 [columns] -> float32 [rows of all matrices]; `exact` as in `multiply`."""
        if x.shape != (self.columns,) or out.shape != (self.rows,):
            raise ValueError("the shapes of vector, matrices and output do not match")
        if exact:
            batch = Batch(1, self.columns)
            batch.x[0] = x
            batch.quantize(thread_pool)
            self.multiply(batch, out[np.newaxis], thread_pool, exact=True)
            return
        activations = Activations(1, self.columns)
        activations.x[0] = x
        activations.quantize(thread_pool)
        matrices = self.addresses, self.matrix_rows, self.depths, self.steps
        thread_pool.run(gemv, thread_pool.isa, *matrices, activations.vector(0), out)

    def multiply_vectors(
        self, activations: Activations, out: np.ndarray, thread_pool: ThreadPool, scratch: np.ndarray | None = None
    ) -> None:
        """Multiply quantized vectors; with 16 bits, each result is bit-identical to that of `multiply_vector`.

        Args:
            activations: any number of quantized vectors, of 16 or 8 bits; none changes another's result.
            out: float32 [vectors, rows of all matrices]; any row stride.
            thread_pool: the threads to use.
            scratch: the result of `scratch_for` for at least these threads and columns; None allocates it at the first
                call and keeps it.

        """
        if activations.x.shape != (len(out), self.columns) or out.shape[1] != self.rows:
            raise ValueError("the shapes of vectors, matrices and output do not match")
        if scratch is None:
            if self._scratch is None or len(self._scratch) < thread_pool.threads:
                self._scratch = scratch_for(thread_pool.threads, self.columns)
            scratch = self._scratch
        elif len(scratch) < thread_pool.threads or scratch.shape[1] < scratch_for(0, self.columns).shape[1]:
            raise ValueError("scratch is too small for the threads or the columns")
        matrices = self.addresses, self.matrix_rows, self.depths, self.steps
        thread_pool.run(gemv_batch, thread_pool.isa, *matrices, activations.buffers, out, scratch)
