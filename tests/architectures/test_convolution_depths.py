"""Short convolutions whose matrices have every depth, against transformers."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

from reference_logits import check_logits

from tools.models import families
from tritgguf.conversion.convert import convert
from tritgguf.formats.gguf_file import GgufFile


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_logits_at_every_depth(tmp_path: Path, depth: int) -> None:
    folder = families.write_random_family(tmp_path / "model", "lfm2")
    convert(folder, tmp_path / "model.gguf", depth=depth, encoder="v2")
    file = GgufFile(tmp_path / "model.gguf")
    names = [f"blk.0.shortconv.{name}.weight" for name in ("in_proj", "out_proj", "conv")]
    assert [file.tensors[name].type_name for name in names] == [f"TRIT{depth}", f"TRIT{depth}", "F32"]
    check_logits(folder, file)
