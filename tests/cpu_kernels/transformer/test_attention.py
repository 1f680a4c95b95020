"""RoPE, the KV cache and grouped-query attention against float64."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

import naive
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inner_kernels import as_kernel
from paged_layers import PagedLayers, angles, random, random_layers
from random_inputs import THREAD_POOL

from cpu_kernels.simd.instruction_set import chosen
from cpu_kernels.threads.thread_pool import ThreadPool
from cpu_kernels.transformer.attend_layers import attend_layers
from cpu_kernels.transformer.attend_token import attend_token, merge_splits
from cpu_kernels.transformer.attention import attend
from cpu_kernels.transformer.attention_tile import PANEL
from cpu_kernels.transformer.layer_options import ATTENTION, SILU, LayerOptions
from cpu_kernels.transformer.rotation import rotate, rotate_and_store

HEADS, KV_HEADS, DIM, CONTEXT = 6, 2, 8, 40
Variant = tuple[int, ...]
NO_NORM = np.empty(0, np.float32)
EPSILON = 1e-5
interleavings = pytest.mark.parametrize("interleaved", [True, False])
cache_types = pytest.mark.parametrize("dtype", [np.uint16, np.float32])


def layer_options(
    dim: int,
    *,
    interleaved: bool = False,
    window: int = 0,
    softcap: float = 0.0,
    together: bool = False,
    sinks: Sequence[float] = (),
) -> LayerOptions:
    """Return the options of a model with one layer and one rotation table."""
    return LayerOptions(
        epsilon=np.float32(EPSILON),
        residual_scale=np.float32(1),
        activation=SILU,
        interleaved=interleaved,
        rotated_pairs=dim // 2,
        gates_heads=False,
        attention_scale=np.float32(dim**-0.5),
        softcap=np.float32(softcap),
        normalizes_together=together,
        kinds=np.array([ATTENTION]),
        windows=np.array([window]),
        rotations=np.array([0]),
        sinks=np.array([sinks], np.float32),
    )


def random_layer(kv_heads: int, positions: int, dim: int, dtype: type, filled: int) -> PagedLayers:
    """Return the pages of one layer, see `random_layers`."""
    return random_layers(1, kv_heads, positions, dim, dtype, filled)


def segments(tokens: int, position: int) -> np.ndarray:
    """Return the segments of a prompt in sequence 0: a single one."""
    return np.array([[0, tokens, 0, position]])


def expected_attention(
    layer: PagedLayers,
    queries: np.ndarray,
    position: int,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Sequence[float] = (),
) -> np.ndarray:
    """Return float64 [tokens, heads * dim] for queries [tokens, heads, dim], the first of which is at `position`."""
    tokens, heads, dim = queries.shape
    keys, values = layer.keys, layer.values
    out = np.empty((tokens, heads, dim))
    for t in range(tokens):
        seen = slice(max(0, position + t + 1 - window) if window else 0, position + t + 1)
        for head in range(heads):
            shared = head // (heads // len(keys))
            scores = keys[shared, seen] @ queries[t, head].astype(np.float64) / np.sqrt(dim)
            if softcap:
                scores = softcap * np.tanh(scores / softcap)
            weights = naive.softmax(np.append(scores, sinks[head : head + 1]))[: len(scores)]
            out[t, head] = weights @ values[shared, seen]
    return out.reshape(tokens, -1)


@interleavings
def test_rotate(interleaved: bool) -> None:
    head, position_angles = random(DIM), angles(CONTEXT, DIM)[7]
    cosines, sines = np.cos(position_angles).astype(np.float32), np.sin(position_angles).astype(np.float32)
    out = np.zeros_like(head)
    as_kernel(rotate)(head, cosines, sines, interleaved, DIM // 2, out)
    np.testing.assert_allclose(out, naive.rotate(head, position_angles, interleaved), atol=1e-6)
    part = head.copy()
    as_kernel(rotate)(head, cosines, sines, interleaved, DIM // 2, head)
    np.testing.assert_array_equal(head, out)
    expected = np.append(naive.rotate(part[:8], position_angles[:4], interleaved), part[8:])
    as_kernel(rotate)(part, cosines, sines, interleaved, 4, part)
    np.testing.assert_allclose(part, expected, atol=1e-6)


@interleavings
@cache_types
@pytest.mark.parametrize(("tokens", "position", "threads"), [(1, 0, 1), (1, 39, 2), (5, 3, 2), (5, 30, 3)])
@pytest.mark.parametrize("biased", [False, True])
def test_rotate_and_store(
    interleaved: bool, dtype: type, tokens: int, position: int, threads: int, biased: bool
) -> None:
    qkv = random(tokens, (HEADS + 2 * KV_HEADS) * DIM)
    bias = random(qkv.shape[1], seed=1) if biased else np.zeros(qkv.shape[1], np.float32)
    position_angles = angles(CONTEXT, DIM)
    layer = random_layer(KV_HEADS, CONTEXT, DIM, dtype, 0)
    kv, options = layer.key_values(), layer_options(DIM, interleaved=interleaved)
    heads = (qkv + bias).astype(np.float64).reshape(tokens, -1, DIM)
    token_positions = np.zeros(tokens, np.int64), np.arange(position, position + tokens)
    ThreadPool(threads).run(rotate_and_store, qkv, bias, NO_NORM, options, 0, kv, HEADS, *token_positions)
    rounding = 2**-10 if dtype is np.uint16 else 1e-5
    for t in range(tokens):
        rotated = np.array([naive.rotate(head, position_angles[position + t], interleaved) for head in heads[t]])
        np.testing.assert_allclose(qkv[t].reshape(-1, DIM)[:HEADS], rotated[:HEADS], atol=1e-5)
        stored = layer.keys[:, position + t], layer.values[:, position + t]
        np.testing.assert_allclose(stored[0], rotated[HEADS : HEADS + KV_HEADS], rtol=rounding, atol=1e-5)
        np.testing.assert_allclose(stored[1], heads[t, HEADS + KV_HEADS :], rtol=rounding, atol=1e-6)
    for stored_part in (layer.keys, layer.values):
        assert np.isnan(stored_part[:, :position]).all()
        assert np.isnan(stored_part[:, position + tokens :]).all()


@cache_types
@pytest.mark.parametrize(
    ("tokens", "position", "threads"), [(1, 0, 1), (1, 319, 2), (5, 3, 2), (4, 16, 3), (40, 0, 2), (70, 250, 1)]
)
@pytest.mark.parametrize(("kv_heads", "dim"), [(1, 8), (2, 64), (3, 8), (6, 80)])
@pytest.mark.parametrize("size", [1.0, 100.0])
def test_attend(
    variant: str, dtype: type, tokens: int, position: int, threads: int, kv_heads: int, dim: int, size: float
) -> None:
    qkv = random(tokens, (HEADS + 2 * kv_heads) * dim) * np.float32(size)
    # Positions after the last token are NaN and must not change a bit.
    layer = random_layer(kv_heads, 320, dim, dtype, position + tokens)
    out = np.full((tokens, HEADS * dim), np.nan, np.float32)
    kv = layer.key_values()
    ThreadPool(threads).run(attend, chosen(), qkv, layer_options(dim), 0, kv, segments(tokens, position), HEADS, out)
    expected = expected_attention(layer, qkv.reshape(tokens, -1, dim)[:, :HEADS], position)
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-5 * size)


def test_no_token_sees_a_later_one(variant: str) -> None:
    """Changing all later positions does not change a bit of a token's result."""
    tokens, dim = 90, 32
    qkv = random(tokens, HEADS * dim)
    layer = random_layer(KV_HEADS, 96, dim, np.float32, 96)
    before, after = np.zeros((2, tokens, HEADS * dim), np.float32)
    kv, options = layer.key_values(), layer_options(dim)
    for position in (0, 1, 31, 32, 50, 63, 64, 88):
        ThreadPool(1).run(attend, chosen(), qkv, options, 0, kv, segments(tokens, 0), HEADS, before)
        keys, values = layer.read(0), layer.read(1)
        keys[:, :, position + 1 : tokens] += 3
        values[:, :, position + 1 :] *= -2
        layer.write(0, keys)
        layer.write(1, values)
        ThreadPool(1).run(attend, chosen(), qkv, options, 0, kv, segments(tokens, 0), HEADS, after)
        np.testing.assert_array_equal(after[: position + 1], before[: position + 1])
        assert (after[position + 1 :] != before[position + 1 :]).any(axis=1).all()


