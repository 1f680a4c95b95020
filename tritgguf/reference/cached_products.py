"""Skip the work in a decoder block whose result an earlier pass has cached.

Calibration sends the same hidden states through a block once for each group of matrices that share an input. Attention
and the feed-forward network return the product of their last matrix, the output projection. Once this product is
cached, later passes skip the module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class RowBuffer:
    """A preallocated tensor that is filled batch by batch; a list of the batches would fragment memory.

    Args:
        count: total number of rows.

    """

    def __init__(self, count: int) -> None:
        self._count, self._filled = count, 0
        self._buffer: Tensor | None = None

    def add(self, rows: Tensor) -> Tensor:
        """Append rows, [rows, ...], and return them as they are in the buffer."""
        if self._buffer is None:
            self._buffer = rows.new_empty(self._count, *rows.shape[1:])
        stored = self._buffer[self._filled : self._filled + len(rows)]
        stored.copy_(rows)
        self._filled += len(rows)
        return stored

    @property
    def is_used(self) -> bool:
        """Whether rows were added."""
        return self._buffer is not None

    @property
    def rows(self) -> Tensor:
        """All rows; ValueError if some are missing."""
        if self._buffer is None or self._filled != self._count:
            raise ValueError(f"the buffer has {self._filled} of {self._count} rows")
        return self._buffer


@dataclass(frozen=True)
class OutputProjection:
    """The matrix whose product a module returns.

    Attributes:
        linear: the linear module of the matrix.
        parent: the module that returns the product.
        tuple_length: length of the tuple that the parent returns, the product first and None after it; None if the
            parent returns the product itself.

    """

    linear: Any
    parent: Any
    tuple_length: int | None

    @contextmanager
    def replay(self, products: Iterable[Tensor]) -> Iterator[None]:
        """Make each call of the parent return the next of these products."""
        remaining = iter(products)

        def next_product(*arguments: Any, **settings: Any) -> Any:
            product = next(remaining)
            return product if self.tuple_length is None else (product, *[None] * (self.tuple_length - 1))

        self.parent.forward = next_product
        try:
            yield
        finally:
            del self.parent.forward  # the class's own method is visible again


def find_output_projections(
    matrices: Mapping[str, tuple[Any, Any]], run: Callable[[], None]
) -> dict[str, OutputProjection]:
    """Return the matrices whose product is what their parent module returns, by name.

    Args:
        matrices: name -> linear module of the matrix, and its parent module.
        run: calls all of these modules.

    """
    products: dict[str, Any] = {}
    found: dict[str, OutputProjection] = {}
    with ExitStack() as hooks:
        for name, (linear, parent) in matrices.items():

            def record(module: Any, arguments: Any, product: Any, name: str = name) -> None:
                products[name] = product

            def compare(module: Any, arguments: Any, output: Any, name: str = name) -> None:
                values = output if isinstance(output, tuple) else (output,)
                if values[0] is products.get(name) and all(value is None for value in values[1:]):
                    found[name] = OutputProjection(*matrices[name], len(values) if isinstance(output, tuple) else None)

            hooks.callback(linear.register_forward_hook(record).remove)
            hooks.callback(parent.register_forward_hook(compare).remove)
        run()
    return found
