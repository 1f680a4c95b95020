"""The divergence of predictions between hidden states, without the logits of a whole text in memory.

The logits are computed for a block of tokens of the vocabulary at a time. With logits z of the reference and y of
another model, KL = sum p (z - y) - log sum exp z + log sum exp y, and all three sums can be continued block by block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cpu_kernels.threads.thread_pool import ThreadPool
from tritgguf.calibration.output_head import final_norm, head_importance, head_name, logit_function
from tritgguf.formats.dtypes import to_float32
from tritgguf.formats.matrix_rows import MatrixRows
from tritgguf.quantization.scale_search import quantize_searched
from tritgguf.reference.process_settings import torch_threads

if TYPE_CHECKING:
    from torch import Tensor

    from tritgguf.sources.source import Source


def output_divergences(
    source: Source, original: Tensor, candidates: Sequence[tuple[Tensor, int]], thread_pool: ThreadPool
) -> list[float]:
    """Return the mean divergence, in nats, of the predictions of each candidate from the original's.

    Args:
        source: the model.
        original: the last block's output, float32 [windows, tokens, width].
        candidates: the same of another model, and the depth of its output head, 0 for the original head.
        thread_pool: the threads to use; torch uses the same number.

    """
    import torch

    with torch_threads(thread_pool.threads), torch.inference_mode():
        normalize, finish = final_norm(source), logit_function(source)
        reference = normalize(original)
        states = [(normalize(hidden), depth) for hidden, depth in candidates]
        importance = head_importance(source, original)
        positions = len(reference)
        sums = [_RunningDivergence(positions) for _ in states]
        name = head_name(source)
        for block in source.rows(name).blocks():
            rows = to_float32(block)
            heads = {0: torch.from_numpy(rows)}
            for depth in {depth for _, depth in states} - {0}:
                quantized = quantize_searched(MatrixRows.of(rows), depth, thread_pool, importance=importance)
                heads[depth] = torch.from_numpy(np.concatenate([part.decoded() for part in quantized.parts]))
            expected = finish(reference @ heads[0].T)
            for (hidden, depth), running in zip(states, sums, strict=True):
                running.add(expected, finish(hidden @ heads[depth].T))
        source.release(name)
        return [running.mean() for running in sums]


class _LogSum:
    """The logarithm of a sum of exponentials, and a sum weighted with these, over blocks of logits."""

    def __init__(self, positions: int) -> None:
        self.largest = np.full(positions, -np.inf)
        self.total = np.zeros(positions)
        self.weighted = np.zeros(positions)

    def add(self, logits: Tensor, values: Tensor | None = None) -> None:
        """Add logits and the values that they weight, both float32 [positions, tokens]."""
        block_largest = logits.amax(-1)
        exponentials = (logits - block_largest[:, None]).exp_()
        largest = np.maximum(self.largest, block_largest.double().numpy())
        old, new = np.exp(self.largest - largest), np.exp(block_largest.double().numpy() - largest)
        self.total = self.total * old + exponentials.sum(-1).double().numpy() * new
        if values is not None:
            self.weighted = self.weighted * old + (exponentials * values).sum(-1).double().numpy() * new
        self.largest = largest

    @property
    def log(self) -> np.ndarray:
        """The logarithm of the sum of the exponentials, float64 [positions]."""
        return self.largest + np.log(self.total)


class _RunningDivergence:
    """The divergence of one model's predictions from the reference's, over blocks of logits."""

    def __init__(self, positions: int) -> None:
        self._reference, self._own = _LogSum(positions), _LogSum(positions)

    def add(self, expected: Tensor, logits: Tensor) -> None:
        """Add the reference's logits and the model's, float32 [positions, tokens]."""
        self._reference.add(expected, expected - logits)
        self._own.add(logits)

    def mean(self) -> float:
        """Return the mean divergence of the positions."""
        reference = self._reference
        divergences = reference.weighted / reference.total - reference.log + self._own.log
        return float(np.maximum(divergences, 0.0).mean())
