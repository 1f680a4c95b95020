"""Sensitivities are the block's own errors, and measuring leaves the block unchanged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import write_tiny_model

from cpu_kernels.threads.thread_pool import ThreadPool
from tritgguf.architectures.tensor_names import quantized_tensor
from tritgguf.calibration import sensitivity
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


@pytest.fixture
def on_first_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "_FIRST_SHARE", 2 / 32)


@pytest.mark.usefixtures("on_first_tokens")
def test_what_is_near_a_threshold_is_measured_on_all_tokens(tmp_path: Path) -> None:
    source = open_source(str(write_tiny_model(tmp_path / "model")))
    names = [tensor.name for tensor in source.tensors if quantized_tensor(tensor.name)]

    def measured(*thresholds: float) -> dict[str, float]:
        found = measure_sensitivities(source, names, [2], WINDOWS, ThreadPool(2), thresholds=thresholds)
        return {name: costs[2] for name, costs in found.items()}

    exact, first = measured(), measured(1e9)
    assert all(first[name] != exact[name] for name in names)
    threshold = sorted(first.values())[len(names) // 2]
    near = {name for name in names if 1 / sensitivity._NEAR <= first[name] / threshold < sensitivity._NEAR}
    assert 0 < len(near) < len(names)
    found = measured(threshold)
    assert {name for name in names if found[name] != first[name]} == near
    assert all(found[name] == pytest.approx(exact[name], rel=1e-5) for name in near)


@pytest.mark.usefixtures("on_first_tokens")
def test_a_decision_does_not_depend_on_other_thresholds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "_NEAR", 1.02)  # less than what the first two tokens of a window are off
    source = open_source(str(write_tiny_model(tmp_path / "model")))
    names = [tensor.name for tensor in source.tensors if quantized_tensor(tensor.name)]

    def measured(*thresholds: float) -> dict[str, float]:
        found = measure_sensitivities(source, names, [2], WINDOWS, ThreadPool(2), thresholds=thresholds)
        return {name: costs[2] for name, costs in found.items()}

    first = measured(1e9)
    thresholds = [1.05 * first[name] for name in names]
    for threshold in thresholds[::3]:
        alone, together = measured(threshold), measured(*thresholds, *first.values())
        assert [alone[name] < threshold for name in names] == [together[name] < threshold for name in names]
