"""Gated DeltaNet beside plain NumPy: in chunks, several sequences at once, on any number of threads, from copies."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inner_kernels import as_kernel
from paged_layers import NO_STATES

from cpu_kernels.threads.thread_pool import ThreadPool
from cpu_kernels.transformer.delta_net import DeltaNet, mix_layers, mix_tokens, prepare_tokens
from cpu_kernels.transformer.head_gates import gate_heads, head_start
from cpu_kernels.transformer.kv_pages import KeyValues
from cpu_kernels.transformer.layer_options import ATTENTION, DELTA_NET, SILU, LayerOptions
from tritgguf.runtime.state_pool import StatePool

KEY_HEADS, VALUE_HEADS, KEY_DIM, VALUE_DIM = 2, 6, 32, 80  # 64 columns of a head at once, and 16 more
KEYS, VALUES, HIDDEN, TAPS, LAYERS, LAYER = KEY_HEADS * KEY_DIM, VALUE_HEADS * VALUE_DIM, 40, 4, 3, 2
CHANNELS, TOKENS, EPSILON = 2 * KEYS + VALUES, 30, 1e-5
NUMBERS = (TAPS - 1) * CHANNELS + VALUE_HEADS * KEY_DIM * VALUE_DIM
OPTIONS = LayerOptions(
    epsilon=np.float32(EPSILON),
    residual_scale=np.float32(1),
    activation=SILU,
    interleaved=False,
    rotated_pairs=4,
    gates_heads=True,
    attention_scale=np.float32(1),
    softcap=np.float32(0),
    normalizes_together=False,
    kinds=np.array([DELTA_NET, ATTENTION, DELTA_NET]),
    windows=np.zeros(3, np.int64),
    rotations=np.zeros(3, np.int64),
    sinks=np.zeros((3, 0), np.float32),
)


class Inputs(NamedTuple):
    """A sequence's inputs of a layer: float32 [tokens, ...]."""

    hidden: np.ndarray
    projected: np.ndarray

    def of(self, first: int, last: int = TOKENS) -> Inputs:
        """Return those of some tokens."""
        return Inputs(self.hidden[first:last], self.projected[first:last])


def random_weights() -> DeltaNet:
    """Return two layers' weights; the layer that is tested is the second one."""
    generator = np.random.default_rng(1)

    def random(*shape: int) -> np.ndarray:
        return generator.standard_normal((2, *shape)).astype(np.float32)

    return DeltaNet(
        key_heads=KEY_HEADS,
        kernels=random(TAPS, CHANNELS) / 2,
        gates=random(2 * VALUE_HEADS, HIDDEN) / np.float32(HIDDEN**0.5),
        decays=-np.exp(random(VALUE_HEADS)),
        biases=random(VALUE_HEADS),
        norms=1 + random(VALUE_DIM) / 5,
    )


WEIGHTS = random_weights()


