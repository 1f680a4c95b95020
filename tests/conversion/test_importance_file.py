"""Importance matrices that do not match their model: the user is told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_models import write_tiny_model

from tritgguf.cli import app
from tritgguf.conversion.convert import convert
from tritgguf.conversion.depths import DepthChoice, KeepRule
from tritgguf.conversion.importance_file import importance_of
from tritgguf.formats.imatrix import write_importance
from tritgguf.sources.open import open_source


def write_imatrix(path: Path, model: Path, *without: str) -> Path:
    """Write an importance matrix for a model's matrices, except those whose names contain one of the words."""
    sums = {
        tensor.name: np.ones(tensor.shape[-1])
        for tensor in open_source(model).tensors
        if len(tensor.shape) == 2 and "blk" in tensor.name and not any(word in tensor.name for word in without)
    }
    write_importance(path, sums, dict.fromkeys(sums, 1), datasets=[], chunk_size=1, chunks=1)
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Models of 2 and 3 layers."""
    folder = tmp_path_factory.mktemp("models")
    return {n: write_tiny_model(folder / str(n), num_hidden_layers=n) for n in (2, 3)}


def test_a_matching_file_gives_no_warning(tmp_path: Path, models: dict[int, Path]) -> None:
    importance, warnings = importance_of(models[2], write_imatrix(tmp_path / "imatrix.gguf", models[2]))
    assert warnings == []
    assert convert(models[2], tmp_path / "out.gguf", importance=importance).warnings == []
    # The embeddings are a table, so nothing can be measured for them.
    assert convert(models[2], tmp_path / "e.gguf", importance=importance, embedding_depth=4).warnings == []


def test_a_file_of_fewer_layers(tmp_path: Path, models: dict[int, Path], capsys: pytest.CaptureFixture[str]) -> None:
    imatrix = write_imatrix(tmp_path / "imatrix.gguf", models[2])
    arguments = ["convert", str(models[3]), str(tmp_path / "out.gguf"), "--imatrix", str(imatrix), "--json"]
    assert app.main(arguments) == 0
    (warning,) = json.loads(capsys.readouterr().out)["warnings"]
    assert warning.startswith("the importance matrix has nothing for 7 of 21 matrices (blk.2.")
    assert "and 4 more), which are quantized without it" in warning


def test_a_file_of_more_layers(tmp_path: Path, models: dict[int, Path], capsys: pytest.CaptureFixture[str]) -> None:
    imatrix = write_imatrix(tmp_path / "imatrix.gguf", models[3])
    arguments = ["convert", str(models[2]), str(tmp_path / "out.gguf"), "--imatrix", str(imatrix)]
    assert app.main(arguments) == 0
    assert f"warning: {imatrix}: 7 of its matrices are not in the model (blk.2." in capsys.readouterr().err


def test_matrices_that_are_not_quantized_need_no_importance(tmp_path: Path, models: dict[int, Path]) -> None:
    importance, _ = importance_of(models[2], write_imatrix(tmp_path / "imatrix.gguf", models[2], "ffn_down"))
    report = convert(models[2], tmp_path / "out.gguf", importance=importance)
    assert report.warnings == [
        "the importance matrix has nothing for 2 of 14 matrices (blk.0.ffn_down.weight, blk.1.ffn_down.weight), which"
        " are quantized without it; is it of this model?"
    ]
    kept = DepthChoice((KeepRule("*.ffn_down", 0),))
    assert convert(models[2], tmp_path / "kept.gguf", importance=importance, choice=kept).warnings == []
