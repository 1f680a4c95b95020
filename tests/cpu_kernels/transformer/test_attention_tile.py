"""The vector operations of attention: products, powers of two, float16, and their vectorization on Arm."""

from __future__ import annotations

import re
from collections import Counter

import numba
import numpy as np
import pytest
from arm_assembly import arm_assembly
from llvmlite import ir

from cpu_kernels.simd.instruction_set import chosen
from cpu_kernels.simd.variants import PORTABLE
from cpu_kernels.simd.vectors import FLOAT, HALF, Vectors
from cpu_kernels.transformer.attention_tile import (
    PANEL,
    Product,
    largest_of,
    max_rows,
    multiply_keys,
    multiply_values,
    powers_of_two,
    product_columns,
)
from cpu_kernels.transformer.kv_pages import store_narrowed

Variant = tuple[int, ...]


@numba.njit
def product(isa: Variant, left: np.ndarray, right: np.ndarray, out: np.ndarray) -> None:
    multiply_values(
        isa, right, len(left), left.ctypes.data, left.strides[0], right.ctypes.data, left.shape[1], out.ctypes.data,
        out.strides[0], 0, 0,
    )  # fmt: skip


@numba.njit
def scaled_product(
    isa: Variant, left: np.ndarray, right: np.ndarray, scales: np.ndarray, out: np.ndarray, of_keys: bool
) -> None:
    address, stride, inner = left.ctypes.data, left.strides[0], left.shape[1]
    to, to_stride = out.ctypes.data, out.strides[0]
    if of_keys:
        multiply_keys(
            isa, right, len(left), address, stride, right.ctypes.data, inner, to, to_stride, scales.ctypes.data, 0
        )
    else:
        multiply_values(
            isa, right, len(left), address, stride, right.ctypes.data, inner, to, to_stride, scales.ctypes.data, 0
        )


@numba.njit
def raise_to_powers(isa: Variant, values: np.ndarray, subtracted: float) -> float:
    return powers_of_two(isa, values.ctypes.data, len(values), subtracted)


@numba.njit
def largest(isa: Variant, values: np.ndarray) -> float:
    return largest_of(isa, values.ctypes.data, len(values))


