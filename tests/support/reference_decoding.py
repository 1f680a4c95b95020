"""docs/reference_decoder.py as a module, and helpers of its tests."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

DOCS = Path(__file__).parents[2] / "docs"
DEPTHS = (1, 2, 3, 4)
WORDS_PER_BLOCK = {1: 8, 2: 14, 3: 21, 4: 27}
CODEBOOKS = arrays(np.float32, 27, elements=st.floats(0, width=32, allow_nan=False, allow_infinity=False))
DEPTH_OF_TYPE_ID = {10001: 1, 10002: 2, 10003: 3, 10004: 4}


def load_decoder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference_decoder", DOCS / "reference_decoder.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


decode = load_decoder().decode


def assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == expected.dtype == np.float32
    assert found.shape == expected.shape
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


def draw_bytes(data: st.DataObject, *shape: int) -> np.ndarray:
    count = int(np.prod(shape))
    return np.frombuffer(data.draw(st.binary(min_size=count, max_size=count)), np.uint8).reshape(shape)
