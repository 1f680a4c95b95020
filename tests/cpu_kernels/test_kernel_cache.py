"""The cache of compiled kernels: stale kernels are not used, and disk errors are not raised."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpu_kernels import kernel_cache
from cpu_kernels.kernel_cache import KernelCache
from cpu_kernels.threads import bandwidth

_PROGRAM = """
import numpy as np
from cpu_kernels.threads.bandwidth import read
assert read(np.ones(4, np.int64), 0, 0, 1) == 4
print(sum(read.stats.cache_hits.values()), sum(read.stats.cache_misses.values()))
"""


@pytest.fixture
def copied_package(tmp_path: Path) -> Path:
    """Return a folder with a copy of the package, which a test may change."""
    folder = tmp_path / "copy"
    source = Path(kernel_cache.__file__).parent
    shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def run_program(folder: Path, **environment: str) -> tuple[str, str]:
    """Run a kernel of the package in `folder` in a new process; return cache hits and misses, and stderr."""
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
    assert run_program(copied_package, **cache) == ("0 1", "")
    assert run_program(copied_package, **cache) == ("1 0", "")
    with (copied_package / "cpu_kernels" / "simd" / "vectors.py").open("a") as file:
        file.write("# changed\n")
    assert run_program(copied_package, **cache) == ("0 1", "")
    assert run_program(copied_package, **cache) == ("1 0", "")


def test_an_unusable_cache_folder_falls_back_to_the_next(copied_package: Path, tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("")
    assert run_program(copied_package, NUMBA_CACHE_DIR=str(tmp_path / "a file" / "cache")) == ("0 1", "")
    assert list((copied_package / "cpu_kernels" / "threads" / "__pycache__").glob("*.nbc"))


def test_without_any_cache_folder_one_note_is_logged(copied_package: Path, tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("")
    (copied_package / "cpu_kernels" / "threads" / "__pycache__").write_text("")
    nowhere = str(tmp_path / "a file" / "cache")
    calls, stderr = run_program(copied_package, NUMBA_CACHE_DIR=nowhere, XDG_CACHE_HOME=nowhere, HOME=nowhere)
    assert calls == "0 1"
    assert stderr.startswith("note: compiled kernels cannot be cached")
    assert stderr.count("\n") == 1


def new_cache(monkeypatch: pytest.MonkeyPatch, folder: Path) -> KernelCache:
    monkeypatch.setattr("numba.config.CACHE_DIR", str(folder))
    kernel_cache._warn_once.cache_clear()
    return KernelCache(bandwidth.read.py_func)


def compile_with(cache: KernelCache) -> Any:
    """Compile a new dispatcher of a kernel with this cache, and return it."""
    import numba

    kernel = numba.njit(nogil=True)(bandwidth.read.py_func)
    kernel._cache = cache
    assert kernel(np.ones(3, np.int64), 0, 0, 1) == 3
    return kernel


def test_a_full_disk_logs_one_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    cache = new_cache(monkeypatch, tmp_path)
    monkeypatch.setattr(cache._cache_file, "save", full)
    compile_with(cache)
    compile_with(cache)
    assert [message.split(": ")[3] for message in caplog.messages] == [
        "No space left on device; set NUMBA_CACHE_DIR to another folder"
    ]


@pytest.mark.parametrize("pattern", ["*.nbi", "*.nbc"])
def test_a_damaged_cache_file_is_replaced(tmp_path: Path, pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = new_cache(monkeypatch, tmp_path)
    compile_with(cache)
    (path,) = tmp_path.rglob(pattern)
    for damage in (b"", b"\x80nonsense", path.read_bytes()[:-10]):
        path.write_bytes(damage)
        assert not compile_with(cache).stats.cache_hits
    assert compile_with(cache).stats.cache_hits
