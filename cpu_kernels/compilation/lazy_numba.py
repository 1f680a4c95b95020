"""What kernels are written with, of Numba's, imported when a kernel has to be compiled.

Importing Numba and its types takes longer than answering a short prompt, and a machine that has compiled the kernels
once needs neither (`kernel`). So the modules of this package import these stand-ins.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from cpu_kernels.compilation.deferred import intrinsic_type, load_numba, register
from cpu_kernels.compilation.kernel import InnerFunction, Kernel, SharedKernel


class _LazyModule:
    """Stands for a module, which is imported with its first attribute."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


types: Any = _LazyModule("numba.types")
cgutils: Any = _LazyModule("numba.core.cgutils")


def njit(*, cache: bool = True, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that does what `numba.njit` does with these options.

    With `nogil=True` it makes a kernel, which Python can call, else an inner function, which only kernels can. With
    `shared=True`, and perhaps `any_strides`, kernels that call it do not contain it (`SharedKernel`). What is compiled
    is always cached.
    """
    assert cache
    kind = InnerFunction
    if options.get("nogil"):
        kind = SharedKernel if options.get("shared") else Kernel
    return lambda py_func: kind(py_func, options)


class _Intrinsic:
    """An intrinsic, which becomes Numba's when Numba asks for its type."""

    def __init__(self, emit: Callable[..., Any]) -> None:
        self._emit, self.__doc__ = emit, emit.__doc__

    @functools.cached_property
    def _numba_type_(self) -> Any:
        return intrinsic_type(self._emit)


def intrinsic(emit: Callable[..., Any]) -> Any:
    """Do what `numba.extending.intrinsic` does."""
    return _Intrinsic(emit)


class _ExternalFunction:
    """A function of the system's libraries, for kernels to call."""

    def __init__(self, name: str, result: str, *arguments: str) -> None:
        self._names = name, result, arguments

    @functools.cached_property
    def _numba_type_(self) -> Any:
        name, result, arguments = self._names
        signature = getattr(types, result)(*[getattr(types, argument) for argument in arguments])
        return types.ExternalFunction(name, signature)


def external_function(name: str, result: str, *arguments: str) -> Any:
    """Return a function of the system's libraries for kernels to call; types have Numba's names."""
    return _ExternalFunction(name, result, *arguments)


def overload(function: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Do what `numba.extending.overload` does."""

    def keep(choose: Callable[..., Any]) -> Callable[..., Any]:
        register(lambda: load_numba().extending.overload(function)(choose))
        return choose

    return keep


def register_jitable(function: Callable[..., Any]) -> Callable[..., Any]:
    """Do what `numba.extending.register_jitable` does."""
    register(lambda: load_numba().extending.register_jitable(function))
    return function