def attend_to_last(
    layer: PagedLayers,
    qkv: np.ndarray,
    bias: np.ndarray,
    position: int,
    heads: int,
    options: LayerOptions,
    threads: int,
    norm: np.ndarray = NO_NORM,
) -> np.ndarray:
    """Store one token and compute its attention as decode does; return [heads * dim]."""
    kv, scratch = layer.key_values(), layer.scratch(heads, threads)
    qkv = qkv.copy()
    for thread in range(threads):
        as_kernel(attend_token)(chosen(), kv, scratch, 0, qkv, bias, norm, options, 0, position, thread, threads)
    outs = np.full((threads, heads * layer.dim), np.nan, np.float32)
    for thread in range(threads):
        as_kernel(merge_splits)(chosen(), scratch, 0, options, 0, position, layer.dim, outs[thread], thread)
        np.testing.assert_array_equal(outs[thread], outs[0])
    return outs[0]


@interleavings
@cache_types
@pytest.mark.parametrize("position", [0, 1, 31, 32, 63, 64, 700, 1030, 1500])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(6, 2, 8), (9, 3, 64), (2, 2, 80), (7, 1, 32)])
def test_one_token(
    variant: str, interleaved: bool, dtype: type, position: int, heads: int, kv_heads: int, dim: int
) -> None:
    qkv, bias = random((heads + 2 * kv_heads) * dim), random((heads + 2 * kv_heads) * dim, seed=1)
    layer = random_layer(kv_heads, position + 1, dim, dtype, position)
    out = attend_to_last(layer, qkv, bias, position, heads, layer_options(dim, interleaved=interleaved), 1)
    biased = (qkv.astype(np.float64) + bias).reshape(-1, dim)
    rotated = np.array([naive.rotate(head, angles(position + 1, dim)[position], interleaved) for head in biased])
    rounding = 2**-10 if dtype is np.uint16 else 1e-5
    stored = rotated[heads : heads + kv_heads], biased[heads + kv_heads :]
    np.testing.assert_allclose(layer.keys[:, position], stored[0], rtol=rounding, atol=1e-5)
    np.testing.assert_allclose(layer.values[:, position], stored[1], rtol=rounding, atol=1e-5)
    expected = expected_attention(layer, rotated[np.newaxis, :heads], position)
    np.testing.assert_allclose(out, expected[0], rtol=0, atol=1e-5)
    assert np.isnan(layer.keys[:, position + 1 :]).all()


