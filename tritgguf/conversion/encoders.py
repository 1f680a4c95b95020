"""The encoders of `convert`: their names, the inputs they need, and how they encode.

    type              name                what it does
    V2                v2                  the published codec
    ScaleSearch       best                the best of all scales for every group, by the error of the weights
    ImportanceSearch  imatrix             the same, by the error weighted with the importance of each column
    Calibrated        calibrated          error feedback on a calibration text
                      tuned               then every block is trained on the text
                      tuned-end-to-end    then the model is trained as a whole
                      tuned-both          both, in this order
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
from tritgguf.calibration.end_to_end import EndToEnd, split_windows
from tritgguf.calibration.tuning import Tuning
from tritgguf.conversion.blockwise_encoder import EPOCH_PASSES, BlockwiseEncoder, EndToEndEncoder
from tritgguf.errors import TritGgufError
from tritgguf.formats.matrix_rows import MatrixRows
from tritgguf.quantization.quantized_matrix import QuantizedMatrix, QuantizedRows
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

    def replacement(self, name: str) -> np.ndarray | None:
        """Return the numbers to write for a tensor that is not packed, float32; None for those of the source."""

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
        progress: is told what is done before the first matrix is written, and its share of one pass over all matrices.
        calibrated: matrices that an interrupted run has calibrated and not written; `save` takes another one.

    """

    source: Source
    depths: Mapping[str, int]
    thread_pool: ThreadPool
    written: Callable[[str], np.ndarray | None] = lambda name: None
    progress: Callable[[str, float], None] = lambda label, share: None
    calibrated: Mapping[str, QuantizedMatrix] = field(default_factory=dict)
    save: Callable[[str, QuantizedMatrix], None] = lambda name, matrix: None


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
        end_to_end: how the model is then trained as a whole; None for no training.

    """

    windows: Windows | None = field(default=None, repr=False)
    tuning: Tuning | None = None
    end_to_end: EndToEnd | None = None
    in_block_order: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """Name on the command line and in the file."""
        if self.end_to_end is None:
            return "calibrated" if self.tuning is None else "tuned"
        return "tuned-end-to-end" if self.tuning is None else "tuned-both"

    @property
    def passes(self) -> int:
        """Passes over all matrices, as `EncodingJob.progress` counts them, before the first one is written."""
        if self.end_to_end is None or not self.windows:
            return 0
        trained_on, _ = split_windows(self.windows, self.end_to_end)
        return 1 + EPOCH_PASSES * self.end_to_end.passes(len(trained_on))

    @property
    def needs_text(self) -> bool:
        """Whether `convert` must be given a text."""
        return self.windows is None

    def start(self, job: EncodingJob) -> MatrixEncoder:
        """Return an encoder for the job's matrices.

        Raises TritGgufError if torch or transformers is missing or cannot build the model.
        """
        if self.end_to_end is not None:
            return EndToEndEncoder(job, self.windows or (), self.tuning, self.end_to_end)
        return BlockwiseEncoder(job, self.windows or (), self.tuning)


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

TUNED = {
    "blocks": Calibrated(tuning=Tuning()),
    "end-to-end": Calibrated(end_to_end=EndToEnd()),
    "both": Calibrated(tuning=Tuning(), end_to_end=EndToEnd()),
}
"""What is trained, as on the command line -> the encoder."""
_QUANTIZERS: list[Quantizer] = [
    V2(),
    ScaleSearch(),
    ImportanceSearch(),
    Calibrated(),
    *(TUNED[name] for name in ("end-to-end", "both", "blocks")),
]
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


def with_tuning(encoder: Encoder, trained: str = "blocks") -> Encoder:
    """Return the encoder with training on its text; `trained` is a key of `TUNED`.

    Raises TritGgufError for an encoder that takes no text, and for another key.
    """
    if trained not in TUNED:
        raise TritGgufError(f"--tune {trained} does not exist; choose from {', '.join(TUNED)}")
    inner = encoder_of_the_rest(encoder)
    if isinstance(inner, Automatic):
        return TUNED[trained]
    if not isinstance(inner, Calibrated):
        raise TritGgufError(
            f"--tune trains on a text, which the encoder {encoder.name} does not take; omit one of them"
        )
    if (inner.tuning, inner.end_to_end) not in ((None, None), (TUNED[trained].tuning, TUNED[trained].end_to_end)):
        raise TritGgufError(f"--tune {trained} contradicts the encoder {encoder.name}; omit one of them")
    tuned = replace(inner, tuning=TUNED[trained].tuning, end_to_end=TUNED[trained].end_to_end)
    return Recover(tuned) if isinstance(encoder, Recover) else tuned


def encoder_of_the_rest(encoder: Encoder) -> Encoder | None:
    """Return what encodes the matrices that `Recover` does not recover, None for nothing; other encoders themselves."""
    return encoder.fallback if isinstance(encoder, Recover) else encoder


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
    if importance is not None and windows is not None and not text_has_other_use:
        raise TritGgufError(
            "an importance matrix is for the encoder imatrix, and a calibration text for calibrated; give one of them"
            " (--imatrix, or --text or --self)"
        )
    needs_importance = isinstance(quantizer, ImportanceSearch) and quantizer.importance is None
    if needs_importance != (importance is not None):
        raise TritGgufError(
            "encoder imatrix and an importance matrix go together; give both (--encoder, --imatrix) or neither"
        )
    text_is_optional = text_has_other_use and not isinstance(quantizer, Calibrated)
    if quantizer.needs_text != (windows is not None) and not text_is_optional:
        raise TritGgufError(
            "encoder calibrated and a calibration text go together; give both (--encoder, --text or --self) or neither"
        )
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

    def replacement(self, name: str) -> np.ndarray | None:
        return None

    def encode(self, name: str, matrix: MatrixRows, depth: int) -> QuantizedRows:
        return self._quantize(name, matrix, depth)
