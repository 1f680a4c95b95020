"""Access to a source's matrix by rows, so that a large matrix is never in memory as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

_MAX_WEIGHTS_IN_MEMORY = 1 << 26  # a larger matrix is read in blocks
_WEIGHTS_PER_BLOCK = 1 << 24


@dataclass(frozen=True)
class MatrixRows:
    """A matrix in the dtype of its source, read on demand.

    Attributes:
        shape: rows and columns; a vector is a single row.
        dtype: float32, float16, or uint16 for the bits of bfloat16.
        read: returns rows `first` to `last` (exclusive): [rows, columns], contiguous.
        multiple: `first` and `last` must be multiples of this; `last` may also be the number of rows.

    """

    shape: tuple[int, int]
    dtype: np.dtype
    read: Callable[[int, int], np.ndarray]
    multiple: int

    @classmethod
    def of(cls, weights: np.ndarray) -> MatrixRows:
        """Wrap an array [rows, columns] in memory, to be read in one block."""
        rows, columns = weights.shape
        return cls((rows, columns), weights.dtype, lambda first, last: weights[first:last], rows)

    def whole(self) -> np.ndarray:
        """Read all rows."""
        return self.read(0, self.shape[0])

    def held(self, max_weights: int | None = None) -> MatrixRows:
        """Return the matrix read into memory, or unchanged if it has more weights than that, or than usual for None.

        One that is large even so is still read in blocks, so that what is computed of it stays small.
        """
        if math.prod(self.shape) > (_MAX_WEIGHTS_IN_MEMORY if max_weights is None else max_weights):
            return self
        weights = self.whole()
        if math.prod(self.shape) <= _MAX_WEIGHTS_IN_MEMORY:
            return MatrixRows.of(weights)
        return replace(self, read=lambda first, last: weights[first:last])

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield all rows in order, in blocks; a thread reads the next block while the caller uses one."""
        rows, columns = self.shape
        step = -(-max(1, _WEIGHTS_PER_BLOCK // columns) // self.multiple) * self.multiple
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

    def blocks_containing(self, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the blocks of `multiple` rows that contain the given rows: first row index and block, ascending."""
        for block in np.unique(rows // self.multiple).tolist():
            first = block * self.multiple
            yield first, self.read(first, min(first + self.multiple, self.shape[0]))
