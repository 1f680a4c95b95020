"""Which vector instructions the kernels are compiled for.

Every kernel exists as generic LLVM vector IR (`portable`), which LLVM lowers to what the processor has, NEON
included. On x86 the multiply-high and multiply-add patterns are named instead of hoped for, because LLVM rewrites
some chains around them into 32-bit multiplies that are three times slower. All variants compute the same integers.

A compiled function receives its variant as a tuple whose length is the number below: Numba compiles and caches by
the types of the arguments, and the length of a tuple is part of its type, so every variant has its own machine code
in the cache.

What is trusted: the features that LLVM reports, in so far as no listed instruction is illegal. On x86 they come from
cpuid, and xgetbv tells that the operating system saves the registers. Numba compiles everything for these features,
so where they were wrong, no Numba program would run, and no choice made here could help. That the instructions also
compute what they should is not taken on trust: see `self_test`.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping

from cpu_kernels.simd.variants import AVX2, AVX2_VNNI, AVX512, AVX512_NO_VNNI, NAMES, PORTABLE, as_type, name_of

ENVIRONMENT_VARIABLE = "TRITGGUF_ISA"
_AVX2_FEATURES = ("avx2", "fma", "f16c")
_AVX512_FEATURES = (*_AVX2_FEATURES, "avx512f", "avx512bw", "avx512vl", "avx512dq")
_NEEDED = {
    PORTABLE: (),
    AVX2: _AVX2_FEATURES,
    AVX2_VNNI: (*_AVX2_FEATURES, "avxvnni"),
    AVX512_NO_VNNI: _AVX512_FEATURES,
    AVX512: (*_AVX512_FEATURES, "avx512vnni"),
}


@functools.cache
def supported() -> list[int]:
    """Return the variants that this processor's features promise, slowest first.

    The features come from LLVM, which asks the processor and whether the operating system saves its registers. They
    are asked for once: LLVM takes 0.2 ms to answer, and each of a model's hundred projections wants to know.
    """
    host = _host_features()
    return [isa for isa, needed in _NEEDED.items() if all(host.get(name, False) for name in needed)]


def choose(name: str | None = None) -> int:
    """Return the variant of this name; None takes the one that TRITGGUF_ISA names, or else the best that works here.

    A variant works if its operations give the right integers when they are run; where one that the features promise
    does not, a line on stderr says so, and the next one is taken.

    Raises:
        ValueError: `name` or TRITGGUF_ISA names no variant, or one that does not work here.

    """
    wanted = name or os.environ.get(ENVIRONMENT_VARIABLE)
    label = f"instruction set {wanted}" if name else f"{ENVIRONMENT_VARIABLE}={wanted}"
    available = supported()
    if not wanted:
        return next(isa for isa in reversed(available) if isa == PORTABLE or _works(isa))
    if NAMES.get(wanted) not in available:
        known = ", ".join(name_of(isa) for isa in available)
        raise ValueError(f"{label} is not available here; choose from {known}")
    if reason := _failure(NAMES[wanted]):
        raise ValueError(f"{label} {reason}; choose another one")
    return NAMES[wanted]


def chosen(name: str | None = None) -> tuple[int, ...]:
    """Return what `choose` returns in the form in which compiled functions take it."""
    return as_type(choose(name))


def features() -> list[str]:
    """Return those of the features that any variant needs which this processor has."""
    wanted = dict.fromkeys(name for needed in _NEEDED.values() for name in needed)
    return [name for name in wanted if _host_features().get(name, False)]


def obstacle(isa: int) -> str | None:
    """Return why a variant cannot be used here, as a sentence without its subject; None where it can."""
    missing = [name for name in _NEEDED[isa] if name not in features()]
    return f"needs {', '.join(missing)}, which this processor lacks" if missing else _failure(isa)


def _host_features() -> Mapping[str, bool]:
    import llvmlite.binding

    return llvmlite.binding.get_host_cpu_features()


def _failure(isa: int) -> str | None:
    """Return what is wrong with a variant that the processor's features promise, or None."""
    from cpu_kernels.simd import self_test  # which is made of operations that need to know the variants

    return self_test.failure(isa)


@functools.cache
def _works(isa: int) -> bool:
    """Tell whether a variant works, and say why not, once."""
    reason = _failure(isa)
    if reason:
        logging.getLogger("cpu_kernels").warning("note: instruction set %s %s; trying another", name_of(isa), reason)
    return reason is None
