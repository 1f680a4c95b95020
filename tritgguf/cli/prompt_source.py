"""Where the prompt of `run` comes from: an option, a file, a pipe; or none, for a chat."""

from __future__ import annotations

import os
import select
import stat
import sys
from pathlib import Path

from tritgguf.cli import terminal
from tritgguf.cli.options import UsageError
from tritgguf.errors import BadRequestError

_STANDARD_INPUT = "-"
_SECONDS_BEFORE_NOTE, _SECONDS_BEFORE_END = 1.0, 5.0


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
    if has_prompt and not is_asked_for and not _has_piped_text():
        return None
    if not is_asked_for and sys.stdin is not None and sys.stdin.isatty():
        return None
    if sys.stdin is None:
        raise UsageError("there is no prompt, and standard input is closed; give one with -p or -f")
    text = read_text(_STANDARD_INPUT).removesuffix("\n")
    if not text and not has_prompt:
        raise UsageError("there is no prompt on standard input; give one with -p or -f")
    return text or None


def _has_piped_text() -> bool:
    """Tell whether a text has been redirected to stdin.

    Services have /dev/null or a socket there, or nothing. Programs that start others often leave a pipe of their own
    open, in which nothing ever comes: it is not waited for long.
    """
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):
        return False
    if not stat.S_ISFIFO(mode):
        return stat.S_ISREG(mode)
    try:
        if _has_data(_SECONDS_BEFORE_NOTE):
            return True
        terminal.note("note: waiting for the text on standard input that follows the prompt; </dev/null leaves it out")
        if _has_data(_SECONDS_BEFORE_END - _SECONDS_BEFORE_NOTE):
            return True
    except (OSError, ValueError):  # on Windows only sockets can be waited for
        return True
    terminal.note(f"note: nothing came in {_SECONDS_BEFORE_END:.0f} s, so it is left out; -f - waits for it")
    return False


def _has_data(seconds: float) -> bool:
    """Wait until stdin has data or has ended; tell whether it has."""
    ready, _, _ = select.select([sys.stdin], [], [], seconds)
    return bool(ready)
