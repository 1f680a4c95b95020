"""Packing and unpacking against the format's specification, and bit-exact dequantization."""

from __future__ import annotations

import re
from pathlib import Path

import naive
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_inputs import CODEBOOK, random_levels

from cpu_kernels.packed_rows.layout import WORDS_PER_BLOCK, level_offset
from cpu_kernels.packed_rows.pack import pack
from cpu_kernels.packed_rows.unpack import dequantize, unpack
from tritgguf.formats.trit_types import DEPTHS, row_bytes

depths = pytest.mark.parametrize("depth", DEPTHS)
FORMAT = Path(__file__).parents[3] / "docs" / "format.md"


def worked_example(depth: int) -> bytes:
    """Return the row that section 6 of the format prints for a depth."""
    listing = re.search(rf"`TRIT{depth}`, \d+ bytes:\n\n((?: +[0-9a-f ]+\n)+)", FORMAT.read_text("utf-8"))
    assert listing is not None
    return bytes.fromhex(listing[1])


@depths
def test_worked_example_of_the_format(depth: int) -> None:
    levels = [(7 * k + 3) % 3**depth for k in range(64)]
    indices = [(5 * g + 2) % 27 for g in range(4)]
    expected = worked_example(depth)
    assert len(expected) == row_bytes(depth, 64)
    assert naive.pack_row(levels, indices, depth) == expected
    packed = pack(np.array([levels], np.uint8), np.array([indices], np.uint8), depth)
    assert packed.tobytes() == expected


@depths
@given(st.integers(1, 40), st.integers(1, 24), st.integers(0, 2**32 - 1))
def test_round_trip(depth: int, rows: int, blocks: int, seed: int) -> None:
    levels, indices = random_levels(depth, rows, 64 * blocks, seed)
    packed = pack(levels, indices, depth)
    assert packed.shape == (rows, row_bytes(depth, 64 * blocks))
    assert packed.dtype == np.uint8
    for unpacked, original in zip(unpack(packed, depth), (levels, indices), strict=True):
        assert unpacked.dtype == np.uint8
        np.testing.assert_array_equal(unpacked, original)


@depths
@pytest.mark.parametrize("extreme", ["lowest", "highest"])
def test_round_trip_of_extreme_values(depth: int, extreme: str) -> None:
    high = extreme == "highest"
    levels = np.full((2, 128), (3**depth - 1) * high, np.uint8)
    indices = np.full((2, 8), 26 * high, np.uint8)
    unpacked = unpack(pack(levels, indices, depth), depth)
    np.testing.assert_array_equal(unpacked[0], levels)
    np.testing.assert_array_equal(unpacked[1], indices)


@depths
@pytest.mark.parametrize("blocks", [1, 2, 3, 9])
def test_packing_equals_the_formats_words(depth: int, blocks: int) -> None:
    levels, indices = random_levels(depth, 3, 64 * blocks)
    packed = pack(levels, indices, depth)
    for row in range(3):
        assert packed[row].tobytes() == naive.pack_row(levels[row].tolist(), indices[row].tolist(), depth)


@depths
@given(st.data())
def test_any_bytes_unpack_within_range(depth: int, data: st.DataObject) -> None:
    blocks = data.draw(st.integers(1, 4))
    size = row_bytes(depth, 64 * blocks)
    row = data.draw(st.one_of(st.binary(min_size=size, max_size=size), st.just(b"\xff" * size)))
    levels, indices = unpack(np.frombuffer(row, np.uint8).reshape(1, -1), depth)
    assert levels.shape == (1, 64 * blocks)
    assert indices.shape == (1, 4 * blocks)
    assert levels.max() < 3**depth
    assert indices.max() < 27
    expected = naive.unpack_row(row, depth, 4 * blocks)
    np.testing.assert_array_equal(levels[0], expected[0])
    np.testing.assert_array_equal(indices[0], expected[1])


@depths
def test_rows_stand_alone(depth: int) -> None:
    levels, indices = random_levels(depth, 5, 192)
    packed = pack(levels, indices, depth)
    np.testing.assert_array_equal(pack(levels[3:4], indices[3:4], depth), packed[3:4])
    np.testing.assert_array_equal(unpack(packed[3:4], depth)[0], levels[3:4])


@depths
def test_every_code_of_a_word_survives(depth: int) -> None:
    # The first word of a group has ten trits: some levels, then for some depths a part of another weight.
    digits = {1: 8, 2: 5, 3: 3, 4: 2}[depth]
    codes = np.arange((3**depth) ** digits)
    levels = np.zeros((len(codes), 64), np.uint8)
    for digit in range(digits):
        levels[:, digit] = codes // (3**depth) ** (digits - 1 - digit) % 3**depth
    unpacked, _ = unpack(pack(levels, np.zeros((len(codes), 4), np.uint8), depth), depth)
    np.testing.assert_array_equal(unpacked, levels)


@depths
def test_decoding_rounds_as_the_format_says(depth: int) -> None:
    levels, indices = random_levels(depth, 7, 320)
    packed = pack(levels, indices, depth)
    weights = dequantize(packed, CODEBOOK, depth)
    assert weights.dtype == np.float32
    expected = naive.decode(levels, indices, CODEBOOK, depth)
    np.testing.assert_array_equal(weights.view(np.uint32), expected.view(np.uint32))
    # Multiplying by 1 / h, which is exact only for 1 and 4, differs in the last bit somewhere.
    if depth > 2:
        other = (CODEBOOK * (np.float32(1) / np.float32(level_offset(depth))))[indices]
        levels_less_h = levels.astype(np.float32) - level_offset(depth)
        assert (np.repeat(other, 16, axis=1) * levels_less_h != weights).any()


@depths
def test_levels_of_zero_decode_to_zero(depth: int) -> None:
    levels = np.full((1, 64), level_offset(depth), np.uint8)
    weights = dequantize(pack(levels, np.full((1, 4), 26, np.uint8), depth), CODEBOOK, depth)
    np.testing.assert_array_equal(weights, np.zeros((1, 64)))


@depths
def test_sizes_are_the_blocks(depth: int) -> None:
    assert 2 * WORDS_PER_BLOCK[depth] == row_bytes(depth, 64)
    assert len(naive.row_layout(depth, 4)) == WORDS_PER_BLOCK[depth]
    for word in naive.row_layout(depth, 8):
        assert np.prod([radix for radix, *_ in word]) == 3**10
