"""The experts of a prompt's tokens: routing, grouping by expert, and the products of each expert's tokens."""

from __future__ import annotations

import numpy as np

from cpu_kernels.threads.thread_pool import ThreadPool
from cpu_kernels.transformer.activations import swiglu_batch
from cpu_kernels.transformer.expert_stack import ExpertSlots
from cpu_kernels.transformer.experts import Experts
from cpu_kernels.transformer.experts_prompt import route_prompt, sum_experts_prompt
from cpu_kernels.transformer.gemv import HALVES
from cpu_kernels.transformer.projection import Batch
from tritgguf.runtime.expert_weights import ExpertWeights


class ExpertPass:
    """Runs the experts of prompts; its buffers grow to the largest chunk it has seen."""

    def __init__(self, experts: Experts, hidden: int, feed_forward: int, *, bits: int, exact: bool) -> None:
        """Keep what every chunk needs; `feed_forward` is that of an expert, the rest as in `PromptPass`."""
        self._experts, self._sizes = experts, (hidden, feed_forward)
        self._bits, self._exact = bits, exact
        self._make_buffers(0)

    def _make_buffers(self, slots: int) -> None:
        hidden, feed_forward = self._sizes
        self._hidden = Batch(slots, hidden, bits=self._bits)
        self._gate_up = np.zeros((slots, 2 * feed_forward), np.float32)
        self._gated = Batch(slots, feed_forward, bits=self._bits)
        self._outputs = np.zeros((slots, hidden), np.float32)

    def run(
        self, thread_pool: ThreadPool, index: int, layer: ExpertWeights, hidden: np.ndarray, activation: int,
        dense_out: np.ndarray, out: np.ndarray,
    ) -> None:  # fmt: skip
        """Run the experts of one layer.

        Args:
            thread_pool: the threads to use.
            index, layer: the layer's number, and its experts.
            hidden: float32 [tokens, hidden], the norm's output.
            activation: as in `swiglu`.
            dense_out: float32 [tokens, hidden], the shared expert's output; [0, hidden] for none.
            out: float32 [tokens, hidden], out: the weighted sums.

        """
        chosen, weights, scores = self._route(thread_pool, index, hidden)
        slots = ExpertSlots(chosen, layer.gate.experts)
        count = len(slots.tokens)
        if len(self._outputs) < count:
            self._make_buffers(ExpertSlots.most(len(hidden), chosen.shape[1], layer.gate.experts))
        inputs, gated = self._hidden.first(count), self._gated.first(count)
        gate_up, outputs = self._gate_up[:count], self._outputs[:count]
        slots.gather(hidden, inputs, thread_pool, keep=self._keeps(layer.gate.depth, layer.up.depth))
        layer.gate.multiply(slots, inputs, gate_up, 0, thread_pool, exact=self._exact)
        layer.up.multiply(slots, inputs, gate_up, layer.gate.rows, thread_pool, exact=self._exact)
        thread_pool.run(swiglu_batch, gate_up, activation, self._keeps(layer.down.depth), *gated.buffers)
        layer.down.multiply(slots, gated, outputs, 0, thread_pool, exact=self._exact)
        thread_pool.run(sum_experts_prompt, self._experts, outputs, slots.of_tokens, weights, scores, dense_out, out)

    def _route(
        self, thread_pool: ThreadPool, index: int, hidden: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return each token's experts, int64 [tokens, chosen], their weights, and all scores."""
        count, ranks = len(hidden), self._experts.routing.chosen
        chosen, weights = np.zeros((count, ranks), np.int64), np.zeros((count, ranks), np.float32)
        scores = np.zeros((count, self._experts.routers.shape[1]), np.float32)
        own_scores = np.zeros((thread_pool.threads, 2, self._experts.steps.shape[2]), np.float32)
        thread_pool.run(
            route_prompt, thread_pool.isa, self._experts, index, hidden, scores, own_scores, chosen, weights
        )
        return chosen, weights, scores

    def _keeps(self, *depths: int) -> bool:
        """Tell whether a batch needs its floats: for float16 matrices, and for exact products."""
        return self._exact or HALVES in depths
