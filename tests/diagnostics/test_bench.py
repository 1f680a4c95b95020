"""bench: what its figures are made of, on a tiny model; how fast it is nobody checks here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_mixtures import write_tiny_mixture
from tiny_models import write_tiny_model

from cpu_kernels import precompile
from cpu_kernels.threads.bandwidth import BYTES_AHEAD, read, read_bandwidth
from cpu_kernels.threads.thread_pool import ThreadPool
from tritgguf.cli import app
from tritgguf.conversion.convert import convert
from tritgguf.diagnostics.bench import (
    COMPARED_REPETITIONS,
    COMPARED_TOKENS,
    Speed,
    bench,
    bytes_read_per_token,
    generation_speed,
    processor_name,
)
from tritgguf.diagnostics.kernel_times import REST
from tritgguf.errors import TritGgufError
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.runtime.config import ModelConfig
from tritgguf.runtime.single_sequence import SingleSequence

MATRIX_WEIGHTS = 2 * (128 * 128 + 2 * 64 * 128 + 128 * 128 + 3 * 128 * 192)
HEAD_BYTES = 448 * 128 * 2
VECTOR_BYTES = (2 * 2 + 1) * 128 * 4


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    convert(write_tiny_model(folder / "model"), folder / "model.gguf", depth=2, recipe="published")
    return folder / "model.gguf"


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(thread_pool: ThreadPool, repetitions: int) -> float:
        return read_bandwidth(thread_pool, repetitions, buffer_bytes=1 << 20)

    monkeypatch.setattr("tritgguf.diagnostics.bench.read_bandwidth", measure)


def test_speed() -> None:
    speed = Speed("tg100", 100, (1.0, 2.0, 4.0))
    assert speed.rates == [100, 50, 25]
    assert speed.mean == pytest.approx(175 / 3)
    assert speed.spread == pytest.approx(np.std([100, 50, 25], ddof=1))
    assert Speed("tg100", 100, (2.0,)).spread == 0


@pytest.mark.parametrize("ahead", BYTES_AHEAD)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_byte_of_the_buffer_is_read_once(threads: int, ahead: int) -> None:
    for length in (0, 5, 32, 1000):
        buffer = np.arange(length) ** 3
        assert sum(ThreadPool(threads).run(read, buffer, ahead)) == buffer.sum()


@pytest.mark.parametrize(("tied", "expected"), [(False, HEAD_BYTES + 256), (True, HEAD_BYTES + 256)])
def test_a_token_reads_the_matrices_the_head_and_one_embedding(tmp_path: Path, tied: bool, expected: int) -> None:
    folder = write_tiny_model(tmp_path / "model", tie_word_embeddings=tied)
    convert(folder, tmp_path / "model.gguf", depth=2, recipe="published")
    matrices = MATRIX_WEIGHTS * 28 // 64
    assert bytes_read_per_token(GgufFile(tmp_path / "model.gguf")) == matrices + VECTOR_BYTES + expected


@pytest.fixture(scope="module")
def tiny_mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of four experts, of which a token uses two, with a shared expert."""
    folder = tmp_path_factory.mktemp("mixture")
    convert(write_tiny_mixture(folder / "model", "qwen2"), folder / "model.gguf", depth=2)
    return folder / "model.gguf"


