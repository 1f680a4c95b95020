"""Which vector instructions the kernels are compiled for.

Every kernel exists as generic LLVM vector IR (`portable`), which LLVM lowers to what the processor has, NEON
included. On x86 the multiply-high and multiply-add patterns are named instead of hoped for, because LLVM rewrites
some chains around them into 32-bit multiplies that are three times slower. All variants compute the same integers.

A compiled function receives its variant as a tuple whose length is the number below: Numba compiles and caches by
the types of the arguments, and the length of a tuple is part of its type, so every variant has its own machine code
in the cache.
"""

from __future__ import annotations

import os

PORTABLE, AVX2, AVX512 = 0, 1, 2
NAMES = {"portable": PORTABLE, "avx2": AVX2, "avx512": AVX512}
ENVIRONMENT_VARIABLE = "TRITGGUF_ISA"
_NEEDED = {
    PORTABLE: (),
    AVX2: ("avx2", "fma", "f16c"),
    AVX512: ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni", "fma", "f16c"),
}


def supported() -> list[int]:
    """Return the variants that this processor runs, slowest first.

    The features come from LLVM, which checks not only the processor's flags but also that the operating system
    saves the registers.
    """
    import llvmlite.binding

    features = llvmlite.binding.get_host_cpu_features()
    return [isa for isa, needed in _NEEDED.items() if all(features.get(name, False) for name in needed)]


def as_type(isa: int) -> tuple[int, ...]:
    """Return the variant in the form in which compiled functions take it."""
    return (0,) * isa


def choose() -> int:
    """Return the variant to use: the best supported one, or the one that TRITGGUF_ISA names.

    Raises:
        ValueError: TRITGGUF_ISA names no variant, or one that this processor does not have.

    """
    available = supported()
    forced = os.environ.get(ENVIRONMENT_VARIABLE)
    if not forced:
        return available[-1]
    if NAMES.get(forced) not in available:
        known = ", ".join(name for name, isa in NAMES.items() if isa in available)
        raise ValueError(f"{ENVIRONMENT_VARIABLE}={forced} is not available here; choose from {known}")
    return NAMES[forced]
