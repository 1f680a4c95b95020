"""Bounds on what a chat template of a stranger may use: attributes, numbers, time and memory.

Jinja's sandbox keeps a template from the interpreter's insides and from changing what it is given. It does not keep it
from counting to ten thousand million, or from making a string of that length. Real templates take milliseconds.

Time and memory are bounded for a whole process, so this is for the one that does nothing but render
(`template_worker`).
"""

from __future__ import annotations

import faulthandler
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MOST_CHARACTERS = 10_000_000
_MOST_BYTES = 1 << 28
_MOST_BITS = 4096  # of one number: an operation on large ones cannot be interrupted
_GRACE_SECONDS = 1.0


class TakesTooLongError(SecurityError):
    """The clock has stopped a template."""


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with numbers that stay small. Render inside `limited`."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute an operator whose result could be a huge number."""
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * max(right, 0) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _MOST_BITS:
                raise SecurityError("a number is too large")
        return super().call_binop(context, operator, left, right)


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Stop what takes longer than `seconds`, or too much memory where the system can tell.

    The process ends where its clock cannot raise an error: on Windows, and in the middle of one long operation.
    """
    with ExitStack() as bounds:
        faulthandler.dump_traceback_later(seconds + _GRACE_SECONDS, exit=True)
        bounds.callback(faulthandler.cancel_dump_traceback_later)
        if hasattr(signal, "setitimer"):
            bounds.enter_context(_time_bound(seconds))
        bounds.enter_context(_memory_bound())
        yield


@contextmanager
def _time_bound(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TakesTooLongError(f"it takes more than {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _memory_bound() -> Iterator[None]:
    """Let the process have so much more address space than it has now; beyond, Python raises MemoryError."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = int(statm.read_text("ascii").split()[0]) * resource.getpagesize() + _MOST_BYTES
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
