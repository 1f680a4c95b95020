"""Decode of one token: all layers in one compiled function, which all threads run.

Each thread computes its share of every matrix's rows. Cheap operations (norms, quantization of the input) are repeated
by every thread, so that a layer needs five barriers and no launch, and one more for a router. Nothing is allocated.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cpu_kernels.compilation import lazy_numba as numba
from cpu_kernels.packed_rows.layout import GROUP_SIZE
from cpu_kernels.threads.barrier import wait_for_all
from cpu_kernels.transformer.activations import VectorBuffers, add_and_normalize, quantize_row
from cpu_kernels.transformer.attend_token import attend_token, merge_splits
from cpu_kernels.transformer.delta_net import DeltaNet, mix_one
from cpu_kernels.transformer.experts import (
    ExpertBuffers,
    Experts,
    add_scaled,
    expert_gates,
    is_mixture,
    route_token,
    score_experts,
    shared_gate,
    sum_experts,
)
from cpu_kernels.transformer.gemv import gemv, multiply_rows
from cpu_kernels.transformer.head_gates import gate_heads
from cpu_kernels.transformer.layer_options import DELTA_NET, SHORT_CONVOLUTION
from cpu_kernels.transformer.short_convolution import convolve_token, store_inputs
from cpu_kernels.transformer.swiglu import swiglu

# Indices of a layer's matrices; gate, up and down are those of the shared expert if there are experts. Q, K and V of a
# layer with a short convolution are the parts of its input matrix; of one with a state, queries and keys together,
# values, and the output's gates.
QKV, OUTPUT, GATE, UP, DOWN = slice(0, 3), 3, 4, 5, 6


class Weights(NamedTuple):
    """The weights of all layers; matrices are given by address. A vector that the model lacks has length 0."""

    addresses: np.ndarray  # int64 [layers, 7]
    rows: np.ndarray  # int64 [layers, 7]
    depths: np.ndarray  # int64 [layers, 7]
    steps: np.ndarray  # float32 [layers, 7, 32]
    attention_norms: np.ndarray  # float32 [layers, hidden], of the attention's input; twice as long for LayerNorms
    query_key_norms: np.ndarray  # float32 [layers, rows of Q and K]
    attention_output_norms: np.ndarray  # float32 [layers, hidden]
    feed_forward_norms: np.ndarray  # float32 [layers, hidden], of the feed-forward's input; see `attention_norms`
    feed_forward_output_norms: np.ndarray  # float32 [layers, hidden]
    qkv_biases: np.ndarray  # float32 [layers, rows of Q, K and V], zeros if there are none
    output_biases: np.ndarray  # float32 [layers, hidden]
    gate_biases: np.ndarray  # float32 [layers, feed_forward]
    up_biases: np.ndarray  # float32 [layers, feed_forward]
    down_biases: np.ndarray  # float32 [layers, hidden]
    convolutions: np.ndarray  # float32 [layers, taps, hidden], or [layers, 0, 0]; see `convolve_token`
    delta: DeltaNet
    experts: Experts


class OutputHead(NamedTuple):
    """The final norm and the output matrix (LM head)."""

    norm: np.ndarray  # float32 [hidden]; twice as long for a LayerNorm, see `add_and_normalize`
    addresses: np.ndarray  # int64 [1]
    rows: np.ndarray  # int64 [1]
    depths: np.ndarray  # int64 [1]
    steps: np.ndarray  # float32 [1, 32]


class Buffers(NamedTuple):
    """Buffers of the activations: `own` arrays have one row per thread, the threads share the others."""

    own_stream: np.ndarray  # float32 [threads, hidden]
    own_hidden: VectorBuffers  # [threads, hidden]
    own_attended: VectorBuffers  # [threads, heads * head_dim]
    qkv: np.ndarray  # float32 [rows of Q, K and V]
    projected: np.ndarray  # float32, output of the input matrices of a layer without attention; [0] without one
    delta_gates: np.ndarray  # float32 [2 * value heads], see `mix_one`; [0] for none
    own_places: np.ndarray  # int64 [threads, 2], see `mix_one`
    residual: np.ndarray  # float32 [hidden]
    gate: np.ndarray  # float32 [feed_forward]
    up: np.ndarray  # float32 [feed_forward]
    gated: VectorBuffers  # [1, feed_forward]
    experts: ExpertBuffers


@numba.njit(cache=True)
def row_of(vectors, index):
    """Return the arrays of one vector of several, see `VectorBuffers`."""
    x, integers, offsets, scales = vectors
    return x[index], integers[index], offsets[index], scales[index]


@numba.njit(cache=True)
def add_bias(bias, out, first, last):
    """Add a bias, if there is one, to elements `first` to before `last`."""
    if len(bias) > 0:
        for k in range(first, last):
            out[k] += bias[k]


@numba.njit(cache=True)
def _attention(
    isa, weights, kv, scratch, buffers, options, layer, hidden, attended, sequence, position, counter, thread, threads
):
    """Compute this thread's share of a layer's attention, including its matrices; it ends with a barrier."""
    addresses, depths, steps = weights.addresses[layer], weights.depths[layer], weights.steps[layer]
    gemv(isa, addresses[QKV], weights.rows[layer][QKV], depths[QKV], steps[QKV], hidden, buffers.qkv, thread, threads)
    wait_for_all(counter, threads)
    attend_token(
        isa, kv, scratch, layer, buffers.qkv, weights.qkv_biases[layer], weights.query_key_norms[layer], options,
        sequence, position, thread, threads,
    )  # fmt: skip
    wait_for_all(counter, threads)
    head_dim = 2 * kv.cosines.shape[2]
    merge_splits(isa, scratch, 0, options, layer, position, head_dim, attended[0], thread)
    gate_heads(options, head_dim, buffers.qkv, attended[0])
    _output(isa, weights, buffers, layer, attended, counter, thread, threads)


@numba.njit(cache=True)
def _convolution(isa, weights, kv, buffers, layer, hidden, attended, sequence, position, counter, thread, threads):
    """Compute this thread's share of a short convolution, including its matrices; it ends with a barrier."""
    addresses, depths, steps = weights.addresses[layer], weights.depths[layer], weights.steps[layer]
    projected, out = buffers.projected, attended[0]
    gemv(isa, addresses[QKV], weights.rows[layer][QKV], depths[QKV], steps[QKV], hidden, projected, thread, threads)
    wait_for_all(counter, threads)
    convolve_token(weights.convolutions[layer], kv, layer, projected, sequence, position, out, 0, len(out))
    share = len(out) * thread // threads, len(out) * (thread + 1) // threads
    store_inputs(kv, layer, projected, sequence, position, *share)
    _output(isa, weights, buffers, layer, attended, counter, thread, threads)


