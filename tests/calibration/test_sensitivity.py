"""Sensitivities are the block's own errors, and measuring leaves the block unchanged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import write_tiny_model

from cpu_kernels.threads.thread_pool import ThreadPool
from tritgguf.architectures.tensor_names import quantized_tensor
from tritgguf.calibration.importance import summed_squares
from tritgguf.calibration.sensitivity import measure_sensitivities
from tritgguf.formats.matrix_rows import MatrixRows
from tritgguf.quantization.scale_search import quantize_searched
from tritgguf.reference.decoder_blocks import DecoderBlocks
from tritgguf.sources.open import open_source

WINDOWS = np.random.default_rng(0).integers(3, 400, (4, 32)).tolist()


@pytest.mark.parametrize("variant", ["llama", "qwen2"])
def test_each_trit_costs_less(tmp_path: Path, variant: str) -> None:
    source = open_source(str(write_tiny_model(tmp_path / "model", variant)))
    names = [tensor.name for tensor in source.tensors if quantized_tensor(tensor.name)]
    steps: list[tuple[int, int]] = []
    found = measure_sensitivities(source, names, [1, 2, 3, 4], WINDOWS, ThreadPool(2), lambda *step: steps.append(step))
    assert list(found) and set(found) == set(names)
    assert steps == [(1, 2), (2, 2)]
    for costs in found.values():
        assert costs[1] > 3 * costs[2] > 9 * costs[3] > 27 * costs[4] > 0


@pytest.mark.parametrize("name", ["blk.0.attn_q.weight", "blk.1.ffn_down.weight"])
def test_cost_is_the_relative_error_of_the_block(tmp_path: Path, name: str) -> None:
    source = open_source(str(write_tiny_model(tmp_path / "model")))
    found = measure_sensitivities(source, [name], [3, 2], WINDOWS, ThreadPool(2))
    assert set(found) == {name}
    importance = summed_squares(source, WINDOWS)[0][name] / (4 * 32)
    blocks = DecoderBlocks(source)
    hidden = blocks.embed(WINDOWS)
    for index in range(int(name.split(".")[1])):
        with blocks.block(index) as block:
            hidden = block.forward(hidden)
    for depth in (2, 3):
        with blocks.block(int(name.split(".")[1])) as block:
            expected = block.forward(hidden)
            matrix = MatrixRows.of(source.read(name))
            (quantized,) = quantize_searched(
                matrix, depth, ThreadPool(2), importance=importance.astype(np.float32)
            ).parts
            block.set(name, quantized.decoded())
            error = torch.square(block.forward(hidden) - expected).sum(-1) / torch.square(expected).sum(-1)
        assert found[name][depth] == pytest.approx(float(error.mean()), rel=0.05)
