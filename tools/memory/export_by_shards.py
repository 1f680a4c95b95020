"""Export a trit file to float16 shards that do not fit the disk together: each is written, compared and removed.

    python -m tools.memory.export_by_shards model-d2.gguf --folder /scratch

The shards are those of `export --to hf`, by the same code. Each is opened as a safetensors file, and every number is
compared, bit by bit, with what docs/reference_decoder.py makes of the trit file. The first that differs ends the tool.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from cpu_kernels.threads.thread_pool import ThreadPool
from tools import tool_command
from tools.recovery.recover_roundtrip import reference_halves
from tritgguf.architectures.tensor_names import gguf_tensor_name, to_hf
from tritgguf.cli import terminal
from tritgguf.errors import TritGgufError
from tritgguf.exporters.hf_folder import HuggingFaceFolder
from tritgguf.formats.gguf_file import GgufFile, open_trit_file
from tritgguf.formats.gguf_header import F32
from tritgguf.formats.safetensors_reader import StoredTensor, open_shards
from tritgguf.formats.trit_types import TritType, is_trit_type
from tritgguf.text_format import parse_bytes

_WEIGHTS_AT_ONCE = 1 << 20  # they and what NumPy makes of them stay in the processor's cache


def export_by_shards(file: GgufFile, folder: Path, max_shard_bytes: int) -> Iterator[tuple[str, int, int]]:
    """Write, compare and remove each shard in turn; yield its name, its bytes and the number of equal weights.

    Raises TritGgufError for a weight that differs, for the tensors of experts, which this does not compare, and as
    `export` does.
    """
    planned = HuggingFaceFolder(
        file,
        max_shard_bytes=max_shard_bytes,
        base_model=None,
        thread_pool=ThreadPool(),
        on_matrix=lambda name: None,
    )
    for shard in planned.shards:
        with tempfile.TemporaryDirectory(dir=folder) as part:
            planned.write_shard(Path(part), shard)
            written = Path(part, shard.file_name)
            n_bytes = written.stat().st_size
            written.rename(written.with_name("model.safetensors"))  # a folder of its own, which readers take
            tensors = open_shards(Path(part))
            if list(tensors) != sorted(shard.shapes):
                raise TritGgufError(f"{shard.file_name}: has other tensors than planned")
            yield shard.file_name, n_bytes, sum(compare(file, name, stored) for name, stored in tensors.items())


def compare(file: GgufFile, hf_name: str, stored: StoredTensor) -> int:
    """Compare a tensor of a shard with the trit file's, bit by bit; return the number of weights.

    Raises TritGgufError for a weight that differs, and for a tensor that a dense model does not have.
    """
    arch = file.metadata["general.architecture"]
    name = gguf_tensor_name(arch, hf_name)
    if name is None:
        raise TritGgufError(f"{file.path}: tensor {hf_name} is one of a mixture; this compares dense models only")
    info = file.tensors[name]
    if stored.dtype != "F16" or stored.shape != info.shape:
        raise TritGgufError(f"{hf_name} is {stored.dtype} {stored.shape}, and should be F16 {info.shape}")
    if len(info.shape) == 1:
        heads = (file.metadata[f"{arch}.attention.{key}"] for key in ("head_count", "head_count_kv"))
        expected = to_hf(arch, name, file.raw(name).view(_dtype(info.type_id)), *heads).astype(np.float16)
        _check_equal(hf_name, 0, stored.read_stored(), expected)
        return info.n_weights
    head_dim = info.shape[0] // file.metadata[f"{arch}.attention.head_count"]
    head_dim = file.metadata.get(f"{arch}.attention.key_length", head_dim)
    step = -(-max(1, _WEIGHTS_AT_ONCE // info.shape[1]) // head_dim) * head_dim
    for first in range(0, info.shape[0], step):
        last = min(first + step, info.shape[0])
        heads_here = (last - first) // head_dim
        expected = to_hf(arch, name, reference_rows(file, name, first, last), heads_here, heads_here)
        _check_equal(hf_name, first, stored.read_rows(first, last), expected)
    file.release(name)
    return info.n_weights


def reference_rows(file: GgufFile, name: str, first: int, last: int) -> np.ndarray:
    """Return rows of a matrix as the reference decoder has them: float16 [rows, columns]."""
    info = file.tensors[name]
    rows, columns = file.raw(name).reshape(info.shape[0], -1)[first:last], info.shape[1]
    if is_trit_type(info.type_id):
        depth = TritType(info.type_id).depth
        return reference_halves(rows, columns, depth, file.codebook(name), np.dtype(np.float16))
    return rows.view(_dtype(info.type_id)).astype(np.float16)


def _dtype(type_id: int) -> np.dtype:
    return np.dtype(np.float32 if type_id == F32 else np.float16)


def _check_equal(hf_name: str, first: int, found: np.ndarray, expected: np.ndarray) -> None:
    differ = found.view(np.uint16) != expected.view(np.uint16)
    if differ.any():
        place = np.argwhere(differ)[0]
        raise TritGgufError(
            f"{hf_name}: {differ.sum()} of {differ.size} weights from row {first} on differ, the first at"
            f" {place.tolist()}: {found[tuple(place)]}, and should be {expected[tuple(place)]}"
        )


def main(
    file: Annotated[Path, typer.Argument(help="A trit file of a dense model.")],
    folder: Annotated[
        Path | None, typer.Option(help="Where to write.", show_default="the system's temporary folder")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Maximum size of a shard.")] = "5GB",
) -> None:
    """Export a trit file shard by shard, comparing and removing each."""
    max_shard_bytes = parse_bytes(max_shard_size)
    if max_shard_bytes is None:
        raise typer.BadParameter(f"{max_shard_size} is not a size; write it like 5GB")
    total = weights = shards = 0
    for name, n_bytes, count in export_by_shards(
        open_trit_file(file), folder or Path(tempfile.gettempdir()), max_shard_bytes
    ):
        terminal.note(f"{name}: {n_bytes / 1e9:.2f} GB, {count} weights are those of the reference decoder")
        total, weights, shards = total + n_bytes, weights + count, shards + 1
    terminal.print_json({"shards": shards, "bytes": total, "weights": weights})


if __name__ == "__main__":
    tool_command.run(main)
