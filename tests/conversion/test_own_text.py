"""Text that the model writes beside a user's: passages that it continues, resuming, the command's options."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tiny_models import write_tiny_model

from tritgguf.calibration.text import window_length
from tritgguf.cli import app
from tritgguf.conversion.own_text import SavedText, calibration_windows
from tritgguf.errors import TritGgufError
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.sources.open import open_source

PASSAGE = 8


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file whose passages differ."""
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"{number} birds sing in {number * number % 97} trees" for number in range(200)))
    return path


@pytest.mark.parametrize(("variant", "bos"), [("llama", 0), ("llama-sentencepiece", 1)])
def test_own_text_continues_passages_of_the_text(tmp_path: Path, text: Path, variant: str, bos: int) -> None:
    source = open_source(str(write_tiny_model(tmp_path / "model", variant)))
    length = window_length(source)
    alone, name = calibration_windows(source, text, 2 * length)
    windows, both = calibration_windows(source, text, 2 * length, own_tokens=3 * length, seed=4)
    assert (name, both) == ("text.txt", "text.txt and own text, seed 4")
    assert windows[:2] == alone
    assert [len(window) for window in windows] == [length] * 5
    passages = {tuple(window[at : at + PASSAGE]) for window in alone for at in range(bos, length, PASSAGE)}
    for window in windows[2:]:
        assert tuple(window[bos : bos + PASSAGE]) in passages
        assert window[:bos] == alone[0][:bos]
    assert len({tuple(window[:PASSAGE]) for window in windows[2:]}) > 1
    assert windows == calibration_windows(source, text, 2 * length, own_tokens=3 * length, seed=4)[0]
    assert windows[2:] != calibration_windows(source, text, 2 * length, own_tokens=3 * length, seed=5)[0][2:]


def test_own_text_is_resumed_only_for_the_same_text(tmp_path: Path, text: Path) -> None:
    source = open_source(str(write_tiny_model(tmp_path / "model")))
    length = window_length(source)
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[::-1])

    def windows(text: Path, *, resume: bool, stop: bool = False) -> list[list[int]]:
        def progress(done: int, total: int) -> None:
            if stop and done == total:
                raise KeyboardInterrupt

        with SavedText(tmp_path / "out.gguf", resume=resume) as saved:
            return calibration_windows(
                source, text, length, own_tokens=2 * length, seed=1, saved=saved, progress=progress
            )[0]

    whole = windows(text, resume=False)
    assert not (tmp_path / "out.gguf.part.text").exists()
    with pytest.raises(KeyboardInterrupt):
        windows(text, resume=False, stop=True)
    assert (tmp_path / "out.gguf.part.text").exists()
    with pytest.raises(TritGgufError, match="the journal is of another conversion"):
        windows(other, resume=True)
    saved = (tmp_path / "out.gguf.part.text").read_bytes()
    assert windows(text, resume=True) == whole
    (tmp_path / "out.gguf.part.text").write_bytes(saved)
    weights = next((tmp_path / "model").glob("*.safetensors"))
    os.utime(weights, (1, 1))  # as if another model had come into the folder
    with pytest.raises(TritGgufError, match="the journal is of another conversion"):
        windows(text, resume=True)


def test_the_command_takes_both_texts(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(write_tiny_model(tmp_path / "model"))
    files = [tmp_path / name for name in ("text.gguf", "both.gguf", "again.gguf")]
    for file, own in zip(files, ([], ["--own-text", "512"], ["--own-text", "512"]), strict=True):
        assert app.main(["convert", source, str(file), "--text", str(text), "--tokens", "256", *own]) == 0
        assert GgufFile(file).metadata["trit.encoder"] == "calibrated"
    alone, both, again = (file.read_bytes() for file in files)
    assert alone != both
    assert both == again
    assert app.main(["convert", source, str(tmp_path / "x.gguf"), "--own-text", "512"]) == 2
    assert "--own-text adds to the text of --text" in " ".join(capsys.readouterr().err.split())
