"""The experts of an open decoder block: what they see of a text, and what they compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from tritgguf.architectures.experts import STACKS
from tritgguf.formats.stacks import matrix_names

if TYPE_CHECKING:
    from torch import Tensor

ExpertObserver = Callable[["Tensor", "Tensor"], None]
"""Called with the experts' inputs for a batch of windows, float32 [tokens, width], and the experts that the router
chose for each token, int64 [tokens, experts of a token]."""


class ExpertLayer:
    """The experts of an open decoder block.

    Args:
        module: transformers' module of the experts.
        stacks: GGUF name -> weights, float32 [experts, rows, columns], of gate, up and down matrices, in this order.
        biases: float32 [experts, rows] of gate and up matrices; none if there are none.

    """

    def __init__(self, module: Any, stacks: Mapping[str, Tensor], biases: Sequence[Tensor] = ()) -> None:
        self._module, self._biases = module, biases
        self._gate, self._up, self._down = stacks.values()
        self.names = list(zip(*(matrix_names(name, stack.shape) for name, stack in stacks.items()), strict=True))
        """Names of each expert's gate, up and down matrix, see `stacks`."""

    def inner(self, expert: int, inputs: Tensor) -> Tensor:
        """Return the inputs of an expert's down matrix, float32 [tokens, columns], for its inputs [tokens, width]."""
        import torch

        gate, up = inputs @ self._gate[expert].T, inputs @ self._up[expert].T
        if self._biases:
            gate, up = gate + self._biases[0][expert], up + self._biases[1][expert]
        if hasattr(self._module, "act_fn"):
            return self._module.act_fn(gate) * up
        # gpt-oss has an activation of its own, for elements of gate and up that alternate.
        return self._module._apply_gate(torch.stack([gate, up], -1).flatten(-2))

    def tokens(self, chosen: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield every expert and the indices of the tokens that are routed to it: int64 [n]."""
        for expert in range(len(self.names)):
            yield expert, (chosen == expert).any(1).nonzero()[:, 0]

    @contextmanager
    def observing(self, observer: ExpertObserver, stop: type[Exception] | None = None) -> Iterator[None]:
        """Call an observer with each batch that the experts receive; then raise `stop`, if it is given."""

        def observe(module: Any, arguments: Any) -> None:
            inputs, chosen = arguments[0], arguments[1]
            observer(inputs.reshape(-1, inputs.shape[-1]), chosen.reshape(-1, chosen.shape[-1]))
            if stop is not None:
                raise stop

        handle = self._module.register_forward_pre_hook(observe)
        try:
            yield
        finally:
            handle.remove()

    def observing_matrices(self, observers: Mapping[str, Callable[[Tensor], None]]) -> AbstractContextManager[None]:
        """Call observers, by the name of an expert's matrix, with its inputs for a batch: float32 [tokens, columns]."""

        def observe(inputs: Tensor, chosen: Tensor) -> None:
            for expert, tokens in self.tokens(chosen):
                x = inputs[tokens]
                for name, of_matrix in zip(self.names[expert], (x, x, self.inner(expert, x)), strict=True):
                    if name in observers:
                        observers[name](of_matrix)

        return self.observing(observe)


def find_experts(layer: Any, weights: Mapping[str, Tensor]) -> ExpertLayer | None:
    """Return the experts of transformers' module of a block, whose weights have GGUF names; None if it has none."""
    stacks = [name for kind in STACKS for name in weights if name.endswith(f".{kind}.weight")]
    if not stacks:
        return None
    (module,) = (module for name, module in layer.named_modules() if name.endswith(".experts"))
    biases = [name.replace(".weight", ".bias") for name in stacks[:2]]
    return ExpertLayer(
        module, {name: weights[name] for name in stacks}, [weights[name] for name in biases if name in weights]
    )
