"""Rotation, the key-value cache and grouped-query attention against float64."""

from __future__ import annotations

import naive
import numpy as np
import pytest
from random_inputs import CREW

from cpu_kernels.attend_layers import attend_layers
from cpu_kernels.attention import attend, rotate, rotate_and_store
from cpu_kernels.crew import Crew

HEADS, KV_HEADS, DIM, CONTEXT = 6, 2, 8, 20
interleavings = pytest.mark.parametrize("interleaved", [True, False])


def angles(context: int = CONTEXT) -> np.ndarray:
    return np.outer(np.arange(context), 10.0 ** -np.linspace(0, 2, DIM // 2))


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


@interleavings
def test_rotate(interleaved: bool) -> None:
    head, turns = random(DIM), angles()[7]
    cosines, sines = np.cos(turns).astype(np.float32), np.sin(turns).astype(np.float32)
    out = np.zeros_like(head)
    rotate(head, cosines, sines, interleaved, out)
    np.testing.assert_allclose(out, naive.rotate(head, turns, interleaved), atol=1e-6)
    rotate(head, cosines, sines, interleaved, head)
    np.testing.assert_array_equal(head, out)


@interleavings
@pytest.mark.parametrize(("tokens", "position", "threads"), [(1, 0, 1), (1, 19, 2), (5, 3, 2), (5, 15, 3)])
@pytest.mark.parametrize("biased", [False, True])
def test_rotate_and_store(interleaved: bool, tokens: int, position: int, threads: int, biased: bool) -> None:
    qkv = random(tokens, (HEADS + 2 * KV_HEADS) * DIM)
    bias = random(qkv.shape[1], seed=1) if biased else np.zeros(qkv.shape[1], np.float32)
    cosines, sines = np.cos(angles()).astype(np.float32), np.sin(angles()).astype(np.float32)
    keys, values = (np.full((KV_HEADS, CONTEXT, DIM), np.nan, np.float32) for _ in range(2))
    heads = (qkv + bias).astype(np.float64).reshape(tokens, -1, DIM)
    arguments = (qkv, bias, cosines, sines, interleaved, HEADS, keys, values, position)
    Crew(threads).run(rotate_and_store, *arguments)
    for t in range(tokens):
        turned = np.array([naive.rotate(head, angles()[position + t], interleaved) for head in heads[t]])
        queries = qkv[t].reshape(-1, DIM)[:HEADS]
        np.testing.assert_allclose(queries, turned[:HEADS], atol=1e-5)
        np.testing.assert_allclose(keys[:, position + t], turned[HEADS : HEADS + KV_HEADS], atol=1e-5)
        np.testing.assert_allclose(values[:, position + t], heads[t, HEADS + KV_HEADS :], atol=1e-6)
    for cache in (keys, values):
        assert np.isnan(cache[:, :position]).all()
        assert np.isnan(cache[:, position + tokens :]).all()


@pytest.mark.parametrize(("tokens", "position", "threads"), [(1, 0, 1), (1, 19, 2), (5, 3, 2), (4, 16, 3)])
@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("size", [1.0, 100.0])
def test_attend(tokens: int, position: int, threads: int, kv_heads: int, size: float) -> None:
    qkv = random(tokens, (HEADS + 2 * kv_heads) * DIM) * np.float32(size)
    keys, values = random(kv_heads, CONTEXT, DIM, seed=1), random(kv_heads, CONTEXT, DIM, seed=2)
    # What lies beyond a token's own place must not matter, to the last bit.
    keys[:, position + tokens :], values[:, position + tokens :] = np.nan, np.nan
    out = np.full((tokens, HEADS * DIM), np.nan, np.float32)
    scores = np.zeros((HEADS, CONTEXT), np.float32)
    Crew(threads).run(attend, qkv, keys, values, position, HEADS, scores, out)
    queries = qkv.astype(np.float64).reshape(tokens, -1, DIM)
    for t in range(tokens):
        seen = slice(0, position + t + 1)
        for head in range(HEADS):
            shared = head // (HEADS // kv_heads)
            shares = naive.softmax(keys[shared, seen] @ queries[t, head] / np.sqrt(DIM))
            expected = shares @ values[shared, seen]
            np.testing.assert_allclose(out[t, head * DIM : (head + 1) * DIM], expected, atol=2e-5 * size)


def test_attend_layers() -> None:
    queries, keys, values = (
        random(HEADS, DIM),
        random(3, KV_HEADS, CONTEXT, DIM),
        random(3, KV_HEADS, CONTEXT, DIM, seed=1),
    )
    out = np.zeros((HEADS, DIM), np.float32)
    CREW.run(attend_layers, queries, keys, values, 9, np.zeros((HEADS, CONTEXT), np.float32), out)
    for head in range(HEADS):
        shared = head // (HEADS // KV_HEADS)
        shares = naive.softmax(keys[2, shared, :9].astype(np.float64) @ queries[head] / np.sqrt(DIM))
        np.testing.assert_allclose(out[head], shares @ values[2, shared, :9], atol=1e-6)


def test_attention_to_one_place_is_its_value() -> None:
    qkv = random(1, (HEADS + 2 * KV_HEADS) * DIM) * np.float32(1e15)
    keys, values = random(KV_HEADS, CONTEXT, DIM) * np.float32(1e15), random(KV_HEADS, CONTEXT, DIM, seed=1)
    out = np.zeros((1, HEADS * DIM), np.float32)
    CREW.run(attend, qkv, keys, values, 0, HEADS, np.zeros((HEADS, CONTEXT), np.float32), out)
    np.testing.assert_array_equal(out.reshape(KV_HEADS, -1, DIM), np.repeat(values[:, :1], HEADS // KV_HEADS, axis=1))
