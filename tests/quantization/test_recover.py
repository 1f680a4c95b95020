"""Exact recovery: matrices of a simulated quantizer, checked with the reference decoder; matrices without a fit."""

from __future__ import annotations

import itertools
import re

import naive
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_inputs import THREAD_POOL

from cpu_kernels.threads.thread_pool import ThreadPool
from tools.recovery.recover_roundtrip import bfloat16_bits, differing_numbers
from tools.recovery.simulated_producer import HALVES, ORDERS, produce, random_case
from tritgguf.formats.dtypes import to_float32
from tritgguf.formats.matrix_rows import MatrixRows
from tritgguf.formats.trit_types import DEPTHS
from tritgguf.quantization import recover
from tritgguf.quantization.quantized_matrix import QuantizedMatrix
from tritgguf.quantization.recover import Fit, HalfType, NoFit, find_fit, recover_matrix

KINDS = 64  # of the matrices from `random_case`
depths = pytest.mark.parametrize("depth", DEPTHS)
half_types = pytest.mark.parametrize("half", HALVES)


def trits_of(levels: np.ndarray, depth: int) -> np.ndarray:
    """Return float64 [..., depth], least significant trit first."""
    h = naive.largest_level(depth)
    return ((levels[..., np.newaxis] + h) // 3 ** np.arange(depth) % 3 - 1).astype(np.float64)


def published(levels: np.ndarray, scales: np.ndarray, depth: int, order: str = "scale / h * level") -> np.ndarray:
    """Return float16 [rows, columns] of levels [rows, groups, 16] and scales [rows, groups], by float32 arithmetic."""
    return produce(np.asarray(scales, np.float32), trits_of(np.asarray(levels), depth), order, "float32")


def recovered(weights: np.ndarray) -> QuantizedMatrix:
    """Recover a matrix that has a fit, and check it with the reference decoder."""
    matrix = recover_matrix(weights, THREAD_POOL)
    assert isinstance(matrix, QuantizedMatrix)
    assert differing_numbers(matrix, weights) == 0
    assert (np.diff(matrix.codebook) >= 0).all()
    assert np.isfinite(matrix.codebook).all()
    return matrix


def reason(weights: np.ndarray) -> str:
    """Return why a matrix has no fit."""
    found = find_fit(weights, thread_pool=THREAD_POOL)
    assert isinstance(found, NoFit)
    return found.reason


def gaussian(rows: int = 8, columns: int = 256) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)


def as_halves(weights: np.ndarray, half: str) -> np.ndarray:
    return weights.astype(np.float16) if half == "float16" else bfloat16_bits(weights)


# -- matrices with a fit


@half_types
@depths
@pytest.mark.parametrize("order", ORDERS)
def test_every_order_in_float32(order: str, depth: int, half: str) -> None:
    first = list(ORDERS).index(order)
    for kind in range(first, KINDS, len(ORDERS)):
        case = random_case(kind, depth)
        weights = produce(case.scales, case.trits, order, "float32", half)
        if depth == 4 and case.kind.endswith("halves"):
            continue  # has ties, see test_ties
        assert recovered(weights).depth <= depth, case.kind


@depths
@pytest.mark.parametrize("order", ORDERS)
def test_float16_arithmetic(order: str, depth: int) -> None:
    is_one_rounding = depth == 1 or order == "scale / h * level" or (depth == 2 and "sum" not in order)
    outcomes = []
    for kind in range(0, KINDS, 7):
        case = random_case(kind, depth)
        weights = produce(case.scales, case.trits, order, "float16")
        matrix = recover_matrix(weights, THREAD_POOL)
        outcomes.append(isinstance(matrix, QuantizedMatrix))
        assert not isinstance(matrix, QuantizedMatrix) or differing_numbers(matrix, weights) == 0
    assert all(outcomes) == is_one_rounding


