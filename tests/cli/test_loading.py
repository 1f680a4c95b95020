"""What commands that load a model say about it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_mixtures import write_tiny_mixture

from tritgguf.cli.loading import load_model
from tritgguf.conversion.convert import convert
from tritgguf.formats.gguf_file import GgufFile


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tritgguf.machine.machine_memory_bytes", lambda: (64_000_000, 1000))


def test_a_file_that_fits_is_not_mentioned(
    tiny_trit_file: Callable[..., GgufFile], capsys: pytest.CaptureFixture[str]
) -> None:
    load_model(tiny_trit_file().path)
    assert "memory" not in capsys.readouterr().err


def test_a_draft_model_that_cannot_help_is_told(
    tiny_trit_file: Callable[..., GgufFile], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tiny_trit_file().path
    load_model(file, draft=file)
    assert "note: nothing will be drafted, because it would not save time" in capsys.readouterr().err
    load_model(file, lookup=True)
    assert "drafted" not in capsys.readouterr().err


@pytest.mark.usefixtures("little_memory")
def test_a_file_larger_than_memory(tiny_trit_file: Callable[..., GgufFile], capsys: pytest.CaptureFixture[str]) -> None:
    load_model(tiny_trit_file().path)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "but only 0.0 GB of memory are available; for each token, what does not fit is read from the disk" in line


@pytest.mark.usefixtures("little_memory")
def test_a_mixture_larger_than_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(write_tiny_mixture(tmp_path / "model"), tmp_path / "d2.gguf", depth=2)
    load_model(tmp_path / "d2.gguf")
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "experts that are not in memory are read from the disk" in line
