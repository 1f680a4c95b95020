"""docs/reference_decoder.py, written from docs/format.md alone, against that document and the kernels."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_decoding import (
    CODEBOOKS,
    DEPTH_OF_TYPE_ID,
    DEPTHS,
    DOCS,
    WORDS_PER_BLOCK,
    assert_same_bits,
    decode,
    draw_bytes,
)

from cpu_kernels.packed_rows.pack import pack
from cpu_kernels.packed_rows.unpack import dequantize
from tritgguf.formats.gguf_file import GgufFile


def offset(depth: int) -> int:
    """Return h, the largest level."""
    return (3**depth - 1) // 2


def weights_of(levels: np.ndarray, indices: np.ndarray, codebook: np.ndarray, depth: int) -> np.ndarray:
    """Section 4, from level + h [rows, columns] and scale indices [rows, columns / 16]."""
    steps = codebook / np.float32(offset(depth))
    return steps[indices.repeat(16, axis=1)] * (levels.astype(np.float32) - np.float32(offset(depth)))


# -- the document's worked examples


@pytest.mark.parametrize("depth", DEPTHS)
def test_worked_example(depth: int) -> None:
    text = (DOCS / "format.md").read_text(encoding="utf-8")
    dump = re.search(rf"`TRIT{depth}`, (\d+) bytes:\n\n((?: {{4}}.*\n)+)", text)
    ends = re.search(rf"`TRIT{depth}`\s+(0x[0-9a-f]{{8}}), (0x[0-9a-f]{{8}})", text)
    assert dump is not None and ends is not None
    row = bytes.fromhex(dump[2])
    assert len(row) == int(dump[1]) == 2 * WORDS_PER_BLOCK[depth]

    columns, groups, entries = np.arange(64), np.arange(4), np.arange(27)
    levels = ((7 * columns + 3) % 3**depth).astype(np.uint8)[None]
    indices = ((5 * groups + 2) % 27).astype(np.uint8)[None]
    codebook = (entries + 1).astype(np.float32) / np.float32(64)
    weights = decode(row, 64, depth, codebook)
    assert_same_bits(weights, weights_of(levels, indices, codebook, depth))
    assert weights.view(np.uint32)[0, [0, -1]].tolist() == [int(bits, 16) for bits in ends.groups()]
    assert pack(levels, indices, depth).tobytes() == row


def test_decoder_checks_itself_against_all_worked_examples(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(DOCS / "reference_decoder.py"), run_name="__main__")
    assert re.findall(r"^TRIT\d", capsys.readouterr().out, re.MULTILINE) == [f"TRIT{d}" for d in DEPTHS]


# -- the kernels


@pytest.mark.parametrize("depth", DEPTHS)
@given(data=st.data(), rows=st.integers(1, 3), blocks=st.integers(1, 4), codebook=CODEBOOKS)
@settings(deadline=None)
def test_packed_levels_decode_alike(
    depth: int, data: st.DataObject, rows: int, blocks: int, codebook: np.ndarray
) -> None:
    levels = draw_bytes(data, rows, 64 * blocks) % np.uint8(3**depth)
    indices = draw_bytes(data, rows, 4 * blocks) % np.uint8(27)
    packed = pack(levels, indices, depth)
    with np.errstate(over="ignore"):  # a scale next to float32's limit
        weights = decode(packed, 64 * blocks, depth, codebook)
        assert_same_bits(weights, weights_of(levels, indices, codebook, depth))
    assert_same_bits(weights, dequantize(packed, codebook, depth))


@pytest.mark.parametrize("depth", DEPTHS)
@given(data=st.data(), rows=st.integers(1, 3), blocks=st.integers(1, 4), codebook=CODEBOOKS)
@settings(deadline=None)
def test_arbitrary_bytes_decode_alike(
    depth: int, data: st.DataObject, rows: int, blocks: int, codebook: np.ndarray
) -> None:
    packed = draw_bytes(data, rows, 2 * WORDS_PER_BLOCK[depth] * blocks)
    with np.errstate(over="ignore"):
        weights = decode(packed.tobytes(), 64 * blocks, depth, codebook)
    assert_same_bits(weights, dequantize(packed, codebook, depth))


@pytest.mark.parametrize("depth", DEPTHS)
def test_every_word_in_every_place_decodes_alike(depth: int) -> None:
    every_word = np.tile(np.arange(65536, dtype="<u2")[:, None], (1, WORDS_PER_BLOCK[depth]))
    packed = np.random.default_rng(depth).permuted(every_word, axis=0).view(np.uint8)
    codebook = np.linspace(0.01, 0.27, 27, dtype=np.float32)
    assert_same_bits(decode(packed, 64, depth, codebook), dequantize(packed, codebook, depth))


@pytest.mark.parametrize("depth", DEPTHS)
def test_each_matrix_of_a_stack_has_its_codebook(depth: int) -> None:
    generator = np.random.default_rng(depth)
    packed = generator.integers(0, 256, (3, 5, 4 * WORDS_PER_BLOCK[depth]), dtype=np.uint8)
    codebooks = generator.random((3, 27), np.float32)
    expected = [decode(rows.tobytes(), 128, depth, book) for rows, book in zip(packed, codebooks, strict=True)]
    assert_same_bits(decode(packed.tobytes(), 128, depth, codebooks.reshape(-1)), np.concatenate(expected))
    for scales in (26, 28, 0, 54):
        with pytest.raises(ValueError, match="27 scales for every matrix"):
            decode(packed.tobytes(), 128, depth, np.ones(scales, np.float32))


# -- a converted model


@pytest.mark.real_model
@pytest.mark.slow
@pytest.mark.parametrize("depth", DEPTHS)
def test_every_trit_tensor_of_a_model_decodes_alike(depth: int, trit_file: Callable[[int], Path]) -> None:
    file = GgufFile(trit_file(depth))
    trit_tensors = [info for info in file.tensors.values() if info.type_id in DEPTH_OF_TYPE_ID]
    assert trit_tensors
    assert depth in {DEPTH_OF_TYPE_ID[info.type_id] for info in trit_tensors}
    for info in trit_tensors:
        raw, codebook = file.raw(info.name), file.codebook(info.name)
        tensor_depth, (rows, columns) = DEPTH_OF_TYPE_ID[info.type_id], info.shape
        expected = dequantize(raw.reshape(rows, -1), codebook, tensor_depth)
        assert_same_bits(decode(raw, columns, tensor_depth, codebook), expected)
