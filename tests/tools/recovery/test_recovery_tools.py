"""The tools of docs/recovery.md: their counts, and that they detect differences."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_mixtures import write_tiny_mixture
from tiny_models import random_weights, read_config, write_shards, write_tiny_model

from tools.recovery import differing_numbers, recover_roundtrip, simulated_producer
from tritgguf.conversion.convert import convert
from tritgguf.exporters.export import export
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.quantization.quantized_matrix import QuantizedMatrix
from tritgguf.quantization.recover import recover_matrix

Output = pytest.CaptureFixture[str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> Callable[..., str]:
    """Return a function that runs a tool with arguments and returns what it printed."""

    def run_tool(main: Callable[[], None], *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["tool", *map(str, arguments)])
        main()
        return capsys.readouterr().out

    return run_tool


def test_producer(run: Callable[..., str]) -> None:
    lines = run(simulated_producer.main, "--matrices", 60, "--only", "all levels, log-spaced").splitlines()
    table = {line[:46].strip(): line[46:].split() for line in lines}
    assert table["scale / h * level                   float16"] == ["1/1", "1/1", "1/1", "1/1", "0"]
    assert table["level / h * scale                   float16"] == ["1/1", "1/1", "0/1", "0/1", "0"]
    assert len(lines) == 17


def test_roundtrip(run: Callable[..., str], tiny_trit_file: Callable[..., GgufFile]) -> None:
    printed = run(recover_roundtrip.main, tiny_trit_file("llama", 3).path)
    assert "recovered 14 at depth 3; no exact fit 0; differing numbers 0 of" in printed


def test_roundtrip_of_a_mixture(run: Callable[..., str], tmp_path: Path) -> None:
    convert(write_tiny_mixture(tmp_path / "model"), tmp_path / "out.gguf", depth=2, recipe="published")
    printed = run(recover_roundtrip.main, tmp_path / "out.gguf")
    assert "recovered 32 at depth 2; no exact fit 0; differing numbers 0 of" in printed
    export(tmp_path / "out.gguf", tmp_path / "hf", to="hf")
    assert printed.partition("\n")[0] in run(recover_roundtrip.main, tmp_path / "hf")


def test_roundtrip_notices(
    run: Callable[..., str], tiny_trit_file: Callable[..., GgufFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    def recover_wrongly(weights: np.ndarray, thread_pool: object) -> object:
        matrix = recover_matrix(weights)
        assert isinstance(matrix, QuantizedMatrix)
        matrix.levels[0, 0] ^= 1
        return matrix

    monkeypatch.setattr(recover_roundtrip, "recover_matrix", recover_wrongly)
    assert "differing numbers 14 of" in run(recover_roundtrip.main, tiny_trit_file("llama", 3).path)


def test_roundtrip_of_a_folder(run: Callable[..., str], tmp_path: Path) -> None:
    lines = run(recover_roundtrip.main, write_tiny_model(tmp_path / "model")).splitlines()
    assert lines[0].startswith("blk.0.ffn_down.weight has a group of weights")
    assert "recovered none; no exact fit 14" in lines[-2]


def test_differing_numbers(run: Callable[..., str], tmp_path: Path) -> None:
    first, second = (write_tiny_model(tmp_path / name) for name in ("first", "second"))
    weights = random_weights(read_config(second))
    weights["model.norm.weight"][:3] = 2, -0.0, 0
    write_shards(first, weights, "F16")
    weights["model.norm.weight"][:3] = 3, 0, 0
    write_shards(second, weights, "F16", shards=2)
    (second / "model.safetensors").unlink()
    assert "numbers, 1 differ, 2 in any bit" in run(differing_numbers.main, first, second)
