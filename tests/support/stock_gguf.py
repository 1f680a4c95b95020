"""Trit files as stock GGUF files for llama.cpp, in forms that `export` does not write."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gguf import GGUFValue, GGUFValueType, LlamaFileType

from tritgguf.formats.gguf_file import GgufFile
from tritgguf.formats.gguf_header import F32
from tritgguf.formats.gguf_writer import PlannedTensor, StreamingWriter
from tritgguf.sources.source import Source


def write_float32(file: GgufFile, output: Path) -> Path:
    """Write every tensor dequantized to F32, without rounding; return the new file's path."""
    metadata = {key: file.value(key) for key in file.metadata if not key.startswith("trit.")}
    tensors = file.tensors.values()
    plan = [PlannedTensor(info.name, info.shape, F32, 4 * info.n_weights) for info in tensors]
    with StreamingWriter(output, _all_float32(metadata), plan) as writer:
        for tensor in plan:
            writer.begin(tensor)
            writer.write(file.read_float32(tensor.name))
    return output


def write_vocabulary(source: Source, output: Path) -> Path:
    """Write a source's metadata as `convert` does, without tensors; return the new file's path."""
    return write_keys(source.metadata, output)


def write_keys(metadata: Mapping[str, GGUFValue], output: Path) -> Path:
    """Write a file of keys without tensors; return its path."""
    with StreamingWriter(output, _all_float32(metadata), []):
        return output


def _all_float32(metadata: Mapping[str, GGUFValue]) -> dict[str, GGUFValue]:
    return {**metadata, "general.file_type": GGUFValue(int(LlamaFileType.ALL_F32), GGUFValueType.UINT32)}
