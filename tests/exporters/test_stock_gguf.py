"""Stock GGUF files: gguf-py reads the weights that the trit file decodes to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tiny_models import write_tiny_model

from tritgguf import convert, export
from tritgguf.errors import TritGgufError
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.formats.trit_types import is_trit_type

TYPES = {"f16": ("F16", 1), "bf16": ("BF16", 32), "q8_0": ("Q8_0", 7), "q4_0": ("Q4_0", 2)}


@pytest.mark.parametrize("variant", ["llama", "llama3-rope", "qwen2-tied", "unaligned"])
@pytest.mark.parametrize("to", TYPES)
def test_tensors(tiny_trit_file: Callable[..., GgufFile], tmp_path: Path, variant: str, to: str) -> None:
    file = tiny_trit_file(variant, 3)
    report = export(file.path, tmp_path / "out.gguf", to=to)
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    kind = getattr(gguf.GGMLQuantizationType, TYPES[to][0])
    assert [tensor.name for tensor in reader.tensors] == list(file.tensors)
    for tensor in reader.tensors:
        info = file.tensors[tensor.name]
        assert tuple(reversed(tensor.shape.tolist())) == info.shape
        if is_trit_type(info.type_id):
            assert tensor.tensor_type == kind
            expected = gguf.quants.quantize(file.read_float32(tensor.name), kind)
            np.testing.assert_array_equal(np.asarray(tensor.data), expected.reshape(tensor.data.shape))
        else:
            assert tensor.tensor_type == info.type_id
            np.testing.assert_array_equal(np.asarray(tensor.data).reshape(-1).view(np.uint8), file.raw(tensor.name))
    assert report.files == {"out.gguf": (tmp_path / "out.gguf").stat().st_size}


@pytest.mark.parametrize("to", TYPES)
def test_metadata(tiny_trit_file: Callable[..., GgufFile], tmp_path: Path, to: str) -> None:
    file = tiny_trit_file("qwen2")
    export(file.path, tmp_path / "out.gguf", to=to)
    stock = GgufFile(tmp_path / "out.gguf")
    kept = [key for key in file.metadata if not key.startswith("trit.")]
    assert list(stock.metadata) == kept
    for key in kept:
        if key != "general.file_type":
            assert stock.value(key) == file.value(key)
    assert stock.metadata["general.file_type"] == TYPES[to][1]


def test_the_largest_error_of_each_type(tiny_trit_file: Callable[..., GgufFile], tmp_path: Path) -> None:
    """Errors relative to a block's largest weight; Q4_0 has levels from -8 to 7, and both types have F16 scales."""
    file = tiny_trit_file("llama", 4)
    for to, share in {"f16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 254 + 2**-11, "q4_0": 1 / 8 + 2**-11}.items():
        export(file.path, tmp_path / f"{to}.gguf", to=to)
        stock = GgufFile(tmp_path / f"{to}.gguf")
        for name in ("blk.0.attn_q.weight", "blk.1.ffn_down.weight"):
            weights = file.read_float32(name).reshape(-1, 32)
            error = np.abs(stock.read_float32(name).reshape(-1, 32) - weights).max(axis=1)
            assert (error <= share * np.abs(weights).max(axis=1)).all()


def test_packed_embeddings_and_head_become_f16(tmp_path: Path) -> None:
    convert(write_tiny_model(tmp_path / "model"), tmp_path / "d2.gguf", output_depth=3, embedding_depth=4)
    export(tmp_path / "d2.gguf", tmp_path / "out.gguf", to="q4_0")
    file, stock = GgufFile(tmp_path / "d2.gguf"), GgufFile(tmp_path / "out.gguf")
    for name in ("token_embd.weight", "output.weight"):
        assert stock.tensors[name].type_name == "F16"
        np.testing.assert_array_equal(stock.read_float32(name), file.read_float32(name).astype(np.float16))


def test_it_is_a_source(tiny_trit_file: Callable[..., GgufFile], tmp_path: Path) -> None:
    file = tiny_trit_file("qwen2", 2)
    export(file.path, tmp_path / "out.gguf", to="f16")
    convert(tmp_path / "out.gguf", tmp_path / "again.gguf", depth=2)
    assert GgufFile(tmp_path / "again.gguf").tensors.keys() == file.tensors.keys()


def test_an_existing_file(tiny_trit_file: Callable[..., GgufFile], tmp_path: Path) -> None:
    (tmp_path / "out.gguf").write_bytes(b"mine")
    with pytest.raises(TritGgufError, match=r"exists already.*--overwrite"):
        export(tiny_trit_file().path, tmp_path / "out.gguf", to="f16")
    assert (tmp_path / "out.gguf").read_bytes() == b"mine"
    export(tiny_trit_file().path, tmp_path / "out.gguf", to="f16", overwrite=True)
    assert len(GgufFile(tmp_path / "out.gguf").tensors) == 21


def load_gguf(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    from tritgguf.reference.process_settings import silent_transformers

    with silent_transformers():
        return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype="float32")


@pytest.mark.parametrize("variant", ["llama", "qwen2"])
def test_transformers_reads_it(tmp_path: Path, variant: str) -> None:
    """Transformers loads the same model from the GGUF file as from the folder."""
    import torch
    from transformers import AutoModelForCausalLM

    convert(write_tiny_model(tmp_path / "model", variant), tmp_path / "d2.gguf")
    export(tmp_path / "d2.gguf", tmp_path / "hf", to="hf")
    export(tmp_path / "d2.gguf", tmp_path / "out.gguf", to="f16")
    tokens = torch.arange(3, 40)[None]
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)(tokens).logits
        found = load_gguf(tmp_path / "out.gguf")(tokens).logits
    # The folder's norms are float16, the file's float32.
    assert (found - expected).abs().max() < 2e-3 * expected.abs().max()
