"""The dtypes of checkpoints and their exact conversion to float32."""

from __future__ import annotations

from typing import Any

import numpy as np

READABLE_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
STORED_DTYPES = {**READABLE_DTYPES, "U8": np.dtype(np.uint8)}
"""Those of weights, and the bytes of formats that are quantized."""


def to_float32(stored: np.ndarray) -> np.ndarray:
    """Convert float32, float16 or BF16 (its bits as uint16) to float32 of the same shape; exact."""
    if stored.dtype != np.uint16:
        return stored.astype(np.float32, copy=False)
    # BF16 is the upper half of a float32.
    widened = stored.astype(np.uint32)
    widened <<= np.uint32(16)
    return widened.view(np.float32)


def shortest_decimal(value: Any) -> Any:
    """Return the shortest decimal that rounds to a float32 metadata value, such as 1e-05: the source's number."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
