"""The parent's side of the child process that renders chat templates.

Time and memory can be limited only for a whole process. So untrusted templates are rendered in a child process, and the
limits do not affect the program's other threads. The child starts with the first chat, answers one request at a time
and is replaced if it ends. Requests and answers go through pipes. The child ends when its pipe closes, so it also ends
when the program is killed.
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
_START_SECONDS = 60.0  # enough to start Python on a machine under load
_CODE = "import sys; sys.path[:] = {path!r}; from tritgguf.tokenization.template_worker import main; main()"
_REMEDY = "raw prompts (--raw, raw=True) do without it"


class Renderer:
    """Renders templates in a child process, which it starts on demand; thread-safe."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start the child unless it runs or another thread is using it; does not wait until it is ready."""
        if self._lock.acquire(blocking=False):
            try:
                with contextlib.suppress(TritGgufError):  # `render` will report it
                    self._running()
            finally:
                self._lock.release()

    def render(self, template: str, values: Mapping[str, Any]) -> str:
        """Return the rendered template; `values` must be JSON-serializable. Other threads wait meanwhile.

        Raises:
            BadRequestError: the template rejects the values, or they are not JSON-serializable.
            DamagedFileError: the template is invalid or exceeds its limits on time or memory.
            TritGgufError: the child cannot be started.

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
        error_class = BadRequestError if "refused" in answer else DamagedFileError
        raise error_class(f"the chat template fails ({answer.get('refused') or answer['failed']}); {_REMEDY}")

    def stop(self) -> None:
        """Kill the child."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
            process.wait()

    def forget(self) -> None:
        """After a fork, drop the child, which belongs to the parent process."""
        self._lock = threading.Lock()  # the old lock may be held by a thread that does not exist in this process
        process, self._process = self._process, None
        if process is not None:
            process.returncode = 0  # it is not a child of this process, so do not wait for it
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()

    def _answer(self, request: bytes, seconds: float) -> dict[str, Any]:
        with self._lock:
            for _ in range(2):  # retry once: something else may have killed the child
                process, started = self._running(), time.monotonic()
                try:
                    line = _exchange(process, request, seconds)
                except BaseException:  # such as Ctrl-C: a late answer would be taken as that of the next request
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
        """Return the child; start a new one if it has ended."""
        if self._process is None or self._process.poll() is not None:
            self.stop()
            self._process = _start()
        return self._process


def _start() -> subprocess.Popen[bytes]:
    """Start a child with the module search path of this process."""
    if not sys.executable or getattr(sys, "frozen", False):  # a frozen program would start itself endlessly
        raise TritGgufError(f"chat templates need a Python interpreter to render them; {_REMEDY}")
    code = _CODE.format(path=[entry for entry in sys.path if isinstance(entry, str)])
    options = ["-E"] if sys.flags.ignore_environment else []
    try:
        return subprocess.Popen(
            [sys.executable, *options, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,  # otherwise `forget` could write what another thread left in a buffer
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
    except OSError as error:
        reason = error.strerror or error
        raise TritGgufError(
            f"the process that renders chat templates cannot be started ({reason}); {_REMEDY}"
        ) from error


def _exchange(process: subprocess.Popen[bytes], request: bytes, seconds: float) -> bytes:
    """Send a line to a child and return its answer, which lacks the line feed if the child ended early.

    The child limits its own time; if it neither answers nor ends, it is killed.
    """
    assert process.stdin is not None and process.stdout is not None
    watchdog = threading.Timer(_START_SECONDS + seconds, process.kill)
    watchdog.daemon = True
    watchdog.start()
    answer = bytearray()
    try:
        rest = memoryview(request)
        while rest:
            rest = rest[process.stdin.write(rest) :]
        while not answer.endswith(b"\n") and (piece := process.stdout.read(1 << 20)):
            answer += piece
    except OSError:  # the child has ended
        pass
    finally:
        watchdog.cancel()
    return bytes(answer)


_renderer = Renderer()
atexit.register(_renderer.stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renderer.forget)


def start_renderer() -> None:
    """Start the rendering process early, so that it is ready for the first chat; does not wait."""
    _renderer.start()


def render_in_child(template: str, values: Mapping[str, Any]) -> str:
    """Render a template in this process's shared child; see `Renderer.render`."""
    return _renderer.render(template, values)
