"""The experts of one token, of several and of prompts, against plain NumPy and against one another."""

from __future__ import annotations

import numpy as np
import pytest
from random_experts import FEED_FORWARD, HIDDEN, RandomExperts, random_experts, random_stack
from random_inputs import THREAD_POOL, vectors

from cpu_kernels.compilation import lazy_numba as numba
from cpu_kernels.threads.barrier import wait_for_all
from cpu_kernels.threads.thread_pool import ThreadPool
from cpu_kernels.transformer.decode import row_of
from cpu_kernels.transformer.expert_stack import ExpertSlots, ExpertStack
from cpu_kernels.transformer.experts import (
    ExpertBuffers,
    expert_gates,
    route_token,
    score_experts,
    sum_experts,
)
from cpu_kernels.transformer.experts_batch import (
    ExpertBatchBuffers,
    expert_gates_batch,
    gather_entries,
    route_tokens,
    sum_experts_batch,
)
from cpu_kernels.transformer.gemv_batch import scratch_for
from cpu_kernels.transformer.layer_options import SILU, LayerOptions
from cpu_kernels.transformer.projection import Activations
from cpu_kernels.transformer.router import SOFTMAX, Routing
from tritgguf.runtime.expert_pass import ExpertPass
from tritgguf.runtime.expert_weights import ExpertWeights

ROUTING = Routing(3, SOFTMAX, True, np.float32(1.0))
OPTIONS = LayerOptions(
    epsilon=np.float32(1e-5),
    residual_scale=np.float32(1),
    activation=SILU,
    interleaved=False,
    rotated_pairs=0,
    gates_heads=False,
    attention_scale=np.float32(1),
    softcap=np.float32(0),
    normalizes_together=False,
    kinds=np.zeros(1, np.int64),
    windows=np.zeros(1, np.int64),
    rotations=np.zeros(1, np.int64),
    sinks=np.zeros((1, 0), np.float32),
)
mixtures = pytest.mark.parametrize(
    ("depths", "biased"), [((1, 1, 1), False), ((2, 2, 2), True), ((3, 4, 2), False), ((0, 2, 0), True)]
)


@numba.njit(nogil=True)
def run_token(  # type: ignore[no-untyped-def]
    isa, experts, options, hidden, buffers, out, counter, thread, threads
):
    """Compute one token's experts as `decode` does."""
    own = row_of(hidden, 0)
    score_experts(isa, experts, 0, own[0], buffers, thread, threads)
    wait_for_all(counter, threads)
    route_token(experts, 0, buffers, thread, threads)
    expert_gates(isa, experts, 0, options, own, buffers, thread, threads)
    wait_for_all(counter, threads)
    first, last = len(out) * thread // threads, len(out) * (thread + 1) // threads
    sum_experts(isa, experts, 0, buffers, out, first, last, thread)


