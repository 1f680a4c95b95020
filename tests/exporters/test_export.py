"""Exports to both formats: the report, progress, and errors."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf_bytes import UINT32, trit_bytes
from tiny_models import write_tiny_model

from tritgguf import convert, export
from tritgguf.cli import app
from tritgguf.errors import TritGgufError
from tritgguf.formats.gguf_file import GgufFile

FORMATS = ("hf", "f16", "q4_0")


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """An empty folder for outputs."""
    folder = tmp_path / "outputs"
    folder.mkdir()
    return folder


def assert_refused(folder: Path, message: str, file: Path, to: str, **options: Any) -> None:
    """Assert that an export fails in one line and leaves nothing in the folder."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(TritGgufError, match=message) as caught:
        export(file, folder / "out", to=to, **options)
    assert "\n" not in str(caught.value)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("to", FORMATS)
def test_report_and_progress(tiny_trit_file: Callable[..., GgufFile], empty: Path, to: str) -> None:
    file = tiny_trit_file("llama3-rope")
    steps: list[tuple[str, int, int]] = []
    report = export(file.path, empty / "out", to=to, progress=lambda *step: steps.append(step))
    # A folder stores the rope factors in config.json.
    written = [name for name in file.tensors if to != "hf" or name != "rope_freqs.weight"]
    assert [step[0] for step in steps] == written
    assert steps[-1][1] == sum(file.tensors[name].n_bytes for name in written)
    assert report.weights == sum(info.n_weights for info in file.tensors.values())
    found = sum(path.stat().st_size for path in empty.rglob("*") if path.is_file())
    assert (report.output_bytes, report.source_bytes) == (found, file.path.stat().st_size)
    assert (report.to, report.source, report.output) == (to, file.path, empty / "out")
    assert report.seconds > 0
    assert len(report.warnings) == (to == "hf")


@pytest.mark.parametrize("to", FORMATS)
def test_threads_do_not_change_the_output(tiny_trit_file: Callable[..., GgufFile], empty: Path, to: str) -> None:
    for threads in (1, 3):
        export(tiny_trit_file().path, empty / str(threads), to=to, threads=threads)
    one, three = (
        [path.read_bytes() for path in sorted(output.iterdir())] if output.is_dir() else [output.read_bytes()]
        for output in (empty / "1", empty / "3")
    )
    assert one == three


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("content", [None, "mine"])
def test_an_existing_folder_is_never_touched(
    tiny_trit_file: Callable[..., GgufFile], empty: Path, overwrite: bool, content: str | None
) -> None:
    (empty / "out").mkdir()
    if content is not None:
        (empty / "out" / "config.json").write_text(content)
    file = tiny_trit_file().path
    assert_refused(empty, "exists already, and no folder is ever replaced", file, "hf", overwrite=overwrite)
    assert_refused(empty, "is a folder", file, "f16", overwrite=overwrite)


@pytest.mark.parametrize("to", FORMATS)
def test_missing_parent_folder(tiny_trit_file: Callable[..., GgufFile], empty: Path, to: str) -> None:
    with pytest.raises(TritGgufError, match="folder does not exist"):
        export(tiny_trit_file().path, empty / "none" / "out", to=to)
    assert list(empty.iterdir()) == []


@pytest.mark.parametrize("to", FORMATS)
def test_a_truncated_file(tiny_trit_file: Callable[..., GgufFile], empty: Path, tmp_path: Path, to: str) -> None:
    whole = tiny_trit_file().path.read_bytes()
    for length in (10, 1000, len(whole) - 1000):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        assert_refused(empty, "cut.gguf", tmp_path / "cut.gguf", to)


@pytest.mark.parametrize("to", FORMATS)
def test_a_missing_codebook(tiny_trit_file: Callable[..., GgufFile], empty: Path, tmp_path: Path, to: str) -> None:
    content = tiny_trit_file().path.read_bytes()
    key = b"trit.codebook.blk.1.ffn_down.weight"
    assert content.count(key) == 1
    (tmp_path / "bad.gguf").write_bytes(content.replace(key, key.replace(b"book", b"hook")))
    assert_refused(empty, r"tensor blk\.1\.ffn_down\.weight has no codebook", tmp_path / "bad.gguf", to)


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize(
    ("key", "values", "message"),
    [
        ("llama.block_count", (2, 3), r"tensor blk\.2\.attn_norm\.weight is missing"),
        ("llama.block_count", (2, 1), r"tensor blk\.1\..* does not belong"),
        ("llama.embedding_length", (128, 64), r"tensor .* has the shape .*, not"),
    ],
)
def test_keys_that_contradict_the_tensors(
    tiny_trit_file: Callable[..., GgufFile],
    empty: Path,
    tmp_path: Path,
    key: str,
    values: tuple[int, int],
    message: str,
    to: str,
) -> None:
    """A model that cannot be run is not written for other programs either."""
    content = tiny_trit_file().path.read_bytes()
    old, new = (key.encode() + struct.pack("<II", UINT32, value) for value in values)
    assert content.count(old) == 1
    (tmp_path / "bad.gguf").write_bytes(content.replace(old, new))
    assert_refused(empty, message, tmp_path / "bad.gguf", to)


