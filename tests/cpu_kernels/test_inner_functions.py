"""Functions that only kernels call: Python cannot call them, and says so."""

from __future__ import annotations

import numpy as np
import pytest

from cpu_kernels.inner_functions import is_inner
from cpu_kernels.transformer.activations import normalize_row, quantize_row, quantize_vectors


def test_python_cannot_call_an_inner_function() -> None:
    row = np.ones(16, np.float32)
    for _ in range(2):  # compiled, and from then on
        with pytest.raises(TypeError, match="normalize_row can only be called by kernels"):
            normalize_row(row, row, row, np.float32(1), row)


def test_nogil_makes_a_kernel() -> None:
    assert is_inner(quantize_row)
    assert not is_inner(quantize_vectors)
