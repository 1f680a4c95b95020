"""Validation of packed words and of float weights."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_inputs import random_levels

from cpu_kernels.packed_rows.check_words import first_damaged_row, first_not_finite
from cpu_kernels.packed_rows.pack import pack
from cpu_kernels.packed_rows.unpack import unpack
from tritgguf.formats.trit_types import DEPTHS

depths = pytest.mark.parametrize("depth", DEPTHS)


@depths
@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_packed_rows_are_valid(depth: int, rows: int, blocks: int, seed: int) -> None:
    packed = pack(*random_levels(depth, rows, 64 * blocks, seed), depth)
    assert first_damaged_row(packed.view(np.uint16), depth) == -1


@depths
@given(rows=st.integers(1, 4), blocks=st.integers(1, 5), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_a_word_is_damaged_if_packing_it_again_changes_it(
    depth: int, rows: int, blocks: int, seed: int, data: st.DataObject
) -> None:
    packed = pack(*random_levels(depth, rows, 64 * blocks, seed), depth)
    words = packed.view(np.uint16)
    row, column = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, words.shape[1] - 1))
    words[row, column] = data.draw(st.integers(0, 65535))
    again = pack(*unpack(packed, depth), depth)
    expected = -1 if np.array_equal(again, packed) else row
    assert first_damaged_row(words, depth) == expected


def test_every_code_has_one_word() -> None:
    codes = {-(-code * 65536 // 3**10) for code in range(3**10)}
    words = np.zeros((65536, 14), np.uint16)
    words[:, 0] = np.arange(65536)
    for word in range(65536):
        assert (first_damaged_row(words[word : word + 1], 2) == -1) == (word in codes)


@pytest.mark.parametrize(("dtype", "bits", "exponent"), [("f2", "u2", 0x7C00), ("f4", "u4", 0x7F800000)])
@given(size=st.integers(1, 3000), data=st.data())
def test_first_not_finite(dtype: str, bits: str, exponent: int, size: int, data: st.DataObject) -> None:
    weights = np.random.default_rng(size).standard_normal(size).astype(dtype)
    weights[::7] = np.finfo(dtype).max
    assert first_not_finite(weights.view(bits), exponent) == -1
    index = data.draw(st.integers(0, size - 1))
    weights[index :: data.draw(st.integers(1, 500))] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf, -np.nan]))
    assert first_not_finite(weights.view(bits), exponent) == index