@numba.njit
def narrow_all(values: np.ndarray, out: np.ndarray) -> None:
    for k in range(len(values)):
        store_narrowed(out, out.ctypes.data + k * out.itemsize, values[k])


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("inner", [0, 1, 33])
def test_products(variant: str, dtype: type, inner: int) -> None:
    isa = chosen()
    for rows in range(1, max_rows(len(isa)) + 1):
        generator = np.random.default_rng((rows, inner))
        left = generator.standard_normal((rows, inner)).astype(np.float32)
        right: np.ndarray = generator.standard_normal((inner, PANEL)).astype(dtype)
        out = generator.standard_normal((rows, product_columns(len(isa), rows) + 3)).astype(np.float32)
        expected = out.astype(np.float64)
        expected[:, :-3] += left.astype(np.float64) @ right[:, : product_columns(len(isa), rows)].astype(np.float64)
        product(isa, left, right.view(np.uint16) if dtype is np.float16 else right, out)
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("of_keys", "inner"), [(True, 32), (True, 96), (False, 1), (False, 33)])
def test_products_with_scales(variant: str, of_keys: bool, inner: int) -> None:
    """Keys have a scale for a column and 32 rows, values one for a row; what is behind values is not used."""
    isa, generator, behind = chosen(), np.random.default_rng(inner), -inner % 32
    right = generator.integers(-127, 128, (inner, PANEL)).astype(np.int8)
    scales = generator.random((inner // 32, PANEL) if of_keys else inner).astype(np.float16)
    numbers = right * (np.repeat(scales, 32, axis=0) if of_keys else scales[:, np.newaxis]).astype(np.float64)
    for rows in range(1, max_rows(len(isa)) + 1):
        left = generator.standard_normal((rows, inner)).astype(np.float32)
        out = generator.standard_normal((rows, product_columns(len(isa), rows) + 3)).astype(np.float32)
        expected = out.astype(np.float64)
        expected[:, :-3] += left.astype(np.float64) @ numbers[:, : product_columns(len(isa), rows)]
        padded = np.pad(left, [(0, 0), (0, behind)], constant_values=np.nan)[:, :inner]
        padded_scales = np.pad(scales, [(0, 0)] * (scales.ndim - 1) + [(0, behind)], constant_values=np.nan)
        scaled_product(isa, padded, right, padded_scales.view(np.uint16), out, of_keys)
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-3)


def test_a_product_with_no_rows_or_too_many_does_nothing(variant: str) -> None:
    isa = chosen()
    for rows in (0, 9):
        left, right, out = np.ones((rows, 4), np.float32), np.ones((4, PANEL), np.float32), np.zeros((rows, PANEL))
        product(isa, left, right, out.astype(np.float32))
        assert not out.any()


def test_powers_of_two(variant: str) -> None:
    x = np.linspace(-140, 127, 32 * 10_000).astype(np.float32)
    powers = x.copy()
    raise_to_powers(chosen(), powers, np.float32(0))
    expected = np.exp2(x.astype(np.float64))
    normal = x >= -125
    np.testing.assert_allclose(powers[normal], expected[normal], rtol=2e-7)
    assert not powers[~normal].any()
    shares = np.linspace(-20, 0, 320).astype(np.float32)
    total = np.exp2(shares.astype(np.float64) - 1).sum()
    assert raise_to_powers(chosen(), shares, np.float32(1)) == pytest.approx(total, rel=1e-6)


def test_powers_of_two_are_exponentials(variant: str) -> None:
    x = np.linspace(-30, 0, 32 * 1000).astype(np.float32)
    powers = x * np.float32(np.log2(np.e))
    raise_to_powers(chosen(), powers, np.float32(0))
    np.testing.assert_allclose(powers, np.exp(x.astype(np.float64)), rtol=3e-6)
    near_one = x[-1000:] / np.float32(10)
    powers = near_one[-992:] * np.float32(np.log2(np.e))
    raise_to_powers(chosen(), powers, np.float32(0))
    np.testing.assert_allclose(powers, np.exp(near_one[-992:].astype(np.float64)), rtol=4e-7)


def test_exact_powers_of_two(variant: str) -> None:
    x = np.array([*range(-125, 128), *[-np.inf] * 35], np.float32)
    powers = x + np.float32(3)
    raise_to_powers(chosen(), powers, np.float32(3))
    np.testing.assert_array_equal(powers, np.exp2(x.astype(np.float64)).astype(np.float32))


@pytest.mark.parametrize("index", [0, 1, 15, 16, 31, 32, 63])
def test_largest(variant: str, index: int) -> None:
    values = -np.random.default_rng(0).random(64).astype(np.float32) - 2
    values[63 - index] = -np.inf
    values[index] = -1
    assert largest(chosen(), values) == -1
    assert largest(chosen(), np.full(32, -np.inf, np.float32)) == -np.inf


def test_float16_rounds_to_nearest_even_and_saturates() -> None:
    generator = np.random.default_rng(0)
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)  # all finite ones
    ties = (halves[1:] + halves[:-1]) / 2
    x = np.concatenate([halves, ties, np.nextafter(ties, np.float32(0)), generator.standard_normal(1000) * 100])
    x = np.concatenate([x, -x]).astype(np.float32)
    out = np.empty(len(x), np.uint16)
    narrow_all(x, out)
    np.testing.assert_array_equal(out, x.astype(np.float16).view(np.uint16))
    beyond = np.array([65504, 65519, 65520, 1e6, 3e38, np.inf], np.float32)
    narrow_all(np.concatenate([beyond, -beyond, [np.float32(np.nan)]]), out)
    np.testing.assert_array_equal(out[:12].view(np.float16), [65504] * 6 + [-65504] * 6)
    assert np.isnan(out[12:13].view(np.float16)).all()
    kept = np.empty(6, np.float32)
    narrow_all(beyond, kept)
    np.testing.assert_array_equal(kept, beyond)


@pytest.mark.parametrize("element", [HALF, FLOAT, None])
def test_portable_is_vector_code_on_arm(element: ir.Type | None) -> None:
    """Compile a product of 6 rows with `element`, or a power of two for None."""

    def emit(
        vectors: Vectors, left: ir.Value, stride: ir.Value, right: ir.Value, inner: ir.Value, *out: ir.Value
    ) -> None:
        if element is None:
            vectors.store(vectors.power_of_two(vectors.load(left, FLOAT, PANEL)), out[0])
        else:
            Product(vectors, element, 6, (left, stride), right, out, inner).emit(inner)

    found = Counter(re.findall(r"^\t(\w+)\t", arm_assembly(emit, 6), re.MULTILINE))
    assert found["bl"] == 0  # no library calls
    assert found["fmadd"] == 0  # no scalar operations
    if element is None:
        assert found["fmla"] >= 6 * PANEL // 4
        assert found["frintx"] == PANEL // 4
    else:
        # Six rows of 16 columns; the columns are widened once.
        assert found["fmla"] >= 6 * product_columns(PORTABLE, 6) // 4
        assert found["fcvtl"] + found["fcvtl2"] == (product_columns(PORTABLE, 6) // 4 if element is HALF else 0)
