"""Quantize the experts of a decoder block, each for the tokens that the original router sends to it.

The experts' inputs are those of the two copies of the model that `block_quantizer` describes, at the same tokens: the
original router chooses for both. An expert's down matrix sees what its quantized gate and up matrices give. Few tokens
say little about an expert's inputs: damping grows as their number falls (`error_feedback.FEW_INPUTS_DAMPING`). Below
`FEWEST_TOKENS`, the matrices are quantized by the error of their weights alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from cpu_kernels.threads.thread_pool import ThreadPool
from tritgguf.calibration.error_feedback import ErrorFeedback
from tritgguf.calibration.input_moments import InputMoments
from tritgguf.formats.matrix_rows import MatrixRows
from tritgguf.quantization.quantized_matrix import QuantizedMatrix
from tritgguf.quantization.scale_search import quantize_searched
from tritgguf.reference.decoder_blocks import Block

if TYPE_CHECKING:
    from torch import Tensor

FEWEST_TOKENS = 32


class RoutedInputs:
    """The inputs of a block's experts in the original model, in bfloat16, and the experts chosen for each token."""

    def __init__(self) -> None:
        self._inputs: list[Tensor] = []
        self._chosen: list[Tensor] = []

    def add(self, inputs: Tensor, chosen: Tensor) -> None:
        """Add a batch: inputs float32 [tokens, width], chosen int64 [tokens, experts of a token]."""
        self._inputs.append(inputs.bfloat16())
        self._chosen.append(chosen.clone())

    def joined(self) -> tuple[Tensor, Tensor]:
        """Return all inputs and choices, and forget them."""
        import torch

        inputs, chosen = torch.cat(self._inputs), torch.cat(self._chosen)
        self._inputs.clear()
        self._chosen.clear()
        return inputs, chosen


class ExpertQuantizer:
    """Quantizes the experts of the blocks of a model.

    Args:
        depths: name of a matrix (see `stacks`) -> trits per weight; others stay as they are.
        thread_pool: the threads to use.
        feedback: creates the quantizer of matrices that share an input.

    Attributes:
        experts: number of experts that were quantized, over all blocks.
        without_text: number of those that saw too few tokens.

    """

    def __init__(
        self, depths: Mapping[str, int], thread_pool: ThreadPool, feedback: Callable[[InputMoments], ErrorFeedback]
    ) -> None:
        self._depths, self._thread_pool, self._feedback = depths, thread_pool, feedback
        self.experts = self.without_text = 0

    def quantize(self, block: Block, original: RoutedInputs, inputs: Tensor) -> dict[str, QuantizedMatrix]:
        """Quantize the experts of an open block, write them into it and return them by name.

        `inputs` are those of the quantized model, float32 [tokens, width]. Raises ValueError as `ErrorFeedback` does.
        """
        assert block.experts is not None
        quantized: dict[str, QuantizedMatrix] = {}
        original_inputs, chosen = original.joined()
        for expert, tokens in block.experts.tokens(chosen):
            gate, up, down = block.experts.names[expert]
            x, x_original = inputs[tokens], original_inputs[tokens].float()
            inner_original = block.experts.inner(expert, x_original)
            quantized |= self._quantize(block, (gate, up), x, x_original)
            quantized |= self._quantize(block, (down,), block.experts.inner(expert, x), inner_original)
            if any(name in quantized for name in (gate, up, down)):
                self.experts += 1
                self.without_text += len(tokens) < FEWEST_TOKENS
        return quantized

    def _quantize(
        self, block: Block, names: tuple[str, ...], inputs: Tensor, original: Tensor
    ) -> dict[str, QuantizedMatrix]:
        """Quantize matrices that share an input, float32 [tokens, columns] in both copies of the model."""
        quantized: dict[str, QuantizedMatrix] = {}
        names = tuple(name for name in names if name in self._depths)
        feedback = None
        if names and len(inputs) >= FEWEST_TOKENS:
            moments = InputMoments(inputs.shape[1], block.get(names[0]) if len(names) == 1 else None)
            moments.add(inputs, original)
            feedback = self._feedback(moments)
        for name in names:
            weights, depth = block.get(name), self._depths[name]
            if feedback is None:
                (quantized[name],) = quantize_searched(MatrixRows.of(weights), depth, self._thread_pool).parts
            else:
                quantized[name] = feedback.quantize(weights, depth, self._thread_pool)
            block.set(name, quantized[name].decoded())
        return quantized
