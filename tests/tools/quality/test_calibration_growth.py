"""The measurement of how calibration grows: one layer of a shape, whole."""

from __future__ import annotations

import pytest
import typer

from tools.quality import calibration_growth
from tritgguf.architectures.dimensions import Dimensions


def test_every_matrix_of_one_layer_is_calibrated() -> None:
    sizes = Dimensions(layers=3, vocabulary=320, hidden=128, feed_forward=192, heads=4, kv_heads=2, head_dim=32)
    found = calibration_growth.measure("llama", sizes, 512, depth=2, threads=1)
    assert found.weights == 128 * (128 + 64 + 64 + 128) + 3 * 128 * 192
    assert found.processor_seconds > 0
    assert found.memory > 4 * found.weights


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(typer.BadParameter, match="choose from SmolLM2-135M, "):
        calibration_growth.main(shapes="SmolLM2-136M")
