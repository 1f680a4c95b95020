"""The router of a mixture of experts, against torch's choice of the best and against plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from inner_kernels import as_kernel
from random_inputs import THREAD_POOL

from cpu_kernels.transformer.router import (
    SIGMOID,
    SOFTMAX,
    SOFTMAX_OF_CHOSEN,
    SPARSE_MIXER,
    Routing,
    choose_experts,
    router_scores,
)

NONE = np.zeros(0, np.float32)


def choose(
    routing: Routing, scores: np.ndarray, biases: np.ndarray = NONE, selection_biases: np.ndarray = NONE
) -> tuple[np.ndarray, np.ndarray]:
    """Return a token's experts and their weights."""
    chosen, weights = np.full(routing.chosen, -1, np.int64), np.zeros(routing.chosen, np.float32)
    own = np.zeros((2, len(scores)), np.float32)
    as_kernel(choose_experts)(routing, scores, biases, selection_biases, own, chosen, weights)
    return chosen, weights


def routing(chosen: int, gating: int = SOFTMAX, *, normalizes: bool = False, scale: float = 1.0) -> Routing:
    return Routing(chosen, gating, normalizes, np.float32(scale))


def random_scores(experts: int = 60, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, experts)).standard_normal(experts).astype(np.float32)


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores.astype(np.float64) - scores.max())
    return np.asarray(powers / powers.sum())


@pytest.mark.parametrize("normalizes", [False, True])
def test_softmax_over_all(normalizes: bool) -> None:
    scores = random_scores()
    chosen, weights = choose(routing(8, normalizes=normalizes), scores)
    best = np.argsort(-scores)[:8]
    np.testing.assert_array_equal(chosen, best)
    expected = softmax(scores)[best]
    np.testing.assert_allclose(weights, expected / expected.sum() if normalizes else expected, rtol=1e-6)


def test_softmax_over_the_chosen() -> None:
    scores, biases = random_scores(), random_scores(seed=1)
    chosen, weights = choose(routing(4, SOFTMAX_OF_CHOSEN), scores, biases)
    best = np.argsort(-(scores + biases))[:4]
    np.testing.assert_array_equal(chosen, best)
    np.testing.assert_allclose(weights, softmax((scores + biases)[best]), rtol=1e-6)


def test_sigmoid_with_a_bias_of_the_choice() -> None:
    scores, bias = random_scores(), 3 * random_scores(seed=1)
    chosen, weights = choose(routing(6, SIGMOID, normalizes=True, scale=2.5), scores, selection_biases=bias)
    probabilities = 1 / (1 + np.exp(-scores.astype(np.float64)))
    best = np.argsort(-(probabilities + bias))[:6]
    np.testing.assert_array_equal(chosen, best)
    np.testing.assert_allclose(weights, 2.5 * probabilities[best] / probabilities[best].sum(), rtol=1e-6)


def test_sparse_mixer_weights_each_expert_among_those_near_it() -> None:
    """Scores of 100, 99, 98.1, 97 and 50: the first three are within 2 % of the first, the fourth of the second."""
    scores = np.array([50, 98.1, 100, 97.1, 99], np.float32)
    chosen, weights = choose(routing(2, SPARSE_MIXER), scores)
    assert chosen.tolist() == [2, 4]
    np.testing.assert_allclose(weights, [softmax(scores[[2, 4, 1]])[0], softmax(scores[[4, 1, 3]])[0]], rtol=1e-6)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([1, 2, 3, 4], [1, 1]),
        ([-4, -1, -3, -1.01], [softmax(np.array([-1, -1.01]))[0], 1]),
        ([-1, -1.03, -2, -1.04], [1, softmax(np.array([-1.03, -1.04]))[0]]),  # a margin of the lower one's magnitude
        ([0, 0, -1, -2], [0.5, 1]),
        ([0, 0, 0, 0], [1 / 4, 1 / 3]),
        ([1, -1, -1, -1], [1, 1 / 3]),
    ],
)
def test_the_margin_is_relative(scores: list[float], expected: list[float]) -> None:
    _, weights = choose(routing(2, SPARSE_MIXER), np.array(scores, np.float32))
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


def test_of_equal_experts_the_first() -> None:
    scores = np.array([0, 1, 0, 1, 1, 0], np.float32)
    assert choose(routing(2), scores)[0].tolist() == [1, 3]
    assert choose(routing(5), scores)[0].tolist() == [1, 3, 4, 0, 2]


@pytest.mark.parametrize("gating", [SOFTMAX, SIGMOID, SOFTMAX_OF_CHOSEN, SPARSE_MIXER])
@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [slice(None), slice(0, 1), slice(3, 6)])
def test_no_numbers_choose_experts_that_exist(gating: int, odd: float, where: slice) -> None:
    scores = random_scores(8)
    scores[where] = odd
    chosen, _ = choose(routing(8, gating), scores)
    assert sorted(chosen) == list(range(8))
    assert len(set(choose(routing(3, gating), scores)[0].tolist()) & set(range(8))) == 3


@pytest.mark.parametrize("columns", [1, 15, 64, 100, 192])
def test_scores_are_products_and_alike_in_every_batch(variant: str, columns: int) -> None:
    generator = np.random.default_rng(columns)
    router, x = (generator.standard_normal((n, columns)).astype(np.float32) for n in (5, 37))
    together, alone = np.zeros((37, 5), np.float32), np.zeros((37, 5), np.float32)
    kernel = as_kernel(router_scores)
    kernel(THREAD_POOL.isa, router, x, together, 0, 5)
    for t in range(37):
        for row in range(5):
            kernel(THREAD_POOL.isa, router, x[t : t + 1], alone[t : t + 1], row, row + 1)
    np.testing.assert_array_equal(together, alone)
    expected = x.astype(np.float64) @ router.T
    np.testing.assert_allclose(together, expected, rtol=0, atol=1e-6 * columns**0.5 * np.abs(expected).max())
