"""Measuring as a processor with fewer instructions would: environments of our programs, and llama.cpp's flags."""

from __future__ import annotations

import os
from collections.abc import Mapping

from cpu_kernels.simd import variants

# What a processor of 2013 with AVX2 has: 16 vector registers of 256 bits, no dot products
_AVX2_FEATURES = "+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt,+popcnt,+sse4.2,-avx512f"
_ENVIRONMENTS = {
    variants.AVX2: {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": _AVX2_FEATURES, "TRITGGUF_ISA": "avx2"}
}
NAMES = [name for name, isa in variants.NAMES.items() if isa in _ENVIRONMENTS]


def environment(isa_name: str | None) -> Mapping[str, str]:
    """Return the environment in which Numba compiles for no more than this instruction set; None changes nothing."""
    if isa_name is None:
        return os.environ
    return {**os.environ, **_ENVIRONMENTS[variants.NAMES[isa_name]]}


def llama_cpp_flags(flags: set[str], isa_name: str | None) -> set[str]:
    """Return the processor's flags that llama.cpp may use, given those that it has."""
    return flags if isa_name is None else {flag for flag in flags if not flag.startswith("avx512")}
