"""Choice of the instruction-set variant that the kernels are compiled for.

Every kernel exists as generic LLVM vector IR (`portable`), which LLVM lowers to any processor's instructions,
including NEON. The x86 variants call the multiply-high and multiply-add instructions by name, because LLVM rewrites
some of the generic patterns into 32-bit multiplies that are three times slower; `neon-dotprod` so calls the dot product
of bytes. All variants compute the same integers.

A compiled function takes its variant as a tuple whose length is the number in `variants`. Numba compiles and caches by
argument types, and the length of a tuple is part of its type, so each variant has its own machine code in the cache.

The features that LLVM reports are trusted to raise no illegal instruction. On x86 they come from cpuid and xgetbv
(which tells whether the operating system saves the registers). Numba compiles everything for these features, so if
they were wrong, no Numba program would run at all. Numba's own settings can leave features out. The results of the
instructions are checked: see `self_test`.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping

from cpu_kernels.simd import arm_features, self_test
from cpu_kernels.simd.variants import (
    AVX2,
    AVX2_VNNI,
    AVX512,
    AVX512_NO_VNNI,
    NAMES,
    NEON_DOTPROD,
    PORTABLE,
    as_type,
    name_of,
)

ENVIRONMENT_VARIABLE = "TRITGGUF_ISA"
_NUMBA_VARIABLES = ("NUMBA_CPU_FEATURES", "NUMBA_ENABLE_AVX")
_AVX2_FEATURES = ("avx2", "fma", "f16c")
_AVX512_FEATURES = (*_AVX2_FEATURES, "avx512f", "avx512bw", "avx512vl", "avx512dq")
_REQUIRED_FEATURES = {
    PORTABLE: (),
    NEON_DOTPROD: ("dotprod",),
    AVX2: _AVX2_FEATURES,
    AVX2_VNNI: (*_AVX2_FEATURES, "avxvnni"),
    AVX512_NO_VNNI: _AVX512_FEATURES,
    AVX512: (*_AVX512_FEATURES, "avx512vnni"),
}


@functools.cache
def supported() -> list[int]:
    """Return the variants whose features this processor reports, slowest first.

    The result is cached: LLVM takes 0.2 ms to detect the features, and each of a model's hundred projections asks.
    """
    host = _host_features()
    return [isa for isa, needed in _REQUIRED_FEATURES.items() if all(host.get(name, False) for name in needed)]


def choose(name: str | None = None) -> int:
    """Return the variant named `name`; None takes the one that TRITGGUF_ISA names, or else the best that works here.

    A variant works if it passes its self-test. If a supported variant fails, a warning is logged and the next one is
    tried.

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
    """Return the variant that `choose` returns, as the tuple that compiled functions take."""
    return as_type(choose(name))


def of_this_architecture() -> list[int]:
    """Return the variants that processors of this kind may have, slowest first."""
    arm = arm_features.is_arm()
    return [isa for isa in NAMES.values() if isa == PORTABLE or (isa == NEON_DOTPROD) == arm]


def features() -> list[str]:
    """Return the processor's features that some variant requires."""
    required = dict.fromkeys(name for needed in _REQUIRED_FEATURES.values() for name in needed)
    return [name for name in required if _host_features().get(name, False)]


def why_unavailable(isa: int) -> str | None:
    """Return why a variant cannot be used here, as a predicate ("needs avx2, ..."); None if it can be used."""
    missing = [name for name in _REQUIRED_FEATURES[isa] if name not in features()]
    if not missing:
        return _failure(isa)
    restricted = any(name in os.environ for name in _NUMBA_VARIABLES)
    return f"needs {', '.join(missing)}, which this processor{' or a setting of Numba' if restricted else ''} lacks"


def _host_features() -> Mapping[str, bool]:
    """Return the processor's features that Numba may use; instructions of others would end the process in LLVM."""
    import llvmlite.binding

    if arm_features.is_arm():
        return {**llvmlite.binding.get_host_cpu_features(), "dotprod": arm_features.has_dot_products()}
    found = llvmlite.binding.get_host_cpu_features()
    if listed := os.environ.get("NUMBA_CPU_FEATURES"):
        named = {name.strip() for name in listed.split(",")}
        return {name: has and f"+{name}" in named for name, has in found.items()}
    if os.environ.get("NUMBA_ENABLE_AVX") == "0":
        return {name: has and not name.startswith("avx") for name, has in found.items()}
    return found


def _failure(isa: int) -> str | None:
    """Return why a supported variant fails its self-test; None if it passes."""
    return self_test.failure(isa)


@functools.cache
def _works(isa: int) -> bool:
    """Return whether a variant passes its self-test; log the reason once if it does not."""
    reason = _failure(isa)
    if reason:
        logging.getLogger("cpu_kernels").warning("note: instruction set %s %s; trying another", name_of(isa), reason)
    return reason is None
