"""Conversion: contents of the file, the report, and errors."""

from __future__ import annotations

import importlib
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import xxhash
from converted_models import as_stock_gguf, damaged_model
from gguf import GGUFValue, GGUFValueType
from tiny_models import write_tiny_model

from tritgguf.architectures.tensor_names import quantized_tensor
from tritgguf.conversion.convert import ConvertProgress, convert
from tritgguf.errors import TritGgufError
from tritgguf.formats import trit_types
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.formats.gguf_header import F16, F32
from tritgguf.formats.trit_types import DEPTHS, TritType
from tritgguf.quantization import v2
from tritgguf.sources.open import open_source

# The package's `convert` is the function; its module has to be asked for by name.
MODULE = importlib.import_module("tritgguf.conversion.convert")
MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def expected_type(name: str, shape: Sequence[int], depth: int) -> str:
    """Return the expected type of a tensor in the file."""
    if len(shape) == 1:
        return "F32"
    is_packed = any(name.endswith(f".{matrix}.weight") for matrix in MATRICES) and shape[-1] % 64 == 0
    return f"TRIT{depth}" if is_packed else "F16"


def assert_refused(folder: Path, message: str, source: str | Path, **options: Any) -> None:
    """Assert that a conversion fails in one line and leaves nothing in the folder."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(TritGgufError, match=message) as caught:
        convert(source, folder / "out.gguf", **options)
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of float32 weights."""
    return write_tiny_model(tmp_path_factory.mktemp("llama") / "model", dtype="F32")


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """An empty folder for outputs."""
    folder = tmp_path / "outputs"
    folder.mkdir()
    return folder


# -- the file


@pytest.mark.parametrize(
    ("variant", "depth"),
    [
        *(("llama", depth) for depth in DEPTHS),
        *((variant, 2) for variant in ("llama-tied", "llama3-rope", "llama-sharded", "mistral", "qwen2")),
    ],
)
def test_types_and_contents(tmp_path: Path, variant: str, depth: int) -> None:
    folder = write_tiny_model(tmp_path / "model", variant)
    convert(folder, tmp_path / "out.gguf", depth=depth, recipe="published")
    source, file = open_source(folder), GgufFile(tmp_path / "out.gguf")
    assert [(info.name, info.shape) for info in file.tensors.values()] == [(t.name, t.shape) for t in source.tensors]
    for name, info in file.tensors.items():
        assert info.type_name == expected_type(name, info.shape, depth)
        weights = source.read(name)
        if info.type_id == F32:
            np.testing.assert_array_equal(file.read_float32(name), weights)
        elif info.type_id == F16:
            np.testing.assert_array_equal(file.read_float32(name), weights.astype(np.float16))
        else:
            matrix = v2.quantize(weights, depth)  # from float32; `convert` passes the stored dtype
            np.testing.assert_array_equal(file.raw(name), matrix.pack().reshape(-1))
            np.testing.assert_array_equal(file.codebook(name), matrix.codebook)


def test_metadata(tmp_path: Path, llama: Path) -> None:
    convert(llama, tmp_path / "out.gguf", depth=3, recipe="published")
    source, file = open_source(llama), GgufFile(tmp_path / "out.gguf")
    names = list(file.metadata)
    assert names[: len(source.metadata)] == list(source.metadata)
    for name, value in source.metadata.items():
        assert file.value(name).type == value.type
        if not isinstance(value.value, float):
            assert file.metadata[name] == value.value
    packed = [name for name, info in file.tensors.items() if trit_types.is_trit_type(info.type_id)]
    assert len(packed) == 14
    own: dict[str, int | str] = {
        "general.file_type": 1024,
        "general.quantization_version": 2,
        "trit.version": 1,
        "trit.codec": "tritllm-v2",
        "trit.encoder": "v2",
        "trit.group_size": 16,
        "trit.scale_depth": 3,
    }
    checksums = [f"trit.xxh3.{name}" for name in file.tensors]
    assert names[len(source.metadata) :] == [*own, *(f"trit.codebook.{name}" for name in packed), *checksums]
    for name in file.tensors:
        assert file.metadata[f"trit.xxh3.{name}"] == xxhash.xxh3_64_intdigest(file.raw(name).data)
    assert {key: file.metadata[key] for key in own} == own
    assert file.value("trit.codebook.blk.0.attn_q.weight").sub_type == GGUFValueType.FLOAT32
    for name in packed:
        assert max(file.metadata[f"trit.codebook.{name}"]) == np.abs(source.read(name)).max()