@pytest.mark.parametrize("window", [1, 31, 32, 33, 100, 300, 5000])
@pytest.mark.parametrize("position", [0, 31, 32, 99, 310])
def test_window(variant: str, window: int, position: int) -> None:
    heads, kv_heads, dim, tokens = 4, 2, 32, 70
    qkv = random(tokens, (heads + 2 * kv_heads) * dim)
    layer = random_layer(kv_heads, 400, dim, np.float32, position + tokens)
    out = np.full((tokens, heads * dim), np.nan, np.float32)
    kv = layer.key_values()
    THREAD_POOL.run(
        attend, chosen(), qkv, layer_options(dim, window=window), 0, kv, segments(tokens, position), heads, out
    )
    queries = qkv.reshape(tokens, -1, dim)[:, :heads]
    np.testing.assert_allclose(out, expected_attention(layer, queries, position, window), rtol=0, atol=2e-5)

    bias = np.zeros(qkv.shape[1], np.float32)
    one = attend_to_last(layer, qkv[0], bias, position, heads, layer_options(dim, window=window), 2)
    rotated = np.array(
        [naive.rotate(head, angles(400, dim)[position], False) for head in queries[0].astype(np.float64)]
    )
    expected = expected_attention(layer, rotated[np.newaxis], position, window)
    np.testing.assert_allclose(one, expected[0], rtol=0, atol=1e-5)


