"""Export a trit file for other programs: as a Hugging Face folder or a stock GGUF file."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpu_kernels.threads.thread_pool import ThreadPool
from tritgguf.errors import TritGgufError
from tritgguf.exporters.hf_folder import export_folder
from tritgguf.exporters.stock_gguf import STOCK_TYPES, export_file
from tritgguf.formats import durable_output, trit_types
from tritgguf.formats.file_kinds import is_hub_id
from tritgguf.formats.gguf_file import GgufFile, open_trit_file
from tritgguf.formats.stacks import split_matrix_name
from tritgguf.machine import peak_memory_bytes
from tritgguf.runtime.compiler import prepare_kernels
from tritgguf.runtime.config import ModelConfig
from tritgguf.text_format import parse_bytes

FORMATS = ("hf", *STOCK_TYPES)
_KEY_SOURCE = "general.source.repo_url"
_HUB = "https://huggingface.co/"


@dataclass
class ExportReport:
    """Files, sizes and warnings of an export."""

    output: Path
    source: Path
    to: str
    weights: int = 0
    files: dict[str, int] = field(default_factory=dict)
    """File name -> size in bytes."""
    output_bytes: int = 0
    source_bytes: int = 0
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    peak_memory_bytes: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return what `export --json` prints."""
        return {**vars(self), "output": str(self.output), "source": str(self.source)}


def export(
    file: str | Path,
    output: str | Path,
    *,
    to: str,
    max_shard_size: int | str = "5GB",
    base_model: str | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> ExportReport:
    """Write a trit file's model in a format that other programs load.

    Args:
        file: a GGUF file that `convert` wrote.
        output: the folder (`hf`) or file to write; it appears only when it is complete.
        to: `hf` for a Hugging Face folder of float16 weights; `f16`, `bf16`, `q8_0` or `q4_0` for a stock GGUF file
            with its matrices in that type.
        max_shard_size: maximum size of one safetensors file, in bytes or like "5GB" and "500MiB".
        base_model: hub id of the source model for the model card; None means the one that the file names.
        threads: processor cores to use; None means all.
        overwrite: whether an existing file may be replaced; a folder is never replaced.
        progress: called after every tensor or expert with its name, the bytes of the file done and their total.

    Raises:
        TritGgufError: bad input, or the output cannot be written; no output is left.

    """
    started = time.perf_counter()
    if to not in FORMATS:
        raise TritGgufError(f"format {to} does not exist; choose from {', '.join(FORMATS)}")
    if base_model is not None and not is_hub_id(base_model):
        raise TritGgufError(f"base model {base_model} is not a hub id (organization/name)")
    output, max_shard_bytes = Path(output), _shard_bytes(max_shard_size)
    if to == "hf":
        durable_output.check_new_folder(output)
    else:
        durable_output.check_output(output, overwrite, [file])
    opened = _open_trit_file(file)
    started += prepare_kernels()
    report = ExportReport(output, opened.path, to, weights=sum(info.n_weights for info in opened.tensors.values()))
    on_tensor, thread_pool = _progress_counter(opened, progress), ThreadPool(threads)
    if to == "hf":
        base_model = base_model or _source_hub_id(opened)
        if base_model is None:
            report.warnings.append(f"{file} does not name its source model; give --base-model for the model card")
        report.files = export_folder(
            opened,
            output,
            max_shard_bytes=max_shard_bytes,
            base_model=base_model,
            thread_pool=thread_pool,
            on_matrix=on_tensor,
        )
    else:
        export_file(opened, output, to=to, overwrite=overwrite, thread_pool=thread_pool, on_tensor=on_tensor)
        report.files = {output.name: output.stat().st_size}
    report.output_bytes, report.source_bytes = sum(report.files.values()), opened.path.stat().st_size
    report.seconds, report.peak_memory_bytes = time.perf_counter() - started, peak_memory_bytes()
    return report


def _progress_counter(file: GgufFile, progress: Callable[[str, int, int], None] | None) -> Callable[[str], None]:
    """Return a function that counts a finished tensor, or matrix of a stack, by name and calls `progress`."""
    total, done = sum(info.n_bytes for info in file.tensors.values()), 0

    def count(name: str) -> None:
        nonlocal done
        tensor, index = split_matrix_name(name)
        info = file.tensors[tensor]
        done += info.n_bytes if index is None else info.n_bytes // info.n_matrices
        if progress is not None:
            progress(name, done, total)

    return count


def _open_trit_file(path: str | Path) -> GgufFile:
    """Open a trit file; check that each packed tensor has a codebook, and that a model is one that can be run."""
    file = open_trit_file(path)
    for name, info in file.tensors.items():
        if trit_types.is_trit_type(info.type_id):
            file.stored_codebooks(name)
    if "token_embd.weight" in file.tensors:
        ModelConfig.from_file(file)
    return file


def _shard_bytes(size: int | str) -> int:
    """Return a shard's size, such as 5GB or 500MiB, in bytes; TritGgufError if it is none."""
    count = parse_bytes(str(size))
    if count is None:
        raise TritGgufError(f"shard size {size} is not a size; write it like 5GB or 500MiB")
    return count


def _source_hub_id(file: GgufFile) -> str | None:
    """Return the hub id of the source model if the file names it, else None."""
    url = str(file.metadata.get(_KEY_SOURCE, ""))
    hub_id = url.removeprefix(_HUB).strip("/")
    return hub_id if url.startswith(_HUB) and is_hub_id(hub_id) else None