def random_inputs(seed: int = 0) -> Inputs:
    generator = np.random.default_rng(seed)
    shapes = (TOKENS, HIDDEN), (TOKENS, CHANNELS + VALUES)
    return Inputs(*(generator.standard_normal(shape).astype(np.float32) for shape in shapes))


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def expected(inputs: Inputs) -> np.ndarray:
    """Return a sequence's outputs: float64 [tokens, values]."""
    delta = DeltaNet(KEY_HEADS, *(array[1].astype(np.float64) for array in WEIGHTS[1:]))
    raw, output_gates = np.split(inputs.projected.astype(np.float64), [CHANNELS], axis=1)
    padded = np.concatenate([np.zeros((TAPS - 1, CHANNELS)), raw])
    windows = np.lib.stride_tricks.sliding_window_view(padded, TAPS, axis=0)
    mixed = silu(np.einsum("twk,kw->tw", windows, delta.kernels[::-1]))
    queries, keys, values = np.split(mixed, [KEYS, 2 * KEYS], axis=1)
    beta, gate = np.split(inputs.hidden.astype(np.float64) @ delta.gates.T, 2, axis=1)
    beta, decay = 1 / (1 + np.exp(-beta)), np.exp(delta.decays * np.log1p(np.exp(gate + delta.biases)))
    states, out = np.zeros((VALUE_HEADS, KEY_DIM, VALUE_DIM)), np.empty((TOKENS, VALUE_HEADS, VALUE_DIM))
    for t in range(TOKENS):
        for head in range(VALUE_HEADS):
            place = slice(head % KEY_HEADS * KEY_DIM, (head % KEY_HEADS + 1) * KEY_DIM)
            query, key = (vector[t, place] / np.sqrt(vector[t, place] @ vector[t, place] + 1e-6)
                          for vector in (queries, keys))  # fmt: skip
            own = slice(head * VALUE_DIM, (head + 1) * VALUE_DIM)
            states[head] *= decay[t, head]
            states[head] += np.outer(key, beta[t, head] * (values[t, own] - key @ states[head]))
            result = query @ states[head] / np.sqrt(KEY_DIM)
            result *= delta.norms / np.sqrt((result @ result) / VALUE_DIM + EPSILON)
            out[t, head] = result * silu(output_gates[t, own])
    return out.reshape(TOKENS, VALUES)


def key_values(states: StatePool) -> KeyValues:
    table, turns = np.zeros((1, 1), np.int64), np.ones((1, 1, 1), np.float32)
    slots = np.array([0, 0, 1])
    arrays = (states.numbers, states.of_sequences, states.marks, states.mark_states)
    return KeyValues(table, np.zeros(1, np.uint16), 1, 1, 32, turns, turns, slots, 0, 0, *arrays)


def new_states(sequences: int = 1, copies: int = 2) -> StatePool:
    states = StatePool((2, NUMBERS), sequences, copies)
    for sequence in range(sequences):
        states.start(sequence)
    return states


def run(thread_pool: ThreadPool, kv: KeyValues, inputs: Inputs, places: np.ndarray) -> np.ndarray:
    """Run some tokens; places: int64 [2, tokens], their sequences and positions."""
    hidden, projected = inputs.hidden, inputs.projected.copy()
    gates, out = np.empty((len(hidden), 2 * VALUE_HEADS), np.float32), np.empty((len(hidden), VALUES), np.float32)
    isa = thread_pool.isa
    thread_pool.run(prepare_tokens, isa, WEIGHTS, kv, LAYER, hidden, projected, gates, *places)
    thread_pool.run(mix_tokens, isa, WEIGHTS, OPTIONS, kv, LAYER, projected, gates, *places, out)
    return out


def places_of(first: int, last: int, sequence: int = 0) -> np.ndarray:
    return np.stack([np.full(last - first, sequence), np.arange(first, last)])


@pytest.mark.parametrize(("chunk", "threads"), [(1, 1), (7, 2), (TOKENS, 3), (TOKENS, 8)])
def test_a_sequence_in_chunks(chunk: int, threads: int) -> None:
    inputs, kv, thread_pool = random_inputs(), key_values(new_states()), ThreadPool(threads)
    parts = [
        run(thread_pool, kv, inputs.of(first, last), places_of(first, last))
        for first, last in ((first, min(first + chunk, TOKENS)) for first in range(0, TOKENS, chunk))
    ]
    wanted = expected(inputs)
    assert np.abs(np.concatenate(parts) - wanted).max() < 1e-5 * np.abs(wanted).max()
    assert not kv.states[:, 0].any()  # the other layer's


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), threads=st.integers(1, 3))
def test_sequences_beside_one_another_have_the_bits_of_one_alone(seed: int, threads: int) -> None:
    generator = np.random.default_rng(seed)
    inputs, thread_pool = [random_inputs(seed) for seed in range(3)], ThreadPool(threads)
    alone = [run(ThreadPool(1), key_values(new_states()), one, places_of(0, TOKENS)) for one in inputs]
    kv, done = key_values(new_states(3)), [0, 0, 0]
    while min(done) < TOKENS:
        counts = [min(int(generator.integers(0, 13)), TOKENS - count) for count in done]
        if not any(counts):
            continue
        places = [places_of(first, first + count, k) for k, (first, count) in enumerate(zip(done, counts, strict=True))]
        rows = [one.of(first, first + count) for one, first, count in zip(inputs, done, counts, strict=True)]
        together = Inputs(*(np.concatenate(arrays) for arrays in zip(*rows, strict=True)))
        found = run(thread_pool, kv, together, np.concatenate(places, axis=1))
        wanted = [one[place[1]] for one, place in zip(alone, places, strict=True)]
        np.testing.assert_array_equal(found, np.concatenate(wanted))
        done = [first + count for first, count in zip(done, counts, strict=True)]


