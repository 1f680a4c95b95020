"""The rotation tables of a model: cosine and sine of every position's angles."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tritgguf.architectures.rope import Rotation

_FIRST_POSITIONS = 256


class RotationTables:
    """Tables that grow with the positions that are used.

    Attributes:
        cosines, sines: float32 [rotations, positions, head_dim / 2].

    """

    def __init__(self, rotations: Sequence[Rotation]) -> None:
        self._rotations = rotations
        self.cosines, self.sines = self._compute(_FIRST_POSITIONS)

    def reserve(self, positions: int) -> None:
        """Make the tables reach up to `positions`."""
        if positions > self.cosines.shape[1]:
            self.cosines, self.sines = self._compute(max(positions, 2 * self.cosines.shape[1]))

    def _compute(self, positions: int) -> tuple[np.ndarray, np.ndarray]:
        angles = np.stack([np.outer(np.arange(positions), rotation.frequencies) for rotation in self._rotations])
        lengths = np.array([rotation.attention_factor for rotation in self._rotations])[:, np.newaxis, np.newaxis]
        return (lengths * np.cos(angles)).astype(np.float32), (lengths * np.sin(angles)).astype(np.float32)
