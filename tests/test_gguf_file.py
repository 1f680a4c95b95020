"""Reading GGUF: what gguf-py writes reads back equal, and no damage gives anything but one clear line."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import naive
import numpy as np
import pytest
from gguf_bytes import (
    ARRAY,
    BOOL,
    FLOAT32,
    FLOAT64,
    INT8,
    STRING,
    UINT8,
    UINT16,
    UINT32,
    UINT64,
    GgufBytes,
    array,
    floats,
    key,
    string,
    tensor,
)
from hypothesis import given
from hypothesis import strategies as st
from random_inputs import CODEBOOK, random_levels

from cpu_kernels.pack import pack
from tritgguf import trit_types
from tritgguf.errors import TritGgufError
from tritgguf.gguf_file import GgufFile
from tritgguf.trit_types import DEPTHS, codebook_key

F32, F16, Q8_0, TRIT2 = 0, 1, 8, 10002


def assert_refused(path: Path, message: str) -> None:
    """Assert that the file is refused when it is opened, in one line that names it."""
    with pytest.raises(TritGgufError, match=message) as caught:
        GgufFile(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def read_everything(path: Path) -> None:
    """Use everything a file offers; TritGgufError is the only error that may leave this."""
    try:
        file = GgufFile(path)
    except TritGgufError:
        return
    size = path.stat().st_size
    for name in file.metadata:
        assert file.value(name).value == file.metadata[name] or file.metadata[name] != file.metadata[name]
    for name, info in file.tensors.items():
        assert 0 <= info.offset <= info.offset + info.n_bytes <= size
        assert file.raw(name).nbytes == info.n_bytes
        assert info.type_name
        for read in (file.codebook, file.read_float32):
            try:
                read(name)
            except TritGgufError:
                continue


# -- what gguf-py writes


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
    monkeypatch.setattr("tritgguf.gguf_file._WEIGHTS_AT_ONCE", 100)
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


def trit_bytes(depth: int = 2, codebook: bytes | None = None) -> GgufBytes:
    levels, indices = random_levels(depth, 3, 128)
    data = pack(levels, indices, depth).tobytes()
    second = bytes(-len(data) % 32) + np.arange(4, dtype=np.float32).tobytes()
    keys = [key("general.architecture", STRING, string("llama")), key("trit.version", UINT32, struct.pack("<I", 1))]
    keys.append(key(codebook_key("w"), ARRAY, floats(CODEBOOK.tolist()) if codebook is None else codebook))
    tensors = [tensor("w", (3, 128), 10000 + depth, 0), tensor("v", (4,), F32, len(data) + -len(data) % 32)]
    return GgufBytes(keys, tensors, data + second)


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


# -- damage, case by case


def one_tensor(**changes: Any) -> GgufBytes:
    entry = {"name": "w", "shape": (2, 32), "type_id": F32, "offset": 0, **changes}
    return GgufBytes(tensors=[tensor(**entry)], data=bytes(256))


def test_the_undamaged_file_is_read(tmp_path: Path) -> None:
    assert GgufFile(one_tensor().write(tmp_path / "good.gguf")).tensors["w"].shape == (2, 32)


def test_version_2_is_read(tmp_path: Path) -> None:
    content = one_tensor()
    content.version = 2
    assert list(GgufFile(content.write(tmp_path / "two.gguf")).tensors) == ["w"]


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + bytes(19), b"PK\3\4" + bytes(100), b"GGML" + bytes(100)])
def test_not_a_gguf_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert_refused(path, "not a GGUF file")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert_refused(tmp_path / "none.gguf", "cannot be read .No such file")
    assert_refused(tmp_path, "cannot be read .Is a directory")


@pytest.mark.parametrize("version", [0, 1, 4, 3 << 24])
def test_unknown_version(tmp_path: Path, version: int) -> None:
    content = one_tensor()
    content.version = version
    assert_refused(content.write(tmp_path / "bad.gguf"), f"version {version} is not supported")


@pytest.mark.parametrize("count", [2, 1000, 2**24, 2**24 + 1, 2**63, 2**64 - 1])
def test_counts_beyond_the_file(tmp_path: Path, count: int) -> None:
    for name in ("key_count", "tensor_count"):
        content = one_tensor()
        setattr(content, name, count)
        content.data = b""
        # What lies behind the last entry is padding.
        assert_refused(content.write(tmp_path / "bad.gguf"), "damaged|inside its header|tensor  has 0 dimensions")


@pytest.mark.parametrize("length", [100, 2**31, 2**63, 2**64 - 1])
def test_lengths_beyond_the_file(tmp_path: Path, length: int) -> None:
    too_long = struct.pack("<Q", length)
    for damaged in (
        too_long + b"name",
        key("text", STRING, too_long + b"text"),
        key("bytes", ARRAY, array(UINT8, [b"\0"], length)),
        key("longs", ARRAY, array(UINT64, [bytes(8)], length)),
        key("texts", ARRAY, array(STRING, [string("text")], length)),
        key("texts", ARRAY, array(STRING, [too_long])),
        key("arrays", ARRAY, array(ARRAY, [array(UINT8, [b"\0"])], length)),
    ):
        content = GgufBytes(keys=[damaged])
        assert_refused(content.write(tmp_path / "bad.gguf"), "inside its header|metadata value")


def test_duplicate_key(tmp_path: Path) -> None:
    content = GgufBytes(keys=[key("a.b", UINT32, bytes(4)), key("a.b", UINT32, bytes(4))])
    assert_refused(content.write(tmp_path / "bad.gguf"), r"key a\.b occurs twice")


def test_duplicate_tensor(tmp_path: Path) -> None:
    content = GgufBytes(tensors=[tensor("w", (8,), F32, 0), tensor("w", (8,), F32, 32)], data=bytes(64))
    assert_refused(content.write(tmp_path / "bad.gguf"), "same name")


@pytest.mark.parametrize("offsets", [(0, 0), (0, 32), (32, 0), (64, 32)])
def test_overlapping_tensors(tmp_path: Path, offsets: Sequence[int]) -> None:
    tensors = [tensor(f"t{offset}{place}", (16,), F32, offset) for place, offset in enumerate(offsets)]
    content = GgufBytes(tensors=tensors, data=bytes(256))
    assert_refused(content.write(tmp_path / "bad.gguf"), r"tensors t\d+ and t\d+ overlap")


def test_tensors_in_any_order_without_overlap(tmp_path: Path) -> None:
    content = GgufBytes(tensors=[tensor("b", (16,), F32, 64), tensor("a", (16,), F32, 0)], data=bytes(128))
    assert list(GgufFile(content.write(tmp_path / "good.gguf")).tensors) == ["b", "a"]


@pytest.mark.parametrize("offset", [32, 1 << 40, 2**64 - 32])
def test_offset_beyond_the_end(tmp_path: Path, offset: int) -> None:
    assert_refused(one_tensor(offset=offset).write(tmp_path / "bad.gguf"), "beyond the end of the file")


@pytest.mark.parametrize("offset", [1, 16, 31])
def test_unaligned_offset(tmp_path: Path, offset: int) -> None:
    content = one_tensor(shape=(8,), offset=offset)
    assert_refused(content.write(tmp_path / "bad.gguf"), "does not start at a multiple of 32 bytes")


@pytest.mark.parametrize("shape", [(0,), (0, 32), (2, 0), (2**32, 2**32, 0)])
def test_dimension_of_zero(tmp_path: Path, shape: tuple[int, ...]) -> None:
    assert_refused(one_tensor(shape=shape).write(tmp_path / "bad.gguf"), "has a shape")


@pytest.mark.parametrize("shape", [(2**62,), (2**64 - 1,), (2**32, 2**32), (2**63, 2), (2**16,) * 4])
def test_shape_that_overflows(tmp_path: Path, shape: tuple[int, ...]) -> None:
    # Their products are zero or small modulo 2**64.
    assert_refused(one_tensor(shape=shape).write(tmp_path / "bad.gguf"), "beyond the end of the file")


@pytest.mark.parametrize("n_dimensions", [0, 5, 2**32 - 1])
def test_number_of_dimensions(tmp_path: Path, n_dimensions: int) -> None:
    content = one_tensor(shape=(1,) * 5, n_dimensions=n_dimensions)
    assert_refused(content.write(tmp_path / "bad.gguf"), f"tensor w has {n_dimensions} dimensions")


@pytest.mark.parametrize("type_id", [4, 5, 999, 10000, 10005, 2**32 - 1])
def test_unknown_tensor_type(tmp_path: Path, type_id: int) -> None:
    content = one_tensor(type_id=type_id)
    assert_refused(content.write(tmp_path / "bad.gguf"), f"tensor w has the unknown type {type_id}")


@pytest.mark.parametrize(("type_id", "shape"), [(Q8_0, (2, 33)), (Q8_0, (31,)), (TRIT2, (2, 96)), (10001, (32,))])
def test_rows_that_are_no_whole_blocks(tmp_path: Path, type_id: int, shape: tuple[int, ...]) -> None:
    assert_refused(one_tensor(type_id=type_id, shape=shape).write(tmp_path / "bad.gguf"), "has a shape")


@pytest.mark.parametrize("type_id", [13, 99, 2**32 - 1])
def test_unknown_value_type(tmp_path: Path, type_id: int) -> None:
    for value in (key("k", type_id, bytes(64)), key("k", ARRAY, array(type_id, [bytes(64)]))):
        assert_refused(GgufBytes(keys=[value]).write(tmp_path / "bad.gguf"), f"unknown type {type_id}")


def test_an_empty_array_of_an_unknown_type(tmp_path: Path) -> None:
    path = GgufBytes(keys=[key("k", ARRAY, array(99, []))]).write(tmp_path / "bad.gguf")
    assert_refused(path, "unknown type 99")


def test_nesting_without_end(tmp_path: Path) -> None:
    nested = array(ARRAY, [array(UINT8, [b"\5"])])
    path = GgufBytes(keys=[key("k", ARRAY, nested)]).write(tmp_path / "nested.gguf")
    assert GgufFile(path).metadata["k"] == [[5]]
    for _ in range(5000):
        nested = array(ARRAY, [nested])
    assert_refused(GgufBytes(keys=[key("k", ARRAY, nested)]).write(tmp_path / "bad.gguf"), "metadata value")


@pytest.mark.parametrize("name", [b"\xff\xfe", b"\xc3", b"\xed\xa0\x80"])
def test_names_that_are_no_utf_8(tmp_path: Path, name: bytes) -> None:
    assert_refused(GgufBytes(keys=[key(name, UINT8, b"\0")]).write(tmp_path / "bad.gguf"), "header is damaged")


def test_text_that_is_no_utf_8_is_read_with_replacements(tmp_path: Path) -> None:
    # Vocabularies of old files hold broken tokens.
    path = GgufBytes(keys=[key("k", STRING, string(b"a\xffb"))]).write(tmp_path / "odd.gguf")
    assert GgufFile(path).metadata["k"] == "a�b"


@pytest.mark.parametrize(
    ("type_id", "value"),
    [
        (UINT32, struct.pack("<I", 0)),
        (UINT32, struct.pack("<I", 4)),
        (UINT32, struct.pack("<I", 33)),
        (UINT32, struct.pack("<I", 48)),
        (UINT32, struct.pack("<I", 1 << 31)),
        (INT8, struct.pack("<b", -32)),
        (FLOAT32, struct.pack("<f", 32.0)),
        (BOOL, b"\1"),
        (STRING, string("32")),
        (ARRAY, array(UINT8, [b"\x20"])),
    ],
)
def test_bad_alignment(tmp_path: Path, type_id: int, value: bytes) -> None:
    content = one_tensor()
    content.keys.append(key("general.alignment", type_id, value))
    assert_refused(content.write(tmp_path / "bad.gguf"), r"general\.alignment")


@pytest.mark.parametrize("alignment", [8, 16, 64, 4096])
def test_other_alignments(tmp_path: Path, alignment: int) -> None:
    content = GgufBytes(
        keys=[key("general.alignment", UINT16, struct.pack("<H", alignment))],
        tensors=[tensor("a", (2,), F32, 0), tensor("b", (2,), F32, alignment)],
        data=struct.pack("<2f", 1, 2) + bytes(alignment - 8) + struct.pack("<2f", 3, 4),
        alignment=alignment,
    )
    file = GgufFile(content.write(tmp_path / "good.gguf"))
    assert file.read_float32("a").tolist() == [1, 2]
    assert file.read_float32("b").tolist() == [3, 4]


# -- damage, anywhere


def small_file() -> GgufBytes:
    content = trit_bytes()
    content.keys += [
        key("list", ARRAY, array(STRING, [string("one"), string("two")])),
        key("nested", ARRAY, array(ARRAY, [array(UINT8, [b"\1", b"\2"]), array(UINT8, [])])),
        key("truth", BOOL, b"\1"),
        key("general.alignment", UINT32, struct.pack("<I", 32)),
    ]
    return content


def test_truncation_at_every_length(tmp_path: Path) -> None:
    whole = small_file().write(tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        # The data's last bytes are the last tensor's, so that every cut is a loss.
        assert_refused(path, "inside its header|beyond the end|not a GGUF")


@given(st.data())
def test_flipped_bytes(tmp_path: Path, data: st.DataObject) -> None:
    content = small_file()
    whole = bytearray(content.write(tmp_path / "whole.gguf").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(content.header) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "flipped.gguf"
    path.write_bytes(whole)
    read_everything(path)


def test_every_byte_changed(tmp_path: Path) -> None:
    content = small_file()
    whole = content.write(tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "changed.gguf"
    for place in range(len(content.header)):
        for value in (whole[place] ^ 0x01, whole[place] ^ 0x80, 0xFF):
            path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            read_everything(path)


@given(st.binary(max_size=200))
def test_random_bytes_behind_the_magic(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "random.gguf"
    for start in (b"GGUF", b"GGUF\3\0\0\0", b"GGUF\3\0\0\0" + struct.pack("<QQ", 1, 1)):
        path.write_bytes(start + tail)
        read_everything(path)
