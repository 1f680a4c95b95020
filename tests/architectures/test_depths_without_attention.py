"""Layers without attention, whose matrices have every depth, against transformers."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

from reference_logits import check_logits

from tools.models import families
from tritgguf.conversion.convert import convert
from tritgguf.formats.gguf_file import GgufFile

PACKED = {
    "lfm2": ("shortconv.in_proj.weight", "shortconv.out_proj.weight"),
    "qwen3.5-moe": ("attn_qkv.weight", "attn_gate.weight", "ssm_out.weight"),
}
FLOAT32 = {
    "lfm2": ("shortconv.conv.weight",),
    "qwen3.5-moe": ("ssm_conv1d.weight", "ssm_alpha.weight", "ssm_beta.weight", "ssm_a", "ssm_dt.bias"),
}


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_logits_at_every_depth(tmp_path: Path, name: str, depth: int) -> None:
    folder = families.write_random_family(tmp_path / "model", name)
    convert(folder, tmp_path / "model.gguf", depth=depth, encoder="v2")
    file = GgufFile(tmp_path / "model.gguf")
    for names, type_name in ((PACKED, f"TRIT{depth}"), (FLOAT32, "F32")):
        assert {file.tensors[f"blk.0.{tensor}"].type_name for tensor in names[name]} == {type_name}
    check_logits(folder, file)
