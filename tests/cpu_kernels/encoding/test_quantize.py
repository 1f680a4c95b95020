"""The encoder v2 against its specification, candidate by candidate and level by level."""

from __future__ import annotations

import naive
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from random_inputs import THREAD_POOL

from cpu_kernels.encoding.quantize import as_stored, best_candidates
from cpu_kernels.packed_rows.unpack import dequantize
from cpu_kernels.threads.thread_pool import ThreadPool
from tritgguf.formats.dtypes import to_float32
from tritgguf.formats.trit_types import DEPTHS
from tritgguf.quantization import v2
from tritgguf.quantization.quantized_matrix import QuantizedMatrix
from tritgguf.quantization.v2 import quantize

depths = pytest.mark.parametrize("depth", DEPTHS)
shapes = st.tuples(st.integers(1, 5), st.integers(1, 3).map(lambda blocks: 64 * blocks))


def gaussian(rows: int, columns: int, seed: int = 0, size: float = 1.0) -> np.ndarray:
    return (np.random.default_rng((seed, rows, columns)).standard_normal((rows, columns)) * size).astype(np.float32)


def decoded(matrix: QuantizedMatrix) -> np.ndarray:
    """Pack and dequantize a matrix."""
    return dequantize(matrix.pack(THREAD_POOL), matrix.codebook, matrix.depth)


def squared_error(weights: np.ndarray, matrix: QuantizedMatrix) -> float:
    return float(np.sum((weights.astype(np.float64) - decoded(matrix)) ** 2))


def assert_levels_are_nearest(weights: np.ndarray, matrix: QuantizedMatrix) -> None:
    """Assert that every level is the integer nearest to weight / step, clipped to h.

    If the quotient is halfway between two integers, within float32 rounding, both are accepted.
    """
    h = naive.largest_level(matrix.depth)
    steps = matrix.codebook / np.float32(h)
    step_of_weight = np.repeat(steps[matrix.scale_indices], 16, axis=1).astype(np.float64)
    quotients = np.clip(weights / step_of_weight, -h, h)
    distance = np.abs(quotients - (matrix.levels.astype(np.float64) - h))
    assert (distance <= 0.5 + 1e-6 * h).all()


def assert_follows_specification(weights: np.ndarray, matrix: QuantizedMatrix, scales: np.ndarray) -> None:
    """Assert that codebook, scale indices and levels follow from the groups' scales before rounding."""
    largest = float(np.abs(weights).max())
    expected = naive.log_spaced_codebook(scales, largest, v2.LOWEST_QUANTILE)
    np.testing.assert_allclose(matrix.codebook, expected, rtol=1e-6)
    assert matrix.codebook[-1] == np.float32(largest)
    assert (np.diff(matrix.codebook) >= 0).all()
    wanted = scales > 0
    logs = np.log(matrix.codebook.astype(np.float64))
    chosen = np.abs(np.log(scales[wanted].astype(np.float64)) - logs[matrix.scale_indices[wanted]])
    nearest = np.abs(np.log(scales[wanted].astype(np.float64))[:, None] - logs).min(axis=1)
    assert (chosen <= nearest + 1e-6).all()
    assert_levels_are_nearest(weights, matrix)


@depths
@given(
    shape=shapes,
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([1e-6, 0.02, 1.0, 1e4]),
    kind=st.sampled_from(["gaussian", "heavy tails", "sparse"]),
)
def test_follows_the_specification(depth: int, shape: tuple[int, int], seed: int, size: float, kind: str) -> None:
    weights = gaussian(*shape, seed=seed, size=size)
    if kind == "heavy tails":
        weights **= 3
    elif kind == "sparse":
        weights[np.random.default_rng(seed).random(shape) < 0.6] = 0
    scales, margins = naive.wanted_scales(weights, depth)
    # If the errors of two candidates are equal within float32 accuracy, the kernel may choose either.
    assume(margins.min() > 1e-4)
    kernel_scales = np.empty_like(scales)
    THREAD_POOL.run(best_candidates, *as_stored(weights), np.float32(naive.largest_level(depth)), kernel_scales)
    np.testing.assert_array_equal(kernel_scales, scales)
    assert_follows_specification(weights, quantize(weights, depth), scales)


