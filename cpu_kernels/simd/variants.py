"""The instruction-set variants that kernels are compiled for, by number and name."""

from __future__ import annotations

PORTABLE, NEON_DOTPROD, AVX2, AVX2_VNNI, AVX512_NO_VNNI, AVX512 = 0, 1, 2, 3, 4, 5
NAMES = {
    "portable": PORTABLE,
    "neon-dotprod": NEON_DOTPROD,
    "avx2": AVX2,
    "avx2-vnni": AVX2_VNNI,
    "avx512-novnni": AVX512_NO_VNNI,
    "avx512": AVX512,
}


def as_type(isa: int) -> tuple[int, ...]:
    """Return the tuple that compiled functions take for this variant; see `instruction_set`."""
    return (0,) * isa


def name_of(isa: int) -> str:
    """Return a variant's name."""
    return next(name for name, number in NAMES.items() if number == isa)
