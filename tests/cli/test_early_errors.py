"""What is said before a model is loaded or a text generated, and what to type instead."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Capture, fails
from converted_models import as_stock_gguf
from loopback_hub import loopback_hub, use_hub
from tiny_models import write_tiny_model

from cpu_kernels import precompile
from tritgguf.cli import app
from tritgguf.errors import BadRequestError
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.generation.loaded_model import load
from tritgguf.sources.open import open_source

Files = Callable[..., GgufFile]
LOADED_MODEL = importlib.import_module("tritgguf.generation.loaded_model")
OWN_TEXT = importlib.import_module("tritgguf.conversion.own_text")
RUNS_A_TRIT_FILE = (
    ("run", "{}", "-p", "Hi"),
    ("bench", "{}"),
    ("export", "{}", "out", "--to", "hf"),
    ("verify", "{folder}", "{}"),
    ("serve", "{}", "--port", "0"),
)
READS_ANY_GGUF_FILE = (("check", "{}"), ("inspect", "{}"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("wrong files") / "a model")


@pytest.fixture(scope="module")
def stock(folder: Path) -> Path:
    return as_stock_gguf(open_source(folder), folder.parent / "stock.gguf")


def error_of(capsys: Capture, command: tuple[str, ...], file: Path | str, folder: Path) -> str:
    return fails(capsys, *(word.format(file, folder=folder) for word in command))


def typed(line: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """Type the command that an error names, in a folder; return what it has written."""
    words = shlex.split(line[line.index("tritgguf convert ") :])
    monkeypatch.chdir(folder)
    assert app.main(words[1:]) == 0
    return folder / words[-1]


@pytest.mark.parametrize("command", [*RUNS_A_TRIT_FILE, *READS_ANY_GGUF_FILE], ids=lambda command: command[0])
def test_a_folder(capsys: Capture, folder: Path, command: tuple[str, ...]) -> None:
    line = error_of(capsys, command, folder, folder)
    assert f"{folder}: is a folder, not a GGUF file; make one first: tritgguf convert '{folder}' 'a model.gguf'" in line


@pytest.mark.parametrize("command", [*RUNS_A_TRIT_FILE, *READS_ANY_GGUF_FILE], ids=lambda command: command[0])
def test_a_hub_id_without_a_trit_file(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path, command: tuple[str, ...]
) -> None:
    with loopback_hub() as hub:
        hub.models["Qwen/Qwen2.5-1.5B"] = {"model.safetensors": b"x", "config.json": b"{}"}
        use_hub(monkeypatch, hub, tmp_path)
        line = error_of(capsys, command, "Qwen/Qwen2.5-1.5B", folder)
    assert "the hub has no trit file of this model" in line
    assert "tritgguf convert Qwen/Qwen2.5-1.5B Qwen2.5-1.5B.gguf" in line


@pytest.mark.parametrize("command", RUNS_A_TRIT_FILE, ids=lambda command: command[0])
def test_a_stock_file(capsys: Capture, folder: Path, stock: Path, command: tuple[str, ...]) -> None:
    line = error_of(capsys, command, stock, folder)
    assert f"{stock}: is a stock GGUF file; pack it into trits first: tritgguf convert" in line


@pytest.mark.parametrize("what", ["missing.gguf", "missing", "a/b.gguf", "folder"])
def test_other_files_get_no_advice(capsys: Capture, folder: Path, tmp_path: Path, what: str) -> None:
    (tmp_path / "folder").mkdir()
    assert "convert" not in error_of(capsys, RUNS_A_TRIT_FILE[0], tmp_path / what, folder)


@pytest.mark.parametrize("what", ["folder", "stock"])
def test_the_command_that_is_named_makes_a_file_that_runs(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, folder: Path, stock: Path, what: str, tmp_path: Path
) -> None:
    line = error_of(capsys, RUNS_A_TRIT_FILE[0], folder if what == "folder" else stock, folder)
    made = typed(line, monkeypatch, tmp_path)
    assert app.main(["run", str(made), "--raw", "-p", "The dog", "-n", "1"]) == 0


def test_python_is_told_too(folder: Path, stock: Path) -> None:
    with pytest.raises(BadRequestError, match="tritgguf convert"):
        load(stock)


def untouched(*arguments: Any, **options: Any) -> None:
    raise AssertionError("this must not be reached")


@pytest.mark.parametrize(
    "command",
    [
        ("convert", "missing", "out.gguf"),
        ("calibrate", "missing", "-o", "out.gguf"),
        ("calibrate", "{folder}", "-o", "out.gguf", "--text", "missing"),
        ("export", "missing", "out.gguf", "--to", "f16"),
        ("export", "{file}", "out.gguf", "--to", "missing"),
        ("verify", "missing", "{file}"),
        ("verify", "{folder}", "missing"),
        ("run", "missing", "-p", "Hi"),
        ("bench", "missing"),
        ("serve", "missing", "--port", "0"),
    ],
    ids=" ".join,
)
def test_what_is_mistyped_does_not_wait_for_the_kernels(
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    tiny_trit_file: Files,
    tmp_path: Path,
    command: tuple[str, ...],
) -> None:
    file = tiny_trit_file().path
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(precompile, "precompile", untouched)
    assert "missing" in fails(capsys, *(word.format(folder=folder, file=file) for word in command))


@pytest.mark.parametrize("package", ["torch", "transformers"])
@pytest.mark.parametrize("command", ["calibrate", "convert"])
def test_what_calibrating_needs_is_looked_for_before_a_text_is_generated(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path, command: str, package: str
) -> None:
    monkeypatch.setattr(OWN_TEXT, "calibration_windows", untouched)
    monkeypatch.setitem(sys.modules, package, None)
    output = [str(tmp_path / "out.gguf"), "--encoder", "calibrated"]
    arguments = output if command == "convert" else ["-o", output[0], "--self"]
    assert f"this needs {package}" in fails(capsys, command, str(folder), *arguments)
    assert list(tmp_path.iterdir()) == []


def test_an_encoder_without_use_for_a_text_is_refused_before_one_is_generated(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(OWN_TEXT, "calibration_windows", untouched)
    line = fails(capsys, "convert", str(folder), str(tmp_path / "out.gguf"), "--encoder", "v2", "--self")
    assert "encoder calibrated and a calibration text go together" in line
    assert list(tmp_path.iterdir()) == []


def test_options_without_use_are_named(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    command = ["convert", str(folder), str(tmp_path / "out.gguf"), "--depth", "3"]
    assert app.main([*command, "--tokens", "512"]) == 0
    assert "note: --tokens and --seed have no use here" in capsys.readouterr().err
    (tmp_path / "text.txt").write_text("The quick brown fox. " * 200)
    command += ["--text", str(tmp_path / "text.txt"), "--tokens", "64", "--overwrite", "--encoder", "best"]
    assert app.main([*command, "--target-bpw", "3"]) == 0
    assert "note: --depth has no use here" in capsys.readouterr().err


@pytest.mark.parametrize("raw", [False, True])
def test_a_prompt_that_is_too_long_is_refused_before_loading(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tiny_trit_file: Files, raw: bool
) -> None:
    """The tiny model's context is 256. Its template alone takes more than 16 tokens, or this one does."""
    file = str(tiny_trit_file().path)
    monkeypatch.setattr(LOADED_MODEL, "load", untouched)
    prompts = (["-c", "16", "-p", "dog " * 50], ["-p", "dog " * 500], *([] if raw else [["-c", "4", "-p", "dog"]]))
    for arguments in prompts:
        line = fails(capsys, "run", file, *arguments, *(["--raw"] if raw else []))
        assert "tokens, the context holds" in line
        assert "--ctx-size" in line


