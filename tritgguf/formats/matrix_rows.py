"""A source's matrix, some rows at a time: one that is too large to hold is never whole in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

_WEIGHTS_HELD = 1 << 26  # of a matrix that is read as a whole
_WEIGHTS_AT_ONCE = 1 << 24  # of a larger one


@dataclass(frozen=True)
class MatrixRows:
    """A matrix in the numbers that its source stores, read when they are asked for.

    Attributes:
        shape: rows and columns; a vector is a single row.
        dtype: float32, float16, or uint16, which stands for the bits of bfloat16.
        read: returns rows, [rows, columns] and contiguous, by the first one and the one behind the last.
        multiple: how many rows belong together: `read` takes multiples of this, or the last row.

    """

    shape: tuple[int, int]
    dtype: np.dtype
    read: Callable[[int, int], np.ndarray]
    multiple: int

    @classmethod
    def of(cls, weights: np.ndarray) -> MatrixRows:
        """Return a matrix [rows, columns] that is in memory, to be read at once."""
        rows, columns = weights.shape
        return cls((rows, columns), weights.dtype, lambda first, last: weights[first:last], rows)

    def whole(self) -> np.ndarray:
        """Read all rows."""
        return self.read(0, self.shape[0])

    def held(self) -> MatrixRows:
        """Read the matrix as a whole, unless it is too large to be held."""
        return MatrixRows.of(self.whole()) if math.prod(self.shape) <= _WEIGHTS_HELD else self

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield all rows in their order, in blocks; while the caller has one, a thread reads the next."""
        rows, columns = self.shape
        step = -(-max(1, _WEIGHTS_AT_ONCE // columns) // self.multiple) * self.multiple
        if step >= rows:
            yield self.whole()
            return
        with ThreadPoolExecutor(1, thread_name_prefix="rows") as reader:
            following = reader.submit(self.read, 0, step)
            for first in range(step, rows + step, step):
                block = following.result()
                if first < rows:
                    following = reader.submit(self.read, first, min(first + step, rows))
                yield block
                del block

    def parts_with(self, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Yield what has to be read to see some rows: the first row's number and the rows, in ascending order."""
        for part in np.unique(rows // self.multiple).tolist():
            first = part * self.multiple
            yield first, self.read(first, min(first + self.multiple, self.shape[0]))
