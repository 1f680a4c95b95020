"""Look-up with byte shuffles: every index finds its float, in both halves and from indices of both widths."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest
from numba import types
from numba.extending import intrinsic

from cpu_kernels.simd import instruction_set, variants
from cpu_kernels.simd.pair_lookup import PairLookup
from cpu_kernels.simd.vectors import I16, Vectors

_AVX2 = [isa for isa in (variants.AVX2, variants.AVX2_VNNI) if isa in instruction_set.supported()]


@intrinsic
def _find(typing_context: Any, isa: Any, table: Any, narrow: Any, wide: Any, out: Any) -> Any:
    """Look up uint16 [2, 16] at `narrow`, in the order of `PairLookup`, and the same of `wide`: float32 [2, 2, 16]."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vectors = Vectors(builder, isa.count)
        _, table, narrow, wide, out = arguments
        lookup = PairLookup(vectors, table)
        for number, address in enumerate((narrow, wide)):
            indices = [vectors.load(address, I16, 16, 32 * row) for row in range(2)]
            found = lookup.find([vectors.widen(row) for row in indices] if number else indices)
            for row, floats in enumerate(found):
                vectors.store(floats, out, 64 * (2 * number + row))
        return context.get_dummy_value()

    return types.void(isa, *[types.intp] * 4), generate


@numba.njit(nogil=True)
def _run(isa: tuple[int, ...], table: np.ndarray, narrow: np.ndarray, wide: np.ndarray, out: np.ndarray) -> None:
    _find(isa, table.ctypes.data, narrow.ctypes.data, wide.ctypes.data, out.ctypes.data)


@pytest.mark.parametrize("isa", _AVX2)
def test_every_index_finds_its_float(isa: int) -> None:
    generator = np.random.default_rng(0)
    table = generator.integers(0, 1 << 32, 32, np.uint32).view(np.float32)
    indices = generator.permutation(32).astype(np.uint16).reshape(2, 16)
    out = np.zeros((2, 2, 16), np.float32)
    _run(variants.as_type(isa), table, np.ascontiguousarray(indices[:, list(PairLookup.ORDER)]), indices, out)
    for found in out:
        np.testing.assert_array_equal(found.view(np.uint32), table.view(np.uint32)[indices])
