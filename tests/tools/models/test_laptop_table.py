"""The sizes of models that are computed from their shapes: those of the file that is written, and known totals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_mixtures import KINDS, write_tiny_mixture
from tiny_models import read_config

from tools.models.laptop_table import CONFIGS, sizes_of
from tritgguf.conversion.convert import convert
from tritgguf.formats.gguf_file import GgufFile

PARAMETERS = {  # billions, as their makers say
    "Qwen3-4B": 4.02,
    "OLMoE-1B-7B": 6.92,
    "Llama-3.1-8B": 8.03,
    "Qwen3-8B": 8.19,
    "Qwen3-14B": 14.77,
    "gpt-oss-20b": 20.91,
    "Qwen3-30B-A3B": 30.53,
    "Qwen3-32B": 32.76,
    "Mixtral-8x7B": 46.70,
    "gpt-oss-120b": 116.83,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_the_published_model(name: str) -> None:
    assert sizes_of(name, CONFIGS[name], 2).parameters / 1e9 == pytest.approx(PARAMETERS[name], abs=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_the_file(tmp_path: Path, kind: str) -> None:
    folder = write_tiny_mixture(tmp_path / "model", kind)
    convert(folder, tmp_path / "model.gguf", depth=2, encoder="v2")
    tensors = GgufFile(tmp_path / "model.gguf").tensors.values()
    sizes = sizes_of("tiny", read_config(folder), 2)
    assert sizes.file_bytes == sum(info.n_bytes for info in tensors)
    assert sizes.parameters == sum(int(np.prod(info.shape)) for info in tensors)
    stacks = sum(info.n_bytes for info in tensors if "_exps." in info.name)
    embeddings = next(info for info in tensors if info.name == "token_embd.weight")
    read = sizes.file_bytes - stacks // 2 - embeddings.n_bytes + embeddings.n_bytes // embeddings.shape[0]
    assert sizes.token_bytes == read  # two of four experts, one row of the embeddings


def test_a_mixture_reads_less_than_a_dense_model_of_its_size() -> None:
    mixture, dense = (sizes_of(name, CONFIGS[name], 2) for name in ("Qwen3-30B-A3B", "Qwen3-32B"))
    assert mixture.laptop == 16
    assert dense.laptop == 32
    assert mixture.token_bytes < dense.token_bytes / 8
