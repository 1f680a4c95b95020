"""Models with random weights: they convert and run, are reproducible, and have the sizes of the real ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tools.models.random_model import SHAPES, byte_tokens, write_random_model
from tools.speed.compared_files import check_types
from tritgguf.architectures.dimensions import Dimensions
from tritgguf.conversion.convert import convert
from tritgguf.diagnostics.bench import bench
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.tokenization.tokenizer import Tokenizer

TINY = {
    "qwen2": Dimensions(2, 300, 128, 192, 4, 2, 32, frozenset({"attn_q", "attn_k", "attn_v"})),
    "llama": Dimensions(2, 300, 128, 192, 4, 2, 32),
}


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_the_random_model_converts_and_runs(tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tritgguf.diagnostics.bench.read_bandwidth", lambda thread_pool, repetitions: 1e9)
    source, output = tmp_path / "f16.gguf", tmp_path / "trit3.gguf"
    write_random_model(source, architecture, TINY[architecture])
    assert [path.name for path in tmp_path.iterdir()] == ["f16.gguf"]
    convert(source, output, depth=3)
    check_types(output, "trit3")
    assert bench(output, prompt_tokens=4, generated_tokens=2, repetitions=1).types == "TRIT3"
    tokenizer = Tokenizer(GgufFile(output).metadata, name="random")
    tokens = tokenizer.encode("to the café\n", add_special=False, parse_special=False)
    assert tokenizer.decode(tokens) == "to the café\n"
    assert 256 in tokens  # the only merge


def test_the_random_model_is_always_the_same(tmp_path: Path) -> None:
    for name in ("one.gguf", "two.gguf"):
        write_random_model(tmp_path / name, "qwen2", TINY["qwen2"])
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()
    weights = GgufFile(tmp_path / "one.gguf").read_float32("blk.1.ffn_down.weight")
    assert np.std(weights) == pytest.approx(192**-0.5, rel=0.02)


@pytest.mark.parametrize("vocabulary", [300, SHAPES["qwen2.5-1.5b"][1].vocabulary])
def test_the_vocabulary_has_every_byte_and_no_token_twice(vocabulary: int) -> None:
    tokens, types = byte_tokens(vocabulary)
    assert len(tokens) == len(types) == len(set(tokens)) == vocabulary
    assert {"a", "é", "\u0120", "\u0120t"} <= set(tokens)


def test_parameters_of_the_shape() -> None:
    shapes = SHAPES["qwen2.5-1.5b"][1].shapes()
    weights = sum(int(np.prod(shape)) for shape in shapes.values())
    assert weights - int(np.prod(shapes["output.weight"])) == 1_543_714_304  # Qwen2.5-1.5B's, which ties its head
