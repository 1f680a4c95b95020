"""Pieces of a GGUF tensor as a checkpoint stores them: a tensor, a part of one, or one tensor for each expert."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from tritgguf.architectures.tensor_part import WHOLE, TensorPart
from tritgguf.errors import DamagedFileError
from tritgguf.formats.dtypes import READABLE_DTYPES
from tritgguf.formats.matrix_rows import MatrixRows
from tritgguf.formats.safetensors_reader import StoredTensor
from tritgguf.formats.stacks import matrix_names, matrix_shape, split_matrix_name
from tritgguf.sources.mxfp4 import Mxfp4Tensor


@dataclass(frozen=True)
class Piece:
    """A stored tensor, or a part of it."""

    stored: StoredTensor | Mxfp4Tensor
    part: TensorPart = WHOLE

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in NumPy order; that of the stored tensor if its rows have no halves."""
        return self.part.shape(self.stored.shape)

    @property
    def n_bytes(self) -> int:
        """Bytes in the checkpoint."""
        return self.stored.n_bytes * math.prod(self.shape) // math.prod(self.stored.shape)

    def transposed_stack(self) -> Piece:
        """Return the same weights of a stack whose matrices are stored transposed; other pieces as they are."""
        is_stack = len(self.stored.shape) == len(("matrices", "rows", "columns"))
        return replace(self, part=replace(self.part, transposed=True)) if is_stack else self

    def rows(
        self, matrix: int, multiple: int, convert: Callable[[np.ndarray], np.ndarray] = np.ascontiguousarray
    ) -> MatrixRows:
        """Return the rows of a matrix, by its place in a stack; a vector is a single row.

        `convert` converts blocks of a multiple of `multiple` rows, or a vector.
        """
        rows, columns = matrix_shape(self.shape)

        def read(first: int, last: int) -> np.ndarray:
            return convert(self._read(matrix, first, last)).reshape(-1, columns)

        def read_vector(first: int, last: int) -> np.ndarray:
            return convert(self.stored.read_flat(0, 1)[0]).reshape(1, columns)

        is_vector = len(self.shape) == 1
        return MatrixRows(
            (rows, columns),
            READABLE_DTYPES[self.stored.dtype],
            read_vector if is_vector else read,
            1 if is_vector else multiple,
        )

    def _read(self, matrix: int, first: int, last: int) -> np.ndarray:
        """Return rows of a matrix of the part; of one that is stored transposed, all columns are read for them."""
        stored_rows, rows = matrix_shape(self.stored.shape)[0], matrix_shape(self.shape)[0]
        begin, part = matrix * stored_rows, self.part
        if part.transposed:
            return part.view(self.stored.read_flat(begin, begin + stored_rows))[first:last]
        if part.half is None or part.of_vectors:
            return part.view(self.stored.read_flat(begin + first, begin + last))
        if part.alternates:
            return self.stored.read_flat(begin + 2 * first + part.half, begin + 2 * last, 2)
        begin += part.half * rows
        return self.stored.read_flat(begin + first, begin + last)


class Pieces:
    """The pieces of a checkpoint's tensors, by GGUF name of the tensor, or of a matrix of a stack (see `stacks`)."""

    def __init__(self) -> None:
        self._by_name: dict[str, Piece] = {}
        self.tensors: dict[str, list[str]] = {}
        """GGUF name of a tensor -> the names of its pieces, in the order of the checkpoint."""

    def add(self, name: str, piece: Piece) -> None:
        """Add a piece; TritGgufError if the checkpoint already has it, also if that is a part of the whole."""
        tensor, index = split_matrix_name(name)
        present = self.tensors.setdefault(tensor, [])
        if name in self._by_name or (present and (index is None or tensor in present)):
            other = self._by_name[present[0]].stored.name
            raise DamagedFileError(
                f"{piece.stored.path}: tensor {piece.stored.name} has the same weights as {other}; remove one of them"
            )
        present.append(name)
        self._by_name[name] = piece

    def drop(self, tensor: str) -> None:
        """Remove a tensor."""
        for name in self.tensors.pop(tensor):
            del self._by_name[name]

    def get(self, tensor: str) -> Piece | None:
        """Return a tensor that is one piece; None if there is none."""
        return self._by_name.get(tensor)

    def label(self, name: str) -> str | None:
        """Return the checkpoint's name of a tensor or of a matrix; None for a stack of experts stored one by one."""
        tensor, index = split_matrix_name(name)
        piece = self._by_name.get(name) or self._by_name.get(tensor)
        if piece is None:
            return None
        names = ("even", "odd") if piece.part.alternates else ("upper", "lower")
        half = "" if piece.part.half is None else f" ({names[piece.part.half]} half of the rows)"
        return piece.stored.name + ("" if name in self._by_name else f"[{index}]") + half

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Return a tensor's shape. Experts that are stored one by one count as many as there are."""
        names = self.tensors[tensor]
        shape = self._by_name[names[0]].shape
        return shape if tensor in names else (len(names), *shape)

    def n_bytes(self, tensor: str) -> int:
        """Return a tensor's bytes in the checkpoint."""
        return sum(self._by_name[name].n_bytes for name in self.tensors[tensor])

    def check_experts(self, shapes: Mapping[str, tuple[int, ...]], where: str, label: Callable[[str], str]) -> None:
        """Raise TritGgufError unless all experts that are stored one by one are there, all of the right shape.

        `shapes` are those that the tensors must have; `label` maps a GGUF name to the checkpoint's name.
        """
        for tensor, names in self.tensors.items():
            shape = shapes.get(tensor)
            if shape is None or tensor in names:
                continue
            for name in (*matrix_names(tensor, shape), *names):
                if name not in self._by_name:
                    raise DamagedFileError(f"{where}: tensor {label(name)} is missing")
                found = self._by_name[name].shape
                if found != shape[1:]:
                    raise DamagedFileError(
                        f"{where}: tensor {label(name)} has shape {found}, but the config requires {shape[1:]}"
                    )

    def matrix(self, name: str) -> tuple[Piece, int]:
        """Return the piece with a matrix, and its place in the piece."""
        if name in self._by_name:
            return self._by_name[name], 0
        tensor, index = split_matrix_name(name)
        return self._by_name[tensor], index or 0
