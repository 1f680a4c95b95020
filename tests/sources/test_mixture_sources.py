"""Checkpoints of mixtures of experts: every layout gives the same tensors, read one matrix at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from converted_models import as_stock_gguf
from gguf import GGMLQuantizationType
from source_checks import fails
from tiny_mixtures import EXPERTS, KINDS, mixture_config, mixture_weights, random_experts, write_tiny_mixture
from tiny_models import write_shards

from tritgguf.formats.dtypes import to_float32
from tritgguf.sources.open import open_source

Weights = dict[str, np.ndarray]
GATE_1_3 = "model.layers.1.mlp.experts.3.gate_proj.weight"


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_gives_the_same_stacks(tmp_path: Path, kind: str, fused: bool) -> None:
    source = open_source(write_tiny_mixture(tmp_path / "model", kind, fused=fused, dtype="F32"))
    shapes = {tensor.name: tensor.shape for tensor in source.tensors}
    for layer in range(2):
        for name, expected in random_experts(mixture_config(kind), layer).items():
            full_name = f"blk.{layer}.{name}.weight"
            assert shapes[full_name] == expected.shape
            np.testing.assert_array_equal(source.read(full_name), expected)
            for expert in range(EXPERTS):
                rows = source.rows(f"{full_name}[{expert}]")
                np.testing.assert_array_equal(rows.whole(), expected[expert])
                np.testing.assert_array_equal(rows.read(32, 64), expected[expert, 32:64])


@pytest.mark.parametrize("kind", ["qwen2", "granite"])
def test_shared_experts(tmp_path: Path, kind: str) -> None:
    source = open_source(write_tiny_mixture(tmp_path / "model", kind, dtype="F32"))
    stored = mixture_weights(kind, mixture_config(kind))
    prefix = "model.layers.1."
    if kind == "qwen2":
        up = stored[f"{prefix}mlp.shared_expert.up_proj.weight"]
        router = stored[f"{prefix}mlp.shared_expert_gate.weight"]
        np.testing.assert_array_equal(source.read("blk.1.ffn_gate_inp_shexp.weight"), router[0])
    else:
        up = stored[f"{prefix}shared_mlp.input_linear.weight"][64:]
    np.testing.assert_array_equal(source.read("blk.1.ffn_up_shexp.weight"), up)


@pytest.mark.parametrize("name", ["F32", "F16", "Q8_0", "MXFP4"])
def test_a_stock_file_is_read_one_expert_at_a_time(tmp_path: Path, name: str) -> None:
    folder = open_source(write_tiny_mixture(tmp_path / "model"))
    stock = as_stock_gguf(folder, tmp_path / "stock.gguf", matrices=GGMLQuantizationType[name])
    source = open_source(stock)
    tensor = "blk.1.ffn_down_exps.weight"
    whole = source.read(tensor)
    assert whole.shape == (EXPERTS, 128, 64)
    if name in ("F32", "F16"):
        np.testing.assert_array_equal(whole, folder.read(tensor))
    for expert in range(EXPERTS):
        np.testing.assert_array_equal(to_float32(source.rows(f"{tensor}[{expert}]").whole()), whole[expert])
        assert source.packed(f"{tensor}[{expert}]") is None
        source.release(f"{tensor}[{expert}]")
    assert source.packed_depth(tensor) is None


def _without(name: str) -> Callable[[Weights], None]:
    def remove(weights: Weights) -> None:
        del weights[name]

    return remove


def _renamed(name: str, new_name: str) -> Callable[[Weights], None]:
    return lambda weights: weights.update({new_name: weights.pop(name)})


def _replaced(name: str, shape: tuple[int, ...]) -> Callable[[Weights], None]:
    return lambda weights: weights.update({name: np.zeros(shape, np.float32)})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without(GATE_1_3), r"tensor model\.layers\.1\.mlp\.experts\.3\.gate_proj\.weight is missing"),
        (_renamed(GATE_1_3, GATE_1_3.replace("experts.3", "experts.4")), r"experts\.3\.gate_proj\.weight is missing"),
        (_renamed(GATE_1_3, GATE_1_3.replace("experts.3", "experts.03")), r"experts\.03\..* does not belong"),
        (_renamed(GATE_1_3, GATE_1_3.replace("experts.3", "experts.-1")), "does not belong"),
        (_replaced(GATE_1_3.replace("experts.3", "experts.4"), (64, 128)), r"has shape \(5, 64, 128\)"),
        (_replaced(GATE_1_3, (65, 128)), r"experts\.3\.gate_proj\.weight has shape \(65, 128\), but the config"),
        (_replaced("model.layers.1.mlp.gate.weight", (5, 128)), r"mlp\.gate\.weight has shape \(5, 128\)"),
        (_replaced("model.layers.1.mlp.experts.down_proj", (4, 128, 64)), "has the same weights as"),
        (_replaced("model.layers.1.mlp.up_proj.weight", (192, 128)), "does not belong"),
    ],
)
def test_damaged_experts_are_named(tmp_path: Path, damage: Callable[[Weights], None], message: str) -> None:
    folder = write_tiny_mixture(tmp_path / "model")
    weights = mixture_weights("qwen3", mixture_config("qwen3"))
    damage(weights)
    write_shards(folder, weights, "F16")
    fails(folder, message)


@pytest.mark.parametrize("shape", [(4, 129, 128), (5, 128, 128), (4, 128, 64), (4, 128), (512, 128)])
def test_fused_experts_of_a_wrong_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    folder = write_tiny_mixture(tmp_path / "model", fused=True)
    weights = mixture_weights("qwen3", mixture_config("qwen3"), fused=True)
    weights["model.layers.0.mlp.experts.gate_up_proj"] = np.zeros(shape, np.float32)
    write_shards(folder, weights, "F16")
    fails(folder, r"gate_up_proj \(upper half of the rows\) has shape .*but the config requires")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5, but there are only 4 experts"),
        ({"num_experts": 1 << 40}, "num_experts is 1099511627776"),
        ({"num_experts": -1}, "num_experts is -1"),
        ({"num_experts": "4"}, "num_experts is '4'"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size is 0"),
        ({"mlp_only_layers": [0]}, "layers without experts"),
        ({"decoder_sparse_step": 2}, "layers without experts"),
        ({"num_experts": 8}, r"experts\.4\.\w+_proj\.weight is missing"),
    ],
)
def test_impossible_experts_of_a_config(tmp_path: Path, entries: dict[str, Any], message: str) -> None:
    folder = write_tiny_mixture(tmp_path / "model")
    config = mixture_config("qwen3", **entries)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    fails(folder, message)
