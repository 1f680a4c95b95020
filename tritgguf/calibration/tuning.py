"""Training the trits of a decoder block, so that it makes of its present inputs what the original made of its own.

Weights are learned by straight-through estimation: forward, each is its nearest level times the step of its group;
backward, the rounding is passed over (Bengio et al., arXiv:1308.3432). They begin at the levels that error feedback has
chosen, as near to the original weight as the level allows, so that those on the verge between two levels are the first
to move. Scales stay as they are. What is made small is the squared error of the block's output over the square of the
hidden state, as the norm of the next block will see it. (That blocks are trained one after the other is how the codec's
paper and EfficientQAT, Chen et al., arXiv:2407.11062, do it; `docs/quality.md` has what was measured here.)

Memory is that of one block: four numbers for each weight, and the activations of a few windows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from cpu_kernels.packed_rows.layout import GROUP_SIZE, level_offset
from tritgguf.quantization.quantized_matrix import QuantizedMatrix

if TYPE_CHECKING:
    from torch import Tensor

    from tritgguf.reference.decoder_blocks import Block

_BEYOND = 1.0  # steps beyond the outermost level from which on a weight is not driven further out
_WARM_UP = 4  # steps of training


@dataclass(frozen=True)
class Tuning:
    """How blocks are trained.

    Attributes:
        epochs: how often every window is seen.
        rate: of Adam, in levels, at the first step; it falls to zero along a line.
        verge: how far from its level a weight may begin, in levels; at 0.5 it would be another one.
        windows: in one step of training.
        seed: of the order of the windows.

    """

    epochs: int = 4
    rate: float = 5e-3
    verge: float = 0.45
    windows: int = 8
    seed: int = 0


def tune_block(
    block: Block,
    hidden: Tensor,
    target: Tensor,
    quantized: Mapping[str, QuantizedMatrix],
    originals: Mapping[str, np.ndarray],
    tuning: Tuning,
) -> dict[str, QuantizedMatrix]:
    """Return better levels for the matrices of an open block, and write them into it.

    Args:
        block: holds the quantized weights.
        hidden: float32 [windows, tokens, width], what the block is given now.
        target: as large, what the original block made of what it was given.
        quantized: GGUF name -> the matrix as it is.
        originals: GGUF name -> float32 [rows, columns], its weights before.
        tuning: how.

    Their errors are counted as before. The same arguments and number of torch's threads give the same levels.
    """
    import torch
    from torch.nn.utils import parametrize

    learned: dict[str, Any] = {}
    for name, matrix in quantized.items():
        steps, levels = _steps_and_levels(matrix)
        near = np.clip(originals[name] / np.maximum(steps, 1e-30), levels - tuning.verge, levels + tuning.verge)
        module = _trits(block.in_module_order(name, near), block.in_module_order(name, steps), matrix.depth)
        parametrize.register_parametrization(block.linear(name), "weight", module, unsafe=True)
        learned[name] = module
    try:
        _train(block, hidden, target, [module.latent for module in learned.values()], tuning)
    finally:
        for name in learned:
            parametrize.remove_parametrizations(block.linear(name), "weight", leave_parametrized=False)
    tuned = {}
    for name, module in learned.items():
        offset = level_offset(quantized[name].depth)
        with torch.no_grad():
            levels = module.latent.round().clamp(-offset, offset).numpy()
        tuned[name] = _with_levels(quantized[name], block.in_file_order(name, levels), originals[name])
        block.set(name, tuned[name].decoded())
    return tuned


def _steps_and_levels(matrix: QuantizedMatrix) -> tuple[np.ndarray, np.ndarray]:
    """Return the step and the level of every weight: float32 [rows, columns]."""
    offset = np.float32(level_offset(matrix.depth))
    steps = np.repeat((matrix.codebook / offset)[matrix.scale_indices], GROUP_SIZE, axis=1)
    return steps, matrix.levels.astype(np.float32) - offset


def _with_levels(matrix: QuantizedMatrix, levels: np.ndarray, original: np.ndarray) -> QuantizedMatrix:
    """Return a matrix with other levels, from -h to h."""
    changed = replace(matrix, levels=(levels + np.float32(level_offset(matrix.depth))).astype(np.uint8))
    return replace(changed, squared_error=float(np.square(original - changed.decoded(), dtype=np.float64).sum()))


def _train(block: Block, hidden: Tensor, target: Tensor, latents: list[Tensor], tuning: Tuning) -> None:
    import torch

    batches_per_epoch = -(-len(hidden) // tuning.windows)
    steps = tuning.epochs * batches_per_epoch
    # Gradients of levels are of the order of 1e-8: Adam's usual epsilon would hide them.
    optimizer = torch.optim.Adam(latents, lr=tuning.rate, betas=(0.9, 0.95), eps=1e-20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / _WARM_UP) * (1 - step / steps)
    )
    order = torch.Generator().manual_seed(tuning.seed)
    for _ in range(tuning.epochs):
        for some in torch.randperm(len(hidden), generator=order).split(tuning.windows):
            wanted = target[some]
            errors = (block.differentiable(hidden[some]) - wanted).square().sum(-1)
            optimizer.zero_grad()
            (errors / wanted.square().sum(-1).clamp_min(1e-30)).mean().backward()
            optimizer.step()
            schedule.step()


def _trits(near: np.ndarray, steps: np.ndarray, depth: int) -> Any:
    """Return a module whose parameter `latent` is learned and that stands for a weight matrix."""
    import torch

    class Rounded(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, latent: Tensor, steps: Tensor, offset: int) -> Tensor:
            context.save_for_backward(steps, latent.abs() > offset + _BEYOND)
            return latent.round().clamp(-offset, offset).mul_(steps)

        @staticmethod
        def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
            steps, is_beyond = context.saved_tensors
            return (gradient * steps).masked_fill_(is_beyond, 0.0), None, None

    class Trits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.latent = torch.nn.Parameter(torch.from_numpy(near))
            self.steps, self.offset = torch.from_numpy(steps), level_offset(depth)

        def forward(self, weight: Tensor) -> Any:
            return Rounded.apply(self.latent, self.steps, self.offset)

    return Trits()
