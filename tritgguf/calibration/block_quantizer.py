"""Quantize block by block: every matrix is quantized for its inputs in the quantized model.

A text passes through two copies of the model, one decoder block at a time: the original, and one whose earlier
matrices are quantized. A matrix's error is measured on its inputs in the second copy, and the matrix also corrects the
error that these inputs already carry (`error_feedback`). A matrix whose product is added to the residual stream also
corrects, as far as its inputs tell, the error that the stream carries past it. Memory holds one block, and the hidden
states and the inputs of its matrices, so it does not grow with the number of blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from cpu_kernels.threads.thread_pool import ThreadPool
from tritgguf.calibration.error_feedback import ErrorFeedback
from tritgguf.calibration.expert_quantizer import FEWEST_TOKENS, ExpertQuantizer, RoutedInputs
from tritgguf.calibration.input_moments import InputMoments
from tritgguf.calibration.tuning import Tuning, check_no_experts, tune_block
from tritgguf.quantization.quantized_matrix import QuantizedMatrix
from tritgguf.reference.cached_products import OutputProjection, RowBuffer
from tritgguf.reference.decoder_blocks import Block, CachedProducts, DecoderBlocks, Observer
from tritgguf.reference.process_settings import bfloat16_matmul, return_freed_memory
from tritgguf.reference.residual_stream import ResidualStream

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tritgguf.sources.source import Source


class BlockQuantizer:
    """Quantizes the matrices of a source, block by block.

    Args:
        source: the model.
        depths: name (see `stacks`) -> trits per weight of the matrices to quantize; others stay as they are.
        windows: token ids of the calibration text, in windows of equal length.
        thread_pool: the threads to use; torch uses the same number.
        written: returns the decoded weights, float32 in GGUF's row order, of a matrix that an interrupted run has
            written, or None. A block whose matrices are all written is not quantized again.
        feedback: creates the quantizer of matrices that share an input.
        tuning: how each block is trained after its matrices are quantized; None for no training.
        whole_stream: whether matrices whose product is added to the residual stream also correct the stream's error.

    Raises TritGgufError if torch or transformers is missing or cannot build the model.

    """

    def __init__(
        self,
        source: Source,
        depths: Mapping[str, int],
        windows: Sequence[Sequence[int]],
        thread_pool: ThreadPool,
        *,
        written: Callable[[str], np.ndarray | None] = lambda name: None,
        feedback: Callable[[InputMoments], ErrorFeedback] = ErrorFeedback,
        tuning: Tuning | None = None,
        whole_stream: bool = True,
    ) -> None:
        self._blocks = DecoderBlocks(source, threads=thread_pool.threads)
        self._depths, self._thread_pool, self._written, self._feedback = depths, thread_pool, written, feedback
        self._tuning, self._whole_stream = tuning, whole_stream
        if tuning is not None:
            check_no_experts(source.name, depths)
        self._experts = ExpertQuantizer(depths, thread_pool, feedback)
        self._original = self._blocks.embed(windows)
        self._hidden = self._original.clone()
        self._next = 0
        self._quantized: dict[str, QuantizedMatrix] = {}

    @property
    def warnings(self) -> list[str]:
        """Warnings about the matrices quantized so far, one line each."""
        few, experts = self._experts.without_text, self._experts.experts
        if not few:
            return []
        return [
            f"the text sends fewer than {FEWEST_TOKENS} tokens to {few} of {experts} experts, which are quantized"
            " without it; a longer text would reach more"
        ]

    def quantize(self, name: str) -> QuantizedMatrix:
        """Return a quantized matrix and drop it. Callers must ask for matrices in the order of their blocks.

        Raises ValueError if weights, or inputs on the calibration text, are NaN or infinite.
        """
        while name not in self._quantized:
            self._advance()
        return self._quantized.pop(name)

    def output(self) -> Tensor:
        """Quantize the remaining blocks and return the last one's output, float32 [windows, tokens, width]."""
        while self._next < self._blocks.count:
            self._advance()
        return self._hidden

    def _advance(self) -> None:
        """Quantize the next block and run it on the text."""
        if self._next == self._blocks.count:
            raise ValueError("is in no decoder block")
        self._quantized.clear()
        with bfloat16_matmul(), self._blocks.block(self._next) as block:
            names = [name for name in block.packed if name in self._depths]
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
        """Quantize the matrices of a block and return its output for the hidden states."""
        originals = {name: block.get(name) for name in block.matrices if name in self._depths and self._tuning}
        groups = [[name for name in group if name in self._depths] for group in block.input_groups(self._original)]
        groups = [group for group in groups if group]
        streams = self._streams(block, groups)
        routed = RoutedInputs()
        with nullcontext() if block.experts is None else block.experts.observing(routed.add):
            recorded = self._forward_original(block, [group[0] for group in groups], streams)
        projections = block.output_projections(self._original)
        cached: dict[OutputProjection, Tensor] = {}
        for group in groups:
            inputs = self._quantize_group(block, group, recorded.pop(group[0]), streams.get(group[0]), cached)
            if group[0] in projections and inputs is not None:
                projection = projections[group[0]]
                return_freed_memory()
                cached[projection] = block.products(projection, inputs)
        if block.experts is not None:
            of_experts = block.expert_inputs(self._hidden, cached=cached)
            self._quantized |= self._experts.quantize(block, routed, of_experts)
        if self._tuning is not None:
            cached.clear()
            self._quantized |= tune_block(block, self._hidden, self._original, self._quantized, originals, self._tuning)
        return block.forward(self._hidden, cached=cached)

    def _streams(self, block: Block, groups: Sequence[Sequence[str]]) -> dict[str, ResidualStream]:
        """Return matrix -> the residual stream around it, for those that share their input with no other."""
        found = block.residual_streams(self._original) if self._whole_stream else {}
        return {group[0]: found[group[0]] for group in groups if len(group) == 1 and group[0] in found}

    def _quantize_group(
        self,
        block: Block,
        names: Sequence[str],
        recorded: list[Tensor],
        stream: ResidualStream | None,
        cached: CachedProducts,
    ) -> Tensor | None:
        """Quantize matrices that share an input; `recorded` (see `_forward_original`) is emptied to free memory.

        Returns the input, float32 [windows, tokens, columns]; None if transformers has joined windows and tokens.
        """
        first = block.get(names[0])
        return_freed_memory()
        moments = InputMoments(first.shape[1], first if len(names) == 1 else None, with_outputs=stream is not None)
        buffer = RowBuffer(len(self._hidden))
        before = list(self._blocks.batches(self._hidden)) if stream is not None and stream.before is None else []

        def observe(inputs: Tensor) -> None:
            is_kept = inputs.dim() == self._hidden.dim()
            rows, original = buffer.add(inputs) if is_kept else inputs, recorded.pop(0).float()
            if stream is None:
                moments.add(rows, original, copy=not is_kept)
            else:
                outputs, bias = original - before.pop(0), block.linear(names[0]).bias
                moments.add(rows, outputs=outputs if bias is None else outputs - bias, copy=not is_kept)

        observers: dict[str, Observer] = {names[0]: observe}
        if stream is not None and stream.before is not None:
            observers[stream.before] = before.append
        block.observe_inputs(self._hidden, observers, last=names[0], cached=cached)
        feedback = self._feedback(moments)
        for name in names:
            quantized = feedback.quantize(block.get(name), self._depths[name], self._thread_pool)
            block.set(name, quantized.decoded())
            self._quantized[name] = quantized
        return buffer.rows if buffer.is_used else None

    def _forward_original(
        self, block: Block, names: Sequence[str], streams: Mapping[str, ResidualStream]
    ) -> dict[str, list[Tensor]]:
        """Run the original block on the original hidden states.

        Returns for each matrix batches: of the residual stream that its product should lead to, float32; without such a
        stream, of its inputs. Inputs take most of the memory, so they are stored in bfloat16. The rounding error
        averages out over the tokens (`docs/quality.md`).
        """
        import torch

        recorded: dict[str, list[Tensor]] = {name: [] for name in names}
        observers: dict[str, Observer] = {}
        for name, batches in recorded.items():
            stream = streams.get(name)
            if stream is None:
                observers[name] = partial(_keep, batches, torch.bfloat16)
            elif stream.after is not None:
                observers[stream.after] = partial(_keep, batches, torch.float32)
        self._original = block.forward(self._original, observers)
        for name, stream in streams.items():
            if stream.after is None:
                recorded[name].extend(self._blocks.batches(self._original))
        return recorded


def _keep(kept: list[Tensor], dtype: torch.dtype, states: Tensor) -> None:
    """Append a copy."""
    kept.append(states.to(dtype, copy=True))
