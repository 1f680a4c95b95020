"""The feed-forward of a mixture of experts for one token: a share of the rows of all its experts for each thread.

A dense feed-forward, the shared expert, may stand beside the experts; `decode` computes it in the same regions.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cpu_kernels.compilation import lazy_numba as numba
from cpu_kernels.compilation.lazy_numba import cgutils, intrinsic, types
from cpu_kernels.packed_rows.layout import GROUP_SIZE
from cpu_kernels.simd.variants import PORTABLE
from cpu_kernels.simd.vectors import I64, Vectors
from cpu_kernels.threads.read_ahead import read_ahead
from cpu_kernels.transformer.activations import VectorBuffers, quantize_row
from cpu_kernels.transformer.gemv import multiply_rows
from cpu_kernels.transformer.router import Routing, choose_experts, router_scores, sigmoid
from cpu_kernels.transformer.swiglu import swiglu

EXPERT_GATE, EXPERT_UP, EXPERT_DOWN = 0, 1, 2  # indices of an expert's matrices
# `multiply_rows` asks for memory so far ahead; the beginning of the next matrix has to be asked for by itself.
_AHEAD_BYTES = 8192
_LINE_BYTES = 64


class Experts(NamedTuple):
    """The experts of all layers. A layer's matrices of one kind are a stack: one after the other at one address."""

    routing: Routing
    dense_layers: int  # how many layers, from the first on, have a dense feed-forward instead
    routers: np.ndarray  # float32 [layers, experts, hidden]; one row more is the gate of the shared expert
    router_biases: np.ndarray  # float32 [layers, experts], or [layers, 0]
    selection_biases: np.ndarray  # float32 [layers, experts], or [layers, 0]
    addresses: np.ndarray  # int64 [layers, 3] of the stacks
    expert_bytes: np.ndarray  # int64 [layers, 3]: of one expert's matrix
    depths: np.ndarray  # int64 [layers, 3]
    steps: np.ndarray  # float32 [layers, 3, experts, 32]
    gate_biases: np.ndarray  # float32 [layers, experts, feed_forward], or [layers, 0, 0]
    up_biases: np.ndarray  # float32 [layers, experts, feed_forward], or [layers, 0, 0]
    down_biases: np.ndarray  # float32 [layers, experts, hidden], or [layers, 0, 0]
    reads_ahead: bool  # whether the chosen experts are asked for, because they may have to be read from the disk


class ExpertBuffers(NamedTuple):
    """Buffers of one token's experts: `own` arrays have one row per thread, the threads share the others."""

    scores: np.ndarray  # float32 [1, rows of the router]
    own_scores: np.ndarray  # float32 [threads, 2, experts]
    own_chosen: np.ndarray  # int64 [threads, chosen]
    own_weights: np.ndarray  # float32 [threads, chosen]
    gate: np.ndarray  # float32 [chosen, feed_forward of an expert]
    up: np.ndarray  # float32 [chosen, feed_forward of an expert]
    gated: VectorBuffers  # [chosen, feed_forward of an expert]
    own_out: np.ndarray  # float32 [threads, hidden]


