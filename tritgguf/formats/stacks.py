"""Stacks of matrices: tensors of three dimensions, whose matrices are packed independently.

The experts of a layer are a stack [experts, rows, columns]. Each expert's matrix has its own codebook and is read,
encoded and written on its own. Its name is that of the tensor and its place, as in `blk.0.ffn_up_exps.weight[3]`. The
only matrix of a tensor of one or two dimensions has the tensor's name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

_IN_STACK = re.compile(r"(.+)\[(0|[1-9][0-9]{0,8})\]")


def matrix_count(shape: Sequence[int]) -> int:
    """Return the number of matrices of a tensor; `shape` is in NumPy order."""
    return math.prod(shape[:-2])


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return rows and columns of each matrix of a tensor; a vector is a single row."""
    return (shape[-2] if len(shape) > 1 else 1), shape[-1]


def matrix_names(tensor: str, shape: Sequence[int]) -> list[str]:
    """Return the names of a tensor's matrices, in the order of their data."""
    if len(shape) < 3:
        return [tensor]
    return [f"{tensor}[{index}]" for index in range(matrix_count(shape))]


def split_matrix_name(name: str) -> tuple[str, int | None]:
    """Return the tensor of a matrix and its place in the stack; None for the name of a whole tensor."""
    found = _IN_STACK.fullmatch(name)
    return (found[1], int(found[2])) if found else (name, None)


def by_tensor(names: Iterable[str]) -> dict[str, list[str]]:
    """Group the names of matrices by their tensor, in the given order."""
    tensors: dict[str, list[str]] = {}
    for name in names:
        tensors.setdefault(split_matrix_name(name)[0], []).append(name)
    return tensors
