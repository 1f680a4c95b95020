"""bench: how fast a file runs here, against what the memory allows, and which kernels the time goes to."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cpu_kernels import instruction_set
from cpu_kernels.activations import quantize_row
from cpu_kernels.attend_layers import attend_layers
from cpu_kernels.bandwidth import read, read_bandwidth
from cpu_kernels.crew import Crew
from cpu_kernels.gemv import gemv
from cpu_kernels.projection import Activations, Projection
from tritgguf.cache import KeyValueCache
from tritgguf.errors import TritGgufError
from tritgguf.gguf_file import GgufFile
from tritgguf.model import BATCH_TOKENS, Model
from tritgguf.model_config import ModelConfig
from tritgguf.prefill import Prefill
from tritgguf.trit_types import TritType, is_trit_type
from tritgguf.weights import ModelWeights

REST = "the rest"
Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]


@dataclass(frozen=True)
class Speed:
    """One test, named as llama-bench does: `pp512`, `tg128` or `tg128 @ d4096`, and its repetitions' seconds."""

    test: str
    tokens: int
    seconds: tuple[float, ...]

    @property
    def rates(self) -> list[float]:
        """Tokens per second of every repetition."""
        return [self.tokens / seconds for seconds in self.seconds]

    @property
    def mean(self) -> float:
        """Tokens per second."""
        return statistics.mean(self.rates)

    @property
    def spread(self) -> float:
        """Standard deviation of the tokens per second; 0 for a single repetition."""
        return statistics.stdev(self.rates) if len(self.seconds) > 1 else 0.0


@dataclass(frozen=True)
class KernelTime:
    """Seconds that a kernel takes of a token (decode) or of a prompt (prefill), and its share of the whole."""

    kernel: str
    seconds: float
    share: float


@dataclass(frozen=True)
class BenchReport:
    """What a benchmark measured; `prefill` and `decode` are None where they were not asked for."""

    file: Path
    architecture: str
    types: str
    file_bytes: int
    weights: int
    processor: str
    instruction_set: str
    threads: int
    prefill: Speed | None
    decode: Speed | None
    trit_weights: int
    """Weights of the trit matrices; a token multiplies each of them once."""
    bytes_per_token: int
    """What decode reads of the file for a token, see `bytes_read_per_token`."""
    read_bandwidth: float
    """Bytes per second that the same threads merely read."""
    prefill_kernels: list[KernelTime]
    decode_kernels: list[KernelTime]

    @property
    def speeds(self) -> list[Speed]:
        """The tests that were run."""
        return [speed for speed in (self.prefill, self.decode) if speed is not None]

    @property
    def decode_rates(self) -> dict[str, float] | None:
        """Decode's trit weights and bytes per second, and the bytes over the read bandwidth."""
        if self.decode is None:
            return None
        bytes_per_second = self.bytes_per_token * self.decode.mean
        return {
            "weights_per_second": self.trit_weights * self.decode.mean,
            "bytes_per_token": self.bytes_per_token,
            "bytes_per_second": bytes_per_second,
            "share_of_read_bandwidth": bytes_per_second / self.read_bandwidth,
        }

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON takes it: tokens, bytes and weights per second, and seconds."""
        return {
            "file": str(self.file),
            "architecture": self.architecture,
            "types": self.types,
            "file_bytes": self.file_bytes,
            "weights": self.weights,
            "processor": self.processor,
            "instruction_set": self.instruction_set,
            "threads": self.threads,
            "tests": [
                {
                    "test": speed.test,
                    "tokens": speed.tokens,
                    "tokens_per_second": speed.mean,
                    "spread": speed.spread,
                    "samples": speed.rates,
                }
                for speed in self.speeds
            ],
            "decode": self.decode_rates,
            "read_bandwidth": self.read_bandwidth,
            "kernels": {
                "prefill": [vars(kernel) for kernel in self.prefill_kernels],
                "decode": [vars(kernel) for kernel in self.decode_kernels],
            },
        }

    def tables(self) -> list[Table]:
        """Return title, columns and rows of the tables to print; right-aligned columns begin with `>`."""
        model = (self.architecture, self.types, f"{self.file_bytes / 1e9:.2f} GB", f"{self.weights / 1e6:.0f} M")
        rows: list[tuple[str, ...]] = [
            (*model, str(self.threads), speed.test, f"{speed.mean:.2f} ± {speed.spread:.2f}") for speed in self.speeds
        ]
        columns = ("model", "type", ">size", ">weights", ">threads", ">test", ">tokens/s")
        tables: list[Table] = [(f"{self.processor}, {self.instruction_set}", columns, rows)]
        if (rates := self.decode_rates) is not None:
            rows = [
                ("trit weights", f"{rates['weights_per_second'] / 1e9:.1f} G/s"),
                ("read for a token", f"{rates['bytes_per_token'] / 1e6:.1f} MB"),
                ("read", f"{rates['bytes_per_second'] / 1e9:.1f} GB/s"),
                ("read bandwidth of these threads", f"{self.read_bandwidth / 1e9:.1f} GB/s"),
                ("share of the read bandwidth", f"{rates['share_of_read_bandwidth']:.0%}"),
            ]
            tables.append((f"decode: {self.decode.test if self.decode else ''}", ("", ">"), rows))
        for title, kernels in (("one prompt", self.prefill_kernels), ("one token", self.decode_kernels)):
            if kernels:
                rows = [(k.kernel, f"{1e3 * k.seconds:.3f}", f"{k.share:.1%}") for k in kernels]
                tables.append((f"time of {title} by kernel", ("kernel", ">ms", ">share"), rows))
        return tables


class TimingCrew(Crew):
    """A crew that keeps the time of every kernel, by name."""

    def __init__(self, threads: int | None) -> None:
        super().__init__(threads)
        self.seconds: dict[str, float] = {}

    def run(self, kernel: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Run a kernel on every thread, as any crew does."""
        start = time.perf_counter()
        results = super().run(kernel, *arguments)
        name = kernel.__name__
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        return results


