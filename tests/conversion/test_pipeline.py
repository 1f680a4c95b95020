"""Parallel reading, encoding and writing: the same file, and a one-line error if a thread fails."""

from __future__ import annotations

import errno
import importlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import write_tiny_model

from tritgguf.conversion.convert import convert
from tritgguf.errors import TritGgufError
from tritgguf.formats.durable_output import disk_errors
from tritgguf.formats.gguf_writer import StreamingWriter
from tritgguf.sources.open import open_source
from tritgguf.sources.source import Source

MODULE = importlib.import_module("tritgguf.conversion.pipeline")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model."""
    return write_tiny_model(tmp_path_factory.mktemp("llama") / "model")


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def assert_fails(source: Path, folder: Path, message: str) -> None:
    """Assert that a conversion fails in one line and leaves nothing in the folder."""
    with pytest.raises(TritGgufError, match=message) as caught:
        convert(source, folder / "out.gguf")
    assert "\n" not in str(caught.value)
    assert list(folder.iterdir()) == []


def test_a_slow_disk_does_not_change_the_file(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(llama, tmp_path / "default.gguf")
    monkeypatch.setattr(MODULE, "_UNWRITTEN_BYTES", 0)
    monkeypatch.setattr(importlib.import_module("tritgguf.formats.gguf_writer"), "_SYNC_BYTES", 0)
    slow_write = StreamingWriter.write

    def write(self: StreamingWriter, data: np.ndarray) -> None:
        time.sleep(0.01)
        slow_write(self, data)

    monkeypatch.setattr(StreamingWriter, "write", write)
    convert(llama, tmp_path / "slow.gguf")
    assert (tmp_path / "slow.gguf").read_bytes() == (tmp_path / "default.gguf").read_bytes()


def test_the_disk_fills_up(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = StreamingWriter.write

    def fill(self: StreamingWriter, data: np.ndarray) -> None:
        if self._next == 9:
            with disk_errors(self.output):
                raise OSError(errno.ENOSPC, "No space left on device")
        write(self, data)

    monkeypatch.setattr(StreamingWriter, "write", fill)
    with pytest.raises(TritGgufError, match=r"out\.gguf: cannot be written \(No space left on device\); make room"):
        convert(llama, tmp_path / "out.gguf")
    assert names(tmp_path) == ["out.gguf.part", "out.gguf.part.journal"]


def test_the_source_is_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tiny_model(tmp_path / "model")
    (tmp_path / "outputs").mkdir()
    shard = folder / "model.safetensors"

    def open_and_cut(location: str) -> Source:
        source = open_source(location)
        shard.write_bytes(shard.read_bytes()[:-4000])
        return source

    monkeypatch.setattr(importlib.import_module("tritgguf.conversion.convert"), "open_source", open_and_cut)
    assert_fails(folder, tmp_path / "outputs", r"model\.safetensors: ends inside tensor")


def test_progress_comes_while_it_works(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []
    encode = MODULE._encode

    def slow_encode(source: Source, task: Any, *others: object) -> object:
        time.sleep(0.02)
        encoded.append(task.matrix.name)
        return encode(source, task, *others)

    monkeypatch.setattr(MODULE, "_encode", slow_encode)
    seen: list[int] = []
    convert(llama, tmp_path / "out.gguf", progress=lambda step: seen.append(len(encoded)))
    assert len(seen) == len(encoded) == 21
    assert seen[0] < 10


@pytest.mark.parametrize("last", ["blk.0.attn_q.weight", "output_norm.weight"])
def test_ctrl_c(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, last: str) -> None:
    def interrupt(source: Source, task: Any, *others: object) -> object:
        if task.matrix.name == last:
            raise KeyboardInterrupt
        return encode(source, task, *others)

    encode = MODULE._encode
    monkeypatch.setattr(MODULE, "_encode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(llama, tmp_path / "out.gguf")
    assert names(tmp_path) == ["out.gguf.part", "out.gguf.part.journal"]
