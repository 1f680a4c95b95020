"""The loss of end-to-end training: the divergence of the predictions, with its gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tritgguf.calibration.output_head import final_norm, head_name, logit_function
from tritgguf.formats.dtypes import to_float32

if TYPE_CHECKING:
    from torch import Tensor

    from tritgguf.sources.source import Source

_LOGITS = 1 << 25  # that are in memory at once, in each of a few tensors


class PredictionLoss:
    """The mean divergence of a model's predictions from the original's, in nats, by the original's output head."""

    def __init__(self, source: Source) -> None:
        import torch

        self._normalize, self._finish, name = final_norm(source), logit_function(source), head_name(source)
        self._head = torch.from_numpy(to_float32(source.rows(name).whole()))
        source.release(name)

    def gradient(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Return the gradient of the divergence with respect to `hidden`.

        `hidden` and `target` are the last block's output, in the model and in the original one, float32 [windows,
        tokens, width]. Logits are computed for some of the positions at a time.
        """
        import torch

        flat, expected = hidden.flatten(0, 1), target.flatten(0, 1)
        positions = max(1, _LOGITS // len(self._head))
        gradients = []
        for own, original in zip(flat.split(positions), expected.split(positions), strict=True):
            inputs = own.clone().requires_grad_()
            with torch.no_grad():
                wanted = self._logits(original).log_softmax(-1)
            found = self._logits(inputs).log_softmax(-1)
            # The entropy of the original's predictions has no gradient.
            (-(wanted.exp_() * found).sum() / len(flat)).backward()
            gradients.append(inputs.grad)
        return torch.cat(gradients).view(hidden.shape)

    def _logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of some positions, float32 [positions, vocabulary]."""
        return self._finish(self._normalize(hidden) @ self._head.T)
