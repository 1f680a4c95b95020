"""Replacing metadata of a file: what changes, what does not, and what happens when it fails."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFValue, GGUFValueType, GGUFWriter

from tritgguf.errors import TritGgufError
from tritgguf.formats import header_edit
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.formats.header_edit import replace_entries
from tritgguf.formats.integrity import check

ENTRIES = {
    "trit.score.kl_mean": GGUFValue(0.1, GGUFValueType.FLOAT64),
    "trit.score.tokens": GGUFValue(512, GGUFValueType.UINT32),
    "trit.score.text": GGUFValue("ä text", GGUFValueType.STRING),
}
VALUES = {key: value.value for key, value in ENTRIES.items()}


@pytest.fixture
def path(tiny_trit_file: Callable[..., GgufFile], tmp_path: Path) -> Path:
    return Path(shutil.copy(tiny_trit_file().path, tmp_path / "model.gguf"))


def test_new_keys_come_last_and_nothing_else_changes(path: Path) -> None:
    content, old = path.read_bytes(), GgufFile(path)
    path.chmod(0o640)
    replace_entries(path, "trit.score.", ENTRIES)
    new = GgufFile(path)
    assert dict(new.metadata) == {**old.metadata, **VALUES}
    assert list(new.metadata) == [*old.metadata, *VALUES]
    assert list(new.tensors) == list(old.tensors)
    for name, info in new.tensors.items():
        assert new.raw(name).tobytes() == content[old.tensors[name].offset :][: info.n_bytes]
    assert check(path).checksums == len(new.tensors)
    assert path.stat().st_mode & 0o777 == 0o640
    assert [entry.name for entry in path.parent.iterdir()] == ["model.gguf"]
    assert GGUFReader(path).get_field("trit.score.tokens") is not None


def test_replacing_and_removing(path: Path) -> None:
    content = path.read_bytes()
    replace_entries(path, "trit.score.", ENTRIES)
    once = path.read_bytes()
    replace_entries(path, "trit.score.", {"trit.score.other": GGUFValue("x" * 1000, GGUFValueType.STRING)})
    assert "trit.score.kl_mean" not in GgufFile(path).metadata
    replace_entries(path, "trit.score.", ENTRIES)
    assert path.read_bytes() == once
    replace_entries(path, "trit.score.", {})
    assert path.read_bytes() == content


@pytest.mark.parametrize("alignment", [32, 64, 4096])
def test_a_file_with_another_alignment(tmp_path: Path, alignment: int) -> None:
    path = tmp_path / "aligned.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_custom_alignment(alignment)
    writer.add_array("empty", [1])
    numbers = np.arange(12, dtype=np.float32).reshape(3, 4)
    writer.add_tensor("a", numbers)
    writer.add_tensor("b", numbers + 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    replace_entries(path, "trit.score.", ENTRIES)
    file = GgufFile(path)
    np.testing.assert_array_equal(file.read_float32("b"), numbers + 1)
    assert file.metadata["trit.score.text"] == "ä text"


def test_who_has_the_file_open_keeps_it(path: Path) -> None:
    old = GgufFile(path)
    name = next(iter(old.tensors))
    before = old.raw(name).tobytes()
    replace_entries(path, "trit.score.", ENTRIES)
    assert old.raw(name).tobytes() == before
    assert "trit.score.text" not in old.metadata


def test_a_link_stays_a_link(path: Path) -> None:
    link = path.with_name("link.gguf")
    link.symlink_to(path)
    replace_entries(link, "trit.score.", ENTRIES)
    assert link.is_symlink()
    assert GgufFile(path).metadata["trit.score.tokens"] == 512


@pytest.mark.parametrize("failing", ["copyfileobj", "replace", "room", "check"])
def test_a_failure_leaves_the_file_as_it_was(path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    content = path.read_bytes()

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    def too_small(folder: Path) -> tuple[int, int, int]:
        return shutil._ntuple_diskusage(10, 10, 10)

    if failing == "copyfileobj":
        monkeypatch.setattr(shutil, "copyfileobj", fail)
    elif failing == "replace":
        monkeypatch.setattr(os, "replace", fail)
    elif failing == "room":
        monkeypatch.setattr(shutil, "disk_usage", too_small)
    else:
        monkeypatch.setattr(header_edit, "encode_entries", lambda entries: b"damaged")
    with pytest.raises(TritGgufError):
        replace_entries(path, "trit.score.", ENTRIES)
    assert path.read_bytes() == content
    assert [entry.name for entry in path.parent.iterdir()] == ["model.gguf"]


def test_a_conversion_that_can_be_resumed_stays(path: Path) -> None:
    part = path.with_name("model.gguf.part")
    part.write_text("most of a model")
    replace_entries(path, "trit.score.", ENTRIES)
    assert part.read_text() == "most of a model"


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(b"GGUF" + bytes(10))
    with pytest.raises(TritGgufError, match=r"damaged\.gguf"):
        replace_entries(path, "trit.score.", ENTRIES)
