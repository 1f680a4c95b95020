"""The encoders that follow the blocks of a model on a text; `encoders` says which there are."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from tritgguf.architectures.tensor_names import quantized_tensor
from tritgguf.calibration.end_to_end import EndToEnd, TrainedModel, split_windows, train_end_to_end
from tritgguf.calibration.tuning import Tuning, check_no_experts
from tritgguf.formats.matrix_rows import MatrixRows
from tritgguf.quantization.quantized_matrix import QuantizedMatrix, QuantizedRows
from tritgguf.quantization.scale_search import quantize_searched

if TYPE_CHECKING:
    from tritgguf.conversion.encoders import EncodingJob, Windows

EPOCH_PASSES = 2
"""Calibrations that take as long as an epoch of end-to-end training."""


class BlockwiseEncoder:
    """Encodes the matrices of the decoder blocks on a text, block by block, and then the output head for its inputs."""

    def __init__(self, job: EncodingJob, windows: Windows, tuning: Tuning | None) -> None:
        from tritgguf.calibration.block_quantizer import BlockQuantizer

        self._in_blocks = {name: depth for name, depth in job.depths.items() if quantized_tensor(name)}
        self._blocks = BlockQuantizer(
            job.source, self._in_blocks, windows, job.thread_pool, written=job.written, tuning=tuning
        )
        self._job = job

    @property
    def warnings(self) -> list[str]:
        """Warnings about the matrices that were encoded, one line each."""
        return self._blocks.warnings

    def needs_weights(self, name: str) -> bool:
        """Return whether the matrix is outside of the blocks, so that `encode` uses its weights."""
        return not quantized_tensor(name)

    def replacement(self, name: str) -> np.ndarray | None:
        """Return what training has made of a norm or bias; None for what stays."""
        return None

    def encode(self, name: str, matrix: MatrixRows, depth: int) -> QuantizedRows:
        """Quantize a matrix; matrices are asked for in the order of the blocks."""
        if self.needs_weights(name):
            from tritgguf.calibration.output_head import head_importance, head_name

            source = self._job.source
            importance = head_importance(source, self._blocks.output()) if name == head_name(source) else None
            return quantize_searched(matrix, depth, self._job.thread_pool, importance=importance)
        quantized = self._quantized(name)
        return QuantizedRows(quantized.codebook, iter([quantized]))

    def _quantized(self, name: str) -> QuantizedMatrix:
        return self._blocks.quantize(name)


class EndToEndEncoder(BlockwiseEncoder):
    """Encodes all matrices of the decoder blocks and trains the model as a whole, when the first tensor is asked for.

    What an interrupted run has calibrated is used again; training begins anew, and the result is the same.
    """

    def __init__(self, job: EncodingJob, windows: Windows, tuning: Tuning | None, settings: EndToEnd) -> None:
        check_no_experts(job.source.name, job.depths)
        self._trained_on, self._held_out = split_windows(windows, settings)
        super().__init__(replace(job, written=self._calibrated), self._trained_on, tuning)
        self._settings = settings

    @property
    def warnings(self) -> list[str]:
        """Warnings about the matrices that were encoded, one line each."""
        return [*super().warnings, *self._result.warnings]

    def replacement(self, name: str) -> np.ndarray | None:
        """Return what training has made of a norm or bias; None for what stays."""
        return self._result.vectors.get(name)

    def _quantized(self, name: str) -> QuantizedMatrix:
        return self._result.matrices[name]

    def _calibrated(self, name: str) -> np.ndarray | None:
        """Return the decoded weights of a matrix that an interrupted run has calibrated, or None."""
        matrix = self._job.calibrated.get(name)
        return None if matrix is None else matrix.decoded()

    @cached_property
    def _result(self) -> TrainedModel:
        matrices: dict[str, QuantizedMatrix] = {}
        if not self._in_blocks:  # all are recovered or copied, with the norms that belong to them
            return TrainedModel(matrices)
        for name in self._in_blocks:
            if name in self._job.calibrated:
                matrices[name] = self._job.calibrated[name]
            else:
                matrices[name] = self._blocks.quantize(name)
                self._job.save(name, matrices[name])
            self._job.progress(name, 1 / len(self._in_blocks))
        job, passes = self._job, EPOCH_PASSES * self._settings.passes(len(self._trained_on))
        return train_end_to_end(
            job.source,
            matrices,
            self._trained_on,
            self._held_out,
            self._settings,
            job.thread_pool,
            lambda label, share: job.progress(label, share * passes),
        )
