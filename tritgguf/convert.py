"""Source -> packed GGUF, tensor by tensor."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from gguf import GGUFValue, GGUFValueType, LlamaFileType

from cpu_kernels.crew import Crew
from tritgguf import codec, trit_types
from tritgguf.architectures import quantized_tensor
from tritgguf.checkpoint import Source, open_source
from tritgguf.errors import TritGgufError
from tritgguf.gguf_file import F16, F32
from tritgguf.gguf_writer import PlannedTensor, StreamingWriter, check_output
from tritgguf.trit_types import TritType

_ROWS_AT_ONCE = 1 << 24  # weights of a kept tensor that are turned into halves at once


@dataclass(frozen=True)
class ConvertProgress:
    """How far a conversion is, in bytes of the source's tensors."""

    tensor: str
    bytes_done: int
    bytes_total: int


@dataclass
class ConvertReport:
    """What a conversion wrote."""

    output: Path
    source: str
    depth: int
    encoder: str
    weights: int = 0
    tensors_by_type: dict[str, int] = field(default_factory=dict)
    bytes_by_type: dict[str, int] = field(default_factory=dict)
    bits_per_weight_quantized: float = 0.0
    """Bits in the file per weight, over the packed matrices; their codebooks are metadata."""
    bits_per_weight_file: float = 0.0
    relative_error: float = 0.0
    """Root of the summed squared error over the summed squared weights, over the packed matrices."""
    kept_unaligned: list[str] = field(default_factory=list)
    """Matrices kept in F16 because their row length is no multiple of 64."""
    warnings: list[str] = field(default_factory=list)
    """What the source could not say exactly, such as an unknown pre-tokenizer."""
    file_bytes: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0


def convert(
    source: str | Path,
    output: str | Path,
    *,
    depth: int = 2,
    encoder: str = codec.DEFAULT_ENCODER,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Callable[[ConvertProgress], None] | None = None,
) -> ConvertReport:
    """Convert a checkpoint to a GGUF file with packed trit matrices.

    Args:
        source: a Hugging Face folder, a hub id or a stock GGUF file.
        output: the file to write; it appears only when it is complete.
        depth: trits per weight, 1 to 4.
        encoder: how scales are chosen, a key of `codec.ENCODERS`.
        threads: processor cores to use; None for all.
        overwrite: whether an existing output may be replaced.
        progress: called after every tensor.

    Raises:
        TritGgufError: bad input or no way to write the output; nothing is left behind.

    """
    started = time.perf_counter()
    if depth not in trit_types.DEPTHS:
        raise TritGgufError(f"depth {depth} does not exist; choose 1, 2, 3 or 4")
    if encoder not in codec.ENCODERS:
        raise TritGgufError(f"encoder {encoder} does not exist; choose from {', '.join(codec.ENCODERS)}")
    output = Path(output)
    check_output(output, overwrite)
    crew = Crew(threads)
    opened = open_source(str(source))
    plan = [_plan(tensor.name, tensor.shape, depth) for tensor in opened.tensors]
    report = ConvertReport(output, opened.name, depth, encoder, warnings=list(opened.warnings))
    total_bytes = sum(tensor.stored_bytes for tensor in opened.tensors)
    done_bytes = 0
    squares = np.zeros(2)  # of the errors, of the weights
    with StreamingWriter(output, _metadata(opened, plan, encoder), plan, overwrite=overwrite) as writer:
        for planned, tensor in zip(plan, opened.tensors, strict=True):
            writer.begin(planned)
            # Reading inside the call lets go of one matrix before the next one is read.
            squares += _write_tensor(writer, opened, planned, report, crew)
            done_bytes += tensor.stored_bytes
            if progress is not None:
                progress(ConvertProgress(planned.name, done_bytes, total_bytes))
    _summarize(report, plan)
    report.relative_error = float(np.sqrt(squares[0] / squares[1])) if squares[1] else 0.0
    report.seconds = time.perf_counter() - started
    return report


def _plan(name: str, shape: tuple[int, ...], depth: int) -> PlannedTensor:
    """Choose a tensor's type in the file: trits for a layer's matrices, F32 for vectors, F16 for the rest."""
    weights = int(np.prod(shape, dtype=np.int64))
    if len(shape) == 1:
        return PlannedTensor(name, shape, F32, 4 * weights)
    if quantized_tensor(name) and shape[-1] % trit_types.BLOCK_SIZE == 0:
        rows = weights // shape[-1]
        return PlannedTensor(name, shape, TritType.of_depth(depth), rows * trit_types.row_bytes(depth, shape[-1]))
    return PlannedTensor(name, shape, F16, 2 * weights)


