"""Refinement: coordinate descent lowers the output error that error feedback leaves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from cpu_kernels.all_kernels import all_kernels  # noqa: E402
from cpu_kernels.compilation import signature  # noqa: E402
from cpu_kernels.packed_rows.layout import GROUP_SIZE, level_offset  # noqa: E402
from cpu_kernels.threads.thread_pool import ThreadPool  # noqa: E402
from tritgguf.calibration.refinement import refine  # noqa: E402


class Problem:
    """A random matrix, moments of correlated inputs, and its nearest levels."""

    def __init__(self, rows: int, columns: int, depth: int, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        self.target = generator.standard_normal((rows, columns)).astype(np.float32)
        mixing = generator.standard_normal((columns, columns)) / np.sqrt(columns) + np.eye(columns)
        self.moments = (mixing @ mixing.T + 0.1 * np.eye(columns)).astype(np.float32)
        self.offset = np.float32(level_offset(depth))
        self.steps = (np.geomspace(0.5, 4, 27) / self.offset).astype(np.float32)
        self.indices = generator.integers(5, 22, (rows, columns // GROUP_SIZE)).astype(np.uint8)
        levels = np.clip(np.rint(self.target / self.step_of_each()), -self.offset, self.offset)
        self.levels = (levels + self.offset).astype(np.uint8)

    def step_of_each(self) -> np.ndarray:
        return np.repeat(self.steps[self.indices], GROUP_SIZE, axis=1)

    def errors(self) -> np.ndarray:
        """Return the output error of each row."""
        left = self.target - (self.levels - self.offset) * self.step_of_each()
        return np.einsum("ij,jk,ik->i", *(left.astype(np.float64), self.moments.astype(np.float64)), left)

    def refine(self, sweeps: int, threads: int = 2) -> None:
        target, moments = torch.from_numpy(self.target), torch.from_numpy(self.moments)
        refine(*(target, moments, self.levels, self.indices, self.steps, self.offset, sweeps), ThreadPool(threads))


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("columns", [64, 320])
def test_the_error_of_no_row_grows(depth: int, columns: int) -> None:
    problem = Problem(21, columns, depth)
    before = problem.errors()
    problem.refine(1)
    once = problem.errors()
    problem.refine(3)
    assert (once <= before * 1.0001).all()
    assert (problem.errors() <= once * 1.0001).all()
    assert once.sum() < 0.8 * before.sum()


def test_at_the_end_no_group_has_a_better_level() -> None:
    """A level one step away, in any single column, costs more once the descent has converged."""
    problem = Problem(6, 64, 2)
    problem.refine(30)
    least = problem.errors()
    levels = problem.levels.copy()
    for column in range(64):
        for change in (-1, 1):
            problem.levels = levels.copy()
            moved = np.clip(levels[:, column].astype(int) + change, 0, 2 * int(problem.offset))
            problem.levels[:, column] = moved
            # Rounding one column after the other is not exact within a group, so a level may be a little better.
            assert (problem.errors() >= least * 0.9).all()


def test_weights_whose_errors_overflow_stay() -> None:
    problem = Problem(70, 64, 2)
    problem.target *= np.float32(1e20)
    problem.steps *= np.float32(1e20)
    levels, indices = problem.levels.copy(), problem.indices.copy()
    problem.refine(1)
    np.testing.assert_array_equal(problem.levels, levels)
    np.testing.assert_array_equal(problem.indices, indices)


def test_the_kernel_is_the_one_that_is_made_ready() -> None:
    """Another order of an array's numbers would be another version, which the first conversion would wait for."""
    called = []

    class Pool(ThreadPool):
        def run(self, kernel: Any, *arguments: Any) -> list[Any]:
            types = tuple(signature.describe(argument, []) for argument in (*arguments, 0, 1))
            called.append(types in all_kernels(self.isa)[kernel])
            return super().run(kernel, *arguments)

    for columns in (16, 144):
        problem = Problem(5, columns, 2)
        refine(
            *(torch.from_numpy(problem.target), torch.from_numpy(problem.moments), problem.levels, problem.indices),
            *(problem.steps, problem.offset, 1, Pool(1)),
        )
    assert called == [True] * 3


def test_the_number_of_threads_changes_nothing() -> None:
    one, two = Problem(40, 128, 2), Problem(40, 128, 2)
    one.refine(2, threads=1)
    two.refine(2, threads=3)
    np.testing.assert_array_equal(one.levels, two.levels)
    np.testing.assert_array_equal(one.indices, two.indices)
