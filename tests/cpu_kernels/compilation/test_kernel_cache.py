"""The cache of compiled kernels: stale kernels are not used, and disk errors are not raised."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

import cpu_kernels
from cpu_kernels.compilation import kernel_cache

_PROGRAM = """
import sys
import numpy as np
from cpu_kernels.threads.bandwidth import read
assert read(np.ones(4, np.int64), 0, 0, 1) == 4
print("compiled" if "numba" in sys.modules else "loaded")
"""


@pytest.fixture
def copied_package(tmp_path: Path) -> Path:
    """Return a folder with a copy of the package, which a test may change."""
    folder = tmp_path / "copy"
    source = Path(cpu_kernels.__file__).parent
    shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def run_program(folder: Path, **environment: str) -> tuple[str, str]:
    """Run a kernel of the package in `folder` in a new process; return where it came from, and stderr."""
    result = subprocess.run(
        [sys.executable, "-B", "-c", _PROGRAM],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip(), result.stderr


def test_kernels_are_kept_until_any_source_changes(copied_package: Path, tmp_path: Path) -> None:
    cache = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    assert run_program(copied_package, **cache) == ("compiled", "")
    assert run_program(copied_package, **cache) == ("loaded", "")
    with (copied_package / "cpu_kernels" / "simd" / "vectors.py").open("a") as file:
        file.write("# changed\n")
    assert run_program(copied_package, **cache) == ("compiled", "")
    assert run_program(copied_package, **cache) == ("loaded", "")


def test_a_damaged_file_is_replaced(copied_package: Path, tmp_path: Path) -> None:
    cache = {"NUMBA_CACHE_DIR": str(tmp_path)}
    run_program(copied_package, **cache)
    (path,) = tmp_path.glob("bandwidth.read-*.kernel")
    whole = path.read_bytes()
    for damaged in (b"", whole[:-10], whole[:-1] + bytes([whole[-1] ^ 1])):
        path.write_bytes(damaged)
        assert run_program(copied_package, **cache) == ("compiled", "")
        assert path.stat().st_size == len(whole)
    assert run_program(copied_package, **cache) == ("loaded", "")


def test_settings_of_numba_have_kernels_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def fingerprint() -> str:
        kernel_cache.fingerprint.cache_clear()
        return kernel_cache.fingerprint()

    before = fingerprint()
    monkeypatch.setenv("NUMBA_CACHE_DIR", "elsewhere")
    assert fingerprint() == before
    monkeypatch.setenv("NUMBA_OPT", "1")
    assert fingerprint() != before
    monkeypatch.undo()
    assert fingerprint() == before


def test_an_unusable_cache_folder_falls_back_to_the_next(copied_package: Path, tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("")
    assert run_program(copied_package, NUMBA_CACHE_DIR=str(tmp_path / "a file" / "cache")) == ("compiled", "")
    assert list((copied_package / "cpu_kernels" / "__pycache__").glob("*.kernel"))


def test_without_any_cache_folder_one_note_is_logged(copied_package: Path, tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("")
    (copied_package / "cpu_kernels" / "__pycache__").write_text("")
    nowhere = str(tmp_path / "a file" / "cache")
    source, stderr = run_program(copied_package, NUMBA_CACHE_DIR=nowhere, XDG_CACHE_HOME=nowhere, HOME=nowhere)
    assert source == "compiled"
    assert stderr.startswith("note: compiled kernels cannot be cached")
    assert stderr.count("\n") == 1


@pytest.fixture
def new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return an empty folder that is the cache during the test."""
    monkeypatch.setattr(kernel_cache, "folder", lambda: tmp_path)
    kernel_cache._warn_once.cache_clear()
    yield tmp_path
    kernel_cache._warn_once.cache_clear()


def test_what_is_written_is_read(new_folder: Path) -> None:
    name = kernel_cache.file_name("kernel", "int,int")
    assert kernel_cache.read(name) is None
    assert not kernel_cache.has(name)
    kernel_cache.write(name, b"machine code")
    assert kernel_cache.read(name) == b"machine code"
    assert [path.name for path in new_folder.iterdir()] == [name]
    assert kernel_cache.file_name("kernel", "int,float") != name


def test_a_full_disk_logs_one_note(
    new_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*arguments: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "replace", full)
    for name in ("one.kernel", "another.kernel"):
        kernel_cache.write(name, b"machine code")
    assert [message.split(": ")[3] for message in caplog.messages] == [
        "No space left on device; set NUMBA_CACHE_DIR to another folder"
    ]
    assert not list(new_folder.iterdir())


def test_kernels_of_earlier_versions_are_removed_after_a_month(new_folder: Path) -> None:
    names = [kernel_cache.file_name("kernel", types) for types in ("int", "float")]
    for name in names:
        kernel_cache.write(name, b"machine code")
    other = new_folder / "note.txt"
    other.write_text("")
    weeks = 5 * 7 * 24 * 3600
    for path in (new_folder / names[0], other):
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - weeks))
    kernel_cache.remove_old()
    assert not kernel_cache.has(names[0])
    assert kernel_cache.has(names[1])
    assert other.exists()
