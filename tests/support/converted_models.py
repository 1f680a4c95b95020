"""Tiny models in other forms: with a damaged weight, or as a stock GGUF file."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from gguf import GGUFValue
from tiny_models import random_weights, read_config, write_shards, write_tiny_model

from tritgguf.formats.gguf_header import F16, F32
from tritgguf.formats.gguf_writer import PlannedTensor, StreamingWriter
from tritgguf.sources.source import Source


def damaged_model(folder: Path, hf_name: str, value: float, variant: str = "llama", dtype: str = "F32") -> Path:
    """Write a tiny model with one bad weight."""
    write_tiny_model(folder, variant)
    weights = random_weights(read_config(folder))
    weights[hf_name].reshape(-1)[7] = value
    write_shards(folder, weights, dtype)
    return folder


def as_stock_gguf(source: Source, path: Path, metadata: dict[str, GGUFValue] | None = None) -> Path:
    """Write a source as a stock GGUF file: matrices in F16, vectors in F32."""
    plan = []
    for tensor in source.tensors:
        type_id, size = (F32, 4) if len(tensor.shape) == 1 else (F16, 2)
        plan.append(PlannedTensor(tensor.name, tensor.shape, type_id, size * math.prod(tensor.shape)))
    with StreamingWriter(path, {**source.metadata, **(metadata or {})}, plan) as writer:
        for planned in plan:
            writer.begin(planned)
            writer.write(source.read(planned.name).astype(np.float32 if planned.type_id == F32 else np.float16))
    return path
