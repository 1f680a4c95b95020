"""bench: how fast a file runs here, against what the memory allows, and which kernels the time goes to."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cpu_kernels.simd import variants
from cpu_kernels.threads.bandwidth import read_bandwidth
from cpu_kernels.transformer.kv_pages import PAGE
from cpu_kernels.transformer.layer_options import ATTENTION
from tritgguf.architectures.experts import USED_KEY
from tritgguf.diagnostics.grammar_times import grammar_seconds
from tritgguf.diagnostics.kernel_times import KernelTime, decode_launch_seconds, decode_seconds, prefill_times, shares
from tritgguf.errors import TritGgufError
from tritgguf.formats.gguf_file import GgufFile, open_trit_file
from tritgguf.formats.gguf_header import TensorInfo
from tritgguf.formats.trit_types import TritType, is_trit_type
from tritgguf.runtime.config import ModelConfig
from tritgguf.runtime.kv_pool import DEFAULT_CACHE_TYPE, check_cache_fits, page_bytes
from tritgguf.runtime.model import Model
from tritgguf.runtime.single_sequence import SingleSequence
from tritgguf.runtime.weights import ModelWeights

COMPARED_TOKENS, COMPARED_REPETITIONS = 64, 3
"""What `generation_speed` measures."""
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
    cache_bytes_per_token: int
    """What it reads of keys and values, at the middle of the test."""
    read_bandwidth: float
    """Bytes per second that the same threads merely read."""
    prefill_kernels: list[KernelTime]
    decode_kernels: list[KernelTime]
    """Where the time goes; both are empty where that was not asked for."""
    launch_share: float | None
    """Share of a token's time that launching the threads and meeting at barriers takes by itself; None: no decode."""
    prefill_launch_share: float | None
    """The same of a prompt; None also where kernels were not looked at."""
    grammar_seconds: float | None
    """What the constraint of a JSON schema takes for a token; None: no decode, or no llguidance."""

    @property
    def speeds(self) -> list[Speed]:
        """The tests that were run."""
        return [speed for speed in (self.prefill, self.decode) if speed is not None]

    @property
    def decode_rates(self) -> dict[str, float] | None:
        """Decode's trit weights and bytes per second, with keys and values, and the bytes over the read bandwidth."""
        if self.decode is None:
            return None
        bytes_per_second = (self.bytes_per_token + self.cache_bytes_per_token) * self.decode.mean
        return {
            "weights_per_second": self.trit_weights * self.decode.mean,
            "bytes_per_token": self.bytes_per_token,
            "cache_bytes_per_token": self.cache_bytes_per_token,
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
            "launch_share": self.launch_share,
            "prefill_launch_share": self.prefill_launch_share,
            "grammar_seconds": self.grammar_seconds,
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
                ("weights read for a token", f"{rates['bytes_per_token'] / 1e6:.1f} MB"),
                ("keys and values read for a token", f"{rates['cache_bytes_per_token'] / 1e6:.1f} MB"),
                ("read", f"{rates['bytes_per_second'] / 1e9:.1f} GB/s"),
                ("read bandwidth of these threads", f"{self.read_bandwidth / 1e9:.1f} GB/s"),
                ("share of the read bandwidth", f"{rates['share_of_read_bandwidth']:.0%}"),
            ]
            if self.launch_share is not None:
                rows.append(("thread launch and barriers, of a token", f"{self.launch_share:.1%}"))
            if self.grammar_seconds is not None and self.decode is not None:
                rows.append(("JSON schema, added to a token", f"{self.grammar_seconds * self.decode.mean:.1%}"))
            tables.append((f"decode: {self.decode.test if self.decode else ''}", ("", ">"), rows))
        for title, kernels in (("one prompt", self.prefill_kernels), ("one token", self.decode_kernels)):
            if kernels:
                rows = [(k.kernel, f"{1e3 * k.seconds:.3f}", f"{k.share:.1%}") for k in kernels]
                tables.append((f"time of {title} by kernel", ("kernel", ">ms", ">share"), rows))
        return tables


