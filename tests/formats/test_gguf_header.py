"""What the first bytes of a file tell of its keys."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tritgguf.formats.gguf_file import GgufFile
from tritgguf.formats.gguf_header import head_has_key
from tritgguf.formats.trit_types import KEY_VERSION


def test_a_key_is_found_as_soon_as_its_name_is_there(tiny_trit_file: Callable[..., GgufFile]) -> None:
    content = tiny_trit_file().path.read_bytes()
    name = KEY_VERSION.encode()
    end = content.index(len(name).to_bytes(8, "little") + name) + 8 + len(name)
    for length in (0, 3, 4, 24, 100, end - 1):
        assert head_has_key(content[:length], KEY_VERSION) is None
    for length in (end, end + 1, len(content)):
        assert head_has_key(content[:length], KEY_VERSION) is True


def test_a_key_is_missing_when_the_tensors_begin(tiny_trit_file: Callable[..., GgufFile]) -> None:
    file = tiny_trit_file()
    content = file.path.read_bytes()
    header_end = min(info.offset for info in file.tensors.values())
    assert head_has_key(content[:header_end], "trit.other") is False
    assert head_has_key(content, "trit.other") is False
    assert head_has_key(content[:2000], "trit.other") is None


@pytest.mark.parametrize("head", [b"GG?", b"<!doctype html>", bytes(100), b"GGUF" + b"\xff" * 100])
def test_what_is_no_gguf_file_has_no_key(head: bytes) -> None:
    assert head_has_key(head, KEY_VERSION) is False
