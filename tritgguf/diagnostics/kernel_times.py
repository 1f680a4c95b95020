"""How a benchmark's time divides among the kernels, and what thread launches and barriers cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cpu_kernels.threads.barrier import repeat_barrier
from cpu_kernels.threads.thread_pool import ThreadPool
from cpu_kernels.transformer.attend_layers import attend_layers
from cpu_kernels.transformer.attend_token import make_scratch
from cpu_kernels.transformer.delta_net import mix_layers
from cpu_kernels.transformer.gemv import gemv
from cpu_kernels.transformer.kv_pages import KeyValues
from cpu_kernels.transformer.layer_options import ATTENTION, DELTA_NET, SHORT_CONVOLUTION
from cpu_kernels.transformer.projection import Activations, Projection
from cpu_kernels.transformer.short_convolution import convolve_layers
from tritgguf.runtime.config import ModelConfig
from tritgguf.runtime.decode_pass import DecodePass
from tritgguf.runtime.kv_pool import DEFAULT_CACHE_TYPE, KVPool, pages_of
from tritgguf.runtime.model import BATCH_TOKENS
from tritgguf.runtime.prompt_pass import PromptPass
from tritgguf.runtime.rotations import RotationTables
from tritgguf.runtime.weights import LayerWeights, ModelWeights

REST = "the rest"


@dataclass(frozen=True)
class KernelTime:
    """Seconds that a kernel takes of a token (decode) or of a prompt (prefill), and its share of the whole."""

    kernel: str
    seconds: float
    share: float


class TimingThreadPool(ThreadPool):
    """A thread pool that adds up the time of every kernel by name and counts launches."""

    def __init__(self, threads: int | None, *, isa: str | None = None) -> None:
        super().__init__(threads, isa=isa)
        self.seconds: dict[str, float] = {}
        self.launches = 0

    def run(self, kernel: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Run a kernel on every thread, as any thread_pool does."""
        start = time.perf_counter()
        results = super().run(kernel, *arguments)
        name = kernel.__name__
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        self.launches += 1
        return results


@dataclass(frozen=True)
class PromptTimes:
    """Seconds of a prompt by kernel, what is left over among them as REST, and the share that launching takes."""

    seconds: dict[str, float]
    launch_share: float