def bench(
    path: str | Path,
    *,
    prompt_tokens: int = 512,
    generated_tokens: int = 128,
    depth: int = 0,
    threads: int | None = None,
    repetitions: int = 5,
    on_compilation: Callable[[], None] | None = None,
) -> BenchReport:
    """Measure a trit file's prefill and decode.

    Args:
        path: the file.
        prompt_tokens, generated_tokens: length of the two tests; 0 leaves one out.
        depth: tokens in the cache before decode starts.
        threads: None for the physical cores.
        repetitions: how often each test is run, after a warm-up that is not counted.
        on_compilation: called if kernels have to be compiled first.

    Raises TritGgufError for a file that cannot be run, and when there is nothing to measure.

    """
    if prompt_tokens + generated_tokens == 0:
        raise TritGgufError("there is nothing to measure; give a number of tokens with -p or -n")
    file = GgufFile(path)
    model, tokens = _warm_model(file, max(prompt_tokens, depth + generated_tokens), threads, on_compilation)
    prefill = _time_prefill(model, tokens[:prompt_tokens], repetitions) if prompt_tokens else None
    decode = _time_decode(model, tokens[: depth + generated_tokens], depth, repetitions) if generated_tokens else None
    bandwidth = read_bandwidth(model.crew, repetitions)
    weights = ModelWeights(file, model.config)
    prompt_seconds: dict[str, float] = {}
    token_seconds: dict[str, float] = {}
    if prefill is not None:
        prompt_seconds = prefill_seconds(model.config, weights, model.crew.threads, tokens[:prompt_tokens], repetitions)
    if decode is not None:
        places = depth + (generated_tokens + 1) // 2
        token_seconds = decode_seconds(model.config, weights, model.crew, places, repetitions)
    infos = file.tensors.values()
    return BenchReport(
        file=file.path,
        architecture=model.config.architecture,
        types="+".join(sorted({TritType(info.type_id).name for info in infos if is_trit_type(info.type_id)})),
        file_bytes=file.path.stat().st_size,
        weights=sum(info.n_weights for info in infos),
        processor=processor_name(),
        instruction_set={isa: name for name, isa in instruction_set.NAMES.items()}[instruction_set.choose()],
        threads=model.crew.threads,
        prefill=prefill,
        decode=decode,
        trit_weights=sum(info.n_weights for info in infos if is_trit_type(info.type_id)),
        bytes_per_token=bytes_read_per_token(file),
        read_bandwidth=bandwidth,
        prefill_kernels=shares(prompt_seconds),
        decode_kernels=[] if decode is None else shares(token_seconds, 1 / decode.mean),
    )


def _warm_model(
    file: GgufFile, context: int, threads: int | None, on_compilation: Callable[[], None] | None
) -> tuple[Model, list[int]]:
    """Return a model that has run once, so that nothing is left to compile, read or allocate, and random tokens."""
    model = Model(file, context=context, threads=threads)
    model.compile(on_compilation or (lambda: None))
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, context).tolist()
    model.forward(tokens)
    model.truncate(context - 1)
    model.forward(tokens[-1:])
    return model, tokens


def _time_prefill(model: Model, tokens: list[int], repetitions: int) -> Speed:
    """Time a prompt of `tokens` in an empty cache."""
    seconds = []
    for _ in range(repetitions):
        model.truncate(0)
        start = time.perf_counter()
        model.forward(tokens)
        seconds.append(time.perf_counter() - start)
    return Speed(f"pp{len(tokens)}", len(tokens), tuple(seconds))


