"""convert, verify and inspect: options, output and errors."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import Capture, fails
from tiny_models import write_tiny_model

from tritgguf.cli import app, terminal
from tritgguf.cli.convert import print_conversion
from tritgguf.conversion.convert import ConvertProgress, convert
from tritgguf.conversion.depths import DepthChoice, KeepRule
from tritgguf.conversion.encoders import V2
from tritgguf.conversion.recipes import parse_recipe
from tritgguf.conversion.report import ConvertReport
from tritgguf.errors import TritGgufError
from tritgguf.evaluation.layer_errors import LayerError
from tritgguf.evaluation.verify import VerifyReport
from tritgguf.formats.file_parts import FilePart

CONVERT, VERIFY = (importlib.import_module(f"tritgguf.{name}") for name in ("conversion.convert", "evaluation.verify"))


def conversion() -> ConvertReport:
    return ConvertReport(
        output=Path("out.gguf"),
        source="models/x",
        depth=2,
        encoder="v2",
        weights=1000,
        tensors_by_type={"TRIT2": 3, "F16": 1},
        bytes_by_type={"TRIT2": 61_300_000, "F16": 500},
        parts=[FilePart("layers", ("TRIT2", "F16"), 1000, 61_300_500), FilePart("rest", (), 0, 99_500)],
        bits_per_weight_quantized=3.5,
        bits_per_weight_file=6.25,
        relative_error=0.1234,
        kept_unaligned=["blk.0.attn_q.weight"],
        warnings=["an unknown pre-tokenizer"],
        file_bytes=61_400_000,
        seconds=12.3,
        peak_memory_bytes=1_230_000_000,
    )


@pytest.fixture
def any_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources are not looked at, so that none has to exist."""
    for name in ("importance_file", "own_text"):  # which would keep the fake if they were imported now
        importlib.import_module(f"tritgguf.conversion.{name}")
    monkeypatch.setattr("tritgguf.sources.open.open_source", lambda name: None)
    monkeypatch.setattr("tritgguf.conversion.plan.check_conversion", lambda source, options, encoder: None)


@pytest.mark.usefixtures("any_source")
def test_convert(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    calls: list[Any] = []

    def fake(source: str, output: Path, *, progress: Any, **options: Any) -> ConvertReport:
        calls.append((source, output, options))
        for done in range(0, 101, 10):
            progress(ConvertProgress("blk.0.x", done * 10**6, 10**8))
        return conversion()

    monkeypatch.setattr(CONVERT, "convert", fake)
    monkeypatch.setattr(terminal, "_SECONDS_BETWEEN_LINES", 0.0)
    arguments = [
        "--depth",
        "3",
        "--embedding-depth",
        "4",
        "-j",
        "2",
        "--overwrite",
        "--keep",
        "*.ffn_down=4",
        "--resume",
        "--recipe",
        "small",
        "--encoder",
        "v2",
    ]
    assert app.main(["convert", "org/name", "out.gguf", *arguments]) == 0
    options: dict[str, Any] = {"depth": 3, "encoder": V2(), "threads": 2, "overwrite": True, "resume": True}
    options |= {"output_depth": None, "embedding_depth": 4, "importance": None, "windows": None}
    options |= {"choice": DepthChoice((KeepRule("*.ffn_down", 4),)), "recipe": parse_recipe("small")}
    assert calls == [("org/name", Path("out.gguf"), options)]
    captured = capsys.readouterr()
    for text in ("TRIT2", "61.3 MB", "3.500", "6.250", "0.1234", "1.23 GB"):
        assert text in captured.out
    assert re.search(r"^ 50 %  blk\.0\.x  [\d.]+ [kMG]?B/s  \d+ s left$", captured.err, re.MULTILINE)
    assert "blk.0.attn_q.weight" in captured.err
    assert "warning: an unknown pre-tokenizer" in captured.err


@pytest.mark.parametrize(
    ("types", "title"),
    [(("TRIT2", "F16"), "depth 2, encoder v2"), (("TRIT1", "TRIT2"), "depths up to 2, encoder v2")],
)
def test_depths_that_differ_are_no_single_depth(types: tuple[str, ...], title: str, capsys: Capture) -> None:
    parts = [FilePart("layers", types, 1000, 61_300_500), FilePart("embeddings", ("TRIT4",), 100, 100)]
    print_conversion(dataclasses.replace(conversion(), parts=parts))
    assert title in capsys.readouterr().out.splitlines()


@pytest.mark.usefixtures("any_source")
def test_convert_json(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(CONVERT, "convert", lambda *arguments, **options: conversion())
    assert app.main(["convert", "org/name", "out.gguf", "--encoder", "v2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["output"] == "out.gguf"
    assert report["bytes_by_type"] == {"TRIT2": 61_300_000, "F16": 500}
    assert [part["bits_per_weight"] for part in report["parts"]] == [pytest.approx(490_404), None]


@pytest.mark.usefixtures("any_source")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "large"], "recipe large does not exist; choose from published, balanced, small"),
        (["--target-size", "9" * 400], "is not a size; write it like 900MB or 1.2GB"),
        (["--target-size", "big"], "big is not a size; write it like 900MB or 1.2GB"),
        (["--target-size", "1GB", "--target-bpw", "3"], "--target-bpw and --target-size both choose depths"),
    ],
)
def test_recipes_and_sizes_that_do_not_exist(capsys: Capture, arguments: list[str], message: str) -> None:
    assert app.main(["convert", "org/name", "out.gguf", *arguments]) != 0
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("raised", "line"),
    [
        (TritGgufError("x.gguf: tensor \x1b[31ma\nb is bad"), "error: x.gguf: tensor [31ma b is bad\n"),
        (OSError(errno.ENOSPC, "No space left on device"), "error: No space left on device\n"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "error: /x: Permission denied\n"),
        (MemoryError(), "error: not enough memory; close other programs or give a smaller --ctx-size\n"),
    ],
)
@pytest.mark.usefixtures("any_source")
def test_errors_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Capture, raised: Exception, line: str) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise raised

    monkeypatch.setattr(CONVERT, "convert", fail)
    assert fails(capsys, "convert", "org/name", "out.gguf", "--encoder", "v2") == line


