"""The sources of a conversion: a Hugging Face folder, a hub id, a GGUF file.

Whatever the source, `convert` sees the same: metadata as llama.cpp's converter would write it, and tensors
under GGUF names, read one at a time, as they are stored or as float32. Everything that can be wrong with a
source short of its weights' values is found when it is opened, before a byte of output is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from tritgguf.architectures.dimensions import Dimensions
from tritgguf.errors import DamagedFileError
from tritgguf.formats.matrix_rows import MatrixRows

if TYPE_CHECKING:
    from gguf import GGUFValue


@dataclass(frozen=True)
class SourceTensor:
    """A tensor that goes into the file: GGUF name, shape in NumPy order, bytes it takes in the source."""

    name: str
    shape: tuple[int, ...]
    stored_bytes: int


@dataclass(frozen=True)
class PackedTensor:
    """A tensor that the source holds in trits: packed rows, uint8, of a depth, and their scales, float32 [27]."""

    depth: int
    data: np.ndarray
    codebook: np.ndarray


class Source(Protocol):
    """What `convert` and `verify` read."""

    name: str
    """The path or hub id, for messages."""
    metadata: dict[str, GGUFValue]
    """llama.cpp's keys in its order, then tokenizer.huggingface.json; none that describes tensor types."""
    tensors: list[SourceTensor]
    """In the order of the file; `output.weight` only where the head is not the embedding."""
    warnings: list[str]
    """What the user should know although it stops nothing; a line each."""
    files: list[Path]
    """What is read; a change of one of them is a change of the source."""

    def read(self, name: str) -> np.ndarray:
        """Return a tensor by its GGUF name: float32, contiguous, rows in GGUF's order; nothing is kept."""

    def rows(self, name: str) -> MatrixRows:
        """Return it in the source's own numbers, to be read some rows at a time; a vector is a single row.

        Of a type other than F32, F16 and BF16, float32. What is read may be a view of the source, until `release`.
        """

    def packed(self, name: str) -> PackedTensor | None:
        """Return a tensor that is in trits already, as views of the source; None for any other."""

    def release(self, name: str) -> None:
        """Let go of the memory behind a tensor's views."""


def check_shapes(
    shapes: Mapping[str, tuple[int, ...]],
    dimensions: Dimensions,
    *,
    tied: bool,
    where: str,
    label: Callable[[str], str],
) -> None:
    """Raise TritGgufError for a tensor that is missing, in excess or of another shape than the sizes demand.

    `shapes` are those found, by GGUF name; `label` turns such a name into the one the source has.
    """
    expected = dimensions.shapes()
    if tied:
        del expected["output.weight"]
    for name, shape in expected.items():
        if name not in shapes:
            raise DamagedFileError(f"{where}: tensor {label(name)} is missing")
        if shapes[name] != shape:
            raise DamagedFileError(
                f"{where}: tensor {label(name)} has shape {shapes[name]}, but the config demands {shape}"
            )
    for name in shapes:
        if name not in expected:
            raise DamagedFileError(f"{where}: tensor {label(name)} does not belong to a model with this config")
