"""Runs code that a model has written, in a process that can do nothing but compute.

`sandbox_worker` says what the process gives up. It starts in an empty temporary folder without environment variables
and without installed packages, and is killed when its time is over. Where the system cannot restrict it (anything but
Linux on x86-64 and ARM64, or a kernel without seccomp filters), nothing is run.
"""

from __future__ import annotations

import json
import platform
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

from tritgguf.errors import TritGgufError

_WORKER = Path(__file__).with_name("sandbox_worker.py")
_MEMORY_BYTES = 1 << 30
_SECONDS_TO_START = 20.0  # on a busy machine


def require_sandbox() -> None:
    """Raise TritGgufError if this system cannot confine generated code."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise TritGgufError(
            f"generated code can only be confined on Linux on x86-64 and ARM64, not on {sys.platform} on"
            f" {platform.machine()}; run this task there"
        )


def runs_to_its_end(program: str, *, seconds: int = 10, memory_bytes: int = _MEMORY_BYTES) -> bool:
    """Run a Python program; return whether it ends by itself, without an error and within its limits.

    Args:
        program: the source text.
        seconds: of processor time, and, with some for the start, of time.
        memory_bytes: of address space.

    Raises:
        TritGgufError: the system cannot confine it; it was not run.

    """
    require_sandbox()
    token = secrets.token_hex(16)
    request = {"program": program, "token": token, "memory_bytes": memory_bytes, "seconds": seconds}
    with tempfile.TemporaryDirectory(prefix="tritgguf-") as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-B", _WORKER],
                input=json.dumps(request).encode("ascii") + b"\n",
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={},
                timeout=seconds + _SECONDS_TO_START,
                start_new_session=True,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
    answer = done.stdout.decode("utf-8", "replace").strip()
    if answer.startswith("unprotected"):
        raise TritGgufError(f"this system cannot confine generated code ({answer.partition(' ')[2]}); nothing was run")
    return answer == token
