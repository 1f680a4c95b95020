"""Where the prompt of `run` comes from: an option, a file, a pipe; or none, for a chat."""

from __future__ import annotations

import os
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tritgguf.cli import terminal
from tritgguf.cli.options import UsageError
from tritgguf.errors import BadRequestError

_STANDARD_INPUT = "-"
_SECONDS_BEFORE_NOTE = 2.0


def read_prompt(prompt: str | None, file: Path | None) -> str | None:
    """Return the prompt from the options and standard input; None if there is none and stdin is a terminal.

    The text of a file follows that of the option, and so does a pipe's where no file is given.
    """
    text = _file_or_pipe(prompt is not None, file)
    parts = [part for part in (prompt, text) if part is not None]
    return "\n\n".join(parts) if parts else None


def _file_or_pipe(has_prompt: bool, file: Path | None) -> str | None:
    """Return the text of a file or a pipe without its last line feed; None if there is neither."""
    from tritgguf.formats.text_file import read_text

    if file is not None and str(file) != _STANDARD_INPUT:
        text = read_text(file).removesuffix("\n")
        if not text and not has_prompt:
            raise BadRequestError(f"{file}: is empty; give a file with a prompt")
        return text or None
    is_asked_for = file is not None
    if has_prompt and not is_asked_for and not _is_pipe_or_file():
        return None
    if not is_asked_for and sys.stdin is not None and sys.stdin.isatty():
        return None
    if sys.stdin is None:
        raise UsageError("there is no prompt, and standard input is closed; give one with -p or -f")
    with _note_while_waiting():
        text = read_text(_STANDARD_INPUT).removesuffix("\n")
    if not text and not has_prompt:
        raise UsageError("there is no prompt on standard input; give one with -p or -f")
    return text or None


def _is_pipe_or_file() -> bool:
    """Tell whether stdin has been redirected to hold a text; services have /dev/null or a socket there, or nothing."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


@contextmanager
def _note_while_waiting() -> Iterator[None]:
    """Say after two seconds what is waited for: a pipe may have been inherited, and never end."""
    message = "note: the prompt is being read from standard input; </dev/null leaves that out"
    timer = threading.Timer(_SECONDS_BEFORE_NOTE, terminal.note, [message])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
