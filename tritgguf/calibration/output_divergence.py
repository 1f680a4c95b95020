"""The divergence of predictions between hidden states, without the logits of a whole text in memory.

The logits are computed for a block of tokens of the vocabulary at a time. With logits z of the reference, its
probabilities p and logits z + d of another model, KL = log(1 + sum p (exp(d) - 1)) - sum p d. The sums can be continued
block by block, and small divergences are no differences of large numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cpu_kernels.threads.thread_pool import ThreadPool
from tritgguf.calibration.output_head import final_norm, head_importance, head_name, logit_function
from tritgguf.formats.dtypes import to_float32
from tritgguf.quantization.scale_search import quantized_and_decoded
from tritgguf.reference.process_settings import torch_threads

if TYPE_CHECKING:
    from torch import Tensor

    from tritgguf.sources.source import Source

_LARGEST_DIFFERENCE = 80.0  # of logits: its exponential is still a float32 number
_SMALL_GROWTH = 0.1  # of the sum of exponentials: below it, the logarithm of the sum itself has lost digits


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
                heads[depth] = torch.from_numpy(quantized_and_decoded(rows, depth, thread_pool, importance=importance))
            expected = finish(reference @ heads[0].T)
            for (hidden, depth), running in zip(states, sums, strict=True):
                running.add(expected, finish(hidden @ heads[depth].T))
        source.release(name)
        return [running.mean() for running in sums]


class _RunningDivergence:
    """The divergence of one model's predictions from the reference's, over blocks of logits."""

    def __init__(self, positions: int) -> None:
        # Sums over the vocabulary: of exp z, exp z expm1(d) and exp z d, and of exp(z + d).
        self._reference, self._own = _ScaledSums(3, positions), _ScaledSums(1, positions)

    def add(self, expected: Tensor, logits: Tensor) -> None:
        """Add the reference's logits z and the model's z + d, float32 [positions, tokens]."""
        difference = logits - expected
        self._reference.add(expected, difference.clamp(max=_LARGEST_DIFFERENCE).expm1(), difference)
        self._own.add(logits)

    def mean(self) -> float:
        """Return the mean divergence of the positions."""
        total, growth, difference = self._reference.sums
        with np.errstate(divide="ignore", invalid="ignore"):
            small = np.log1p(growth / total)
        large = self._own.logarithm() - self._reference.logarithm()
        ratios = np.where(np.abs(growth / total) < _SMALL_GROWTH, small, large)
        return float(np.maximum(ratios - difference / total, 0.0).mean())


class _ScaledSums:
    """Sums of exponentials of logits, times several factors of which the first is 1, without overflow."""

    def __init__(self, count: int, positions: int) -> None:
        self._largest = np.full(positions, -np.inf)
        self.sums = np.zeros((count, positions))
        """Each divided by the exponential of the largest logit so far."""

    def add(self, logits: Tensor, *factors: Tensor) -> None:
        """Add logits and the further factors of their exponentials, float32 [positions, tokens]."""
        block_largest = logits.amax(-1)
        exponentials = (logits - block_largest[:, None]).exp_()
        terms = [exponentials, *(exponentials * factor for factor in factors)]
        block_sums = np.stack([term.sum(-1).double().numpy() for term in terms])
        largest = np.maximum(self._largest, block_largest.double().numpy())
        old, new = np.exp(self._largest - largest), np.exp(block_largest.double().numpy() - largest)
        self.sums, self._largest = self.sums * old + block_sums * new, largest

    def logarithm(self) -> np.ndarray:
        """Return the logarithm of the sum of the exponentials, float64 [positions]."""
        return self._largest + np.log(self.sums[0])
