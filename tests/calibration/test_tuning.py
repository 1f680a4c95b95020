"""Training a block's levels, on tiny models: better outputs, unchanged scales, deterministic results."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from calibration_inputs import OTHERS, WINDOWS, logit_error, packed_names
from tiny_models import write_tiny_model

from cpu_kernels.threads.thread_pool import ThreadPool
from tritgguf.calibration.block_quantizer import BlockQuantizer
from tritgguf.calibration.sensitivity import relative_error
from tritgguf.calibration.tuning import Tuning, tune_block
from tritgguf.conversion.convert import convert
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.formats.matrix_rows import MatrixRows
from tritgguf.quantization.scale_search import quantize_searched
from tritgguf.reference.decoder_blocks import DecoderBlocks
from tritgguf.sources.open import open_source

pytest.importorskip("torch")

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("variant", ["llama", "qwen2"])
def test_training_reduces_the_block_error(tmp_path: Path, variant: str, depth: int) -> None:
    """The error also falls on windows outside the training set."""
    blocks = DecoderBlocks(open_source(str(write_tiny_model(tmp_path / "model", variant))), threads=2)
    hidden, others = blocks.embed(WINDOWS), blocks.embed(OTHERS)
    with blocks.block(0) as block:
        target, other_target = block.forward(hidden), block.forward(others)
        originals = {name: block.get(name) for name in block.matrices}
        quantized = {}
        for name, weights in originals.items():
            (quantized[name],) = quantize_searched(MatrixRows.of(weights), depth, ThreadPool(1)).parts
            block.set(name, quantized[name].decoded())
        before = relative_error(block.forward(hidden), target), relative_error(block.forward(others), other_target)
        tuned = tune_block(block, hidden, target, quantized, originals, Tuning(epochs=6))
        after = relative_error(block.forward(hidden), target), relative_error(block.forward(others), other_target)
        assert after[0] < 0.9 * before[0]
        assert after[1] < before[1]
        for name, matrix in tuned.items():
            np.testing.assert_array_equal(block.get(name), matrix.decoded())
            np.testing.assert_array_equal(matrix.scale_indices, quantized[name].scale_indices)
            assert matrix.levels.max() <= 3**depth - 1
            changed = matrix.levels != quantized[name].levels
            assert 0 < changed.mean() < 0.3
            error = np.square(originals[name] - matrix.decoded(), dtype=np.float64).sum()
            np.testing.assert_allclose(matrix.squared_error, error)


def test_levels_change_on_a_short_text(tmp_path: Path) -> None:
    """A few steps at the same rate would leave every latent weight on its side of the boundary."""
    blocks = DecoderBlocks(open_source(str(write_tiny_model(tmp_path / "model"))), threads=2)
    hidden = blocks.embed(WINDOWS[:4])
    with blocks.block(0) as block:
        target, (name, *_) = block.forward(hidden), block.matrices
        originals = {name: block.get(name)}
        quantized = {name: next(iter(quantize_searched(MatrixRows.of(originals[name]), 2, ThreadPool(1)).parts))}
        block.set(name, quantized[name].decoded())
        tuned = tune_block(block, hidden, target, quantized, originals, Tuning())
    assert 0 < (tuned[name].levels != quantized[name].levels).mean() < 0.3


def test_without_training_nothing_changes(tmp_path: Path) -> None:
    blocks = DecoderBlocks(open_source(str(write_tiny_model(tmp_path / "model"))), threads=1)
    hidden = blocks.embed(WINDOWS[:2])
    with blocks.block(0) as block:
        originals = {name: block.get(name) for name in block.matrices}
        quantized = {
            name: next(iter(quantize_searched(MatrixRows.of(weights), 2, ThreadPool(1)).parts))
            for name, weights in originals.items()
        }
        tuned = tune_block(block, hidden, hidden, quantized, originals, Tuning(learning_rate=0.0))
    for name, matrix in tuned.items():
        np.testing.assert_array_equal(matrix.levels, quantized[name].levels)


def test_the_model_improves_and_the_result_is_deterministic(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "model")
    convert(source, tmp_path / "calibrated.gguf", depth=1, encoder="calibrated", windows=WINDOWS)
    for name in ("a.gguf", "b.gguf"):
        report = convert(source, tmp_path / name, depth=1, encoder="tuned", windows=WINDOWS, threads=2)
    assert report.encoder == "tuned"
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert logit_error(source, tmp_path / "a.gguf") < logit_error(source, tmp_path / "calibrated.gguf")
    assert GgufFile(tmp_path / "a.gguf").metadata["trit.encoder"] == "tuned"


def test_matrices_that_are_not_quantized_are_not_trained(tmp_path: Path) -> None:
    source = open_source(str(write_tiny_model(tmp_path / "model")))
    some = [name for name in packed_names(tmp_path / "model") if "attn_q" in name]
    quantizer = BlockQuantizer(source, dict.fromkeys(some, 1), WINDOWS[:8], ThreadPool(1), tuning=Tuning(epochs=1))
    assert [quantizer.quantize(name).depth for name in some] == [1] * len(some)
