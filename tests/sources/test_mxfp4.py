"""gpt-oss's checkpoints in MXFP4: every number, the pairing of blocks and scales, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from source_checks import fails
from tiny_mixtures import EXPERTS, mixture_config, mixture_weights
from tiny_models import edit_json, write_safetensors_parts, write_tokenizer

from tritgguf.conversion.convert import convert
from tritgguf.evaluation.verify import verify
from tritgguf.formats.checked import read_json
from tritgguf.sources.open import open_source

Parts = dict[str, tuple[str, np.ndarray]]
PREFIX = "model.layers.1.mlp.experts."


def e2m1(code: int) -> float:
    """Return a number of four bits as the Microscaling specification defines it: sign, two of exponent, one more."""
    exponent, mantissa = code >> 1 & 3, code & 1
    magnitude = mantissa * 0.5 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2)
    return -magnitude if code & 8 else magnitude


def decoded(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return float64 [experts, rows, columns]."""
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], 32)
    numbers = np.array([e2m1(code) for code in range(16)])[codes] * 2.0 ** (scales.astype(float) - 127)[..., np.newaxis]
    return numbers.reshape(*blocks.shape[:2], -1)


def write_mxfp4(folder: Path, change: Callable[[Parts], Any] = lambda parts: None) -> Path:
    """Write a tiny gpt-oss whose experts are random MXFP4; `change` changes its tensors, name -> dtype and array."""
    folder.mkdir()
    config = mixture_config("gpt-oss", quantization_config={"quant_method": "mxfp4"})
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    write_tokenizer(folder, "qwen2")
    generator, parts = np.random.default_rng(0), Parts()
    for name, weights in mixture_weights("gpt-oss", config).items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            parts[name] = ("F32", weights)
            continue
        experts, columns, rows = weights.shape  # transposed
        blocks = generator.integers(0, 256, (experts, rows, columns // 32, 16), np.uint8)
        parts[f"{name}_blocks"] = ("U8", blocks)
        parts[f"{name}_scales"] = ("U8", generator.integers(118, 124, blocks.shape[:3], np.uint8))
    change(parts)
    header: dict[str, Any] = {}
    offset = 0
    for name, (dtype, array) in parts.items():
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    data = b"".join(array.tobytes() for _, array in parts.values())
    write_safetensors_parts(folder / "model.safetensors", header, data)
    return folder


def test_every_number(tmp_path: Path) -> None:
    parts = Parts()
    source = open_source(write_mxfp4(tmp_path / "model", parts.update))
    gate_up = decoded(parts[f"{PREFIX}gate_up_proj_blocks"][1], parts[f"{PREFIX}gate_up_proj_scales"][1])
    down = decoded(parts[f"{PREFIX}down_proj_blocks"][1], parts[f"{PREFIX}down_proj_scales"][1])
    for name, expected in (("gate", gate_up[:, ::2]), ("up", gate_up[:, 1::2]), ("down", down)):
        tensor = f"blk.1.ffn_{name}_exps.weight"
        np.testing.assert_array_equal(source.read(tensor), expected)
        for expert in range(EXPERTS):
            rows = source.rows(f"{tensor}[{expert}]")
            assert rows.dtype == np.float32
            np.testing.assert_array_equal(rows.read(32, 64), expected[expert, 32:64])
    biases = parts[f"{PREFIX}gate_up_proj_bias"][1]
    np.testing.assert_array_equal(source.read("blk.1.ffn_gate_exps.bias"), biases[:, ::2])
    np.testing.assert_array_equal(source.read("blk.1.ffn_up_exps.bias"), biases[:, 1::2])
    n_bytes = {tensor.name: tensor.stored_bytes for tensor in source.tensors}
    assert n_bytes["blk.1.ffn_up_exps.weight"] == EXPERTS * 64 * 128 * 17 // 32


def _without(name: str) -> Callable[[Parts], Any]:
    return lambda parts: parts.pop(PREFIX + name)


def _changed(name: str, dtype: str, array: np.ndarray) -> Callable[[Parts], Any]:
    return lambda parts: parts.update({PREFIX + name: (dtype, array)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("down_proj_scales"), r"down_proj_blocks is without .*down_proj_scales"),
        (_without("gate_up_proj_blocks"), r"gate_up_proj_scales is without .*gate_up_proj_blocks"),
        (_changed("down_proj_scales", "U8", np.zeros((4, 128, 3), np.uint8)), r"\(4, 128, 3\), which is not MXFP4"),
        (_changed("down_proj_scales", "F32", np.zeros((4, 128, 2), np.float32)), "its scales F32"),
        (_changed("down_proj_blocks", "U8", np.zeros((4, 128, 2, 17), np.uint8)), "which is not MXFP4"),
        (_changed("down_proj_blocks", "U8", np.zeros((512, 2, 16), np.uint8)), "which is not MXFP4"),
        (_changed("down_proj", "F32", np.zeros((4, 64, 128), np.float32)), "has the same weights as"),
        (_changed("gate_up_proj_bias", "F32", np.zeros((4, 127), np.float32)), "but the config requires"),
        (_without("gate_up_proj_bias"), r"gate_up_proj_bias is missing"),
        (lambda parts: parts.pop("model.layers.0.self_attn.sinks"), r"self_attn\.sinks is missing"),
        (lambda parts: parts.pop("model.layers.0.self_attn.o_proj.bias"), r"o_proj\.bias is missing"),
        (lambda parts: parts.update({"lm_head.weight_blocks": ("U8", np.zeros((4, 4), np.uint8))}), "is without"),
    ],
)
def test_damaged_checkpoints(tmp_path: Path, change: Callable[[Parts], Any], message: str) -> None:
    fails(write_mxfp4(tmp_path / "model", change), message)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantized .gptq."),
        ({"quantization_config": None}, r"dtype U8|does not belong"),
        ({"swiglu_limit": 8.0}, "swiglu_limit is 8.0, but only 7.0 is supported"),
        ({"attention_bias": False}, r"without biases \(attention_bias\) is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "with truncate is not supported in a GptOss"),
        ({"layer_types": ["full_attention"] * 2}, "layer_types are not those"),
    ],
)
def test_what_a_config_cannot_have(tmp_path: Path, entries: dict[str, Any], message: str) -> None:
    folder = write_mxfp4(tmp_path / "model")
    edit_json(folder / "config.json", **entries)
    fails(folder, message)


def test_mxfp4_of_another_family_is_refused(tmp_path: Path) -> None:
    folder = write_mxfp4(tmp_path / "model")
    config = mixture_config("qwen3", quantization_config=read_json(folder / "config.json")["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    fails(folder, "already quantized .mxfp4.")


def test_transformers_reads_the_same(tmp_path: Path) -> None:
    """The whole way: transformers unpacks the checkpoint by itself, and has the logits of the trit file's weights."""
    pytest.importorskip("torch")
    from tritgguf.reference.model import ReferenceModel

    source = open_source(write_mxfp4(tmp_path / "model"))
    parameters = dict(ReferenceModel.open(source).module.named_parameters())
    stored = parameters[f"{PREFIX}gate_up_proj"].detach().numpy().swapaxes(1, 2)
    np.testing.assert_array_equal(stored[:, ::2], source.read("blk.1.ffn_gate_exps.weight"))
    np.testing.assert_array_equal(stored[:, 1::2], source.read("blk.1.ffn_up_exps.weight"))
    convert(tmp_path / "model", tmp_path / "out.gguf", depth=2)
    assert verify(tmp_path / "model", tmp_path / "out.gguf", tokens=64).max_rel_logit_diff < 1e-5
