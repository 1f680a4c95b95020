"""Divergences without logits in memory are those of the logits, and costs add up to the divergence of a whole block."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_mixtures import write_tiny_mixture
from tiny_models import write_tiny_model

from cpu_kernels.threads.thread_pool import ThreadPool
from tools.models import families
from tritgguf.architectures.tensor_names import quantized_tensor
from tritgguf.calibration import divergence_costs
from tritgguf.calibration.divergence_costs import PROBED_DEPTH, measure_divergence_costs
from tritgguf.calibration.importance import summed_squares
from tritgguf.calibration.output_divergence import output_divergences
from tritgguf.conversion.convert import convert
from tritgguf.conversion.depths import DepthChoice, parse_rules
from tritgguf.evaluation.divergence import compare_logits, compare_windows
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.reference.decoder_blocks import DecoderBlocks
from tritgguf.reference.model import ReferenceModel
from tritgguf.sources.open import open_source
from tritgguf.sources.source import Source

WINDOWS = np.random.default_rng(0).integers(3, 250, (2, 32)).tolist()
EMBEDDINGS, HEAD = "token_embd.weight", "output.weight"
EPSILON = "llama.attention.layer_norm_rms_epsilon"


def last_hidden(source: Source) -> torch.Tensor:
    """Return the last block's output."""
    blocks = DecoderBlocks(source)
    hidden = blocks.embed(WINDOWS)
    for index in range(blocks.count):
        with blocks.block(index) as block:
            hidden = block.forward(hidden)
    return hidden


def divergence(source: Source, file: Path) -> float:
    """Return the divergence of a file from its source, from all logits of transformers."""
    model = ReferenceModel.open(source)
    expected = [model.logits(window).copy() for window in WINDOWS]
    model.load_file(GgufFile(file))
    return compare_windows(WINDOWS, expected, map(model.logits, WINDOWS)).kl_mean


@pytest.mark.parametrize("family", ["granite", "gemma2", "qwen2", "phimoe"])
@pytest.mark.parametrize("head_depth", [0, 2])
def test_divergence_is_that_of_the_logits(tmp_path: Path, family: str, head_depth: int) -> None:
    """Granite has a scale of logits, Gemma 2 a softcap and tied embeddings, Phi-3.5-MoE a LayerNorm and a bias."""
    source = open_source(families.write_random_family(tmp_path / "model", family))
    out = tmp_path / "out.gguf"
    convert(tmp_path / "model", out, depth=1, recipe="published")
    hidden = last_hidden(open_source(out))
    found = output_divergences(source, last_hidden(source), [(hidden, 0), (hidden, head_depth)], ThreadPool(2))
    assert found[0] == pytest.approx(divergence(source, out), rel=2e-3)
    assert (found[1] == found[0]) == (head_depth == 0)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt-oss"])
def test_costs(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a dense model, of a mixture with a shared expert, and of experts with biases; a stack counts as one matrix."""
    monkeypatch.setattr(divergence_costs, "_SAMPLED_EXPERTS", 3)
    folder = write_tiny_model(tmp_path / "model") if kind == "llama" else write_tiny_mixture(tmp_path / "model", kind)
    source = open_source(folder)
    tables = [EMBEDDINGS, HEAD]
    names = [tensor.name for tensor in source.tensors if quantized_tensor(tensor.name)]
    steps: list[tuple[int, int]] = []
    depths = [1, 2, 3, 4]
    costs = measure_divergence_costs(
        source, [*names, *tables], depths, WINDOWS, ThreadPool(2), lambda *step: steps.append(step)
    )
    assert set(costs) == {*names, *tables}
    assert steps == [(1, 2), (2, 2)]
    for of_depths in costs.values():
        assert of_depths[1] > 2 * of_depths[2] > 4 * of_depths[3] > 8 * of_depths[4] > 0
    sums, counts = summed_squares(source, WINDOWS)
    importance = {name: (total / counts[name]).astype(np.float32) for name, total in sums.items() if counts[name]}
    for block in (0, 1):
        out = tmp_path / f"{block}.gguf"
        choice = DepthChoice(tuple(parse_rules(f"blk.{1 - block}.*=0")))
        convert(folder, out, depth=PROBED_DEPTH, importance=importance, choice=choice, recipe="published")
        whole = sum(costs[name][PROBED_DEPTH] for name in names if name.startswith(f"blk.{block}."))
        assert whole == pytest.approx(divergence(source, out), rel=0.02)


def test_of_a_stack_the_sample_stands_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(write_tiny_mixture(tmp_path / "model"))
    name = "blk.1.ffn_down_exps.weight"
    found = {}
    for experts in (1, 4):
        monkeypatch.setattr(divergence_costs, "_SAMPLED_EXPERTS", experts)
        found[experts] = measure_divergence_costs(source, [name], [1, 2, 3], WINDOWS, ThreadPool(2))[name]
    assert found[1][2] == found[4][2]
    for depth in (1, 3):
        assert found[1][depth] == pytest.approx(found[4][depth], rel=0.2)
        assert found[1][depth] != found[4][depth]


def test_only_what_is_asked_for_is_measured(tmp_path: Path) -> None:
    source = open_source(write_tiny_model(tmp_path / "model"))
    costs = measure_divergence_costs(source, ["blk.1.ffn_up.weight", HEAD], [3], WINDOWS, ThreadPool(2))
    assert {name: list(of_depths) for name, of_depths in costs.items()} == {"blk.1.ffn_up.weight": [3], HEAD: [3]}


@pytest.mark.parametrize("size", [1e-3, 0.1, 3.0, 200.0])
def test_small_and_large_divergences(tmp_path: Path, size: float) -> None:
    """Of random hidden states, against all logits in float64."""
    source = open_source(write_tiny_model(tmp_path / "model"))
    random = np.random.default_rng(0)
    hidden = random.standard_normal((2, 8, 128)).astype(np.float32)
    changed = hidden + (size * random.standard_normal(hidden.shape)).astype(np.float32)

    def logits(states: np.ndarray) -> np.ndarray:
        rows = states.reshape(-1, 128).astype(np.float64)
        rows /= np.sqrt((rows**2).mean(-1, keepdims=True) + source.metadata[EPSILON].value)
        return rows * source.read("output_norm.weight") @ source.read(HEAD).T.astype(np.float64)

    expected = compare_logits(logits(hidden), logits(changed), []).kl_mean
    found = output_divergences(source, torch.from_numpy(hidden), [(torch.from_numpy(changed), 0)], ThreadPool(2))
    assert found[0] == pytest.approx(expected, rel=1e-2)