def test_gguf_reads_the_file_once_it_knows_the_types(tmp_path: Path, llama: Path) -> None:
    convert(llama, tmp_path / "out.gguf", depth=4)
    trit_types.register_with_gguf()
    file, reader = GgufFile(tmp_path / "out.gguf"), gguf.GGUFReader(tmp_path / "out.gguf")
    assert len(reader.tensors) == len(file.tensors)
    for read in reader.tensors:
        info = file.tensors[read.name]
        assert (read.tensor_type.name, read.data_offset, read.n_bytes) == (info.type_name, info.offset, info.n_bytes)
        assert tuple(reversed(read.shape.tolist())) == info.shape


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_report_is_recomputed(tmp_path: Path, llama: Path, depth: int) -> None:
    output = tmp_path / "out.gguf"
    report = convert(llama, output, depth=depth, recipe="published")
    source, file = open_source(llama), GgufFile(output)
    types: dict[str, list[int]] = {}
    error = power = 0.0
    packed_bytes = packed_weights = 0
    for name, info in file.tensors.items():
        types.setdefault(info.type_name, []).append(info.n_bytes)
        if trit_types.is_trit_type(info.type_id):
            weights = source.read(name).astype(np.float64)
            error += np.sum((weights - file.read_float32(name)) ** 2)
            power += np.sum(weights**2)
            packed_bytes, packed_weights = packed_bytes + info.n_bytes, packed_weights + weights.size
    assert report.tensors_by_type == {name: len(sizes) for name, sizes in types.items()}
    assert report.bytes_by_type == {name: sum(sizes) for name, sizes in types.items()}
    assert report.weights == sum(info.n_weights for info in file.tensors.values())
    assert report.file_bytes == output.stat().st_size
    assert report.bits_per_weight_file == pytest.approx(8 * output.stat().st_size / report.weights)
    assert report.bits_per_weight_quantized == pytest.approx(8 * packed_bytes / packed_weights)
    assert report.bits_per_weight_quantized == pytest.approx([2.0, 3.5, 5.25, 6.75][depth - 1])
    assert report.relative_error == pytest.approx(np.sqrt(error / power), rel=1e-5)
    assert (report.output, report.source, report.depth, report.encoder) == (output, str(llama), depth, "v2")
    assert report.kept_unaligned == []
    assert report.seconds > 0
    assert report.peak_memory_bytes > 10_000_000


