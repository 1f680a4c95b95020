"""Train the trits of a decoder block: its output for quantized inputs approaches the original block's output.

Latent weights are trained with the straight-through estimator (Bengio et al., arXiv:1308.3432): the forward pass uses
the nearest level times the group's step, the backward pass ignores the rounding. Training starts from the levels that
error feedback chose. Each latent weight starts as close to the original weight as its level allows, so weights near
the boundary of two levels move first. Scales are fixed. The loss is the squared error of the block's output divided by
the squared norm of the hidden state, because the next block normalizes it. The codec's paper and EfficientQAT (Chen et
al., arXiv:2407.11062) also train block by block; `docs/quality.md` has measurements.

Memory holds one block: four numbers per weight, and the activations of a few windows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from cpu_kernels.packed_rows.layout import GROUP_SIZE, level_offset
from tritgguf.errors import TritGgufError
from tritgguf.formats.stacks import split_matrix_name
from tritgguf.quantization.quantized_matrix import QuantizedMatrix

if TYPE_CHECKING:
    from torch import Tensor

    from tritgguf.reference.decoder_blocks import Block

_CLIP_MARGIN = 1.0  # levels beyond the outermost one at which the gradient becomes zero
_WARM_UP = 4  # training steps


def check_no_experts(source: str, matrices: Iterable[str]) -> None:
    """Raise TritGgufError, which names the source, if experts of a mixture are among matrices that would be trained."""
    if any(split_matrix_name(name)[1] is not None for name in matrices):
        raise TritGgufError(
            f"{source}: the experts of a mixture cannot be tuned; give --encoder calibrated without --tune"
        )


@dataclass(frozen=True)
class Tuning:
    """How blocks are trained.

    Attributes:
        epochs: passes over all windows; a short text has more.
        learning_rate: Adam's initial learning rate, in levels; it decays linearly to zero.
        max_offset: largest distance of an initial latent weight from its level, in levels; below 0.5, so that it
            rounds to this level.
        batch_size: windows per training step; a short text has fewer.
        fewest_steps: in all epochs, however short the text is: in 16 steps at this rate no latent weight reaches the
            boundary of its level, and nothing changes.
        seed: seed of the order of the windows.

    """

    epochs: int = 4
    learning_rate: float = 5e-3
    max_offset: float = 0.45
    batch_size: int = 8
    fewest_steps: int = 64
    seed: int = 0

    def windows_of_step(self, windows: int) -> int:
        """Return how many windows a step has, for a text of so many."""
        return min(self.batch_size, -(-windows * self.epochs // self.fewest_steps))

    def passes(self, windows: int) -> int:
        """Return the number of epochs for a text of so many windows."""
        steps = -(-windows // self.windows_of_step(windows))
        return max(self.epochs, -(-self.fewest_steps // steps))


def tune_block(
    block: Block,
    hidden: Tensor,
    target: Tensor,
    quantized: Mapping[str, QuantizedMatrix],
    originals: Mapping[str, np.ndarray],
    tuning: Tuning,
) -> dict[str, QuantizedMatrix]:
    """Train the levels of an open block's matrices; write the tuned weights into the block and return the matrices.

    Args:
        block: holds the quantized weights.
        hidden: float32 [windows, tokens, width], the block's input in the quantized model.
        target: same shape, the original block's output in the original model.
        quantized: GGUF name -> quantized matrix.
        originals: GGUF name -> original weights, float32 [rows, columns].
        tuning: the settings.

    The result is deterministic for a given number of torch's threads. Errors are those of the weights.
    """
    import torch
    from torch.nn.utils import parametrize

    modules: dict[str, Any] = {}
    for name, matrix in quantized.items():
        steps, levels = _steps_and_levels(matrix)
        latent = np.clip(
            originals[name] / np.maximum(steps, 1e-30), levels - tuning.max_offset, levels + tuning.max_offset
        )
        module = _trit_module(block.in_hf_order(name, latent), block.in_hf_order(name, steps), matrix.depth)
        parametrize.register_parametrization(block.linear(name), "weight", module, unsafe=True)
        modules[name] = module
    try:
        _train(block, hidden, target, [module.latent for module in modules.values()], tuning)
    finally:
        for name in modules:
            parametrize.remove_parametrizations(block.linear(name), "weight", leave_parametrized=False)
    tuned = {}
    for name, module in modules.items():
        offset = level_offset(quantized[name].depth)
        with torch.no_grad():
            levels = module.latent.round().clamp(-offset, offset).numpy()
        tuned[name] = _with_levels(quantized[name], block.in_gguf_order(name, levels), originals[name])
        block.set(name, tuned[name].decoded())
    return tuned


def _steps_and_levels(matrix: QuantizedMatrix) -> tuple[np.ndarray, np.ndarray]:
    """Return the step and the level of every weight, both float32 [rows, columns]."""
    offset = np.float32(level_offset(matrix.depth))
    steps = np.repeat((matrix.codebook / offset)[matrix.scale_indices], GROUP_SIZE, axis=1)
    return steps, matrix.levels.astype(np.float32) - offset


def _with_levels(matrix: QuantizedMatrix, levels: np.ndarray, original: np.ndarray) -> QuantizedMatrix:
    """Return the matrix with other levels, given as numbers from -offset to offset."""
    changed = replace(matrix, levels=(levels + np.float32(level_offset(matrix.depth))).astype(np.uint8))
    return replace(changed, squared_error=float(np.square(original - changed.decoded(), dtype=np.float64).sum()))


def _train(block: Block, hidden: Tensor, target: Tensor, latents: list[Tensor], tuning: Tuning) -> None:
    import torch

    batch_size, epochs = tuning.windows_of_step(len(hidden)), tuning.passes(len(hidden))
    steps = epochs * -(-len(hidden) // batch_size)
    # Gradients of levels are about 1e-8; Adam's default epsilon would dominate them.
    optimizer = torch.optim.Adam(latents, lr=tuning.learning_rate, betas=(0.9, 0.95), eps=1e-20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / _WARM_UP) * (1 - step / steps)
    )
    order = torch.Generator().manual_seed(tuning.seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(hidden), generator=order).split(batch_size):
            expected = target[batch]
            errors = (block.forward_with_gradients(hidden[batch]) - expected).square().sum(-1)
            optimizer.zero_grad()
            (errors / expected.square().sum(-1).clamp_min(1e-30)).mean().backward()
            optimizer.step()
            schedule.step()


def _trit_module(latent: np.ndarray, steps: np.ndarray, depth: int) -> Any:
    """Return a module that computes a weight matrix from its trainable parameter `latent`."""
    import torch

    class RoundedWeight(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, latent: Tensor, steps: Tensor, offset: int) -> Tensor:
            context.save_for_backward(steps, latent.abs() > offset + _CLIP_MARGIN)
            return latent.round().clamp(-offset, offset).mul_(steps)

        @staticmethod
        def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
            steps, is_clipped = context.saved_tensors
            return (gradient * steps).masked_fill_(is_clipped, 0.0), None, None

    class TritWeight(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.latent = torch.nn.Parameter(torch.from_numpy(latent))
            self.steps, self.offset = torch.from_numpy(steps), level_offset(depth)

        def forward(self, weight: Tensor) -> Any:
            return RoundedWeight.apply(self.latent, self.steps, self.offset)

    return TritWeight()