@pytest.mark.parametrize("to", FORMATS)
def test_not_a_trit_file(tiny_trit_file: Callable[..., GgufFile], empty: Path, tmp_path: Path, to: str) -> None:
    export(tiny_trit_file().path, tmp_path / "stock.gguf", to="f16")
    assert_refused(empty, "is a stock GGUF file", tmp_path / "stock.gguf", to)
    assert_refused(empty, "cannot be read", tmp_path / "missing.gguf", to)


def test_not_a_language_model(empty: Path, tmp_path: Path) -> None:
    path = trit_bytes().write(tmp_path / "odd.gguf")
    assert_refused(empty, "no tensor token_embd.weight", path, "hf")
    export(path, empty / "out.gguf", to="f16")
    assert list(GgufFile(empty / "out.gguf").tensors) == ["w", "v"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "f32"}, "format f32 does not exist; choose from hf, f16, bf16, q8_0, q4_0"),
        ({"max_shard_size": "many"}, "shard size many is not a size"),
        ({"max_shard_size": 0}, "shard size 0 is not a size"),
        ({"max_shard_size": "-5GB"}, "not a size"),
        ({"base_model": "Qwen2.5"}, "is not a hub id"),
    ],
)
def test_bad_options(
    tiny_trit_file: Callable[..., GgufFile], empty: Path, options: dict[str, Any], message: str
) -> None:
    assert_refused(empty, message, tiny_trit_file().path, **{"to": "hf", **options})


@pytest.mark.parametrize("to", FORMATS)
def test_disk_full(
    tiny_trit_file: Callable[..., GgufFile], empty: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(empty)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert_refused(empty, "make room", tiny_trit_file().path, to)


@pytest.mark.parametrize(
    ("to", "function"), [("hf", "fsync"), ("hf", "rename"), ("f16", "fsync"), ("f16", "replace"), ("q4_0", "fsync")]
)
def test_the_disk_fails(
    tiny_trit_file: Callable[..., GgufFile], empty: Path, to: str, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, function, fail)
    assert_refused(empty, r"No space left.*make room", tiny_trit_file().path, to)


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files with setrlimit")
@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("limit", [100, 30_000, 200_000])
def test_the_system_refuses_to_write(tiny_trit_file: Callable[..., GgufFile], empty: Path, to: str, limit: int) -> None:
    import resource

    file = tiny_trit_file().path
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        assert_refused(empty, "cannot be written", file, to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("to", FORMATS)
def test_an_interruption_leaves_nothing(tiny_trit_file: Callable[..., GgufFile], empty: Path, to: str) -> None:
    def stop(name: str, done: int, total: int) -> None:
        if name == "blk.1.ffn_down.weight":
            assert len(list(empty.iterdir())) == 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(tiny_trit_file().path, empty / "out", to=to, progress=stop)
    assert list(empty.iterdir()) == []


# -- the command


def test_command(
    tiny_trit_file: Callable[..., GgufFile],
    empty: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tritgguf.cli.terminal._SECONDS_BETWEEN_LINES", 0.0)  # show every line of progress
    file = str(tiny_trit_file().path)
    assert app.main(["export", file, str(empty / "out"), "--to", "hf", "--max-shard-size", "100KB"]) == 0
    captured = capsys.readouterr()
    assert f"{file} -> {empty / 'out'}" in captured.out
    assert re.search(r"model\.safetensors\.index\.json +[\d.]+ kB\n", captured.out)
    assert "100 %  output_norm.weight" in captured.err
    assert "warning: " in captured.err
    assert app.main(["export", file, str(empty / "out"), "--to", "hf"]) == 1
    assert re.fullmatch(r"error: [^\n]+exists already[^\n]+\n", capsys.readouterr().err)


def test_command_json(tiny_trit_file: Callable[..., GgufFile], empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = empty / "out.gguf"
    arguments = [str(tiny_trit_file().path), str(output), "--to", "bf16", "--json", "-t", "1"]
    assert app.main(["export", *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["files"] == {"out.gguf": output.stat().st_size}
    assert (report["output"], report["to"], report["warnings"]) == (str(output), "bf16", [])


def test_the_base_model(tmp_path: Path) -> None:
    convert(write_tiny_model(tmp_path / "model"), tmp_path / "d2.gguf")
    report = export(tmp_path / "d2.gguf", tmp_path / "out", to="hf", base_model="Org/Model-1")
    assert report.warnings == []
    assert "base_model: Org/Model-1\nbase_model_relation: quantized\n" in (tmp_path / "out" / "README.md").read_text()
