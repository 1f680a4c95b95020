"""Trit file -> a stock GGUF file, which llama.cpp and what is built on it load."""

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

# Type of the matrices, and what general.file_type then says.
STOCK_TYPES = {
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
_COPIED_AT_ONCE = 1 << 26


def export_file(
    file: GgufFile, output: Path, *, to: str, overwrite: bool, thread_pool: ThreadPool, on_tensor: Callable[[str], None]
) -> list[PlannedTensor]:
    """Write the file and return its tensors; it appears only when it is complete.

    `to` is a key of STOCK_TYPES; `on_tensor` is called with a tensor's name when it has been written. Only trit
    tensors change their type: a layer's matrices take the one that `to` names, others F16. Raises TritGgufError for
    an output that exists unless `overwrite`, and for a weight that the type cannot hold.
    """
    kind, file_type = STOCK_TYPES[to]
    plan = [_plan(info, kind) for info in file.tensors.values()]
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


def _plan(info: TensorInfo, kind: GGMLQuantizationType) -> PlannedTensor:
    if not trit_types.is_trit_type(info.type_id):
        return PlannedTensor(info.name, info.shape, info.type_id, info.n_bytes)
    if not quantized_tensor(info.name):
        kind = GGMLQuantizationType.F16
    return PlannedTensor(info.name, info.shape, int(kind), stored_bytes(info.shape, kind))


def _metadata(file: GgufFile, file_type: LlamaFileType) -> dict[str, GGUFValue]:
    """Return the file's keys but for those about trits, with the type of the file."""
    metadata = file.stock_metadata()
    metadata["general.file_type"] = GGUFValue(int(file_type), GGUFValueType.UINT32)
    metadata["general.quantization_version"] = GGUFValue(2, GGUFValueType.UINT32)
    return metadata


def _copy(writer: StreamingWriter, file: GgufFile, name: str) -> None:
    raw = file.raw(name)
    for start in range(0, len(raw), _COPIED_AT_ONCE):
        writer.write(raw[start : start + _COPIED_AT_ONCE])
    file.release(name)
