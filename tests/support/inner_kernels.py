"""Inner functions of the kernels as kernels, which tests can call."""

from __future__ import annotations

import functools
from typing import Any

from cpu_kernels.compilation.kernel import Kernel


@functools.cache
def as_kernel(function: Any) -> Kernel:
    """Return a kernel that does what this inner function does, itself if it is one."""
    return function if isinstance(function, Kernel) else Kernel(function.py_func, function.targetoptions)