@given(seed=st.integers(0, 1 << 30), depth=st.sampled_from(DEPTHS), order=st.sampled_from(["scale * level / h"]))
def test_random_matrices(seed: int, depth: int, order: str) -> None:
    generator = np.random.default_rng(seed)
    h = naive.largest_level(depth)
    codebook = generator.lognormal(-4, 1, 27).astype(np.float32)
    shape = (int(generator.integers(1, 20)), 4 * int(generator.integers(1, 4)))
    levels = generator.integers(-h, h + 1, (*shape, 16)) // generator.integers(1, h + 1, (*shape, 1))
    recovered(published(levels, codebook[generator.integers(0, 27, shape)], depth, order))


@depths
def test_least_depth_is_found(depth: int) -> None:
    levels = np.random.default_rng(depth).integers(-1, 2, (20, 8, 16)) * naive.largest_level(depth)
    levels[0, 0, :2] = 1, 2 if depth > 1 else 1
    found = recovered(published(levels, np.full((20, 8), 0.1), depth))
    assert found.depth == depth
    levels[0, 0, :2] = 0
    assert recovered(published(levels, np.full((20, 8), 0.1), depth)).depth == 1


@half_types
def test_one_group(half: str) -> None:
    weights = as_halves(gaussian(1, 64), half)
    weights[:, 16:] = 0
    weights[0, :16] = as_halves(np.float32(0.03) * np.arange(-8, 8, dtype=np.float32), half)
    assert recovered(weights).depth == 3


def test_zeros() -> None:
    matrix = recovered(np.zeros((3, 128), np.float16))
    assert matrix.depth == 1
    assert not matrix.codebook.any()
    assert (matrix.levels == 1).all()
    assert matrix.squared_error == matrix.squared_weights == 0


def test_negative_zeros_become_zeros() -> None:
    levels = np.random.default_rng(1).integers(-4, 5, (4, 4, 16))
    weights = published(levels, np.full((4, 4), 0.1), 2)
    weights[weights == 0] = -0.0
    assert np.signbit(weights[weights == 0]).all()
    assert (recovered(weights).levels.reshape(levels.shape) == levels + 4).all()


def test_largest_halves() -> None:
    levels = np.random.default_rng(2).integers(-40, 41, (4, 4, 16))
    levels[..., 0] = 40
    weights = published(levels, np.full((4, 4), 65504.0), 4)
    assert weights.max() == 65504
    recovered(weights)


def test_smallest_halves() -> None:
    # Numbers this small are multiples of 2**-24, so every group allows many scales.
    bits = np.random.default_rng(3).integers(0, 5, (4, 64)).astype(np.uint16)
    assert recovered(bits.view(np.float16)).depth == 2
    recovered(bits)  # as bfloat16: multiples of 2**-133


def test_unneeded_scales_repeat_the_last() -> None:
    weights = published(np.full((2, 4, 16), 4), np.array([[0.1, 0.2, 0.4, 0.1], [0.4, 0.2, 0.2, 0.1]]), 2)
    matrix = recovered(weights)
    assert len(np.unique(matrix.codebook)) == 3
    assert (matrix.codebook[2:] == matrix.codebook[-1]).all()


def test_large_matrix_is_looked_through(monkeypatch: pytest.MonkeyPatch) -> None:
    # The sample has a tenth of the groups; the search for misfits finds the rest.
    monkeypatch.setattr(recover, "_SAMPLE", 64)
    monkeypatch.setattr(recover, "_MISFITS", 8)
    generator = np.random.default_rng(4)
    levels = generator.integers(-40, 41, (64, 12, 16)) // generator.integers(1, 9, (64, 12, 1))
    codebook = np.geomspace(0.01, 0.2, 27)
    recovered(published(levels.repeat(2, 0), codebook[generator.integers(0, 27, (64, 12))].repeat(2, 0), 4))


def test_threads_agree() -> None:
    case = random_case(1, 3)
    weights = produce(case.scales, case.trits, "scale * level / h", "float32")
    fits = [find_fit(weights, thread_pool=ThreadPool(threads)) for threads in (1, 3)]
    assert all(isinstance(fit, Fit) for fit in fits)
    first, second = (fit.encode(weights, ThreadPool(3)) for fit in fits if isinstance(fit, Fit))
    np.testing.assert_array_equal(first.codebook, second.codebook)
    np.testing.assert_array_equal(first.levels, second.levels)