def test_a_token_reads_the_experts_that_it_uses(tiny_mixture: Path) -> None:
    file = GgufFile(tiny_mixture)
    embeddings = file.tensors["token_embd.weight"].n_bytes
    used = sum(info.n_bytes // (2 if "_exps." in name else 1) for name, info in file.tensors.items())
    assert bytes_read_per_token(file) == used - embeddings + embeddings // 448


def test_bench_of_a_mixture(tiny_mixture: Path) -> None:
    report = bench(tiny_mixture, prompt_tokens=20, generated_tokens=2, threads=2, repetitions=1)
    assert {"gate, up", "experts' gate, up", "experts' down"} <= {time.kernel for time in report.decode_kernels}
    assert "expert_gemm" in {time.kernel for time in report.prefill_kernels}


def test_bench(tiny_file: Path) -> None:
    report = bench(tiny_file, prompt_tokens=20, generated_tokens=4, depth=3, threads=2, repetitions=2)
    assert [(speed.test, speed.tokens, len(speed.seconds)) for speed in report.speeds] == [
        ("pp20 @ d3", 20, 2),
        ("tg4 @ d3", 4, 2),
    ]
    assert (report.architecture, report.types, report.threads) == ("llama", "TRIT2", 2)
    assert report.trit_weights == MATRIX_WEIGHTS
    assert report.weights == MATRIX_WEIGHTS + HEAD_BYTES + VECTOR_BYTES // 4  # embeddings and head: two bytes a weight
    rates = report.decode_rates
    assert rates is not None
    assert report.decode is not None
    assert report.grammar_seconds is None or report.grammar_seconds > 0
    assert report.as_dict()["grammar_seconds"] == report.grammar_seconds
    assert rates["weights_per_second"] == pytest.approx(MATRIX_WEIGHTS * report.decode.mean)
    sizes = ModelConfig.from_file(GgufFile(tiny_file)).dimensions
    positions, number_bytes = 3 + 2, 2  # at the middle, of float16
    of_a_position = 2 * sizes.layers * sizes.kv_heads * sizes.head_dim * number_bytes
    assert report.cache_bytes_per_token == positions * of_a_position
    read = report.bytes_per_token + report.cache_bytes_per_token
    assert rates["bytes_per_second"] == pytest.approx(read * report.decode.mean)
    assert rates["share_of_read_bandwidth"] == pytest.approx(rates["bytes_per_second"] / report.read_bandwidth)
    assert {kernel.kernel for kernel in report.decode_kernels} == {
        "q, k, v", "attention", "attention output", "gate, up", "down", "head", REST,
    }  # fmt: skip
    assert sum(kernel.seconds for kernel in report.decode_kernels) == pytest.approx(1 / report.decode.mean)
    assert {"trit_gemm", "attend", "gemv", REST} <= {kernel.kernel for kernel in report.prefill_kernels}
    assert all(kernel.seconds > 0 for kernel in report.prefill_kernels)
    for kernels in (report.decode_kernels, report.prefill_kernels):
        assert sum(kernel.share for kernel in kernels) == pytest.approx(1)
    assert report.launch_share is not None
    assert report.launch_share > 0
    assert report.prefill_launch_share is not None
    assert report.prefill_launch_share > 0


def test_both_tests_stand_behind_the_depth(tiny_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    forward = SingleSequence.forward

    def note_and_forward(self: SingleSequence, tokens: list[int]) -> Any:
        calls.append((self.position, len(tokens)))
        return forward(self, tokens)

    monkeypatch.setattr(SingleSequence, "forward", note_and_forward)
    bench(tiny_file, prompt_tokens=6, generated_tokens=2, depth=5, repetitions=2)
    assert calls == [(0, 11), (10, 1), (5, 6), (5, 6), (5, 1), (6, 1), (5, 1), (6, 1)]


def test_kernels_can_be_left_out(tiny_file: Path) -> None:
    report = bench(tiny_file, prompt_tokens=6, generated_tokens=2, repetitions=1, by_kernel=False)
    assert report.prefill_kernels == report.decode_kernels == []
    assert report.launch_share is not None
    assert report.prefill_launch_share is None
    assert len(report.tables()) == 2


def test_a_test_can_be_left_out(tiny_file: Path) -> None:
    decode_only = bench(tiny_file, prompt_tokens=0, generated_tokens=2, repetitions=1)
    assert [speed.test for speed in decode_only.speeds] == ["tg2"]
    assert decode_only.prefill_kernels == []
    prefill_only = bench(tiny_file, prompt_tokens=2, generated_tokens=0, repetitions=1)
    assert [speed.test for speed in prefill_only.speeds] == ["pp2"]
    assert (prefill_only.decode_rates, prefill_only.decode_kernels, prefill_only.launch_share) == (None, [], None)
    assert len(prefill_only.tables()) == 2
    with pytest.raises(TritGgufError, match="nothing to measure"):
        bench(tiny_file, prompt_tokens=0, generated_tokens=0)


def test_the_speed_for_a_table_takes_nothing_else(tiny_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def untouched(*arguments: Any) -> None:
        raise AssertionError("this must not be reached")

    for name in ("read_bandwidth", "grammar_seconds", "decode_launch_seconds"):
        monkeypatch.setattr(f"tritgguf.diagnostics.bench.{name}", untouched)
    calls: list[int] = []
    forward = SingleSequence.forward

    def count(sequence: SingleSequence, tokens: list[int], **options: Any) -> Any:
        calls.append(len(tokens))
        return forward(sequence, tokens, **options)

    monkeypatch.setattr(SingleSequence, "forward", count)
    assert generation_speed(tiny_file, 1) > 0
    assert calls.count(1) >= COMPARED_TOKENS * COMPARED_REPETITIONS


def test_the_instruction_set_can_be_forced(
    tiny_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(precompile.LAZY_VARIABLE, "1")  # few kernels are needed
    arguments = ["bench", str(tiny_file), "-p", "1", "-n", "0", "-r", "1", "--no-kernels", "--json"]
    arguments += ["--cache-type", "f32", "--prefill-bits", "16"]  # the kernels of runtime/test_model.py
    assert app.main([*arguments, "--isa", "portable"]) == 0
    assert json.loads(capsys.readouterr().out)["instruction_set"] == "portable"
    for command in (arguments, ["run", str(tiny_file), "-p", "a"], ["verify", str(tiny_file), str(tiny_file)]):
        assert app.main([*command, "--isa", "sse"]) == 1
        out, err = capsys.readouterr()
        assert out == "" or (command is arguments and "sse" in json.loads(out)["error"]["message"])
        assert re.fullmatch(r"error: instruction set sse is not available here; choose from portable.*\n", err)


def test_the_command(tiny_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", str(tiny_file), "-p", "6", "-n", "3", "-t", "1", "-r", "1"]
    assert app.main(arguments) == 0
    out = capsys.readouterr().out
    for text in (
        processor_name(),
        "llama",
        "TRIT2",
        "pp6",
        "tg3",
        "share of the read bandwidth",
        "thread launch and barriers",
        "trit_gemm",
        "gate, up",
    ):
        assert text in out
    assert app.main([*arguments, "--json"]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert [test["test"] for test in report["tests"]] == ["pp6", "tg3"]
    assert report["tests"][0]["samples"] == [report["tests"][0]["tokens_per_second"]]
    assert report["decode"]["bytes_per_token"] > 0
    assert report["launch_share"] > 0
    assert set(report["kernels"]["decode"][0]) == {"kernel", "seconds", "share"}
