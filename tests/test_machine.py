"""Memory of the machine and of processes."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import numpy as np
import pytest

from tritgguf.machine import machine_memory_bytes, peak_memory_bytes, resident_bytes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
SIZE = 32 << 20


def test_own_memory_and_that_of_files_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(SIZE))
    own, files = resident_bytes()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert not np.frombuffer(mapped[:1], np.uint8).any()
        assert not any(mapped[place] for place in range(0, SIZE, mmap.PAGESIZE))
        own_with_file, files_with_file = resident_bytes()
    with mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory_of_its_own:  # no reused heap
        memory_of_its_own.write(b"1" * SIZE)
        own_with_array, _ = resident_bytes()
    assert files_with_file - files > SIZE // 2
    assert abs(own_with_file - own) < SIZE // 2
    assert own_with_array - own > SIZE // 2
    assert peak_memory_bytes() >= SIZE


def test_machine() -> None:
    memory = machine_memory_bytes()
    assert memory is not None
    total, available = memory
    assert 0 < available <= total


def test_a_system_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tritgguf.machine._kilobytes", lambda file: {})
    assert machine_memory_bytes() is None


def test_no_such_process() -> None:
    with pytest.raises(OSError, match="No such file"):
        resident_bytes(2**22 + 1)
