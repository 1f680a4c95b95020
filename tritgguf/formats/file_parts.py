"""The parts of a file: the layers' matrices, the embeddings, the output head and the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_LARGE_TENSORS = {"token_embd.weight": "embeddings", "output.weight": "output head"}
LAYERS, _OTHERS = "layers", "metadata, norms and biases"


@dataclass(frozen=True)
class FilePart:
    """A part of a file.

    Attributes:
        name: what it is.
        types: the tensors' types, such as TRIT2, the one with most bytes first; empty for metadata.
        weights: number of weights of these tensors.
        bytes: size in the file.

    """

    name: str
    types: tuple[str, ...]
    weights: int
    bytes: int

    @property
    def bits_per_weight(self) -> float | None:
        """Bits per weight in the file; None for the part without matrices."""
        return 8 * self.bytes / self.weights if self.weights else None

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {**vars(self), "bits_per_weight": self.bits_per_weight}


def file_parts(tensors: Sequence[tuple[str, str, int, int]], file_bytes: int) -> list[FilePart]:
    """Return the parts of a file, those without bytes left out.

    Args:
        tensors: name, type, number of weights and size of each tensor.
        file_bytes: size of the file.

    """
    tied = all(name != "output.weight" for name, *_ in tensors)
    sizes: dict[str, dict[str, int]] = {}
    weights: dict[str, int] = {}
    for name, kind, count, size in tensors:
        if kind == "F32" and name not in _LARGE_TENSORS:
            continue  # norms and biases
        part = _LARGE_TENSORS.get(name, LAYERS)
        if part == "embeddings" and tied:
            part = "embeddings, which are the output head"
        sizes.setdefault(part, {})[kind] = sizes.get(part, {}).get(kind, 0) + size
        weights[part] = weights.get(part, 0) + count
    parts = [
        FilePart(part, tuple(sorted(by_type, key=lambda kind: -by_type[kind])), weights[part], sum(by_type.values()))
        for part, by_type in sizes.items()
    ]
    parts.sort(key=lambda part: -part.bytes)
    rest = file_bytes - sum(part.bytes for part in parts)
    return [*parts, FilePart(_OTHERS, (), 0, rest)]
