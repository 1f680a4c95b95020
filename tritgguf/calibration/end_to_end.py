"""Train a quantized model as a whole: its predictions approach those of the original model.

The loss is the divergence of the predictions (KL, in nats). Levels, codebooks, norms and biases of all blocks are
trained at once (`trained_parameters`), on pieces of the text in ever new orders (`training_text`). The file stays what
it was: embeddings, output head and the last norm do not change, and are the original's in both models.

One block's weights are in memory at a time. The forward pass keeps the inputs of the blocks; the backward pass computes
each block once more from its input (Chen et al., arXiv:1604.06174) and trains it at once, so gradients are those of one
block. For each weight whose level is trained, memory holds `LATENT_BYTES`; without that much memory, levels stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from cpu_kernels.threads.thread_pool import ThreadPool
from tritgguf.calibration.output_divergence import output_divergences
from tritgguf.calibration.prediction_loss import PredictionLoss
from tritgguf.calibration.trained_parameters import LATENT_BYTES, Rates, TrainedMatrix, TrainedVector
from tritgguf.calibration.training_text import mixed_windows
from tritgguf.formats.dtypes import to_float32
from tritgguf.machine import fits_in_memory
from tritgguf.quantization.quantized_matrix import QuantizedMatrix
from tritgguf.reference.block_gradients import block_gradients
from tritgguf.reference.decoder_blocks import Block, DecoderBlocks
from tritgguf.reference.process_settings import bfloat16_matmul, torch_threads

if TYPE_CHECKING:
    from torch import Tensor

    from tritgguf.sources.source import Source

FEWEST_WINDOWS = 2
"""One to train on and one to stop by."""
_WARM_UP = 8  # steps
_OTHER_BYTES = 3 << 30  # of a block, its activations, the logits of some tokens, and the program itself

Progress = Callable[[str, float], None]
"""Called with what is done and the share of the whole training that it took."""


@dataclass(frozen=True)
class EndToEnd:
    """How a model is trained as a whole.

    Attributes:
        epochs: most passes over the text.
        level_rate: Adam's learning rate of levels; it decays linearly to zero.
        factor_rate: the same of codebooks, norms and biases, relative to their size.
        steps: in each pass, as long as `batch_size` allows: a short text has steps of fewer windows.
        batch_size: most windows of a step.
        most_steps: in all passes: a long text has fewer of them, though at least one.
        steps_at_full_rate: with more steps than this, the rate of levels is lower, so that levels come no farther.
        held_out: one window in this many is not trained on, but measured.
        seed: seed of the order of the text's pieces.

    """

    epochs: int = 8
    level_rate: float = 3e-3
    factor_rate: float = 1e-3
    steps: int = 14
    batch_size: int = 8
    most_steps: int = 224
    steps_at_full_rate: int = 150
    held_out: int = 8
    seed: int = 0

    def windows_of_step(self, windows: int) -> int:
        """Return how many windows a step has, for a text of so many."""
        return min(self.batch_size, -(-windows // self.steps))

    def passes(self, windows: int) -> int:
        """Return the number of passes over a text of so many windows."""
        steps = -(-windows // self.windows_of_step(windows))
        return min(self.epochs, max(1, self.most_steps // steps))


@dataclass(frozen=True)
class TrainedModel:
    """The result of training.

    Attributes:
        matrices: GGUF name -> matrix.
        vectors: GGUF name -> float32 [length], the norms and biases that changed.
        warnings: what the user should know, one line each.
        before, after: divergence on the windows held out, in nats.

    """

    matrices: dict[str, QuantizedMatrix]
    vectors: dict[str, np.ndarray] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    before: float = math.nan
    after: float = math.nan


def training_bytes(weights: int) -> int:
    """Return the memory that training the levels of so many weights takes, with all else."""
    return LATENT_BYTES * weights + _OTHER_BYTES


def split_windows(
    windows: Sequence[Sequence[int]], settings: EndToEnd
) -> tuple[list[Sequence[int]], list[Sequence[int]]]:
    """Return the windows to train on and those held out, evenly spaced, of `FEWEST_WINDOWS` at least."""
    step = min(settings.held_out, len(windows))
    held_out = range(step - 1, len(windows), step)
    trained = [window for index, window in enumerate(windows) if index not in held_out]
    return trained, [windows[index] for index in held_out]


def train_end_to_end(
    source: Source,
    matrices: Mapping[str, QuantizedMatrix],
    windows: Sequence[Sequence[int]],
    held_out: Sequence[Sequence[int]],
    settings: EndToEnd,
    thread_pool: ThreadPool,
    progress: Progress = lambda label, share: None,
) -> TrainedModel:
    """Train the quantized matrices of a source and its blocks' vectors.

    Args:
        source: the model.
        matrices: GGUF name -> quantized matrix of a block, where training starts.
        windows: token ids to train on, in windows of equal length.
        held_out: windows of the same length that decide which state is the best.
        settings: the settings.
        thread_pool: the threads to use; torch uses the same number.
        progress: is told of every step.

    The state with the smallest divergence on `held_out` is returned, which may be that of the start. The result is the
    same in every run with the same threads, if levels fit into memory. Raises TritGgufError if torch or transformers
    is missing or cannot build the model.
    """
    weights = sum(matrix.levels.size for matrix in matrices.values())
    needed = training_bytes(weights)
    train_levels = fits_in_memory(needed)
    warnings = []
    if not train_levels:
        warnings.append(
            f"training levels needs {needed / 1e9:.1f} GB of memory, which are not available: only the scales, norms"
            " and biases were trained"
        )
    with bfloat16_matmul(), torch_threads(thread_pool.threads):
        training = _Training(source, matrices, settings, thread_pool, train_levels=train_levels)
        result = training.run(np.asarray(windows), np.asarray(held_out), progress)
    if result.after >= result.before:
        warnings.append(
            "training through the whole model did not lower the divergence on the windows held out"
            f" ({result.before:.4f} nats): the file is as before it"
        )
    return replace(result, matrices=_with_errors(source, result.matrices), warnings=warnings)


def _with_errors(source: Source, matrices: Mapping[str, QuantizedMatrix]) -> dict[str, QuantizedMatrix]:
    """Return the matrices with their squared errors."""
    found = {}
    for name, matrix in matrices.items():
        error = np.square(to_float32(source.rows(name).whole()) - matrix.decoded(), dtype=np.float64).sum()
        found[name] = replace(matrix, squared_error=float(error))
        source.release(name)
    return found


class _Training:
    """A model in training; see `train_end_to_end`."""

    def __init__(
        self,
        source: Source,
        matrices: Mapping[str, QuantizedMatrix],
        settings: EndToEnd,
        thread_pool: ThreadPool,
        *,
        train_levels: bool,
    ) -> None:
        self._source, self._start, self._settings, self._thread_pool = source, matrices, settings, thread_pool
        self._blocks = DecoderBlocks(source, threads=thread_pool.threads)
        self._loss = PredictionLoss(source)
        self._matrices: dict[str, TrainedMatrix] = {}
        self._vectors: dict[str, TrainedVector] = {}
        for index in range(self._blocks.count):
            with self._blocks.block(index) as block:
                for name in block.matrices:
                    if name in matrices:
                        original = block.get(name) if train_levels else None
                        self._matrices[name] = TrainedMatrix(matrices[name], original)
                self._vectors |= {name: TrainedVector(block.get(name)) for name in block.vectors}

    def run(self, windows: np.ndarray, held_out: np.ndarray, progress: Progress) -> TrainedModel:
        """Train on windows of token ids and return the best state."""
        settings, step = self._settings, 0
        size, passes = settings.windows_of_step(len(windows)), settings.passes(len(windows))
        steps = passes * -(-len(windows) // size)
        level_rate = settings.level_rate * min(1.0, settings.steps_at_full_rate / steps)
        inputs = self._blocks.embed(held_out.tolist())
        expected = self._through_original(inputs)
        before = self._divergence(inputs, expected)
        best = TrainedModel(dict(self._start), before=before, after=before)
        for epoch in range(passes):
            mixed = self._blocks.embed(mixed_windows(windows, settings.seed, epoch).tolist())
            target = self._through_original(mixed)
            for batch, batch_target in zip(mixed.split(size), target.split(size), strict=True):
                step += 1
                rate = min(1.0, step / _WARM_UP) * (1 - (step - 1) / steps)
                self._step(batch, batch_target, Rates(step, level_rate * rate, settings.factor_rate * rate))
                progress(f"training, KL {best.after:.4f}", 1 / steps)
            divergence = self._divergence(inputs, expected)
            if divergence < best.after:
                best = replace(self._state(), before=before, after=divergence)
        return best

    def _through_original(self, hidden: Tensor) -> Tensor:
        """Return the original model's last hidden states for its first ones, float32 [windows, tokens, width]."""
        for index in range(self._blocks.count):
            with self._blocks.block(index) as block:
                hidden = block.forward(hidden)
        return hidden

    def _through_trained(self, hidden: Tensor) -> list[Tensor]:
        """Return the inputs of all blocks of the trained model, and its last hidden states."""
        states = [hidden]
        for index in range(self._blocks.count):
            with self._blocks.block(index) as block:
                self._put_weights(block)
                states.append(block.forward(states[-1]))
        return states

    def _divergence(self, inputs: Tensor, expected: Tensor) -> float:
        """Return the mean divergence of the predictions on windows, in nats."""
        found = self._through_trained(inputs)[-1]
        return output_divergences(self._source, expected, [(found, 0)], self._thread_pool)[0]

    def _step(self, inputs: Tensor, target: Tensor, rates: Rates) -> None:
        """Train every block on a batch of windows."""
        import torch

        *states, last = self._through_trained(inputs)
        gradient = self._loss.gradient(last, target)
        for index in reversed(range(self._blocks.count)):
            with self._blocks.block(index) as block:
                self._put_weights(block)
                gradient, gradients = block_gradients(block, states.pop().clone(), gradient)
            for name, of_weights in gradients.items():
                trained = self._matrices.get(name) or self._vectors.get(name)
                if trained is not None:
                    trained.update(torch.from_numpy(np.ascontiguousarray(of_weights)), rates)

    def _put_weights(self, block: Block) -> None:
        """Write the present weights into an open block."""
        for name in [*block.matrices, *block.vectors]:
            trained = self._matrices.get(name)
            if trained is not None:
                block.set(name, trained.weights().numpy())
            elif name in self._vectors:
                block.set(name, self._vectors[name].values().numpy())

    def _state(self) -> TrainedModel:
        """Return the present state."""
        vectors = {name: vector.values().numpy() for name, vector in self._vectors.items()}
        return TrainedModel({name: matrix.quantized() for name, matrix in self._matrices.items()}, vectors)