def bench(
    path: str | Path,
    *,
    prompt_tokens: int = 512,
    generated_tokens: int = 128,
    depth: int = 0,
    threads: int | None = None,
    repetitions: int = 5,
    prefill_bits: int = 8,
    cache_type: str = DEFAULT_CACHE_TYPE,
    isa: str | None = None,
    by_kernel: bool = True,
    on_compilation: Callable[[], None] | None = None,
) -> BenchReport:
    """Measure a trit file's prefill and decode.

    Args:
        path: the file.
        prompt_tokens, generated_tokens: length of the two tests; 0 leaves one out.
        depth: tokens in the cache before each test.
        threads: None for the physical cores.
        repetitions: how often each test is run, after a warm-up that is not counted.
        prefill_bits: of the prompt's activations, 8 or 16.
        cache_type: what keys and values are kept in, "f16", "f32" or "q8_0".
        isa: the instruction set, such as "avx2"; None for the best that works here.
        by_kernel: whether to measure the kernels too, which takes as long again.
        on_compilation: called if kernels have to be compiled first.

    Raises TritGgufError for a file that cannot be run, and when there is nothing to measure.

    """
    if prompt_tokens + generated_tokens == 0:
        raise TritGgufError("there is nothing to measure; give a number of tokens with -p or -n")
    file, context = open_trit_file(path), depth + max(prompt_tokens, generated_tokens)
    model = Model(file, threads=threads, prefill_bits=prefill_bits, isa=isa)
    sequence = SingleSequence(model, context, cache_type=cache_type)
    check_cache_fits(model.config, context, cache_type, str(file.path))
    tokens = _warm_up(sequence, cache_type, on_compilation or (lambda: None))
    before, prompt, generated = tokens[:depth], tokens[depth:][:prompt_tokens], tokens[depth:][:generated_tokens]
    prefill = _time_prefill(sequence, before, prompt, repetitions) if prompt else None
    decode = _time_decode(sequence, before, generated, repetitions) if generated else None
    config, weights, thread_pool = model.config, ModelWeights(file, model.config), model.thread_pool
    prompt_times, decode_kernels, positions = None, list[KernelTime](), depth + (generated_tokens + 1) // 2
    if prefill is not None and by_kernel:
        prompt_times = prefill_times(config, weights, thread_pool, prompt, depth, repetitions, prefill_bits, cache_type)
    if decode is not None and by_kernel:
        seconds = decode_seconds(config, weights, thread_pool, positions, repetitions, cache_type)
        decode_kernels = shares(seconds, 1 / decode.mean)
    return BenchReport(
        **_facts(file, model),
        cache_bytes_per_token=_cache_bytes_read(config, positions, cache_type),
        prefill=prefill,
        decode=decode,
        read_bandwidth=read_bandwidth(model.thread_pool, repetitions),
        prefill_kernels=[] if prompt_times is None else shares(prompt_times.seconds),
        decode_kernels=decode_kernels,
        launch_share=None if decode is None else decode_launch_seconds(config, weights, thread_pool) * decode.mean,
        prefill_launch_share=None if prompt_times is None else prompt_times.launch_share,
        grammar_seconds=None if decode is None else grammar_seconds(file, model.config.vocab_size),
    )


def generation_speed(path: str | Path, threads: int | None, isa: str | None = None) -> float:
    """Return tokens per second, for a table of files: `bench` without a prompt and all that it measures besides.

    Raises TritGgufError for a file that cannot be run.
    """
    model = Model(open_trit_file(path), threads=threads, isa=isa)
    sequence = SingleSequence(model, COMPARED_TOKENS, cache_type=DEFAULT_CACHE_TYPE)
    tokens = _warm_up(sequence, DEFAULT_CACHE_TYPE, lambda: None)
    return _time_decode(sequence, [], tokens, COMPARED_REPETITIONS).mean


def _facts(file: GgufFile, model: Model) -> dict[str, Any]:
    """Return what a report says about file and machine, before anything is measured."""
    infos = file.tensors.values()
    return {
        "file": file.path,
        "architecture": model.config.dimensions.architecture,
        "types": "+".join(sorted({TritType(info.type_id).name for info in infos if is_trit_type(info.type_id)})),
        "file_bytes": file.path.stat().st_size,
        "weights": sum(info.n_weights for info in infos),
        "trit_weights": trit_weights_per_token(file),
        "bytes_per_token": bytes_read_per_token(file),
        "processor": processor_name(),
        "instruction_set": variants.name_of(len(model.thread_pool.isa)),
        "threads": model.thread_pool.threads,
    }


