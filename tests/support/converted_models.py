"""Tiny models in other forms: with a damaged weight, as a stock GGUF file, or there and back."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValue
from gguf.quants import quantize
from tiny_models import random_weights, read_config, write_shards, write_tiny_model

from tritgguf.architectures.tensor_names import quantized_tensor
from tritgguf.conversion.convert import convert
from tritgguf.exporters.export import export
from tritgguf.formats.gguf_writer import PlannedTensor, StreamingWriter
from tritgguf.sources.open import open_source
from tritgguf.sources.source import Source


def damaged_model(folder: Path, hf_name: str, value: float, variant: str = "llama", dtype: str = "F32") -> Path:
    """Write a tiny model with one bad weight."""
    write_tiny_model(folder, variant)
    weights = random_weights(read_config(folder))
    weights[hf_name].reshape(-1)[7] = value
    write_shards(folder, weights, dtype)
    return folder


def as_stock_gguf(
    source: Source,
    path: Path,
    metadata: dict[str, GGUFValue] | None = None,
    matrices: GGMLQuantizationType = GGMLQuantizationType.F16,
) -> Path:
    """Write a source as a stock GGUF file: matrices of the layers in a type, others in F16, vectors in F32."""
    plan = []
    for tensor in source.tensors:
        matrix_type = matrices if quantized_tensor(tensor.name) else GGMLQuantizationType.F16
        ggml_type = GGMLQuantizationType.F32 if len(tensor.shape) == 1 else matrix_type
        block, size = GGML_QUANT_SIZES[ggml_type]
        plan.append(PlannedTensor(tensor.name, tensor.shape, ggml_type, math.prod(tensor.shape) // block * size))
    with StreamingWriter(path, {**source.metadata, **(metadata or {})}, plan) as writer:
        for planned in plan:
            writer.begin(planned)
            writer.write(quantize(source.read(planned.name), GGMLQuantizationType(planned.type_id)))
    return path


def assert_no_number_differs(model: Path, folder: Path) -> None:
    """Convert a model there and back in a folder: HF -> trit -> HF -> trit -> HF, and by way of a stock file."""
    convert(model, folder / "a.gguf")
    export(folder / "a.gguf", folder / "hf", to="hf")
    assert convert(folder / "hf", folder / "b.gguf").encoder == "recover"
    export(folder / "b.gguf", folder / "again", to="hf")
    assert (folder / "hf/model.safetensors").read_bytes() == (folder / "again/model.safetensors").read_bytes()
    export(folder / "a.gguf", folder / "stock.gguf", to="f16")
    assert convert(folder / "stock.gguf", folder / "c.gguf").encoder == "recover"
    first, last = open_source(folder / "hf"), open_source(folder / "stock.gguf")
    for tensor in first.tensors:
        np.testing.assert_array_equal(first.read(tensor.name), last.read(tensor.name))
