"""The interface of a conversion's sources: a Hugging Face folder, a hub model, a GGUF file.

All sources provide the same to `convert`: metadata as llama.cpp's converter writes it, and tensors under GGUF names,
read one matrix at a time, in their own dtype or as float32. Opening a source finds every fault except those of weight
values, before any output is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from tritgguf.architectures.dimensions import Dimensions
from tritgguf.architectures.experts import USED_KEY
from tritgguf.errors import DamagedFileError
from tritgguf.formats.matrix_rows import MatrixRows
from tritgguf.formats.stacks import matrix_count, matrix_names

if TYPE_CHECKING:
    from gguf import GGUFValue


@dataclass(frozen=True)
class SourceTensor:
    """A tensor to convert: GGUF name, shape in NumPy order, bytes in the source."""

    name: str
    shape: tuple[int, ...]
    stored_bytes: int

    @property
    def matrices(self) -> list[str]:
        """Names of its matrices, see `stacks`."""
        return matrix_names(self.name, self.shape)

    @property
    def matrix_bytes(self) -> int:
        """Bytes of each of its matrices in the source."""
        return self.stored_bytes // matrix_count(self.shape)


@dataclass(frozen=True)
class PackedMatrix:
    """A packed matrix of the source: depth, packed rows (uint8) and codebook (float32 [27])."""

    depth: int
    data: np.ndarray
    codebook: np.ndarray


class Source(Protocol):
    """A source for `convert` and `verify`."""

    name: str
    """The path or hub id, for messages."""
    metadata: dict[str, GGUFValue]
    """llama.cpp's keys in its order, then tokenizer.huggingface.json; no keys that describe tensor types."""
    tensors: list[SourceTensor]
    """In file order; `output.weight` is missing if the head is tied to the embedding."""
    warnings: list[str]
    """Warnings for the user, one line each."""
    files: list[Path]
    """The files that are read; resuming checks that they are unchanged."""
    encoding: dict[str, str]
    """Of a packed file, the keys that tell how its levels and depths were chosen; empty for others."""

    def read(self, name: str) -> np.ndarray:
        """Return a tensor by its GGUF name: float32, contiguous, rows in GGUF's order; not cached."""

    def rows(self, matrix: str) -> MatrixRows:
        """Return a matrix, by its name (see `stacks`), for reading by rows; a vector is a single row.

        It has the dtype of the source; types other than F32, F16 and BF16 become float32. Rows may be views of the
        source, valid until `release`.
        """

    def packed_depth(self, name: str) -> int | None:
        """Return the depth of a trit tensor; None for other types."""

    def packed(self, matrix: str) -> PackedMatrix | None:
        """Return a packed matrix, by its name, as views of the source; None for other types."""

    def release(self, matrix: str) -> None:
        """Release the memory behind a matrix's views."""

    def label(self, name: str) -> str:
        """Return the source's own name of a tensor or of a matrix, for messages."""


def file_states(source: Source) -> list[list[str | int]]:
    """Return name, size and time of change of the source's files, by which resuming knows that they are unchanged."""
    states = [(path.name, path.stat()) for path in source.files]
    return sorted([name, state.st_size, state.st_mtime_ns] for name, state in states)


def weights_of(source: Source) -> int:
    """Return the number of weights in all tensors."""
    return sum(math.prod(tensor.shape) for tensor in source.tensors)


def weights_of_a_token(source: Source) -> int:
    """Return how many weights a token uses: of stacks of experts, the share of the chosen ones."""
    prefix = f"{source.metadata['general.architecture'].value}."
    used = source.metadata[prefix + USED_KEY].value if prefix + USED_KEY in source.metadata else 1
    return sum(
        math.prod(tensor.shape) * used // tensor.shape[0] if len(tensor.shape) > 2 else math.prod(tensor.shape)
        for tensor in source.tensors
    )


def check_shapes(
    shapes: Mapping[str, tuple[int, ...]],
    dimensions: Dimensions,
    *,
    tied: bool,
    where: str,
    label: Callable[[str], str],
) -> None:
    """Raise TritGgufError for a tensor that is missing, unexpected or of the wrong shape.

    `shapes` maps GGUF names to the shapes found; `label` maps a GGUF name to the source's name for messages.
    """
    expected = dimensions.shapes()
    if tied:
        del expected["output.weight"]
    for name, shape in expected.items():
        if name not in shapes:
            raise DamagedFileError(f"{where}: tensor {label(name)} is missing")
        if shapes[name] != shape:
            raise DamagedFileError(
                f"{where}: tensor {label(name)} has shape {shapes[name]}, but the config requires {shape}"
            )
    for name in shapes:
        if name not in expected:
            raise DamagedFileError(f"{where}: tensor {label(name)} does not belong to a model with this config")
