"""Arrays that begin at a cache line."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

_CACHE_LINE = 64  # bytes


def aligned_zeros(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return zeros that begin at a cache line: a vector load across two lines takes twice the time."""
    count = math.prod(shape) * np.dtype(dtype).itemsize
    room = np.zeros(count + _CACHE_LINE, np.uint8)
    first = -room.ctypes.data % _CACHE_LINE
    return room[first : first + count].view(dtype).reshape(shape)
