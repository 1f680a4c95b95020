"""The experts of several tokens: each expert's rows are unpacked once for all tokens that go to it.

A token and one of its experts are an *entry*. Entries are ordered by expert, so that an expert's entries are
neighbours. Each result is bit-identical to that of `experts` for the token alone.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cpu_kernels.compilation import lazy_numba as numba
from cpu_kernels.packed_rows.layout import GROUP_SIZE
from cpu_kernels.transformer.activations import VectorBuffers, quantize_row
from cpu_kernels.transformer.experts import (
    EXPERT_DOWN,
    EXPERT_GATE,
    EXPERT_UP,
    add_expert_bias,
    add_scaled,
    expert_count,
)
from cpu_kernels.transformer.gemv_batch import multiply_rows_batch
from cpu_kernels.transformer.router import choose_experts, router_scores
from cpu_kernels.transformer.swiglu import swiglu


class ExpertBatchBuffers(NamedTuple):
    """Buffers of several tokens' experts: `own` arrays have one row per thread, the threads share the others."""

    scores: np.ndarray  # float32 [tokens, rows of the router]
    own_scores: np.ndarray  # float32 [threads, 2, experts]
    chosen: np.ndarray  # int64 [tokens, chosen]
    weights: np.ndarray  # float32 [tokens, chosen]
    own_starts: np.ndarray  # int64 [threads, experts + 1]: an expert's first entry
    own_places: np.ndarray  # int64 [threads, at least tokens * chosen]: entry of a token and rank
    hidden: VectorBuffers  # [entries, hidden]
    gate: np.ndarray  # float32 [entries, feed_forward of an expert]
    up: np.ndarray  # float32 [entries, feed_forward of an expert]
    gated: VectorBuffers  # [entries, feed_forward of an expert]
    out: np.ndarray  # float32 [entries, hidden]


@numba.njit(cache=True)
def route_tokens(isa, experts, layer, x, scores, own_scores, chosen, weights):
    """Choose the experts of some tokens.

    Args:
        isa, experts, layer: see `Experts`.
        x: float32 [tokens, hidden].
        scores: float32 [tokens, rows of the router], out.
        own_scores: float32 [2, experts], scratch.
        chosen: int64 [tokens, chosen], out.
        weights: float32 [tokens, chosen], out.

    """
    router_scores(isa, experts.routers[layer], x, scores, 0, experts.routers.shape[1])
    biases, selection_biases = experts.router_biases[layer], experts.selection_biases[layer]
    for t in range(len(x)):
        of_experts = scores[t, : expert_count(experts)]
        choose_experts(experts.routing, of_experts, biases, selection_biases, own_scores, chosen[t], weights[t])


@numba.njit(cache=True)
def _order_entries(chosen, starts, places):
    """Order the entries of tokens by expert, those of one expert by token: a counting sort.

    Args:
        chosen: int64 [tokens, chosen].
        starts: int64 [experts + 1], out: each expert's first entry; its last one stands before the next expert's.
        places: int64 [tokens * chosen], out: the entry of each token and rank.

    """
    starts[:] = 0
    for expert in chosen.ravel():
        starts[expert + 1] += 1
    for e in range(1, len(starts)):
        starts[e] += starts[e - 1]
    ranks = chosen.shape[1]
    for t in range(len(chosen)):
        for rank in range(ranks):
            places[t * ranks + rank] = starts[chosen[t, rank]]
            starts[chosen[t, rank]] += 1
    for e in range(len(starts) - 1, 0, -1):
        starts[e] = starts[e - 1]
    starts[0] = 0


@numba.njit(cache=True)
def gather_entries(hidden, buffers, thread, threads):
    """Order the entries, for this thread, and copy a thread's share of the tokens' hidden states to their entries."""
    places = buffers.own_places[thread, : buffers.chosen.size]
    _order_entries(buffers.chosen, buffers.own_starts[thread], places)
    ranks = buffers.chosen.shape[1]
    for source in range(len(places) * thread // threads, len(places) * (thread + 1) // threads):
        place, t = places[source], source // ranks
        for k in range(hidden[0].shape[1]):
            buffers.hidden[0][place, k] = hidden[0][t, k]
        buffers.hidden[1][place] = hidden[1][t]
        buffers.hidden[2][place] = hidden[2][t]
        buffers.hidden[3][place] = hidden[3][t]


@numba.njit(cache=True)
def _of_expert(vectors, own):
    """Return the arrays of an expert's entries, a slice; see `VectorBuffers`."""
    x, integers, offsets, scales = vectors
    return x[own], integers[own], offsets[own], scales[own]


@numba.njit(cache=True)
def _multiply(isa, experts, layer, matrix, expert, vectors, biases, out, first, last, own_rows):
    """Multiply rows `first` to before `last` of an expert's matrix with its entries, and add the bias."""
    multiply_rows_batch(
        isa, experts.addresses[layer, matrix] + expert * experts.expert_bytes[layer, matrix],
        experts.depths[layer, matrix], experts.steps[layer, matrix, expert], vectors, out, first, last, own_rows,
    )  # fmt: skip
    for entry in range(len(out)):
        add_expert_bias(biases, expert, out[entry], first, last)


@numba.njit(cache=True)
def expert_gates_batch(isa, experts, layer, options, buffers, own_rows, thread, threads):
    """Compute a thread's share of every expert's rows of gate and up, apply the activation and quantize the result."""
    starts, groups = buffers.own_starts[thread], buffers.gate.shape[1] // GROUP_SIZE
    own = slice(groups * thread // threads, groups * (thread + 1) // threads)
    first, last = own.start * GROUP_SIZE, own.stop * GROUP_SIZE
    x, integers, offsets, scales = buffers.gated
    for expert in range(len(starts) - 1):
        entries = slice(starts[expert], starts[expert + 1])
        if entries.start == entries.stop:
            continue
        vectors, gate, up = _of_expert(buffers.hidden, entries), buffers.gate[entries], buffers.up[entries]
        gate_biases, up_biases = experts.gate_biases[layer], experts.up_biases[layer]
        _multiply(isa, experts, layer, EXPERT_GATE, expert, vectors, gate_biases, gate, first, last, own_rows)
        _multiply(isa, experts, layer, EXPERT_UP, expert, vectors, up_biases, up, first, last, own_rows)
        for entry in range(entries.start, entries.stop):
            gated = x[entry, first:last]
            swiglu(buffers.gate[entry, first:last], buffers.up[entry, first:last], options.activation, gated)
            quantize_row(gated, integers[entry, :, own], offsets[entry, :, own], scales[entry, own])


@numba.njit(cache=True)
def sum_experts_batch(isa, experts, layer, buffers, out, first, last, own_rows, thread):
    """Compute rows `first` to before `last` of each token's weighted sum of its experts' outputs, the best first."""
    starts, places = buffers.own_starts[thread], buffers.own_places[thread]
    for expert in range(len(starts) - 1):
        entries = slice(starts[expert], starts[expert + 1])
        if entries.start < entries.stop:
            vectors, results = _of_expert(buffers.gated, entries), buffers.out[entries]
            biases = experts.down_biases[layer]
            _multiply(isa, experts, layer, EXPERT_DOWN, expert, vectors, biases, results, first, last, own_rows)
    ranks = buffers.chosen.shape[1]
    for t in range(len(out)):
        for k in range(first, last):
            out[t, k] = 0.0
        for rank in range(ranks):
            entry = places[t * ranks + rank]
            add_scaled(buffers.weights[t, rank], buffers.out[entry], out[t], first, last)
