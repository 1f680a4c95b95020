"""Conversion of a trit file."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from tiny_models import write_tiny_model

from tritgguf.architectures.tensor_names import quantized_tensor
from tritgguf.conversion.convert import convert
from tritgguf.conversion.depths import DepthChoice, KeepRule
from tritgguf.errors import TritGgufError
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.quantization import v2

EMBEDDINGS, HEAD = "token_embd.weight", "output.weight"


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file at depth 4 with a packed head."""
    folder = tmp_path_factory.mktemp("deep")
    convert(
        write_tiny_model(folder / "model", "qwen2"), folder / "deep.gguf", depth=4, output_depth=3, recipe="published"
    )
    return folder / "deep.gguf"


def own_keys(file: GgufFile) -> dict[str, object]:
    """Return a file's keys without the trit keys."""
    return {key: value for key, value in file.metadata.items() if not key.startswith("trit.")}


def test_another_depth(tmp_path: Path, deep: Path) -> None:
    report = convert(deep, tmp_path / "out.gguf", depth=2)
    before, after = GgufFile(deep), GgufFile(tmp_path / "out.gguf")
    for name, info in after.tensors.items():
        if quantized_tensor(name):
            matrix = v2.quantize(before.read_float32(name), 2)
            assert info.type_name == "TRIT2"
            np.testing.assert_array_equal(after.raw(name), matrix.pack().reshape(-1))
            np.testing.assert_array_equal(after.codebook(name), matrix.codebook)
        else:
            assert info.type_name == before.tensors[name].type_name
            np.testing.assert_array_equal(after.raw(name), before.raw(name))
    np.testing.assert_array_equal(after.codebook(HEAD), before.codebook(HEAD))
    assert own_keys(after) == own_keys(before)
    assert [key for key in after.metadata if key.startswith("trit.codebook.")] == [
        f"trit.codebook.{name}" for name, info in after.tensors.items() if info.type_name.startswith("TRIT")
    ]
    [warning] = report.warnings
    assert re.fullmatch(r".*deep\.gguf: 14 tensors are packed already \(depth 4\); storing them otherwise .*", warning)
    assert 0.05 < report.relative_error < 0.3


def test_a_copy_keeps_the_name_of_the_encoder(tmp_path: Path, deep: Path) -> None:
    choice = DepthChoice(keep=(KeepRule("blk.0.*", 3),))
    convert(deep.parent / "model", tmp_path / "best.gguf", depth=2, encoder="best", choice=choice)
    convert(tmp_path / "best.gguf", tmp_path / "copy.gguf", depth=2, choice=choice)
    assert (tmp_path / "copy.gguf").read_bytes() == (tmp_path / "best.gguf").read_bytes()
    report = convert(tmp_path / "best.gguf", tmp_path / "head.gguf", depth=2, output_depth=3, choice=choice)
    assert report.encoder == "best"
    # Half of the layers are copied; of those that are encoded again, only the last encoder is named.
    assert convert(tmp_path / "best.gguf", tmp_path / "half.gguf", depth=2).encoder == "best+v2"
    assert "trit.depths" not in GgufFile(tmp_path / "half.gguf").metadata
    assert convert(tmp_path / "best.gguf", tmp_path / "again.gguf", depth=1).encoder == "v2"


def test_the_same_depth_is_a_copy(tmp_path: Path, deep: Path) -> None:
    report = convert(deep, tmp_path / "out.gguf", depth=4)
    assert (tmp_path / "out.gguf").read_bytes() == deep.read_bytes()
    assert report.warnings == []
    assert report.relative_error == 0


def test_only_the_embeddings_change(tmp_path: Path, deep: Path) -> None:
    report = convert(deep, tmp_path / "out.gguf", depth=4, embedding_depth=4)
    before, after = GgufFile(deep), GgufFile(tmp_path / "out.gguf")
    assert after.tensors[EMBEDDINGS].type_name == "TRIT4"
    for name in before.tensors:
        if name != EMBEDDINGS:
            np.testing.assert_array_equal(after.raw(name), before.raw(name))
    assert report.warnings == []  # the embeddings were F16


def test_a_packed_head_can_be_unpacked(tmp_path: Path, deep: Path) -> None:
    report = convert(deep, tmp_path / "out.gguf", depth=4, output_depth=0)
    before, after = GgufFile(deep), GgufFile(tmp_path / "out.gguf")
    assert after.tensors[HEAD].type_name == "F16"
    np.testing.assert_array_equal(after.read_float32(HEAD), before.read_float32(HEAD).astype(np.float16))
    assert f"trit.codebook.{HEAD}" not in after.metadata
    assert len(report.warnings) == 1


def test_unpacked_matrices_stay_unpacked(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", "unaligned")
    convert(folder, tmp_path / "first.gguf", depth=3)
    report = convert(tmp_path / "first.gguf", tmp_path / "second.gguf", depth=2)
    before, after = GgufFile(tmp_path / "first.gguf"), GgufFile(tmp_path / "second.gguf")
    for name, info in before.tensors.items():
        if info.type_name == "F16":
            np.testing.assert_array_equal(after.raw(name), before.raw(name))
            assert after.tensors[name].type_name == "F16"
    assert report.tensors_by_type["TRIT2"] == 2


def test_a_missing_codebook(tmp_path: Path, deep: Path) -> None:
    content = deep.read_bytes()
    (tmp_path / "bad.gguf").write_bytes(content.replace(b"trit.codebook.output", b"trit.codebook.0utput"))
    with pytest.raises(TritGgufError, match=r"bad\.gguf: tensor output\.weight has no codebook"):
        convert(tmp_path / "bad.gguf", tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.gguf"]
