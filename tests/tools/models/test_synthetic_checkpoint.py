"""The synthetic checkpoint is valid, can be recovered, and takes little disk space."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.models import synthetic_checkpoint
from tools.models.random_model import QKV, with_layers
from tools.models.synthetic_checkpoint import SHAPES, write_checkpoint
from tritgguf.architectures.dimensions import Dimensions
from tritgguf.architectures.experts import Experts
from tritgguf.conversion.convert import convert
from tritgguf.sources.open import open_source

SIZES = Dimensions(layers=2, vocabulary=384, hidden=128, feed_forward=192, heads=4, kv_heads=2, head_dim=32, biased=QKV)


@pytest.mark.parametrize("shard_bytes", [4_000_000_000, 100_000])
def test_the_checkpoint_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int) -> None:
    monkeypatch.setattr(synthetic_checkpoint, "_SHARD_BYTES", shard_bytes)
    monkeypatch.setattr(synthetic_checkpoint, "_RANDOM_WEIGHTS", 1 << 12)
    write_checkpoint(tmp_path / "model", SIZES)
    source = open_source(tmp_path / "model")
    assert source.warnings == []
    assert {tensor.name: tensor.shape for tensor in source.tensors} == SIZES.shapes()
    weights = source.read("blk.1.ffn_up.weight").reshape(-1)
    assert weights[: 1 << 12].std() == pytest.approx(0.02, rel=0.1)
    assert not weights[1 << 12 :].any()
    assert source.read("output_norm.weight").all()


def test_dequantized_trits_are_recovered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic_checkpoint, "_RANDOM_WEIGHTS", 1 << 12)
    write_checkpoint(tmp_path / "model", with_layers(SIZES, 1), dequantized=True)
    report = convert(tmp_path / "model", tmp_path / "out.gguf", encoder="recover")
    assert report.encoder == "recover"
    assert report.depth == 2


def test_the_large_checkpoint_takes_little_room(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", with_layers(SHAPES["qwen2.5-72b"], 1))
    files = [path.stat() for path in (tmp_path / "model").iterdir()]
    assert sum(file.st_size for file in files) > 6_000_000_000
    assert sum(512 * file.st_blocks for file in files) < 200_000_000


def test_a_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic_checkpoint, "_RANDOM_WEIGHTS", 1 << 12)
    monkeypatch.setattr(synthetic_checkpoint, "_RANDOM_WEIGHTS_OF_EXPERT", 1 << 8)
    experts = Experts(count=4, used=2, width=64, normalizes=True)
    sizes = Dimensions(2, 384, 128, 192, 4, 2, 64, architecture="qwen3moe", experts=experts)
    write_checkpoint(tmp_path / "model", sizes)
    source = open_source(tmp_path / "model")
    assert source.warnings == []
    assert {tensor.name: tensor.shape for tensor in source.tensors} == sizes.shapes()
    stack = source.read("blk.1.ffn_up_exps.weight").reshape(4, -1)
    assert stack[:, : 1 << 8].all()
    assert not stack[:, 1 << 8 :].any()