def test_squares() -> None:
    case = random_case(0, 3)
    weights = produce(case.scales, case.trits, "scale * level / h", "float32")
    matrix = recovered(weights)
    decoded = naive.decode(matrix.levels, matrix.scale_indices, matrix.codebook, 3).astype(np.float64)
    assert matrix.squared_weights == pytest.approx(np.sum(weights.astype(np.float64) ** 2))
    assert matrix.squared_error == pytest.approx(np.sum((weights - decoded) ** 2))


# -- matrices without a fit


def some_scale_gives(weights: np.ndarray, depth: int) -> bool:
    """Try every scale that gives the largest of a few float16 numbers at some level."""
    h = naive.largest_level(depth)
    largest = float(np.abs(weights).max())
    for top in range(1, h + 1):
        low, high = (np.float32(largest * h / top * factor).view(np.uint32) for factor in (1 - 2**-10, 1 + 2**-10))
        scales = np.arange(low, high + 1, dtype=np.uint32).view(np.float32)
        steps = scales / np.float32(h)
        fits = np.ones(len(scales), bool)
        for weight in np.unique(np.abs(weights).astype(np.float64)):
            level = np.rint(weight / (largest / top)).astype(np.float32)
            fits &= (steps * level).astype(np.float16) == weight
        if fits.any():
            return True
    return False


@pytest.mark.parametrize("order", [order for order in ORDERS if order != "scale / h * level"])
def test_refused_groups_have_no_scale(order: str) -> None:
    generator = np.random.default_rng(5)
    answers = set()
    for _ in range(6):
        levels = generator.permutation(np.arange(16))[np.newaxis, np.newaxis] % 14
        scales = np.full((1, 1), generator.uniform(0.1, 1), np.float32)
        weights = produce(scales, trits_of(levels, 3), order, "float16")
        found = recover._find_fit_of_depth(MatrixRows.of(weights.reshape(1, 16)), HalfType.FLOAT16, 3, THREAD_POOL)
        assert isinstance(found, Fit) == some_scale_gives(weights, 3)
        answers.add(isinstance(found, Fit))
    assert False in answers


@pytest.mark.parametrize(("numerator", "fits"), [(1373, True), (1374, False), (1386, False), (1387, True)])
def test_ties(numerator: int, fits: bool) -> None:
    # 1374 / 2048 * 15 / 40 and * 25 / 40 lie halfway between halves; no float32 step rounds both ways as these do.
    levels = np.array([[[15, 25, *range(26, 40)]]])
    weights = published(np.repeat(levels, 4, axis=1), np.full((1, 4), numerator / 2048), 4, "scale * level / h")
    assert isinstance(find_fit(weights, thread_pool=THREAD_POOL), Fit) == some_scale_gives(weights, 4) == fits


@half_types
def test_weights_that_never_were_quantized(half: str) -> None:
    message = r"has a group of weights \(row \d, columns \d+ to \d+\) that no scale reproduces at depth 4"
    assert re.fullmatch(message, reason(as_halves(gaussian(), half)))


def test_more_than_27_scales() -> None:
    levels = np.random.default_rng(6).integers(-13, 14, (8, 4, 16))
    levels[..., 0], levels[..., 1] = 13, 12
    assert reason(published(levels, np.geomspace(0.01, 1, 32).reshape(8, 4), 3)) == "needs more than 27 scales"


def test_a_scale_for_each_row() -> None:
    # Other ternary models: at depth 4 each group allows forty scales, and the search finds no 27 for all.
    levels = np.random.default_rng(9).integers(-1, 2, (600, 4, 16))
    scales = np.random.default_rng(9).uniform(0.01, 0.02, (600, 1)).repeat(4, 1)
    assert "27" in reason(published(levels, scales, 1))


