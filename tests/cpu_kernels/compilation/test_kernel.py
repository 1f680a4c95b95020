"""Kernels called from Python: types of arguments, results and errors; and functions that only kernels call."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import numba as real_numba
import numpy as np
import pytest

from cpu_kernels.compilation import kernel_cache, loader, signature
from cpu_kernels.compilation import lazy_numba as numba
from cpu_kernels.compilation.machine_code import numba_type
from cpu_kernels.transformer.activations import normalize_row, quantize_vectors


class Pair(NamedTuple):
    """Two arguments in one."""

    array: np.ndarray
    number: int


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the kernels of these tests out of the real cache."""
    monkeypatch.setattr(kernel_cache, "folder", lambda: tmp_path)


ARGUMENTS = {
    "integer": 3,
    "float": 0.5,
    "boolean": True,
    "float32": np.float32(1.5),
    "float64": np.float64(1.5),
    "int64": np.int64(-2),
    "numpy's boolean": np.bool_(True),
    "uint8": np.uint8(7),
    "C": np.zeros((2, 3), np.float32),
    "Fortran": np.zeros((2, 3), np.float32).T,
    "strided": np.zeros((4, 6), np.int16)[::2, ::2],
    "one dimension, strided": np.zeros(6, np.uint16)[::2],
    "empty": np.zeros((0, 4), np.int8),
    "no tuple at all": (),
    "tuple of equals": (1, 2),
    "tuple": (1, 2.0, np.zeros(1, np.int32)),
    "named tuple": Pair(np.zeros(1), 2),
    "tuple in tuple": ((1, Pair(np.zeros(1), 2)), True),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_types_are_those_of_numba(name: str) -> None:
    assert numba_type(signature.describe(ARGUMENTS[name], [])) == real_numba.typeof(ARGUMENTS[name])


def test_an_array_that_must_not_be_written_has_another_type() -> None:
    array = np.zeros(3)
    array.flags.writeable = False
    assert numba_type(signature.describe(array, [])) == real_numba.typeof(array)
    assert signature.describe(array, []) == signature.array_type(np.float64, 1, readonly=True)


def test_texts_of_types_differ() -> None:
    texts = {signature.name_of(signature.describe(value, [])) for value in ARGUMENTS.values()}
    same = {"float64": "float", "int64": "integer", "numpy's boolean": "boolean"}
    assert len(texts) == len(ARGUMENTS) - len(same)


@pytest.mark.parametrize("value", ["text", None, [1], {1: 2}])
def test_what_kernels_do_not_take(value: object) -> None:
    with pytest.raises(TypeError, match="a kernel takes numbers, arrays and tuples"):
        signature.describe(value, [])


@numba.njit(nogil=True)
def _weigh(array: Any, numbers: Any, pair: Any, factor: Any) -> Any:
    total = 0.0
    for row in range(array.shape[0]):
        for column in range(array.shape[1]):
            total += array[row, column] * numbers[0] ** row * numbers[1] ** column
    pair.array[pair.number] = total
    return total * factor


def test_arrays_of_every_layout() -> None:
    whole = np.arange(24, dtype=np.float32).reshape(4, 6)
    for array in (whole, whole.T, whole[::2, 1::2], whole[:, 3:], whole[:1], whole[4:]):
        out = np.zeros(3)
        rows, columns = (np.arange(length) for length in array.shape)
        expected = float((array * 2.0 ** rows[:, None] * 3.0**columns).sum())
        assert _weigh(array, (2, 3), Pair(out, 1), np.float32(0.5)) == 0.5 * expected
        assert out.tolist() == [0, expected, 0]


@numba.njit(nogil=True)
def _divide(kind: Any, number: Any, by: Any) -> Any:
    return number // by


@numba.njit(nogil=True)
def _is_less(number: Any, other: Any) -> Any:
    return number < other


def test_results() -> None:
    assert _divide((), 7, -2) == -4
    assert _divide((1,), 7.0, 2.0) == 3.0
    assert _is_less(1, 2) is True
    assert _is_less(np.float32(2), np.float32(1)) is False


@numba.njit(nogil=True)
def _divide_with_rest(number: Any, by: Any) -> Any:
    return number / by, number // by, number % by > 0


def test_several_results() -> None:
    assert _divide_with_rest(7, 2) == (3.5, 3, True)


def test_an_error_in_a_kernel_is_raised() -> None:
    with pytest.raises(RuntimeError, match="_divide has failed"):
        _divide((), 7, 0)


@numba.njit(nogil=True)
def _reversed_in_halves(array: Any, out: Any) -> None:
    halves = array.reshape(2, -1)
    copy = np.empty(halves.shape, array.dtype)
    for half in range(2):
        for k in range(halves.shape[1]):
            copy[half, k] = halves[half, -1 - k]
    out[:] = copy.reshape(-1)


def test_arrays_in_kernels() -> None:
    out = np.zeros(6, np.int16)
    for _ in range(1000):
        _reversed_in_halves(np.arange(6, dtype=np.int16), out)
    assert out.tolist() == [2, 1, 0, 5, 4, 3]


def test_a_memo_follows_its_tuples() -> None:
    memo: Any = {}
    array = np.ones((1, 1), np.float32)
    for number in (0, 1, 1):
        pair = Pair(np.zeros(2), number)
        assert _weigh.bind((array, (1, 1), pair, np.float32(2)), memo).run() == 2
        assert pair.array[number] == 1
    kept = weakref.ref(pair.array)
    del pair
    assert kept() is not None
    memo.clear()
    gc.collect()
    assert kept() is None


def test_machine_code_that_calls_what_is_missing_is_not_loaded() -> None:
    content = loader.pack(b"", symbol="entry", results=[], externals=["malloc", "no_such_function"])
    assert loader.load(content) is None


def test_python_cannot_call_an_inner_function() -> None:
    row = np.ones(16, np.float32)
    with pytest.raises(TypeError, match="normalize_row can only be called by kernels"):
        normalize_row(row, row, row, np.float32(1), row)


def test_nogil_makes_a_kernel() -> None:
    assert not hasattr(normalize_row, "bind")
    assert hasattr(quantize_vectors, "bind")
