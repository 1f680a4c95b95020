"""`verify --layers`: the error of each block and the accumulated error after it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_models import write_tiny_model

from tritgguf.cli import app
from tritgguf.conversion.convert import convert
from tritgguf.conversion.depths import DepthChoice, parse_rules
from tritgguf.evaluation.layer_errors import layer_errors
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.sources.open import open_source

WINDOWS = np.random.default_rng(0).integers(3, 400, (3, 32)).tolist()


@pytest.mark.parametrize("variant", ["llama", "qwen2"])
def test_only_the_quantized_block_has_an_error(tmp_path: Path, variant: str) -> None:
    source = write_tiny_model(tmp_path / "model", variant)
    for block in (0, 1):
        out = tmp_path / f"{block}.gguf"
        convert(source, out, depth=2, choice=DepthChoice(tuple(parse_rules(f"blk.{1 - block}.*=0"))))
        found = layer_errors(open_source(str(source)), GgufFile(out), WINDOWS)
        assert [layer.block for layer in found] == [0, 1]
        assert found[block].own > 0.01
        assert found[1 - block].own < 0.001, "F16 weights of an F16 checkpoint are exact"
        assert found[block].accumulated == pytest.approx(found[block].own)
        assert found[1].accumulated > 0.01
        assert (found[0].accumulated > 0.01) == (block == 0)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = str(write_tiny_model(tmp_path / "model")), str(tmp_path / "out.gguf")
    convert(source, out, depth=3)
    assert app.main(["verify", source, out, "--tokens", "64", "--layers", "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert [layer["block"] for layer in layers] == [0, 1]
    assert 0 < layers[0]["own"] < layers[1]["accumulated"] < 1
    assert app.main(["verify", source, out, "--tokens", "64", "--layers"]) == 0
    assert "of all so far" in capsys.readouterr().out