def test_positions_outside_the_window_change_no_bit() -> None:
    """Positions outside the window may have any value: they are not even multiplied with zero."""
    dim, position, window = 32, 700, 100
    qkv, bias = random(3 * dim), np.zeros(3 * dim, np.float32)
    plain, hidden = (random_layer(1, position + 1, dim, np.float32, position) for _ in range(2))
    keys, values = hidden.read(0), hidden.read(1)
    keys[:, :, : (position - window) // PANEL * PANEL] = 1e30
    values[:, :, : position - window + 1] = 1e30
    hidden.write(0, keys)
    hidden.write(1, values)
    options = layer_options(dim, window=window)
    expected = attend_to_last(plain, qkv, bias, position, 1, options, 1)
    np.testing.assert_array_equal(attend_to_last(hidden, qkv, bias, position, 1, options, 1), expected)


@pytest.mark.parametrize("softcap", [0.5, 50.0])
def test_softcap(softcap: float) -> None:
    heads, kv_heads, dim, tokens, position = 4, 2, 32, 5, 300
    qkv = 10 * random(tokens, (heads + 2 * kv_heads) * dim)
    layer = random_layer(kv_heads, 320, dim, np.float32, position + tokens)
    out = np.full((tokens, heads * dim), np.nan, np.float32)
    kv = layer.key_values()
    THREAD_POOL.run(
        attend, chosen(), qkv, layer_options(dim, softcap=softcap), 0, kv, segments(tokens, position), heads, out
    )
    queries = qkv.reshape(tokens, -1, dim)[:, :heads]
    np.testing.assert_allclose(out, expected_attention(layer, queries, position, 0, softcap), rtol=0, atol=1e-4)
    assert np.abs(out - expected_attention(layer, queries, position)).max() > 1e-3


@pytest.mark.parametrize("window", [0, 40])
def test_sinks(variant: str, window: int) -> None:
    """Sinks far below and far above the scores: the one is as if there was none, the other takes all the weight."""
    heads, kv_heads, dim, tokens, position = 4, 2, 32, 5, 300
    sinks = (5.0, 8.0, -500.0, 500.0)
    qkv = 3 * random(tokens, (heads + 2 * kv_heads) * dim)
    layer = random_layer(kv_heads, 320, dim, np.float32, position + tokens)
    out, options = np.full((tokens, heads * dim), np.nan, np.float32), layer_options(dim, window=window, sinks=sinks)
    kv = layer.key_values()
    THREAD_POOL.run(attend, chosen(), qkv, options, 0, kv, segments(tokens, position), heads, out)
    queries = qkv.reshape(tokens, -1, dim)[:, :heads]
    expected = expected_attention(layer, queries, position, window, sinks=sinks)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-4)
    assert not out[:, 3 * dim :].any()
    without = expected_attention(layer, queries, position, window)
    np.testing.assert_allclose(out[:, 2 * dim : 3 * dim], without[:, 2 * dim : 3 * dim], rtol=0, atol=1e-4)
    assert np.abs(out - without)[:, : 2 * dim].reshape(tokens, 2, dim).max(axis=2).min() > 1e-3

    one = attend_to_last(layer, qkv[0], np.zeros(qkv.shape[1], np.float32), position, heads, options, 2)
    rotated = [naive.rotate(head, angles(320, dim)[position], False) for head in queries[0].astype(np.float64)]
    expected = expected_attention(layer, np.array([rotated]), position, window, sinks=sinks)
    np.testing.assert_allclose(one, expected[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("together", [False, True])
@interleavings
def test_queries_and_keys_are_normalized_before_they_are_rotated(together: bool, interleaved: bool) -> None:
    heads, kv_heads, dim, position = 6, 2, 32, 40
    qkv, bias = random((heads + 2 * kv_heads) * dim), random((heads + 2 * kv_heads) * dim, seed=1)
    norm = random((heads + kv_heads) * dim, seed=2)
    split = [0, heads * dim, len(norm)] if together else list(range(0, len(norm) + 1, dim))
    biased = qkv.astype(np.float64) + bias
    for first, last in itertools.pairwise(split):
        biased[first:last] = naive.root_mean_square_norm(biased[first:last], norm[first:last], EPSILON)
    by_head = biased.reshape(-1, dim)
    rotated = np.array([naive.rotate(head, angles(64, dim)[position], interleaved) for head in by_head])
    layer = random_layer(kv_heads, 64, dim, np.float32, position)
    options = layer_options(dim, interleaved=interleaved, together=together)
    out = attend_to_last(layer, qkv, bias, position, heads, options, 2, norm)
    np.testing.assert_allclose(layer.keys[:, position], rotated[heads : heads + kv_heads], rtol=0, atol=1e-5)
    expected = expected_attention(layer, rotated[np.newaxis, :heads], position)
    np.testing.assert_allclose(out, expected[0], rtol=0, atol=1e-5)

    rows = qkv[np.newaxis].copy()
    layer = random_layer(kv_heads, 64, dim, np.float32, position)
    token_positions = np.zeros(1, np.int64), np.array([position])
    THREAD_POOL.run(rotate_and_store, rows, bias, norm, options, 0, layer.key_values(), heads, *token_positions)
    np.testing.assert_allclose(rows[0].reshape(-1, dim)[:heads], rotated[:heads], rtol=0, atol=1e-5)
    np.testing.assert_allclose(layer.keys[:, position], rotated[heads : heads + kv_heads], rtol=0, atol=1e-5)


@given(position=st.integers(0, 3000), threads=st.integers(2, 9))
def test_the_number_of_threads_changes_no_bit(position: int, threads: int) -> None:
    qkv, bias = random(5 * 32), np.zeros(5 * 32, np.float32)
    expected, out = (
        attend_to_last(
            random_layer(1, position + 1, 32, np.uint16, position), qkv, bias, position, 3, layer_options(32), count
        )
        for count in (1, threads)
    )
    np.testing.assert_array_equal(out, expected)


def layer_of(layers: PagedLayers, number: int) -> PagedLayers:
    """Return a copy of one layer."""
    _, kv_heads, positions, _ = layers.shape
    layer = PagedLayers(1, kv_heads, positions, layers.dim, layers.pages.dtype.type)
    for part in (0, 1):
        layer.write(part, layers.read(part)[number : number + 1])
    return layer


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_attend_layers(threads: int) -> None:
    layers = random_layers(3, KV_HEADS, CONTEXT, DIM, np.uint16, 10)
    qkv = random((HEADS + 2 * KV_HEADS) * DIM)
    out = np.zeros((threads, HEADS * DIM), np.float32)
    one = layer_options(DIM)
    of_layers = np.zeros(3, np.int64)
    three = one._replace(kinds=of_layers, windows=of_layers, rotations=of_layers)
    bias, norms, counter = np.zeros_like(qkv), np.empty((3, 0), np.float32), np.zeros(1, np.int64)
    ThreadPool(threads).run(
        attend_layers, chosen(), layers.key_values(), layers.scratch(HEADS, threads), qkv, bias, norms, three, 10, out,
        counter,
    )  # fmt: skip
    first, last = (layer_of(layers, number) for number in (0, 2))
    expected = attend_to_last(last, qkv, bias, 10, HEADS, one, 1)
    for copy in out:
        np.testing.assert_array_equal(copy, expected)
    assert not np.array_equal(expected, attend_to_last(first, qkv, bias, 10, HEADS, one, 1))


@pytest.mark.parametrize("size", [1.0, 1e15])
def test_attention_to_one_position_is_its_value(variant: str, size: float) -> None:
    qkv = random(1, (HEADS + 2 * KV_HEADS) * DIM) * np.float32(size)
    layer = random_layer(KV_HEADS, CONTEXT, DIM, np.float32, 1)
    layer.write(0, layer.read(0) * np.float32(size))
    out = np.zeros((1, HEADS * DIM), np.float32)
    THREAD_POOL.run(attend, chosen(), qkv, layer_options(DIM), 0, layer.key_values(), segments(1, 0), HEADS, out)
    expected = np.repeat(layer.values[:, :1], HEADS // KV_HEADS, axis=1)
    np.testing.assert_array_equal(out.reshape(KV_HEADS, -1, DIM), expected)


def test_every_position_counts_once(variant: str) -> None:
    """With equal scores, attention is the mean of all values: no position is omitted or counted twice."""
    count, dim = 777, 32
    layer = random_layer(1, count, dim, np.float32, count)
    layer.write(0, np.zeros_like(layer.read(0)))
    values = layer.read(1)
    values[:, :, :count] = np.arange(count, dtype=np.float32)[:, np.newaxis]
    layer.write(1, values)
    out = np.zeros((1, dim), np.float32)
    where = segments(1, count - 1)
    THREAD_POOL.run(attend, chosen(), random(1, 3 * dim), layer_options(dim), 0, layer.key_values(), where, 1, out)
    np.testing.assert_allclose(out, (count - 1) / 2, rtol=1e-6)
    counts = Counter(np.round(out[0], 3).tolist())
    assert len(counts) == 1