@numba.njit(cache=True)
def _delta_net(
    isa, weights, kv, buffers, options, layer, hidden, attended, sequence, position, counter, thread, threads
):
    """Compute this thread's share of a layer with a state, including its matrices; it ends with a barrier."""
    addresses, depths, steps = weights.addresses[layer], weights.depths[layer], weights.steps[layer]
    projected = buffers.projected
    gemv(isa, addresses[QKV], weights.rows[layer][QKV], depths[QKV], steps[QKV], hidden, projected, thread, threads)
    wait_for_all(counter, threads)
    mix_one(
        isa, weights.delta, options, kv, layer, hidden[0], projected, buffers.delta_gates, buffers.own_places[thread],
        sequence, position, attended[0], counter, thread, threads,
    )  # fmt: skip
    _output(isa, weights, buffers, layer, attended, counter, thread, threads)


@numba.njit(cache=True)
def _output(isa, weights, buffers, layer, attended, counter, thread, threads):
    """Compute this thread's share of the output matrix; it ends with a barrier."""
    addresses, depths, steps = weights.addresses[layer], weights.depths[layer], weights.steps[layer]
    quantize_row(*attended)
    out = buffers.residual
    first, last = len(out) * thread // threads, len(out) * (thread + 1) // threads
    multiply_rows(isa, addresses[OUTPUT], depths[OUTPUT], steps[OUTPUT], attended, out, first, last)
    add_bias(weights.output_biases[layer], out, first, last)
    wait_for_all(counter, threads)


@numba.njit(cache=True)
def _gate_and_up(isa, weights, options, layer, hidden, buffers, thread, threads):
    """Compute this thread's share of gate and up, apply the activation and quantize the result."""
    columns = len(buffers.gate)
    groups = columns // GROUP_SIZE
    first_group, last_group = groups * thread // threads, groups * (thread + 1) // threads
    first, last = first_group * GROUP_SIZE, last_group * GROUP_SIZE
    if thread == threads - 1:
        last = columns
    addresses, depths, steps = weights.addresses[layer], weights.depths[layer], weights.steps[layer]
    multiply_rows(isa, addresses[GATE], depths[GATE], steps[GATE], hidden, buffers.gate, first, last)
    multiply_rows(isa, addresses[UP], depths[UP], steps[UP], hidden, buffers.up, first, last)
    add_bias(weights.gate_biases[layer], buffers.gate, first, last)
    add_bias(weights.up_biases[layer], buffers.up, first, last)
    x, pairs, offsets, scales = row_of(buffers.gated, 0)
    swiglu(buffers.gate[first:last], buffers.up[first:last], options.activation, x[first:last])
    quantize_row(
        x[first:last],
        pairs[:, first_group:last_group],
        offsets[:, first_group:last_group],
        scales[first_group:last_group],
    )