def _metadata(source: Source, plan: list[PlannedTensor], encoder: str) -> dict[str, GGUFValue]:
    """Return the source's keys, then ours; codebooks hold zeros until their matrix is quantized."""
    metadata = dict(source.metadata)
    # The file mixes types that llama.cpp has no name for; "guessed" is its word for: look at the tensors.
    metadata["general.file_type"] = GGUFValue(int(LlamaFileType.GUESSED), GGUFValueType.UINT32)
    metadata["general.quantization_version"] = GGUFValue(2, GGUFValueType.UINT32)
    metadata[trit_types.KEY_VERSION] = GGUFValue(trit_types.FORMAT_VERSION, GGUFValueType.UINT32)
    metadata[trit_types.KEY_CODEC] = GGUFValue(trit_types.CODEC_NAME, GGUFValueType.STRING)
    metadata[trit_types.KEY_ENCODER] = GGUFValue(encoder, GGUFValueType.STRING)
    metadata[trit_types.KEY_GROUP_SIZE] = GGUFValue(trit_types.GROUP_SIZE, GGUFValueType.UINT32)
    metadata[trit_types.KEY_SCALE_DEPTH] = GGUFValue(trit_types.SCALE_DEPTH, GGUFValueType.UINT32)
    for tensor in plan:
        if trit_types.is_trit_type(tensor.type_id):
            metadata[trit_types.codebook_key(tensor.name)] = _codebook_value(np.zeros(trit_types.CODEBOOK_SIZE))
    return metadata


def _codebook_value(codebook: np.ndarray) -> GGUFValue:
    return GGUFValue(codebook.tolist(), GGUFValueType.ARRAY, GGUFValueType.FLOAT32)


def _write_tensor(
    writer: StreamingWriter, source: Source, planned: PlannedTensor, report: ConvertReport, crew: Crew
) -> np.ndarray:
    """Read, encode and write one tensor; return its squared error and squared weights."""
    weights = source.read(planned.name)
    if not trit_types.is_trit_type(planned.type_id):
        _write_kept(writer, source, planned, weights)
        return np.zeros(2)
    try:
        matrix = codec.quantize(weights, report.depth, report.encoder, crew)
    except ValueError as error:
        raise TritGgufError(f"{source.name}: tensor {planned.name} {error}; the checkpoint is damaged") from error
    writer.write(matrix.pack(crew))
    writer.set_metadata(trit_types.codebook_key(planned.name), _codebook_value(matrix.codebook))
    return np.array([matrix.squared_error, matrix.squared_weights])


def _write_kept(writer: StreamingWriter, source: Source, tensor: PlannedTensor, weights: np.ndarray) -> None:
    """Write a tensor that is not packed, a few rows at a time so that no second copy of it exists."""
    rows = weights.reshape(-1, tensor.shape[-1])
    step = max(1, _ROWS_AT_ONCE // tensor.shape[-1])
    dtype = np.float32 if tensor.type_id == F32 else np.float16
    for start in range(0, len(rows), step):
        with np.errstate(over="ignore"):
            part = rows[start : start + step].astype(dtype, copy=False)
        if not np.isfinite(part).all():
            raise TritGgufError(
                f"{source.name}: tensor {tensor.name} has a weight that is NaN, infinite or too large"
                " for F16; the checkpoint is damaged"
            )
        writer.write(part)


def _summarize(report: ConvertReport, plan: list[PlannedTensor]) -> None:
    packed_bytes = packed_weights = 0
    for tensor in plan:
        packed = trit_types.is_trit_type(tensor.type_id)
        name = TritType(tensor.type_id).name if packed else {F32: "F32", F16: "F16"}[tensor.type_id]
        weights = int(np.prod(tensor.shape, dtype=np.int64))
        report.tensors_by_type[name] = report.tensors_by_type.get(name, 0) + 1
        report.bytes_by_type[name] = report.bytes_by_type.get(name, 0) + tensor.n_bytes
        report.weights += weights
        if packed:
            packed_bytes, packed_weights = (packed_bytes + tensor.n_bytes, packed_weights + weights)
        elif quantized_tensor(tensor.name):
            report.kept_unaligned.append(tensor.name)
    report.file_bytes = report.output.stat().st_size
    report.bits_per_weight_quantized = 8 * packed_bytes / packed_weights if packed_weights else 0.0
    report.bits_per_weight_file = 8 * report.file_bytes / report.weights
    report.peak_memory_bytes = _peak_memory_bytes()


def _peak_memory_bytes() -> int:
    """Return the largest resident set of this process so far; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
