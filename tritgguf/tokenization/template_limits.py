"""Limits for untrusted chat templates: attributes, size of numbers, time and memory.

Jinja's sandbox blocks access to interpreter internals and changes of the arguments. It does not limit the number of
loop iterations or the length of strings. Real templates take milliseconds.

Limits on time and memory apply to the whole process, so only the process that renders templates uses them
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
_MOST_BITS = 4096  # of one number; operations on huge numbers cannot be interrupted
_GRACE_SECONDS = 1.0


class TemplateTimeoutError(SecurityError):
    """A template exceeded its time limit."""


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with a limit on the size of numbers. Render inside `resource_limits`."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute `*` or `**`; SecurityError if the result could be huge."""
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * max(right, 0) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _MOST_BITS:
                raise SecurityError("a number is too large")
        return super().call_binop(context, operator, left, right)


@contextmanager
def resource_limits(seconds: float) -> Iterator[None]:
    """Raise an error in the block after `seconds`, or if it allocates too much memory (Linux).

    If the timer cannot raise an error (on Windows, or during one long operation), the process exits.
    """
    with ExitStack() as limits:
        faulthandler.dump_traceback_later(seconds + _GRACE_SECONDS, exit=True)
        limits.callback(faulthandler.cancel_dump_traceback_later)
        if hasattr(signal, "setitimer"):
            limits.enter_context(_time_limit(seconds))
        limits.enter_context(_memory_limit())
        yield


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TemplateTimeoutError(f"it takes more than {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _memory_limit() -> Iterator[None]:
    """Limit the growth of the address space to `_MOST_BYTES`; beyond that, Python raises MemoryError."""
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
