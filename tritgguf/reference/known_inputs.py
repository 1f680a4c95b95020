"""What a pass through a decoder block need not compute, because an earlier pass has shown it.

Calibration sends the same hidden states through a block once for each of its matrices that have inputs of their own.
Attention and the feed-forward network return the product of their last matrix: once its inputs were seen, that product
is all that later passes need of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class Gathered:
    """A tensor that is filled as its parts come; to hold them one by one would leave holes in memory.

    Args:
        count: of the rows that will come.

    """

    def __init__(self, count: int) -> None:
        self._count, self._filled = count, 0
        self._whole: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Take the next rows, [rows, ...]."""
        if self._whole is None:
            self._whole = rows.new_empty(self._count, *rows.shape[1:])
        self._whole[self._filled : self._filled + len(rows)] = rows
        self._filled += len(rows)

    @property
    def whole(self) -> Tensor:
        """All rows; ValueError when some are missing."""
        if self._whole is None or self._filled != self._count:
            raise ValueError(f"{self._filled} of {self._count} rows have come")
        return self._whole


@dataclass(frozen=True)
class Ending:
    """The last matrix of a module.

    Attributes:
        linear: the module that multiplies with it.
        around: the module that returns its product.
        values: how many values that one returns in a tuple, the product first and None after it; None for no tuple.

    """

    linear: Any
    around: Any
    values: int | None

    @contextmanager
    def alone(self, inputs: Iterable[Tensor]) -> Iterator[None]:
        """Let the module multiply the next of these inputs, and nothing else, whenever it is called."""
        left = iter(inputs)

        def product(*arguments: Any, **settings: Any) -> Any:
            output = self.linear(next(left))
            return output if self.values is None else (output, *[None] * (self.values - 1))

        self.around.forward = product
        try:
            yield
        finally:
            del self.around.forward  # what is left is that of its class


def find_endings(matrices: Mapping[str, tuple[Any, Any]], run: Callable[[], None]) -> dict[str, Ending]:
    """Return those matrices whose product is what the module around them returns.

    Args:
        matrices: name -> the module that multiplies with it, and the one around that.
        run: calls all of them.

    """
    products: dict[str, Any] = {}
    found: dict[str, Ending] = {}
    with ExitStack() as hooks:
        for name, (linear, around) in matrices.items():

            def note(module: Any, arguments: Any, product: Any, name: str = name) -> None:
                products[name] = product

            def compare(module: Any, arguments: Any, output: Any, name: str = name) -> None:
                values = output if isinstance(output, tuple) else (output,)
                if values[0] is products.get(name) and all(value is None for value in values[1:]):
                    found[name] = Ending(*matrices[name], len(values) if isinstance(output, tuple) else None)

            hooks.callback(linear.register_forward_hook(note).remove)
            hooks.callback(around.register_forward_hook(compare).remove)
        run()
    return found
