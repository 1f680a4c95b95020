"""The exhaustive scale search against the formula in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpu_kernels.encoding.search import best_scales, round_to_best
from cpu_kernels.packed_rows.layout import GROUP_SIZE, level_offset
from cpu_kernels.threads.thread_pool import ThreadPool
from tritgguf.formats.trit_types import DEPTHS

depths = pytest.mark.parametrize("depth", DEPTHS)
shapes = st.tuples(st.integers(1, 5), st.integers(1, 40))
emphases = st.booleans()
seeds = st.integers(0, 1 << 30)


def random_problem(shape: tuple[int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return weights [rows, columns] and importance [columns]."""
    generator = np.random.default_rng(seed)
    rows, columns = shape[0], shape[1] * GROUP_SIZE
    weights = generator.standard_normal((rows, columns)) * np.exp(generator.standard_normal((rows, columns)))
    return weights.astype(np.float32), np.exp(generator.standard_normal(columns)).astype(np.float32)


def weighted_errors(
    weights: np.ndarray, importance: np.ndarray, emphasis: bool, steps: np.ndarray, offset: int
) -> np.ndarray:
    """Return each group's weighted squared error with its step, float64 [rows, groups]."""
    groups = weights.astype(np.float64).reshape(len(weights), -1, GROUP_SIZE)
    squares = groups**2
    factors = np.sqrt(squares + squares.mean(-1, keepdims=True) / 2) if emphasis else np.ones(1)
    step = np.broadcast_to(steps, groups.shape[:2])[..., np.newaxis].astype(np.float64)
    levels = np.clip(np.rint(np.divide(groups, step, out=np.zeros_like(groups), where=step > 0)), -offset, offset)
    return ((groups - levels * step) ** 2 * factors * importance.reshape(-1, GROUP_SIZE)).sum(-1)


@depths
@given(shape=shapes, emphasis=emphases, seed=seeds)
def test_no_entry_is_better_than_the_chosen_one(depth: int, shape: tuple[int, int], emphasis: bool, seed: int) -> None:
    weights, importance = random_problem(shape, seed)
    offset = level_offset(depth)
    steps = (np.geomspace(0.05, np.abs(weights).max(), 27) / offset).astype(np.float32)
    levels = np.empty(weights.shape, np.uint8)
    indices = np.empty((len(weights), weights.shape[1] // GROUP_SIZE), np.uint8)
    sums = ThreadPool(2).run(round_to_best, weights, importance, emphasis, steps, np.float32(offset), levels, indices)
    by_entry = np.array([weighted_errors(weights, importance, emphasis, step, offset) for step in steps])
    chosen = np.take_along_axis(by_entry, indices[np.newaxis].astype(int), 0)[0]
    np.testing.assert_allclose(chosen, by_entry.min(0), rtol=1e-4, atol=1e-10)

    step = np.repeat(steps[indices], GROUP_SIZE, 1)
    np.testing.assert_array_equal(levels, np.clip(np.rint(weights / step), -offset, offset) + offset)
    error, power = np.sum(sums, axis=0)
    decoded = (levels.astype(np.float64) - offset) * step
    np.testing.assert_allclose(error, ((weights - decoded) ** 2).sum(), rtol=1e-4)
    np.testing.assert_allclose(power, (weights.astype(np.float64) ** 2).sum(), rtol=1e-9)


@depths
@given(shape=shapes, emphasis=emphases, seed=seeds)
def test_no_fraction_is_better_than_the_chosen_one(
    depth: int, shape: tuple[int, int], emphasis: bool, seed: int
) -> None:
    weights, importance = random_problem(shape, seed)
    weights[0, :GROUP_SIZE] = 0
    offset = level_offset(depth)
    fractions = np.linspace(0.5, 1, 6, dtype=np.float32)
    scales = np.zeros((len(weights), weights.shape[1] // GROUP_SIZE), np.float32)
    ThreadPool(2).run(best_scales, weights, importance, emphasis, fractions, np.float32(offset), scales)
    largest = np.abs(weights).reshape(*scales.shape, GROUP_SIZE).max(-1)
    by_fraction = np.array(
        [weighted_errors(weights, importance, emphasis, largest * f / offset, offset) for f in fractions]
    )
    chosen = weighted_errors(weights, importance, emphasis, scales / offset, offset)
    np.testing.assert_allclose(chosen, by_fraction.min(0), rtol=1e-3, atol=1e-10)
    assert scales[0, 0] == 0


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_changes_no_bit(threads: int) -> None:
    weights, importance = random_problem((7, 20), 1)
    steps = np.geomspace(0.01, 1, 27).astype(np.float32)
    found = []
    for thread_pool in (ThreadPool(1), ThreadPool(threads)):
        levels, indices = np.empty(weights.shape, np.uint8), np.empty((7, 20), np.uint8)
        thread_pool.run(round_to_best, weights, importance, True, steps, np.float32(4), levels, indices)
        found.append((levels, indices))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    np.testing.assert_array_equal(found[0][1], found[1][1])
