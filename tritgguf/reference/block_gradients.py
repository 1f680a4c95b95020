"""The gradients of a decoder block."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tritgguf.architectures.tensor_names import has_own_parameters

if TYPE_CHECKING:
    from torch import Tensor

    from tritgguf.reference.decoder_blocks import Block


def block_gradients(block: Block, hidden: Tensor, gradient: Tensor) -> tuple[Tensor, dict[str, np.ndarray]]:
    """Return the gradients of an open block's input and of its weights (GGUF name -> array in GGUF's row order).

    Weights that are no parameter of transformers, such as a state's decays, have none.

    `hidden` is the input and `gradient` that of the output, both float32 [windows, tokens, width].
    """
    layer, inputs = block.layer, hidden.detach().requires_grad_()
    try:
        layer.requires_grad_(True)
        block.forward_with_gradients(inputs).backward(gradient)
        used = {name: part.view(of.grad).numpy() for name, (of, part) in block.parts.items() if of.grad is not None}
        found = {name: block.in_gguf_order(name, value) for name, value in used.items() if has_own_parameters(name)}
        for name in found.keys() & block.vectors:  # an offset of norms has no gradient
            found[name] = found[name] - block.in_gguf_order(name, np.zeros_like(used[name]))
        return inputs.grad, found
    finally:
        layer.requires_grad_(False).zero_grad()
