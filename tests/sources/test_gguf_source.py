"""Stock GGUF files as sources of a conversion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from source_checks import fails
from tiny_models import write_tiny_model

from tritgguf.conversion.convert import convert
from tritgguf.formats import matrix_rows
from tritgguf.formats.dtypes import to_float32
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.formats.trit_types import DEPTHS
from tritgguf.sources.gguf import GgufSource
from tritgguf.sources.open import open_source
from tritgguf.sources.source import Source
from tritgguf.tokenization.hf_to_gguf import HUGGINGFACE_JSON_KEY


def write_stock(
    path: Path,
    source: Source,
    *,
    arch: str | None = None,
    qtype: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    leave_out: tuple[str, ...] = (HUGGINGFACE_JSON_KEY,),
    extra: dict[str, np.ndarray] | None = None,
    keys: dict[str, int] | None = None,
) -> Path:
    """Write a source as a stock file with gguf-py's own writer."""
    writer = gguf.GGUFWriter(path, arch or source.metadata["general.architecture"].value)
    for key, value in source.metadata.items():
        if key != "general.architecture" and key not in leave_out:
            writer.add_key_value(key, value.value, value.type, value.sub_type)
    writer.add_custom_alignment(64)
    for key, number in {"general.file_type": 7, "general.quantization_version": 2, **(keys or {})}.items():
        writer.add_uint32(key, number)
    arrays = {tensor.name: source.read(tensor.name) for tensor in source.tensors if tensor.name not in leave_out}
    for name, array in {**arrays, **(extra or {})}.items():
        if array.ndim == 1:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, qtype), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_default_pre_tokenizer_is_a_warning(tmp_path: Path) -> None:
    folder = open_source(write_tiny_model(tmp_path / "folder"))
    folder.metadata["tokenizer.ggml.pre"] = gguf.GGUFValue("default", gguf.GGUFValueType.STRING)
    (warning,) = open_source(write_stock(tmp_path / "stock.gguf", folder)).warnings
    assert "tokenizer.ggml.pre is default" in warning
    assert open_source(write_stock(tmp_path / "with-json.gguf", folder, leave_out=())).warnings == []


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("adapter", "is not a model: it is a LoRA adapter; merge"),
        ("mmproj", "image encoder"),
        ("x", "general.type is x"),
    ],
)
def test_gguf_files_that_are_no_models(tmp_path: Path, kind: str, message: str) -> None:
    folder = open_source(write_tiny_model(tmp_path / "folder"))
    folder.metadata["general.type"] = gguf.GGUFValue(kind, gguf.GGUFValueType.STRING)
    fails(write_stock(tmp_path / "stock.gguf", folder), message)


@pytest.mark.parametrize("variant", ["llama-tied", "llama3-rope", "llama-biases", "mistral", "qwen2"])
def test_a_stock_file_is_the_same_source_as_its_folder(tmp_path: Path, variant: str) -> None:
    folder = open_source(write_tiny_model(tmp_path / "folder", variant))
    file = open_source(write_stock(tmp_path / "stock.gguf", folder))
    assert isinstance(file, GgufSource)
    assert [(t.name, t.shape) for t in file.tensors] == [(t.name, t.shape) for t in folder.tensors]
    for tensor in folder.tensors:
        np.testing.assert_array_equal(file.read(tensor.name), folder.read(tensor.name))
    assert list(file.metadata) == list(folder.metadata)
    for key, value in folder.metadata.items():
        if key != HUGGINGFACE_JSON_KEY:
            assert file.metadata[key].type == value.type
            assert file.metadata[key].value == pytest.approx(value.value) or file.metadata[key].value == value.value


def test_its_hugging_face_tokenizer_is_kept_or_made(tmp_path: Path) -> None:
    folder = open_source(write_tiny_model(tmp_path / "folder", "qwen2"))
    original = folder.metadata[HUGGINGFACE_JSON_KEY].value
    kept = open_source(write_stock(tmp_path / "kept.gguf", folder, leave_out=()))
    assert kept.metadata[HUGGINGFACE_JSON_KEY].value == original
    made = open_source(write_stock(tmp_path / "made.gguf", folder)).metadata[HUGGINGFACE_JSON_KEY].value
    assert json.loads(made)["model"]["merges"] == json.loads(original)["model"]["merges"]


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "BF16", "F16"])
def test_stock_types_are_dequantized(tmp_path: Path, name: str) -> None:
    qtype = gguf.GGMLQuantizationType[name]
    folder = open_source(write_tiny_model(tmp_path / "folder", "llama"))
    file = open_source(write_stock(tmp_path / "stock.gguf", folder, qtype=qtype))
    array = folder.read("blk.0.ffn_up.weight")
    expected = gguf.quants.dequantize(gguf.quants.quantize(array, qtype), qtype)
    np.testing.assert_array_equal(file.read("blk.0.ffn_up.weight"), expected.reshape(array.shape))
    stored = {tensor.name: tensor.stored_bytes for tensor in file.tensors}["blk.0.ffn_up.weight"]
    assert stored == gguf.quants.quantize(array, qtype).nbytes


