"""The encoders of `convert`: what each is called, which inputs it needs, and how it encodes.

    type              name                what it does
    V2                v2                  what the published codec does
    ScaleSearch       best                the best of all scales for every group, by the error of the weights
    ImportanceSearch  imatrix             the same, by the error weighted with the importance of each column
    Calibrated        calibrated, tuned   error feedback on a text that goes through the model; tuned trains every block
    Recover           recover, recover+X  exact recovery of dequantized trits, X for matrices without an exact fit
    Automatic         auto                recovery where the source holds such trits, otherwise quantization

The first four are quantizers: they can encode any matrix. `parse_encoder` is the only place where a name is read.
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
"""GGUF name -> float32 [columns], the mean square of each input of a matrix."""
Windows = Sequence[Sequence[int]]
"""Token ids of a calibration text, in windows of equal length."""


class MatrixEncoder(Protocol):
    """Quantizes the matrices of one source."""

    def wants_weights(self, name: str) -> bool:
        """Tell whether `encode` uses the weights that it is given; otherwise it reads the matrix itself."""

    def encode(self, name: str, matrix: MatrixRows, depth: int) -> QuantizedRows:
        """Quantize a matrix; raises ValueError, here or in the parts, for weights that cannot be quantized."""


@dataclass(frozen=True)
class EncodingJob:
    """What a quantizer is started for.

    Attributes:
        source: the model.
        depths: GGUF name -> trits per weight of the matrices that will be encoded, in the order of their blocks.
        thread_pool: the threads to use.
        written: returns the decoded weights, float32 [rows, columns], of a matrix that an earlier run has written, or
            None.

    """

    source: Source
    depths: Mapping[str, int]
    thread_pool: ThreadPool
    written: Callable[[str], np.ndarray | None] = lambda name: None


@dataclass(frozen=True)
class V2:
    """The encoder of the published codec: four candidate scales for every group."""

    name: ClassVar[str] = "v2"
    needs_text: ClassVar[bool] = False
    in_block_order: ClassVar[bool] = False

    def start(self, job: EncodingJob) -> MatrixEncoder:
        """Return the encoder of the job's matrices."""
        return _Independent(lambda name, matrix, depth: quantize_v2(matrix, depth, job.thread_pool))


@dataclass(frozen=True)
class ScaleSearch:
    """The best of the codebook's scales for every group, by the error of the weights."""

    name: ClassVar[str] = "best"
    needs_text: ClassVar[bool] = False
    in_block_order: ClassVar[bool] = False

    def start(self, job: EncodingJob) -> MatrixEncoder:
        """Return the encoder of the job's matrices."""
        return _Independent(lambda name, matrix, depth: quantize_searched(matrix, depth, job.thread_pool))


@dataclass(frozen=True, eq=False)
class ImportanceSearch:
    """The best of the codebook's scales for every group, by the error weighted with the importance of each column.

    Attributes:
        importance: matrices that it does not name are encoded as by `ScaleSearch`; None for that given to `convert`.

    """

    importance: Importance | None = field(default=None, repr=False)
    name: ClassVar[str] = "imatrix"
    needs_text: ClassVar[bool] = False
    in_block_order: ClassVar[bool] = False

    def start(self, job: EncodingJob) -> MatrixEncoder:
        """Return the encoder of the job's matrices."""
        known = self.importance or {}
        return _Independent(
            lambda name, matrix, depth: quantize_searched(matrix, depth, job.thread_pool, importance=known.get(name))
        )


@dataclass(frozen=True)
class Calibrated:
    """Error feedback for the matrices of the decoder blocks, on a text that goes through the model; `V2` for others.

    Attributes:
        windows: the text; None for that given to `convert`.
        tuning: how every block is trained on the text besides; None for not at all.

    """

    windows: Windows | None = field(default=None, repr=False)
    tuning: Tuning | None = None
    in_block_order: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """The name on the command line and in the file."""
        return "calibrated" if self.tuning is None else "tuned"

    @property
    def needs_text(self) -> bool:
        """Whether a text is still to be given."""
        return self.windows is None

    def start(self, job: EncodingJob) -> MatrixEncoder:
        """Return the encoder of the job's matrices.

        Raises TritGgufError when torch or transformers is missing or cannot build the model.
        """
        return _BlockByBlock(job, self.windows or (), self.tuning)


Quantizer = V2 | ScaleSearch | ImportanceSearch | Calibrated
"""An encoder that can encode any matrix."""


@dataclass(frozen=True)
class Recover:
    """Exact recovery of dequantized trits.

    Attributes:
        otherwise: for matrices without an exact fit; None makes such a matrix an error.

    """

    otherwise: Quantizer | None = None

    @property
    def name(self) -> str:
        """The name on the command line and in the file."""
        return "recover" if self.otherwise is None else f"recover+{self.otherwise.name}"

    @property
    def needs_text(self) -> bool:
        """Whether a text is still to be given."""
        return self.otherwise is not None and self.otherwise.needs_text