def _cache_bytes_read(config: ModelConfig, positions: int, cache_type: str) -> int:
    """Return what attention reads of keys and values for a token that sees so many positions."""
    windows = config.layer_options.windows[config.layer_options.kinds == ATTENTION]
    seen = np.where(windows > 0, np.minimum(windows, positions), positions)
    return int(seen.mean() * page_bytes(config, cache_type) / PAGE)


def _warm_up(sequence: SingleSequence, cache_type: str, on_compilation: Callable[[], None]) -> list[int]:
    """Run a sequence until its context is full, and return the random tokens in it.

    Nothing is left to compile, read or allocate then, and cut at any depth, the cache holds what stands before.
    """
    model, context = sequence.model, sequence.context
    model.compile(on_compilation, cache_type=cache_type, batches=False)
    tokens: list[int] = np.random.default_rng(0).integers(0, model.config.vocab_size, context).tolist()
    sequence.forward(tokens)
    _cut(sequence, tokens[:-1])
    sequence.forward(tokens[-1:])
    return tokens


def _cut(sequence: SingleSequence, tokens: list[int]) -> None:
    """Cut a sequence to its first tokens, given as `tokens`; some are evaluated again if it could not go on else."""
    sequence.truncate(sequence.resumable(len(tokens)))
    if missing := tokens[sequence.position :]:
        sequence.forward(missing, generated=False)


def _time_prefill(sequence: SingleSequence, before: list[int], tokens: list[int], repetitions: int) -> Speed:
    """Time a prompt of `tokens` behind others in the cache."""
    seconds = []
    for _ in range(repetitions):
        _cut(sequence, before)
        start = time.perf_counter()
        sequence.forward(tokens)
        seconds.append(time.perf_counter() - start)
    return Speed(_test_name("pp", len(tokens), len(before)), len(tokens), tuple(seconds))


def _time_decode(sequence: SingleSequence, before: list[int], tokens: list[int], repetitions: int) -> Speed:
    """Time tokens behind others in the cache, one after the other."""
    seconds = []
    for _ in range(repetitions):
        _cut(sequence, before)
        start = time.perf_counter()
        for token in tokens:
            sequence.forward([token])
        seconds.append(time.perf_counter() - start)
    return Speed(_test_name("tg", len(tokens), len(before)), len(tokens), tuple(seconds))


def _test_name(test: str, tokens: int, depth: int) -> str:
    return f"{test}{tokens}" + (f" @ d{depth}" if depth else "")


def trit_weights_per_token(file: GgufFile) -> int:
    """Return the weights of the trit tensors that a token multiplies: embeddings only where they are the head."""
    is_looked_up = {"token_embd.weight"} if "output.weight" in file.tensors else set()
    infos = [info for name, info in file.tensors.items() if name not in is_looked_up]
    return sum(_read_by_a_token(file, info, info.n_weights) for info in infos if is_trit_type(info.type_id))


def bytes_read_per_token(file: GgufFile) -> int:
    """Return the bytes of the file that decode reads for one token.

    That is every tensor, but of the embeddings only a row, and of a stack of experts only those that a token uses. Tied
    embeddings are read whole, as the head. The key-value cache is not counted.
    """
    embeddings = file.tensors["token_embd.weight"]
    total = sum(_read_by_a_token(file, info, info.n_bytes) for info in file.tensors.values())
    row = embeddings.n_bytes // embeddings.shape[0]
    return total + row - (embeddings.n_bytes if "output.weight" in file.tensors else 0)


def _read_by_a_token(file: GgufFile, info: TensorInfo, amount: int) -> int:
    """Return an amount of a tensor, or of a stack the share of the experts that a token uses."""
    if info.n_matrices == 1:
        return amount
    used = file.metadata[f"{file.metadata['general.architecture']}.{USED_KEY}"]
    return amount * used // info.n_matrices


def processor_name() -> str:
    """Return the processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model name"))]
    return next(filter(None, names), platform.processor() or platform.machine())
