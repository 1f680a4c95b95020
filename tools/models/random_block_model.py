"""A GGUF file in one of llama.cpp's types in the shape of a known model, written directly from random blocks.

It is for measurements of time and memory on models whose original would not fit the disk. Every block but its scales is
random; embeddings and output head are Gaussian in F16, as in `random_packed_model`, routers in F32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from tools.models.random_model import add_metadata, random_rows
from tritgguf.architectures.dimensions import Dimensions
from tritgguf.architectures.tensor_names import kept_in_float32, quantized_tensor

# Of each type: the places of the F16 scales in a block, in bytes, and the standard deviation of random weights at 1.
_SCALES = {
    Type.Q4_0: ((0,), 4.6),
    Type.Q3_K: ((108,), 43.0),
    Type.Q5_K: ((0, 2), 420.0),
}
_AT_ONCE = 1 << 24  # weights


def write_block_model(path: Path, architecture: str, sizes: Dimensions, type_id: Type, seed: int = 0) -> None:
    """Write the file; it appears when it is complete. The same seed gives the same bytes."""
    generator = np.random.default_rng(seed)
    partial = path.with_name(path.name + ".partial")
    writer = gguf.GGUFWriter(partial, architecture)
    add_metadata(writer, architecture, sizes)
    shapes = sizes.shapes()
    for name, shape in shapes.items():
        kept = Type.F32 if len(shape) == 1 or kept_in_float32(name) else Type.F16
        type_of = type_id if quantized_tensor(name) else kept
        block, size = gguf.GGML_QUANT_SIZES[type_of]
        n_bytes = math.prod(shape) // block * size
        # gguf-py takes the shape of the bytes where it is told the type.
        writer.add_tensor_info(name, (*shape[:-1], shape[-1] // block * size), np.dtype(np.uint8), n_bytes, type_of)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        for name, shape in shapes.items():
            file = writer.fout[0]
            writer.write_padding(file, file.tell())
            rows = _blocks(shape, type_id, generator) if quantized_tensor(name) else random_rows(name, shape, generator)
            for part in rows:
                file.write(part.tobytes())
            writer.write_padding(file, file.tell())
        writer.close()
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _blocks(shape: tuple[int, ...], type_id: Type, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield a tensor's blocks, uint8 [blocks, bytes of a block], a part at a time."""
    length, size = gguf.GGML_QUANT_SIZES[type_id]
    places, deviation = _SCALES[type_id]
    scale = np.array([shape[-1] ** -0.5 / deviation], "<f2").view(np.uint8)
    count = math.prod(shape) // length
    step = _AT_ONCE // length
    for first in range(0, count, step):
        blocks = generator.integers(0, 256, (min(step, count - first), size), np.uint8)
        for place in places:
            blocks[:, place : place + 2] = scale
        yield blocks
