"""The report of a conversion."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tritgguf.conversion.plan import ConversionPlan
from tritgguf.formats import trit_types
from tritgguf.formats.file_parts import FilePart, file_parts
from tritgguf.formats.gguf_header import F16, F32
from tritgguf.formats.gguf_writer import PlannedTensor
from tritgguf.formats.trit_types import TritType
from tritgguf.machine import peak_memory_bytes
from tritgguf.sources.source import weights_of_a_token


@dataclass
class ConvertReport:
    """Sizes, errors and warnings of a conversion."""

    output: Path
    source: str
    depth: int
    encoder: str
    weights: int = 0
    used_weights: int = 0
    """How many of them a token uses."""
    from_trits: bool = False
    """Whether the source holds packed trits."""
    tensors_by_type: dict[str, int] = field(default_factory=dict)
    bytes_by_type: dict[str, int] = field(default_factory=dict)
    parts: list[FilePart] = field(default_factory=list)
    """What the file consists of."""
    bits_per_weight_quantized: float = 0.0
    """Bits per weight in the file, over the packed matrices; codebooks are metadata and do not count."""
    bits_per_weight_file: float = 0.0
    relative_error: float = 0.0
    """Square root of summed squared error / summed squared weights, over the matrices packed in this conversion."""
    kept_unaligned: list[str] = field(default_factory=list)
    """Matrices kept in F16 because their row length is not a multiple of 64."""
    warnings: list[str] = field(default_factory=list)
    """Warnings, for example about an unknown pre-tokenizer or about quantizing trits again."""
    file_bytes: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0

    @property
    def notes(self) -> list[str]:
        """What else the user should know, one line each."""
        if not self.kept_unaligned:
            return []
        return [f"kept in F16, because their row length is not a multiple of 64: {', '.join(self.kept_unaligned)}"]

    def as_dict(self) -> dict[str, Any]:
        """Return what `convert --json` prints."""
        return {**vars(self), "parts": [part.as_dict() for part in self.parts]}


def conversion_report(
    plan: ConversionPlan, output: Path, squares: tuple[float, float], seconds: float, warnings: list[str]
) -> ConvertReport:
    """Return the report of a completed conversion.

    Args:
        plan: the plan of the file.
        output: the file.
        squares: the sums of the squared errors and of the squared weights, over the matrices packed in this
            conversion.
        seconds: duration of the conversion.
        warnings: those of the encoder, in addition to the plan's.

    """
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for tensor in plan.tensors:
        counts[_type_name(tensor)] += 1
        sizes[_type_name(tensor)] += tensor.n_bytes
    packed = [tensor for tensor in plan.tensors if trit_types.is_trit_type(tensor.type_id)]
    weights, packed_weights = _weights(plan.tensors), _weights(packed)
    packed_bytes, file_bytes = sum(tensor.n_bytes for tensor in packed), output.stat().st_size
    error, power = squares
    return ConvertReport(
        output,
        plan.source.name,
        plan.depth,
        plan.recovery.encoder,
        weights=weights,
        used_weights=weights_of_a_token(plan.source),
        from_trits=any(plan.source.packed_depth(tensor.name) for tensor in plan.tensors),
        tensors_by_type=dict(counts),
        bytes_by_type=dict(sizes),
        parts=file_parts([(t.name, _type_name(t), math.prod(t.shape), t.n_bytes) for t in plan.tensors], file_bytes),
        bits_per_weight_quantized=8 * packed_bytes / packed_weights if packed_weights else 0.0,
        bits_per_weight_file=8 * file_bytes / weights,
        relative_error=math.sqrt(error / power) if power else 0.0,
        kept_unaligned=plan.kept_unaligned,
        warnings=[*plan.warnings, *warnings],
        file_bytes=file_bytes,
        seconds=seconds,
        peak_memory_bytes=peak_memory_bytes(),
    )


def _type_name(tensor: PlannedTensor) -> str:
    if trit_types.is_trit_type(tensor.type_id):
        return TritType(tensor.type_id).name
    return {F32: "F32", F16: "F16"}[tensor.type_id]


def _weights(tensors: list[PlannedTensor]) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors)