def prefill_times(
    config: ModelConfig,
    weights: ModelWeights,
    thread_pool: ThreadPool,
    tokens: list[int],
    depth: int,
    repetitions: int,
    bits: int,
    cache_type: str = DEFAULT_CACHE_TYPE,
) -> PromptTimes:
    """Measure a prompt behind `depth` tokens by kernel, on as many threads as `thread_pool` has: mean seconds."""
    timing = TimingThreadPool(thread_pool.threads, isa=thread_pool.isa_name)
    prompt_pass = PromptPass(config, weights, bits=bits, exact=False)
    pool, tables = _filled_pool(config, depth + len(tokens), cache_type)
    kv = pool.key_values(tables)
    logits = np.empty(config.vocab_size, np.float32)
    total = 0.0
    for repetition in range(repetitions + 1):
        if repetition == 1:  # the first one has made the buffers
            timing.seconds.clear()
            timing.launches = 0
            total = 0.0
        start = time.perf_counter()
        for first in range(0, len(tokens), BATCH_TOKENS):
            chunk = np.array(tokens[first : first + BATCH_TOKENS])
            hidden = prompt_pass.run(timing, chunk, np.array([[0, len(chunk), 0, depth + first]]), kv)
        weights.head.multiply_vector(hidden.x[-1], logits, timing)
        total += time.perf_counter() - start
    seconds = {name: spent / repetitions for name, spent in timing.seconds.items()}
    seconds[REST] = total / repetitions - sum(seconds.values())
    launching = launch_seconds(thread_pool, timing.launches // repetitions, 0, repetitions)
    return PromptTimes(seconds, launching * repetitions / total)


def launch_seconds(thread_pool: ThreadPool, launches: int, barriers: int, repetitions: int) -> float:
    """Return the seconds of `launches` kernels that do nothing but pass `barriers` barriers each.

    The threads have no work, so they arrive together: this is the cost of launches and barriers alone, without the time
    that a thread waits for a larger share of the work. Median of the repetitions.
    """
    counter = np.zeros(1, np.int64)
    times = []
    for repetition in range(repetitions + 1):
        start = time.perf_counter()
        for _ in range(launches):
            thread_pool.run(repeat_barrier, counter, barriers)
        if repetition:  # the first time it may have been compiled
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def decode_launch_seconds(
    config: ModelConfig, weights: ModelWeights, thread_pool: ThreadPool, repetitions: int = 100
) -> float:
    """Return the seconds that one launch and all barriers of a token take by themselves."""
    return launch_seconds(thread_pool, 1, barriers_per_token(config, weights, thread_pool.threads), repetitions)


def barriers_per_token(config: ModelConfig, weights: ModelWeights, threads: int) -> int:
    """Return how often the threads wait for one another in a token; a single one never does."""

    class BarrierCounter(ThreadPool):
        barriers = 0

        def run(self, kernel: Callable[..., Any], *arguments: Any) -> list[Any]:
            results = super().run(kernel, *arguments)
            counter = arguments[-1]  # every thread adds 1 to it whenever it arrives
            self.barriers += int(counter[0]) // self.threads
            return results

    thread_pool = BarrierCounter(threads)
    logits = np.zeros(config.vocab_size, np.float32)
    pool, tables = _filled_pool(config, 1, DEFAULT_CACHE_TYPE)
    DecodePass(config, weights, threads).run_one(thread_pool, 0, 0, 0, pool.key_values(tables), logits)
    return thread_pool.barriers


def decode_seconds(
    config: ModelConfig,
    weights: ModelWeights,
    thread_pool: ThreadPool,
    positions: int,
    repetitions: int,
    cache_type: str = DEFAULT_CACHE_TYPE,
) -> dict[str, float]:
    """Return the seconds that each kind of matrix and attention take of a token: medians.

    Decode is one compiled function, so each part is run by itself, for all layers at once; in turns, because a part
    that is repeated at once would find its matrices in the cache. The launch of a part, of which a token has only
    one, is subtracted.
    """
    layers = weights.layers
    isa = thread_pool.isa
    pool, tables = _filled_pool(config, positions, cache_type)  # keeps its pages alive
    parts: dict[str, tuple[Any, ...]] = {
        "q, k, v": _product(isa, *[layer.qkv for layer in _layers_of(config, layers, ATTENTION)]),
        "attention": _attention(isa, config, layers, thread_pool, positions - 1, pool.key_values(tables)),
        "attention output": _product(isa, *[layer.output for layer in _layers_of(config, layers, ATTENTION)]),
        **_convolutions(isa, config, layers, positions - 1, pool.key_values(tables)),
        **_states(isa, config, weights, thread_pool, positions - 1, pool.key_values(tables)),
        **_feed_forward(isa, config, layers),
        "head": _product(isa, weights.head),
        "launch": (repeat_barrier, np.zeros(1, np.int64), 0),
    }
    times: dict[str, list[float]] = {name: [] for name in parts}
    for repetition in range(repetitions + 1):
        for name, call in parts.items():
            start = time.perf_counter()
            thread_pool.run(*call)
            if repetition:  # the first time it may have been compiled
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {name: max(0.0, seconds - medians["launch"]) for name, seconds in medians.items() if name != "launch"}


def _layers_of(config: ModelConfig, layers: Sequence[LayerWeights], kind: int) -> list[LayerWeights]:
    return [layer for layer, of_kind in zip(layers, config.layer_options.kinds, strict=True) if of_kind == kind]


def _convolutions(
    isa: tuple[int, ...], config: ModelConfig, layers: Sequence[LayerWeights], position: int, kv: KeyValues
) -> dict[str, tuple[Any, ...]]:
    """Return kernels and arguments of the layers with short convolutions: their matrices, and the rest of them."""
    convolving = _layers_of(config, layers, SHORT_CONVOLUTION)
    if not convolving:
        return {}
    kernels = np.stack([layer.convolution for layer in layers])
    projected, out = np.full(config.projected_columns, 0.5, np.float32), np.empty(config.dimensions.hidden, np.float32)
    return {
        "convolution input": _product(isa, *[layer.qkv for layer in convolving]),
        "convolution": (convolve_layers, kernels, config.layer_options.kinds, kv, projected, position, out),
        "convolution output": _product(isa, *[layer.output for layer in convolving]),
    }


def _states(
    isa: tuple[int, ...],
    config: ModelConfig,
    weights: ModelWeights,
    thread_pool: ThreadPool,
    position: int,
    kv: KeyValues,
) -> dict[str, tuple[Any, ...]]:
    """Return kernels and arguments of the layers with a state: their packed matrices, and the rest of them."""
    with_state, sizes = _layers_of(config, weights.layers, DELTA_NET), config.dimensions
    if sizes.delta_net is None:
        return {}
    hidden, projected = np.full(sizes.hidden, 0.5, np.float32), np.full(config.projected_columns, 0.5, np.float32)
    gates, places = np.empty(config.delta_gates, np.float32), np.zeros((thread_pool.threads, 2), np.int64)
    out, counter = np.empty((thread_pool.threads, sizes.delta_net.values), np.float32), np.zeros(1, np.int64)
    delta, options = weights.delta_net, config.layer_options
    return {
        "state input": _product(isa, *[layer.qkv for layer in with_state]),
        "state": (mix_layers, isa, delta, options, kv, hidden, projected, gates, places, position, out, counter),
        "state output": _product(isa, *[layer.output for layer in with_state]),
    }


def _feed_forward(
    isa: tuple[int, ...], config: ModelConfig, layers: Sequence[LayerWeights]
) -> dict[str, tuple[Any, ...]]:
    """Return kernels and arguments of a dense feed-forward, and of as many experts as a token uses."""
    parts: dict[str, tuple[Any, ...]] = {}
    if dense := [layer for layer in layers if layer.gate_up.rows]:
        parts["gate, up"] = _product(isa, *[layer.gate_up for layer in dense])
        parts["down"] = _product(isa, *[layer.down for layer in dense])
    if experts := [layer.experts for layer in layers if layer.experts is not None]:
        used = range(config.routing.chosen)
        gate_up = [stack.matrix(number) for layer in experts for stack in layer.stacks[:2] for number in used]
        parts["experts' gate, up"] = _product(isa, Projection(gate_up))
        down = [layer.down.matrix(number) for layer in experts for number in used]
        parts["experts' down"] = _product(isa, Projection(down))
    return parts


def _product(isa: tuple[int, ...], *projections: Projection) -> tuple[Any, ...]:
    """Return kernel and arguments that multiply all matrices of some projections with one vector."""
    matrices = Projection([matrix for projection in projections for matrix in projection.matrices])
    activations = Activations(1, matrices.columns)
    activations.x[:] = np.random.default_rng(0).standard_normal(matrices.columns)
    activations.quantize(ThreadPool(1))
    out = np.empty(matrices.rows, np.float32)
    arrays = matrices.addresses, matrices.matrix_rows, matrices.depths, matrices.steps
    return gemv, isa, *arrays, activations.vector(0), out


def _attention(
    isa: tuple[int, ...],
    config: ModelConfig,
    layers: Sequence[LayerWeights],
    thread_pool: ThreadPool,
    position: int,
    kv: KeyValues,
) -> tuple[Any, ...]:
    """Return kernel and arguments of the attention of one token, at `position`, in all layers."""
    sizes = config.dimensions
    scratch = make_scratch(1, sizes.heads, sizes.kv_heads, sizes.head_dim, thread_pool.threads)
    qkv = np.full(config.qkv_columns, 0.5, np.float32)
    out = np.empty((thread_pool.threads, sizes.heads * sizes.head_dim), np.float32)
    norms = np.stack([layer.query_key_norm for layer in layers])
    counter = np.zeros(1, np.int64)
    bias, options = np.zeros_like(qkv), config.layer_options
    return attend_layers, isa, kv, scratch, qkv, bias, norms, options, position, out, counter


def _filled_pool(config: ModelConfig, positions: int, cache_type: str) -> tuple[KVPool, RotationTables]:
    """Return one sequence of so many positions, in pages that were written to, and its rotation tables.

    Memory that never was written to is one page of zeros, which is always in the processor's cache.
    """
    pool = KVPool(config, pages=pages_of(positions), sequences=1, context=positions, cache_type=cache_type)
    pool.reserve(pool.allocate(), positions)
    pool.clear_pages()
    tables = RotationTables(config.rotations)
    tables.reserve(positions)
    return pool, tables


def shares(seconds: Mapping[str, float], total: float | None = None) -> list[KernelTime]:
    """Return kernels with their shares of the whole, longest first; REST, which fills up to `total`, comes last."""
    parts = {name: spent for name, spent in seconds.items() if name != REST}
    if total is None:
        total = sum(seconds.values())
    if not parts:
        return []
    ordered = sorted(parts.items(), key=lambda part: part[1], reverse=True)
    ordered.append((REST, total - sum(parts.values())))
    return [KernelTime(name, spent, spent / total) for name, spent in ordered]
