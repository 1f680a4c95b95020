"""Damaged GGUF files: every fault gives a one-line error, and nothing is read out of bounds."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from gguf_bytes import (
    ARRAY,
    BOOL,
    FLOAT32,
    INT8,
    STRING,
    UINT8,
    UINT16,
    UINT32,
    UINT64,
    GgufBytes,
    array,
    key,
    string,
    tensor,
    trit_bytes,
)
from hypothesis import given
from hypothesis import strategies as st

from tritgguf.errors import TritGgufError
from tritgguf.formats.gguf_file import GgufFile

F32, F16, Q8_0, TRIT2 = 0, 1, 8, 10002


def assert_refused(path: Path, message: str) -> None:
    """Assert that the file is refused when it is opened, in one line that names it."""
    with pytest.raises(TritGgufError, match=message) as caught:
        GgufFile(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def read_everything(path: Path) -> None:
    """Read everything in a file; only TritGgufError may be raised."""
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
    assert_refused(tmp_path, "is a folder, not a GGUF file")
    os.mkfifo(tmp_path / "pipe.gguf")
    assert_refused(tmp_path / "pipe.gguf", "is a pipe, not a file")


@pytest.mark.parametrize("version", [0, 1, 4, 4 << 24])
def test_unknown_version(tmp_path: Path, version: int) -> None:
    content = one_tensor()
    content.version = version
    assert_refused(content.write(tmp_path / "bad.gguf"), f"version {version} is not supported")


@pytest.mark.parametrize("version", [2, 3])
def test_a_big_endian_file(tmp_path: Path, version: int) -> None:
    content = one_tensor()
    content.version = version << 24
    assert_refused(content.write(tmp_path / "bad.gguf"), r"is big-endian.*gguf-convert-endian FILE little")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
            "is a Git LFS pointer.*`git lfs pull`",
        ),
        (b"PK\3\4" + bytes(100), "it is a ZIP archive or pickled PyTorch weights"),
        (b"tjgg" + bytes(100), "it is a GGML file from before GGUF"),
        (b"\n<!DOCTYPE html><html>" + bytes(100), "it is a web page"),
        (struct.pack("<Q", 100) + b'{"__metadata__":{}}' + bytes(100), "it is a safetensors file: give the folder"),
    ],
)
def test_files_that_are_something_else(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    assert_refused(tmp_path / "model.gguf", f"not a GGUF file; it .*{message.removeprefix('it ')}")


@pytest.mark.parametrize("count", [2, 1000, 2**24, 2**24 + 1, 2**63, 2**64 - 1])
def test_counts_beyond_the_file(tmp_path: Path, count: int) -> None:
    for name in ("key_count", "tensor_count"):
        content = one_tensor()
        setattr(content, name, count)
        content.data = b""
        # The bytes after the last entry are padding.
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


# -- anywhere


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
        # The file ends with the last tensor's data, so every truncation loses data.
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
