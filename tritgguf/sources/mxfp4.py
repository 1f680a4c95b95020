"""Stacks of matrices in MXFP4, as gpt-oss's checkpoints store them: two tensors of bytes, blocks and scales.

MXFP4 is a format of the OCP Microscaling Formats specification 1.0: 32 numbers of four bits (E2M1) share a power of two
(E8M0). `NAME_blocks`, U8 [experts, rows, groups, 16], has two numbers in a byte, the first in its lower half;
`NAME_scales`, U8 [experts, rows, groups], has exponents, to which 127 was added.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tritgguf.errors import DamagedFileError
from tritgguf.formats.safetensors_reader import StoredTensor

_BLOCKS, _SCALES = "_blocks", "_scales"
_BYTES = 16  # of a group
_EXPONENT_BIAS = 127
_NUMBERS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_PAIRS = np.concatenate([_NUMBERS, -_NUMBERS])[np.arange(256)[:, np.newaxis] >> np.array([0, 4]) & 15]  # of a byte


@dataclass(frozen=True)
class Mxfp4Tensor:
    """A stack of matrices in MXFP4, with the interface of a `StoredTensor` of float32."""

    name: str
    blocks: StoredTensor
    scales: StoredTensor

    @property
    def path(self) -> Path:
        """The file with the blocks."""
        return self.blocks.path

    @property
    def dtype(self) -> str:
        """The dtype of what is read."""
        return "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        """Experts, rows, columns."""
        experts, rows, groups, _ = self.blocks.shape
        return experts, rows, 2 * _BYTES * groups

    @property
    def n_bytes(self) -> int:
        """Bytes in the checkpoint."""
        return self.blocks.n_bytes + self.scales.n_bytes

    def read_flat(self, first: int, last: int, step: int = 1) -> np.ndarray:
        """Return every `step`th row from `first` to before `last`, of all matrices counted through; exact.

        float32 [rows, columns].
        """
        experts, rows, groups, _ = self.blocks.shape
        blocks = replace(self.blocks, shape=(experts * rows, groups, _BYTES)).read_rows(first, last)[::step]
        scales = replace(self.scales, shape=(experts * rows, groups)).read_rows(first, last)[::step]
        exponents = scales.astype(np.int32) - _EXPONENT_BIAS
        with np.errstate(over="ignore"):  # infinities are refused where weights are checked
            numbers = np.ldexp(_PAIRS[blocks], exponents[..., np.newaxis, np.newaxis])
        numbers[scales == 255] = np.nan  # E8M0 has no infinity
        return numbers.reshape(len(scales), -1)


def with_mxfp4(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor | Mxfp4Tensor]:
    """Return a checkpoint's tensors with each pair of blocks and scales as one; DamagedFileError for other pairs."""
    found: dict[str, StoredTensor | Mxfp4Tensor] = {}
    for name, stored in tensors.items():
        stem = name.removesuffix(_BLOCKS).removesuffix(_SCALES)
        blocks, scales = tensors.get(stem + _BLOCKS), tensors.get(stem + _SCALES)
        if stem == name:
            found[name] = stored
        elif blocks is None or scales is None:
            missing = stem + (_BLOCKS if blocks is None else _SCALES)
            raise DamagedFileError(f"{stored.path}: tensor {name} is without {missing}; fetch the checkpoint again")
        elif stem in tensors:
            raise DamagedFileError(f"{stored.path}: tensor {name} has the same weights as {stem}; remove one of them")
        elif name.endswith(_BLOCKS):
            found[stem] = _paired(stem, blocks, scales)
    return found


def _paired(name: str, blocks: StoredTensor, scales: StoredTensor) -> Mxfp4Tensor:
    are_bytes = blocks.dtype == scales.dtype == "U8"
    fits = len(blocks.shape) == 4 and blocks.shape == (*scales.shape, _BYTES) and math.prod(blocks.shape) > 0
    if not are_bytes or not fits:
        raise DamagedFileError(
            f"{blocks.path}: tensor {blocks.name} is {blocks.dtype} {blocks.shape} and its scales {scales.dtype}"
            f" {scales.shape}, which is not MXFP4; fetch the checkpoint again"
        )
    return Mxfp4Tensor(name, blocks, scales)
