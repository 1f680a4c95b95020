"""Error feedback: the kernel against the formula, and the whole against plain rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cpu_kernels.encoding.error_feedback import quantize_columns
from cpu_kernels.packed_rows.layout import GROUP_SIZE, level_offset
from cpu_kernels.threads.thread_pool import ThreadPool
from tritgguf.calibration.error_feedback import Feedback, InputMoments, _factor_of_inverse
from tritgguf.formats.matrix_rows import MatrixRows
from tritgguf.formats.trit_types import DEPTHS
from tritgguf.quantization.scale_search import quantize_searched

THREAD_POOL = ThreadPool(2)
depths = pytest.mark.parametrize("depth", DEPTHS)


def naive_columns(
    weights: np.ndarray, factor: np.ndarray, steps: np.ndarray, offset: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return levels, indices, errors and the costs by entry, in float64, row by row."""
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
    # Where float32 and float64 round a weight to different levels, or two steps cost the same, the rows part.
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
    """Return moments of correlated inputs, those inputs and the original ones, both [n, columns]."""
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
    """Return inputs and original ones that differ by noise, of which there is nothing to learn, [count, columns]."""
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
    with_feedback = Feedback(moments).quantize(weights, depth, THREAD_POOL)
    importance = np.square(inputs).mean(0)
    (alone,) = quantize_searched(MatrixRows.of(weights), depth, THREAD_POOL, importance=importance).parts
    errors = [output_error(weights, q.decoded(), inputs, original) for q in (with_feedback, alone)]
    assert errors[0] < 0.8 * errors[1]
    decoded = with_feedback.decoded()
    assert with_feedback.squared_error == pytest.approx(np.square(weights - decoded, dtype=np.float64).sum())


def test_a_shift_of_the_inputs_is_repaired() -> None:
    moments, inputs, original = random_moments(128, 3, drift=3.0)
    weights = np.random.default_rng(8).standard_normal((32, 128)).astype(np.float32)
    repaired = Feedback(moments).quantize(weights, 4, THREAD_POOL)
    ignored = Feedback(moments, repairs=False).quantize(weights, 4, THREAD_POOL)
    errors = [output_error(weights, q.decoded(), inputs, original) for q in (repaired, ignored)]
    assert errors[0] < 0.5 * errors[1]


def few_and_others() -> tuple[InputMoments, tuple[np.ndarray, np.ndarray]]:
    """Return moments of hardly more inputs than they have columns, and many others of their kind."""
    inputs, original = noisy_inputs(256, 300, 1)
    moments = InputMoments(256)
    moments.add(torch.from_numpy(inputs), torch.from_numpy(original))
    return moments, noisy_inputs(256, 4096, 2)


@pytest.mark.parametrize("depth", [1, 2])
def test_feedback_does_not_fit_few_inputs(depth: int) -> None:
    moments, others = few_and_others()
    weights = np.random.default_rng(7).standard_normal((32, 256)).astype(np.float32)
    damped = Feedback(moments, repairs=False).quantize(weights, depth, THREAD_POOL)
    fitted = Feedback(moments, repairs=False, damping_of_few=0.0).quantize(weights, depth, THREAD_POOL)
    errors = [output_error(weights, q.decoded(), *others) for q in (damped, fitted)]
    assert errors[0] < 0.95 * errors[1]


@depths
def test_what_is_repaired_helps_on_other_inputs(depth: int) -> None:
    moments, others = few_and_others()
    weights = np.random.default_rng(7).standard_normal((32, 256)).astype(np.float32)
    repaired = Feedback(moments, damping_of_few=0.0).quantize(weights, depth, THREAD_POOL)
    ignored = Feedback(moments, damping_of_few=0.0, repairs=False).quantize(weights, depth, THREAD_POOL)
    errors = [output_error(weights, q.decoded(), *others) for q in (repaired, ignored)]
    assert errors[0] < 1.02 * errors[1]


@pytest.mark.parametrize("alone", [False, True])
def test_share_of_the_repair_is_that_of_inputs_held_out(alone: bool) -> None:
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
        np.testing.assert_allclose(moments.mean_second(held_out=all_inputs).numpy(), mean, atol=1e-4)
    fitted += 0.2 * fitted.diagonal().mean() * np.eye(256)
    shift = (x_original - x)[~held_out].T @ x[~held_out] / (~held_out).sum()
    wanted, found = ((x_original - x) @ weights.T)[held_out], x[held_out] @ (weights @ shift @ np.linalg.inv(fitted)).T
    expected = (wanted * found).sum() / np.square(found).sum()
    target = torch.from_numpy(weights)
    share = Feedback(moments, damping=0.2, damping_of_few=0.0)._share(target, moments.mean_loss(target))
    assert 0.1 < expected < 0.9
    assert share == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("rows", [16, 63, 64, 200])
def test_what_a_matrix_alone_has_lost_is_the_same(rows: int) -> None:
    weights = np.random.default_rng(rows).standard_normal((rows, 128)).astype(np.float32)
    shared, inputs, original = random_moments(128, 3, drift=3.0)
    alone, _, _ = random_moments(128, 3, drift=3.0, matrix=weights)
    expected = (original - inputs).astype(np.float64) @ weights.T.astype(np.float64)
    expected = expected.T @ inputs / len(inputs)
    for moments in (shared, alone):
        found = moments.mean_loss(torch.from_numpy(weights)).numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("columns", [1, 1024, 1025, 2500])
def test_factor_of_the_inverse(columns: int) -> None:
    roots = torch.from_numpy(np.random.default_rng(columns).standard_normal((columns, columns)).astype(np.float32))
    matrix = roots @ roots.T / columns + torch.eye(columns)
    factor = _factor_of_inverse(matrix)
    assert not factor.tril(-1).any()
    torch.testing.assert_close(factor.T @ factor @ matrix, torch.eye(columns), rtol=0, atol=1e-4)


def test_inputs_of_zeros_leave_plain_rounding() -> None:
    weights = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    moments = InputMoments(64)
    moments.add(torch.zeros(5, 64), torch.zeros(5, 64))
    found = Feedback(moments).quantize(weights, 3, THREAD_POOL)
    (expected,) = quantize_searched(MatrixRows.of(weights), 3, THREAD_POOL, importance=np.ones(64, np.float32)).parts
    np.testing.assert_array_equal(found.levels, expected.levels)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_is_refused(bad: float) -> None:
    moments, _, _ = random_moments(64, 0)
    weights = np.ones((2, 64), np.float32)
    weights[1, 5] = bad
    with pytest.raises(ValueError, match="has a weight that is NaN or infinite"):
        Feedback(moments).quantize(weights, 2, THREAD_POOL)
    moments.add(torch.full((5, 64), bad), torch.zeros(5, 64))
    with pytest.raises(ValueError, match="has inputs that are NaN or infinite"):
        Feedback(moments)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_of_the_kernel_change_nothing(threads: int) -> None:
    moments, _, _ = random_moments(128, 5)
    weights = np.random.default_rng(1).standard_normal((50, 128)).astype(np.float32)
    one, many = (Feedback(moments).quantize(weights, 2, ThreadPool(n)) for n in (2, threads))
    np.testing.assert_array_equal(one.levels, many.levels)
    np.testing.assert_array_equal(one.codebook, many.codebook)
