"""`check`: undamaged files pass, and errors name every kind of damage."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from converted_models import as_stock_gguf
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import write_tiny_model

from tritgguf.cli import app
from tritgguf.cli.check import print_check
from tritgguf.conversion.convert import convert
from tritgguf.errors import TritGgufError
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.formats.integrity import check
from tritgguf.formats.trit_types import DEPTHS
from tritgguf.sources.open import open_source


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("check")
    convert(write_tiny_model(folder / "model"), folder / "out.gguf", depth=3)
    return folder / "out.gguf"


def changed(file: Path, target: Path, offset: int, content: bytes) -> Path:
    """Return a copy with some bytes replaced."""
    data = bytearray(file.read_bytes())
    data[offset : offset + len(content)] = content
    target.write_bytes(data)
    return target


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("variant", ["llama", "qwen2", "unaligned"])
def test_what_convert_writes_is_whole(tmp_path: Path, variant: str, depth: int) -> None:
    convert(write_tiny_model(tmp_path / "model", variant), tmp_path / "out.gguf", depth=depth, embedding_depth=depth)
    steps: list[tuple[int, int]] = []
    report = check(tmp_path / "out.gguf", progress=lambda *step: steps.append(step))
    tensors = GgufFile(tmp_path / "out.gguf").tensors
    assert report.tensors == report.checksums == len(tensors)
    assert steps[-1][0] == steps[-1][1] == sum(info.n_bytes for info in tensors.values())


def test_a_word_that_no_encoder_writes(tmp_path: Path, whole: Path) -> None:
    info = GgufFile(whole).tensors["blk.1.ffn_down.weight"]
    row_bytes = info.n_bytes // info.shape[0]
    damaged = changed(whole, tmp_path / "bad.gguf", info.offset + 5 * row_bytes + 4, b"\x01\x00")
    with pytest.raises(TritGgufError, match=r"bad.gguf: tensor blk.1.ffn_down.weight, row 5 has a word"):
        check(damaged)


@pytest.mark.parametrize(("name", "dtype"), [("token_embd.weight", np.float16), ("output_norm.weight", np.float32)])
def test_what_is_no_number(tmp_path: Path, whole: Path, name: str, dtype: type) -> None:
    info = GgufFile(whole).tensors[name]
    place = info.n_weights - 3
    offset = info.offset + place * np.dtype(dtype).itemsize
    damaged = changed(whole, tmp_path / "bad.gguf", offset, np.array([np.nan], dtype).tobytes())
    with pytest.raises(TritGgufError, match=rf"bad.gguf: tensor {name}, weight {place} is NaN or infinite"):
        check(damaged)


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("block_count", "tensor blk.2.attn_norm.weight is missing"),
        ("embedding_length", "tensor token_embd.weight has the shape"),
    ],
)
def test_keys_that_do_not_fit_the_tensors(
    tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str], key: str, line: str
) -> None:
    """No checksum covers a key, and each tensor is whole."""
    place = whole.read_bytes().index(name := f"llama.{key}".encode()) + len(name) + 4  # behind the type
    damaged = changed(whole, tmp_path / "bad.gguf", place, bytes([GgufFile(whole).metadata[name.decode()] + 1]))
    assert check(damaged).tensors
    assert app.main(["check", str(damaged)]) == 1
    assert line in capsys.readouterr().err


@pytest.mark.parametrize("place", [0, -1])
def test_a_changed_name_is_found(tmp_path: Path, whole: Path, place: int) -> None:
    """A name is in the list of tensors, and in the key of its checksum, which is before it."""
    name = b"blk.1.attn_k.weight"
    data = whole.read_bytes()
    found = [match.start() for match in re.finditer(re.escape(name), data)]
    damaged = changed(whole, tmp_path / "bad.gguf", found[place], b"blk.1.attn_k.weighs")
    with pytest.raises(TritGgufError, match=r"bad.gguf: .*blk\.1\.attn_k\.weigh"):
        check(damaged)


@given(data=st.data())
def test_any_changed_byte_of_a_tensor_is_found(
    tmp_path_factory: pytest.TempPathFactory, whole: Path, data: st.DataObject
) -> None:
    file = GgufFile(whole)
    info = file.tensors[data.draw(st.sampled_from(sorted(file.tensors)))]
    offset = data.draw(st.integers(0, info.n_bytes - 1))
    old = file.raw(info.name)[offset]
    new = data.draw(st.integers(0, 255).filter(lambda byte: byte != old))
    target = tmp_path_factory.mktemp("bad") / "bad.gguf"
    with pytest.raises(TritGgufError, match=rf"bad.gguf: tensor {info.name}.*; the file is damaged, fetch or convert"):
        check(changed(whole, target, info.offset + offset, bytes([new])))


def test_a_file_that_shrinks_while_it_is_checked(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "out.gguf"
    file.write_bytes(whole.read_bytes())
    last = max(GgufFile(file).tensors.values(), key=lambda info: info.offset)

    def shrink(opened: GgufFile, name: str) -> None:
        os.truncate(file, last.offset + 1)

    monkeypatch.setattr("tritgguf.formats.integrity._check_codebooks", shrink)
    with pytest.raises(TritGgufError, match=rf"out.gguf: ends inside tensor {last.name}; the file is damaged"):
        check(file, threads=1)


def test_a_file_that_vanishes_while_it_is_checked(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "out.gguf"
    file.write_bytes(whole.read_bytes())
    monkeypatch.setattr("tritgguf.formats.integrity._check_codebooks", lambda *_: file.unlink(missing_ok=True))
    with pytest.raises(TritGgufError, match=r"out.gguf: tensor .* cannot be read \(No such file"):
        check(file)


def test_a_codebook_out_of_order(tmp_path: Path, whole: Path) -> None:
    codebook = GgufFile(whole).codebook("blk.0.attn_q.weight")
    offset = whole.read_bytes().index(codebook.tobytes())
    damaged = changed(whole, tmp_path / "bad.gguf", offset, codebook[::-1].tobytes())
    with pytest.raises(TritGgufError, match=r"the codebook of tensor blk.0.attn_q.weight is not ascending"):
        check(damaged)


def test_a_file_without_checksums(tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = whole.read_bytes().replace(b"trit.xxh3.", b"trit.xxhX.")
    (tmp_path / "old.gguf").write_bytes(content)
    assert app.main(["check", str(tmp_path / "old.gguf")]) == 0
    assert "none: written by an earlier version" in capsys.readouterr().out


def test_a_stock_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stock = as_stock_gguf(open_source(write_tiny_model(tmp_path / "model")), tmp_path / "stock.gguf")
    assert app.main(["check", str(stock)]) == 0
    assert "none: a stock GGUF file has none" in capsys.readouterr().out


def test_the_speed_of_a_small_file_is_not_zero(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_check(replace(check(whole), bytes_per_second=5e6))
    assert re.search(r"speed +5\.0 MB/s\n", capsys.readouterr().out)


def test_the_command(tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["check", str(whole), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trit_tensors"] == 14
    info = GgufFile(whole).tensors["blk.0.attn_q.weight"]
    damaged = str(changed(whole, tmp_path / "bad.gguf", info.offset, b"\xff\xff"))
    for arguments in (["check", damaged], ["run", damaged, "-p", "hi", "--check"]):
        assert app.main(arguments) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ")
        assert "tensor blk.0.attn_q.weight" in error
