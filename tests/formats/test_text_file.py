"""Text that a user gives: encodings with a byte order mark are read, everything else that is not UTF-8 is refused."""

from __future__ import annotations

import io
import random
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tritgguf.errors import BadRequestError, TritGgufError
from tritgguf.formats.text_file import decode_text, read_text

TEXT = "Caf\u00e9 \u4f60\u597d \U0001f680\r\n\tend"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_marked_encodings_give_the_same_text(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "text").write_bytes(TEXT.encode(encoding))
    assert read_text(tmp_path / "text") == TEXT


@pytest.mark.parametrize("order", ["le", "be"])
@pytest.mark.parametrize("width", [16, 32])
def test_both_byte_orders(order: str, width: int) -> None:
    assert decode_text(f"\ufeff{TEXT}".encode(f"utf-{width}-{order}"), "x") == TEXT


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("Caf\u00e9".encode("latin-1"), "x: is not UTF-8 text: byte 0xE9 at offset 3; save it as UTF-8"),
        (b"ab\xc3", "x: is not UTF-8 text: byte 0xC3 at offset 2"),
        (b"\xed\xa0\x80", "x: is not UTF-8 text: byte 0xED at offset 0"),  # half of a surrogate pair
        (b"\xff\xfea\0\0", "x: is not UTF-16-LE text: byte 0x00 at offset 4"),
        (b"\xfe\xff\xd8\x00\x00a", "x: is not UTF-16-BE text: byte 0xD8 at offset 2"),
        ("ab".encode("utf-16-le"), "x: is not text, or UTF-16 without a byte order mark: a zero byte at offset 1"),
        ("\u4f60a".encode("utf-16-be"), "zero byte at offset 2"),
        (random.Random(0).randbytes(3000), "x: is not UTF-8 text: byte"),
        (b"\x1f\x8b\x08\0\0\0", "x: is compressed with gzip; unpack it first"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "x: is a Git LFS pointer.*git lfs pull"),
    ],
)
def test_bytes_that_are_no_text_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(BadRequestError, match=message):
        decode_text(data, "x")


@pytest.mark.parametrize("text", ["", "<html><body>", "GGUF is a format", "a\x1b[0m\x7f", "\ufeff"])
def test_texts_that_look_like_other_files_are_text(text: str) -> None:
    assert decode_text(text.encode(), "x") == text.removeprefix("\ufeff")


@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\0")))
def test_any_text_in_utf_8_is_read_as_it_is(text: str) -> None:
    assert decode_text(text.encode(), "x") == text.removeprefix("\ufeff")


def test_a_dash_is_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode("utf-16"))))
    assert read_text("-") == TEXT
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xe9")))
    with pytest.raises(BadRequestError, match="standard input: is not UTF-8 text: byte 0xE9 at offset 1"):
        read_text("-")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(BadRequestError, match="standard input is closed"):
        read_text("-")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(TritGgufError, match=rf"{path}: cannot be read \(.*\); give a text file"):
            read_text(path)
