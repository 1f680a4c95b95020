"""Files of random blocks: gguf-py reads weights of the right size from them, and they are the same every time."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
from gguf import GGMLQuantizationType as Type

from tools.models.random_block_model import write_block_model
from tritgguf.architectures.dimensions import Dimensions
from tritgguf.architectures.experts import Experts

MIXTURE = Dimensions(
    2, 300, 256, 512, 4, 2, 64, architecture="qwen3moe", experts=Experts(count=4, used=2, width=256, normalizes=True)
)


@pytest.mark.parametrize("type_id", [Type.Q4_0, Type.Q3_K, Type.Q5_K])
def test_a_mixture_of_random_blocks(tmp_path: Path, type_id: Type) -> None:
    for name in ("one.gguf", "two.gguf"):
        write_block_model(tmp_path / name, "qwen3moe", MIXTURE, type_id)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "one.gguf").tensors}
    assert {name: tuple(tensor.shape[::-1]) for name, tensor in tensors.items()} == MIXTURE.shapes()
    for name in ("blk.1.ffn_down_exps.weight", "blk.0.attn_q.weight"):
        assert tensors[name].tensor_type == type_id
        weights = gguf.dequantize(tensors[name].data, type_id)
        assert weights.std() == pytest.approx(256**-0.5, rel=0.2)
    assert tensors["blk.1.ffn_gate_inp.weight"].tensor_type == Type.F32
    assert tensors["output.weight"].tensor_type == Type.F16
    assert gguf.dequantize(tensors["output.weight"].data, Type.F16).std() == pytest.approx(256**-0.5, rel=0.1)