@numba.njit(nogil=True)
def run_tokens(  # type: ignore[no-untyped-def]
    isa, experts, options, hidden, buffers, own_rows, out, counter, thread, threads
):
    """Compute several tokens' experts as `decode_batch` does."""
    tokens = len(out)
    own = slice(tokens * thread // threads, tokens * (thread + 1) // threads)
    route_tokens(
        isa, experts, 0, hidden[0][own], buffers.scores[own], buffers.own_scores[thread], buffers.chosen[own],
        buffers.weights[own],
    )  # fmt: skip
    wait_for_all(counter, threads)
    gather_entries(hidden, buffers, thread, threads)
    wait_for_all(counter, threads)
    expert_gates_batch(isa, experts, 0, options, buffers, own_rows[thread], thread, threads)
    wait_for_all(counter, threads)
    first, last = out.shape[1] * thread // threads, out.shape[1] * (thread + 1) // threads
    sum_experts_batch(isa, experts, 0, buffers, out, first, last, own_rows[thread], thread)


def quantized(x: np.ndarray, bits: int = 16) -> Activations:
    activations = Activations(*x.shape, bits=bits)
    activations.x[:] = x
    activations.quantize(THREAD_POOL)
    return activations


def one_by_one(made: RandomExperts, x: np.ndarray, thread_pool: ThreadPool = THREAD_POOL) -> np.ndarray:
    """Return what the experts give for each token alone."""
    routing, experts = made.experts.routing, made.experts.steps.shape[2]
    threads, out = thread_pool.threads, np.full(x.shape, np.nan, np.float32)
    buffers = ExpertBuffers(
        scores=np.zeros((1, made.experts.routers.shape[1]), np.float32),
        own_scores=np.zeros((threads, 2, experts), np.float32),
        own_chosen=np.zeros((threads, routing.chosen), np.int64),
        own_weights=np.zeros((threads, routing.chosen), np.float32),
        gate=np.zeros((routing.chosen, FEED_FORWARD), np.float32),
        up=np.zeros((routing.chosen, FEED_FORWARD), np.float32),
        gated=Activations(routing.chosen, FEED_FORWARD).buffers,
        own_out=np.zeros((threads, HIDDEN), np.float32),
    )
    counter = np.zeros(1, np.int64)
    for row, result in zip(x, out, strict=True):
        hidden = quantized(row[np.newaxis]).buffers
        thread_pool.run(run_token, thread_pool.isa, made.experts, OPTIONS, hidden, buffers, result, counter)
    return out


def together(made: RandomExperts, x: np.ndarray, thread_pool: ThreadPool = THREAD_POOL) -> np.ndarray:
    """Return what the experts give for a batch of generated tokens."""
    routing, experts, threads = made.experts.routing, made.experts.steps.shape[2], thread_pool.threads
    entries, out = len(x) * routing.chosen, np.full(x.shape, np.nan, np.float32)
    buffers = ExpertBatchBuffers(
        scores=np.zeros((len(x), made.experts.routers.shape[1]), np.float32),
        own_scores=np.zeros((threads, 2, experts), np.float32),
        chosen=np.zeros((len(x), routing.chosen), np.int64),
        weights=np.zeros((len(x), routing.chosen), np.float32),
        own_starts=np.zeros((threads, experts + 1), np.int64),
        own_places=np.zeros((threads, entries), np.int64),
        hidden=Activations(entries, HIDDEN).buffers,
        gate=np.zeros((entries, FEED_FORWARD), np.float32),
        up=np.zeros((entries, FEED_FORWARD), np.float32),
        gated=Activations(entries, FEED_FORWARD).buffers,
        out=np.zeros((entries, HIDDEN), np.float32),
    )
    own_rows, counter = scratch_for(threads, HIDDEN), np.zeros(1, np.int64)
    hidden = quantized(x).buffers
    thread_pool.run(run_tokens, thread_pool.isa, made.experts, OPTIONS, hidden, buffers, own_rows, out, counter)
    return out


def as_prompt(
    made: RandomExperts, x: np.ndarray, *, bits: int = 16, exact: bool = False, thread_pool: ThreadPool = THREAD_POOL
) -> np.ndarray:
    """Return what the experts give for a prompt's tokens."""
    layer = ExpertWeights.__new__(ExpertWeights)
    layer.gate, layer.up, layer.down = made.stacks
    expert_pass = ExpertPass(made.experts, HIDDEN, FEED_FORWARD, bits=bits, exact=exact)
    out = np.full(x.shape, np.nan, np.float32)
    expert_pass.run(thread_pool, 0, layer, x, False, np.zeros((0, HIDDEN), np.float32), out)
    return out


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


@pytest.mark.slow  # compiles a kernel of its own
@mixtures
def test_one_token(depths: tuple[int, int, int], biased: bool) -> None:
    made, x = random_experts(ROUTING, 8, depths, biased=biased), vectors(5, HIDDEN)
    assert relative(one_by_one(made, x), made.expected(x)) < 1e-3


@pytest.mark.slow
@mixtures
def test_a_batch_gives_the_bits_of_single_tokens(depths: tuple[int, int, int], biased: bool) -> None:
    made, x = random_experts(ROUTING, 8, depths, biased=biased), vectors(21, HIDDEN)
    np.testing.assert_array_equal(together(made, x), one_by_one(made, x))


@mixtures
def test_a_prompt(depths: tuple[int, int, int], biased: bool) -> None:
    made, x = random_experts(ROUTING, 8, depths, biased=biased), vectors(40, HIDDEN)
    expected = made.expected(x)
    assert relative(as_prompt(made, x, exact=True), expected) < 1e-5
    assert relative(as_prompt(made, x, bits=16), expected) < 1e-3
    assert relative(as_prompt(made, x, bits=8), expected) < 0.1


def test_a_prompt_token_does_not_depend_on_the_others() -> None:
    made, x = random_experts(ROUTING, 8), vectors(23, HIDDEN)
    whole = as_prompt(made, x, bits=8)
    np.testing.assert_array_equal(as_prompt(made, x[4:11].copy(), bits=8), whole[4:11])
    np.testing.assert_array_equal(as_prompt(made, x[9:10].copy(), bits=8), whole[9:10])


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 3, 7])
def test_the_number_of_threads_changes_no_bit(threads: int) -> None:
    made, x, pool = random_experts(ROUTING, 8), vectors(6, HIDDEN), ThreadPool(threads)
    np.testing.assert_array_equal(one_by_one(made, x, pool), one_by_one(made, x))
    np.testing.assert_array_equal(together(made, x, pool), together(made, x))
    np.testing.assert_array_equal(as_prompt(made, x, thread_pool=pool), as_prompt(made, x))