@intrinsic
def _prefetch_beginning(typing_context, address):
    """Emit requests for the first bytes at an address, into the second-level cache."""

    def generate(context, builder, signature, arguments):
        vectors = Vectors(builder, PORTABLE)
        with cgutils.for_range(builder, I64(_AHEAD_BYTES // _LINE_BYTES)) as loop:
            line = builder.add(arguments[0], builder.mul(loop.index, I64(_LINE_BYTES)))
            vectors.prefetch(line, into_first_level=False)
        return context.get_dummy_value()

    return types.void(types.intp), generate


@numba.njit(cache=True)
def is_mixture(experts, layer):
    """Tell whether a layer has experts."""
    return experts.routing.chosen > 0 and layer >= experts.dense_layers


@numba.njit(cache=True)
def expert_count(experts):
    """Return how many experts a layer has."""
    return experts.steps.shape[2]


@numba.njit(cache=True)
def score_experts(isa, experts, layer, hidden, buffers, thread, threads):
    """Compute a thread's share of the router's scores of one token, float32 [hidden]."""
    router = experts.routers[layer]
    rows = len(router)
    share = rows * thread // threads, rows * (thread + 1) // threads
    router_scores(isa, router, hidden.reshape(1, -1), buffers.scores, *share)


@numba.njit(cache=True)
def route_token(experts, layer, buffers, thread, threads):
    """Choose the experts of the token whose scores are complete; every thread does it for itself."""
    scores = buffers.scores[0, : expert_count(experts)]
    biases, selection_biases = experts.router_biases[layer], experts.selection_biases[layer]
    choose_experts(
        experts.routing, scores, biases, selection_biases, buffers.own_scores[thread], buffers.own_chosen[thread],
        buffers.own_weights[thread],
    )  # fmt: skip
    if experts.reads_ahead:
        for rank in range(thread, experts.routing.chosen, threads):
            for matrix in range(3):
                address, n_bytes = experts.addresses[layer, matrix], experts.expert_bytes[layer, matrix]
                read_ahead(address + buffers.own_chosen[thread, rank] * n_bytes, n_bytes)


@numba.njit(cache=True)
def multiply_expert_rows(isa, experts, layer, matrix, expert, activations, out, first, last):
    """Compute rows `first` to before `last` of one expert's matrix times one vector; see `multiply_rows`."""
    address = experts.addresses[layer, matrix] + expert * experts.expert_bytes[layer, matrix]
    steps = experts.steps[layer, matrix, expert]
    multiply_rows(isa, address, experts.depths[layer, matrix], steps, activations, out, first, last)


@numba.njit(cache=True)
def prefetch_expert_rows(experts, layer, matrix, expert, first, rows):
    """Ask for the beginning of an expert's matrix of so many rows, from row `first` on."""
    n_bytes = experts.expert_bytes[layer, matrix]
    _prefetch_beginning(experts.addresses[layer, matrix] + expert * n_bytes + n_bytes // rows * first)


@numba.njit(cache=True)
def add_expert_bias(biases, expert, out, first, last):
    """Add an expert's bias, if there is one, to elements `first` to before `last`."""
    if len(biases) > 0:
        for k in range(first, last):
            out[k] += biases[expert, k]


@numba.njit(cache=True)
def expert_gates(isa, experts, layer, options, hidden, buffers, thread, threads):
    """Compute a thread's share of gate and up of the chosen experts, apply the activation and quantize the result."""
    chosen, columns = buffers.own_chosen[thread], buffers.gate.shape[1]
    groups = columns // GROUP_SIZE
    low, high = len(chosen) * groups * thread // threads, len(chosen) * groups * (thread + 1) // threads
    x, integers, offsets, scales = buffers.gated
    hidden_rows = buffers.own_out.shape[1]
    for rank in range(len(chosen)):
        expert, gate, up = chosen[rank], buffers.gate[rank], buffers.up[rank]
        own = slice(max(low - rank * groups, 0), min(high - rank * groups, groups))
        if own.start >= own.stop:
            continue
        first, last = own.start * GROUP_SIZE, own.stop * GROUP_SIZE
        prefetch_expert_rows(experts, layer, EXPERT_UP, expert, first, columns)
        multiply_expert_rows(isa, experts, layer, EXPERT_GATE, expert, hidden, gate, first, last)
        if (rank + 1) * groups < high:
            prefetch_expert_rows(experts, layer, EXPERT_GATE, chosen[rank + 1], 0, columns)
        else:
            own_rows = hidden_rows * thread // threads
            prefetch_expert_rows(experts, layer, EXPERT_DOWN, chosen[0], own_rows, hidden_rows)
        multiply_expert_rows(isa, experts, layer, EXPERT_UP, expert, hidden, up, first, last)
        add_expert_bias(experts.gate_biases[layer], expert, gate, first, last)
        add_expert_bias(experts.up_biases[layer], expert, up, first, last)
        swiglu(gate[first:last], up[first:last], options.activation, x[rank, first:last])
        quantize_row(x[rank, first:last], integers[rank, :, own], offsets[rank, :, own], scales[rank, own])


@numba.njit(cache=True)
def add_scaled(weight, x, out, first, last):
    """Add weight * x to `out`, elements `first` to before `last`; float32."""
    for k in range(first, last):
        out[k] += weight * x[k]


@numba.njit(cache=True)
def shared_gate(experts, scores):
    """Return the factor of the shared expert, from the scores of a token, float32 [rows of the router]."""
    if len(scores) > expert_count(experts):
        return sigmoid(scores[expert_count(experts)])
    return np.float32(1.0)


@numba.njit(cache=True)
def sum_experts(isa, experts, layer, buffers, out, first, last, thread):
    """Compute rows `first` to before `last` of the weighted sum of the chosen experts' outputs, the best first."""
    chosen, weights, own = buffers.own_chosen[thread], buffers.own_weights[thread], buffers.own_out[thread]
    x, integers, offsets, scales = buffers.gated
    for k in range(first, last):
        out[k] = 0.0
    for rank in range(len(chosen)):
        gated = x[rank], integers[rank], offsets[rank], scales[rank]
        if rank + 1 < len(chosen):
            prefetch_expert_rows(experts, layer, EXPERT_DOWN, chosen[rank + 1], first, len(out))
        multiply_expert_rows(isa, experts, layer, EXPERT_DOWN, chosen[rank], gated, own, first, last)
        add_expert_bias(experts.down_biases[layer], chosen[rank], own, first, last)
        add_scaled(weights[rank], own, out, first, last)
