"""The encoders of `convert`: their names, the inputs they need, and how they encode.

    type              name                what it does
    V2                v2                  the published codec
    ScaleSearch       best                the best of all scales for every group, by the error of the weights
    ImportanceSearch  imatrix             the same, by the error weighted with the importance of each column
    Calibrated        calibrated, tuned   error feedback on a calibration text; tuned also trains every block
    Recover           recover, recover+X  exact recovery of dequantized trits, X for matrices without an exact fit
    Automatic         auto                recovery if the source holds dequantized trits, otherwise quantization

The first four are quantizers: they can encode any matrix. Only `parse_encoder` parses names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

import numpy as np

from cpu_kernels.threads.thread_pool import ThreadPool
from tritgguf.architectures.tensor_names import quantized_tensor
from tritgguf.calibration.tuning import Tuning
from tritgguf.errors import TritGgufError
from tritgguf.formats.matrix_rows import MatrixRows
from tritgguf.quantization.quantized_matrix import QuantizedRows
from tritgguf.quantization.scale_search import quantize_searched
from tritgguf.quantization.v2 import quantize_v2
from tritgguf.sources.source import Source

Importance = Mapping[str, np.ndarray]
"""Name of a matrix (see `stacks`) -> float32 [columns], the mean squared input of each of its columns."""
Windows = Sequence[Sequence[int]]
"""Token ids of a calibration text, in windows of equal length."""


class MatrixEncoder(Protocol):
    """Quantizes the matrices of one source."""

    @property
    def warnings(self) -> list[str]:
        """Warnings about the matrices that were encoded, one line each."""

    def needs_weights(self, name: str) -> bool:
        """Return whether `encode` uses its `matrix`; otherwise it reads the weights itself."""

    def encode(self, name: str, matrix: MatrixRows, depth: int) -> QuantizedRows:
        """Quantize a matrix; ValueError, also from the iterator of its parts, for weights that cannot be quantized."""


@dataclass(frozen=True)
class EncodingJob:
    """The matrices that a quantizer will encode.

    Attributes:
        source: the model.
        depths: name -> trits per weight of these matrices, in the order of their blocks; names are those of `stacks`.
        thread_pool: the threads to use.
        written: returns the decoded weights, float32 [rows, columns], of a matrix that an interrupted run has written,
            or None.

    """

    source: Source
    depths: Mapping[str, int]
    thread_pool: ThreadPool
    written: Callable[[str], np.ndarray | None] = lambda name: None


@dataclass(frozen=True)
class V2:
    """The published codec: four candidate scales for every group."""

    name: ClassVar[str] = "v2"
    needs_text: ClassVar[bool] = False
    in_block_order: ClassVar[bool] = False

    def start(self, job: EncodingJob) -> MatrixEncoder:
        """Return an encoder for the job's matrices."""
        return _PerMatrixEncoder(lambda name, matrix, depth: quantize_v2(matrix, depth, job.thread_pool))


@dataclass(frozen=True)
class ScaleSearch:
    """The best of the codebook's scales for every group, by the error of the weights."""

    name: ClassVar[str] = "best"
    needs_text: ClassVar[bool] = False
    in_block_order: ClassVar[bool] = False

    def start(self, job: EncodingJob) -> MatrixEncoder:
        """Return an encoder for the job's matrices."""
        return _PerMatrixEncoder(lambda name, matrix, depth: quantize_searched(matrix, depth, job.thread_pool))


@dataclass(frozen=True, eq=False)
class ImportanceSearch:
    """The best of the codebook's scales for every group, by the error weighted with the importance of each column.

    Attributes:
        importance: the importance; matrices without one are encoded like `ScaleSearch`. None means the importance that
            `convert` is given.

    """

    importance: Importance | None = field(default=None, repr=False)
    name: ClassVar[str] = "imatrix"
    needs_text: ClassVar[bool] = False
    in_block_order: ClassVar[bool] = False

    def start(self, job: EncodingJob) -> MatrixEncoder:
        """Return an encoder for the job's matrices."""
        known = self.importance or {}
        return _PerMatrixEncoder(
            lambda name, matrix, depth: quantize_searched(matrix, depth, job.thread_pool, importance=known.get(name))
        )


@dataclass(frozen=True)
class Calibrated:
    """Error feedback on a calibration text for the matrices of the decoder blocks, the best scales for other matrices.

    Attributes:
        windows: the text; None means the text that `convert` is given.
        tuning: how every block is also trained on the text; None for no training.

    """

    windows: Windows | None = field(default=None, repr=False)
    tuning: Tuning | None = None
    in_block_order: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """Name on the command line and in the file."""
        return "calibrated" if self.tuning is None else "tuned"

    @property
    def needs_text(self) -> bool:
        """Whether `convert` must be given a text."""
        return self.windows is None

    def start(self, job: EncodingJob) -> MatrixEncoder:
        """Return an encoder for the job's matrices.

        Raises TritGgufError if torch or transformers is missing or cannot build the model.
        """
        return _BlockwiseEncoder(job, self.windows or (), self.tuning)


Quantizer = V2 | ScaleSearch | ImportanceSearch | Calibrated
"""An encoder that can encode any matrix."""


@dataclass(frozen=True)
class Recover:
    """Exact recovery of dequantized trits.

    Attributes:
        fallback: quantizer for matrices without an exact fit; None makes such a matrix an error.

    """

    fallback: Quantizer | None = None

    @property
    def name(self) -> str:
        """Name on the command line and in the file."""
        return "recover" if self.fallback is None else f"recover+{self.fallback.name}"

    @property
    def needs_text(self) -> bool:
        """Whether `convert` must be given a text."""
        return self.fallback is not None and self.fallback.needs_text


