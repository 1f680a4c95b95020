"""Quantizing block after block: every matrix is quantized for the inputs that it gets in the quantized model.

A text goes through two copies of the model, decoder block after decoder block: the original one, and one whose earlier
matrices are quantized. A matrix's error is measured on its inputs in the second copy, and the matrix repairs what these
inputs have lost (`error_feedback`). Memory holds one block, the hidden states of both copies, and the inputs of the
block in both, so it does not grow with the number of blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from cpu_kernels.threads.thread_pool import ThreadPool
from tritgguf.calibration.error_feedback import Feedback, InputMoments
from tritgguf.calibration.tuning import Tuning, tune_block
from tritgguf.quantization.quantized_matrix import QuantizedMatrix
from tritgguf.reference.decoder_blocks import Block, DecoderBlocks, Known
from tritgguf.reference.known_inputs import Ending, Gathered
from tritgguf.reference.process_settings import fast_products

if TYPE_CHECKING:
    from torch import Tensor

    from tritgguf.sources.source import Source


class BlockQuantizer:
    """Quantizes the matrices of a source, block after block.

    Args:
        source: the model.
        depths: GGUF name -> trits per weight of the matrices to quantize; others stay as they are.
        windows: token ids of the calibration text, in windows of equal length.
        thread_pool: the threads to use; torch takes as many.
        written: returns the decoded weights, float32 in GGUF's row order, of a matrix that an earlier run has written
            already, or None. A block of which all matrices are written is not quantized again.
        feedback: makes the quantizer of matrices that share an input.
        tuning: how each block is trained when its matrices are quantized; None for not at all.

    Raises TritGgufError when torch or transformers is missing or cannot build the model.

    """

    def __init__(
        self,
        source: Source,
        depths: Mapping[str, int],
        windows: Sequence[Sequence[int]],
        thread_pool: ThreadPool,
        *,
        written: Callable[[str], np.ndarray | None] = lambda name: None,
        feedback: Callable[[InputMoments], Feedback] = Feedback,
        tuning: Tuning | None = None,
    ) -> None:
        self._blocks = DecoderBlocks(source, threads=thread_pool.threads)
        self._depths, self._thread_pool, self._written, self._feedback = depths, thread_pool, written, feedback
        self._tuning = tuning
        self._original = self._blocks.embed(windows)
        self._hidden = self._original.clone()
        self._next = 0
        self._quantized: dict[str, QuantizedMatrix] = {}

    def quantize(self, name: str) -> QuantizedMatrix:
        """Return a quantized matrix, once; matrices are asked for in the order of their blocks.

        Raises ValueError for weights, or inputs on the calibration text, that are NaN or infinite.
        """
        while name not in self._quantized:
            self._advance()
        return self._quantized.pop(name)

    def _advance(self) -> None:
        """Quantize the next block and send the text through it."""
        if self._next == self._blocks.count:
            raise ValueError("is in no decoder block")
        self._quantized.clear()
        with fast_products(), self._blocks.block(self._next) as block:
            names = [name for name in block.matrices if name in self._depths]
            written = {name: weights for name in names if (weights := self._written(name)) is not None}
            if len(written) == len(names):
                self._original = block.forward(self._original)
                for name, weights in written.items():
                    block.set(name, weights)
                self._hidden = block.forward(self._hidden)
            else:
                self._hidden = self._quantize_block(block)
        self._next += 1

    def _quantize_block(self, block: Block) -> Tensor:
        """Quantize the matrices of a block; return what it makes of the hidden states then."""
        before = {name: block.get(name) for name in block.matrices if name in self._depths and self._tuning}
        groups = [[name for name in group if name in self._depths] for group in block.input_groups(self._original)]
        groups = [group for group in groups if group]
        original_inputs = self._pass_original(block, [group[0] for group in groups])
        endings = block.endings(self._original)
        known: dict[Ending, Tensor] = {}
        for group in groups:
            inputs = self._quantize_group(block, group, original_inputs.pop(group[0]), known)
            if group[0] in endings:
                known[endings[group[0]]] = inputs
        if self._tuning is not None:
            known.clear()
            self._quantized |= tune_block(block, self._hidden, self._original, self._quantized, before, self._tuning)
        return block.forward(self._hidden, known=known)

    def _quantize_group(self, block: Block, names: Sequence[str], originals: list[Tensor], known: Known) -> Tensor:
        """Quantize matrices that share an input, of which the original model's are used up; return it."""
        only = block.get(names[0]) if len(names) == 1 else None
        moments = InputMoments(originals[0].shape[-1], only)
        gathered = Gathered(len(self._hidden))

        def visit(inputs: Tensor) -> None:
            moments.add(inputs, originals.pop(0).float())
            gathered.add(inputs)

        block.inputs(self._hidden, {names[0]: visit}, last=names[0], known=known)
        feedback = self._feedback(moments)
        for name in names:
            quantized = feedback.quantize(block.get(name), self._depths[name], self._thread_pool)
            block.set(name, quantized.decoded())
            self._quantized[name] = quantized
        return gathered.whole

    def _pass_original(self, block: Block, names: Sequence[str]) -> dict[str, list[Tensor]]:
        """Send the original hidden states through the original block; return some matrices' inputs there.

        They are the largest thing in memory, so they are kept in bfloat16; what rounding adds averages out over the
        tokens (`docs/quality.md`).
        """
        seen: dict[str, list[Tensor]] = {name: [] for name in names}
        visits = {name: lambda inputs, kept=seen[name]: kept.append(inputs.bfloat16()) for name in names}
        self._original = block.forward(self._original, visits)
        return seen