def test_a_prompt_that_fits_just_so_is_loaded(monkeypatch: pytest.MonkeyPatch, tiny_trit_file: Files) -> None:
    file = tiny_trit_file().path
    tokens = len(load(file, parallel=1).tokenizer.encode("dog " * 50, add_special=True, parse_special=True))
    arguments = ["run", str(file), "--raw", "-p", "dog " * 50, "-n", "0", "-c"]
    assert app.main([*arguments, str(tokens)]) == 0
    assert app.main([*arguments, str(tokens - 1)]) == 1


@pytest.mark.parametrize("command", ["calibrate", "convert"])
def test_the_reported_time_is_the_clock_s(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path, command: str
) -> None:
    """It includes the time in which the text is generated."""
    seconds = 1.5

    def slow_windows(*arguments: Any, **options: Any) -> tuple[list[list[int]], str]:
        time.sleep(seconds)
        return [list(range(3, 131))] * 2, "a slow text"

    monkeypatch.setattr(OWN_TEXT, "calibration_windows", slow_windows)
    output = [str(tmp_path / "out.gguf"), "--encoder", "calibrated"]
    arguments = output if command == "convert" else ["-o", output[0], "--self"]
    started = time.perf_counter()
    assert app.main([command, str(folder), *arguments, "--json"]) == 0
    assert seconds <= json.loads(capsys.readouterr().out)["seconds"] <= time.perf_counter() - started


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--depth", "5"), "depth 5 does not exist"),
        (("--keep", "nosuch=2"), "no matrix has such a name"),
        (("--text", "nosuch.txt"), "nosuch.txt: cannot be read"),
        (("--text", "empty.txt"), "empty.txt: has no text"),
        (("--imatrix", "nosuch.gguf"), "nosuch.gguf"),
        (("--recipe", "nosuch"), "recipe nosuch does not exist"),
        (("--target-size", "50kB", "--self"), "with these options the file has"),
        (("--keep", "*=4", "--target-bpw", "3"), "with these options it is 5.239 bits per weight at least"),
        (("--sensitivity", "0.1", "--depth", "1"), "depth 1 has no trit to remove"),
    ],
)
def test_options_are_checked_before_kernels_are_compiled(
    folder: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n")
    compiler = importlib.import_module("tritgguf.runtime.compiler")
    monkeypatch.setattr(compiler, "prepare_kernels", lambda: pytest.fail("kernels would be compiled"))
    assert message in fails(capsys, "convert", str(folder), "out.gguf", *options)
    assert "give at most 1024" in fails(capsys, "convert", str(folder), "out.gguf", "-t", "9999", code=2)
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_text_from_a_pipe_is_read_once(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_text("The quick brown fox. " * 200), daemon=True)
    writer.start()
    command = ["convert", str(folder), str(tmp_path / "out.gguf"), "--depth", "2", "--encoder", "calibrated"]
    assert app.main([*command, "--text", str(pipe), "--tokens", "128"]) == 0
