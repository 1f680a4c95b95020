"""The router of a mixture of experts: which experts a token goes to, and with which weights; all float32.

Scores are products in a fixed order, so a token's choice is the same alone, in a batch and in a prompt.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cpu_kernels.compilation import lazy_numba as numba
from cpu_kernels.simd.float_dot import float_dot

SOFTMAX, SIGMOID, SOFTMAX_OF_CHOSEN = 1, 2, 3  # GGUF's numbers of `expert_gating_func`
SPARSE_MIXER = 256  # GGUF has no number for it
_MARGIN = np.float32(0.02)  # SparseMixer's, twice Phi-3.5-MoE's `router_jitter_noise`
_TOKENS = 16  # whose hidden states stay in the second-level cache while all rows of the router pass


class Routing(NamedTuple):
    """How a family makes weights of the router's scores; the same for all layers."""

    chosen: int
    """How many experts a token goes to; 0 for a model without experts."""
    gating: int
    """SOFTMAX over all experts; SIGMOID; SOFTMAX_OF_CHOSEN, over those that were chosen by their scores; or
    SPARSE_MIXER, a softmax for each chosen expert, over those behind it whose scores are nearly its own."""
    normalizes: bool
    """Whether the weights of the chosen experts are divided by their sum."""
    scale: np.float32
    """Factor of the weights."""


@numba.njit(cache=True)
def router_scores(isa, router, x, out, first, last):
    """Compute rows `first` to before `last` of a router times some vectors.

    Args:
        isa: the instruction set.
        router: float32 [rows, columns].
        x: float32 [tokens, columns].
        out: float32 [tokens, rows].
        first, last: the rows to compute.

    """
    for start in range(0, len(x), _TOKENS):
        for row in range(first, last):
            for t in range(start, min(start + _TOKENS, len(x))):
                out[t, row] = float_dot(isa, router[row], x[t])


@numba.njit(cache=True)
def sigmoid(x):
    """Return 1 / (1 + exp(-x)) of a float32."""
    return np.float32(1.0) / (np.float32(1.0) + np.exp(-x))


@numba.njit(cache=True)
def _softmax(x):
    """Replace float32 [n] by their softmax."""
    largest = x[0]
    for k in range(1, len(x)):
        largest = max(largest, x[k])
    total = np.float32(0.0)
    for k in range(len(x)):
        x[k] = np.exp(x[k] - largest)
        total += x[k]
    for k in range(len(x)):
        x[k] /= total


@numba.njit(cache=True)
def choose_experts(routing, scores, biases, selection_biases, own, chosen, weights):
    """Choose a token's experts: the best first, of equals the one with the lower index.

    Args:
        routing: see `Routing`.
        scores: float32 [experts], products with the router.
        biases: float32 [experts], which are added to the scores; [0] for none.
        selection_biases: float32 [experts], which are added to what the experts are chosen by; [0] for none.
        own: float32 [2, experts], scratch.
        chosen: int64 [chosen], out. Any scores, even no numbers, give different experts that exist.
        weights: float32 [chosen], out.

    """
    own_scores, ranks = own[0], own[1]
    experts = len(scores)
    for e in range(experts):
        own_scores[e] = scores[e] + biases[e] if len(biases) > 0 else scores[e]
    if routing.gating == SOFTMAX:
        _softmax(own_scores)
    elif routing.gating == SIGMOID:
        for e in range(experts):
            own_scores[e] = sigmoid(own_scores[e])
    for e in range(experts):
        ranks[e] = own_scores[e] + selection_biases[e] if len(selection_biases) > 0 else own_scores[e]
    total = np.float32(0.0)
    for rank in range(len(chosen)):
        best = _best_of_rest(ranks, chosen[:rank])
        chosen[rank], weights[rank] = best, own_scores[best]
        total += weights[rank]
    if routing.gating == SOFTMAX_OF_CHOSEN:
        _softmax(weights)
    elif routing.gating == SPARSE_MIXER:
        for rank in range(len(chosen)):
            weights[rank] = _share_of_near(own_scores, chosen[: rank + 1])
    elif routing.normalizes:
        for rank in range(len(chosen)):
            weights[rank] /= total
    if routing.scale != 1:
        for rank in range(len(chosen)):
            weights[rank] *= routing.scale


@numba.njit(cache=True)
def _share_of_near(scores, chosen):
    """Return the last chosen expert's share of a softmax, which is SparseMixer's without training (arXiv:2409.12136).

    It is over the experts that were not chosen before it and whose score is not more than a margin below its own. The
    margin is relative to the larger magnitude of the two.
    """
    best, total = scores[chosen[-1]], np.float32(0.0)
    for e in range(len(scores)):
        is_far = best - scores[e] > _MARGIN * max(abs(scores[e]), best)
        if not is_far and not _is_among(e, chosen[:-1]):
            total += np.exp(scores[e] - best)
    return np.float32(1.0) / total


@numba.njit(cache=True)
def _best_of_rest(ranks, taken):
    """Return the first index of the largest of float32 [n], of those that are not taken; some index for no numbers."""
    best = -1
    for e in range(len(ranks)):
        if best >= 0 and not ranks[e] > ranks[best] and ranks[best] == ranks[best]:
            continue
        if not _is_among(e, taken):
            best = e
    return best


@numba.njit(cache=True)
def _is_among(index, taken):
    """Tell whether an index is one of int64 [n]."""
    found = False
    for other in taken:
        found = found or other == index
    return found