@dataclass(frozen=True)
class Automatic:
    """Exact recovery where most weights of the source are dequantized trits; otherwise quantization.

    Attributes:
        otherwise: the quantizer; None for `ImportanceSearch` or `Calibrated` where `convert` is given importance or a
            text, and else `V2`.

    """

    otherwise: Quantizer | None = None
    name: ClassVar[str] = "auto"

    @property
    def needs_text(self) -> bool:
        """Whether a text is still to be given."""
        return self.otherwise is not None and self.otherwise.needs_text


Encoder = Quantizer | Recover | Automatic
"""What `convert` takes as its encoder."""

_QUANTIZERS: list[Quantizer] = [V2(), ScaleSearch(), ImportanceSearch(), Calibrated(), Calibrated(tuning=Tuning())]
_ENCODERS: list[Encoder] = [Automatic(), Recover(), *map(Recover, _QUANTIZERS), *_QUANTIZERS]
_BY_NAME = {encoder.name: encoder for encoder in _ENCODERS}


def encoder_names() -> list[str]:
    """Return the names that `parse_encoder` knows."""
    return list(_BY_NAME)


def parse_encoder(name: str) -> Encoder:
    """Return the encoder of this name, without its text or importance; TritGgufError where there is none."""
    if name not in _BY_NAME:
        raise TritGgufError(f"encoder {name} does not exist; choose from {', '.join(_BY_NAME)}")
    return _BY_NAME[name]


def with_tuning(encoder: Encoder) -> Encoder:
    """Return the encoder that trains every block on its text besides.

    Raises TritGgufError for an encoder that takes no text.
    """
    inner = encoder.otherwise if isinstance(encoder, Recover) else encoder
    if isinstance(inner, Automatic):
        return Calibrated(tuning=Tuning())
    if not isinstance(inner, Calibrated):
        raise TritGgufError(
            f"--tune trains on a text, which the encoder {encoder.name} does not take; leave one of them away"
        )
    tuned = replace(inner, tuning=Tuning())
    return Recover(tuned) if isinstance(encoder, Recover) else tuned


def quantizer_of(
    encoder: Encoder, importance: Importance | None, windows: Windows | None, *, text_has_other_use: bool = False
) -> Quantizer:
    """Return the quantizer of the matrices that an encoder does not recover, with its inputs.

    Args:
        encoder: the encoder.
        importance: the importance matrix that the user gives; None for none.
        windows: the calibration text that the user gives; None for none.
        text_has_other_use: whether a text may be given that the quantizer does not take.

    Raises:
        TritGgufError: an input is missing, or is given to a quantizer that does not take it or has one already.

    """
    quantizer = encoder.otherwise if isinstance(encoder, Recover | Automatic) else encoder
    if quantizer is None:
        quantizer = ImportanceSearch() if importance is not None else Calibrated() if windows is not None else V2()
    wants_importance = isinstance(quantizer, ImportanceSearch) and quantizer.importance is None
    if wants_importance != (importance is not None):
        raise TritGgufError("encoder imatrix and an importance matrix go together; give --imatrix FILE")
    may_have_text = text_has_other_use and not isinstance(quantizer, Calibrated)
    if quantizer.needs_text != (windows is not None) and not may_have_text:
        raise TritGgufError("encoder calibrated and a calibration text go together; give --encoder calibrated")
    if wants_importance:
        return ImportanceSearch(importance)
    if isinstance(quantizer, Calibrated) and quantizer.needs_text:
        return replace(quantizer, windows=windows)
    return quantizer


class _Independent:
    """Encodes every matrix by itself."""

    def __init__(self, quantize: Callable[[str, MatrixRows, int], QuantizedRows]) -> None:
        self._quantize = quantize

    def wants_weights(self, name: str) -> bool:
        return True

    def encode(self, name: str, matrix: MatrixRows, depth: int) -> QuantizedRows:
        return self._quantize(name, matrix, depth)


class _BlockByBlock:
    """Encodes the matrices of the decoder blocks on a text, and the others by `V2`."""

    def __init__(self, job: EncodingJob, windows: Windows, tuning: Tuning | None) -> None:
        from tritgguf.calibration.block_quantizer import BlockQuantizer

        in_blocks = {name: depth for name, depth in job.depths.items() if quantized_tensor(name)}
        self._blocks = BlockQuantizer(
            job.source, in_blocks, windows, job.thread_pool, written=job.written, tuning=tuning
        )
        self._others = V2().start(job)

    def wants_weights(self, name: str) -> bool:
        return not quantized_tensor(name)

    def encode(self, name: str, matrix: MatrixRows, depth: int) -> QuantizedRows:
        if self.wants_weights(name):
            return self._others.encode(name, matrix, depth)
        quantized = self._blocks.quantize(name)
        return QuantizedRows(quantized.codebook, iter([quantized]))
