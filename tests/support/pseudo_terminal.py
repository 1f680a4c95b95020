"""A program at a pseudo-terminal: keys go in, what it shows comes out."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

_SECONDS = 300
_TIMES_ASLEEP = 15
PASTE_BEGIN, PASTE_END = b"\x1b[200~", b"\x1b[201~"
CTRL_C, CTRL_D = b"\x03", b"\x04"
_ESCAPE_SEQUENCES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class PseudoTerminal:
    """Runs a program; a context manager that ends it.

    Attributes:
        shown: what the program has written since the last keys, without escape sequences.

    """

    def __init__(self, command: Sequence[str], *, columns: int = 80, env: dict[str, str] | None = None) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        self.process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C becomes a signal
            env={**os.environ, "TERM": "xterm", **(env or {})},
        )
        os.close(theirs)
        self.written = ""

    @property
    def shown(self) -> str:
        return _ESCAPE_SEQUENCES.sub("", self.written).replace("\r", "")

    @property
    def echoes(self) -> bool:
        """Whether the terminal shows keys that are pressed, as it does unless a program has changed that."""
        return bool(termios.tcgetattr(self._ours)[3] & termios.ECHO)

    def press(self, keys: bytes) -> None:
        """Press keys and forget what was shown before."""
        self.written = ""
        os.write(self._ours, keys)

    def press_when_it_waits(self, keys: bytes) -> None:
        """Press keys once the program waits for them: right after its prompt, readline misses a Ctrl-C."""
        seen_asleep, deadline = 0, time.monotonic() + _SECONDS
        while seen_asleep < _TIMES_ASLEEP:
            assert time.monotonic() < deadline, "the program does not wait for keys"
            time.sleep(0.02)
            seen_asleep = seen_asleep + 1 if self._is_asleep() else 0
        self.press(keys)

    def _is_asleep(self) -> bool:
        """Tell whether the program's main thread waits for something; True where the system does not say."""
        try:
            return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"
        except OSError:
            return True

    def wait_for(self, pattern: str) -> str:
        """Wait until `shown` has a match of a regular expression; return what is shown."""
        deadline = time.monotonic() + _SECONDS
        while not re.search(pattern, self.shown):
            ready, _, _ = select.select([self._ours], [], [], max(0.0, deadline - time.monotonic()))
            assert ready and time.monotonic() < deadline, f"{pattern!r} did not come: {self.shown!r}"
            self._read(pattern)
        return self.shown

    def _read(self, pattern: str) -> None:
        try:
            self.written += os.read(self._ours, 4096).decode(errors="replace")
        except OSError as error:  # the program has ended
            raise AssertionError(f"{pattern!r} never came: {self.shown!r}") from error

    def wait_for_end(self) -> int:
        """Return the exit code; what is still shown is dropped."""
        return self.process.wait(_SECONDS)

    def __enter__(self) -> PseudoTerminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)
