"""Quantization of activations, norms and gated activations against float64."""

from __future__ import annotations

from collections.abc import Callable

import naive
import numpy as np
import pytest
from inner_kernels import as_kernel
from random_inputs import THREAD_POOL, batch_integers, batch_of, vector_integers, vectors

from cpu_kernels.threads.thread_pool import ThreadPool
from cpu_kernels.transformer.activations import (
    add_and_normalize,
    add_and_normalize_batch,
    normalize_row,
    quantize_row,
    swiglu_batch,
)
from cpu_kernels.transformer.layer_options import CLAMPED_SILU, GELU, SILU
from cpu_kernels.transformer.projection import Activations, Batch
from cpu_kernels.transformer.swiglu import swiglu

NO_NORM = np.empty(0, np.float32)
tokens_and_columns = pytest.mark.parametrize(("tokens", "columns"), [(1, 64), (1, 576), (3, 192), (9, 64)])
Integers = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def of_batch(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return batch_integers(batch_of(x))


def of_vectors(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows = [vector_integers(row) for row in x]
    return np.concatenate([row[0] for row in rows]), np.concatenate([row[1] for row in rows])


def of_small_batch(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return batch_integers(batch_of(x, bits=8))


def of_small_vectors(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows = [vector_integers(row, bits=8) for row in x]
    return np.concatenate([row[0] for row in rows]), np.concatenate([row[1] for row in rows])


both_layouts = pytest.mark.parametrize("integers_of", [of_batch, of_vectors])


@pytest.mark.parametrize(
    ("integers_of", "bits"), [(of_batch, 16), (of_vectors, 16), (of_small_batch, 8), (of_small_vectors, 8)]
)
@tokens_and_columns
def test_quantization(integers_of: Integers, bits: int, tokens: int, columns: int) -> None:
    x = vectors(tokens, columns)
    integers, step_sizes = integers_of(x)
    expected, expected_sizes = naive.quantize_activations(x, bits)
    np.testing.assert_allclose(step_sizes, expected_sizes, rtol=1e-6)
    # The kernel's float32 quotient may round a near tie to the other side, which costs no accuracy.
    exact = x.astype(np.float64) / np.repeat(expected_sizes, 16, axis=1)
    assert np.abs(integers - exact).max() < 0.51
    assert np.mean(integers != expected) < 0.01
    assert (np.abs(integers).reshape(tokens, -1, 16).max(axis=2) == 2 ** (bits - 1) - 1).all()


def test_both_layouts_hold_the_same_integers() -> None:
    x = vectors(11, 192)
    for batch, alone in zip(of_batch(x), of_vectors(x), strict=True):
        np.testing.assert_array_equal(batch, alone)
    for batch, alone in zip(of_small_batch(x), of_small_vectors(x), strict=True):
        np.testing.assert_array_equal(batch, alone)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_offsets_are_minus_h_times_the_sum(depth: int) -> None:
    x = vectors(11, 192)
    sums = of_batch(x)[0].reshape(11, -1, 16).sum(axis=2)
    expected = -naive.largest_level(depth) * sums
    batch = batch_of(x)
    offsets = batch.offsets[:, depth - 1].transpose(0, 2, 1).reshape(-1, 12)[:11]
    np.testing.assert_array_equal(offsets, expected)
    vector = Activations(1, 192).vector(0)
    vector[0][:] = x[4]
    as_kernel(quantize_row)(*vector)
    np.testing.assert_array_equal(vector[2][depth - 1], expected[4])


@both_layouts
def test_groups_do_not_depend_on_each_other(integers_of: Integers) -> None:
    x = vectors(1, 128)
    before, sizes_before = integers_of(x)
    x[0, 16:32] *= 1e4
    after, sizes_after = integers_of(x)
    np.testing.assert_array_equal(np.delete(after, slice(16, 32), 1), np.delete(before, slice(16, 32), 1))
    np.testing.assert_array_equal(np.delete(sizes_after, 1, 1), np.delete(sizes_before, 1, 1))
    assert sizes_after[0, 1] == pytest.approx(1e4 * sizes_before[0, 1])


@both_layouts
@pytest.mark.parametrize(
    ("value", "zero"), [(0.0, True), (1e-40, True), (1e-31, True), (1e-20, False), (1e30, False), (3e38, False)]
)
def test_extreme_vectors(integers_of: Integers, value: float, zero: bool) -> None:
    x = np.zeros((2, 64), np.float32)
    x[0, 5] = -value
    x[1, :] = value
    integers, step_sizes = integers_of(x)
    assert np.isfinite(step_sizes).all()
    restored = integers * np.repeat(step_sizes.astype(np.float64), 16, axis=1)
    np.testing.assert_allclose(restored, np.zeros_like(x) if zero else x, rtol=1e-6)


@both_layouts
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_give_a_non_finite_scale(integers_of: Integers, value: float) -> None:
    """An invalid input must not give a result that looks valid."""
    x = vectors(1, 128)
    x[0, 20] = value
    step_sizes = integers_of(x)[1][0]
    assert not np.isfinite(step_sizes[1])
    assert np.isfinite(np.delete(step_sizes, 1)).all()


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_threads_share_a_batch(threads: int) -> None:
    x = vectors(9, 64)
    batch = Batch(9, 64)
    batch.x[:] = x
    batch.quantize(ThreadPool(threads))
    for part, expected in zip(batch.buffers, batch_of(x).buffers, strict=True):
        np.testing.assert_array_equal(part, expected)


@pytest.mark.parametrize("tokens", [1, 8, 9, 16])
def test_first_tokens_are_a_view(tokens: int) -> None:
    batch, x = Batch(16, 64), vectors(tokens, 64)
    view = batch.first(tokens)
    view.x[:] = x
    view.quantize(THREAD_POOL)
    for part, whole in zip(view.buffers, batch.buffers, strict=True):
        assert np.shares_memory(part, whole)
    for part, expected in zip(batch_integers(view), of_batch(x), strict=True):
        np.testing.assert_array_equal(part, expected)


@pytest.mark.parametrize("tokens", [1, 9])
def test_quantization_error(tokens: int) -> None:
    x = vectors(tokens, 192)
    batch = batch_of(x)
    restored = np.zeros(x.shape)
    for part in (batch, batch.quantization_error(THREAD_POOL)):
        integers, step_sizes = batch_integers(part)
        restored += integers * np.repeat(step_sizes.astype(np.float64), 16, axis=1)
    largest = np.repeat(np.abs(x).reshape(tokens, -1, 16).max(axis=2), 16, axis=1)
    assert (np.abs(restored - x) <= 2.0**-30 * largest).all()


@tokens_and_columns
def test_normalize(tokens: int, columns: int) -> None:
    stream, residual = vectors(tokens, columns, seed=1), vectors(tokens, columns, seed=2)
    weight = np.random.default_rng(3).standard_normal(columns).astype(np.float32)
    summed = stream + residual
    expected = naive.root_mean_square_norm(summed.astype(np.float64), weight.astype(np.float64), 1e-5)
    alone, out = stream[0].copy(), np.empty(columns, np.float32)
    as_kernel(normalize_row)(alone, residual[0], weight, np.float32(1e-5), out)
    np.testing.assert_array_equal(alone, summed[0])
    np.testing.assert_allclose(out, expected[0], rtol=3e-6)
    batch = Batch(tokens, columns)
    THREAD_POOL.run(
        add_and_normalize_batch, stream, residual, NO_NORM, np.float32(1), weight, np.float32(1e-5), *batch.buffers
    )
    np.testing.assert_array_equal(stream, summed)
    np.testing.assert_allclose(batch.x, expected, rtol=3e-6)
    for part, again in zip(batch.buffers, batch_of(batch.x).buffers, strict=True):
        np.testing.assert_array_equal(part, again)


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("normalizes_output", [False, True])
@pytest.mark.parametrize("normalizes_stream", [False, True])
def test_add_and_normalize(scale: float, normalizes_output: bool, normalizes_stream: bool) -> None:
    stream, residual = vectors(1, 96, seed=1)[0], vectors(1, 96, seed=2)[0]
    weights = np.random.default_rng(3).standard_normal((2, 96)).astype(np.float32)
    output_norm = weights[0] if normalizes_output else NO_NORM
    stream_norm = weights[1] if normalizes_stream else NO_NORM
    added = residual.astype(np.float64)
    if normalizes_output:
        added = naive.root_mean_square_norm(added, weights[0].astype(np.float64), 1e-5)
    summed = stream + scale * added
    expected = naive.root_mean_square_norm(summed, weights[1].astype(np.float64), 1e-5) if normalizes_stream else summed
    out = np.empty(96, np.float32)
    as_kernel(add_and_normalize)(stream, residual, output_norm, np.float32(scale), stream_norm, np.float32(1e-5), out)
    largest = np.abs(summed).max()
    np.testing.assert_allclose(stream, summed, rtol=3e-6, atol=1e-6 * largest)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("columns", [16, 96, 1000])
def test_layer_norm(scale: float, columns: int) -> None:
    """The mean, 30, is not near zero: it must be subtracted before the squares are added."""
    stream, residual = vectors(7, columns, seed=1) + np.float32(30), vectors(7, columns, seed=2)
    weight, bias = np.random.default_rng(3).standard_normal((2, columns)).astype(np.float32)
    summed = stream + scale * residual.astype(np.float64)
    expected = naive.layer_norm(summed, weight.astype(np.float64), bias, 1e-5)
    norm, out = np.concatenate([weight, bias]), np.empty((7, columns), np.float32)
    alone, batch = stream.copy(), Batch(7, columns)
    for t in range(7):
        as_kernel(add_and_normalize)(
            alone[t], residual[t], NO_NORM, np.float32(scale), norm, np.float32(1e-5), out[t]
        )  # fmt: skip
    THREAD_POOL.run(
        add_and_normalize_batch, stream, residual, NO_NORM, np.float32(scale), norm, np.float32(1e-5), *batch.buffers
    )
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(alone, summed, rtol=3e-7)
    np.testing.assert_array_equal(stream, alone)
    np.testing.assert_array_equal(batch.x, out)


@pytest.mark.parametrize("value", [0.0, 1e-40, 1e-20, 1e18, 1e30])
def test_normalize_extreme_vectors(value: float) -> None:
    stream, out = np.full(64, value, np.float32), np.empty(64, np.float32)
    as_kernel(normalize_row)(stream, np.zeros(64, np.float32), np.ones(64, np.float32), np.float32(1e-6), out)
    assert np.isfinite(out).all()
    assert (np.abs(out) <= 1.0001).all()


activations = pytest.mark.parametrize("activation", [SILU, GELU, CLAMPED_SILU])


def gated(gate: np.ndarray, up: np.ndarray, activation: int) -> np.ndarray:
    """Return the gated activation in float64, by its definition."""
    x, y = gate.astype(np.float64), up.astype(np.float64)
    inner = x
    if activation == GELU:
        inner = np.sqrt(8 / np.pi) * (x + 0.044715 * x**3)
    if activation == CLAMPED_SILU:
        x, y = np.minimum(x, 7.0), np.clip(y, -7.0, 7.0) + 1
        inner = 1.702 * x
    with np.errstate(over="ignore"):
        return x / (1 + np.exp(-inner)) * y


@activations
@tokens_and_columns
def test_swiglu(tokens: int, columns: int, activation: int) -> None:
    gate, up = vectors(tokens, columns, seed=4), vectors(tokens, columns, seed=5)
    assert np.abs(gate).max() > 7 or columns < 576
    expected = gated(gate, up, activation)
    out = np.empty(columns, np.float32)
    as_kernel(swiglu)(gate[0], up[0], activation, out)
    np.testing.assert_allclose(out, expected[0], rtol=1e-5, atol=1e-30)
    batch = Batch(tokens, columns)
    both = np.concatenate([gate, up], axis=1)
    THREAD_POOL.run(swiglu_batch, both, activation, True, *batch.buffers)
    np.testing.assert_allclose(batch.x, expected, rtol=1e-5, atol=1e-30)
    for part, again in zip(batch.buffers, batch_of(batch.x).buffers, strict=True):
        np.testing.assert_array_equal(part, again)
    without_x = Batch(tokens, columns)
    THREAD_POOL.run(swiglu_batch, both, activation, False, *without_x.buffers)
    assert not without_x.x.any()
    for part, again in zip(without_x.buffers[1:], batch.buffers[1:], strict=True):
        np.testing.assert_array_equal(part, again)


@activations
@pytest.mark.parametrize("value", [-1e30, -200.0, -1e-40, 0.0, 200.0, 1e30])
def test_swiglu_of_extreme_vectors(value: float, activation: int) -> None:
    gate, up, out = np.full(64, value, np.float32), np.ones(64, np.float32), np.empty(64, np.float32)
    as_kernel(swiglu)(gate, up, activation, out)
    most = 14.0 if activation == CLAMPED_SILU else np.inf  # 7 * (1 + 1)
    np.testing.assert_allclose(out, min(max(value, 0.0), most), rtol=1e-4, atol=1e-37)


@activations
@pytest.mark.parametrize("bad_gate", [False, True])
def test_swiglu_keeps_what_is_no_number(bad_gate: bool, activation: int) -> None:
    bad, good, out = np.full(64, np.nan, np.float32), np.ones(64, np.float32), np.empty(64, np.float32)
    as_kernel(swiglu)(bad if bad_gate else good, good if bad_gate else bad, activation, out)
    assert np.isnan(out).all()
