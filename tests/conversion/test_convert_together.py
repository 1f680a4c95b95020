"""Several files of a source in one pass: the bytes of single conversions, and each matrix is read once for all."""

from __future__ import annotations

import importlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import write_tiny_model

from tritgguf.conversion.convert import Conversion, ConvertProgress, convert, convert_together
from tritgguf.conversion.depths import DepthOptions
from tritgguf.conversion.encoders import V2, Calibrated, Encoder, ScaleSearch
from tritgguf.conversion.recipes import PUBLISHED
from tritgguf.formats.safetensors_reader import StoredTensor
from tritgguf.quantization import v2
from tritgguf.sources.open import open_source

PIPELINE = importlib.import_module("tritgguf.conversion.pipeline")
MATRIX_ROWS = importlib.import_module("tritgguf.formats.matrix_rows")
OPTIONS = [DepthOptions(depth, recipe=PUBLISHED) for depth in (1, 2, 3, 4)] + [DepthOptions(2), DepthOptions(3)]
ENCODERS: list[Encoder] = [V2(), V2(), V2(), V2(), ScaleSearch(), V2()]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def alone(source: Path, tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """The files of single conversions."""
    folder, contents = tmp_path_factory.mktemp("alone"), []
    for number, (options, encoder) in enumerate(zip(OPTIONS, ENCODERS, strict=True)):
        report = convert(source, folder / f"{number}.gguf", depth=options.depth, recipe=options.recipe, encoder=encoder)
        contents.append(report.output.read_bytes())
    return contents


def conversions(folder: Path, **settings: Any) -> list[Conversion]:
    return [
        Conversion(folder / f"{number}.gguf", options, encoder, **settings)
        for number, (options, encoder) in enumerate(zip(OPTIONS, ENCODERS, strict=True))
    ]


def contents_of(folder: Path) -> list[bytes]:
    assert len(list(folder.iterdir())) == len(OPTIONS), "nothing else is left"
    return [(folder / f"{number}.gguf").read_bytes() for number in range(len(OPTIONS))]


@pytest.mark.parametrize("limit", [None, 100])
def test_the_files_are_those_of_single_conversions(
    limit: int | None, source: Path, alone: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if limit is not None:  # matrices are too large to be held, or held and read in blocks
        monkeypatch.setattr(MATRIX_ROWS, "_MAX_WEIGHTS_IN_MEMORY", limit)
        monkeypatch.setattr(MATRIX_ROWS, "_WEIGHTS_PER_BLOCK", limit)
        monkeypatch.setattr(PIPELINE, "_SHARED_WEIGHTS", 128 * 128)
    reports = convert_together(source, conversions(tmp_path))
    assert contents_of(tmp_path) == alone
    assert [report.depth for report in reports] == [options.depth for options in OPTIONS]
    assert all(report.relative_error > 0 for report in reports)


def test_every_byte_of_the_source_is_read_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, bytes_read = open_source(source), Counter[str]()
    read_into = StoredTensor._read_into

    def count(tensor: StoredTensor, buffer: np.ndarray, start: int) -> None:
        bytes_read[tensor.name] += buffer.nbytes
        read_into(tensor, buffer, start)

    monkeypatch.setattr(StoredTensor, "_read_into", count)
    convert_together(opened, conversions(tmp_path))
    assert sum(bytes_read.values()) == sum(tensor.stored_bytes for tensor in opened.tensors)
    bytes_read.clear()
    for number in range(2):
        convert(source, tmp_path / f"alone-{number}.gguf", encoder=V2())
    assert sum(bytes_read.values()) == 2 * sum(tensor.stored_bytes for tensor in opened.tensors), "this counts reads"


def test_what_is_encoded_alike_is_encoded_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []

    def count(matrix: Any, depth: int, thread_pool: Any) -> Any:
        encoded.append(depth)
        return v2.quantize_v2(matrix, depth, thread_pool)

    monkeypatch.setattr("tritgguf.conversion.encoders.quantize_v2", count)
    options = [DepthOptions(2), DepthOptions(2, embedding_depth=2), DepthOptions(3)]
    each = [Conversion(tmp_path / f"{number}.gguf", one, V2()) for number, one in enumerate(options)]
    convert_together(source, each)

    assert Counter(encoded) == {2: 15, 3: 15, 4: 1}, "the layers and the head of the first two files are encoded once"


def test_files_that_were_interrupted_at_different_places_resume(
    source: Path, alone: list[bytes], tmp_path: Path
) -> None:
    def interrupt(state: ConvertProgress) -> None:
        if state.bytes_done > state.bytes_total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_together(source, conversions(tmp_path), progress=interrupt)
    for name in ("1.gguf.part", "1.gguf.part.journal"):
        (tmp_path / name).unlink()
    journal = tmp_path / "2.gguf.part.journal"
    lines = journal.read_text().splitlines(keepends=True)
    assert len(lines) > 3
    journal.write_text("".join(lines[:3]))
    convert_together(source, conversions(tmp_path, resume=True))
    assert contents_of(tmp_path) == alone


def test_an_encoder_with_an_order_of_its_own_is_refused_beside_others(source: Path, tmp_path: Path) -> None:
    calibrated = Conversion(tmp_path / "c.gguf", DepthOptions(2), Calibrated(), windows=[[1, 2, 3]])
    with pytest.raises(ValueError, match="cannot share a pass"):
        convert_together(source, [calibrated, Conversion(tmp_path / "d.gguf", DepthOptions(2), V2())])
    assert list(tmp_path.iterdir()) == []
