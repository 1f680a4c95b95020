"""All encoders by name, those that know more than the matrix included.

v2          what the published codec does
best        the best scale of all for every group, by the error of the weights
imatrix     the same, by the error that the importance of each column makes of it
calibrated  error feedback, with a text that goes through the model (`calibrated`)
tuned       the same, and every block trained on the text (`tuning`)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from cpu_kernels.threads.crew import Crew
from tritgguf.architectures.tensor_names import quantized_tensor
from tritgguf.errors import TritGgufError
from tritgguf.formats.matrix_rows import MatrixRows
from tritgguf.quantization import matrix_encoders
from tritgguf.quantization.quantized_matrix import QuantizedRows
from tritgguf.quantization.scale_search import quantize_searched
from tritgguf.sources.source import Source

IMATRIX, CALIBRATED, TUNED = "imatrix", "calibrated", "tuned"
WITH_TEXT = (CALIBRATED, TUNED)
NAMES = (*matrix_encoders.ENCODERS, IMATRIX, *WITH_TEXT)


class Encoder(Protocol):
    """Quantizes the matrices of one source."""

    def reads(self, name: str) -> bool:
        """Tell whether the encoder takes a matrix's numbers from whoever asks; otherwise it reads them itself."""

    def encode(self, name: str, matrix: MatrixRows, depth: int) -> QuantizedRows:
        """Quantize a matrix; raises ValueError, here or in the parts, for weights that cannot be."""


def make_encoder(
    name: str,
    source: Source,
    depths: Mapping[str, int],
    crew: Crew,
    *,
    importance: Mapping[str, np.ndarray] | None = None,
    windows: Sequence[Sequence[int]] | None = None,
    written: Callable[[str], np.ndarray | None] = lambda name: None,
) -> Encoder:
    """Return the encoder of this name, one of `NAMES`.

    Args:
        name: of the encoder.
        source: the model.
        depths: GGUF name -> trits per weight of the matrices that it will be asked for, in the order of their blocks.
        crew: the threads to use.
        importance: for `imatrix`: GGUF name -> float32 [columns], the mean square of each input.
        windows: for `calibrated` and `tuned`: token ids of the calibration text, in windows of equal length.
        written: for these: see `CalibratedEncoder`.

    Raises:
        TritGgufError: importance or windows are missing or do not fit the encoder.

    """
    if (importance is None) == (name == IMATRIX):
        raise TritGgufError(f"encoder {IMATRIX} and an importance matrix go together; give --imatrix FILE")
    if (windows is None) == (name in WITH_TEXT):
        raise TritGgufError(f"encoder {CALIBRATED} and a calibration text go together; give --encoder {CALIBRATED}")
    if name in WITH_TEXT:
        assert windows is not None
        return _WithText(source, depths, windows, crew, written, tunes=name == TUNED)
    return _MatrixByMatrix(name, importance or {}, crew)


class _MatrixByMatrix:
    """An encoder that needs no other matrix."""

    def __init__(self, name: str, importance: Mapping[str, np.ndarray], crew: Crew) -> None:
        self._name, self._importance, self._crew = name, importance, crew

    def reads(self, name: str) -> bool:
        return True

    def encode(self, name: str, matrix: MatrixRows, depth: int) -> QuantizedRows:
        if self._name == IMATRIX:
            return quantize_searched(matrix, depth, self._crew, importance=self._importance.get(name))
        return matrix_encoders.quantize_rows(matrix, depth, self._name, self._crew)


class _WithText:
    """Error feedback for the matrices of the decoder blocks; the others are encoded by default."""

    def __init__(
        self,
        source: Source,
        depths: Mapping[str, int],
        windows: Sequence[Sequence[int]],
        crew: Crew,
        written: Callable[[str], np.ndarray | None],
        *,
        tunes: bool,
    ) -> None:
        from tritgguf.calibration.encoder import CalibratedEncoder
        from tritgguf.calibration.tuning import Tuning

        in_blocks = {name: depth for name, depth in depths.items() if quantized_tensor(name)}
        tuning = Tuning() if tunes else None
        self._calibrated = CalibratedEncoder(source, in_blocks, windows, crew, written=written, tuning=tuning)
        self._others = _MatrixByMatrix(matrix_encoders.DEFAULT_ENCODER, {}, crew)

    def reads(self, name: str) -> bool:
        return not quantized_tensor(name)

    def encode(self, name: str, matrix: MatrixRows, depth: int) -> QuantizedRows:
        if self.reads(name):
            return self._others.encode(name, matrix, depth)
        quantized = self._calibrated.quantize(name)
        return QuantizedRows(quantized.codebook, iter([quantized]))
