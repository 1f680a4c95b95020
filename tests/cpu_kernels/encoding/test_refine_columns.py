"""`refine_columns` against coordinate descent written plainly in float64."""

from __future__ import annotations

import numpy as np
import pytest

from cpu_kernels.encoding.refinement import SecondMoments, refine_columns
from cpu_kernels.packed_rows.layout import GROUP_SIZE
from cpu_kernels.threads.thread_pool import ThreadPool

COLUMNS = 96
OFFSET = 4


def quantize(values: np.ndarray, moments: np.ndarray, steps: np.ndarray) -> tuple[float, int, np.ndarray]:
    """Return the cost, the entry and the levels of one row's group: column by column, with feedback, for each step."""
    factor = np.linalg.cholesky(np.linalg.inv(moments)).T
    results = []
    for entry, step in enumerate(steps):
        left, levels, cost = values.copy(), np.zeros(GROUP_SIZE), 0.0
        for j in range(GROUP_SIZE):
            levels[j] = np.clip(np.rint(left[j] / step), -OFFSET, OFFSET)
            error = (left[j] - levels[j] * step) / factor[j, j]
            left[j + 1 :] -= error * factor[j, j + 1 :]
            cost += error**2
        results.append((cost, entry, levels))
    return min(results, key=lambda result: result[0])


def decode(levels: np.ndarray, indices: np.ndarray, steps: np.ndarray) -> np.ndarray:
    decoded: np.ndarray = (levels.astype(float) - OFFSET) * np.repeat(steps[indices], GROUP_SIZE, axis=1)
    return decoded


@pytest.mark.parametrize(("rows", "threads"), [(1, 1), (70, 2), (130, 3)])
def test_it_is_coordinate_descent(rows: int, threads: int) -> None:
    generator = np.random.default_rng(rows)
    target = generator.standard_normal((rows, COLUMNS))
    mixing = generator.standard_normal((COLUMNS, COLUMNS)) / np.sqrt(COLUMNS) + np.eye(COLUMNS)
    moments = mixing @ mixing.T + 0.1 * np.eye(COLUMNS)
    steps = np.geomspace(0.2, 2, 27) / OFFSET
    indices = generator.integers(5, 22, (rows, COLUMNS // GROUP_SIZE)).astype(np.uint8)
    levels = generator.integers(0, 2 * OFFSET + 1, (rows, COLUMNS)).astype(np.uint8)
    first, last = 32, 80  # the groups before and after stay
    groups = [slice(at, at + GROUP_SIZE) for at in range(0, COLUMNS, GROUP_SIZE)]
    inverses = np.stack([np.linalg.inv(moments[group, group]) for group in groups])
    factors = np.stack([np.linalg.cholesky(inverse).T for inverse in inverses])

    decoded = decode(levels, indices, steps)
    gradient = (target - decoded) @ moments
    found_levels, found_indices = levels.copy(), indices.copy()
    changes = np.empty((rows, last - first), np.float32)
    second = SecondMoments(*(np.ascontiguousarray(array, np.float32) for array in (moments, inverses, factors)))
    ThreadPool(threads).run(
        *(refine_columns, gradient.astype(np.float32), second, first, steps.astype(np.float32), np.float32(OFFSET)),
        *(found_levels, found_indices, changes),
    )
    found = decode(found_levels, found_indices, steps)

    expected = decoded.copy()
    for row in range(rows):
        for group in groups[first // GROUP_SIZE : last // GROUP_SIZE]:
            own, old = moments[group, group], expected[row, group]
            left = ((target[row] - expected[row]) @ moments)[group] @ np.linalg.inv(own)
            cost, entry, of_group = quantize(old + left, own, steps)
            if cost < left @ own @ left * (1 - 1e-5):
                expected[row, group] = of_group * steps[entry]
                levels[row, group], indices[row, group.start // GROUP_SIZE] = of_group + OFFSET, entry
    np.testing.assert_array_equal(found_levels, levels)
    np.testing.assert_array_equal(found_indices, indices)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(changes, (decoded - expected)[:, first:last], atol=1e-5)
    assert (found != decoded).mean() > 0.3