@pytest.mark.slow
@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_no_numbers_in_a_router_stay_within_the_experts(odd: float) -> None:
    made, x = random_experts(ROUTING, 8), vectors(5, HIDDEN)
    expected = one_by_one(made, x)
    made.experts.routers[0, 3] = odd
    x[2] = odd
    for run in (one_by_one, together, as_prompt):
        assert run(made, x).shape == x.shape
    made.experts.routers[0] = random_experts(ROUTING, 8).experts.routers[0]
    np.testing.assert_array_equal(one_by_one(made, x)[3:], expected[3:])


@pytest.mark.slow
def test_asking_for_experts_changes_nothing() -> None:
    made, x = random_experts(ROUTING, 8), vectors(2, HIDDEN)
    asking = RandomExperts(made.stacks, made.weights, made.experts._replace(reads_ahead=True))
    np.testing.assert_array_equal(one_by_one(asking, x), one_by_one(made, x))


def test_slots_group_tokens_by_expert() -> None:
    chosen = np.array([[2, 0], [0, 3], [2, 3], [2, 0]])
    slots = ExpertSlots(chosen, 5)
    np.testing.assert_array_equal(slots.counts, [3, 0, 3, 2, 0])
    np.testing.assert_array_equal(slots.starts, [0, 6, 6, 12, 18])
    np.testing.assert_array_equal(slots.tokens, [0, 1, 3, -1, -1, -1, 0, 2, 3, -1, -1, -1, 1, 2, -1, -1, -1, -1])
    np.testing.assert_array_equal(slots.of_tokens, [[6, 0], [1, 12], [7, 13], [8, 2]])
    assert len(slots.tokens) <= ExpertSlots.most(4, 2, 5)


@pytest.mark.parametrize("change", [{"experts": 4}, {"rows": 17}, {"columns": 320}, {"depth": 3}, {"depth": 0}])
def test_a_stack_checks_its_lengths(change: dict[str, int]) -> None:
    stack, _ = random_stack(3, 2, 16, 192, seed=0)
    with pytest.raises(ValueError, match="stack"):
        ExpertStack(**{**vars(stack), **change})
