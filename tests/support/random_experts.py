"""Random experts for the kernels, with their weights in float64, and what they compute in plain NumPy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from random_inputs import CODEBOOK, half_matrix, trit_matrix

from cpu_kernels.transformer.expert_stack import ExpertStack
from cpu_kernels.transformer.experts import Experts
from cpu_kernels.transformer.router import Routing

HIDDEN, FEED_FORWARD = 192, 128


@dataclass(frozen=True)
class RandomExperts:
    """One layer's gate, up and down: stacks, weights, float64 [experts, rows, columns], and the kernels' view."""

    stacks: tuple[ExpertStack, ExpertStack, ExpertStack]
    weights: list[np.ndarray]
    experts: Experts

    def expected(self, x: np.ndarray) -> np.ndarray:
        """Return the weighted sums for float32 [tokens, hidden]: float64 [tokens, hidden]."""
        experts = len(self.weights[0])
        scores = x.astype(np.float64) @ self.experts.routers[0].T
        powers = np.exp(scores[:, :experts] - scores[:, :experts].max(axis=1, keepdims=True))
        shares = powers / powers.sum(axis=1, keepdims=True)
        out = np.zeros(x.shape)
        biases = [np.zeros(1) if not len(s.biases) else s.biases for s in self.stacks]
        for t, row in enumerate(x.astype(np.float64)):
            chosen = np.argsort(-shares[t])[: self.experts.routing.chosen]
            for expert in chosen:
                bias = [b[expert] if b.ndim == 2 else 0.0 for b in biases]
                gate = self.weights[0][expert] @ row + bias[0]
                up = self.weights[1][expert] @ row + bias[1]
                result = self.weights[2][expert] @ (gate / (1 + np.exp(-gate)) * up) + bias[2]
                out[t] += shares[t, expert] / shares[t, chosen].sum() * result
        return out


def random_stack(
    experts: int, depth: int, rows: int, columns: int, seed: int, *, biased: bool = False
) -> tuple[ExpertStack, np.ndarray]:
    """Return a stack whose experts have different codebooks, and its weights, float64 [experts, rows, columns]."""
    scales = (1 + np.arange(experts) / experts) * columns**-0.5
    parts, weights = [], []
    for expert in range(experts):
        own = 100 * seed + expert
        matrix, exact = trit_matrix(depth, rows, columns, own) if depth else half_matrix(rows, columns, own)
        parts.append(matrix.data)
        weights.append(exact)
    codebooks = np.zeros((experts, 0), np.float32)
    if depth:
        codebooks = (CODEBOOK * scales[:, np.newaxis]).astype(np.float32)
        weights = [exact * scale for exact, scale in zip(weights, scales, strict=True)]
    generator = np.random.default_rng(seed)
    biases = generator.standard_normal((experts, rows)).astype(np.float32) if biased else np.zeros((0, 0), np.float32)
    return ExpertStack(np.concatenate(parts), experts, rows, columns, depth, codebooks, biases), np.stack(weights)


def random_experts(
    routing: Routing, experts: int, depths: tuple[int, int, int] = (2, 2, 2), *, biased: bool = False, seed: int = 0
) -> RandomExperts:
    """Return the experts of a layer; `depths` are those of gate, up and down."""
    shapes = [(FEED_FORWARD, HIDDEN), (FEED_FORWARD, HIDDEN), (HIDDEN, FEED_FORWARD)]
    made = [
        random_stack(experts, depth, *shape, seed=seed + kind, biased=biased)
        for kind, (depth, shape) in enumerate(zip(depths, shapes, strict=True))
    ]
    stacks = tuple(stack for stack, _ in made)
    router = np.random.default_rng(seed).standard_normal((experts, HIDDEN)).astype(np.float32) / np.float32(HIDDEN)
    view = Experts(
        routing=routing,
        dense_layers=0,
        routers=router[np.newaxis],
        router_biases=np.zeros((1, 0), np.float32),
        selection_biases=np.zeros((1, 0), np.float32),
        addresses=np.array([[stack.data.ctypes.data for stack in stacks]], np.int64),
        expert_bytes=np.array([[stack.expert_bytes for stack in stacks]], np.int64),
        depths=np.array([[stack.depth for stack in stacks]], np.int64),
        steps=np.stack([stack.steps for stack in stacks])[np.newaxis],
        gate_biases=stacks[0].biases[np.newaxis],
        up_biases=stacks[1].biases[np.newaxis],
        down_biases=stacks[2].biases[np.newaxis],
        reads_ahead=False,
    )
    return RandomExperts(stacks, [weights for _, weights in made], view)  # type: ignore[arg-type]
