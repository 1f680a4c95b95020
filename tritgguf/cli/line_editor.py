"""Reading messages at a terminal: lines with editing and history, pasted texts, blocks of several lines."""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

from tritgguf.cli import terminal

_PROMPT, _CONTINUATION = "> ", "... "
_QUOTES = '"""'
_CONTINUES = "\\"
_SECONDS_BETWEEN_PASTED_LINES = 0.03
_LONGEST_LINE = 1023 if sys.platform == "darwin" else 4095  # that a terminal gives a program without readline
# Terminals mark what is pasted while this is switched on ("bracketed paste").
_MARK_PASTES, _DO_NOT_MARK_PASTES = "\x1b[?2004h", "\x1b[?2004l"

_LOCAL_MODES = 3  # place in the settings that termios returns


class LineEditor:
    """Reads messages that somebody types.

    GNU readline edits the line, keeps the history and takes a pasted text as one. Without it (on Windows, with libedit,
    or if stdout is no terminal) lines that arrive at once are taken for a pasted text.
    """

    def __init__(self, completions: Sequence[str] = ()) -> None:
        """Begin; the Tab key completes the words of `completions` at the beginning of a line."""
        self._readline = _gnu_readline() if sys.stdout.isatty() else None
        self._lines: list[str] = []  # of the message so far
        self._has_ended = False
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")
        if self._readline is not None:
            self._readline.parse_and_bind("tab: complete")
            self._readline.parse_and_bind("set enable-bracketed-paste on")
            self._readline.set_completer_delims(" ")
            self._readline.set_completer(
                lambda text, state: [*(word for word in completions if text and word.startswith(text)), None][state]
            )

    def read(self) -> str | None:
        """Return the next message, or None at the end of input (Ctrl-D).

        A line that ends with a backslash continues on the next one; so does a text between triple quotes. Ctrl-C drops
        what has been typed.
        """
        while True:
            try:
                return self._message()
            except KeyboardInterrupt:
                terminal.note("" if self._has_text() else "\nCtrl-D or /exit leaves, /help shows what else there is.")
                self._lines = []
            except EOFError:
                terminal.note("")
                return None

    def _message(self) -> str:
        self._lines = []
        line = self._line(_PROMPT)
        is_quoted, opened = _opened_quotes(line)
        if is_quoted:
            return self._block(opened)
        while line.endswith(_CONTINUES):
            self._lines.append(line.removesuffix(_CONTINUES))
            line = self._line(_CONTINUATION)
        return "\n".join([*self._lines, line]).strip("\n")

    def _block(self, line: str) -> str:
        """Return the text of a block, whose first line, without the quotes, is `line`."""
        while not line.rstrip().endswith(_QUOTES):
            self._lines.append(line)
            line = self._line(_CONTINUATION)
        return "\n".join([*self._lines, line.rstrip().removesuffix(_QUOTES)]).strip("\n")

    def _line(self, prompt: str) -> str:
        """Return a typed line, or several that were pasted."""
        if self._has_ended:
            raise EOFError
        if sys.stdout.isatty():
            lines = [input(prompt)]
        else:
            print(prompt, end="", file=sys.stderr, flush=True)
            lines = [input()]
        try:
            while self._readline is None and _more_follows():
                lines.append(input())
        except EOFError:
            self._has_ended = True  # after these lines
        if self._readline is None and any(len(line.encode(errors="replace")) >= _LONGEST_LINE for line in lines):
            terminal.note(
                f"warning: the terminal cuts lines after {_LONGEST_LINE} bytes; run -f FILE takes longer ones"
            )
        return "\n".join(lines)

    def _has_text(self) -> bool:
        return bool(self._lines) or (self._readline is not None and bool(self._readline.get_line_buffer()))

    @contextlib.contextmanager
    def keeping_keys(self) -> Iterator[None]:
        """Keep what is typed meanwhile for the next `read`, Ctrl-D included, and do not show it."""
        # For a program that reads line by line, the terminal itself keeps lines and Ctrl-D.
        before = None if self._readline is None else _terminal_settings()
        if before is None:
            yield
            return
        import termios

        silent = list(before)
        silent[_LOCAL_MODES] &= ~(termios.ICANON | termios.ECHO)
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, silent)
        _write_to_terminal(_MARK_PASTES)
        try:
            yield
        finally:
            _write_to_terminal(_DO_NOT_MARK_PASTES)
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _terminal_settings() -> list[Any] | None:
    """Return the settings of the terminal at stdin; None if there is none."""
    try:
        import termios
    except ImportError:
        return None
    try:
        return termios.tcgetattr(sys.stdin)
    except (ValueError, termios.error):
        return None


def _gnu_readline() -> ModuleType | None:
    """Return the module if it is GNU readline and the terminal marks pasted texts; libedit does not know them."""
    if os.environ.get("TERM") == "dumb":
        return None
    try:
        import readline
    except ImportError:
        return None
    return readline if "GNU readline" in (readline.__doc__ or "") else None


def _opened_quotes(line: str) -> tuple[bool, str]:
    """Return whether a line opens a block, and what follows the quotes."""
    rest = line.lstrip()
    if not rest.startswith(_QUOTES):
        return False, ""
    rest = rest.removeprefix(_QUOTES)
    is_code = _QUOTES in rest and not rest.rstrip().endswith(_QUOTES)  # a pasted program that begins with a docstring
    return not is_code, rest


def _more_follows() -> bool:
    try:
        ready, _, _ = select.select([sys.stdin], [], [], _SECONDS_BETWEEN_PASTED_LINES)
    except (OSError, ValueError):  # on Windows only sockets can be waited for
        return False
    return bool(ready)


def _write_to_terminal(code: str) -> None:
    sys.stdout.write(code)
    sys.stdout.flush()
