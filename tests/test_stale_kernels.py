"""Compiled kernels that are older than their sources must not be used."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import cpu_kernels


def test_stale_kernels_are_forgotten(tmp_path: Path) -> None:
    folder = tmp_path / "cpu_kernels_0123"
    folder.mkdir()
    for age, name in ((3600.0, "old.nbi"), (3600.0, "old.1.nbc"), (-3600.0, "new.nbi"), (3600.0, "other.txt")):
        (folder / name).write_bytes(b"")
        moment = max(path.stat().st_mtime for path in Path(cpu_kernels.__path__[0]).glob("*.py")) - age
        os.utime(folder / name, (time.time(), moment))
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", "import cpu_kernels"], check=True, env=environment)
    assert sorted(path.name for path in folder.iterdir()) == ["new.nbi", "other.txt"]