@depths
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@given(shape=shapes, seed=st.integers(0, 2**32 - 1), size=st.sampled_from([1e-7, 0.02, 1e4]))
def test_halves_give_what_their_float32_gives(
    depth: int, dtype: str, shape: tuple[int, int], seed: int, size: float
) -> None:
    weights = gaussian(*shape, seed=seed, size=size)
    stored = weights.astype(np.float16) if dtype == "float16" else (weights.view(np.uint32) >> 16).astype(np.uint16)
    stored.flags.writeable = False
    expected, matrix = quantize(to_float32(stored), depth), quantize(stored, depth)
    np.testing.assert_array_equal(matrix.levels, expected.levels)
    np.testing.assert_array_equal(matrix.scale_indices, expected.scale_indices)
    np.testing.assert_array_equal(matrix.codebook, expected.codebook)
    assert (matrix.squared_error, matrix.squared_weights) == (expected.squared_error, expected.squared_weights)


@given(shape=shapes, seed=st.integers(0, 2**32 - 1))
def test_the_largest_magnitude_is_returned(shape: tuple[int, int], seed: int) -> None:
    weights = gaussian(*shape, seed=seed)
    scales = np.empty((shape[0], shape[1] // 16), np.float32)
    assert max(THREAD_POOL.run(best_candidates, *as_stored(weights), np.float32(4), scales)) == np.abs(weights).max()


def test_first_of_equal_candidates_wins() -> None:
    # Depth 1, six zeros, nine ones and a four: scale 1 has an error of 3 at the four, scale 4 of 1 at each one. Both
    # squared errors are 9.
    group = np.array([0] * 6 + [1] * 9 + [4], np.float32)
    scales = np.empty((1, 4), np.float32)
    best_candidates(*as_stored(np.tile(group, (1, 4))), np.float32(1), scales, 0, 1)
    np.testing.assert_array_equal(scales, np.ones((1, 4)))


@depths
def test_order_and_sign_within_a_group_do_not_matter(depth: int) -> None:
    weights = gaussian(1, 64)
    shuffled = weights.reshape(4, 16)[:, np.random.default_rng(0).permutation(16)].reshape(1, 64) * np.float32(-1)
    first, second = np.empty((1, 4), np.float32), np.empty((1, 4), np.float32)
    h = np.float32(naive.largest_level(depth))
    best_candidates(*as_stored(weights), h, first, 0, 1)
    best_candidates(*as_stored(shuffled), h, second, 0, 1)
    np.testing.assert_array_equal(first, second)


@depths
def test_lowest_entry_is_a_quantile_of_the_wanted_scales(depth: int) -> None:
    weights = gaussian(64, 1024) * np.geomspace(1e-3, 1, 64, dtype=np.float32)[:, None]
    scales, _ = naive.wanted_scales(weights, depth)
    rank = int(v2.LOWEST_QUANTILE * (scales.size - 1))
    assert quantize(weights, depth).codebook[0] == np.sort(scales, axis=None)[rank]
    assert 0 < rank < 0.05 * scales.size


@depths
def test_many_groups_follow_the_specification(depth: int) -> None:
    weights = gaussian(16, 512, seed=7, size=0.02)
    scales, margins = naive.wanted_scales(weights, depth)
    assert margins.min() > 1e-5
    assert_follows_specification(weights, quantize(weights, depth), scales)


@depths
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_changes_no_bit(depth: int, threads: int) -> None:
    weights = gaussian(7, 128)
    one, many = (
        quantize(weights, depth, thread_pool=ThreadPool(1)),
        quantize(weights, depth, thread_pool=ThreadPool(threads)),
    )
    np.testing.assert_array_equal(many.levels, one.levels)
    np.testing.assert_array_equal(many.scale_indices, one.scale_indices)
    np.testing.assert_array_equal(many.codebook, one.codebook)
    np.testing.assert_array_equal(many.pack(ThreadPool(threads)), one.pack(ThreadPool(1)))
    assert many.squared_error == pytest.approx(one.squared_error, rel=1e-12)


@depths
def test_reported_errors_are_those_of_the_decoded_weights(depth: int) -> None:
    weights = gaussian(9, 256)
    matrix = quantize(weights, depth)
    assert matrix.squared_error == pytest.approx(squared_error(weights, matrix), rel=1e-5)
    assert matrix.squared_weights == pytest.approx(np.sum(weights.astype(np.float64) ** 2), rel=1e-5)


def test_errors_shrink_with_depth_as_measured() -> None:
    # Relative errors of a Gaussian 256 x 2048 matrix (v2, measured when the codec was designed).
    weights = gaussian(256, 2048)
    for depth, expected in ((1, 0.415), (2, 0.1446), (3, 0.0473), (4, 0.0172)):
        matrix = quantize(weights, depth)
        assert np.sqrt(matrix.squared_error / matrix.squared_weights) == pytest.approx(expected, rel=0.05)


# -- special matrices


@depths
def test_groups_of_zeros_decode_to_zeros(depth: int) -> None:
    weights = gaussian(4, 128)
    weights[:, 16:48] = 0
    weights[2] = 0
    matrix = quantize(weights, depth)
    assert (decoded(matrix)[weights == 0] == 0).all()
    assert (decoded(matrix)[weights != 0] != 0).any()


@depths
def test_matrix_of_zeros(depth: int) -> None:
    matrix = quantize(np.zeros((3, 64), np.float32), depth)
    np.testing.assert_array_equal(matrix.codebook, np.zeros(27))
    np.testing.assert_array_equal(matrix.levels, np.full((3, 64), naive.largest_level(depth)))
    np.testing.assert_array_equal(decoded(matrix), np.zeros((3, 64)))
    assert matrix.squared_error == matrix.squared_weights == 0


@depths
def test_a_single_weight_survives_alone(depth: int) -> None:
    weights = np.zeros((2, 64), np.float32)
    weights[1, 20] = -3.0
    np.testing.assert_allclose(decoded(quantize(weights, depth)), weights, rtol=1e-6)


@depths
def test_an_outlier_does_not_harm_other_groups(depth: int) -> None:
    weights = gaussian(8, 256)
    clean = quantize(weights, depth)
    weights[3, 100] = 1000.0
    matrix = quantize(weights, depth)
    assert decoded(matrix)[3, 100] == pytest.approx(1000.0, rel=1e-6)
    others = np.ones(weights.shape, bool)
    others[3, 96:112] = False
    error, power = ((values[others].astype(np.float64) ** 2).sum() for values in (weights - decoded(matrix), weights))
    # The codebook now spans three more decades with the same number of entries: a scale's error is up to a sixth.
    assert np.sqrt(error / power) < np.sqrt(clean.squared_error / clean.squared_weights) + 0.08


@depths
@pytest.mark.parametrize("exponent", [-17, -9, 9, 17])
def test_the_size_of_the_weights_does_not_matter(depth: int, exponent: int) -> None:
    weights = gaussian(4, 128)
    factor = np.float32(2.0 ** round(exponent * 3.3219))  # exact, so that nothing but the range changes
    expected, matrix = quantize(weights, depth), quantize(weights * factor, depth)
    np.testing.assert_allclose(matrix.codebook, expected.codebook * factor, rtol=1e-6)
    np.testing.assert_array_equal(matrix.levels, expected.levels)
    np.testing.assert_array_equal(matrix.scale_indices, expected.scale_indices)
    relative = np.sqrt(expected.squared_error / expected.squared_weights)
    assert np.sqrt(matrix.squared_error / matrix.squared_weights) == pytest.approx(relative, rel=1e-4)


@depths
@pytest.mark.parametrize("value", [1e-45, 1e-38, 1e-30, 1e-29, 1e30, 3e38])
def test_weights_at_the_edge_of_float32(depth: int, value: float) -> None:
    weights = gaussian(2, 64)
    weights = (weights / np.abs(weights).max() * value).astype(np.float32)
    matrix = quantize(weights, depth)
    assert np.isfinite(matrix.codebook).all()
    assert np.isfinite(decoded(matrix)).all()
    assert np.abs(decoded(matrix)).max() <= np.float32(value) * 1.001


@depths
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [(0, 0), (1, 77), (2, 127)])
def test_nan_and_infinity_are_refused(depth: int, bad: float, place: tuple[int, int]) -> None:
    weights = gaussian(3, 128)
    weights[place] = bad
    for stored in (weights, weights.astype(np.float16), (weights.view(np.uint32) >> 16).astype(np.uint16)):
        with pytest.raises(ValueError, match="NaN or infinite"):
            quantize(stored, depth)


@depths
@given(shape=shapes, seed=st.integers(0, 2**32 - 1))
def test_quantizing_again_loses_no_more(depth: int, shape: tuple[int, int], seed: int) -> None:
    weights = gaussian(*shape, seed=seed)
    first = quantize(weights, depth)
    once = decoded(first)
    again = quantize(once, depth)
    assert squared_error(once, again) <= squared_error(weights, first)


@depths
def test_a_grid_is_reproduced(depth: int) -> None:
    # The weights are levels of one scale, and every group has the largest level: quantization is lossless.
    h = naive.largest_level(depth)
    levels = np.random.default_rng(depth).integers(-h, h + 1, (4, 128))
    levels[:, ::16] = h
    weights = (levels * np.float32(0.5 / h)).astype(np.float32)
    np.testing.assert_allclose(decoded(quantize(weights, depth)), weights, atol=1e-6)
