"""Short convolutions beside plain NumPy: in chunks, several sequences at once, on any number of threads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inner_kernels import as_kernel
from pool_config import pool_config

from cpu_kernels.threads.thread_pool import ThreadPool
from cpu_kernels.transformer.kv_pages import PAGE, RECENT, KeyValues
from cpu_kernels.transformer.layer_options import ATTENTION, SHORT_CONVOLUTION
from cpu_kernels.transformer.short_convolution import convolve_layers, convolve_token, convolve_tokens, store_inputs
from tritgguf.runtime.kv_pool import KVPool

WIDTH, LAYER = 48, 1
TOKENS = PAGE + 50  # beyond a page


def random_inputs(taps: int, sequences: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Return a kernel, float32 [taps, width], and projections, float32 [sequences, tokens, 3 * width]."""
    generator = np.random.default_rng((taps, sequences))
    kernel = generator.standard_normal((taps, WIDTH)).astype(np.float32)
    return kernel, generator.standard_normal((sequences, TOKENS, 3 * WIDTH)).astype(np.float32)


def expected(kernel: np.ndarray, projected: np.ndarray) -> np.ndarray:
    """Return the outputs of one sequence: float64 [tokens, width]."""
    gate, output_gate, values = np.split(projected.astype(np.float64), 3, axis=1)
    inputs = np.concatenate([np.zeros((len(kernel) - 1, WIDTH)), gate * values])
    windows = np.lib.stride_tricks.sliding_window_view(inputs, len(kernel), axis=0)
    return output_gate * np.einsum("twk,kw->tw", windows, kernel[::-1].astype(np.float64))


def pages(taps: int, sequences: int) -> tuple[KVPool, KeyValues]:
    """Return pages for so many sequences of TOKENS positions, and what kernels take."""
    pool = KVPool(pool_config(2, hidden=WIDTH, taps=taps), pages=2 * sequences, sequences=sequences, context=TOKENS)
    for _ in range(sequences):
        pool.reserve(pool.allocate(), TOKENS)
    turns: Any = np.ones((1, 1, 1), np.float32)
    rotations: Any = type("Rotations", (), {"cosines": turns, "sines": turns})
    for storage in pool._storage.values():
        storage[:] = 0x7FC0  # what was not written is no number
    return pool, pool.key_values(rotations)


@pytest.mark.parametrize("taps", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("chunk", [1, 7, RECENT + 1, TOKENS])
def test_a_sequence_in_chunks(taps: int, chunk: int) -> None:
    kernel, (projected,) = random_inputs(taps)
    _pool, kv = pages(taps, 1)
    found, thread_pool = np.empty((TOKENS, WIDTH), np.float32), ThreadPool(2)
    for first in range(0, TOKENS, chunk):
        positions = np.arange(first, min(first + chunk, TOKENS))
        out = np.empty((len(positions), WIDTH), np.float32)
        thread_pool.run(
            convolve_tokens, kernel, kv, LAYER, projected[positions], np.zeros_like(positions), positions, out
        )
        found[positions] = out
    wanted = expected(kernel, projected)
    assert np.abs(found - wanted).max() < 1e-6 * np.abs(wanted).max()


@settings(max_examples=20, deadline=None)
@given(data=st.data(), threads=st.integers(1, 3))
def test_sequences_beside_one_another_have_the_bits_of_a_token_alone(data: st.DataObject, threads: int) -> None:
    """Chunks of three sequences in any order, and each of their tokens by the kernel of a single token."""
    kernel, projected = random_inputs(3, 3)
    (_one, together), (_other, alone) = pages(3, 3), pages(3, 3)
    thread_pool, single = ThreadPool(threads), as_kernel(convolve_token)
    lengths = [0, 0, 0]
    for _ in range(4):
        counts = [data.draw(st.integers(0, min(40, TOKENS - length))) for length in lengths]
        sequences = np.repeat(np.arange(3), counts)
        starts = zip(lengths, counts, strict=True)
        positions = np.concatenate([np.arange(start, start + count) for start, count in starts])
        out = np.empty((len(positions), WIDTH), np.float32)
        batch = np.ascontiguousarray(projected[sequences, positions])
        thread_pool.run(convolve_tokens, kernel, together, LAYER, batch, sequences, positions, out)
        for row, sequence, position, found in zip(batch, sequences, positions, out, strict=True):
            own = np.empty(WIDTH, np.float32)
            single(kernel, alone, LAYER, row, sequence, position, own, 0, WIDTH)
            as_kernel(store_inputs)(alone, LAYER, row, sequence, position, 0, WIDTH)
            np.testing.assert_array_equal(found, own)
        lengths = [length + count for length, count in zip(lengths, counts, strict=True)]


def test_all_layers_of_a_token() -> None:
    """What `bench` measures: the layers without attention alone."""
    kernel, (projected,) = random_inputs(3)
    _pool, kv = pages(3, 1)
    kernels = np.stack([np.full_like(kernel, np.nan), kernel])
    out = np.empty(WIDTH, np.float32)
    kinds = np.array([ATTENTION, SHORT_CONVOLUTION])
    ThreadPool(2).run(convolve_layers, kernels, kinds, kv, projected[0], 0, out)
    np.testing.assert_allclose(out, expected(kernel, projected[:1])[0], rtol=1e-5)
