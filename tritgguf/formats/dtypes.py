"""The number formats of checkpoints, and their exact float32 values."""

from __future__ import annotations

from typing import Any

import numpy as np

READABLE_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}


def to_float32(stored: np.ndarray) -> np.ndarray:
    """Return float32, float16 or, as uint16, the bits of BF16 as float32 of the same shape; exact."""
    if stored.dtype != np.uint16:
        return stored.astype(np.float32, copy=False)
    # BF16 is the upper half of a float32.
    widened = stored.astype(np.uint32)
    widened <<= np.uint32(16)
    return widened.view(np.float32)


def shortest_decimal(value: Any) -> Any:
    """Return the shortest decimal that rounds to a float32 key's value, which is what the source said: 1e-05."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
