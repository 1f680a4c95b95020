"""`inspect`: descriptions of files with and without trit tensors."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from tiny_models import write_tiny_model

from tritgguf.conversion.convert import convert
from tritgguf.conversion.depths import DepthChoice, parse_rules
from tritgguf.errors import TritGgufError
from tritgguf.formats.description import abbreviate, describe


@pytest.fixture
def stock_file(tmp_path: Path) -> Path:
    writer = GGUFWriter(tmp_path / "stock.gguf", "llama")
    writer.add_name("A stock file")
    writer.add_float32("some.number", math.nan)
    writer.add_array("some.numbers", [1.0, math.inf])
    writer.add_array("some.words", [f"word {number}" for number in range(1000)])
    writer.add_tensor("token_embd.weight", np.zeros((3, 64), np.float16))
    writer.add_tensor("output_norm.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "stock.gguf"


def test_a_stock_file(stock_file: Path) -> None:
    file = describe(stock_file)
    assert (file.name, file.architecture, file.weights) == ("A stock file", "llama", 4 * 64)
    assert file.bits_per_weight_quantized is None
    assert file.bits_per_weight_file == stock_file.stat().st_size * 8 / 256
    assert [(kind.type, kind.tensors, kind.weights, kind.bytes) for kind in file.types] == [
        ("F16", 1, 192, 384),
        ("F32", 1, 64, 256),
    ]
    assert [kind.bits_per_weight for kind in file.types] == [16, 32]
    assert file.tensors[0].shape == (3, 64)
    assert file.tensors[0].codebook is None


def test_json_is_complete_and_valid(stock_file: Path) -> None:
    def no_constants(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    read = json.loads(json.dumps(describe(stock_file).as_dict()), parse_constant=no_constants)
    assert read["metadata"]["some.number"] == "nan"
    assert read["metadata"]["some.numbers"] == [1.0, "inf"]
    assert len(read["metadata"]["some.words"]) == 1000
    assert read["bits_per_weight_quantized"] is None
    assert read["tensors"][0] == {
        "name": "token_embd.weight",
        "type": "F16",
        "shape": [3, 64],
        "bytes": 384,
        "codebook": None,
        "xxh3": None,
        "matrices": 1,
        "weights": 192,
    }


def test_a_file_without_tensors(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "empty.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    file = describe(tmp_path / "empty.gguf")
    assert (file.name, file.weights, file.bits_per_weight_file, file.types) == ("empty", 0, None, [])


@pytest.mark.parametrize(("depth", "bits"), [(1, 2.0), (2, 3.5), (3, 5.25), (4, 6.75)])
def test_a_trit_file(tmp_path: Path, depth: int, bits: float) -> None:
    report = convert(write_tiny_model(tmp_path / "model"), tmp_path / "model.gguf", depth=depth, recipe="published")
    file = describe(tmp_path / "model.gguf")
    trit = [tensor for tensor in file.tensors if tensor.codebook is not None]
    assert {tensor.type for tensor in trit} == {f"TRIT{depth}"}
    assert len(trit) == 14
    for tensor in trit:
        assert tensor.codebook is not None
        assert len(tensor.codebook) == 27
        assert 0 < max(tensor.codebook) < 100
    assert file.bits_per_weight_quantized == report.bits_per_weight_quantized == bits
    assert file.bits_per_weight_file == report.bits_per_weight_file
    assert {kind.type: kind.bytes for kind in file.types} == report.bytes_by_type
    assert file.parts == report.parts
    assert file.metadata["trit.version"] == 1
    assert not any(key.startswith("trit.codebook.") for key in file.metadata)


@pytest.mark.parametrize("tied", [False, True])
def test_the_parts_of_a_file(tmp_path: Path, tied: bool) -> None:
    source = write_tiny_model(tmp_path / "model", "llama-tied" if tied else "llama")
    choice = DepthChoice(tuple(parse_rules("*.ffn_down=3")))
    convert(source, tmp_path / "out.gguf", depth=1, choice=choice, recipe="published", output_depth=4)
    file = describe(tmp_path / "out.gguf")
    sizes = {tensor.name: tensor.bytes for tensor in file.tensors}
    *large, rest = file.parts
    found = {part.name: (part.types, part.bytes) for part in large}
    layers = sum(size for name, size in sizes.items() if name.startswith("blk.") and not name.endswith("norm.weight"))
    embeddings = sizes["token_embd.weight"]
    if tied:
        head = {"embeddings, which are the output head": (("TRIT4",), embeddings)}
    else:
        head = {"embeddings": (("F16",), embeddings), "output head": (("TRIT4",), sizes["output.weight"])}
    assert found == {"layers": (("TRIT1", "TRIT3"), layers)} | head
    assert [part.bytes for part in large] == sorted((part.bytes for part in large), reverse=True)
    assert (rest.name, rest.types, rest.weights) == ("metadata, norms and biases", (), 0)
    assert sum(part.bytes for part in file.parts) == (tmp_path / "out.gguf").stat().st_size
    assert sum(part.weights for part in file.parts) == sum(t.weights for t in file.tensors if t.type != "F32")
    assert json.loads(json.dumps(file.as_dict()))["parts"][0]["bits_per_weight"] == large[0].bits_per_weight


def test_no_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("This is no GGUF file, whatever its name says.")
    for name in ("text.gguf", "missing.gguf", "."):
        with pytest.raises(TritGgufError, match=str(tmp_path)):
            describe(tmp_path / name)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (7, "7"),
        ("two\n\tlines", "two lines"),
        ("x" * 70, "x" * 70),
        ("x" * 71, f"{'x' * 70} ... (71 characters)"),
        ([1, 2, 3], "[1, 2, 3]"),
        (list(range(9000)), "[0, 1, 2, ...] (9000 elements)"),
        (["a" * 50] * 10, f"['{'a' * 19}, '{'a' * 19}, '{'a' * 19}, ...] (10 elements)"),
    ],
)
def test_values_on_one_line(value: object, expected: str) -> None:
    assert abbreviate(value) == expected


@pytest.mark.real_model
def test_smollm2(smollm2_d2: Path, smollm2_gguf: Path) -> None:
    file = describe(smollm2_d2)
    assert file.architecture == "llama"
    assert file.bits_per_weight_quantized == 3.5
    assert {kind.type: kind.tensors for kind in file.types} == {"TRIT2": 210, "F16": 1, "F32": 61}
    assert describe(smollm2_gguf).bits_per_weight_quantized is None
