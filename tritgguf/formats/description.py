"""Description of a GGUF file: metadata, tensors, codebooks and bits per weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritgguf.formats.file_parts import FilePart, file_parts
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.formats.gguf_header import TensorInfo
from tritgguf.formats.scores import Score, read_score
from tritgguf.formats.stacks import matrix_count
from tritgguf.formats.trit_types import checksum_key, codebook_key, is_trit_type


@dataclass(frozen=True)
class TensorDescription:
    """One tensor; `shape` has the row length last.

    `codebook` has 27 scales for each matrix of a trit tensor, one matrix after the other, or 27 scales for all of them.
    It is None for other tensors.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    bytes: int
    codebook: tuple[float, ...] | None
    xxh3: int | None = None
    """Checksum of the tensor's bytes; None in files of earlier versions."""

    @property
    def weights(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def matrices(self) -> int:
        """Number of matrices, which are experts; 1 unless the tensor is a stack."""
        return matrix_count(self.shape)


@dataclass(frozen=True)
class TypeSummary:
    """Totals of all tensors of one type."""

    type: str
    tensors: int
    weights: int
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight in the file."""
        return self.bytes * 8 / self.weights


@dataclass(frozen=True)
class FileDescription:
    """A file; `metadata` has every key except codebooks and checksums, which are in `tensors`."""

    path: Path
    name: str
    architecture: str
    file_bytes: int
    metadata: dict[str, Any]
    tensors: list[TensorDescription]

    @property
    def score(self) -> Score | None:
        """What was measured of the file, if it says so."""
        return read_score(self.metadata)

    @property
    def weights(self) -> int:
        """Number of weights in all tensors."""
        return sum(tensor.weights for tensor in self.tensors)

    @property
    def bits_per_weight_file(self) -> float | None:
        """Size of the whole file in bits, divided by its weights; None for a file without tensors."""
        return self.file_bytes * 8 / self.weights if self.weights else None

    @property
    def bits_per_weight_quantized(self) -> float | None:
        """Bits per weight of the trit tensors; None if there are none."""
        trit = [tensor for tensor in self.tensors if tensor.codebook is not None]
        if not trit:
            return None
        return sum(tensor.bytes for tensor in trit) * 8 / sum(tensor.weights for tensor in trit)

    @property
    def types(self) -> list[TypeSummary]:
        """Summaries of the tensor types, largest first."""
        groups: dict[str, list[TensorDescription]] = {}
        for tensor in self.tensors:
            groups.setdefault(tensor.type, []).append(tensor)
        summaries = [
            TypeSummary(
                type=type_name,
                tensors=len(tensors),
                weights=sum(tensor.weights for tensor in tensors),
                bytes=sum(tensor.bytes for tensor in tensors),
            )
            for type_name, tensors in groups.items()
        ]
        return sorted(summaries, key=lambda summary: -summary.bytes)

    @property
    def parts(self) -> list[FilePart]:
        """What the file consists of."""
        return file_parts([(t.name, t.type, t.weights, t.bytes) for t in self.tensors], self.file_bytes)

    def as_dict(self) -> dict[str, Any]:
        """Return everything, as `inspect --json` prints it; NaN and infinity become text, because JSON lacks them."""
        return {
            "path": str(self.path),
            "name": self.name,
            "architecture": self.architecture,
            "file_bytes": self.file_bytes,
            "weights": self.weights,
            "bits_per_weight_quantized": self.bits_per_weight_quantized,
            "bits_per_weight_file": self.bits_per_weight_file,
            "score": None if self.score is None else vars(self.score),
            "types": [{**vars(summary), "bits_per_weight": summary.bits_per_weight} for summary in self.types],
            "parts": [part.as_dict() for part in self.parts],
            "metadata": {key: _json_value(value) for key, value in self.metadata.items()},
            "tensors": [
                {**vars(tensor), "matrices": tensor.matrices, "weights": tensor.weights} for tensor in self.tensors
            ],
        }


def describe(path: str | Path) -> FileDescription:
    """Read and check the header of any GGUF file, with or without trit tensors. Raises TritGgufError."""
    file = GgufFile(path)
    tensor_keys = {key for name in file.tensors for key in (codebook_key(name), checksum_key(name))}
    metadata = {key: value for key, value in file.metadata.items() if key not in tensor_keys}
    return FileDescription(
        path=file.path,
        name=str(metadata.get("general.name", file.path.stem)),
        architecture=str(metadata.get("general.architecture", "unknown")),
        file_bytes=file.path.stat().st_size,
        metadata=metadata,
        tensors=[_describe_tensor(file, info) for info in file.tensors.values()],
    )


def _describe_tensor(file: GgufFile, info: TensorInfo) -> TensorDescription:
    return TensorDescription(
        name=info.name,
        type=info.type_name,
        shape=info.shape,
        bytes=info.n_bytes,
        codebook=tuple(file.stored_codebooks(info.name).reshape(-1).tolist()) if is_trit_type(info.type_id) else None,
        xxh3=file.metadata.get(checksum_key(info.name)),
    )


def abbreviate(value: Any, width: int = 70) -> str:
    """Return a metadata value on one line of about `width` characters; a long list as its start and length."""
    if isinstance(value, list) and len(value) > 6:
        start = " ".join(", ".join(repr(element)[:20] for element in value[:3]).split())
        return f"[{start}, ...] ({len(value)} elements)"
    text = " ".join(str(value).split())
    return text if len(text) <= width else f"{text[:width]} ... ({len(text)} characters)"


def _json_value(value: Any) -> Any:
    if isinstance(value, list):
        return [_json_value(element) for element in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