@numba.njit(cache=True)
def _down(isa, weights, layer, buffers, out, first, last):
    """Compute rows `first` to before `last` of the dense feed-forward's output."""
    addresses, depths, steps = weights.addresses[layer], weights.depths[layer], weights.steps[layer]
    multiply_rows(isa, addresses[DOWN], depths[DOWN], steps[DOWN], row_of(buffers.gated, 0), out, first, last)
    add_bias(weights.down_biases[layer], out, first, last)


@numba.njit(cache=True)
def _feed_forward(isa, weights, options, layer, hidden, buffers, counter, thread, threads):
    """Compute this thread's share of a layer's feed-forward, of experts or dense or both; it ends with a barrier."""
    experts, own, out = weights.experts, buffers.experts, buffers.residual
    has_experts, is_dense = is_mixture(experts, layer), weights.rows[layer, GATE] > 0
    if has_experts:
        score_experts(isa, experts, layer, hidden[0], own, thread, threads)
        wait_for_all(counter, threads)
        route_token(experts, layer, own, thread, threads)
        expert_gates(isa, experts, layer, options, hidden, own, thread, threads)
    if is_dense:
        _gate_and_up(isa, weights, options, layer, hidden, buffers, thread, threads)
    wait_for_all(counter, threads)
    first, last = len(out) * thread // threads, len(out) * (thread + 1) // threads
    if has_experts:
        sum_experts(isa, experts, layer, own, out, first, last, thread)
    if is_dense:
        dense_out = own.own_out[thread] if has_experts else out
        _down(isa, weights, layer, buffers, dense_out, first, last)
        if has_experts:
            add_scaled(shared_gate(experts, own.scores[0]), dense_out, out, first, last)
    wait_for_all(counter, threads)


@numba.njit(cache=True, nogil=True)
def decode(isa, weights, head, kv, scratch, buffers, options, sequence, position, logits, counter, thread, threads):
    """Run one thread's share of one token; all `threads` calls return when the logits are complete.

    Args:
        isa: the instruction set.
        weights, head, buffers: see their classes. Every row of `own_stream` must be the token's embedding, and
            `residual` zeros.
        kv, scratch: see `KeyValues` and `Scratch`.
        options: see `LayerOptions`.
        sequence, position: the token's sequence and position; its page must be allocated.
        logits: float32 [vocabulary], out.
        counter: int64 [1], the barrier's counter.
        thread, threads: index of this thread, and number of threads.

    """
    stream = buffers.own_stream[thread]
    hidden = row_of(buffers.own_hidden, thread)
    attended = row_of(buffers.own_attended, thread)
    output_norm = weights.feed_forward_output_norms[0]  # no effect: before the first layer, the residual is zero
    for layer in range(len(weights.addresses)):
        add_and_normalize(
            stream, buffers.residual, output_norm, options.residual_scale, weights.attention_norms[layer],
            options.epsilon, hidden[0],
        )  # fmt: skip
        quantize_row(*hidden)
        if options.kinds[layer] == SHORT_CONVOLUTION:
            _convolution(
                isa, weights, kv, buffers, layer, hidden, attended, sequence, position, counter, thread, threads
            )
        elif options.kinds[layer] == DELTA_NET:
            _delta_net(
                isa, weights, kv, buffers, options, layer, hidden, attended, sequence, position, counter, thread,
                threads,
            )  # fmt: skip
        else:
            _attention(
                isa, weights, kv, scratch, buffers, options, layer, hidden, attended, sequence, position, counter,
                thread, threads,
            )  # fmt: skip
        output_norm = weights.attention_output_norms[layer]
        add_and_normalize(
            stream, buffers.residual, output_norm, options.residual_scale, weights.feed_forward_norms[layer],
            options.epsilon, hidden[0],
        )  # fmt: skip
        quantize_row(*hidden)
        _feed_forward(isa, weights, options, layer, hidden, buffers, counter, thread, threads)
        output_norm = weights.feed_forward_output_norms[layer]
    add_and_normalize(
        stream, buffers.residual, output_norm, options.residual_scale, head.norm, options.epsilon, hidden[0]
    )
    quantize_row(*hidden)
    gemv(isa, head.addresses, head.rows, head.depths, head.steps, hidden, logits, thread, threads)
    wait_for_all(counter, threads)
