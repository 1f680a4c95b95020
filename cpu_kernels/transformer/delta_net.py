"""Gated DeltaNet: layers whose tokens see the ones before them through a state, a matrix for each head.

A token's state is that of the token before, times a decay, plus key x delta: the outer product of its key and of what
its value differs from what the decayed state has for this key, times the learning rate beta (Yang et al.,
arXiv:2412.06464). The result is the state's product with the query, normalized and gated. Before, a short convolution
with SiLU runs over queries, keys and values, and queries and keys are normalized.

A layer's part of a sequence's state, float32: the convolution's inputs at the last positions, position p in row
p % (taps - 1), [taps - 1, channels], then the matrices, [value heads, key_dim, value_dim]. Tokens are computed one
after the other, so a token's result is the same however a text is cut. Heads divide among threads.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from llvmlite import ir

from cpu_kernels.compilation import lazy_numba as numba
from cpu_kernels.compilation.lazy_numba import cgutils, intrinsic, types
from cpu_kernels.simd.float_dot import float_dot
from cpu_kernels.simd.variants import AVX512_NO_VNNI
from cpu_kernels.simd.vectors import FLOAT, I64, Vectors, vector
from cpu_kernels.threads.barrier import wait_for_all
from cpu_kernels.transformer.layer_options import DELTA_NET, SILU
from cpu_kernels.transformer.router import router_scores, sigmoid
from cpu_kernels.transformer.swiglu import multiply_sigmoid, swiglu

LANES = 16  # a value head has a multiple of so many columns
_COLUMNS = 64  # of a matrix that are computed for all tokens at once: they stay in the first-level cache
_EPSILON = np.float32(1e-6)  # of the norm of queries and keys


class DeltaNet(NamedTuple):
    """The weights of the layers with a state, in the order of `KeyValues.slots`; [0, ...] for none.

    Value head h has the query and the key of head h % key_heads.
    """

    key_heads: int
    kernels: np.ndarray  # float32 [layers, taps, channels]; row n is multiplied with the inputs n positions before
    gates: np.ndarray  # float32 [layers, 2 * value heads, hidden]: rows of beta, then of the decay
    decays: np.ndarray  # float32 [layers, value heads]: the logarithm of the decay is this times the softplus of a gate
    biases: np.ndarray  # float32 [layers, value heads], which are added to that gate before
    norms: np.ndarray  # float32 [layers, value_dim]


@numba.njit(cache=True)
def _sizes(delta):
    """Return channels of queries (or keys), their head's length, value heads, and a value head's length."""
    value_heads, value_dim = delta.decays.shape[1], delta.norms.shape[1]
    keys = (delta.kernels.shape[2] - value_heads * value_dim) // 2
    return keys, keys // delta.key_heads, value_heads, value_dim


@numba.njit(cache=True)
def _convolve(kernel, inputs, row, position, first, last):
    """Convolve channels `first` to before `last` of a token in place, and keep their inputs; see `prepare_tokens`."""
    channels, rows = kernel.shape[1], len(kernel) - 1
    oldest = inputs[position % rows * channels :]
    for k in range(first, last):
        value = row[k]
        row[k] = kernel[0, k] * value + kernel[rows, k] * oldest[k]
        oldest[k] = value
    for tap in range(1, rows):
        before = inputs[(position - tap) % rows * channels :]
        for k in range(first, last):
            row[k] += kernel[tap, k] * before[k]
    part = row[first:last]
    multiply_sigmoid(part, part, part)


@numba.njit(cache=True)
def _channel(delta, head):
    """Return the first channel of a head of queries, keys or values, counted in this order."""
    _, key_dim, _, value_dim = _sizes(delta)
    before = min(head, 2 * delta.key_heads)
    return before * key_dim + (head - before) * value_dim


@numba.njit(cache=True)
def _prepare_head(isa, delta, layer, state, row, position, head):
    """Convolve one head, counted as in `_channel`, and normalize a query or a key."""
    keys, key_dim, _, _ = _sizes(delta)
    first, last = _channel(delta, head), _channel(delta, head + 1)
    _convolve(delta.kernels[layer], state, row, position, first, last)
    if last <= 2 * keys:
        part = row[first:last]
        factor = np.float32(1.0) / np.sqrt(float_dot(isa, part, part) + _EPSILON)
        if last <= keys:
            factor /= np.sqrt(np.float32(key_dim))
        for k in range(first, last):
            row[k] *= factor


@numba.njit(cache=True)
def _copy_marked(kv, layer, sequence, position, start, rows, stride, columns):
    """Copy some columns of a part of a state, which begin at `start`, if the state is wanted after this position."""
    state = kv.states[kv.state_of[sequence], layer]
    for mark in range(kv.marks.shape[1]):
        if kv.marks[sequence, mark] == position + 1:
            copy = kv.states[kv.mark_states[sequence, mark], layer]
            for row in range(rows):
                for k in range(start + row * stride, start + row * stride + columns):
                    copy[k] = state[k]


@numba.njit(cache=True, nogil=True)
def prepare_tokens(isa, delta, kv, layer, hidden, projected, gates, sequences, positions, thread, threads):
    """Compute what the states are changed by: a thread's share of the heads of some tokens.

    Args:
        isa: the instruction set.
        delta, kv: see `DeltaNet` and `KeyValues`.
        layer: index of the layer in the model.
        hidden: float32 [tokens, hidden], the layer's input.
        projected: float32 [tokens, channels + value heads * value_dim], the product with the layer's input matrices:
            queries, keys and values, which are convolved and normalized in place, then output gates.
        gates: float32 [tokens, 2 * value heads], out: beta and decay of every head.
        sequences, positions: int64 [tokens]; the tokens of a sequence come in the order of their positions.
        thread, threads: which of how many shares to compute.

    """
    place = kv.slots[layer]
    value_heads, channels, kept = delta.decays.shape[1], delta.kernels.shape[2], delta.kernels.shape[1] - 1
    heads = 2 * delta.key_heads + value_heads
    low, high = heads * thread // threads, heads * (thread + 1) // threads
    first, last = _channel(delta, low), _channel(delta, high)
    for t in range(len(projected)):
        state = kv.states[kv.state_of[sequences[t]], place]
        for head in range(low, high):
            _prepare_head(isa, delta, place, state, projected[t], positions[t], head)
        _copy_marked(kv, place, sequences[t], positions[t], first, kept, channels, last - first)
    low, high = 2 * value_heads * thread // threads, 2 * value_heads * (thread + 1) // threads
    router_scores(isa, delta.gates[place], hidden, gates, low, high)
    for t in range(len(gates)):
        for row in range(low, high):
            if row < value_heads:
                gates[t, row] = sigmoid(gates[t, row])
            else:
                x = gates[t, row] + delta.biases[place, row - value_heads]
                softplus = x if x > 20 else np.log1p(np.exp(x))
                gates[t, row] = np.exp(delta.decays[place, row - value_heads] * softplus)


@intrinsic
def _update(typing_context, isa, matrix, stride, query, key, value, rows, groups, decay, beta):
    """Emit a token's change of some columns of a matrix, and its product with the query.

    matrix: address of float32 [rows, 16 * groups], `stride` bytes from row to row; query, key: addresses of float32
    [rows]; value: address of float32 [16 * groups], which the product replaces.
    """

    def generate(context, builder, signature, arguments):
        vectors = Vectors(builder, isa.count)
        at_once = 4 if isa.count >= AVX512_NO_VNNI else 2
        matrix, stride, query, key, value, rows, groups, decay, beta = arguments[1:]
        whole = builder.and_(groups, I64(-at_once))
        for count, start, end in ((at_once, I64(0), whole), (1, whole, groups)):
            with cgutils.for_range_slice(builder, start, end, I64(count), I64) as (group, _):
                offset = builder.shl(group, I64(6))
                columns = builder.add(matrix, offset), stride, rows
                _emit_update(builder, vectors, count, columns, query, key, builder.add(value, offset), decay, beta)
        return context.get_dummy_value()

    return types.void(isa, *[types.intp] * 7, types.float32, types.float32), generate


def _emit_update(
    builder: ir.IRBuilder, vectors: Vectors, count: int, columns: tuple[ir.Value, ir.Value, ir.Value], query: ir.Value,
    key: ir.Value, value: ir.Value, decay: ir.Value, beta: ir.Value,
) -> None:  # fmt: skip
    """Emit `_update` of `count` groups of columns, given by address, stride and rows."""
    matrix, stride, rows = columns
    kind = vector(FLOAT, LANES)
    sums = [cgutils.alloca_once(builder, kind) for _ in range(count)]
    zero, decays, betas = vectors.constant(FLOAT, 0.0, LANES), vectors.fill(decay, LANES), vectors.fill(beta, LANES)
    for place in sums:
        builder.store(zero, place)
    with cgutils.for_range(builder, rows) as loop:
        address = builder.add(matrix, builder.mul(loop.index, stride))
        own = vectors.splat(builder.add(key, builder.shl(loop.index, I64(2))), FLOAT, LANES)
        for number, place in enumerate(sums):
            state = vectors.load(address, FLOAT, LANES, 64 * number)
            builder.store(vectors.fma(state, own, builder.load(place)), place)
    deltas = []
    for number, place in enumerate(sums):
        known = builder.fmul(decays, builder.load(place))
        own = vectors.load(value, FLOAT, LANES, 64 * number)
        deltas.append(builder.fmul(betas, builder.fsub(own, known)))
        builder.store(zero, place)
    with cgutils.for_range(builder, rows) as loop:
        address = builder.add(matrix, builder.mul(loop.index, stride))
        place_of_row = builder.shl(loop.index, I64(2))
        keys, queries = (vectors.splat(builder.add(start, place_of_row), FLOAT, LANES) for start in (key, query))
        for number, (place, delta) in enumerate(zip(sums, deltas, strict=True)):
            state = vectors.load(address, FLOAT, LANES, 64 * number)
            state = vectors.fma(keys, delta, builder.fmul(state, decays))
            vectors.store(state, address, 64 * number)
            builder.store(vectors.fma(state, queries, builder.load(place)), place)
    for number, place in enumerate(sums):
        vectors.store(builder.load(place), value, 64 * number)


@numba.njit(cache=True)
def _mix_head(isa, delta, kv, layer, projected, gates, sequences, positions, head):
    """Change the matrix of one head by all tokens, and put the products with their queries in place of the values."""
    keys, key_dim, value_heads, value_dim = _sizes(delta)
    channels, taps = delta.kernels.shape[2], delta.kernels.shape[1]
    query = head % delta.key_heads * key_dim
    matrix = (taps - 1) * channels + head * key_dim * value_dim
    for column in range(0, value_dim, _COLUMNS):
        columns = min(_COLUMNS, value_dim - column)
        value, start = 2 * keys + head * value_dim + column, matrix + column
        for t in range(len(projected)):
            row, state = projected[t], kv.states[kv.state_of[sequences[t]], layer]
            _update(
                isa, state[start:].ctypes.data, 4 * value_dim, row[query:].ctypes.data, row[keys + query :].ctypes.data,
                row[value:].ctypes.data, key_dim, columns // LANES, gates[t, value_heads + head], gates[t, head],
            )  # fmt: skip
            _copy_marked(kv, layer, sequences[t], positions[t], start, key_dim, value_dim, columns)


@numba.njit(cache=True, nogil=True)
def mix_tokens(isa, delta, options, kv, layer, projected, gates, sequences, positions, out, thread, threads):
    """Change the states by some tokens and compute the tokens' results: a thread's share of the heads.

    Args:
        isa, delta, kv, layer, sequences, positions, thread, threads: as in `prepare_tokens`.
        options: see `LayerOptions`.
        projected, gates: what `prepare_tokens` gives; queries, keys and values are overwritten.
        out: float32 [tokens, value heads * value_dim], out; it may be where the values are in `projected`.

    """
    place = kv.slots[layer]
    keys, _, value_heads, value_dim = _sizes(delta)
    norm = delta.norms[place]
    for head in range(value_heads * thread // threads, value_heads * (thread + 1) // threads):
        _mix_head(isa, delta, kv, place, projected, gates, sequences, positions, head)
        for t in range(len(projected)):
            first = 2 * keys + head * value_dim
            mixed = projected[t, first : first + value_dim]
            first += value_heads * value_dim
            mean = float_dot(isa, mixed, mixed) / np.float32(value_dim)
            factor = np.float32(1.0) / np.sqrt(mean + options.epsilon)
            for k in range(value_dim):
                mixed[k] *= factor * norm[k]
            own = out[t, head * value_dim : (head + 1) * value_dim]
            swiglu(projected[t, first : first + value_dim], mixed, SILU, own)


@numba.njit(cache=True)
def mix_one(
    isa, delta, options, kv, layer, hidden, projected, gates, place, sequence, position, out, counter, thread, threads
):
    """Compute the result of a single token, with two barriers.

    Args:
        isa, delta, options, kv, layer, thread, threads: as in `mix_tokens`.
        hidden: float32 [hidden].
        projected: float32 [channels + value heads * value_dim].
        gates: float32 [2 * value heads], scratch.
        place: int64 [2], scratch of this thread.
        sequence, position: the token's sequence and position.
        out: float32 [value heads * value_dim], of this thread: every thread gets all of it.
        counter: int64 [1], the barrier's counter.

    """
    place[0], place[1] = sequence, position
    sequences, positions = place[:1], place[1:]
    rows, gate_rows = projected.reshape(1, -1), gates.reshape(1, -1)
    prepare_tokens(isa, delta, kv, layer, hidden.reshape(1, -1), rows, gate_rows, sequences, positions, thread, threads)
    wait_for_all(counter, threads)
    first = 2 * _sizes(delta)[0]
    mixed = projected[first : first + len(out)]
    mix_tokens(
        isa, delta, options, kv, layer, rows, gate_rows, sequences, positions, mixed.reshape(1, -1), thread, threads
    )
    wait_for_all(counter, threads)
    for k in range(len(out)):
        out[k] = mixed[k]


@numba.njit(cache=True, nogil=True)
def mix_layers(isa, delta, options, kv, hidden, projected, gates, places, position, out, counter, thread, threads):
    """Compute one token of sequence 0 in all layers with a state, without the big matrices, as decode does.

    `bench` measures their share of decode with it.

    Args:
        isa, delta, options, kv, counter, thread, threads: as in `mix_one`.
        hidden, projected, gates, position: as in `mix_one`, the same in every layer; `projected` is overwritten.
        places: int64 [threads, 2], scratch.
        out: float32 [threads, value heads * value_dim]: every thread's copy of the last layer's result.

    """
    for layer in range(len(options.kinds)):
        if options.kinds[layer] == DELTA_NET:
            mix_one(
                isa, delta, options, kv, layer, hidden, projected, gates, places[thread], 0, position, out[thread],
                counter, thread, threads,
            )  # fmt: skip
