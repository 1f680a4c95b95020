"""The comparison of bandwidths: both readers read every byte."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from cpu_kernels.simd import instruction_set
from cpu_kernels.threads.bandwidth import BYTES_AHEAD
from cpu_kernels.transformer.projection import Matrix
from tools.speed.compare_bandwidth import compare, compiled
from tritgguf.errors import TritGgufError

needs_gcc = pytest.mark.skipif(
    shutil.which("gcc") is None or "avx2" not in instruction_set.features(), reason="needs gcc and AVX2"
)


@needs_gcc
@pytest.mark.parametrize("threads", [1, 3])
def test_each_reader_has_its_turns(tmp_path: Path, threads: int) -> None:
    matrices = {"halves": Matrix(np.zeros(2 * 8 * 64, np.uint8), 8, 64, 0)}
    rates = compare(compiled(tmp_path), threads, turns=2, n_bytes=1 << 20, matrices=matrices)
    assert len(rates) == 1 + len(BYTES_AHEAD) + len(matrices)
    assert all(len(values) == 2 and min(values) > 0 for values in rates.values())


@needs_gcc
def test_a_reader_that_skips_bytes_is_found_out() -> None:
    with pytest.raises(RuntimeError, match="C read"):
        compare(lambda address, n_bytes: 0, threads=1, turns=1, n_bytes=1 << 16, matrices={})


def test_a_missing_compiler_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TritGgufError, match="needs gcc and AVX2"):
        compiled(tmp_path)
