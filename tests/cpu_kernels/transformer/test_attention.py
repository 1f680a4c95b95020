"""Rotation, the key-value cache and grouped-query attention against float64."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass

import naive
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_inputs import CREW

from cpu_kernels.simd.instruction_set import chosen
from cpu_kernels.threads.crew import Crew
from cpu_kernels.transformer.attend_layers import attend_layers
from cpu_kernels.transformer.attention import (
    Cache,
    attend,
    attend_token,
    join_spans,
    make_scratch,
    padded_dimension,
    rotate,
    rotate_and_store,
)
from cpu_kernels.transformer.attention_tile import PANEL
from cpu_kernels.transformer.rules import Rules

HEADS, KV_HEADS, DIM, CONTEXT = 6, 2, 8, 40
Variant = tuple[int, ...]
NO_NORM = np.empty(0, np.float32)
EPSILON = 1e-5
interleavings = pytest.mark.parametrize("interleaved", [True, False])
cache_types = pytest.mark.parametrize("dtype", [np.uint16, np.float32])


def angles(places: int, dim: int) -> np.ndarray:
    return np.outer(np.arange(places), 10.0 ** -np.linspace(0, 2, dim // 2))


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


def rules(
    dim: int, *, interleaved: bool = False, window: int = 0, softcap: float = 0.0, together: bool = False
) -> Rules:
    """Return the rules of a model of one layer and one rotation."""
    return Rules(
        epsilon=np.float32(EPSILON),
        residual_scale=np.float32(1),
        gelu=False,
        interleaved=interleaved,
        attention_scale=np.float32(dim**-0.5),
        softcap=np.float32(softcap),
        normalizes_together=together,
        windows=np.array([window]),
        rotations=np.array([0]),
    )


def as_cached(x: np.ndarray, dtype: type) -> np.ndarray:
    """Return float32 numbers as the cache keeps them."""
    return x.astype(np.float16).view(np.uint16) if dtype is np.uint16 else x


def as_float64(cached: np.ndarray) -> np.ndarray:
    return (cached.view(np.float16) if cached.dtype == np.uint16 else cached).astype(np.float64)


@dataclass
class Layer:
    """The cache of one layer, and float64 copies [kv_heads, places, dim] of what is in it."""

    cached_keys: np.ndarray
    cached_values: np.ndarray
    dim: int

    @property
    def keys(self) -> np.ndarray:
        kv_heads, panels, padded, _ = self.cached_keys.shape
        turned = as_float64(self.cached_keys).transpose(0, 1, 3, 2)
        return turned.reshape(kv_heads, panels * PANEL, padded)[:, :, : self.dim]

    @property
    def values(self) -> np.ndarray:
        kv_heads, _, places, _ = self.cached_values.shape
        return as_float64(self.cached_values).transpose(0, 2, 1, 3).reshape(kv_heads, places, -1)[:, :, : self.dim]


def random_layer(kv_heads: int, places: int, dim: int, dtype: type, filled: int) -> Layer:
    """Return a cache whose first `filled` places are random; beyond them it holds no numbers, but for the padding."""
    panels, padded = -(-places // PANEL), padded_dimension(dim)
    keys, values = random(kv_heads, panels * PANEL, padded, seed=1), random(kv_heads, panels * PANEL, padded, seed=2)
    for cache in (keys, values):
        cache[:, :, dim:] = 0
        cache[:, filled:, :dim] = np.nan
    in_panels = np.ascontiguousarray(keys.reshape(kv_heads, panels, PANEL, padded).transpose(0, 1, 3, 2))
    values = np.ascontiguousarray(values.reshape(kv_heads, -1, padded // PANEL, PANEL).transpose(0, 2, 1, 3))
    return Layer(as_cached(in_panels, dtype), as_cached(values, dtype), dim)


def cache_of(layer: Layer, heads: int, threads: int) -> Cache:
    """Return the cache of a model of this layer."""
    turns = angles(layer.cached_values.shape[2], layer.dim)[np.newaxis]
    return Cache(
        layer.cached_keys[np.newaxis],
        layer.cached_values[np.newaxis],
        np.cos(turns).astype(np.float32),
        np.sin(turns).astype(np.float32),
        make_scratch(heads, len(layer.cached_keys), layer.dim, threads),
    )


def expected_attention(
    layer: Layer, queries: np.ndarray, position: int, window: int = 0, softcap: float = 0.0
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
            out[t, head] = naive.softmax(scores) @ values[shared, seen]
    return out.reshape(tokens, -1)


@interleavings
def test_rotate(interleaved: bool) -> None:
    head, turns = random(DIM), angles(CONTEXT, DIM)[7]
    cosines, sines = np.cos(turns).astype(np.float32), np.sin(turns).astype(np.float32)
    out = np.zeros_like(head)
    rotate(head, cosines, sines, interleaved, out)
    np.testing.assert_allclose(out, naive.rotate(head, turns, interleaved), atol=1e-6)
    rotate(head, cosines, sines, interleaved, head)
    np.testing.assert_array_equal(head, out)


@interleavings
@cache_types
@pytest.mark.parametrize(("tokens", "position", "threads"), [(1, 0, 1), (1, 39, 2), (5, 3, 2), (5, 30, 3)])
@pytest.mark.parametrize("biased", [False, True])
def test_rotate_and_store(
    interleaved: bool, dtype: type, tokens: int, position: int, threads: int, biased: bool
) -> None:
    qkv = random(tokens, (HEADS + 2 * KV_HEADS) * DIM)
    bias = random(qkv.shape[1], seed=1) if biased else np.zeros(qkv.shape[1], np.float32)
    turns = angles(CONTEXT, DIM)
    layer = random_layer(KV_HEADS, CONTEXT, DIM, dtype, 0)
    cache, model_rules = cache_of(layer, HEADS, 1), rules(DIM, interleaved=interleaved)
    heads = (qkv + bias).astype(np.float64).reshape(tokens, -1, DIM)
    Crew(threads).run(rotate_and_store, qkv, bias, NO_NORM, model_rules, 0, cache, HEADS, position)
    rounding = 2**-10 if dtype is np.uint16 else 1e-5
    for t in range(tokens):
        turned = np.array([naive.rotate(head, turns[position + t], interleaved) for head in heads[t]])
        np.testing.assert_allclose(qkv[t].reshape(-1, DIM)[:HEADS], turned[:HEADS], atol=1e-5)
        stored = layer.keys[:, position + t], layer.values[:, position + t]
        np.testing.assert_allclose(stored[0], turned[HEADS : HEADS + KV_HEADS], rtol=rounding, atol=1e-5)
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
    # What lies beyond the last token's own place must not matter, to the last bit.
    layer = random_layer(kv_heads, 320, dim, dtype, position + tokens)
    out = np.full((tokens, HEADS * dim), np.nan, np.float32)
    Crew(threads).run(attend, chosen(), qkv, rules(dim), 0, cache_of(layer, HEADS, 1), position, HEADS, out)
    expected = expected_attention(layer, qkv.reshape(tokens, -1, dim)[:, :HEADS], position)
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-5 * size)


def test_no_token_sees_a_later_one(variant: str) -> None:
    """Changing all later places changes no bit of what a token sees."""
    tokens, dim = 90, 32
    qkv = random(tokens, HEADS * dim)
    layer = random_layer(KV_HEADS, 96, dim, np.float32, 96)
    before, after = np.zeros((2, tokens, HEADS * dim), np.float32)
    cache, model_rules = cache_of(layer, HEADS, 1), rules(dim)
    for place in (0, 1, 31, 32, 50, 63, 64, 88):
        Crew(1).run(attend, chosen(), qkv, model_rules, 0, cache, 0, HEADS, before)
        for later in range(place + 1, tokens):
            layer.cached_keys[:, later // PANEL, :, later % PANEL] += 3
        layer.cached_values[:, :, place + 1 :] *= -2
        Crew(1).run(attend, chosen(), qkv, model_rules, 0, cache, 0, HEADS, after)
        np.testing.assert_array_equal(after[: place + 1], before[: place + 1])
        assert (after[place + 1 :] != before[place + 1 :]).any(axis=1).all()


def attend_to_last(
    layer: Layer,
    qkv: np.ndarray,
    bias: np.ndarray,
    position: int,
    heads: int,
    model_rules: Rules,
    threads: int,
    norm: np.ndarray = NO_NORM,
) -> np.ndarray:
    """Store one token and attend with it as decode does; return [heads * dim]."""
    cache = cache_of(layer, heads, threads)
    qkv = qkv.copy()
    for thread in range(threads):
        attend_token(chosen(), cache, 0, qkv, bias, norm, model_rules, position, thread, threads)
    outs = np.full((threads, heads * layer.dim), np.nan, np.float32)
    for thread in range(threads):
        join_spans(chosen(), cache, model_rules.windows[0], position, outs[thread], thread)
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
    out = attend_to_last(layer, qkv, bias, position, heads, rules(dim, interleaved=interleaved), 1)
    biased = (qkv.astype(np.float64) + bias).reshape(-1, dim)
    turned = np.array([naive.rotate(head, angles(position + 1, dim)[position], interleaved) for head in biased])
    rounding = 2**-10 if dtype is np.uint16 else 1e-5
    stored = turned[heads : heads + kv_heads], biased[heads + kv_heads :]
    np.testing.assert_allclose(layer.keys[:, position], stored[0], rtol=rounding, atol=1e-5)
    np.testing.assert_allclose(layer.values[:, position], stored[1], rtol=rounding, atol=1e-5)
    expected = expected_attention(layer, turned[np.newaxis, :heads], position)
    np.testing.assert_allclose(out, expected[0], rtol=0, atol=1e-5)
    assert np.isnan(layer.keys[:, position + 1 :]).all()


@pytest.mark.parametrize("window", [1, 31, 32, 33, 100, 300, 5000])
@pytest.mark.parametrize("position", [0, 31, 32, 99, 310])
def test_a_window_hides_what_is_before_it(variant: str, window: int, position: int) -> None:
    heads, kv_heads, dim, tokens = 4, 2, 32, 70
    qkv = random(tokens, (heads + 2 * kv_heads) * dim)
    layer = random_layer(kv_heads, 400, dim, np.float32, position + tokens)
    out = np.full((tokens, heads * dim), np.nan, np.float32)
    CREW.run(attend, chosen(), qkv, rules(dim, window=window), 0, cache_of(layer, heads, 1), position, heads, out)
    queries = qkv.reshape(tokens, -1, dim)[:, :heads]
    np.testing.assert_allclose(out, expected_attention(layer, queries, position, window), rtol=0, atol=2e-5)

    bias = np.zeros(qkv.shape[1], np.float32)
    one = attend_to_last(layer, qkv[0], bias, position, heads, rules(dim, window=window), 2)
    turned = np.array([naive.rotate(head, angles(400, dim)[position], False) for head in queries[0].astype(np.float64)])
    expected = expected_attention(layer, turned[np.newaxis], position, window)
    np.testing.assert_allclose(one, expected[0], rtol=0, atol=1e-5)


def test_no_bit_of_what_a_window_hides_matters() -> None:
    """Beyond the window there may be anything: it is not even read as a number that is multiplied with zero."""
    dim, position, window = 32, 700, 100
    qkv, bias = random(3 * dim), np.zeros(3 * dim, np.float32)
    plain, hidden = (random_layer(1, position + 1, dim, np.float32, position) for _ in range(2))
    hidden.cached_keys[:, : (position - window) // PANEL] = 1e30
    hidden.cached_values[:, :, : position - window + 1] = 1e30
    model_rules = rules(dim, window=window)
    expected = attend_to_last(plain, qkv, bias, position, 1, model_rules, 1)
    np.testing.assert_array_equal(attend_to_last(hidden, qkv, bias, position, 1, model_rules, 1), expected)


@pytest.mark.parametrize("softcap", [0.5, 50.0])
def test_scores_are_bent(softcap: float) -> None:
    heads, kv_heads, dim, tokens, position = 4, 2, 32, 5, 300
    qkv = 10 * random(tokens, (heads + 2 * kv_heads) * dim)
    layer = random_layer(kv_heads, 320, dim, np.float32, position + tokens)
    out = np.full((tokens, heads * dim), np.nan, np.float32)
    CREW.run(attend, chosen(), qkv, rules(dim, softcap=softcap), 0, cache_of(layer, heads, 1), position, heads, out)
    queries = qkv.reshape(tokens, -1, dim)[:, :heads]
    np.testing.assert_allclose(out, expected_attention(layer, queries, position, 0, softcap), rtol=0, atol=1e-4)
    assert np.abs(out - expected_attention(layer, queries, position)).max() > 1e-3


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
    turned = np.array([naive.rotate(head, angles(64, dim)[position], interleaved) for head in by_head])
    layer = random_layer(kv_heads, 64, dim, np.float32, position)
    model_rules = rules(dim, interleaved=interleaved, together=together)
    out = attend_to_last(layer, qkv, bias, position, heads, model_rules, 2, norm)
    np.testing.assert_allclose(layer.keys[:, position], turned[heads : heads + kv_heads], rtol=0, atol=1e-5)
    expected = expected_attention(layer, turned[np.newaxis, :heads], position)
    np.testing.assert_allclose(out, expected[0], rtol=0, atol=1e-5)

    rows = qkv[np.newaxis].copy()
    layer = random_layer(kv_heads, 64, dim, np.float32, position)
    CREW.run(rotate_and_store, rows, bias, norm, model_rules, 0, cache_of(layer, heads, 1), heads, position)
    np.testing.assert_allclose(rows[0].reshape(-1, dim)[:heads], turned[:heads], rtol=0, atol=1e-5)
    np.testing.assert_allclose(layer.keys[:, position], turned[heads : heads + kv_heads], rtol=0, atol=1e-5)


@given(position=st.integers(0, 3000), threads=st.integers(2, 9))
def test_threads_do_not_change_a_bit(position: int, threads: int) -> None:
    qkv, bias = random(5 * 32), np.zeros(5 * 32, np.float32)
    expected, out = (
        attend_to_last(random_layer(1, position + 1, 32, np.uint16, position), qkv, bias, position, 3, rules(32), count)
        for count in (1, threads)
    )
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_attend_layers(threads: int) -> None:
    layers = [random_layer(KV_HEADS, CONTEXT, DIM, np.uint16, 10) for _ in range(3)]
    layers[2].cached_values[:, :, :10] = layers[0].cached_values[:, :, 9::-1]
    turns = angles(64, DIM)
    cache = Cache(
        np.stack([layer.cached_keys for layer in layers]),
        np.stack([layer.cached_values for layer in layers]),
        np.cos(turns)[np.newaxis].astype(np.float32),
        np.sin(turns)[np.newaxis].astype(np.float32),
        make_scratch(HEADS, KV_HEADS, DIM, threads),
    )
    qkv = random((HEADS + 2 * KV_HEADS) * DIM)
    out = np.zeros((threads, HEADS * DIM), np.float32)
    one = rules(DIM)
    three = one._replace(windows=np.zeros(3, np.int64), rotations=np.zeros(3, np.int64))
    bias, norms, counter = np.zeros_like(qkv), np.empty((3, 0), np.float32), np.zeros(1, np.int64)
    Crew(threads).run(attend_layers, chosen(), cache, qkv, bias, norms, three, 10, out, counter)
    expected = attend_to_last(layers[2], qkv, bias, 10, HEADS, one, 1)
    for copy in out:
        np.testing.assert_array_equal(copy, expected)
    assert not np.array_equal(expected, attend_to_last(layers[0], qkv, bias, 10, HEADS, one, 1))


@pytest.mark.parametrize("size", [1.0, 1e15])
def test_attention_to_one_place_is_its_value(variant: str, size: float) -> None:
    qkv = random(1, (HEADS + 2 * KV_HEADS) * DIM) * np.float32(size)
    layer = random_layer(KV_HEADS, CONTEXT, DIM, np.float32, 1)
    layer.cached_keys[:] *= np.float32(size)
    out = np.zeros((1, HEADS * DIM), np.float32)
    CREW.run(attend, chosen(), qkv, rules(DIM), 0, cache_of(layer, HEADS, 1), 0, HEADS, out)
    expected = np.repeat(layer.values[:, :1], HEADS // KV_HEADS, axis=1)
    np.testing.assert_array_equal(out.reshape(KV_HEADS, -1, DIM), expected)


def test_every_place_counts(variant: str) -> None:
    """With equal scores, attention is the mean of all values: no place is left out or counted twice."""
    places, dim = 777, 32
    layer = random_layer(1, places, dim, np.float32, places)
    layer.cached_keys[:] = 0
    layer.cached_values[:, :, :places] = np.arange(places, dtype=np.float32)[:, np.newaxis]
    out = np.zeros((1, dim), np.float32)
    CREW.run(attend, chosen(), random(1, 3 * dim), rules(dim), 0, cache_of(layer, 1, 1), places - 1, 1, out)
    np.testing.assert_allclose(out, (places - 1) / 2, rtol=1e-6)
    counts = Counter(np.round(out[0], 3).tolist())
    assert len(counts) == 1
