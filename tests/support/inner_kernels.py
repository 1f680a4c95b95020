"""Inner functions of the kernels as kernels, which tests can call."""

from __future__ import annotations

import functools
from typing import Any

import numba


@functools.cache
def as_kernel(function: Any) -> Any:
    """Return a kernel that only calls this inner function; it releases the GIL."""

    def call(*arguments: Any) -> Any:
        return function(*arguments)

    return numba.njit(call, nogil=True)
