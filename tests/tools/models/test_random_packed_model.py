"""Trit files of random code words: as an encoder writes them, of the right size, and the same every time."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from tools.models.random_model import SHAPES, with_layers
from tools.models.random_packed_model import random_words, write_packed_model
from tritgguf.architectures.dimensions import Dimensions
from tritgguf.architectures.experts import Experts
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.formats.integrity import check
from tritgguf.runtime.config import ModelConfig
from tritgguf.sources.open import open_source

MIXTURE = Dimensions(
    2, 300, 128, 192, 4, 2, 64, architecture="qwen3moe", experts=Experts(count=4, used=2, width=64, normalizes=True)
)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_a_packed_mixture(tmp_path: Path, depth: int) -> None:
    for name in ("one.gguf", "two.gguf"):
        write_packed_model(tmp_path / name, "qwen3moe", MIXTURE, depth=depth)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()
    file = GgufFile(tmp_path / "one.gguf")
    assert check(file.path).checksums == len(file.tensors) == len(MIXTURE.shapes())
    assert {name: info.shape for name, info in file.tensors.items()} == MIXTURE.shapes()
    for name in ("blk.1.ffn_down_exps.weight", "blk.0.attn_q.weight"):
        assert file.tensors[name].type_name == f"TRIT{depth}"
        weights = file.read_float32(name)
        assert weights.std() == pytest.approx(weights.shape[-1] ** -0.5, rel=0.05)
        assert abs(weights.mean()) < 0.05 * weights.std()
    assert file.tensors["blk.1.ffn_gate_inp.weight"].type_name == "F32"
    source = open_source(file.path)
    assert {tensor.name: tensor.shape for tensor in source.tensors} == MIXTURE.shapes()


def test_a_packed_model_with_states(tmp_path: Path) -> None:
    """Four layers, the last one with attention; the file runs."""
    sizes = dataclasses.replace(with_layers(SHAPES["qwen3.5-0.8b"][1], 4), vocabulary=300, hidden=64, feed_forward=64)
    write_packed_model(tmp_path / "out.gguf", "qwen35", sizes, depth=2)
    file = GgufFile(tmp_path / "out.gguf")
    assert {name: info.shape for name, info in file.tensors.items()} == sizes.shapes()
    assert (file.read_float32("blk.0.ssm_a") == -1).all()
    assert ModelConfig.from_file(file).state_shape == (3, 3 * 6144 + 16 * 128 * 128)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_every_code_word_occurs(depth: int) -> None:
    words = random_words(1000, 6400, depth, np.random.default_rng(0))
    free = {1: words[:, 0::2], 2: words, 3: words[:, :-100], 4: words[:, :-100]}[depth]
    assert len(np.unique(free)) > 0.99 * 3**10


def test_weights_of_qwen3_30b_a3b() -> None:
    sizes = SHAPES["qwen3-30b-a3b"][1]
    assert sum(math.prod(shape) for shape in sizes.shapes().values()) == 30_532_122_624  # as its model card says
    assert with_layers(sizes, 4).layers == 4
