"""Measure what the depth of each matrix costs: the divergence of the model's predictions if only it is quantized.

Running the model once per matrix and depth would take hours. Three measurements together need about as long as twenty
runs, and one decoder block in memory:

1. for each matrix of a block, the error of the block's output if only it is quantized (`sensitivity`);
2. for each block, the divergence of the predictions if all its matrices are quantized. It is divided among them by 1,
   because errors of the output add up;
3. for other depths of a matrix, its error of the weights, weighted by the importance of the columns.

A stack of experts is one matrix here, because it has one depth; 3 is measured on some of its experts. Embeddings and
output head are quantized alone, at each depth. `docs/quality.md` has measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from cpu_kernels.threads.thread_pool import ThreadPool
from tritgguf.architectures.tensor_names import EMBEDDINGS, HEAD
from tritgguf.calibration.output_divergence import output_divergences
from tritgguf.calibration.output_head import head_name
from tritgguf.calibration.sensitivity import output_and_importance, relative_error
from tritgguf.formats.matrix_rows import MatrixRows
from tritgguf.formats.stacks import by_tensor
from tritgguf.quantization.quantized_matrix import QuantizedMatrix
from tritgguf.quantization.scale_search import quantize_searched, quantized_and_decoded
from tritgguf.reference.decoder_blocks import Block, DecoderBlocks

if TYPE_CHECKING:
    from torch import Tensor

    from tritgguf.sources.source import Source

PROBED_DEPTH = 2  # at which 1 and 2 are measured
_PREDICTED_WINDOWS, _PREDICTED_TOKENS = 2, 256  # of which 2 measures the predictions
_SAMPLED_EXPERTS = 8  # of a stack, on which 3 is measured


def measure_divergence_costs(
    source: Source,
    names: Collection[str],
    depths: Sequence[int],
    windows: Sequence[Sequence[int]],
    thread_pool: ThreadPool,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, dict[int, float]]:
    """Return GGUF name -> depth -> divergence in nats that quantizing this matrix alone is estimated to cause.

    Args:
        source: the model; one decoder block of it is in memory at a time, and blocks of rows of the head.
        names: the matrices to measure: the layers', the embeddings and the output head.
        depths: trits per weight.
        windows: token ids of some text, in windows of equal length.
        thread_pool: the threads to use; torch uses the same number.
        progress: called with the number of blocks done and their total.

    Raises:
        TritGgufError: torch or transformers is missing or cannot build the model.
        ValueError: a weight is NaN or infinite.

    """
    blocks = DecoderBlocks(source, threads=thread_pool.threads)
    hidden = blocks.embed(windows)
    predicted = [window[:_PREDICTED_TOKENS] for window in windows[:_PREDICTED_WINDOWS]]
    original = blocks.embed(predicted)
    tied = head_name(source) == EMBEDDINGS
    copies: list[_Copy] = []
    for depth in depths if EMBEDDINGS in names else ():
        embedded = blocks.embed(predicted, partial(quantized_and_decoded, depth=depth, thread_pool=thread_pool))
        copies.append(_Copy(embedded, depth if tied else 0, {EMBEDDINGS: {depth: 1.0}}))
    for index in range(blocks.count):
        with blocks.block(index) as block:
            before, original = original, block.forward(original)
            _forward_all(block, copies)
            hidden, shares = _measure_block(block, names, depths, hidden, thread_pool)
            copies.append(_Copy(block.forward(before), 0, shares))
        progress(index + 1, blocks.count)
    for depth in depths if HEAD in names else ():
        copies.append(_Copy(original, depth, {HEAD: {depth: 1.0}}))
    found = output_divergences(source, original, [(copy.hidden, copy.head_depth) for copy in copies], thread_pool)
    costs: dict[str, dict[int, float]] = {}
    for copy, nats in zip(copies, found, strict=True):
        for name, of_depths in copy.shares.items():
            costs.setdefault(name, {}).update({depth: nats * share for depth, share in of_depths.items()})
    return costs


@dataclass
class _Copy:
    """The model with something quantized.

    Attributes:
        hidden: its hidden states so far, float32 [windows, tokens, width].
        head_depth: depth of its output head, 0 for the original one.
        shares: GGUF name -> depth -> share of the copy's divergence that the matrix causes at this depth.

    """

    hidden: Tensor
    head_depth: int
    shares: dict[str, dict[int, float]]


def _forward_all(block: Block, copies: Sequence[_Copy]) -> None:
    """Send the hidden states of all copies through an open block, together."""
    import torch

    if copies:
        outputs = block.forward(torch.cat([copy.hidden for copy in copies])).split(len(copies[0].hidden))
        for copy, output in zip(copies, outputs, strict=True):
            copy.hidden = output


def _measure_block(
    block: Block, names: Collection[str], depths: Sequence[int], hidden: Tensor, thread_pool: ThreadPool
) -> tuple[Tensor, dict[str, dict[int, float]]]:
    """Return a block's output and the shares of those named, and leave these quantized at `PROBED_DEPTH`.

    Quantized matrices are kept as levels, in a quarter of the memory of weights.
    """
    expected, importance = output_and_importance(block, hidden)
    errors: dict[str, float] = {}
    ratios: dict[str, dict[int, float]] = {}
    probed: dict[str, QuantizedMatrix] = {}
    for name, matrices in by_tensor(block.packed).items():
        if name not in names:
            continue
        for matrix in matrices:
            probed[matrix] = _quantized(block.get(matrix), PROBED_DEPTH, importance.get(matrix), thread_pool)
        some = _sample([matrix for matrix in matrices if matrix in importance])
        seen = {matrix: importance[matrix] for matrix in some}
        ratios[name] = _error_ratios(block, seen, probed, depths, thread_pool)
        _set_all(block, matrices, probed)
        errors[name] = relative_error(block.forward(hidden), expected)
        block.restore(matrices)
    _set_all(block, probed, probed)
    total = sum(errors.values()) or 1.0
    return expected, {
        name: {depth: errors[name] / total * ratio for depth, ratio in ratios[name].items()} for name in errors
    }


def _set_all(block: Block, names: Iterable[str], quantized: Mapping[str, QuantizedMatrix]) -> None:
    """Replace weights of the block by quantized ones."""
    for name in names:
        block.set(name, quantized[name].decoded())


def _quantized(
    weights: np.ndarray, depth: int, importance: np.ndarray | None, thread_pool: ThreadPool
) -> QuantizedMatrix:
    """Return a matrix, float32 [rows, columns], quantized with the best scales for its inputs, if there are any."""
    (quantized,) = quantize_searched(MatrixRows.of(weights), depth, thread_pool, importance=importance).parts
    return quantized


def _error_ratios(
    block: Block,
    importance: Mapping[str, np.ndarray],
    probed: Mapping[str, QuantizedMatrix],
    depths: Sequence[int],
    thread_pool: ThreadPool,
) -> dict[int, float]:
    """Return depth -> error of the products of the matrices with this importance, over that of the probed ones."""
    squares = dict.fromkeys({*depths, PROBED_DEPTH}, 0.0)
    for name, of_columns in importance.items():
        weights = block.get(name)
        for depth in squares:
            known = probed[name] if depth == PROBED_DEPTH else _quantized(weights, depth, of_columns, thread_pool)
            error = known.decoded() - weights
            squares[depth] += float((np.square(error) @ of_columns).sum(dtype=np.float64))
    return {depth: squares[depth] / (squares[PROBED_DEPTH] or 1.0) for depth in depths}


def _sample(names: Sequence[str]) -> list[str]:
    """Return at most `_SAMPLED_EXPERTS` of the names, evenly spaced."""
    indices = np.linspace(0, len(names) - 1, min(len(names), _SAMPLED_EXPERTS)).round().astype(int)
    return [names[index] for index in indices]
