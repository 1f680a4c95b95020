"""Importance matrices: round trip, llama.cpp's older format, and untrusted files."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tritgguf.errors import TritGgufError
from tritgguf.formats.imatrix import read_importance, write_importance

COLUMNS = {"blk.0.attn_q.weight": 64, "blk.0.ffn_down.weight": 128}
SUMS = {name: np.arange(1, columns + 1) * 0.5 for name, columns in COLUMNS.items()}


def write(path: Path, **changes: object) -> Path:
    """Write an importance matrix with gguf-py, as llama.cpp does; `changes` replace tensors by name."""
    writer = gguf.GGUFWriter(path, arch="llama")
    writer.kv_data[0].clear()
    writer.add_type("imatrix")
    tensors: dict[str, object] = {}
    for name, sums in SUMS.items():
        tensors[f"{name}.in_sum2"] = sums.astype(np.float32).reshape(1, -1)
        tensors[f"{name}.counts"] = np.full((1, 1), 10, np.float32)
    for name, tensor in {**tensors, **changes}.items():
        if tensor is not None:
            writer.add_tensor(name, np.asarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_dat(path: Path, entries: list[tuple[bytes, int, np.ndarray]], tail: bytes = b"") -> Path:
    content = struct.pack("<i", len(entries))
    for name, calls, values in entries:
        content += struct.pack("<i", len(name)) + name + struct.pack("<ii", calls, len(values))
        content += values.astype("<f4").tobytes()
    path.write_bytes(content + tail)
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.gguf"
    counts = dict.fromkeys(SUMS, 32)
    write_importance(path, SUMS, counts, datasets=["a.txt"], chunk_size=16, chunks=2)
    found = read_importance(path, COLUMNS)
    for name, sums in SUMS.items():
        np.testing.assert_allclose(found[name], sums / 32, rtol=1e-6)
        assert found[name].dtype == np.float32
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == ["a.txt"]
    assert reader.fields["imatrix.chunk_size"].contents() == 16
    assert reader.fields["imatrix.chunk_count"].contents() == 2
    assert "general.architecture" not in reader.fields
    assert [tensor.name for tensor in reader.tensors][:2] == [
        f"{next(iter(SUMS))}.in_sum2",
        f"{next(iter(SUMS))}.counts",
    ]
    assert list(reader.tensors[0].shape) == [64, 1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["imatrix.gguf"]


def test_nothing_is_replaced_unasked(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.gguf"
    path.write_bytes(b"mine")
    with pytest.raises(TritGgufError, match="exists already"):
        write_importance(path, SUMS, dict.fromkeys(SUMS, 1), datasets=[], chunk_size=1, chunks=1)
    assert path.read_bytes() == b"mine"


def test_as_llama_cpp_writes_it(tmp_path: Path) -> None:
    name = "blk.0.attn_q.weight"
    found = read_importance(write(tmp_path / "a.gguf", **{f"{name}.counts": np.zeros((1, 1), np.float32)}), COLUMNS)
    assert set(found) == {"blk.0.ffn_down.weight"}, "a matrix that saw no input says nothing"
    found = read_importance(tmp_path / "a.gguf", {**COLUMNS, "blk.9.attn_q.weight": 64})
    np.testing.assert_allclose(found["blk.0.ffn_down.weight"], SUMS["blk.0.ffn_down.weight"] / 10, rtol=1e-6)


def test_older_format(tmp_path: Path) -> None:
    entries = [(name.encode(), 4, sums * 4) for name, sums in SUMS.items()]
    path = write_dat(tmp_path / "a.dat", [*entries, (b"other", 1, np.ones(3))], tail=struct.pack("<ii", 7, 0))
    found = read_importance(path, COLUMNS)
    for name, sums in SUMS.items():
        np.testing.assert_allclose(found[name], sums, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blk.0.attn_q.weight.in_sum2": np.ones((1, 32), np.float32)}, "has 32 columns, but 64 in the model"),
        ({"blk.0.attn_q.weight.in_sum2": np.full((1, 64), np.nan, np.float32)}, "negative or not a number"),
        ({"blk.0.attn_q.weight.in_sum2": np.full((1, 64), -1, np.float32)}, "negative or not a number"),
        ({"blk.0.attn_q.weight.in_sum2": np.full((1, 64), np.inf, np.float32)}, "negative or not a number"),
        ({"blk.0.attn_q.weight.counts": np.full((1, 1), np.nan, np.float32)}, "is not a number"),
        ({"blk.0.attn_q.weight.counts": np.ones((1, 2), np.float32)}, "has 2 counts for 1 matrices"),
        ({"blk.0.attn_q.weight.counts": np.ones((1, 1), np.int32)}, "both F32"),
        ({"blk.0.attn_q.weight.counts": None}, "needs one tensor .in_sum2 and one .counts"),
        ({"blk.0.attn_q.weight.in_sum2": None}, "needs one tensor .in_sum2 and one .counts"),
    ],
)
def test_damage_is_named(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = write(tmp_path / "a.gguf", **changes)
    with pytest.raises(TritGgufError, match=message) as caught:
        read_importance(path, COLUMNS)
    assert "a.gguf: blk.0.attn_q.weight" in str(caught.value)


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(TritGgufError, match="give an importance matrix"):
        read_importance(tmp_path / "absent", COLUMNS)
    with pytest.raises(TritGgufError, match="of another model"):
        read_importance(write(tmp_path / "a.gguf"), {"blk.5.attn_q.weight": 64})
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", arch="llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(TritGgufError, match="not an importance matrix"):
        read_importance(tmp_path / "model.gguf", COLUMNS)


@given(st.binary(max_size=200))
def test_any_bytes_give_a_line(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("dat") / "a.dat"
    path.write_bytes(content)
    with pytest.raises(TritGgufError):
        read_importance(path, COLUMNS)


@given(cut=st.integers(0, 1000), seed=st.integers(0, 1 << 30))
def test_a_damaged_older_file_gives_a_line(tmp_path_factory: pytest.TempPathFactory, cut: int, seed: int) -> None:
    entries = [(name.encode(), 4, sums * 4) for name, sums in SUMS.items()]
    path = write_dat(tmp_path_factory.mktemp("dat") / "a.dat", entries)
    content = bytearray(path.read_bytes())
    random = np.random.default_rng(seed)
    content[random.integers(len(content))] = random.integers(256)
    path.write_bytes(content[: cut + 1])
    with_error = False
    try:
        found = read_importance(path, COLUMNS)
    except TritGgufError:
        with_error = True
    assert with_error or all(np.isfinite(values).all() for values in found.values())


@pytest.mark.parametrize("older", [False, True])
def test_experts_have_counts_of_their_own(tmp_path: Path, older: bool) -> None:
    tensor, generator = "blk.0.ffn_up_exps.weight", np.random.default_rng(0)
    means, counts = generator.random((3, 64)).astype(np.float32), np.array([[5], [0], [9]], np.float32)
    if older:
        path = write_dat(tmp_path / "a.dat", [(tensor.encode(), 4, means.reshape(-1) * 4)])
    else:
        path = write(tmp_path / "a.gguf", **{f"{tensor}.in_sum2": means * counts, f"{tensor}.counts": counts})
    found = read_importance(path, {f"{tensor}[{expert}]": 64 for expert in range(3)})
    assert list(found) == [f"{tensor}[{expert}]" for expert in ((0, 1, 2) if older else (0, 2))]
    for name, importance in found.items():
        np.testing.assert_allclose(importance, means[int(name[-2])], rtol=1e-6)
    with pytest.raises(TritGgufError, match="another model"):
        read_importance(path, {f"{tensor}[{expert}]": 64 for expert in range(5)})
