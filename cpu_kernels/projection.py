"""The public face of the matrix kernels: matrices that share an input, and the batch of vectors they multiply."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cpu_kernels import instruction_set
from cpu_kernels.activations import quantize_rows
from cpu_kernels.gemm import half_gemm, trit_gemm
from cpu_kernels.gemv import HALVES, gemv
from cpu_kernels.layout import (
    BLOCK_SIZE,
    CODEBOOK_SIZE,
    GROUP_SIZE,
    PAIRS,
    TABLE_SIZE,
    WORDS_PER_BLOCK,
    level_offset,
)


class Activations:
    """A batch of vectors as the matrix kernels take them; all memory is allocated once.

    Attributes:
        x: float32 [tokens, columns], the vectors.
        pairs: int16 [tokens, 8, groups, 2], quantized, weights j and j + 8 of every group beside each other.
        offsets: int32 [tokens, 4, groups], minus h times the group's sum, for each depth.
        scales: float32 [tokens, groups], the value of one integer step.

    """

    def __init__(self, tokens: int, columns: int) -> None:
        groups = columns // GROUP_SIZE
        self.x = np.zeros((tokens, columns), np.float32)
        self.pairs = np.zeros((tokens, PAIRS, groups, 2), np.int16)
        self.offsets = np.zeros((tokens, 4, groups), np.int32)
        self.scales = np.zeros((tokens, groups), np.float32)

    @property
    def buffers(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """All four arrays, in the order in which kernels take them."""
        return self.x, self.pairs, self.offsets, self.scales

    def quantize(self) -> None:
        """Fill the integer form from `x`."""
        quantize_rows(self.x, self.pairs, self.offsets, self.scales)

    def first(self, tokens: int) -> Activations:
        """Return the first vectors of the batch, as a view."""
        view = Activations.__new__(Activations)
        view.x, view.pairs = self.x[:tokens], self.pairs[:tokens]
        view.offsets, view.scales = self.offsets[:tokens], self.scales[:tokens]
        return view


@dataclass(frozen=True)
class Matrix:
    """A matrix as it lies in the file.

    Attributes:
        data: uint8, 1-D: packed rows of `depth`, or float16 rows where depth is 0.
        rows, columns: its shape.
        depth: trits per weight, or 0 for float16.
        codebook: float32 [27] for a trit matrix.

    """

    data: np.ndarray
    rows: int
    columns: int
    depth: int
    codebook: np.ndarray | None = None

    def __post_init__(self) -> None:
        """Check that the data is as long as the shape says, because the kernels read it by address."""
        row_bytes = 2 * self.columns
        if self.depth != HALVES:
            if self.columns % BLOCK_SIZE or self.codebook is None or len(self.codebook) != CODEBOOK_SIZE:
                raise ValueError("a trit matrix needs rows of whole blocks and a codebook of 27 entries")
            row_bytes = self.columns // BLOCK_SIZE * 2 * WORDS_PER_BLOCK[self.depth]
        if self.data.dtype != np.uint8 or self.data.ndim != 1 or self.data.nbytes != self.rows * row_bytes:
            raise ValueError("the matrix's data does not have the length of its shape")

    @property
    def steps(self) -> np.ndarray:
        """The decoder's steps, scale / h: float32 [32], padded with zeros."""
        table = np.zeros(TABLE_SIZE, np.float32)
        if self.codebook is not None:
            table[:CODEBOOK_SIZE] = self.codebook / np.float32(level_offset(self.depth))
        return table


class Projection:
    """Matrices with the same input, multiplied in one parallel region; their outputs lie side by side."""

    def __init__(self, matrices: Sequence[Matrix]) -> None:
        self.columns = matrices[0].columns
        if any(matrix.columns != self.columns for matrix in matrices):
            raise ValueError("matrices of one projection have rows of one length")
        self._matrices = list(matrices)
        self._isa = instruction_set.as_type(instruction_set.choose())
        self._addresses = np.array([matrix.data.ctypes.data for matrix in matrices], np.int64)
        self._rows = np.array([matrix.rows for matrix in matrices], np.int64)
        self._kinds = np.array([matrix.depth for matrix in matrices], np.int64)
        self._steps = np.stack([matrix.steps for matrix in matrices])
        self.rows = int(self._rows.sum())

    def multiply(self, activations: Activations, out: np.ndarray, threads: int) -> None:
        """Multiply every vector of a batch.

        Args:
            activations: [tokens, columns], quantized.
            out: float32 [tokens, rows of all matrices].
            threads: parts to split the rows into.

        """
        tokens = len(out)
        if activations.x.shape != (tokens, self.columns) or out.shape[1] != self.rows:
            raise ValueError("activations, matrices and output do not fit each other")
        x, pairs, offsets, scales = activations.buffers
        if tokens == 1:
            gemv(
                self._isa, self._addresses, self._rows, self._kinds, self._steps,
                x[0], pairs[0], offsets[0], scales[0], out[0], threads,
            )  # fmt: skip
            return
        first = 0
        for matrix, steps in zip(self._matrices, self._steps, strict=True):
            words = matrix.data.view(np.uint16)
            if matrix.depth == HALVES:
                half_gemm(self._isa, words, matrix.rows, x, out, first, threads)
            else:
                trit_gemm(
                    self._isa,
                    words,
                    matrix.rows,
                    matrix.depth,
                    steps,
                    pairs,
                    offsets,
                    scales,
                    out,
                    first,
                    threads,
                )
            first += matrix.rows
