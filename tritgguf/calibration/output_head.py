"""The steps between the last decoder block and the logits: norm, output head, scale and softcap."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from tritgguf.architectures import keys
from tritgguf.architectures.key_rules import KeyRule
from tritgguf.architectures.table import GGUF_ARCHITECTURES
from tritgguf.architectures.tensor_names import EMBEDDINGS, HEAD, HEAD_BIAS
from tritgguf.formats.dtypes import to_float32

if TYPE_CHECKING:
    from torch import Tensor

    from tritgguf.sources.source import Source


def head_name(source: Source) -> str:
    """Return the GGUF name of the output head, which is that of the embeddings if they are one tensor."""
    return HEAD if any(tensor.name == HEAD for tensor in source.tensors) else EMBEDDINGS


def head_squares(source: Source, hidden: Tensor) -> np.ndarray:
    """Return the summed squares of each of the head's inputs, float64 [width].

    `hidden` is the last block's output, float32 [windows, tokens, width].
    """
    normalize, sums = final_norm(source), np.zeros(hidden.shape[-1])
    for window in hidden:
        sums += normalize(window).square().sum(0).double().numpy()
    return sums


def head_importance(source: Source, hidden: Tensor) -> np.ndarray:
    """Return the mean square of each of the head's inputs, float32 [width]; `hidden` is as in `head_squares`."""
    return (head_squares(source, hidden) / hidden[..., 0].numel()).astype(np.float32)


def final_norm(source: Source) -> Callable[[Tensor], Tensor]:
    """Return the function that applies the model's last norm and joins windows: float32 [positions, width]."""
    import torch

    entry = GGUF_ARCHITECTURES[source.metadata["general.architecture"].value]
    norm = entry.final_norm[0]
    weight, epsilon = _vector(source, f"{norm}.weight"), _number(source, keys.EPSILON)
    bias = _vector(source, f"{norm}.bias") if entry.has_layer_norms else None

    def normalize(hidden: Tensor) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        if bias is not None:
            return torch.nn.functional.layer_norm(rows, weight.shape, weight, bias, epsilon)
        return rows * (rows.square().mean(-1, keepdim=True) + epsilon).rsqrt() * weight

    return normalize


def logit_function(source: Source) -> Callable[[Tensor], Tensor]:
    """Return the function that adds the head's bias and applies the model's scale and softcap of logits."""
    has_bias = any(tensor.name == HEAD_BIAS for tensor in source.tensors)
    bias = _vector(source, HEAD_BIAS) if has_bias else None
    scale, softcap = _number(source, keys.LOGIT_SCALE), _number(source, keys.LOGIT_SOFTCAP)

    def finish(logits: Tensor) -> Tensor:
        logits = logits if bias is None else logits + bias
        logits = logits / scale if scale else logits
        return softcap * (logits / softcap).tanh() if softcap else logits

    return finish


def _vector(source: Source, name: str) -> Tensor:
    import torch

    return torch.tensor(to_float32(source.read(name)))


def _number(source: Source, rule: KeyRule) -> float:
    """Return a number of the model's metadata, 0 if it has none."""
    value = source.metadata.get(f"{source.metadata['general.architecture'].value}.{rule.gguf}")
    return 0.0 if value is None else float(value.value)
