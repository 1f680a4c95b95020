"""Export a trit file as a stock GGUF file for llama.cpp and programs built on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gguf import GGMLQuantizationType, GGUFValue, GGUFValueType, LlamaFileType

from cpu_kernels.threads.thread_pool import ThreadPool
from tritgguf.architectures.tensor_names import quantized_tensor
from tritgguf.exporters.row_blocks import RowBlocks, stored_bytes
from tritgguf.formats import trit_types
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.formats.gguf_header import TensorInfo
from tritgguf.formats.gguf_writer import PlannedTensor, StreamingWriter

# Format -> type of the matrices, and value of general.file_type.
STOCK_TYPES = {
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
_COPY_BYTES = 1 << 26


def export_file(
    file: GgufFile, output: Path, *, to: str, overwrite: bool, thread_pool: ThreadPool, on_tensor: Callable[[str], None]
) -> list[PlannedTensor]:
    """Write the file and return its tensors; it appears only when it is complete.

    `to` is a key of STOCK_TYPES; `on_tensor` is called with a tensor's name after it is written. Only trit tensors
    change their type: matrices of the layers get the type that `to` names, others F16. Raises TritGgufError if the
    output exists and `overwrite` is false, or if the type cannot hold a weight.
    """
    matrix_type, file_type = STOCK_TYPES[to]
    plan = [_plan(info, matrix_type) for info in file.tensors.values()]
    with StreamingWriter(output, _metadata(file, file_type), plan, overwrite=overwrite) as writer:
        for planned in plan:
            writer.begin(planned)
            if planned.type_id == file.tensors[planned.name].type_id:
                _copy(writer, file, planned.name)
            else:
                rows = RowBlocks(file, planned.name, thread_pool)
                for block in rows.stored_as(GGMLQuantizationType(planned.type_id)):
                    writer.write(block)
            on_tensor(planned.name)
    return plan


def _plan(info: TensorInfo, matrix_type: GGMLQuantizationType) -> PlannedTensor:
    if not trit_types.is_trit_type(info.type_id):
        return PlannedTensor(info.name, info.shape, info.type_id, info.n_bytes)
    ggml_type = matrix_type if quantized_tensor(info.name) else GGMLQuantizationType.F16
    return PlannedTensor(info.name, info.shape, int(ggml_type), stored_bytes(info.shape, ggml_type))


def _metadata(file: GgufFile, file_type: LlamaFileType) -> dict[str, GGUFValue]:
    """Return the file's keys without the trit keys, with the new file type."""
    metadata = file.stock_metadata()
    metadata["general.file_type"] = GGUFValue(int(file_type), GGUFValueType.UINT32)
    metadata["general.quantization_version"] = GGUFValue(2, GGUFValueType.UINT32)
    return metadata


def _copy(writer: StreamingWriter, file: GgufFile, name: str) -> None:
    raw = file.raw(name)
    for start in range(0, len(raw), _COPY_BYTES):
        writer.write(raw[start : start + _COPY_BYTES])
    file.release(name)
