"""Writing float16 weights as safetensors shards, tensor by tensor.

A file is the header's length (8 bytes, little-endian), the header (JSON, padded with spaces to a multiple of 8), then
the data of all tensors without gaps (https://github.com/huggingface/safetensors#format). We do not use the safetensors
library because it needs each shard in memory as a whole.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

INDEX_NAME = "model.safetensors.index.json"
_SINGLE_NAME = "model.safetensors"


@dataclass
class Shard:
    """A file of weights: its name and the shapes of its tensors, in order."""

    file_name: str = ""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def n_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(map(half_bytes, self.shapes.values()))

    def header(self) -> bytes:
        """Return the bytes before the data: length and JSON."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, shape in self.shapes.items():
            end = offset + half_bytes(shape)
            entries[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def half_bytes(shape: tuple[int, ...]) -> int:
    """Return the size of a float16 tensor in bytes."""
    return 2 * math.prod(shape)


def plan_shards(shapes: Mapping[str, tuple[int, ...]], most_bytes: int) -> list[Shard]:
    """Distribute tensors in order over shards of at most `most_bytes` bytes of weights.

    A larger tensor gets a shard of its own. The shards have the file names that transformers expects.
    """
    shards = [Shard()]
    for name, shape in shapes.items():
        if shards[-1].shapes and shards[-1].n_bytes + half_bytes(shape) > most_bytes:
            shards.append(Shard())
        shards[-1].shapes[name] = shape
    for number, shard in enumerate(shards, 1):
        shard.file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else _SINGLE_NAME
    return shards


def index(shards: Iterable[Shard]) -> dict[str, Any]:
    """Return the content of model.safetensors.index.json."""
    shards = list(shards)
    return {
        "metadata": {"total_size": sum(shard.n_bytes for shard in shards)},
        "weight_map": {name: shard.file_name for shard in shards for name in shard.shapes},
    }


def write_shard(folder: Path, shard: Shard, blocks: Callable[[str], Iterator[np.ndarray]]) -> None:
    """Write a shard and sync it. `blocks` takes a tensor's name and yields its float16 values in order."""
    with (folder / shard.file_name).open("wb") as file:
        file.write(shard.header())
        for name, shape in shard.shapes.items():
            missing = half_bytes(shape)
            for block in blocks(name):
                file.write(np.ascontiguousarray(block, dtype="<f2").data)
                missing -= block.nbytes
            if missing:
                raise ValueError(f"tensor {name} is {missing} bytes shorter than planned")
        file.flush()
        os.fsync(file.fileno())