@pytest.mark.parametrize(("name", "dtype"), [("F32", np.float32), ("F16", np.float16), ("BF16", np.uint16)])
def test_stored_numbers_are_views_of_the_file(tmp_path: Path, name: str, dtype: type) -> None:
    folder = open_source(write_tiny_model(tmp_path / "folder", "llama"))
    file = open_source(write_stock(tmp_path / "stock.gguf", folder, qtype=gguf.GGMLQuantizationType[name]))
    for tensor in file.tensors:
        stored = file.rows(tensor.name).whole()
        assert stored.dtype == (dtype if len(tensor.shape) == 2 else np.float32)
        assert stored.base is not None
        assert not stored.flags.writeable
        np.testing.assert_array_equal(to_float32(stored).reshape(tensor.shape), file.read(tensor.name))
        assert file.packed(tensor.name) is None


def test_stored_numbers_of_other_types_are_float32(tmp_path: Path) -> None:
    folder = open_source(write_tiny_model(tmp_path / "folder", "llama"))
    file = open_source(write_stock(tmp_path / "stock.gguf", folder, qtype=gguf.GGMLQuantizationType.Q8_0))
    stored = file.rows("blk.0.ffn_up.weight").whole()
    assert stored.dtype == np.float32
    np.testing.assert_array_equal(stored, file.read("blk.0.ffn_up.weight"))


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0"])
def test_rows_are_read_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(matrix_rows, "_WEIGHTS_PER_BLOCK", 1000)
    folder = open_source(write_tiny_model(tmp_path / "folder"))
    source = open_source(write_stock(tmp_path / "stock.gguf", folder, qtype=gguf.GGMLQuantizationType[name]))
    for tensor in source.tensors:
        blocks = list(source.rows(tensor.name).blocks())
        assert all(block.size <= 1000 for block in blocks)
        numbers = to_float32(np.concatenate(blocks)).reshape(tensor.shape)
        np.testing.assert_array_equal(numbers, source.read(tensor.name))


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_trit_file_shows_its_rows_and_scales(tmp_path: Path, depth: int) -> None:
    convert(write_tiny_model(tmp_path / "folder"), tmp_path / "trit.gguf", depth=depth, recipe="published")
    source, file = open_source(tmp_path / "trit.gguf"), GgufFile(tmp_path / "trit.gguf")
    for name in ("blk.0.attn_q.weight", "blk.1.ffn_down.weight"):
        packed = source.packed(name)
        assert packed is not None
        assert packed.depth == depth
        np.testing.assert_array_equal(packed.data, file.raw(name))
        np.testing.assert_array_equal(packed.codebook, file.codebook(name))
        np.testing.assert_array_equal(source.read(name), file.read_float32(name))
    assert source.packed("token_embd.weight") is None
    assert not [key for key in source.metadata if key.startswith("trit.")]


@pytest.mark.parametrize(
    ("variant", "arguments", "message"),
    [
        ("llama", {"arch": "bloom"}, r"architecture bloom is not supported \(supported: llama, qwen2, "),
        ("llama", {"leave_out": ("blk.1.ffn_up.weight",)}, r"tensor blk\.1\.ffn_up\.weight is missing"),
        ("llama", {"leave_out": ("token_embd.weight",)}, r"tensor token_embd\.weight"),
        ("llama", {"leave_out": ("llama.block_count",)}, r"llama\.block_count is missing"),
        (
            "llama",
            {"leave_out": ("llama.attention.layer_norm_rms_epsilon",)},
            r"llama\.attention\.layer_norm_rms_epsilon is missing",
        ),
        ("qwen2", {"leave_out": ("blk.1.attn_q.bias",)}, r"tensor blk\.1\.attn_q\.bias is missing"),
        (
            "llama",
            {"extra": {"blk.0.strange.weight": np.ones(4, np.float32)}},
            "strange.weight does not belong",
        ),
        ("llama", {"extra": {"output.bias": np.ones(448, np.float32)}}, r"output\.bias does not belong"),
        ("llama", {"extra": {"blk.0.attn_norm.bias": np.ones(128, np.float32)}}, r"attn_norm\.bias does not belong"),
        ("llama", {"extra": {"rope_freqs.weight": np.ones(4, np.float32)}}, r"rope_freqs\.weight has shape"),
        (
            "llama",
            {"extra": {"rope_factors_long.weight": np.ones(16, np.float32)}},
            r"rope_factors_long\.weight does not belong",
        ),
        ("llama", {"keys": {"llama.expert_count": 8}}, r"llama\.expert_used_count is missing"),
        ("qwen2", {"keys": {"qwen2.expert_count": 8}}, "experts of architecture qwen2 are not supported"),
        ("llama", {"keys": {"split.count": 2}}, "one part of a split model"),
        (
            "llama",
            {"leave_out": ("tokenizer.ggml.pre", HUGGINGFACE_JSON_KEY)},
            "tokenizer.ggml.pre is missing",
        ),
    ],
)
def test_an_unfit_stock_file_gives_one_clear_line(
    tmp_path: Path, variant: str, arguments: dict[str, Any], message: str
) -> None:
    folder = open_source(write_tiny_model(tmp_path / "folder", variant))
    fails(write_stock(tmp_path / "stock.gguf", folder, **arguments), message)


def test_keys_about_tensor_types_are_left_to_the_output(tmp_path: Path) -> None:
    folder = open_source(write_tiny_model(tmp_path / "folder"))
    file = open_source(write_stock(tmp_path / "stock.gguf", folder, keys={"my.key": 5}))
    assert not {"general.file_type", "general.quantization_version", "general.alignment"} & set(file.metadata)
    assert file.metadata["my.key"].value == 5
