"""The streaming writer: round trips, and no files left after errors."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGUFValue, GGUFValueType
from random_inputs import CODEBOOK, random_levels

from cpu_kernels.packed_rows.pack import pack
from tritgguf.errors import TritGgufError
from tritgguf.formats import trit_types
from tritgguf.formats.durable_output import check_output
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.formats.gguf_header import F16, F32
from tritgguf.formats.gguf_writer import PlannedTensor, StreamingWriter

METADATA = {
    "general.architecture": GGUFValue("llama", GGUFValueType.STRING),
    "llama.block_count": GGUFValue(2, GGUFValueType.UINT32),
    "numbers": GGUFValue([1, 2, 3], GGUFValueType.ARRAY, GGUFValueType.INT32),
    "codebook": GGUFValue([0.0] * 27, GGUFValueType.ARRAY, GGUFValueType.FLOAT32),
}
MATRIX = np.arange(15, dtype=np.float16).reshape(3, 5)
VECTOR = np.arange(7, dtype=np.float32)
PLAN = [PlannedTensor("matrix", (3, 5), F16, 30), PlannedTensor("vector", (7,), F32, 28)]


def write(output: Path, **options: Any) -> None:
    with StreamingWriter(output, METADATA, PLAN, **options) as writer:
        writer.begin(PLAN[0])
        writer.write(MATRIX)
        writer.begin(PLAN[1])
        writer.write(VECTOR)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def nothing_left_behind(folder: Path) -> Iterator[None]:
    """Check that an existing output is unchanged and that no other file is left."""
    (folder / "out.gguf").write_bytes(b"the old file")
    yield
    assert names(folder) == ["out.gguf"]
    assert (folder / "out.gguf").read_bytes() == b"the old file"


def test_round_trip(tmp_path: Path) -> None:
    write(tmp_path / "out.gguf")
    assert names(tmp_path) == ["out.gguf"]
    file = GgufFile(tmp_path / "out.gguf")
    assert list(file.metadata) == list(METADATA)
    for name, value in METADATA.items():
        assert file.value(name) == value
    assert {name: (info.shape, info.type_id) for name, info in file.tensors.items()} == {
        "matrix": ((3, 5), F16),
        "vector": ((7,), F32),
    }
    np.testing.assert_array_equal(file.read_float32("matrix"), MATRIX)
    np.testing.assert_array_equal(file.read_float32("vector"), VECTOR)
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    assert [tensor.name for tensor in reader.tensors] == ["matrix", "vector"]
    np.testing.assert_array_equal(reader.tensors[0].data, MATRIX)


@pytest.mark.parametrize("depth", trit_types.DEPTHS)
def test_round_trip_of_a_trit_tensor(tmp_path: Path, depth: int) -> None:
    packed = pack(*random_levels(depth, 3, 128), depth)
    tensor = PlannedTensor("w", (3, 128), trit_types.TritType.of_depth(depth).value, packed.nbytes)
    late_key = trit_types.codebook_key("w")
    metadata = {**METADATA, "trit.version": GGUFValue(1, GGUFValueType.UINT32), late_key: METADATA["codebook"]}
    with StreamingWriter(tmp_path / "out.gguf", metadata, [tensor]) as writer:
        writer.begin(tensor)
        for row in packed:
            writer.write(row)
        writer.set_metadata(late_key, GGUFValue(CODEBOOK.tolist(), GGUFValueType.ARRAY, GGUFValueType.FLOAT32))
    file = GgufFile(tmp_path / "out.gguf")
    np.testing.assert_array_equal(file.raw("w"), packed.reshape(-1))
    np.testing.assert_array_equal(file.codebook("w"), CODEBOOK)
    assert file.metadata["codebook"] == [0.0] * 27


def test_the_file_appears_only_at_the_end(tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    with StreamingWriter(output, METADATA, PLAN) as writer:
        for tensor, data in zip(PLAN, (MATRIX, VECTOR), strict=True):
            writer.begin(tensor)
            writer.write(np.asarray(data))
            assert not output.exists()
            assert len(names(tmp_path)) == 1
    assert names(tmp_path) == ["out.gguf"]


def test_no_tensors_at_all(tmp_path: Path) -> None:
    with StreamingWriter(tmp_path / "out.gguf", METADATA, []):
        pass
    assert GgufFile(tmp_path / "out.gguf").tensors == {}


def test_arrays_that_are_not_contiguous(tmp_path: Path) -> None:
    tensor = PlannedTensor("w", (5, 3), F32, 60)
    wide = np.arange(30, dtype=np.float32).reshape(3, 10)
    with StreamingWriter(tmp_path / "out.gguf", METADATA, [tensor]) as writer:
        writer.begin(tensor)
        writer.write(wide[:, ::2].T)
    np.testing.assert_array_equal(GgufFile(tmp_path / "out.gguf").read_float32("w"), wide[:, ::2].T)


# -- misuse


def test_tensors_come_in_the_planned_order(tmp_path: Path) -> None:
    with nothing_left_behind(tmp_path), pytest.raises(ValueError, match="vector is not the next one"):  # noqa: SIM117
        with StreamingWriter(tmp_path / "out.gguf", METADATA, PLAN, overwrite=True) as writer:
            writer.begin(PLAN[1])


def test_a_tensor_is_finished_before_the_next(tmp_path: Path) -> None:
    with nothing_left_behind(tmp_path), pytest.raises(ValueError, match="not the next one"):  # noqa: SIM117
        with StreamingWriter(tmp_path / "out.gguf", METADATA, PLAN, overwrite=True) as writer:
            writer.begin(PLAN[0])
            writer.write(MATRIX[:2])
            writer.begin(PLAN[1])


@pytest.mark.parametrize("parts", [0, 1])
def test_every_planned_tensor_is_written(tmp_path: Path, parts: int) -> None:
    with nothing_left_behind(tmp_path), pytest.raises(ValueError, match="not written"):  # noqa: SIM117
        with StreamingWriter(tmp_path / "out.gguf", METADATA, PLAN, overwrite=True) as writer:
            for _ in range(parts):
                writer.begin(PLAN[0])
                writer.write(MATRIX)


def test_no_more_bytes_than_planned(tmp_path: Path) -> None:
    for begin in (False, True):
        with nothing_left_behind(tmp_path), pytest.raises(ValueError, match="more bytes"):  # noqa: SIM117
            with StreamingWriter(tmp_path / "out.gguf", METADATA, PLAN, overwrite=True) as writer:
                if begin:
                    writer.begin(PLAN[0])
                writer.write(MATRIX.astype(np.float32))


def test_no_tensor_beyond_the_plan(tmp_path: Path) -> None:
    with nothing_left_behind(tmp_path), pytest.raises(ValueError, match="not the next one"):  # noqa: SIM117
        with StreamingWriter(tmp_path / "out.gguf", METADATA, PLAN[:1], overwrite=True) as writer:
            writer.begin(PLAN[0])
            writer.write(MATRIX)
            writer.begin(PLAN[1])


def test_metadata_keeps_its_keys(tmp_path: Path) -> None:
    with nothing_left_behind(tmp_path), pytest.raises(ValueError, match="no key late"):  # noqa: SIM117
        with StreamingWriter(tmp_path / "out.gguf", METADATA, [], overwrite=True) as writer:
            writer.set_metadata("late", METADATA["numbers"])


@pytest.mark.parametrize("length", [1, 26, 28, 60])
def test_metadata_keeps_its_length(tmp_path: Path, length: int) -> None:
    """A header of another length would overwrite the first tensor or leave a gap before it."""
    changed = GGUFValue([1.0] * length, GGUFValueType.ARRAY, GGUFValueType.FLOAT32)
    with nothing_left_behind(tmp_path), pytest.raises(ValueError, match="changed its length"):  # noqa: SIM117
        with StreamingWriter(tmp_path / "out.gguf", METADATA, PLAN, overwrite=True) as writer:
            writer.begin(PLAN[0])
            writer.write(MATRIX)
            writer.begin(PLAN[1])
            writer.write(VECTOR)
            writer.set_metadata("codebook", changed)


# -- the disk


def test_existing_output(tmp_path: Path) -> None:
    with nothing_left_behind(tmp_path), pytest.raises(TritGgufError, match=r"exists already.*--overwrite"):
        write(tmp_path / "out.gguf")
    write(tmp_path / "out.gguf", overwrite=True)
    assert names(tmp_path) == ["out.gguf"]
    assert list(GgufFile(tmp_path / "out.gguf").tensors) == ["matrix", "vector"]


def test_missing_folder_and_folder_as_output(tmp_path: Path) -> None:
    with pytest.raises(TritGgufError, match="its folder does not exist"):
        write(tmp_path / "none" / "out.gguf")
    (tmp_path / "folder").mkdir()
    for overwrite in (False, True):
        with pytest.raises(TritGgufError, match="is a folder"):
            write(tmp_path / "folder", overwrite=overwrite)
    assert names(tmp_path) == ["folder"]
    with pytest.raises(TritGgufError, match="its folder does not exist"):
        check_output(tmp_path / "none" / "out.gguf", overwrite=True)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, TritGgufError])
@pytest.mark.parametrize("at", ["begin", "middle", "end"])
def test_interruption(tmp_path: Path, error: type[BaseException], at: str) -> None:
    with nothing_left_behind(tmp_path), pytest.raises(error):  # noqa: SIM117
        with StreamingWriter(tmp_path / "out.gguf", METADATA, PLAN, overwrite=True) as writer:
            if at != "begin":
                writer.begin(PLAN[0])
                writer.write(MATRIX[:1] if at == "middle" else MATRIX)
            raise error("stop")


def test_too_little_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    for free, fits in ((57, False), (10_000_000, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        if fits:
            write(tmp_path / "out.gguf", overwrite=True)
            continue
        with nothing_left_behind(tmp_path), pytest.raises(TritGgufError, match="free there; make room"):
            write(tmp_path / "out.gguf", overwrite=True)


@pytest.mark.parametrize("stage", ["write_header_to_file", "write_ti_data_to_file"])
@pytest.mark.parametrize("call", [1, 2])
def test_disk_full_in_the_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, call: int) -> None:
    original = getattr(gguf.GGUFWriter, stage)
    calls: list[None] = []

    def fail_at_last(self: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, *arguments, **options)

    monkeypatch.setattr(gguf.GGUFWriter, stage, fail_at_last)
    with nothing_left_behind(tmp_path), pytest.raises(TritGgufError, match=r"No space left.*make room"):
        write(tmp_path / "out.gguf", overwrite=True)


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_disk_fails_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, function, fail)
    with nothing_left_behind(tmp_path), pytest.raises(TritGgufError, match="Input/output error"):
        write(tmp_path / "out.gguf", overwrite=True)


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files with setrlimit")
@pytest.mark.parametrize("limit", [100, 5000, 500_000])
def test_the_system_refuses_to_write(tmp_path: Path, limit: int) -> None:
    """A failed write leaves bytes in the file object's buffer, and closing the file fails again."""
    import resource

    tensor = PlannedTensor("w", (1000, 250), F32, 1_000_000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with nothing_left_behind(tmp_path), pytest.raises(TritGgufError, match="cannot be written"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with StreamingWriter(tmp_path / "out.gguf", METADATA, [tensor], overwrite=True) as writer:
                writer.begin(tensor)
                for _ in range(250):
                    writer.write(np.zeros(1000, np.float32))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
