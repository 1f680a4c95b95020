"""Interface of the kernels of experts: stacks of matrices, and a prompt's tokens grouped by expert."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cpu_kernels.packed_rows.layout import BLOCK_TOKENS, CODEBOOK_SIZE, TABLE_SIZE, level_offset
from cpu_kernels.threads.thread_pool import ThreadPool
from cpu_kernels.transformer.activations import quantize_gathered
from cpu_kernels.transformer.experts_prompt import expert_gemm, expert_half_gemm
from cpu_kernels.transformer.gemv import HALVES
from cpu_kernels.transformer.projection import Batch, Matrix, row_bytes


@dataclass(frozen=True)
class ExpertStack:
    """The matrices of one kind of all experts of a layer, as they are stored in the file.

    Attributes:
        data: uint8, 1-D: the matrices one after the other, packed rows of `depth`, or float16 rows if depth is 0.
        experts, rows, columns: the shape.
        depth: trits per weight, or 0 for float16.
        codebooks: float32 [experts, 27] of trit matrices; [experts, 0] for float16.
        biases: float32 [experts, rows], or [0, 0].

    """

    data: np.ndarray
    experts: int
    rows: int
    columns: int
    depth: int
    codebooks: np.ndarray
    biases: np.ndarray

    def __post_init__(self) -> None:
        """Check the lengths, because the kernels read the data by address; ValueError if one is wrong."""
        entries = 0 if self.depth == HALVES else CODEBOOK_SIZE
        if self.codebooks.shape != (self.experts, entries):
            raise ValueError("a stack of trit matrices needs a codebook of 27 entries for each expert")
        if self.biases.shape not in ((0, 0), (self.experts, self.rows)):
            raise ValueError("the biases do not have the stack's shape")
        if self.data.dtype != np.uint8 or self.data.ndim != 1 or self.data.nbytes != self.experts * self.expert_bytes:
            raise ValueError("the stack's data does not have the length of its shape")

    @property
    def expert_bytes(self) -> int:
        """Size of one expert's matrix."""
        return self.rows * row_bytes(self.columns, self.depth)

    @property
    def steps(self) -> np.ndarray:
        """The steps, codebooks / h: float32 [experts, 32], padded with zeros."""
        table = np.zeros((self.experts, TABLE_SIZE), np.float32)
        if self.depth != HALVES:
            table[:, :CODEBOOK_SIZE] = self.codebooks / np.float32(level_offset(self.depth))
        return table

    def matrix(self, expert: int) -> Matrix:
        """Return one expert's matrix, a view."""
        data = self.data[expert * self.expert_bytes : (expert + 1) * self.expert_bytes]
        codebook = None if self.depth == HALVES else self.codebooks[expert]
        return Matrix(data, self.rows, self.columns, self.depth, codebook)

    def multiply(
        self,
        slots: ExpertSlots,
        batch: Batch,
        out: np.ndarray,
        first_column: int,
        thread_pool: ThreadPool,
        *,
        exact: bool = False,
    ) -> None:
        """Multiply each expert's matrix with the tokens in its slots, and add its bias.

        Args:
            slots: which slots each expert has.
            batch: [slots, columns], quantized; for float16 matrices and for `exact` also its `x`.
            out: float32 [slots, ...]; the results are put into `rows` columns.
            first_column: the first of them.
            thread_pool: the threads to use.
            exact: as in `Projection.multiply`.

        """
        if batch.x.shape != (len(out), self.columns) or out.shape[1] < first_column + self.rows:
            raise ValueError("the shapes of batch, matrices and output do not match")
        words, place, isa = self.data.view(np.uint16), (slots.starts, slots.counts), thread_pool.isa
        if self.depth == HALVES:
            thread_pool.run(expert_half_gemm, isa, words, self.rows, *place, batch.x, out, first_column)
        else:
            arguments = (isa, words, self.rows, self.depth, self.steps, *place)
            thread_pool.run(expert_gemm, *arguments, *batch.buffers[1:], out, first_column)
            if exact:
                result = np.zeros((len(out), self.rows), np.float32)
                error = batch.quantization_error(thread_pool).buffers[1:]
                thread_pool.run(expert_gemm, *arguments, *error, result, 0)
                out[:, first_column : first_column + self.rows] += result
        columns = slice(first_column, first_column + self.rows)
        for bias, start, count in zip(self.biases, slots.starts, slots.counts, strict=False):
            out[start : start + count, columns] += bias


class ExpertSlots:
    """A prompt's tokens, grouped by expert: see `experts_prompt`.

    Attributes:
        tokens: int64 [slots], the token of each slot, or -1.
        starts, counts: int64 [experts]: the first slot of each expert, a multiple of six, and how many it uses.
        of_tokens: int64 [tokens, chosen]: the slots of each token, in the order of its choice.

    """

    def __init__(self, chosen: np.ndarray, experts: int) -> None:
        """Group tokens by their chosen experts, int64 [tokens, chosen]."""
        flat = chosen.ravel()
        order = np.argsort(flat, kind="stable")
        self.counts = np.bincount(flat, minlength=experts)
        room = -(-self.counts // BLOCK_TOKENS) * BLOCK_TOKENS
        self.starts = np.cumsum(room) - room
        firsts = np.cumsum(self.counts) - self.counts
        places = np.empty(len(flat), np.int64)
        places[order] = np.arange(len(flat)) + (self.starts - firsts)[flat[order]]
        self.of_tokens = places.reshape(chosen.shape)
        self.tokens = np.full(int(room.sum()), -1, np.int64)
        self.tokens[places] = np.arange(len(flat)) // chosen.shape[1]

    @staticmethod
    def most(tokens: int, chosen: int, experts: int) -> int:
        """Return how many slots there may be for so many tokens."""
        entries = tokens * chosen
        return entries + min(experts, entries) * (BLOCK_TOKENS - 1)

    def gather(self, source: np.ndarray, batch: Batch, thread_pool: ThreadPool, *, keep: bool) -> None:
        """Quantize tokens, float32 [tokens, columns], into their slots of a batch; `keep` copies them to its `x`."""
        thread_pool.run(quantize_gathered, source, self.tokens, keep, *batch.buffers)