def test_unaligned_rows_stay_unpacked(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", "unaligned")
    report = convert(folder, tmp_path / "out.gguf", depth=2, recipe="published")
    source, file = open_source(folder), GgufFile(tmp_path / "out.gguf")
    # 96 columns are not a multiple of 64; only ffn_down has 192.
    kept = [name for name in file.tensors if quantized_tensor(name) and "ffn_down" not in name]
    assert len(kept) == 12
    assert report.kept_unaligned == kept
    for name in kept:
        assert file.tensors[name].type_id == F16
        np.testing.assert_array_equal(file.read_float32(name), source.read(name).astype(np.float16))
    assert file.tensors["blk.1.ffn_down.weight"].type_id == TritType.TRIT2
    assert report.bits_per_weight_quantized == 3.5


def test_nothing_to_pack(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 96,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "intermediate_size": 160,
    }
    report = convert(write_tiny_model(tmp_path / "model", **sizes), tmp_path / "out.gguf")
    assert set(report.tensors_by_type) == {"F16", "F32"}
    assert len(report.kept_unaligned) == 16  # with embeddings and output head
    assert report.bits_per_weight_quantized == report.relative_error == 0.0


def test_an_unpacked_tensor_is_written_in_parts(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(llama, tmp_path / "whole.gguf")
    monkeypatch.setattr(importlib.import_module("tritgguf.conversion.pipeline"), "_UNPACKED_WEIGHTS", 1000)
    convert(llama, tmp_path / "parts.gguf")
    assert (tmp_path / "parts.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_change_the_file(tmp_path: Path, llama: Path, threads: int) -> None:
    convert(llama, tmp_path / "default.gguf")
    convert(llama, tmp_path / "other.gguf", threads=threads)
    assert (tmp_path / "other.gguf").read_bytes() == (tmp_path / "default.gguf").read_bytes()


def test_progress(tmp_path: Path, llama: Path) -> None:
    steps: list[ConvertProgress] = []
    convert(llama, tmp_path / "out.gguf", progress=steps.append)
    tensors = open_source(llama).tensors
    assert [step.tensor for step in steps] == [tensor.name for tensor in tensors]
    assert {step.bytes_total for step in steps} == {sum(tensor.stored_bytes for tensor in tensors)}
    differences = np.diff([0, *(step.bytes_done for step in steps)])
    assert differences.tolist() == [tensor.stored_bytes for tensor in tensors]
    assert steps[-1].bytes_done == steps[-1].bytes_total


def test_an_interrupted_conversion_can_be_resumed(empty: Path, llama: Path) -> None:
    def stop(step: ConvertProgress) -> None:
        if step.tensor == "blk.1.ffn_down.weight":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(llama, empty / "out.gguf", progress=stop)
    assert sorted(entry.name for entry in empty.iterdir()) == ["out.gguf.part", "out.gguf.part.journal"]


# -- stock GGUF files


@pytest.mark.parametrize("variant", ["llama", "qwen2-tied", "llama3-rope"])
def test_folder_and_gguf_give_the_same_trits(tmp_path: Path, variant: str) -> None:
    folder = write_tiny_model(tmp_path / "model", variant)
    stock = as_stock_gguf(open_source(folder), tmp_path / "stock.gguf")
    convert(folder, tmp_path / "from_folder.gguf", depth=3)
    convert(stock, tmp_path / "from_gguf.gguf", depth=3)
    first, second = GgufFile(tmp_path / "from_folder.gguf"), GgufFile(tmp_path / "from_gguf.gguf")
    assert [info.type_id for info in first.tensors.values()] == [info.type_id for info in second.tensors.values()]
    for name in first.tensors:
        np.testing.assert_array_equal(first.raw(name), second.raw(name))
    assert dict(first.metadata) == dict(second.metadata)


def test_odd_keys_of_a_stock_file_survive(tmp_path: Path, llama: Path) -> None:
    odd = {
        "general.alignment": GGUFValue(32, GGUFValueType.UINT32),
        "general.file_type": GGUFValue(1, GGUFValueType.UINT32),
        "odd.byte": GGUFValue(7, GGUFValueType.UINT8),
        "odd.double": GGUFValue(0.1, GGUFValueType.FLOAT64),
        "odd.longs": GGUFValue([2**40], GGUFValueType.ARRAY, GGUFValueType.INT64),
        "odd.truths": GGUFValue([True, False], GGUFValueType.ARRAY, GGUFValueType.BOOL),
    }
    convert(as_stock_gguf(open_source(llama), tmp_path / "stock.gguf", odd), tmp_path / "out.gguf")
    file = GgufFile(tmp_path / "out.gguf")
    for key, value in odd.items():
        if key.startswith("odd."):
            assert file.value(key) == value
    assert file.metadata["general.file_type"] == 1024


def test_an_empty_list_of_a_stock_file(tmp_path: Path, llama: Path) -> None:
    """An empty array is valid GGUF, although gguf-py's writer cannot write one."""
    metadata = {"general.tags": GGUFValue(["x" * 24], GGUFValueType.ARRAY, GGUFValueType.STRING)}
    stock = as_stock_gguf(open_source(llama), tmp_path / "stock.gguf", metadata)
    content = stock.read_bytes()
    # Removing the element moves everything after it by 32 bytes, which is the alignment.
    one, none = (struct.pack("<IIQ", 9, 8, count) for count in (1, 0))
    element = struct.pack("<Q", 24) + b"x" * 24
    assert content.count(b"general.tags" + one + element) == 1
    stock.write_bytes(content.replace(b"general.tags" + one + element, b"general.tags" + none))
    assert GgufFile(stock).metadata["general.tags"] == []
    convert(stock, tmp_path / "out.gguf")
    assert GgufFile(tmp_path / "out.gguf").metadata.get("general.tags", []) == []


def test_smollm2(smollm2_folder: Path, trit_file: Callable[[int], Path]) -> None:
    file, source = GgufFile(trit_file(2)), open_source(smollm2_folder)
    types = [info.type_name for info in file.tensors.values()]
    assert {name: types.count(name) for name in types} == {"TRIT2": 210, "F32": 61, "F16": 1}
    packed = [info for info in file.tensors.values() if info.type_id == TritType.TRIT2]
    assert 8 * sum(info.n_bytes for info in packed) / sum(info.n_weights for info in packed) == 3.5
    for name in ("blk.0.attn_q.weight", "blk.17.attn_k.weight", "blk.29.ffn_down.weight"):
        matrix = v2.quantize(source.read(name), 2)
        np.testing.assert_array_equal(file.raw(name), matrix.pack().reshape(-1))
        np.testing.assert_array_equal(file.codebook(name), matrix.codebook)
    np.testing.assert_array_equal(file.read_float32("blk.3.ffn_norm.weight"), source.read("blk.3.ffn_norm.weight"))


def test_smollm2_is_the_same_from_both_sources(smollm2_folder: Path, smollm2_gguf: Path) -> None:
    folder, stock = open_source(smollm2_folder), GgufFile(smollm2_gguf)
    assert {tensor.name for tensor in folder.tensors} == set(stock.tensors)
    for name in ("blk.0.attn_q.weight", "blk.5.attn_k.weight", "blk.29.ffn_down.weight", "output_norm.weight"):
        np.testing.assert_array_equal(folder.read(name), stock.read_float32(name).astype(np.float16))


# -- errors


@pytest.mark.parametrize("depth", [0, 5, -1])
def test_depth(empty: Path, llama: Path, depth: int) -> None:
    assert_refused(empty, f"depth {depth} does not exist; choose 1, 2, 3 or 4", llama, depth=depth)


def test_encoder(empty: Path, llama: Path) -> None:
    assert_refused(empty, "encoder v9 does not exist; choose from auto, recover, recover[+]v2, ", llama, encoder="v9")


def test_existing_output(empty: Path, llama: Path) -> None:
    (empty / "out.gguf").write_bytes(b"mine")
    assert_refused(empty, "exists already", llama)
    convert(llama, empty / "out.gguf", overwrite=True)
    assert len(GgufFile(empty / "out.gguf").tensors) == 21


def test_a_failed_overwrite_keeps_the_old_file(empty: Path, tmp_path: Path) -> None:
    (empty / "out.gguf").write_bytes(b"mine")
    source = damaged_model(tmp_path / "model", "model.layers.1.mlp.down_proj.weight", np.nan)
    assert_refused(empty, "NaN", source, overwrite=True)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.embed_tokens.weight",
        "model.layers.1.input_layernorm.weight",
        "lm_head.weight",
    ],
)
def test_bad_weight(empty: Path, tmp_path: Path, name: str, value: float) -> None:
    source = damaged_model(tmp_path / "model", name, value)
    assert_refused(empty, rf"model: tensor {name} has a weight that is NaN or infinite; the checkpoint", source)


def test_bad_float16_weight(empty: Path, tmp_path: Path) -> None:
    for dtype in ("F16", "BF16"):
        source = damaged_model(tmp_path / dtype, "model.layers.1.mlp.up_proj.weight", np.inf, dtype=dtype)
        assert_refused(empty, r"tensor model\.layers\.1\.mlp\.up_proj\.weight has", source)


def test_embedding_too_large_for_f16(empty: Path, tmp_path: Path) -> None:
    source = damaged_model(tmp_path / "model", "model.embed_tokens.weight", 1e5, dtype="BF16")
    message = r"tensor model\.embed_tokens\.weight has a weight of 99840, but F16 holds 65504.*--embedding-depth 4"
    assert_refused(empty, message, source, recipe="published")
    convert(source, tmp_path / "out.gguf", embedding_depth=4)  # the remedy
    assert GgufFile(tmp_path / "out.gguf").read_float32("token_embd.weight").max() == pytest.approx(99840.0)


def test_large_weights_where_there_is_room_for_them(tmp_path: Path) -> None:
    source = damaged_model(tmp_path / "model", "model.layers.1.mlp.up_proj.weight", 70000.0)
    convert(source, tmp_path / "out.gguf")
    assert GgufFile(tmp_path / "out.gguf").read_float32("blk.1.ffn_up.weight").max() == pytest.approx(70000.0)


def test_disk_full(empty: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(empty)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert_refused(empty, "make room", llama)


@pytest.mark.parametrize(
    ("source", "message"),
    [("no such thing", "no such file"), ("outputs/none.gguf", "no such file"), ("outputs", "config.json")],
)
def test_bad_source(empty: Path, source: str, message: str) -> None:
    assert_refused(empty, message, empty.parent / source)
