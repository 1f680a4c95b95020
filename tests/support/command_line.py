"""Running the command line in a test: in this process, in a subprocess, or as if at a terminal."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from typing import Any

import pytest

from tritgguf.cli import app

Capture = pytest.CaptureFixture[str]


def fails(capsys: Capture, *arguments: str, code: int = 1) -> str:
    """Run a command, assert that it fails with a one-line error and an exit code, and return the line."""
    assert app.main(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"error: [^\n]+\n", captured.err)
    return captured.err


def run_python(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=300, check=False, **options
    )


def at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make stdin and stdout look like a terminal. (Not a fixture: pytest replaces stdout when the test starts.)"""
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
