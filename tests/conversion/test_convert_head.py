"""Packed output heads and embeddings: their types, and that every command works with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
from sequences import open_sequence
from tiny_models import write_tiny_model

from tritgguf.conversion.convert import convert
from tritgguf.diagnostics.bench import bench, bytes_read_per_token
from tritgguf.errors import TritGgufError
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.formats.trit_types import DEPTHS, row_bytes
from tritgguf.quantization import v2
from tritgguf.runtime.weights import Embeddings
from tritgguf.sources.open import open_source

EMBEDDINGS, HEAD = "token_embd.weight", "output.weight"
TOKENS = [5, 401, 17, 17, 300, 0, 447, 62, 128, 33, 254]


def head_types(file: GgufFile) -> list[str]:
    """Return the types of the embeddings and, if it is a separate tensor, of the output head."""
    return [file.tensors[name].type_name for name in (EMBEDDINGS, HEAD) if name in file.tensors]


def converted(folder: Path, variant: str = "llama", **options: Any) -> GgufFile:
    """Convert a tiny model, by the published recipe unless told otherwise, and open the result."""
    convert(write_tiny_model(folder / "model", variant), folder / "out.gguf", **{"recipe": "published"} | options)
    return GgufFile(folder / "out.gguf")


@pytest.mark.parametrize(
    ("options", "types"),
    [
        ({}, ["F16", "F16"]),
        ({"output_depth": 0, "embedding_depth": 0}, ["F16", "F16"]),
        ({"output_depth": 4}, ["F16", "TRIT4"]),
        ({"embedding_depth": 1}, ["TRIT1", "F16"]),
        ({"output_depth": 3, "embedding_depth": 2}, ["TRIT2", "TRIT3"]),
    ],
)
def test_separate_head_and_embeddings(tmp_path: Path, options: dict[str, Any], types: list[str]) -> None:
    file = converted(tmp_path, **options)
    source = open_source(tmp_path / "model")
    assert head_types(file) == types
    for name, kind in zip((EMBEDDINGS, HEAD), types, strict=True):
        if kind == "F16":
            np.testing.assert_array_equal(file.read_float32(name), source.read(name).astype(np.float16))
        else:
            matrix = v2.quantize(source.read(name), int(kind[-1]))
            np.testing.assert_array_equal(file.raw(name), matrix.pack().reshape(-1))
            np.testing.assert_array_equal(file.codebook(name), matrix.codebook)
    assert file.tensors["blk.0.ffn_up.weight"].type_name == "TRIT2"


@pytest.mark.parametrize(
    "options", [{"output_depth": 3}, {"embedding_depth": 3}, {"output_depth": 3, "embedding_depth": 3}]
)
def test_tied_head_and_embeddings_share_a_tensor(tmp_path: Path, options: dict[str, Any]) -> None:
    assert head_types(converted(tmp_path, "llama-tied", **options)) == ["TRIT3"]


@pytest.mark.parametrize("depths", [(3, 4), (0, 4), (3, 0)])
def test_tied_head_and_embeddings_cannot_differ(tmp_path: Path, depths: tuple[int, int]) -> None:
    with pytest.raises(TritGgufError, match=r"model: output head and embeddings are one tensor; give only one of"):
        converted(tmp_path, "llama-tied", output_depth=depths[0], embedding_depth=depths[1])
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("option", ["output_depth", "embedding_depth"])
@pytest.mark.parametrize("depth", [5, -1])
def test_depths_that_do_not_exist(tmp_path: Path, option: str, depth: int) -> None:
    what = option.removesuffix("_depth")
    with pytest.raises(TritGgufError, match=f"^{what} depth {depth} does not exist; choose 1, 2, 3 or 4, or 0 for F16"):
        converted(tmp_path, "llama", **{option: depth})


def test_unaligned_rows_stay_unpacked(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", "unaligned")
    report = convert(folder, tmp_path / "out.gguf", output_depth=4, recipe="published")
    assert head_types(GgufFile(tmp_path / "out.gguf")) == ["F16", "F16"]
    assert HEAD in report.kept_unaligned
    assert EMBEDDINGS not in report.kept_unaligned


def test_the_report_counts_them(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", "llama-tied")
    report = convert(folder, tmp_path / "out.gguf", depth=2, output_depth=4)
    file = GgufFile(tmp_path / "out.gguf")
    assert report.tensors_by_type == {"TRIT4": 1, "F32": 5, "TRIT2": 14}
    assert report.bytes_by_type["TRIT4"] == file.tensors[EMBEDDINGS].n_bytes == 448 * row_bytes(4, 128)
    bits = 8 * sum(report.bytes_by_type[kind] for kind in ("TRIT2", "TRIT4"))
    weights = sum(info.n_weights for info in file.tensors.values() if info.type_name.startswith("TRIT"))
    assert report.bits_per_weight_quantized == pytest.approx(bits / weights)


@pytest.mark.parametrize("depth", DEPTHS)
def test_single_rows_decode_like_the_whole_table(tmp_path: Path, depth: int) -> None:
    file = converted(tmp_path, embedding_depth=depth)
    embeddings = open_sequence(file, context=8).model._weights.embeddings
    assert isinstance(embeddings, Embeddings)
    whole = file.read_float32(EMBEDDINGS)
    np.testing.assert_array_equal(embeddings[np.array(TOKENS * 4)], whole[TOKENS * 4])
    for token in (0, 17, 447):
        np.testing.assert_array_equal(embeddings[token], whole[[token]])


@pytest.mark.parametrize(
    ("variant", "output_depth", "embedding_depth"),
    [("llama", 3, 4), ("llama", 0, 2), ("qwen2", 1, 0), ("llama-tied", 4, 4), ("qwen2-tied", 2, 2)],
)
def test_logits(tmp_path: Path, variant: str, output_depth: int, embedding_depth: int) -> None:
    file = converted(tmp_path, variant, output_depth=output_depth, embedding_depth=embedding_depth)
    expected = naive.transformer_logits(file.metadata, {name: file.read_float32(name) for name in file.tensors}, TOKENS)
    model = open_sequence(file, context=16, prefill_bits=16, cache_type="f32")
    exact = open_sequence(file, context=16, exact=True)
    largest = np.abs(expected).max()
    for runner, tolerance in ((model, 1e-4), (exact, 3e-6)):
        whole = runner.forward(TOKENS, all_logits=True)
        np.testing.assert_allclose(whole, expected, rtol=0, atol=tolerance * largest)
        runner.truncate(0)
        np.testing.assert_allclose(runner.forward(TOKENS), expected[-1], rtol=0, atol=tolerance * largest)
        runner.truncate(0)
        for token, row in zip(TOKENS, expected, strict=True):
            np.testing.assert_allclose(runner.forward([token]), row, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_read_per_token(tmp_path: Path, tied: bool) -> None:
    file = converted(tmp_path, "llama-tied" if tied else "llama", output_depth=2, embedding_depth=2)
    layers = sum(info.n_bytes for name, info in file.tensors.items() if name not in (EMBEDDINGS, HEAD))
    assert bytes_read_per_token(file) == layers + 448 * row_bytes(2, 128) + row_bytes(2, 128)
    report = bench(tmp_path / "out.gguf", prompt_tokens=0, generated_tokens=2, repetitions=1, threads=1)
    matrices = [info for name, info in file.tensors.items() if name != EMBEDDINGS and info.type_name == "TRIT2"]
    assert report.trit_weights == sum(info.n_weights for info in matrices) + (448 * 128 if tied else 0)
