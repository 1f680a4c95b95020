"""Calibrated matrices that wait for training, kept beside the output: only what is trained is written into that."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np

from cpu_kernels.packed_rows.unpack import unpack
from tritgguf.formats import trit_types
from tritgguf.formats.journal import ResumableLog
from tritgguf.quantization.quantized_matrix import QuantizedMatrix


class SavedMatrices(ResumableLog):
    """Saves matrices next to the output file, so that `--resume` need not calibrate them again."""

    def __init__(self, output: Path, *, resume: bool) -> None:
        super().__init__(output, ".part.calibrated", resume=resume)

    def matrices(self, job: dict[str, Any]) -> dict[str, QuantizedMatrix]:
        """Return the saved matrices by name; TritGgufError if they belong to another job or are damaged."""
        try:
            return dict(map(_matrix, self.open(job)))
        except (ValueError, TypeError, KeyError) as error:
            raise self.damaged() from error

    def save(self, name: str, matrix: QuantizedMatrix) -> None:
        """Save a matrix, in the bytes that it has in a file."""
        self.add(
            {
                "name": name,
                "depth": matrix.depth,
                "columns": matrix.levels.shape[1],
                "rows": base64.b64encode(matrix.pack().tobytes()).decode(),
                "codebook": matrix.codebook.tolist(),
                "squares": [matrix.squared_error, matrix.squared_weights],
            }
        )


def _matrix(entry: dict[str, Any]) -> tuple[str, QuantizedMatrix]:
    depth, columns = entry["depth"], entry["columns"]
    packed = np.frombuffer(base64.b64decode(entry["rows"]), np.uint8)
    levels, indices = unpack(packed.reshape(-1, trit_types.row_bytes(depth, columns)), depth)
    codebook = np.array(entry["codebook"], np.float32)
    error, weights = map(float, entry["squares"])
    return entry["name"], QuantizedMatrix(depth, levels, indices, codebook, error, weights)