def test_deepest() -> None:
    weights = published(np.random.default_rng(7).integers(-13, 14, (8, 4, 16)), np.full((8, 4), 0.1), 3)
    assert isinstance(find_fit(weights, deepest=3, thread_pool=THREAD_POOL), Fit)
    refusal = find_fit(weights, deepest=2, thread_pool=THREAD_POOL)
    assert isinstance(refusal, NoFit)
    assert refusal.reason.endswith("at depth 2")


@half_types
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite(half: str, value: float) -> None:
    halves = np.zeros((40, 64), np.uint16)
    halves[17, 3] = np.float32(value).view(np.uint32) >> 16 if half == "bfloat16" else np.float16(value).view(np.uint16)
    weights = halves if half == "bfloat16" else halves.view(np.float16)
    assert reason(weights) == "has a weight that is NaN or infinite"


@half_types
def test_halves_that_are_stored_as_float32(half: str) -> None:
    generator = np.random.default_rng(9)
    codes, scales = generator.integers(-4, 5, (40, 8, 16)), generator.choice([0.1, 0.2, 0.3], (40, 8))
    halves = produce(scales.astype(np.float32), trits_of(codes, 2), "scale / h * level", "float32", half)
    wide = to_float32(halves)
    fit, same = find_fit(wide, thread_pool=THREAD_POOL), find_fit(halves, thread_pool=THREAD_POOL)
    assert isinstance(fit, Fit) and isinstance(same, Fit)
    np.testing.assert_array_equal(fit.codebook, same.codebook)
    np.testing.assert_array_equal(fit.encode(wide, THREAD_POOL).levels, same.encode(halves, THREAD_POOL).levels)
    wide[39, 127] = 0.1  # in the last group, so that the first rows are halves
    assert reason(wide) == "is stored as float32, and its numbers are no halves"
    with pytest.raises(ValueError, match="no halves"):
        fit.encode(wide, THREAD_POOL)


def test_other_types() -> None:
    assert reason(np.full((1, 64), 0.1, np.float32)) == "is stored as float32, and its numbers are no halves"
    assert reason(np.full((1, 64), np.nan, np.float32)) == "is stored as float32, and its numbers are no halves"
    assert reason(np.zeros((1, 64))) == "is stored as float64, and its numbers are no halves"


def test_another_matrix() -> None:
    weights = published(np.random.default_rng(8).integers(-4, 5, (4, 4, 16)), np.full((4, 4), 0.1), 2)
    fit = find_fit(weights, thread_pool=THREAD_POOL)
    assert isinstance(fit, Fit)
    with pytest.raises(ValueError, match="not the matrix"):
        fit.encode((weights * np.float16(1.5)).astype(np.float16), THREAD_POOL)


# -- the bounds themselves


@half_types
@given(data=st.data())
def test_first_scales(half: str, data: st.DataObject) -> None:
    depth = data.draw(st.sampled_from(DEPTHS))
    h = naive.largest_level(depth)
    half_type = HalfType.FLOAT16 if half == "float16" else HalfType.BFLOAT16
    bits = data.draw(st.integers(1, half_type.infinity))
    first = recover._first_scales(np.array([bits], np.uint16), half_type, h)[0]
    for level, (scale, offset) in itertools.product({1, (h + 1) // 2, h}, itertools.product([0], (-1, 0))):
        scale = int(first[level - 1]) + offset
        if scale > 0x7F7FFFFF:
            assert offset == 0
            continue
        with np.errstate(over="ignore"):
            weight = np.array([scale], np.uint32).view(np.float32) / np.float32(h) * np.float32(level)
            given_half = weight.astype(np.float16).view(np.uint16) if half == "float16" else half_type.round(weight)
        assert (given_half[0] >= bits) == (offset == 0)


@given(st.integers(0, (1 << 32) - 1))
def test_rounding_to_bfloat16(bits: int) -> None:
    value = np.array([bits], np.uint32).view(np.float32)
    if np.isfinite(value).all() and abs(value[0]) < 3.3e38:
        assert HalfType.BFLOAT16.round(value)[0] == bfloat16_bits(value)[0]
