"""Modules that end in a matrix, and multiplying with that matrix alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tritgguf.reference.known_inputs import Ending, Gathered, find_endings

INPUTS = torch.arange(12, dtype=torch.float32).reshape(3, 4)


class Module(torch.nn.Module):
    """Returns the product of `last` as a test wants it."""

    def __init__(self, returns: Any) -> None:
        super().__init__()
        self.first, self.last, self.returns, self.calls = torch.nn.Linear(4, 4), torch.nn.Linear(4, 2), returns, 0

    def forward(self, inputs: torch.Tensor) -> Any:
        self.calls += 1
        return self.returns(self.last(self.first(inputs)))


@pytest.mark.parametrize(
    ("returns", "values"), [(lambda y: y, None), (lambda y: (y,), 1), (lambda y: (y, None), 2)], ids=["0", "1", "2"]
)
def test_a_module_multiplies_with_its_last_matrix_alone(returns: Any, values: int | None) -> None:
    module = Module(returns)
    matrices = {"first": (module.first, module), "last": (module.last, module)}
    endings = find_endings(matrices, lambda: module(INPUTS))
    assert endings == {"last": Ending(module.last, module, values)}
    expected, known = module(INPUTS), module.first(INPUTS)
    with endings["last"].alone([known, 2 * known]):
        found, twice = module(torch.zeros(3, 4)), module(None)
        with pytest.raises(StopIteration):
            module(INPUTS)
    assert module.calls == 2
    for some, other in ((found, expected), (twice, returns(module.last(2 * known)))):
        assert type(some) is type(other)
        for value, wanted in zip(some, other, strict=True):
            assert value is wanted is None or torch.equal(value, wanted)
    module(INPUTS)
    assert module.calls == 3  # it is itself again


@pytest.mark.parametrize("returns", [lambda y: 2 * y, lambda y: (y, y), lambda y: (None, y)])
def test_what_becomes_something_else_is_no_ending(returns: Any) -> None:
    module = Module(returns)
    assert not find_endings({"last": (module.last, module)}, lambda: module(INPUTS))


def test_rows_are_gathered() -> None:
    gathered = Gathered(3)
    with pytest.raises(ValueError, match="0 of 3 rows"):
        _ = gathered.whole
    gathered.add(INPUTS[:2])
    with pytest.raises(ValueError, match="2 of 3 rows"):
        _ = gathered.whole
    gathered.add(INPUTS[2:])
    assert torch.equal(gathered.whole, INPUTS)
