"""Error feedback: the kernel against the formula, and the whole method against plain rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cpu_kernels.encoding.error_feedback import quantize_columns
from cpu_kernels.packed_rows.layout import GROUP_SIZE, level_offset
from cpu_kernels.threads.thread_pool import ThreadPool
from tritgguf.calibration.error_feedback import ErrorFeedback, _inverse_cholesky
from tritgguf.calibration.input_moments import InputMoments
from tritgguf.formats.matrix_rows import MatrixRows
from tritgguf.formats.trit_types import DEPTHS
from tritgguf.quantization.scale_search import quantize_searched

THREAD_POOL = ThreadPool(2)
depths = pytest.mark.parametrize("depth", DEPTHS)


def naive_columns(
    weights: np.ndarray, factor: np.ndarray, steps: np.ndarray, offset: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Compute levels, indices, errors, and the cost of every codebook entry, in float64, row by row."""
    rows, columns = weights.shape
    levels, errors = np.zeros((rows, columns)), np.zeros((rows, columns))
    indices, costs = np.zeros((rows, columns // 16), int), np.zeros((rows, columns // 16, len(steps)))
    for row in range(rows):
        left = weights[row].astype(np.float64)
        for group in range(columns // 16):
            first = group * 16
            tried = []
            for step in steps.astype(np.float64):
                trial, trial_levels, trial_errors = left.copy(), [], []
                for j in range(first, first + 16):
                    level = np.clip(np.rint(trial[j] / step), -offset, offset)
                    error = (trial[j] - level * step) / factor[j, j]
                    trial[j:] -= error * factor[j, j:]
                    trial_levels.append(level)
                    trial_errors.append(error)
                tried.append((float(np.square(trial_errors).sum()), trial, trial_levels, trial_errors))
            costs[row, group] = [cost for cost, *_ in tried]
            indices[row, group] = int(np.argmin(costs[row, group]))
            _, left, levels[row, first : first + 16], errors[row, first : first + 16] = tried[indices[row, group]]
    return levels + offset, indices, errors, costs


@depths
@given(rows=st.integers(1, 20), groups=st.integers(1, 3), seed=st.integers(0, 1 << 30))
def test_columns_follow_the_formula(depth: int, rows: int, groups: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    columns = GROUP_SIZE * groups
    weights = generator.standard_normal((rows, columns)).astype(np.float32)
    factor = np.triu(0.1 * generator.standard_normal((columns, columns))) + np.diag(generator.uniform(1, 2, columns))
    factor = factor.astype(np.float32)
    offset = level_offset(depth)
    steps = (np.geomspace(0.5, 3, 5) / offset).astype(np.float32)
    levels, errors = np.empty(weights.shape, np.uint8), np.empty_like(weights)
    indices = np.empty((rows, groups), np.uint8)
    THREAD_POOL.run(quantize_columns, weights, factor, steps, np.float32(offset), levels, indices, errors)
    expected_levels, expected_indices, expected_errors, costs = naive_columns(weights, factor, steps, offset)
    # A row may differ if float32 and float64 round a weight to different levels, or if two steps cost the same.
    same = (levels == expected_levels).all(1) & (indices == expected_indices).all(1)
    np.testing.assert_allclose(errors[same], expected_errors[same], rtol=1e-3, atol=1e-4)
    assert same.mean() > 0.5 or rows < 6
    for row in np.flatnonzero(~same):
        group = int(np.flatnonzero((levels[row] != expected_levels[row]).reshape(groups, 16).any(1))[0])
        least = np.sort(costs[row, group])[0]
        assert costs[row, group, indices[row, group]] <= least * 1.2 + 1e-6


def random_moments(
    columns: int, seed: int, *, drift: float = 0.0, matrix: np.ndarray | None = None
) -> tuple[InputMoments, np.ndarray, np.ndarray]:
    """Return moments of correlated inputs, these inputs and the original inputs, both [n, columns]."""
    generator = np.random.default_rng(seed)
    mixing = generator.standard_normal((columns, columns)) / np.sqrt(columns) + np.eye(columns)
    mixing *= np.exp(generator.standard_normal(columns))
    original = (generator.standard_normal((32 * columns, columns)) @ mixing).astype(np.float32)
    inputs = original + drift * (original @ generator.standard_normal((columns, columns)).astype(np.float32) / columns)
    moments = InputMoments(columns, matrix)
    for part, part_original in zip(np.split(inputs, 4), np.split(original, 4), strict=True):
        moments.add(torch.from_numpy(part), torch.from_numpy(part_original))
    return moments, inputs, original


def noisy_inputs(columns: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return inputs and original inputs, [count, columns], that differ by noise, which cannot be corrected."""
    generator = np.random.default_rng(seed)
    original = generator.standard_normal((count, columns)).astype(np.float32)
    return original + np.float32(0.3) * generator.standard_normal((count, columns)).astype(np.float32), original


def output_error(weights: np.ndarray, decoded: np.ndarray, inputs: np.ndarray, original: np.ndarray) -> float:
    wanted = original @ weights.T
    return float(np.square(inputs @ decoded.T - wanted).sum() / np.square(wanted).sum())


@depths
def test_output_is_closer_than_with_importance_alone(depth: int) -> None:
    moments, inputs, original = random_moments(192, depth)
    weights = np.random.default_rng(9).standard_normal((40, 192)).astype(np.float32)
    with_feedback = ErrorFeedback(moments).quantize(weights, depth, THREAD_POOL)
    importance = np.square(inputs).mean(0)
    (alone,) = quantize_searched(MatrixRows.of(weights), depth, THREAD_POOL, importance=importance).parts
    errors = [output_error(weights, q.decoded(), inputs, original) for q in (with_feedback, alone)]
    assert errors[0] < 0.8 * errors[1]
    decoded = with_feedback.decoded()
    assert with_feedback.squared_error == pytest.approx(np.square(weights - decoded, dtype=np.float64).sum())


def test_a_shift_of_the_inputs_is_corrected() -> None:
    moments, inputs, original = random_moments(128, 3, drift=3.0)
    weights = np.random.default_rng(8).standard_normal((32, 128)).astype(np.float32)
    corrected = ErrorFeedback(moments).quantize(weights, 4, THREAD_POOL)
    ignored = ErrorFeedback(moments, correction=False).quantize(weights, 4, THREAD_POOL)
    errors = [output_error(weights, q.decoded(), inputs, original) for q in (corrected, ignored)]
    assert errors[0] < 0.5 * errors[1]


def few_and_others() -> tuple[InputMoments, tuple[np.ndarray, np.ndarray]]:
    """Return moments of few inputs, hardly more than columns, and many other inputs of the same distribution."""
    inputs, original = noisy_inputs(256, 300, 1)
    moments = InputMoments(256)
    moments.add(torch.from_numpy(inputs), torch.from_numpy(original))
    return moments, noisy_inputs(256, 4096, 2)


@pytest.mark.parametrize("depth", [1, 2])
def test_damping_prevents_overfitting_to_few_inputs(depth: int) -> None:
    moments, others = few_and_others()
    weights = np.random.default_rng(7).standard_normal((32, 256)).astype(np.float32)
    damped = ErrorFeedback(moments, correction=False).quantize(weights, depth, THREAD_POOL)
    fitted = ErrorFeedback(moments, correction=False, few_inputs_damping=0.0).quantize(weights, depth, THREAD_POOL)
    errors = [output_error(weights, q.decoded(), *others) for q in (damped, fitted)]
    assert errors[0] < 0.95 * errors[1]


@depths
def test_the_correction_helps_on_other_inputs(depth: int) -> None:
    moments, others = few_and_others()
    weights = np.random.default_rng(7).standard_normal((32, 256)).astype(np.float32)
    corrected = ErrorFeedback(moments, few_inputs_damping=0.0).quantize(weights, depth, THREAD_POOL)
    ignored = ErrorFeedback(moments, few_inputs_damping=0.0, correction=False).quantize(weights, depth, THREAD_POOL)
    errors = [output_error(weights, q.decoded(), *others) for q in (corrected, ignored)]
    assert errors[0] < 1.02 * errors[1]


@pytest.mark.parametrize("alone", [False, True])
def test_the_correction_factor_is_fitted_to_held_out_inputs(alone: bool) -> None:
    weights = np.random.default_rng(7).standard_normal((96, 256)).astype(np.float32)
    parts = [noisy_inputs(256, rows, rows) for rows in (301, 402, 3)]
    moments = InputMoments(256, weights if alone else None)
    for inputs, original in parts:
        moments.add(torch.from_numpy(inputs), torch.from_numpy(original))
    held_out = np.concatenate([np.arange(len(inputs)) >= len(inputs) - len(inputs) // 4 for inputs, _ in parts])
    x, x_original = (np.concatenate(side).astype(np.float64) for side in zip(*parts, strict=True))
    second = x.T @ x / len(x)
    fitted = x[~held_out].T @ x[~held_out] / (~held_out).sum()
    for all_inputs, mean in ((True, second), (False, fitted)):
        np.testing.assert_allclose(moments.mean(held_out=all_inputs).take_second(), mean, atol=1e-4)
    fitted += 0.2 * fitted.diagonal().mean() * np.eye(256)
    shift = (x_original - x)[~held_out].T @ x[~held_out] / (~held_out).sum()
    wanted, found = ((x_original - x) @ weights.T)[held_out], x[held_out] @ (weights @ shift @ np.linalg.inv(fitted)).T
    expected = (wanted * found).sum() / np.square(found).sum()
    target = torch.from_numpy(weights)
    feedback = ErrorFeedback(moments, damping=0.2, few_inputs_damping=0.0)
    factor = feedback._correction_factor(target)
    assert 0.1 < expected < 0.9
    assert factor == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("copy", [True, False])
def test_inputs_that_the_caller_keeps_are_not_copied(copy: bool) -> None:
    inputs, original = (torch.from_numpy(side) for side in noisy_inputs(256, 300, 1))
    moments = InputMoments(256)
    moments.add(inputs, original, copy=copy)
    expected = moments.mean().take_second()
    inputs.zero_()
    assert torch.equal(moments.mean().take_second(), expected) == copy


def test_a_factor_that_is_no_longer_needed_is_forgotten() -> None:
    weights = np.random.default_rng(4).standard_normal((32, 128)).astype(np.float32)
    quantized = {}
    for alone in (False, True):
        moments, _, _ = random_moments(128, 3, drift=3.0, matrix=weights if alone else None)
        feedback = ErrorFeedback(moments)
        quantized[alone] = feedback.quantize(weights, 2, THREAD_POOL)
        assert ("factor" in vars(feedback._inputs)) != alone
    again = feedback.quantize(weights, 2, THREAD_POOL)
    np.testing.assert_array_equal(again.levels, quantized[True].levels)


def test_the_error_of_the_stream_is_corrected_as_far_as_the_inputs_tell() -> None:
    generator = np.random.default_rng(5)
    weights, of_inputs = (generator.standard_normal((96, 256)).astype(np.float32) for _ in range(2))
    inputs, original = noisy_inputs(256, 4096, 1)
    noise = 16 * generator.standard_normal((4096, 96)).astype(np.float32)
    stream = 0.5 * inputs @ of_inputs.T + noise
    quantized = []
    for added in (None, stream):
        moments = InputMoments(256, weights, with_outputs=added is not None)
        for part in np.array_split(np.arange(4096), 3):
            x, x_original = torch.from_numpy(inputs[part]), torch.from_numpy(original[part])
            outputs = (
                None if added is None else x_original @ torch.from_numpy(weights).T + torch.from_numpy(added[part])
            )
            moments.add(x, x_original, outputs=outputs)
        quantized.append(ErrorFeedback(moments).quantize(weights, 3, THREAD_POOL).decoded())
    wanted = original @ weights.T + stream - noise
    without, with_stream = (np.square(inputs @ decoded.T - wanted).sum() for decoded in quantized)
    assert with_stream < 0.6 * without


@pytest.mark.parametrize("rows", [16, 63, 64, 200])
def test_output_error_of_a_single_matrix_is_the_same(rows: int) -> None:
    weights = np.random.default_rng(rows).standard_normal((rows, 128)).astype(np.float32)
    shared, inputs, original = random_moments(128, 3, drift=3.0)
    alone, _, _ = random_moments(128, 3, drift=3.0, matrix=weights)
    expected = (original - inputs).astype(np.float64) @ weights.T.astype(np.float64)
    expected = expected.T @ inputs / len(inputs)
    for moments in (shared, alone):
        found = moments.mean().output_error(torch.from_numpy(weights))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("columns", [1, 1024, 1025, 2500])
def test_inverse_cholesky(columns: int) -> None:
    roots = torch.from_numpy(np.random.default_rng(columns).standard_normal((columns, columns)).astype(np.float32))
    matrix = roots @ roots.T / columns + torch.eye(columns)
    factor = _inverse_cholesky(matrix)
    assert not factor.tril(-1).any()
    torch.testing.assert_close(factor.T @ factor @ matrix, torch.eye(columns), rtol=0, atol=1e-4)


def test_zero_inputs_give_plain_rounding() -> None:
    weights = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    moments = InputMoments(64)
    moments.add(torch.zeros(5, 64), torch.zeros(5, 64))
    found = ErrorFeedback(moments).quantize(weights, 3, THREAD_POOL)
    (expected,) = quantize_searched(MatrixRows.of(weights), 3, THREAD_POOL, importance=np.ones(64, np.float32)).parts
    np.testing.assert_array_equal(found.levels, expected.levels)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_are_rejected(bad: float) -> None:
    moments, _, _ = random_moments(64, 0)
    weights = np.ones((2, 64), np.float32)
    weights[1, 5] = bad
    with pytest.raises(ValueError, match="has a weight that is NaN or infinite"):
        ErrorFeedback(moments).quantize(weights, 2, THREAD_POOL)
    moments.add(torch.full((5, 64), bad), torch.zeros(5, 64))
    with pytest.raises(ValueError, match="has inputs that are NaN or infinite"):
        ErrorFeedback(moments)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_does_not_change_the_result(threads: int) -> None:
    moments, _, _ = random_moments(128, 5)
    weights = np.random.default_rng(1).standard_normal((50, 128)).astype(np.float32)
    one, many = (ErrorFeedback(moments).quantize(weights, 2, ThreadPool(n)) for n in (2, threads))
    np.testing.assert_array_equal(one.levels, many.levels)
    np.testing.assert_array_equal(one.codebook, many.codebook)
