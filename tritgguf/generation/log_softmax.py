"""Log-probabilities of logits."""

from __future__ import annotations

import numpy as np

from tritgguf.errors import DamagedFileError


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return the log-probabilities of every row, float64, for logits [rows, vocabulary].

    Raises DamagedFileError if a logit is infinite or not a number.
    """
    values = logits.astype(np.float64)
    largest = values.max(axis=1, keepdims=True)
    if not (np.isfinite(largest).all() and np.isfinite(values.min())):
        raise DamagedFileError("a logit is infinite or not a number: a model overflows on this text, or is damaged")
    values -= largest
    return values - np.log(np.exp(values).sum(axis=1, keepdims=True))
