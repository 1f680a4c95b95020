"""Batched decode: several tokens through all layers in one compiled function, which all threads run.

The tokens may belong to different sequences or be consecutive tokens of one. The type of the buffers says whether
activations have 16 or 8 bits. Each result is bit-identical to that of the token alone, with 16 bits also to that of
`decode`: the same functions compute it, and the matrix kernel adds in the order of `gemv`. Threads divide norms,
quantization and rotation by tokens, matrices by rows, and attention by heads and splits. Nothing is allocated.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cpu_kernels.compilation import lazy_numba as numba
from cpu_kernels.packed_rows.layout import GROUP_SIZE
from cpu_kernels.threads.barrier import wait_for_all
from cpu_kernels.transformer.activations import VectorBuffers, add_and_normalize, quantize_row
from cpu_kernels.transformer.attend_token import attend_units, merge_splits, store_key_value, units_of
from cpu_kernels.transformer.decode import DOWN, GATE, OUTPUT, QKV, UP, add_bias, row_of
from cpu_kernels.transformer.delta_net import mix_tokens, prepare_tokens
from cpu_kernels.transformer.experts import add_scaled, is_mixture, shared_gate
from cpu_kernels.transformer.experts_batch import (
    ExpertBatchBuffers,
    expert_gates_batch,
    gather_entries,
    route_tokens,
    sum_experts_batch,
)
from cpu_kernels.transformer.gemv_batch import gemv_batch, multiply_rows_batch
from cpu_kernels.transformer.head_gates import gate_heads
from cpu_kernels.transformer.layer_options import ATTENTION, SHORT_CONVOLUTION
from cpu_kernels.transformer.short_convolution import convolve_tokens
from cpu_kernels.transformer.swiglu import swiglu


class BatchBuffers(NamedTuple):
    """Buffers of the activations; arrays but `own_rows` have one row per token of the batch."""

    stream: np.ndarray  # float32 [tokens, hidden]
    residual: np.ndarray  # float32 [tokens, hidden]
    hidden: VectorBuffers  # [tokens, hidden]
    attended: VectorBuffers  # [tokens, heads * head_dim]
    qkv: np.ndarray  # float32 [tokens, rows of Q, K and V]
    projected: np.ndarray  # float32 [tokens, ...], see `decode.Buffers`; [tokens, 0] if all layers have attention
    delta_gates: np.ndarray  # float32 [tokens, 2 * value heads]; [tokens, 0] for none
    gate: np.ndarray  # float32 [tokens, feed_forward]
    up: np.ndarray  # float32 [tokens, feed_forward]
    gated: VectorBuffers  # [tokens, feed_forward]
    own_rows: np.ndarray  # float32 [threads, ...], scratch of `multiply_rows_batch`
    shared: np.ndarray  # float32 [tokens, hidden], output of the shared expert; [tokens, 0] without one
    experts: ExpertBatchBuffers


@numba.njit(cache=True)
def _add_normalize_quantize(buffers, output_norm, norm, options, thread, threads):
    """Add a layer's output to the residual stream, normalize and quantize it: a thread's share of the tokens."""
    tokens = len(buffers.stream)
    for t in range(tokens * thread // threads, tokens * (thread + 1) // threads):
        x, integers, offsets, scales = row_of(buffers.hidden, t)
        add_and_normalize(
            buffers.stream[t], buffers.residual[t], output_norm, options.residual_scale, norm, options.epsilon, x
        )
        quantize_row(x, integers, offsets, scales)


@numba.njit(cache=True)
def _attend(isa, weights, kv, scratch, buffers, options, layer, sequences, positions, counter, thread, threads):
    """Store keys and values, compute attention, merge the splits and quantize: a thread's share, with barriers."""
    bias, norm, window = weights.qkv_biases[layer], weights.query_key_norms[layer], options.windows[layer]
    tokens, kv_heads = len(sequences), kv.kv_heads
    for item in range(tokens * kv_heads * thread // threads, tokens * kv_heads * (thread + 1) // threads):
        t, kv_head = item // kv_heads, item % kv_heads
        store_key_value(
            kv, scratch, layer, buffers.qkv[t], bias, norm, options, sequences[t], positions[t], kv_head, thread
        )
    wait_for_all(counter, threads)
    total = 0
    for t in range(tokens):
        total += units_of(kv, window, positions[t])
    low, high, start = total * thread // threads, total * (thread + 1) // threads, 0
    for t in range(tokens):
        units = units_of(kv, window, positions[t])
        first, last = max(low - start, 0), min(high - start, units)
        if first < last:
            attend_units(
                isa, kv, scratch, t, layer, buffers.qkv[t], bias, norm, options, sequences[t], positions[t], first,
                last, False, thread,
            )  # fmt: skip
        start += units
    wait_for_all(counter, threads)
    head_dim = 2 * kv.cosines.shape[2]
    for t in range(tokens * thread // threads, tokens * (thread + 1) // threads):
        x, integers, offsets, scales = row_of(buffers.attended, t)
        merge_splits(isa, scratch, t, options, layer, positions[t], head_dim, x, thread)
        gate_heads(options, head_dim, buffers.qkv[t], x)
        quantize_row(x, integers, offsets, scales)
    wait_for_all(counter, threads)


@numba.njit(cache=True)
def _mix(isa, weights, kv, buffers, options, layer, sequences, positions, counter, thread, threads):
    """Compute a layer without attention, from the product with its input matrices, and quantize, with barriers."""
    out, projected = buffers.attended[0], buffers.projected
    if options.kinds[layer] == SHORT_CONVOLUTION:
        kernel = weights.convolutions[layer]
        convolve_tokens(kernel, kv, layer, projected, sequences, positions, out, thread, threads)
    else:
        hidden, gates = buffers.hidden[0], buffers.delta_gates
        prepare_tokens(isa, weights.delta, kv, layer, hidden, projected, gates, sequences, positions, thread, threads)
        wait_for_all(counter, threads)
        mix_tokens(isa, weights.delta, options, kv, layer, projected, gates, sequences, positions, out, thread, threads)
    wait_for_all(counter, threads)
    tokens = len(out)
    for t in range(tokens * thread // threads, tokens * (thread + 1) // threads):
        quantize_row(*row_of(buffers.attended, t))
    wait_for_all(counter, threads)


@numba.njit(cache=True)
def _multiply(isa, weights, layer, matrix, activations, bias, out, buffers, first, last, thread):
    """Multiply rows `first` to before `last` of one matrix with every token, and add the bias."""
    multiply_rows_batch(
        isa, weights.addresses[layer, matrix], weights.depths[layer, matrix], weights.steps[layer, matrix],
        activations, out, first, last, buffers.own_rows[thread],
    )  # fmt: skip
    for t in range(len(out)):
        add_bias(bias, out[t], first, last)


@numba.njit(cache=True)
def _gate_and_up(isa, weights, options, layer, buffers, thread, threads):
    """Compute a thread's share of gate and up, apply the activation and quantize the result, for every token."""
    columns = buffers.gate.shape[1]
    groups = columns // GROUP_SIZE
    first_group, last_group = groups * thread // threads, groups * (thread + 1) // threads
    first, last = first_group * GROUP_SIZE, last_group * GROUP_SIZE
    if thread == threads - 1:
        last = columns
    gate_bias, up_bias = weights.gate_biases[layer], weights.up_biases[layer]
    _multiply(isa, weights, layer, GATE, buffers.hidden, gate_bias, buffers.gate, buffers, first, last, thread)
    _multiply(isa, weights, layer, UP, buffers.hidden, up_bias, buffers.up, buffers, first, last, thread)
    for t in range(len(buffers.gate)):
        x, integers, offsets, scales = row_of(buffers.gated, t)
        swiglu(buffers.gate[t, first:last], buffers.up[t, first:last], options.activation, x[first:last])
        quantize_row(
            x[first:last],
            integers[:, first_group:last_group],
            offsets[:, first_group:last_group],
            scales[first_group:last_group],
        )


@numba.njit(cache=True)
def _route(isa, experts, layer, hidden, buffers, thread, threads):
    """Choose the experts of a thread's share of the tokens, whose hidden states it has computed."""
    tokens = len(buffers.chosen)
    own = slice(tokens * thread // threads, tokens * (thread + 1) // threads)
    route_tokens(
        isa, experts, layer, hidden[0][own], buffers.scores[own], buffers.own_scores[thread], buffers.chosen[own],
        buffers.weights[own],
    )  # fmt: skip


@numba.njit(cache=True)
def _feed_forward(isa, weights, options, layer, buffers, counter, thread, threads):
    """Compute a thread's share of a layer's feed-forward, of experts or dense or both; it ends with a barrier."""
    experts, own, out, own_rows = weights.experts, buffers.experts, buffers.residual, buffers.own_rows[thread]
    has_experts, is_dense = is_mixture(experts, layer), weights.rows[layer, GATE] > 0
    if has_experts:
        gather_entries(buffers.hidden, own, thread, threads)
        wait_for_all(counter, threads)
        expert_gates_batch(isa, experts, layer, options, own, own_rows, thread, threads)
    if is_dense:
        _gate_and_up(isa, weights, options, layer, buffers, thread, threads)
    wait_for_all(counter, threads)
    hidden_rows = out.shape[1]
    first, last = hidden_rows * thread // threads, hidden_rows * (thread + 1) // threads
    if has_experts:
        sum_experts_batch(isa, experts, layer, own, out, first, last, own_rows, thread)
    if is_dense:
        dense_out = buffers.shared if has_experts else out
        bias = weights.down_biases[layer]
        _multiply(isa, weights, layer, DOWN, buffers.gated, bias, dense_out, buffers, first, last, thread)
        if has_experts:
            for t in range(len(out)):
                add_scaled(shared_gate(experts, own.scores[t]), dense_out[t], out[t], first, last)
    wait_for_all(counter, threads)


@numba.njit(cache=True, nogil=True)
def decode_batch(
    isa, weights, final_norm, kv, scratch, buffers, options, sequences, positions, counter, thread, threads
):
    """Run one thread's share of a batch of generated tokens; all `threads` calls return when it is complete.

    Args:
        isa: the instruction set.
        weights: see `Weights`.
        final_norm: see `OutputHead`; its output in `buffers.hidden` is the input of the output head.
        kv, scratch: see `KeyValues` and `Scratch`; the scratch must have room for all tokens.
        buffers: see `BatchBuffers`; `stream` must be the tokens' embeddings, and `residual` zeros.
        options: see `LayerOptions`.
        sequences, positions: int64 [tokens], each token's sequence and position; its page must be allocated.
        counter: int64 [1], the barrier's counter.
        thread, threads: index of this thread, and number of threads.

    """
    hidden_rows = buffers.residual.shape[1]
    first, last = hidden_rows * thread // threads, hidden_rows * (thread + 1) // threads
    output_norm = weights.feed_forward_output_norms[0]  # no effect: before the first layer, the residual is zero
    for layer in range(len(weights.addresses)):
        _add_normalize_quantize(buffers, output_norm, weights.attention_norms[layer], options, thread, threads)
        wait_for_all(counter, threads)
        attends = options.kinds[layer] == ATTENTION
        gemv_batch(
            isa, weights.addresses[layer][QKV], weights.rows[layer][QKV], weights.depths[layer][QKV],
            weights.steps[layer][QKV], buffers.hidden, buffers.qkv if attends else buffers.projected,
            buffers.own_rows, thread, threads,
        )  # fmt: skip
        wait_for_all(counter, threads)
        if attends:
            _attend(isa, weights, kv, scratch, buffers, options, layer, sequences, positions, counter, thread, threads)
        else:
            _mix(isa, weights, kv, buffers, options, layer, sequences, positions, counter, thread, threads)
        output_bias = weights.output_biases[layer]
        _multiply(
            isa, weights, layer, OUTPUT, buffers.attended, output_bias, buffers.residual, buffers, first, last, thread
        )
        wait_for_all(counter, threads)
        _add_normalize_quantize(
            buffers, weights.attention_output_norms[layer], weights.feed_forward_norms[layer], options, thread, threads
        )
        if is_mixture(weights.experts, layer):
            _route(isa, weights.experts, layer, buffers.hidden, buffers.experts, thread, threads)
        wait_for_all(counter, threads)
        _feed_forward(isa, weights, options, layer, buffers, counter, thread, threads)
        output_norm = weights.feed_forward_output_norms[layer]
    _add_normalize_quantize(buffers, output_norm, final_norm, options, thread, threads)
