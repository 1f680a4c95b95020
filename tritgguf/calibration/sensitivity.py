"""Measure the sensitivity of each matrix: the error of its block's output if only this matrix is quantized.

The error of a token's hidden state is relative to the size of this hidden state, because the next block normalizes it.
Where sensitivities are only compared with thresholds, the first tokens of each window decide about most matrices, and
the whole windows about those that are near a threshold then. `docs/quality.md` has measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from cpu_kernels.threads.thread_pool import ThreadPool
from tritgguf.formats.stacks import by_tensor
from tritgguf.quantization.scale_search import quantized_and_decoded
from tritgguf.reference.decoder_blocks import Block, DecoderBlocks
from tritgguf.reference.process_settings import bfloat16_matmul

if TYPE_CHECKING:
    from torch import Tensor

    from tritgguf.sources.source import Source

_FIRST_SHARE = 3 / 8  # of each window's tokens
_NEAR = 1.75  # times or a fraction of a threshold: what is near it on the first tokens is measured on all of them


def measure_sensitivities(
    source: Source,
    names: Collection[str],
    depths: Sequence[int],
    windows: Sequence[Sequence[int]],
    thread_pool: ThreadPool,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    thresholds: Collection[float] = (),
) -> dict[str, dict[int, float]]:
    """Return GGUF name -> depth -> mean relative squared error of the block's output.

    Args:
        source: the model; one decoder block of it is in memory at a time.
        names: the matrices to measure.
        depths: trits per weight to try.
        windows: token ids of some text, in windows of equal length.
        thread_pool: the threads to use; torch uses the same number.
        progress: called with the number of blocks done and their total.
        thresholds: what the errors will be compared with, if with nothing else. An error that is far from all of them
            is that of the windows' first tokens. Whether an error is below one threshold does not depend on the others.

    Raises:
        TritGgufError: torch or transformers is missing or cannot build the model.
        ValueError: a weight is NaN or infinite.

    """
    blocks = DecoderBlocks(source, threads=thread_pool.threads)
    hidden = blocks.embed(windows)
    sensitivities: dict[str, dict[int, float]] = {}
    for index in range(blocks.count):
        with blocks.block(index) as block, bfloat16_matmul():
            expected, importance = output_and_importance(block, hidden)
            for name, matrices in by_tensor(block.packed).items():
                if name in names:
                    sensitivities[name] = {}
                    for depth in depths:
                        with _quantized(block, matrices, depth, importance, thread_pool):
                            sensitivities[name][depth] = _output_error(block, hidden, expected, thresholds)
            hidden = expected
        progress(index + 1, blocks.count)
    return sensitivities


@contextmanager
def _quantized(
    block: Block, matrices: Sequence[str], depth: int, importance: Mapping[str, np.ndarray], thread_pool: ThreadPool
) -> Iterator[None]:
    """Quantize some matrices of an open block until the context ends."""
    for matrix in matrices:
        weights = block.get(matrix)
        block.set(matrix, quantized_and_decoded(weights, depth, thread_pool, importance=importance.get(matrix)))
    yield
    if len(matrices) == 1:
        block.set(matrices[0], weights)
    else:  # a copy of a stack would take much memory
        block.restore(matrices)


def _output_error(block: Block, hidden: Tensor, expected: Tensor, thresholds: Collection[float]) -> float:
    """Return the error of a block's output, as near to the truth as a comparison with thresholds needs it."""
    if not thresholds:
        return relative_error(block.forward(hidden), expected)
    tokens = max(1, round(_FIRST_SHARE * hidden.shape[1]))
    first = relative_error(block.forward(hidden[:, :tokens]), expected[:, :tokens])
    if not any(threshold / _NEAR <= first < threshold * _NEAR for threshold in thresholds):
        return first
    # Within these bounds, a threshold that is far from `first` is decided as if it were the only one.
    return min(max(relative_error(block.forward(hidden), expected), first / _NEAR), first * _NEAR)


def output_and_importance(block: Block, hidden: Tensor) -> tuple[Tensor, dict[str, np.ndarray]]:
    """Return a block's output, and name -> importance of a matrix's columns, float32 [columns]."""
    sums: dict[str, Tensor] = {}

    def add(name: str, inputs: Tensor) -> None:
        squares = inputs.flatten(0, -2).square().sum(0)
        sums[name] = sums[name] + squares if name in sums else squares

    output = block.forward(hidden, {name: partial(add, name) for name in block.packed})
    # An expert sees few of the tokens, but only ratios of its columns count.
    return output, {name: (total / hidden[..., 0].numel()).numpy() for name, total in sums.items()}


def relative_error(output: Tensor, expected: Tensor) -> float:
    """Return the mean over all tokens of the squared error divided by the squared norm of the hidden state."""
    errors = (output - expected).square().sum(-1) / expected.square().sum(-1).clamp_min(1e-30)
    return float(errors.double().mean())
