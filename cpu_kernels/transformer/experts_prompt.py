"""The experts of a prompt's tokens: tokens are grouped by expert, and each expert multiplies all of its tokens.

A *slot* is a place for a token and one of its experts. An expert's slots are neighbours and begin with a block of six
(see `quantize_batch`), so there may be empty slots behind them.
"""

from __future__ import annotations

import numpy as np

from cpu_kernels.compilation import lazy_numba as numba
from cpu_kernels.packed_rows.layout import BLOCK_TOKENS
from cpu_kernels.transformer.experts import add_scaled, shared_gate
from cpu_kernels.transformer.experts_batch import route_tokens
from cpu_kernels.transformer.gemm import trit_gemm
from cpu_kernels.transformer.gemv_batch import multiply_half_rows, scratch_floats


@numba.njit(cache=True, nogil=True)
def route_prompt(isa, experts, layer, x, scores, own_scores, chosen, weights, thread, threads):
    """Choose the experts of a thread's share of the tokens; see `route_tokens`.

    own_scores: float32 [threads, 2, experts], scratch.
    """
    own = slice(len(x) * thread // threads, len(x) * (thread + 1) // threads)
    route_tokens(isa, experts, layer, x[own], scores[own], own_scores[thread], chosen[own], weights[own])


@numba.njit(cache=True, nogil=True)
def expert_gemm(
    isa, words, rows, kind, steps, starts, counts, integers, offsets, scales, y, first_column, thread, threads
):
    """Compute a thread's share of each packed expert's rows times the tokens in its slots.

    Args:
        isa: the instruction set.
        words: uint16, the packed rows of all experts.
        rows: how many an expert has.
        kind: their depth.
        steps: float32 [experts, 32], codebooks / h, padded.
        starts, counts: int64 [experts]: an expert's first slot, a multiple of six, and how many slots are used.
        integers, offsets, scales: the slots as `quantize_batch` makes them.
        y: float32 [slots, ...], out, from column `first_column` on.
        first_column: where the results begin.
        thread, threads: which of how many shares of the rows to compute.

    """
    size = len(words) // len(counts)
    for e in range(len(counts)):
        if counts[e] == 0:
            continue
        first = starts[e] // BLOCK_TOKENS
        blocks = slice(first, first + (counts[e] + BLOCK_TOKENS - 1) // BLOCK_TOKENS)
        trit_gemm(
            isa, words[e * size : (e + 1) * size], rows, kind, steps[e], integers[blocks], offsets[blocks],
            scales[blocks], y[starts[e] : starts[e] + counts[e]], first_column, thread, threads,
        )  # fmt: skip


@numba.njit(cache=True, nogil=True)
def expert_half_gemm(isa, halves, rows, starts, counts, x, y, first_column, thread, threads):
    """Do what `expert_gemm` does for experts of float16, uint16 [experts * rows * columns]; x: float32 [slots, ...]."""
    scratch = np.empty(scratch_floats(x.shape[1]), np.float32)
    first, last = rows * thread // threads, rows * (thread + 1) // threads
    size = len(halves) // len(counts)
    for e in range(len(counts)):
        if counts[e] > 0:
            slots = slice(starts[e], starts[e] + counts[e])
            out = y[slots, first_column : first_column + rows]
            multiply_half_rows(isa, halves[e * size :].ctypes.data, x[slots], out, first, last, scratch)


@numba.njit(cache=True, nogil=True)
def sum_experts_prompt(experts, slot_outputs, slots, weights, scores, dense_out, out, thread, threads):
    """Compute a thread's share of the tokens' weighted sums of their experts' outputs, the best first.

    Args:
        experts: see `Experts`.
        slot_outputs: float32 [slots, hidden].
        slots: int64 [tokens, chosen]: the slots of each token, in the order of its choice.
        weights: float32 [tokens, chosen].
        scores: float32 [tokens, rows of the router].
        dense_out: float32 [tokens, hidden], the output of the shared expert; [0, hidden] for none.
        out: float32 [tokens, hidden], out.
        thread, threads: which of how many shares of the tokens to compute.

    """
    columns = out.shape[1]
    for t in range(len(out) * thread // threads, len(out) * (thread + 1) // threads):
        out[t] = 0.0
        for rank in range(slots.shape[1]):
            add_scaled(weights[t, rank], slot_outputs[slots[t, rank]], out[t], 0, columns)
        if len(dense_out) > 0:
            add_scaled(shared_gate(experts, scores[t]), dense_out[t], out[t], 0, columns)
