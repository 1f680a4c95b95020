"""Converting Qwen3.5: from every layout, there and back, and what is left out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from converted_models import as_stock_gguf, assert_no_number_differs
from gguf import GGUFValue, GGUFValueType
from tiny_models import read_config, write_safetensors
from tiny_states import qwen35_weights, write_tiny_qwen35

from tritgguf.conversion.convert import convert
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.sources.open import open_source
from tritgguf.sources.source import SourceTensor

kinds = pytest.mark.parametrize("is_mixture", [False, True])


def tensors_of(path: Path) -> dict[str, bytes]:
    file = GgufFile(path)
    return {name: file.raw(name).tobytes() for name in file.tensors}


@kinds
def test_no_number_differs_after_a_round_trip(tmp_path: Path, is_mixture: bool) -> None:
    assert_no_number_differs(write_tiny_qwen35(tmp_path / "model", is_mixture=is_mixture), tmp_path)


@kinds
def test_a_stock_file_gives_the_same_file(tmp_path: Path, is_mixture: bool) -> None:
    folder = write_tiny_qwen35(tmp_path / "model", is_mixture=is_mixture)
    convert(folder, tmp_path / "a.gguf", encoder="v2")
    stock = as_stock_gguf(open_source(folder), tmp_path / "stock.gguf")
    convert(stock, tmp_path / "b.gguf", encoder="v2")
    first, second = tensors_of(tmp_path / "a.gguf"), tensors_of(tmp_path / "b.gguf")
    assert first.keys() == second.keys()
    assert {name for name in first if first[name] != second[name]} == set()


def test_experts_as_they_are_published(tmp_path: Path) -> None:
    for fused in (False, True):
        folder = write_tiny_qwen35(tmp_path / f"model-{fused}", is_mixture=True, fused=fused)
        convert(folder, tmp_path / f"{fused}.gguf", encoder="v2")
    assert tensors_of(tmp_path / "False.gguf") == tensors_of(tmp_path / "True.gguf")


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    folder = write_tiny_qwen35(tmp_path / "model")
    convert(folder, tmp_path / "a.gguf", encoder="v2")
    weights = qwen35_weights(read_config(folder))
    further = {f"mtp.layers.0.{name}.weight": np.ones((4, 4), np.float32) for name in ("fc", "norm")}
    write_safetensors(folder / "model.safetensors", {**weights, **further}, "F32")
    report = convert(folder, tmp_path / "b.gguf", encoder="v2")
    assert sum("layers that predict further tokens (mtp) are left out" in warning for warning in report.warnings) == 1
    assert tensors_of(tmp_path / "a.gguf") == tensors_of(tmp_path / "b.gguf")


def test_further_layers_of_a_stock_file_are_left_out(tmp_path: Path) -> None:
    """Those that llama.cpp's converter puts behind the others."""
    source = open_source(write_tiny_qwen35(tmp_path / "model"))
    convert(source.name, tmp_path / "a.gguf", encoder="v2")
    further = [SourceTensor(f"blk.4.{name}.weight", (8, 8), 0) for name in ("attn_q", "nextn.eh_proj")]
    names = {tensor.name for tensor in source.tensors}
    longer: Any = SimpleNamespace(
        tensors=[*source.tensors, *further],
        metadata=source.metadata,
        read=lambda name: source.read(name) if name in names else np.ones((8, 8), np.float32),
    )
    keys = {
        "qwen35.block_count": GGUFValue(5, GGUFValueType.UINT32),
        "qwen35.nextn_predict_layers": GGUFValue(1, GGUFValueType.UINT32),
        "qwen35.attention.recurrent_layers": GGUFValue(
            [True, False, True, True, False], GGUFValueType.ARRAY, GGUFValueType.BOOL
        ),
    }
    stock = as_stock_gguf(longer, tmp_path / "stock.gguf", keys)
    report = convert(stock, tmp_path / "b.gguf", encoder="v2")
    assert any("layers that predict further tokens (mtp) are left out" in warning for warning in report.warnings)
    assert tensors_of(tmp_path / "a.gguf") == tensors_of(tmp_path / "b.gguf")
    first, second = (GgufFile(tmp_path / name).metadata for name in ("a.gguf", "b.gguf"))
    assert second == {**first, **{key: second[key] for key in second if key.startswith("general.")}}


@kinds
@pytest.mark.parametrize("encoder", ["best", "v2"])
def test_other_encoders(tmp_path: Path, is_mixture: bool, encoder: str) -> None:
    folder = write_tiny_qwen35(tmp_path / "model", is_mixture=is_mixture)
    report = convert(folder, tmp_path / "out.gguf", encoder=encoder, depth=2)
    assert report.encoder == encoder
    file = GgufFile(tmp_path / "out.gguf")
    packed = {name for name in file.tensors if file.tensors[name].type_name == "TRIT2"}
    assert {f"blk.0.{name}.weight" for name in ("attn_qkv", "attn_gate", "ssm_out")} <= packed