@pytest.mark.usefixtures("any_source")
def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(CONVERT, "convert", interrupt)
    assert app.main(["convert", "org/name", "out.gguf", "--encoder", "v2"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def verification() -> VerifyReport:
    measures = (2.5e-4, 3.5e-4, 1.5e-3, 0.576, 4.2, 0.691, 12.25, 7.5, 3.0)
    return VerifyReport("models/x", Path("x.gguf"), 500, 1, *measures, file_bytes=61_000_000, bits_per_weight=3.75)


def test_verify(monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path) -> None:
    calls: list[Any] = []

    def fake(source: str, files: list[Path], *, progress: Any, **options: Any) -> list[VerifyReport]:
        calls.append((source, files, options))
        for stage in ("runner", "source"):
            progress(stage, 0, 2)
            progress(stage, 2, 2)
        return [verification()]

    monkeypatch.setattr(VERIFY, "verify_files", fake)
    monkeypatch.setattr(terminal, "_SECONDS_BETWEEN_LINES", 0.0)
    (tmp_path / "text.txt").write_text("Some text.\n", encoding="utf-8-sig")
    arguments = ["--text", str(tmp_path / "text.txt"), "--tokens", "50", "--layers"]
    assert app.main(["verify", "models/x", "x.gguf", *arguments]) == 0
    options = {"text": "Some text.\n", "tokens": 50, "layers": True, "threads": None, "isa": None, "store": None}
    assert calls == [("models/x", [Path("x.gguf")], options)]
    captured = capsys.readouterr()
    for text in ("2.5e-04", "3.5e-04", "0.5760", "4.2000", "69.1%", "12.250", "7.500"):
        assert text in captured.out
    assert captured.err.splitlines()[0].endswith("runner")


def test_verify_json(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(VERIFY, "verify_files", lambda *arguments, **options: [verification()])
    assert app.main(["verify", "models/x", "x.gguf", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["runner"] == {"max_rel_logit_diff": 2.5e-4, "max_rel_logit_diff_int16": 3.5e-4, "kl_int8": 1.5e-3}
    assert report["tokens"] == 500


def test_verify_several_files(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    other = dataclasses.replace(verification(), file=Path("y.gguf"), kl_mean=0.125, layers=[LayerError(0, 0.25, 0.5)])
    monkeypatch.setattr(VERIFY, "verify_files", lambda *arguments, **options: [verification(), other])
    assert app.main(["verify", "models/x", "x.gguf", "y.gguf"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^  x\.gguf +2\.5e-04 +3\.5e-04 +1\.5e-03$", out, re.MULTILINE)
    assert re.search(r"^  x\.gguf +61\.0 MB +3\.75 +0\.5760 +4\.2000 +69\.1% +12\.250$", out, re.MULTILINE)
    assert re.search(r"^  y\.gguf +61\.0 MB +3\.75 +0\.1250 +4\.2000 +69\.1% +12\.250$", out, re.MULTILINE)
    assert out.count("7.500") == 1  # the source's perplexity
    assert re.search(r"^  +0 +0\.2500 +0\.5000$", out, re.MULTILINE)
    assert app.main(["verify", "models/x", "x.gguf", "y.gguf", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps([verification().as_dict(), other.as_dict()]))


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    convert(write_tiny_model(folder / "model"), folder / "model.gguf", depth=2, recipe="published")
    return folder / "model.gguf"


def test_inspect(capsys: Capture, tiny_file: Path) -> None:
    assert app.main(["inspect", str(tiny_file)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^  blk\.0\.ffn_down\.weight +TRIT2 +128 x 192 +\d+  [\d.]+ \.\. [\d.]+$", out, re.MULTILINE)
    assert re.search(r"^  tokenizer\.ggml\.tokens +\[.*\.\.\.\] \(448 elements\)$", out, re.MULTILINE)
    assert re.search(r"^  bits per weight, quantized matrices +3\.500$", out, re.MULTILINE)


def test_inspect_json(capsys: Capture, tiny_file: Path) -> None:
    assert app.main(["inspect", str(tiny_file), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["metadata"]["tokenizer.ggml.tokens"]) == 448


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_reader_that_goes_away_is_no_error(tiny_file: Path, options: list[str]) -> None:
    """Other programs end with 141 then, by SIGPIPE: a shell with `pipefail` shows it."""
    command = [sys.executable, "-m", "tritgguf", "inspect", str(tiny_file), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.wait(300) == 141
    assert process.stderr.read() == b""
    process.stderr.close()
