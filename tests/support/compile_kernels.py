"""Compiles all kernels that are not in the cache yet, so that tests do not wait for them one by one."""

from __future__ import annotations

import contextlib

from cpu_kernels.precompile import precompile

if __name__ == "__main__":
    precompile(None, lambda: contextlib.nullcontext(lambda done, total: None))
