"""Matrices in blocks of rows: results do not change, and memory does not grow with the matrix."""

from __future__ import annotations

import importlib
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_inputs import THREAD_POOL
from tiny_models import VARIANTS, write_tiny_model

from cpu_kernels.threads.thread_pool import ThreadPool
from tools.recovery.simulated_producer import produce
from tritgguf import convert
from tritgguf.formats import matrix_rows
from tritgguf.formats.dtypes import to_float32
from tritgguf.formats.matrix_rows import MatrixRows
from tritgguf.formats.trit_types import DEPTHS
from tritgguf.quantization.codebooks import kth_smallest
from tritgguf.quantization.quantized_matrix import QuantizedMatrix, QuantizedRows
from tritgguf.quantization.recover import Fit, find_fit
from tritgguf.quantization.scale_search import quantize_searched
from tritgguf.quantization.v2 import quantize_v2
from tritgguf.sources.open import open_source

MEGABYTE = 1 << 20


@contextmanager
def blocks_of(weights: int) -> Iterator[None]:
    """Read every matrix in blocks of about this many weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matrix_rows, "_MAX_WEIGHTS_IN_MEMORY", 0)
        patch.setattr(matrix_rows, "_WEIGHTS_PER_BLOCK", weights)
        yield


def lazily(weights: np.ndarray, multiple: int = 1) -> MatrixRows:
    """Return a matrix whose rows are read on demand."""
    rows, columns = weights.shape
    return MatrixRows((rows, columns), weights.dtype, lambda first, last: weights[first:last].copy(), multiple)


def joined(quantized: QuantizedRows) -> QuantizedMatrix:
    """Concatenate the parts of a quantized matrix."""
    parts = list(quantized.parts)
    return QuantizedMatrix(
        parts[0].depth,
        np.concatenate([part.levels for part in parts]),
        np.concatenate([part.scale_indices for part in parts]),
        quantized.codebook,
        sum(part.squared_error for part in parts),
        sum(part.squared_weights for part in parts),
    )


def assert_same(found: QuantizedMatrix, expected: QuantizedMatrix) -> None:
    np.testing.assert_array_equal(found.levels, expected.levels)
    np.testing.assert_array_equal(found.scale_indices, expected.scale_indices)
    np.testing.assert_array_equal(found.codebook, expected.codebook)
    assert found.squared_error == pytest.approx(expected.squared_error, rel=1e-6)  # partly sums in float32
    assert found.squared_weights == pytest.approx(expected.squared_weights, rel=1e-6)  # partly sums in float32


# -- the blocks


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 9),
    multiple=st.integers(1, 45),
    weights_at_once=st.integers(1, 100),
    seed=st.integers(0, 1000),
)
def test_blocks_are_the_rows_in_order(rows: int, columns: int, multiple: int, weights_at_once: int, seed: int) -> None:
    weights = np.arange(rows * columns, dtype=np.float32).reshape(rows, columns)
    asked: list[tuple[int, int]] = []

    def read(first: int, last: int) -> np.ndarray:
        asked.append((first, last))
        return weights[first:last]

    matrix = MatrixRows((rows, columns), weights.dtype, read, multiple)
    with blocks_of(weights_at_once):
        blocks = list(matrix.blocks())
        np.testing.assert_array_equal(np.concatenate(blocks), weights)
        assert all(block.size <= max(weights_at_once, columns) + (multiple - 1) * columns for block in blocks)
        assert all(first % multiple == 0 and (last % multiple == 0 or last == rows) for first, last in asked)
        wanted = np.sort(np.random.default_rng(seed).integers(0, rows, 5))
        parts = dict(matrix.blocks_containing(wanted))
        for row in wanted.tolist():
            first = row // multiple * multiple
            np.testing.assert_array_equal(parts[first][row - first], weights[row])


def test_what_can_be_held_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = np.zeros((8, 64), np.float32)
    reads: list[int] = []

    def read(first: int, last: int) -> np.ndarray:
        reads.append(first)
        return weights[first:last]

    matrix = MatrixRows(weights.shape, weights.dtype, read, 1)
    for size, is_held in ((weights.size, True), (weights.size - 1, False)):
        monkeypatch.setattr(matrix_rows, "_MAX_WEIGHTS_IN_MEMORY", size)
        monkeypatch.setattr(matrix_rows, "_WEIGHTS_PER_BLOCK", 64)
        held = matrix.held()
        reads.clear()
        assert len(list(held.blocks())) == (1 if is_held else 8)
        assert (reads == []) == is_held


def test_an_error_of_the_reader_arrives() -> None:
    def read(first: int, last: int) -> np.ndarray:
        if first:
            raise OSError("gone")
        return np.zeros((last, 64), np.float32)

    with blocks_of(64), pytest.raises(OSError, match="gone"):
        list(MatrixRows((3, 64), np.dtype(np.float32), read, 1).blocks())


# -- sources


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_of_a_folder(tmp_path: Path, variant: str) -> None:
    source = open_source(write_tiny_model(tmp_path / "model", variant))
    for tensor in source.tensors:
        rows = source.rows(tensor.name)
        expected = source.read(tensor.name)
        with blocks_of(1):
            blocks = list(rows.blocks())
        assert {block.dtype for block in blocks} == {rows.dtype}
        np.testing.assert_array_equal(to_float32(np.concatenate(blocks)).reshape(tensor.shape), expected)
        assert len(blocks) == -(-rows.shape[0] // rows.multiple)
        assert rows.shape[0] <= rows.multiple or len(blocks) > 1


# -- encoders


@pytest.mark.parametrize("quantize_rows", [quantize_v2, quantize_searched])
@given(
    rows=st.integers(1, 12),
    blocks=st.integers(1, 4),
    multiple=st.integers(1, 5),
    weights_at_once=st.integers(1, 1000),
    depth=st.sampled_from(DEPTHS),
    seed=st.integers(0, 1 << 30),
    kind=st.sampled_from(["float32", "float16", "bfloat16"]),
    zeros=st.sampled_from([0.0, 0.5, 0.97, 1.0]),
)
def test_quantized_in_blocks(
    quantize_rows: Callable[[MatrixRows, int, ThreadPool], QuantizedRows],
    rows: int,
    blocks: int,
    multiple: int,
    weights_at_once: int,
    depth: int,
    seed: int,
    kind: str,
    zeros: float,
) -> None:
    generator = np.random.default_rng(seed)
    weights = generator.standard_normal((rows, 64 * blocks)).astype(np.float32)
    weights[generator.random(weights.shape) < zeros] = 0
    if kind != "float32":
        weights = weights.astype(np.float16) if kind == "float16" else (weights.view(np.uint32) >> 16).astype(np.uint16)
    with blocks_of(weights_at_once):
        found = joined(quantize_rows(lazily(weights, multiple), depth, THREAD_POOL))
    assert_same(found, joined(quantize_rows(MatrixRows.of(weights), depth, THREAD_POOL)))


@pytest.mark.parametrize("row", [0, 5])
def test_damage_is_found_before_the_first_part(row: int) -> None:
    weights = np.ones((6, 64), np.float32)
    weights[row, 3] = np.inf
    with blocks_of(64), pytest.raises(ValueError, match="has a weight that is NaN or infinite"):
        quantize_v2(lazily(weights), 2, THREAD_POOL)


@given(seed=st.integers(0, 1 << 30), blocks=st.integers(1, 4), spread=st.sampled_from([0.0, 1e-3, 1.0, 10.0]))
def test_kth_smallest(seed: int, blocks: int, spread: float) -> None:
    generator = np.random.default_rng(seed)
    parts = [np.exp(spread * generator.standard_normal((3, 7))).astype(np.float32) for _ in range(blocks)]
    parts[0][generator.random((3, 7)) < 0.3] = 0
    ordered = np.sort(np.concatenate(parts), axis=None)
    ranks = {0, len(ordered) - 1, int(generator.integers(len(ordered)))}
    assert all(kth_smallest(parts, rank) == ordered[rank] for rank in ranks)


def dequantized(seed: int, rows: int, depth: int, half: str = "float16") -> np.ndarray:
    """Return a matrix of 128 columns that was quantized and dequantized."""
    generator = np.random.default_rng(seed)
    trits = generator.integers(-1, 2, (rows, 8, 16, depth)).astype(np.float64)
    codebook = generator.lognormal(-4, 1, 27).astype(np.float32)
    return produce(codebook[generator.integers(0, 27, (rows, 8))], trits, "scale * level / h", "float32", half)


@given(
    seed=st.integers(0, 1 << 30),
    rows=st.integers(1, 30),
    depth=st.sampled_from(DEPTHS),
    multiple=st.integers(1, 5),
    weights_at_once=st.integers(1, 2000),
    half=st.sampled_from(["float16", "bfloat16"]),
)
def test_recovered_in_blocks(seed: int, rows: int, depth: int, multiple: int, weights_at_once: int, half: str) -> None:
    weights = dequantized(seed, rows, depth, half)
    expected = find_fit(weights, thread_pool=THREAD_POOL)
    with blocks_of(weights_at_once):
        found = find_fit(lazily(weights, multiple), thread_pool=THREAD_POOL)
        assert isinstance(found, Fit) and isinstance(expected, Fit)
        recovered = joined(found.encode_rows(lazily(weights, multiple), THREAD_POOL))
    np.testing.assert_array_equal(found.codebook, expected.codebook)
    assert_same(recovered, expected.encode(weights, THREAD_POOL))


@pytest.mark.parametrize("row", [0, 700, 1999])
def test_a_group_that_the_sample_missed_is_found_in_its_block(row: int) -> None:
    weights = dequantized(0, 2000, 2)
    weights[row, 16:32] = 0.3
    weights[row, 16] = 0.3 * 0.25
    with blocks_of(10_000):
        found = find_fit(lazily(weights, 3), thread_pool=THREAD_POOL)
        assert isinstance(found, Fit)
        assert (joined(found.encode_rows(lazily(weights, 3), THREAD_POOL)).levels[row, 16:32] > 4).all()


# -- conversions


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("llama", {}),
        ("llama-tied", {"embedding_depth": 3}),
        ("llama-biases", {"depth": 4, "output_depth": 1}),
        ("qwen2", {"depth": 3}),
        ("mistral", {"depth": 1}),
    ],
)
@pytest.mark.parametrize("weights_at_once", [1, 5000])
def test_the_file_is_the_same(tmp_path: Path, variant: str, options: dict[str, Any], weights_at_once: int) -> None:
    model = write_tiny_model(tmp_path / "model", variant)
    expected = convert(model, tmp_path / "whole.gguf", **options)
    with blocks_of(weights_at_once):
        report = convert(model, tmp_path / "blocks.gguf", **options)
    assert (tmp_path / "blocks.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert report.relative_error == pytest.approx(expected.relative_error, rel=1e-6)


# -- memory


def peak_of(action: Callable[[], object]) -> int:
    """Return the peak bytes that Python and NumPy allocate during an action."""
    action()  # the first call compiles and fills caches, which do not count
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_of_quantizing() -> None:
    tile = np.random.default_rng(0).standard_normal((64, 4096)).astype(np.float16)
    matrix = MatrixRows((4096, 4096), tile.dtype, lambda first, last: np.resize(tile, (last - first, 4096)), 64)

    def encode() -> None:
        assert (
            sum(part.pack(THREAD_POOL).nbytes for part in quantize_v2(matrix, 2, THREAD_POOL).parts)
            == 4096 * 4096 * 28 / 64
        )

    with blocks_of(1 << 18):
        # The scales of the groups take 4 MB, a block 0.5 MB; the matrix would take 32 MB and its levels 16.
        assert 4 * MEGABYTE < peak_of(encode) < 10 * MEGABYTE


def test_memory_of_recovering() -> None:
    tile = np.tile(dequantized(0, 64, 2), (1, 32))
    matrix = MatrixRows((4096, 4096), tile.dtype, lambda first, last: np.resize(tile, (last - first, 4096)), 64)

    def recover() -> None:
        fit = find_fit(matrix, thread_pool=THREAD_POOL)
        assert isinstance(fit, Fit)
        assert sum(part.squared_error for part in fit.encode_rows(matrix, THREAD_POOL).parts) < 1

    with blocks_of(1 << 18):
        # A table of levels takes 1.8 MB; the matrix would take 32 MB and its levels 16.
        assert peak_of(recover) < 14 * MEGABYTE


@pytest.mark.parametrize("options", [{}, {"output_depth": 2, "embedding_depth": 4}])
def test_memory_of_converting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    model = write_tiny_model(tmp_path / "model", "llama", dtype="F32", intermediate_size=16384, num_hidden_layers=1)
    monkeypatch.setattr(importlib.import_module("tritgguf.conversion.pipeline"), "_UNWRITTEN_BYTES", 0)

    def run() -> None:
        convert(model, tmp_path / "out.gguf", overwrite=True, threads=1, **options)

    whole = peak_of(run)
    with blocks_of(1 << 16):
        blocks = peak_of(run)
    # If matrices were read as a whole, both peaks would be equal. The number of blocks in flight varies with timing.
    assert blocks < whole / 2
