"""The child process that renders chat templates, as its parent sees it.

What a stranger's template may take of time and memory can be bounded for a whole process only. So a process of its own
renders, and no other thread of the program is bounded with it. It is started for the first chat, answers one request
after the other, and is replaced when it ends. It gets texts through a pipe and sends texts back; it ends with the pipe,
so also when the program is killed.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from tritgguf.errors import BadRequestError, DamagedFileError, TritGgufError

MOST_SECONDS = 5.0
_START_SECONDS = 60.0  # what a machine under load may need to start Python
_CODE = "import sys; sys.path[:] = {path!r}; from tritgguf.tokenization.template_worker import main; main()"
_REMEDY = "--raw gives the model your text as it is"


class Renderer:
    """Renders templates in a child process, which it starts when it needs one; safe to be used by several threads."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start the child, unless it runs or another thread is about to see to it; does not wait until it is ready."""
        if self._lock.acquire(blocking=False):
            try:
                with contextlib.suppress(TritGgufError):  # who renders will be told
                    self._running()
            finally:
                self._lock.release()

    def render(self, template: str, values: Mapping[str, Any]) -> str:
        """Return the text that a template makes of values that JSON can hold; other threads wait meanwhile.

        Raises:
            BadRequestError: the template refuses these values, or JSON cannot hold them.
            DamagedFileError: the template is wrong, or takes more time or memory than it may.
            TritGgufError: no process can be started.

        """
        seconds = MOST_SECONDS
        try:
            request = json.dumps({**values, "template": template, "seconds": seconds}).encode("ascii") + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise BadRequestError(f"a chat template cannot be given these messages ({error})") from error
        answer = self._answer(request, seconds)
        if "text" in answer:
            return str(answer["text"])
        if "memory" in answer:
            raise DamagedFileError(f"the chat template takes too much memory; {_REMEDY}")
        kind = BadRequestError if "refused" in answer else DamagedFileError
        raise kind(f"the chat template fails ({answer.get('refused') or answer['failed']}); {_REMEDY}")

    def stop(self) -> None:
        """End the child, whatever it is doing."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
            process.wait()

    def forget(self) -> None:
        """Leave the child to the process that this one was forked from."""
        self._lock = threading.Lock()  # a thread that is not here may hold the other one
        process, self._process = self._process, None
        if process is not None:
            process.returncode = 0  # it is no child of this process, which is not to wait for it
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()

    def _answer(self, request: bytes, seconds: float) -> dict[str, Any]:
        with self._lock:
            for _ in range(2):  # a child may have been killed for reasons of others, before or now
                process, started = self._running(), time.monotonic()
                try:
                    line = _exchange(process, request, seconds)
                except BaseException:  # Ctrl-C, say: its answer would be taken for that to the next request
                    self.stop()
                    raise
                if line.endswith(b"\n"):
                    answer: dict[str, Any] = json.loads(line)
                    if answer["last"]:
                        self.stop()
                    return answer
                self.stop()
                if time.monotonic() - started >= seconds:
                    return {"failed": f"it takes more than {seconds:g} seconds"}
            return {"failed": f"the process that renders it ends with code {process.returncode}"}

    def _running(self) -> subprocess.Popen[bytes]:
        """Return the child, a new one if there is none or it has ended."""
        if self._process is None or self._process.poll() is not None:
            self.stop()
            self._process = _start()
        return self._process


def _start() -> subprocess.Popen[bytes]:
    """Start a child that finds modules where this process does."""
    if not sys.executable or getattr(sys, "frozen", False):  # a frozen program would start itself again and again
        raise TritGgufError(f"chat templates need a Python interpreter to render them; {_REMEDY}")
    code = _CODE.format(path=[entry for entry in sys.path if isinstance(entry, str)])
    options = ["-E"] if sys.flags.ignore_environment else []
    try:
        return subprocess.Popen(
            [sys.executable, *options, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,  # `forget` must not write what another thread has left in a buffer
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
    except OSError as error:
        reason = error.strerror or error
        raise TritGgufError(
            f"the process that renders chat templates cannot be started ({reason}); {_REMEDY}"
        ) from error


def _exchange(process: subprocess.Popen[bytes], request: bytes, seconds: float) -> bytes:
    """Send a line to a child and return its answer, which has no line end when the child has ended before.

    The child bounds its own time; one that neither answers nor ends is killed.
    """
    assert process.stdin is not None and process.stdout is not None
    watch = threading.Timer(_START_SECONDS + seconds, process.kill)
    watch.daemon = True
    watch.start()
    answer = bytearray()
    try:
        rest = memoryview(request)
        while rest:
            rest = rest[process.stdin.write(rest) :]
        while not answer.endswith(b"\n") and (piece := process.stdout.read(1 << 20)):
            answer += piece
    except OSError:  # nobody reads any more
        pass
    finally:
        watch.cancel()
    return bytes(answer)


_renderer = Renderer()
atexit.register(_renderer.stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renderer.forget)


def start_renderer() -> None:
    """Start the process that renders chat templates, so that it is ready when the first chat comes; returns at once."""
    _renderer.start()


def render_in_child(template: str, values: Mapping[str, Any]) -> str:
    """Render a template in the process's one child; see `Renderer.render`."""
    return _renderer.render(template, values)
