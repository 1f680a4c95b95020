"""Reading GGUF files: round trips with gguf-py, and one-line errors for damaged files."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import naive
import numpy as np
import pytest
from gguf_bytes import (
    ARRAY,
    FLOAT32,
    FLOAT64,
    STRING,
    GgufBytes,
    array,
    floats,
    key,
    string,
    tensor,
    trit_bytes,
)
from random_inputs import CODEBOOK, random_levels

from tritgguf.errors import TritGgufError
from tritgguf.formats import trit_types
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.formats.trit_types import DEPTHS, codebook_key

F32, F16, Q8_0, TRIT2 = 0, 1, 8, 10002


# -- files written by gguf-py


def written_with_all_types(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in (("uint8", 255), ("uint16", 65535), ("uint32", 2**32 - 1), ("uint64", 2**64 - 1)):
        getattr(writer, f"add_{name}")(f"test.{name}", value)
    for name, bits in (("int8", 7), ("int16", 15), ("int32", 31), ("int64", 63)):
        getattr(writer, f"add_{name}")(f"test.{name}", -(2**bits))
    writer.add_float32("test.float32", 0.1)
    writer.add_float64("test.float64", 0.1)
    writer.add_bool("test.true", True)
    writer.add_bool("test.false", False)
    writer.add_string("test.string", "grün 😀 \n")
    writer.add_string("test.empty", "")
    writer.add_array("test.strings", ["a", "", "ß", "long " * 50])
    writer.add_array("test.integers", [1, -2, 3])
    writer.add_array("test.floats", [0.5, -1.25])
    writer.add_array("test.booleans", [True, False, True])
    writer.add_array("test.nested", [[1, 2], [3], [4, 5, 6]])
    generator = np.random.default_rng(0)
    writer.add_tensor("f32", generator.standard_normal((3, 5)).astype(np.float32))
    writer.add_tensor("f16", generator.standard_normal((2, 3, 4)).astype(np.float16))
    writer.add_tensor("vector", generator.standard_normal(7).astype(np.float32))
    for qtype in (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.BF16):
        weights = generator.standard_normal((4, 64)).astype(np.float32)
        writer.add_tensor(qtype.name, gguf.quants.quantize(weights, qtype), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def all_types(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written_with_all_types(tmp_path_factory.mktemp("gguf") / "all.gguf")


def test_metadata_as_gguf_reads_it(all_types: Path) -> None:
    reader, file = gguf.GGUFReader(all_types), GgufFile(all_types)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert list(file.metadata) == list(fields)
    assert len(file.metadata) == len(fields)
    for name, field in fields.items():
        # gguf-py's reader flattens nested arrays.
        expected = [[1, 2], [3], [4, 5, 6]] if name == "test.nested" else field.contents()
        assert file.metadata[name] == expected
        assert type(file.metadata[name]) is type(expected)
        value = file.value(name)
        assert value.type == field.types[0]
        assert value.value == expected
        assert value.sub_type == (field.types[1] if len(field.types) > 1 else None)


def test_metadata_by_value(all_types: Path) -> None:
    metadata = GgufFile(all_types).metadata
    assert metadata["test.uint64"] == 2**64 - 1
    assert metadata["test.int64"] == -(2**63)
    assert metadata["test.float32"] == np.float32(0.1)
    assert metadata["test.float64"] == 0.1
    assert metadata["test.true"] is True
    assert metadata["test.false"] is False
    assert metadata["test.booleans"] == [True, False, True]
    assert metadata["test.strings"] == ["a", "", "ß", "long " * 50]
    assert metadata["test.string"] == "grün 😀 \n"
    assert "test.nothing" not in metadata
    assert metadata.get("test.nothing") is None
    with pytest.raises(KeyError):
        metadata["test.nothing"]


def test_tensors_as_gguf_reads_them(all_types: Path) -> None:
    reader, file = gguf.GGUFReader(all_types), GgufFile(all_types)
    assert list(file.tensors) == [read.name for read in reader.tensors]
    for read in reader.tensors:
        info = file.tensors[read.name]
        assert info.shape == tuple(reversed(read.shape.tolist()))
        assert info.type_id == read.tensor_type.value
        assert info.type_name == read.tensor_type.name
        assert info.n_bytes == read.n_bytes
        assert info.offset == read.data_offset
        assert info.n_weights == read.n_elements
        np.testing.assert_array_equal(file.raw(read.name), read.data.reshape(-1).view(np.uint8))
        weights = gguf.quants.dequantize(read.data, read.tensor_type).reshape(info.shape)
        actual = file.read_float32(read.name)
        assert actual.dtype == np.float32
        np.testing.assert_array_equal(actual, weights)


def test_a_large_tensor_is_dequantized_in_parts(all_types: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = GgufFile(all_types).read_float32("Q8_0")
    monkeypatch.setattr("tritgguf.formats.gguf_file._WEIGHTS_AT_ONCE", 100)
    np.testing.assert_array_equal(GgufFile(all_types).read_float32("Q8_0"), whole)


def test_raw_bytes_are_a_read_only_view(all_types: Path) -> None:
    file = GgufFile(all_types)
    first, second = file.raw("f32"), file.raw("f32")
    assert not first.flags.writeable
    assert not first.flags.owndata
    assert np.shares_memory(first, second)
    with pytest.raises(ValueError):
        first[0] = 1


def test_released_pages_come_back(smollm2_d2: Path) -> None:
    file = GgufFile(smollm2_d2)
    name = "blk.0.ffn_down.weight"
    before = file.raw(name).copy()
    file.release(name)
    np.testing.assert_array_equal(file.raw(name), before)
    for other in file.tensors:
        file.release(other)
    np.testing.assert_array_equal(file.raw(name), before)


# -- trit files


@pytest.mark.parametrize("depth", DEPTHS)
def test_trit_tensor(tmp_path: Path, depth: int) -> None:
    path = trit_bytes(depth).write(tmp_path / "trit.gguf")
    file = GgufFile(path)
    info = file.tensors["w"]
    assert (info.shape, info.type_id, info.type_name) == ((3, 128), 10000 + depth, f"TRIT{depth}")
    assert info.n_bytes == 3 * trit_types.row_bytes(depth, 128)
    np.testing.assert_array_equal(file.codebook("w"), CODEBOOK)
    expected = naive.decode(*random_levels(depth, 3, 128), CODEBOOK, depth)
    np.testing.assert_array_equal(file.read_float32("w"), expected)
    np.testing.assert_array_equal(file.read_float32("v"), [0, 1, 2, 3])


@pytest.mark.parametrize("depth", DEPTHS)
def test_gguf_opens_a_trit_file_once_it_knows_the_types(tmp_path: Path, depth: int) -> None:
    trit_types.register_with_gguf()
    reader = gguf.GGUFReader(trit_bytes(depth).write(tmp_path / "trit.gguf"))
    packed, vector = reader.tensors
    assert (packed.tensor_type.name, packed.shape.tolist()) == (f"TRIT{depth}", [128, 3])
    assert packed.n_bytes == 3 * trit_types.row_bytes(depth, 128)
    assert (vector.tensor_type.name, vector.data.tolist()) == ("F32", [0, 1, 2, 3])


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize(
    "codebook",
    [
        floats([0.1] * 26),
        floats([0.1] * 28),
        floats([]),
        floats([0.1] * 26 + [float("nan")]),
        floats([0.1] * 26 + [float("inf")]),
        floats([0.1] * 26 + [-0.1]),
        array(FLOAT64, [struct.pack("<d", 1e300)] * 27),
        array(STRING, [string("scale")] * 27),
        array(ARRAY, [floats([0.1])] * 27),
        array(ARRAY, [floats([0.1] * 27)] * 27),
    ],
    ids=["short", "long", "empty", "NaN", "infinite", "negative", "too large", "strings", "nested", "square"],
)
def test_bad_codebook(tmp_path: Path, codebook: bytes) -> None:
    file = GgufFile(trit_bytes(codebook=codebook).write(tmp_path / "bad.gguf"))
    for read in (file.codebook, file.read_float32):
        with pytest.raises(TritGgufError, match=r"tensor w has .*codebook.*convert the model again"):
            read("w")


def test_missing_codebook(tmp_path: Path) -> None:
    content = trit_bytes()
    content.keys.pop()
    file = GgufFile(content.write(tmp_path / "bad.gguf"))
    with pytest.raises(TritGgufError, match=r"tensor w has no codebook .*trit\.codebook\.w"):
        file.read_float32("w")


def test_codebook_that_is_no_array(tmp_path: Path) -> None:
    content = trit_bytes()
    content.keys[-1] = key(codebook_key("w"), FLOAT32, struct.pack("<f", 0.1))
    with pytest.raises(TritGgufError, match="codebook"):
        GgufFile(content.write(tmp_path / "bad.gguf")).codebook("w")


def test_codebook_of_zeros_is_one(tmp_path: Path) -> None:
    path = trit_bytes(codebook=floats([0.0] * 27)).write(tmp_path / "zeros.gguf")
    np.testing.assert_array_equal(GgufFile(path).read_float32("w"), np.zeros((3, 128)))


def test_a_type_that_cannot_be_dequantized(tmp_path: Path) -> None:
    content = GgufBytes(tensors=[tensor("ids", (4,), gguf.GGMLQuantizationType.I32.value, 0)], data=bytes(16))
    file = GgufFile(content.write(tmp_path / "i32.gguf"))
    with pytest.raises(TritGgufError, match="tensor ids has type I32, which cannot be read"):
        file.read_float32("ids")