@dataclass(frozen=True)
class Automatic:
    """Exact recovery if most weights of the source are dequantized trits; otherwise quantization.

    Attributes:
        fallback: the quantizer; None means `ImportanceSearch` if `convert` is given an importance, `Calibrated` if it
            is given a text, and `V2` otherwise.

    """

    fallback: Quantizer | None = None
    name: ClassVar[str] = "auto"

    @property
    def needs_text(self) -> bool:
        """Whether `convert` must be given a text."""
        return self.fallback is not None and self.fallback.needs_text


Encoder = Quantizer | Recover | Automatic
"""Any encoder of `convert`."""

_QUANTIZERS: list[Quantizer] = [V2(), ScaleSearch(), ImportanceSearch(), Calibrated(), Calibrated(tuning=Tuning())]
_ENCODERS: list[Encoder] = [Automatic(), Recover(), *map(Recover, _QUANTIZERS), *_QUANTIZERS]
_BY_NAME = {encoder.name: encoder for encoder in _ENCODERS}


def encoder_names() -> list[str]:
    """Return the names that `parse_encoder` accepts."""
    return list(_BY_NAME)


def parse_encoder(name: str) -> Encoder:
    """Return the encoder with this name, without text or importance; TritGgufError if there is none."""
    if name not in _BY_NAME:
        raise TritGgufError(f"encoder {name} does not exist; choose from {', '.join(_BY_NAME)}")
    return _BY_NAME[name]


def with_tuning(encoder: Encoder) -> Encoder:
    """Return the encoder with training of every block on its text.

    Raises TritGgufError for an encoder that takes no text.
    """
    inner = encoder.fallback if isinstance(encoder, Recover) else encoder
    if isinstance(inner, Automatic):
        return Calibrated(tuning=Tuning())
    if not isinstance(inner, Calibrated):
        raise TritGgufError(
            f"--tune trains on a text, which the encoder {encoder.name} does not take; omit one of them"
        )
    tuned = replace(inner, tuning=Tuning())
    return Recover(tuned) if isinstance(encoder, Recover) else tuned


def quantizer_of(
    encoder: Encoder, importance: Importance | None, windows: Windows | None, *, text_has_other_use: bool = False
) -> Quantizer:
    """Return the quantizer, with its inputs, for the matrices that an encoder does not recover.

    Args:
        encoder: the encoder.
        importance: the user's importance matrix; None for none.
        windows: the user's calibration text; None for none.
        text_has_other_use: whether a text is also valid if the quantizer does not use it.

    Raises:
        TritGgufError: an input is missing, or the quantizer does not use it or already has it.

    """
    quantizer = encoder.fallback if isinstance(encoder, Recover | Automatic) else encoder
    if quantizer is None:
        quantizer = ImportanceSearch() if importance is not None else Calibrated() if windows is not None else V2()
    needs_importance = isinstance(quantizer, ImportanceSearch) and quantizer.importance is None
    if needs_importance != (importance is not None):
        raise TritGgufError("encoder imatrix and an importance matrix go together; give --imatrix FILE")
    text_is_optional = text_has_other_use and not isinstance(quantizer, Calibrated)
    if quantizer.needs_text != (windows is not None) and not text_is_optional:
        raise TritGgufError("encoder calibrated and a calibration text go together; give --encoder calibrated")
    if needs_importance:
        return ImportanceSearch(importance)
    if isinstance(quantizer, Calibrated) and quantizer.needs_text:
        return replace(quantizer, windows=windows)
    return quantizer


def encode_alike(first: Quantizer, second: Quantizer) -> bool:
    """Tell whether two quantizers are known to encode a matrix at one depth alike, without regard to its neighbours."""
    if first.in_block_order or second.in_block_order:
        return False
    if isinstance(first, ImportanceSearch) and isinstance(second, ImportanceSearch):
        return first.importance is second.importance
    return first == second


class _PerMatrixEncoder:
    """Encodes every matrix independently."""

    warnings: ClassVar[list[str]] = []

    def __init__(self, quantize: Callable[[str, MatrixRows, int], QuantizedRows]) -> None:
        self._quantize = quantize

    def needs_weights(self, name: str) -> bool:
        return True

    def encode(self, name: str, matrix: MatrixRows, depth: int) -> QuantizedRows:
        return self._quantize(name, matrix, depth)


class _BlockwiseEncoder:
    """Encodes the matrices of the decoder blocks on a text, block by block, and then the output head for its inputs."""

    def __init__(self, job: EncodingJob, windows: Windows, tuning: Tuning | None) -> None:
        from tritgguf.calibration.block_quantizer import BlockQuantizer

        in_blocks = {name: depth for name, depth in job.depths.items() if quantized_tensor(name)}
        self._blocks = BlockQuantizer(
            job.source, in_blocks, windows, job.thread_pool, written=job.written, tuning=tuning
        )
        self._job = job

    @property
    def warnings(self) -> list[str]:
        return self._blocks.warnings

    def needs_weights(self, name: str) -> bool:
        return not quantized_tensor(name)

    def encode(self, name: str, matrix: MatrixRows, depth: int) -> QuantizedRows:
        if self.needs_weights(name):
            from tritgguf.calibration.output_head import head_importance, head_name

            source = self._job.source
            importance = head_importance(source, self._blocks.output()) if name == head_name(source) else None
            return quantize_searched(matrix, depth, self._job.thread_pool, importance=importance)
        quantized = self._blocks.quantize(name)
        return QuantizedRows(quantized.codebook, iter([quantized]))
