"""Modules that return the product of their last matrix, and replaying this product."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tritgguf.reference.cached_products import OutputProjection, RowBuffer, find_output_projections

INPUTS = torch.arange(12, dtype=torch.float32).reshape(3, 4)


class Module(torch.nn.Module):
    """Passes the product of `last` to a function of the test and returns the result."""

    def __init__(self, returns: Any) -> None:
        super().__init__()
        self.first, self.last, self.returns, self.calls = torch.nn.Linear(4, 4), torch.nn.Linear(4, 2), returns, 0

    def forward(self, inputs: torch.Tensor) -> Any:
        self.calls += 1
        return self.returns(self.last(self.first(inputs)))


@pytest.mark.parametrize(
    ("returns", "length"), [(lambda y: y, None), (lambda y: (y,), 1), (lambda y: (y, None), 2)], ids=["0", "1", "2"]
)
def test_replay_returns_the_products(returns: Any, length: int | None) -> None:
    module = Module(returns)
    matrices = {"first": (module.first, module), "last": (module.last, module)}
    projections = find_output_projections(matrices, lambda: module(INPUTS))
    assert projections == {"last": OutputProjection(module.last, module, length)}
    expected, cached = module(INPUTS), module.last(module.first(INPUTS))
    with projections["last"].replay([cached, 2 * cached]):
        found, twice = module(torch.zeros(3, 4)), module(None)
        with pytest.raises(StopIteration):
            module(INPUTS)
    assert module.calls == 2
    for some, other in ((found, expected), (twice, returns(2 * cached))):
        assert type(some) is type(other)
        for value, wanted in zip(some, other, strict=True):
            assert value is wanted is None or torch.equal(value, wanted)
    module(INPUTS)
    assert module.calls == 3  # the module's own forward runs again


@pytest.mark.parametrize("returns", [lambda y: 2 * y, lambda y: (y, y), lambda y: (None, y)])
def test_a_changed_product_is_no_output_projection(returns: Any) -> None:
    module = Module(returns)
    assert not find_output_projections({"last": (module.last, module)}, lambda: module(INPUTS))


def test_row_buffer() -> None:
    buffer = RowBuffer(3)
    with pytest.raises(ValueError, match="0 of 3 rows"):
        _ = buffer.rows
    stored = buffer.add(INPUTS[:2])
    assert torch.equal(stored, INPUTS[:2])
    with pytest.raises(ValueError, match="2 of 3 rows"):
        _ = buffer.rows
    buffer.add(INPUTS[2:])
    assert torch.equal(buffer.rows, INPUTS)
    assert stored.data_ptr() == buffer.rows.data_ptr()
