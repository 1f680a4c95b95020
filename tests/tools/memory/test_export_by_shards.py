"""Shards that are exported, compared and removed one after the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tools.memory import export_by_shards as tool
from tools.memory.export_by_shards import export_by_shards
from tools.models import synthetic_checkpoint
from tools.models.synthetic_checkpoint import write_checkpoint
from tritgguf.architectures.dimensions import Dimensions
from tritgguf.architectures.experts import Experts
from tritgguf.conversion.convert import convert
from tritgguf.errors import TritGgufError
from tritgguf.exporters.hf_folder import HuggingFaceFolder
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.formats.safetensors_writer import Shard

Files = Callable[..., GgufFile]


@pytest.mark.parametrize("variant", ["qwen2", "llama", "mistral"])
def test_every_weight_is_compared_and_nothing_stays(
    tiny_trit_file: Files, variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "_WEIGHTS_AT_ONCE", 1 << 13)
    file = tiny_trit_file(variant, 2)
    shards = list(export_by_shards(file, tmp_path, 100_000))
    assert len(shards) > 2
    assert sum(weights for _, _, weights in shards) == sum(info.n_weights for info in file.tensors.values())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", [-1, -2])
def test_a_weight_that_differs_ends_it(
    tiny_trit_file: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    write = HuggingFaceFolder.write_shard

    def damaging(self: HuggingFaceFolder, folder: Path, shard: Shard) -> None:
        write(self, folder, shard)
        content = bytearray((folder / shard.file_name).read_bytes())
        content[place] ^= 1
        (folder / shard.file_name).write_bytes(content)

    monkeypatch.setattr(HuggingFaceFolder, "write_shard", damaging)
    with pytest.raises(TritGgufError, match=r"1 of \d+ weights from row \d+ on differ"):
        list(export_by_shards(tiny_trit_file("qwen2", 2), tmp_path, 100_000))
    assert list(tmp_path.iterdir()) == []


def test_a_mixture_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic_checkpoint, "_RANDOM_WEIGHTS_OF_EXPERT", 1 << 8)
    experts = Experts(count=4, used=2, width=64, normalizes=True)
    write_checkpoint(
        tmp_path / "model", Dimensions(1, 384, 128, 192, 4, 2, 64, architecture="qwen3moe", experts=experts)
    )
    convert(tmp_path / "model", tmp_path / "d2.gguf", depth=2, encoder="v2")
    with pytest.raises(TritGgufError, match="dense models only"):
        list(export_by_shards(GgufFile(tmp_path / "d2.gguf"), tmp_path, 1 << 30))