def _time_decode(model: Model, tokens: list[int], depth: int, repetitions: int) -> Speed:
    """Time the tokens behind the first `depth`, one after the other."""
    model.truncate(0)
    if depth:
        model.forward(tokens[:depth])
    seconds = []
    for _ in range(repetitions):
        model.truncate(depth)
        start = time.perf_counter()
        for place in range(depth, len(tokens)):
            model.forward(tokens[place : place + 1])
        seconds.append(time.perf_counter() - start)
    count = len(tokens) - depth
    return Speed(f"tg{count}" + (f" @ d{depth}" if depth else ""), count, tuple(seconds))


def prefill_seconds(
    config: ModelConfig, weights: ModelWeights, threads: int, tokens: list[int], repetitions: int
) -> dict[str, float]:
    """Return the seconds of a prompt by kernel, mean of the repetitions; what is left over is REST."""
    crew = TimingCrew(threads)
    prefill = Prefill(config, weights, crew, exact=False)
    cache = KeyValueCache(config, len(tokens), threads)
    cache.reserve(len(tokens))
    logits = np.empty(config.vocab_size, np.float32)
    total = 0.0
    for repetition in range(repetitions + 1):
        if repetition == 1:  # the first one has made the buffers
            crew.seconds.clear()
            total = 0.0
        start = time.perf_counter()
        for first in range(0, len(tokens), BATCH_TOKENS):
            hidden = prefill.run(np.array(tokens[first : first + BATCH_TOKENS]), first, cache.arrays)
        weights.head.multiply_vector(hidden.x[-1], logits, crew)
        total += time.perf_counter() - start
    seconds = {name: spent / repetitions for name, spent in crew.seconds.items()}
    return {**seconds, REST: total / repetitions - sum(seconds.values())}


def decode_seconds(
    config: ModelConfig, weights: ModelWeights, crew: Crew, places: int, repetitions: int
) -> dict[str, float]:
    """Return the seconds that each kind of matrix and attention take of a token: medians.

    Decode is one compiled function, so each part is run by itself, for all layers at once; in turns, because a part
    that is repeated at once would find its matrices in the cache. The launch of a part, of which a token has only
    one, is subtracted.
    """
    layers = weights.layers
    isa = instruction_set.as_type(instruction_set.choose())
    parts: dict[str, tuple[Any, ...]] = {
        "q, k, v": _product(isa, *[layer.qkv for layer in layers]),
        "attention": _attention(config, crew, places),
        "attention output": _product(isa, *[layer.output for layer in layers]),
        "gate, up": _product(isa, *[layer.gate_up for layer in layers]),
        "down": _product(isa, *[layer.down for layer in layers]),
        "head": _product(isa, weights.head),
        "launch": (read, np.ones(0, np.int64)),
    }
    times: dict[str, list[float]] = {name: [] for name in parts}
    for repetition in range(repetitions + 1):
        for name, call in parts.items():
            start = time.perf_counter()
            crew.run(*call)
            if repetition:  # the first time it may have been compiled
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {name: max(0.0, seconds - medians["launch"]) for name, seconds in medians.items() if name != "launch"}


def _product(isa: tuple[int, ...], *projections: Projection) -> tuple[Any, ...]:
    """Return kernel and arguments that multiply all matrices of some projections with one vector."""
    matrices = Projection([matrix for projection in projections for matrix in projection.matrices])
    vector = Activations(1, matrices.columns).vector(0)
    vector[0][:] = np.random.default_rng(0).standard_normal(matrices.columns)
    quantize_row(*vector)
    out = np.empty(matrices.rows, np.float32)
    return gemv, isa, matrices.addresses, matrices.matrix_rows, matrices.kinds, matrices.steps, vector, out


def _attention(config: ModelConfig, crew: Crew, places: int) -> tuple[Any, ...]:
    """Return kernel and arguments of one token's attention in all layers, with `places` of the cache filled."""
    sizes = config.dimensions
    cache = KeyValueCache(config, places, crew.threads)
    cache.reserve(places)
    keys, values = cache.arrays.keys, cache.arrays.values
    keys.fill(0.5)  # memory that was never written to is one page, which is always in the cache
    values.fill(0.5)
    queries = np.full((sizes.heads, sizes.head_dim), 0.5, np.float32)
    return attend_layers, queries, keys, values, places, cache.arrays.scores, np.empty_like(queries)


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


def bytes_read_per_token(file: GgufFile) -> int:
    """Return the bytes of the file that decode reads for one token: every tensor, but of the embeddings only a row.

    Tied embeddings are read whole, as the head. The key-value cache is not counted.
    """
    embeddings = file.tensors["token_embd.weight"]
    total = sum(info.n_bytes for info in file.tensors.values())
    row = embeddings.n_bytes // embeddings.shape[0]
    return total + row - (embeddings.n_bytes if "output.weight" in file.tensors else 0)


def processor_name() -> str:
    """Return the processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model name"))]
    return next(filter(None, names), platform.processor() or platform.machine())
