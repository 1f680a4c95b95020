"""Where a benchmark says that the time goes; how fast it is nobody checks here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cpu_kernels.threads.thread_pool import ThreadPool
from tritgguf.diagnostics import kernel_times
from tritgguf.diagnostics.kernel_times import (
    REST,
    KernelTime,
    barriers_per_token,
    decode_seconds,
    launch_seconds,
    prefill_times,
    shares,
)
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.runtime.config import ModelConfig
from tritgguf.runtime.weights import ModelWeights


def test_shares_add_up_to_one_with_the_rest_at_the_end() -> None:
    kernels = shares({"a": 0.1, REST: 0.2, "b": 0.5})
    assert [kernel.kernel for kernel in kernels] == ["b", "a", REST]
    assert [kernel.share for kernel in kernels] == pytest.approx([0.625, 0.125, 0.25])
    assert [kernel.seconds for kernel in kernels] == pytest.approx([0.5, 0.1, 0.2])


def test_shares_of_a_known_whole() -> None:
    assert shares({"a": 1.0, "b": 2.0}, 4.0) == [
        KernelTime("b", 2.0, 0.5),
        KernelTime("a", 1.0, 0.25),
        KernelTime(REST, 1.0, 0.25),
    ]
    assert shares({}) == []


def test_empty_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    thread_pool = ThreadPool(2)
    monkeypatch.setattr(thread_pool, "run", lambda kernel, *arguments: calls.append((kernel.__name__, arguments[1])))
    assert launch_seconds(thread_pool, 3, 7, repetitions=2) >= 0
    assert calls == [("repeat_barrier", 7)] * 9


@pytest.mark.parametrize(("threads", "waits"), [(1, False), (2, True), (3, True)])
def test_barriers_of_a_token(tiny_trit_file: Callable[..., GgufFile], threads: int, waits: bool) -> None:
    file = tiny_trit_file()
    config = ModelConfig.from_file(file)
    barriers = barriers_per_token(config, ModelWeights(file, config), threads)
    # At least once after q, k, v, after attention, after gate and up and after down, and never twice in a row.
    layers = config.dimensions.layers
    assert (4 * layers <= barriers <= 8 * layers) if waits else barriers == 0


def test_a_model_with_convolutions_is_divided_by_kind_of_layer(tiny_lfm2_file: GgufFile) -> None:
    config = ModelConfig.from_file(tiny_lfm2_file)
    weights = ModelWeights(tiny_lfm2_file, config)
    seconds = decode_seconds(config, weights, ThreadPool(2), 20, repetitions=2)
    assert list(seconds) == [
        "q, k, v", "attention", "attention output", "convolution input", "convolution", "convolution output",
        "gate, up", "down", "head",
    ]  # fmt: skip
    assert "convolve_tokens" in prefill_times(config, weights, ThreadPool(2), [1, 2], 4, repetitions=1, bits=8).seconds


def test_a_model_with_states_is_divided_by_kind_of_layer(tiny_qwen35_file: GgufFile) -> None:
    config = ModelConfig.from_file(tiny_qwen35_file)
    weights = ModelWeights(tiny_qwen35_file, config)
    seconds = decode_seconds(config, weights, ThreadPool(2), 20, repetitions=2)
    assert list(seconds) == [
        "q, k, v", "attention", "attention output", "state input", "state", "state output", "gate, up", "down", "head",
    ]  # fmt: skip
    prefill = prefill_times(config, weights, ThreadPool(2), [1, 2], 4, repetitions=1, bits=8).seconds
    assert {"prepare_tokens", "mix_tokens"} <= set(prefill)


def test_launches_of_a_prompt(tiny_trit_file: Callable[..., GgufFile], monkeypatch: pytest.MonkeyPatch) -> None:
    file = tiny_trit_file()
    config = ModelConfig.from_file(file)
    launches = []

    def launch_seconds(thread_pool: ThreadPool, count: int, barriers: int, repetitions: int) -> float:
        launches.append(count)
        return 0.5

    monkeypatch.setattr(kernel_times, "launch_seconds", launch_seconds)
    times = prefill_times(config, ModelWeights(file, config), ThreadPool(2), [1, 2, 3], 4, repetitions=2, bits=8)
    assert launches[0] >= 7 * config.dimensions.layers
    assert {"trit_gemm", REST} <= set(times.seconds)
    assert times.launch_share == pytest.approx(0.5 / sum(times.seconds.values()))
