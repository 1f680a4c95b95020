"""Log-probabilities of logits."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tritgguf.errors import DamagedFileError
from tritgguf.generation.log_softmax import log_softmax


def test_log_softmax_survives_large_logits() -> None:
    result = log_softmax(np.array([[1e30, 0.0], [-1e30, -1e30]], np.float32))
    np.testing.assert_allclose(result, [[0.0, -1e30], [-math.log(2), -math.log(2)]], rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite(value: float) -> None:
    with pytest.raises(DamagedFileError, match="not a number"):
        log_softmax(np.array([[0.0, 1.0], [0.0, value]], np.float32))