@pytest.mark.parametrize("marks", [(1,), (13, 20), (TOKENS,)])
def test_a_sequence_goes_on_from_a_copy(marks: tuple[int, ...]) -> None:
    inputs, states, thread_pool = random_inputs(), new_states(2), ThreadPool(2)
    kv = key_values(states)
    copies = [states.mark(0, mark) for mark in marks]
    whole = run(thread_pool, kv, inputs, places_of(0, TOKENS))
    for mark, copy in zip(marks, copies, strict=True):
        states.end(1)
        states.start(1, copy)
        if mark < TOKENS:
            rest = run(thread_pool, kv, inputs.of(mark), places_of(mark, TOKENS, 1))
            np.testing.assert_array_equal(rest, whole[mark:])
        np.testing.assert_array_equal(kv.states[kv.state_of[1], 1], kv.states[kv.state_of[0], 1])


@pytest.mark.parametrize("threads", [1, 2])
def test_one_token_in_all_layers(threads: int) -> None:
    """What `bench` measures has the bits of the last layer's token."""
    inputs, kv, thread_pool = random_inputs(), key_values(new_states()), ThreadPool(threads)
    expected_out = run(ThreadPool(1), key_values(new_states()), inputs.of(0, 1), places_of(0, 1))
    hidden, projected = inputs.hidden[0].copy(), inputs.projected[0].copy()
    gates, out = np.empty(2 * VALUE_HEADS, np.float32), np.empty((threads, VALUES), np.float32)
    only_last = OPTIONS._replace(kinds=np.array([ATTENTION, ATTENTION, DELTA_NET]))
    thread_pool.run(
        mix_layers, thread_pool.isa, WEIGHTS, only_last, kv, hidden, projected, gates,
        np.zeros((threads, 2), np.int64), 0, out, np.zeros(1, np.int64),
    )  # fmt: skip
    for row in out:
        np.testing.assert_array_equal(row, expected_out[0])


def test_gates_of_heads() -> None:
    """Two heads of four elements with gates, one key head: queries and gates alternate, keys and values follow."""
    starts = [as_kernel(head_start)(OPTIONS, 2, head, 4) for head in range(4)]
    assert starts == [0, 8, 16, 20]
    plain = OPTIONS._replace(gates_heads=False)
    assert [as_kernel(head_start)(plain, 2, head, 4) for head in range(4)] == [0, 4, 8, 12]
    row = np.random.default_rng(0).standard_normal(24).astype(np.float32)
    for options, factors in (
        (OPTIONS, 1 / (1 + np.exp(-row[:16].reshape(2, 2, 4)[:, 1].ravel()))),
        (plain, np.ones(8)),
    ):
        out = np.arange(1, 9, dtype=np.float32)
        as_kernel(gate_heads)(options, 4, row, out)
        np.testing.assert_allclose(out, np.arange(1, 9) * factors, rtol=1e-6)


def test_a_model_without_states_has_none() -> None:
    assert not any(array.size for array in NO_STATES)
    assert StatePool((0, 0), 2, 0).numbers.size == 0
