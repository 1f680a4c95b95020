"""Outputs: what is no regular file is never replaced, links are followed, and no input is ever written over."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from tiny_models import write_tiny_model

from tritgguf.cli import app
from tritgguf.conversion.convert import convert
from tritgguf.errors import BadRequestError, TritGgufError
from tritgguf.exporters.export import export
from tritgguf.formats.durable_output import PART_SUFFIXES, check_output, check_room
from tritgguf.formats.gguf_file import GgufFile

needs_links = pytest.mark.skipif(os.name == "nt", reason="needs links, pipes and devices")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("source") / "model")


@needs_links
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_regular_file_is_never_replaced(tmp_path: Path, folder: Path, overwrite: bool) -> None:
    fifo, loop = tmp_path / "fifo", tmp_path / "loop"
    os.mkfifo(fifo)
    loop.symlink_to(loop)
    (tmp_path / "link").symlink_to(os.devnull)
    for output in (fifo, loop, tmp_path / "link", Path(os.devnull)):
        with pytest.raises(BadRequestError, match=rf"{output}: is no regular file"):
            convert(folder, output, overwrite=overwrite)
    assert fifo.is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo", "link", "loop"]


@needs_links
def test_a_link_to_a_file_is_followed(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "real.gguf", tmp_path / "link.gguf"
    link.symlink_to(target)
    convert(folder, link)  # there is no such file yet
    assert link.is_symlink()
    assert len(GgufFile(target).tensors) == 21
    with pytest.raises(BadRequestError, match=r"link\.gguf: exists already"):
        convert(folder, link)
    target.write_bytes(b"old")
    convert(folder, link, overwrite=True)
    assert link.is_symlink()
    assert len(GgufFile(target).tensors) == 21
    export(target, link.with_name("x.gguf"), to="f16")
    assert sorted(path.name for path in tmp_path.rglob("*.gguf*")) == ["link.gguf", "real.gguf", "x.gguf"]


def copied(path: Path, kind: str) -> Path:
    """Return another name of a file: itself, a link, or a path with a detour."""
    other = path.with_name(f"{kind}.gguf")
    if kind == "symlink":
        other.symlink_to(path)
    elif kind == "hardlink":
        other.hardlink_to(path)
    else:
        return path.parent / ".." / path.parent.name / path.name
    return other


@needs_links
@pytest.mark.parametrize("kind", ["detour", "symlink", "hardlink"])
def test_no_input_is_ever_replaced(tmp_path: Path, folder: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.gguf"
    convert(folder, path, depth=3)
    content, same = path.read_bytes(), copied(path, kind)
    commands = (
        ["convert", str(path), str(same), "--overwrite"],
        ["convert", str(same), str(path), "--overwrite"],
        ["convert", str(folder), str(same), "--imatrix", str(path), "--overwrite"],
        ["convert", str(folder), str(same), "--text", str(path), "--overwrite"],
        ["export", str(path), str(same), "--to", "q8_0", "--overwrite"],
        ["calibrate", str(path), "-o", str(same), "--self", "--overwrite"],
        ["calibrate", str(folder), "-o", str(same), "--text", str(path), "--overwrite"],
    )
    for command in commands:
        assert app.main(command) == 1
        assert "writing it would replace" in capsys.readouterr().err, command
        assert path.read_bytes() == content
    assert not list(tmp_path.glob("*.part*"))


def test_a_file_of_a_source_folder_is_an_input(folder: Path) -> None:
    with pytest.raises(BadRequestError, match=r"would replace .*model\.safetensors, which is read"):
        convert(folder, folder / "model.safetensors", overwrite=True)
    assert check_output(folder / "new.gguf", False, [folder]) == folder / "new.gguf"


@pytest.mark.parametrize("suffix", PART_SUFFIXES[1:])
def test_an_input_that_has_the_name_of_an_unfinished_output(tmp_path: Path, folder: Path, suffix: str) -> None:
    source = tmp_path / f"out.gguf{suffix}"
    convert(folder, source)
    content = source.read_bytes()
    with pytest.raises(BadRequestError, match="would replace"):
        convert(source, tmp_path / "out.gguf")
    assert source.read_bytes() == content


def test_a_disk_that_is_just_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000_000))
    check_room(tmp_path / "out.gguf", 100_000_000)
    with pytest.raises(TritGgufError, match=r"needs 100\.0 MB, 1 B more than are free there; make room"):
        check_room(tmp_path / "out.gguf", 100_000_001)


def test_nothing_to_resume(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = str(tmp_path / "out.gguf")
    command = ["convert", str(folder), output, "--encoder", "v2", "--resume"]
    assert app.main(command) == 0
    assert app.main(command) == 1
    assert "out.gguf: is complete, so there is nothing to resume; use --overwrite" in capsys.readouterr().err
    (tmp_path / "out.gguf.part").write_bytes(b"")
    with pytest.raises(BadRequestError, match="exists already"):
        convert(folder, output, resume=True)


@needs_links
def test_an_unfinished_file_is_no_link(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "precious").write_bytes(b"mine")
    (tmp_path / "out.gguf.part").symlink_to(tmp_path / "precious")
    assert app.main(["convert", str(folder), str(tmp_path / "out.gguf"), "--encoder", "v2"]) == 1
    assert (tmp_path / "precious").read_bytes() == b"mine"


@pytest.mark.parametrize("inputs", [[None], ["org/name"], ["-", None], ["missing.gguf"]])
def test_inputs_that_are_no_files_are_no_hindrance(tmp_path: Path, inputs: list[str | None]) -> None:
    assert check_output(tmp_path / "out.gguf", False, inputs) == tmp_path / "out.gguf"
