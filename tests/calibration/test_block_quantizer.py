"""Quantizing block by block, on tiny models: smaller errors than plain rounding, and what may change."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from calibration_inputs import WINDOWS, logit_error, packed_names
from tiny_models import write_tiny_model

from cpu_kernels.threads.thread_pool import ThreadPool
from tools.models.families import write_random_family
from tritgguf.calibration.block_quantizer import BlockQuantizer
from tritgguf.conversion.convert import convert
from tritgguf.errors import TritGgufError
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.sources.open import open_source

pytest.importorskip("torch")


def quantize_all(quantizer: BlockQuantizer, names: list[str]) -> dict[str, np.ndarray]:
    return {name: quantizer.quantize(name).decoded() for name in names}


@pytest.mark.parametrize("variant", ["llama", "qwen2", "llama-biases", "mistral"])
def test_logits_are_closer_than_with_plain_rounding(tmp_path: Path, variant: str) -> None:
    source = write_tiny_model(tmp_path / "model", variant)
    convert(source, tmp_path / "v2.gguf", depth=2)
    report = convert(source, tmp_path / "calibrated.gguf", depth=2, encoder="calibrated", windows=WINDOWS)
    assert report.encoder == "calibrated"
    errors = [logit_error(source, tmp_path / f"{name}.gguf") for name in ("v2", "calibrated")]
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("matrix", ["attn_output", "ffn_down"])
def test_biases_are_no_error_of_the_stream(tmp_path: Path, matrix: str) -> None:
    """Both copies of the model are the same up to the only matrix that is quantized, so nothing is to be corrected."""
    source, name = open_source(str(write_random_family(tmp_path / "model", "llama, biases"))), f"blk.0.{matrix}.weight"
    windows = [[token % 100 for token in window] for window in WINDOWS]
    with_stream, without = (
        BlockQuantizer(source, {name: 4}, windows, ThreadPool(2), whole_stream=whole_stream).quantize(name).decoded()
        for whole_stream in (True, False)
    )
    assert np.linalg.norm(with_stream - without) < 0.02 * np.linalg.norm(without)


def test_two_runs_give_the_same_file(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "model")
    for name in ("a", "b"):
        convert(source, tmp_path / name, depth=3, windows=WINDOWS, threads=2)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_written_block_is_not_quantized_again(tmp_path: Path) -> None:
    source = open_source(str(write_tiny_model(tmp_path / "model")))
    names = packed_names(tmp_path / "model")
    depths = dict.fromkeys(names, 2)
    expected = quantize_all(BlockQuantizer(source, depths, WINDOWS, ThreadPool(2)), names)
    first_block = {name: weights for name, weights in expected.items() if name.startswith("blk.0.")}
    resumed = BlockQuantizer(source, depths, WINDOWS, ThreadPool(2), written=first_block.get)
    rest = [name for name in names if name not in first_block]
    found = quantize_all(resumed, rest)
    for name in rest:
        np.testing.assert_array_equal(found[name], expected[name])
    with pytest.raises(ValueError, match="is in no decoder block"):
        resumed.quantize(names[0])


def test_other_matrices_stay_unquantized_and_affect_the_result(tmp_path: Path) -> None:
    source = open_source(str(write_tiny_model(tmp_path / "model")))
    names = packed_names(tmp_path / "model")
    some = [name for name in names if "ffn" in name]
    everything = quantize_all(BlockQuantizer(source, dict.fromkeys(names, 1), WINDOWS, ThreadPool(1)), names)
    found = quantize_all(BlockQuantizer(source, dict.fromkeys(some, 1), WINDOWS, ThreadPool(1)), some)
    assert set(found) == set(some)
    assert any(not np.array_equal(found[name], everything[name]) for name in some)


def test_text_and_encoder_must_match(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "model")
    with pytest.raises(TritGgufError, match="calibration text go together"):
        convert(source, tmp_path / "out.gguf", encoder="calibrated")
    with pytest.raises(TritGgufError, match="calibration text go together"):
        convert(source, tmp_path / "out.gguf", encoder="v2", windows=WINDOWS)
    with pytest.raises(TritGgufError, match="importance matrix go together"):
        convert(source, tmp_path / "out.gguf", encoder="imatrix")
    assert not (tmp_path / "out.gguf").exists()


def test_importance_moves_the_error_to_unimportant_columns(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "model")
    name = "blk.0.attn_q.weight"
    original = open_source(str(source)).read(name)
    importance = np.where(np.arange(original.shape[1]) % 2, 100, 1).astype(np.float32)
    report = convert(source, tmp_path / "some.gguf", depth=2, importance={name: importance})
    convert(source, tmp_path / "none.gguf", depth=2, importance={})
    assert report.encoder == "imatrix"
    some, none = (
        np.square(GgufFile(tmp_path / f"{which}.gguf").read_float32(name) - original).sum(0)
        for which in ("some", "none")
    )
    assert some[1::2].sum() < none[1::2].sum()
    assert some[::2].sum() > none[::2].sum()
