"""Kernels that other kernels call by their symbols: arguments, errors, and how they are found in the cache."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from cpu_kernels.compilation import kernel_cache, loader
from cpu_kernels.compilation import lazy_numba as numba


class Pair(NamedTuple):
    """Two arguments in one."""

    array: np.ndarray
    number: int


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the kernels of these tests out of the real cache."""
    monkeypatch.setattr(kernel_cache, "folder", lambda: tmp_path)


@numba.njit(nogil=True, shared=True, any_strides=("out",))
def _describe(kind: Any, array: Any, pair: Any, small: Any, flag: Any, factor: Any, double: Any, out: Any) -> None:
    out[0, 0] = array.shape[0] * 100 + array.shape[1] * 10 + len(kind)
    out[0, 1] = array[-1, -1]
    out[0, 2] = pair.array[pair.number]
    out[1, 0] = small
    out[1, 1] = factor * 2 if flag else 0
    out[1, 2] = double


@numba.njit(nogil=True)
def _describe_twice(kind: Any, array: Any, pair: Any, small: Any, flag: Any, numbers: Any, out: Any) -> None:
    _describe(kind, array, pair, small, flag, numbers[0], numbers[1], out)
    _describe(kind, array.T, pair, small, not flag, numbers[0], numbers[1], out.T[3:].T)


def test_every_kind_of_argument_reaches_a_shared_kernel() -> None:
    array, pair = np.arange(6, dtype=np.int16).reshape(2, 3)[:, ::2], Pair(np.array([5.0, -7.0]), 1)
    out = np.zeros((2, 6))
    _describe_twice((1, 2), array, pair, np.int8(-9), True, (np.float32(0.25), 1e300), out)
    np.testing.assert_array_equal(out, [[222, 5, -7, 222, 5, -7], [-9, 0.5, 1e300, -9, 0, 1e300]])


@numba.njit(nogil=True, shared=True)
def _divide(number: Any, by: Any, out: Any) -> None:
    out[0] = number // by


@numba.njit(nogil=True)
def _divide_and_add(number: Any, by: Any, out: Any) -> None:
    _divide(number, by, out)
    out[0] += 1


def test_an_error_in_a_shared_kernel_ends_its_caller() -> None:
    out = np.zeros(1, np.int64)
    _divide_and_add(7, 2, out)
    assert out[0] == 4
    with pytest.raises(RuntimeError, match="_divide_and_add has failed"):
        _divide_and_add(7, 0, out)
    assert out[0] == 4


@numba.njit(nogil=True, shared=True)
def _answer(number: Any) -> Any:
    return number


def test_a_shared_kernel_returns_nothing() -> None:
    with pytest.raises(TypeError, match="a shared kernel returns nothing"):
        _answer(1)


# Says whether anything was compiled for a kernel that calls another one, which calls a third.
_PROGRAM = """
import sys
import numpy as np
from cpu_kernels.compilation import lazy_numba as numba

@numba.njit(nogil=True, shared=True)
def third(out):
    out[0] += 1

@numba.njit(nogil=True, shared=True)
def second(out):
    third(out)
    third(out)

@numba.njit(nogil=True)
def first(out):
    second(out)

out = np.zeros(1, np.int64)
first(out)
if "alone" in sys.argv:
    second(out)
print("compiled" if "numba" in sys.modules else "loaded", out[0])
"""


def _run(folder: Path, *arguments: str) -> str:
    environment = {"NUMBA_CACHE_DIR": str(folder), "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-c", _PROGRAM, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def test_what_a_kernel_calls_is_loaded_with_it(tmp_path: Path) -> None:
    assert _run(tmp_path) == "compiled 2"
    assert len(list(tmp_path.glob("*.kernel"))) == 3
    assert _run(tmp_path) == "loaded 2"
    assert _run(tmp_path, "alone") == "loaded 4"


@pytest.mark.parametrize("name", ["first", "second", "third"])
def test_a_kernel_that_is_missing_or_damaged_is_compiled_again(tmp_path: Path, name: str) -> None:
    _run(tmp_path)
    (path,) = tmp_path.glob(f"*{name}-*.kernel")
    whole = path.read_bytes()
    path.unlink()
    assert _run(tmp_path) == "compiled 2"
    assert path.stat().st_size == len(whole)
    path.write_bytes(whole[:-1])
    assert _run(tmp_path) == "compiled 2"
    assert _run(tmp_path) == "loaded 2"


def test_a_shared_kernel_that_is_nowhere_is_not_called() -> None:
    missing = loader.shared_symbol("gone.kernel")
    content = loader.pack(b"", symbol="entry", results=[], externals=["malloc", missing])
    assert loader.shared_symbols(content) == [missing]
    assert loader.load(content) is None
