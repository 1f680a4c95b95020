"""End-to-end training, on tiny models: smaller divergence, valid files, deterministic results, a stop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibration_inputs import OTHERS, WINDOWS, logit_error, packed_names
from tiny_models import write_tiny_model

from cpu_kernels.packed_rows.unpack import unpack
from cpu_kernels.threads.thread_pool import ThreadPool
from tritgguf.calibration import end_to_end
from tritgguf.calibration.block_quantizer import BlockQuantizer
from tritgguf.calibration.end_to_end import EndToEnd, TrainedModel, split_windows, train_end_to_end
from tritgguf.calibration.trained_parameters import Rates
from tritgguf.calibration.training_text import mixed_windows
from tritgguf.conversion.convert import ConvertProgress, convert
from tritgguf.conversion.encoders import Calibrated
from tritgguf.errors import TritGgufError
from tritgguf.quantization.quantized_matrix import QuantizedMatrix
from tritgguf.reference.decoder_blocks import Block
from tritgguf.sources.open import open_source

pytest.importorskip("torch")

pytestmark = pytest.mark.slow

SETTINGS = EndToEnd(epochs=4, level_rate=2e-2, factor_rate=5e-3)


def trained(folder: Path, depth: int, settings: EndToEnd = SETTINGS) -> tuple[dict[str, QuantizedMatrix], TrainedModel]:
    """Return the calibrated matrices of a model and the result of training them."""
    source = open_source(str(folder))
    names = packed_names(folder)
    quantizer = BlockQuantizer(source, dict.fromkeys(names, depth), WINDOWS[:8], ThreadPool(1))
    start = {name: quantizer.quantize(name) for name in names}
    return start, train_end_to_end(source, start, WINDOWS[8:], OTHERS, settings, ThreadPool(1))


@pytest.mark.parametrize("variant", ["llama", "qwen2"])
def test_training_reduces_the_divergence(tmp_path: Path, variant: str) -> None:
    start, result = trained(write_tiny_model(tmp_path / "model", variant), 1)
    assert 0 < result.after < 0.97 * result.before
    assert not result.warnings
    assert any((matrix.levels != start[name].levels).any() for name, matrix in result.matrices.items())
    assert any(name.endswith("attn_norm.weight") for name in result.vectors)
    assert any(name.endswith("attn_q.bias") for name in result.vectors) == (variant == "qwen2")
    for name, matrix in result.matrices.items():
        assert matrix.levels.max() <= 2
        assert (np.diff(matrix.codebook) >= 0).all()
        assert matrix.codebook.min() >= 0
        assert matrix.squared_error != start[name].squared_error


def test_the_file_is_valid_and_the_same_in_every_run(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "model")
    convert(source, tmp_path / "calibrated.gguf", depth=1, encoder="calibrated", windows=WINDOWS, threads=1)
    seen: list[ConvertProgress] = []
    encoder = Calibrated(WINDOWS, end_to_end=SETTINGS)
    for name in ("a.gguf", "b.gguf"):
        report = convert(source, tmp_path / name, depth=1, encoder=encoder, threads=1, progress=seen.append)
    assert report.encoder == "tuned-end-to-end"
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert logit_error(source, tmp_path / "a.gguf") < logit_error(source, tmp_path / "calibrated.gguf")
    assert {state.tensor[:8] for state in seen} >= {"training", "blk.0.at"}
    assert seen[-1].bytes_done == seen[-1].bytes_total
    assert all(state.bytes_done <= state.bytes_total for state in seen)
    norms = [open_source(str(path)).read("blk.0.attn_norm.weight") for path in (source, tmp_path / "a.gguf")]
    assert 0 < np.abs(norms[0].astype(np.float32) - norms[1]).max() < 0.2


def test_levels_follow_their_packed_words(tmp_path: Path) -> None:
    _, result = trained(write_tiny_model(tmp_path / "model"), 2, replace(SETTINGS, epochs=1))
    for matrix in result.matrices.values():
        levels, indices = unpack(matrix.pack(ThreadPool(1)), 2, ThreadPool(1))
        np.testing.assert_array_equal(levels, matrix.levels)
        np.testing.assert_array_equal(indices, matrix.scale_indices)


def test_a_state_that_is_not_better_is_not_kept(tmp_path: Path) -> None:
    """Learning rates that are far too high destroy the model; the calibrated one is returned."""
    settings = replace(SETTINGS, epochs=1, level_rate=3.0, factor_rate=0.5)
    start, result = trained(write_tiny_model(tmp_path / "model"), 2, settings)
    assert result.after == result.before
    assert not result.vectors
    assert "did not lower the divergence" in result.warnings[0]
    for name, matrix in result.matrices.items():
        np.testing.assert_array_equal(matrix.levels, start[name].levels)
        np.testing.assert_array_equal(matrix.codebook, start[name].codebook)


def test_without_memory_levels_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(end_to_end, "fits_in_memory", lambda n_bytes: asked.append(n_bytes))
    start, result = trained(write_tiny_model(tmp_path / "model"), 1, replace(SETTINGS, epochs=1))
    weights = sum(matrix.levels.size for matrix in start.values())
    assert asked[0] > 14 * weights
    assert "only the scales, norms and biases were trained" in result.warnings[0]
    assert result.after < result.before
    for name, matrix in result.matrices.items():
        np.testing.assert_array_equal(matrix.levels, start[name].levels)


@pytest.mark.parametrize(("at", "calibrated"), [("blk.1.attn_q", [1]), ("training", [])])
def test_an_interrupted_training_can_be_repeated(
    at: str, calibrated: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_tiny_model(tmp_path / "model")
    encoder = Calibrated(WINDOWS[:16], end_to_end=replace(SETTINGS, epochs=1))

    def interrupt(state: ConvertProgress) -> None:
        if state.tensor.startswith(at):
            raise KeyboardInterrupt

    settings: dict[str, Any] = {"depth": 1, "encoder": encoder, "threads": 1}
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "a.gguf", progress=interrupt, **settings)
    assert not (tmp_path / "a.gguf").exists()
    again: list[int] = []
    original = BlockQuantizer._quantize_block

    def count(quantizer: BlockQuantizer, block: Block) -> Any:
        again.append(block.index)
        return original(quantizer, block)

    with monkeypatch.context() as patches:
        patches.setattr(BlockQuantizer, "_quantize_block", count)
        convert(source, tmp_path / "a.gguf", resume=True, **settings)
    assert again == calibrated
    convert(source, tmp_path / "b.gguf", **settings)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "b.gguf", "model"]


def test_one_window_is_too_short(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "model")
    for encoder in ("tuned-end-to-end", "tuned-both"):
        with pytest.raises(TritGgufError, match=r"needs 2 windows of text, .* and there is 1; give a longer text"):
            convert(source, tmp_path / "out.gguf", encoder=encoder, windows=[[1, 2, 3]])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_windows_held_out_are_not_trained_on() -> None:
    windows = [[index] for index in range(20)]
    used, held_out = split_windows(windows, EndToEnd(held_out=8))
    assert held_out == [[7], [15]]
    assert used == [window for window in windows if window not in held_out]
    assert split_windows(windows[:2], EndToEnd()) == ([[0]], [[1]])


def test_a_longer_text_has_larger_steps_and_then_fewer_passes() -> None:
    settings = EndToEnd(epochs=8, steps=14, batch_size=8, most_steps=224)
    lengths = (1, 14, 28, 112, 224, 448, 4000)
    assert [settings.windows_of_step(windows) for windows in lengths] == [1, 1, 2, 8, 8, 8, 8]
    assert [settings.passes(windows) for windows in lengths] == [8, 8, 8, 8, 8, 4, 1]


def test_the_rate_of_levels_is_lower_with_many_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    def recorded(step: int, level: float, factor: float) -> Rates:
        seen.append(level)
        return Rates(step, level, factor)

    monkeypatch.setattr(end_to_end, "Rates", recorded)
    settings = EndToEnd(epochs=1, steps=10, batch_size=2, level_rate=0.01, steps_at_full_rate=10)
    trained(write_tiny_model(tmp_path / "model"), 2, settings)
    assert len(seen) == len(WINDOWS[8:]) / 2 == 20
    assert seen[8] == pytest.approx(0.01 * 10 / 20 * (1 - 8 / 20))  # the first after the warm-up


def test_mixed_windows_are_new_in_every_epoch_and_the_same_in_every_run() -> None:
    windows = np.arange(6 * 64).reshape(6, 64)
    mixed = mixed_windows(windows, seed=1, epoch=0)
    np.testing.assert_array_equal(mixed, mixed_windows(windows, seed=1, epoch=0))
    assert mixed.shape == windows.shape
    assert (mixed != mixed_windows(windows, seed=1, epoch=1)).any()
    pieces = {tuple(piece) for piece in windows.reshape(12, 32)}
    kept = [max(np.mean(piece == np.array(other)) for other in pieces) for piece in mixed.reshape(12, 32)]
    assert min(kept) > 0.5  # most tokens of every piece are those of one piece of the text
    assert np.mean(kept) < 0.97
    assert mixed_windows(windows[:, :63], seed=1, epoch=0).shape == (6, 63)


def test_what_is_packed_already_is_copied_with_its_norms(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "model")
    convert(source, tmp_path / "trits.gguf", depth=2, encoder="v2")
    convert(tmp_path / "trits.gguf", tmp_path / "copy.gguf", depth=2, encoder=Calibrated(WINDOWS, end_to_end=SETTINGS))
    sources = [open_source(str(tmp_path / name)) for name in ("trits.gguf", "copy.gguf")]
    for tensor in sources[0].tensors:
        before, after = (one.read(tensor.name) for one in sources)
        np.testing.assert_array_equal(after, before, err_msg=tensor.name)
