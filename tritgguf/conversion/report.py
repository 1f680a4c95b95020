"""What a conversion reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


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
    """Root of the summed squared error over the summed squared weights, over the matrices packed here."""
    kept_unaligned: list[str] = field(default_factory=list)
    """Matrices kept in F16 because their row length is no multiple of 64."""
    warnings: list[str] = field(default_factory=list)
    """What the source could not say exactly, such as an unknown pre-tokenizer, and what packing twice loses."""
    file_bytes: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0
