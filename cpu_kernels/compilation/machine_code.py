"""Machine code of kernels, made by Numba. Functions that only kernels call are compiled into each of them.

By default Numba optimizes every function and makes machine code of it, with wrappers for Python, and then links the
result into each function that calls it, which is optimized and made machine code of again. A kernel that calls through
five levels is so compiled five times. Here a function without `nogil=True` is an inner function: its LLVM code is
linked into the kernels that call it, which are optimized once, as a whole. Compiling takes half the time.

A kernel gets an *entry*, a function that takes the address of its arguments as slots (`signature`), instead of the
wrappers with which Numba's functions read Python's objects. So its machine code depends on nothing that is Numba's or
Python's, and is run without them. What the memory of arrays needs from Numba's runtime is defined beside the entry.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NoReturn

import numpy as np
from numba import types
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_lock import global_compiler_lock
from numba.core.compiler_machinery import register_pass
from numba.core.dispatcher import Dispatcher
from numba.core.registry import cpu_target
from numba.core.typed_passes import NativeLowering
from numba.extending import overload
from numba.np import arrayobj
from numba.np.numpy_support import from_dtype

from cpu_kernels.compilation import entries, loader, signature
from cpu_kernels.compilation.deferred import load_numba


class _EntryLibrary(JITCodeLibrary):
    """The code of a kernel, with everything that it calls."""

    def _optimize_final_module(self) -> None:
        """Optimize it; nothing but the entry can be called from outside."""
        for function in self._final_module.functions:
            if not function.is_declaration and not function.name.startswith((entries.PREFIX, loader.SHARED_PREFIX)):
                function.linkage = "internal"
        super()._optimize_final_module()

    def _finalize_final_module(self) -> None:
        """Leave making machine code to `compile_kernel`."""
        self._finalize_dynamic_globals()
        self._finalized = True


class _LinkedLibrary(JITCodeLibrary):
    """The LLVM code of an inner function and of what it calls, for linking only."""

    def _optimize_final_module(self) -> None:
        """Leave the optimization to the kernel."""
        if not self._linking_libraries:
            super()._optimize_final_module()

    def _finalize_final_module(self) -> None:
        """Make no machine code."""
        self._finalize_dynamic_globals()
        self._finalized = True


@register_pass(mutates_CFG=True, analysis_only=False)
class _LinkedLowering(NativeLowering):
    """Lowering to LLVM code without machine code."""

    _name = "linked_lowering"

    def run_pass(self, state: Any) -> bool:
        """Lower the function and make its code available to the functions that call it."""
        state.library = _LinkedLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
        state.flags = state.flags.copy()
        state.flags.no_compile = True
        super().run_pass(state)
        state.library.finalize()
        name = state.func_id.func_qualname

        def refuse(*arguments: Any) -> NoReturn:
            raise TypeError(f"{name} can only be called by kernels; declare it with nogil=True to call it from Python")

        # Numba finds the code by this object, which must be unique to the function and its types.
        lowered = state["cr"]._replace(cfunc=refuse)
        state["cr"] = lowered
        state.targetctx.insert_user_function(refuse, lowered.fndesc, [state.library])
        return True


class _InnerCompiler(CompilerBase):
    """Numba's pipeline with another last step."""

    def define_pipelines(self) -> list[Any]:
        """Return the pipeline."""
        manager = DefaultPassBuilder.define_nopython_pipeline(self.state)
        manager.passes[:] = [
            (_LinkedLowering if step is NativeLowering else step, name) for step, name in manager.passes
        ]
        manager._finalized = False
        manager.finalize()
        return [manager]


def make_inner_function(py_func: Any, options: dict[str, Any]) -> Any:
    """Return Numba's object for a function of this package that is compiled into those that call it."""
    dispatcher = load_numba().njit(**options)(py_func)
    _make_inner(dispatcher)
    return dispatcher


def _make_inner(dispatcher: Any) -> None:
    """Compile a function in the way of inner functions from now on."""

    def add_overload(result: Any) -> None:
        dispatcher.overloads[tuple(result.signature.args)] = result  # but not among what Python can call

    dispatcher.targetoptions.update(no_cpython_wrapper=True, no_cfunc_wrapper=True)
    dispatcher._compiler.pipeline_class = _InnerCompiler
    dispatcher.add_overload = add_overload


def make_functions_of_numba_inner() -> None:
    """Do the same with Numba's own implementations of NumPy functions, in a process that only compiles."""
    dispatcher_class: Any = Dispatcher
    construct = dispatcher_class.__init__

    def construct_inner(self: Any, py_func: Any, *arguments: Any, **options: Any) -> None:
        construct(self, py_func, *arguments, **options)
        if py_func.__module__.startswith("numba."):
            _make_inner(self)

    dispatcher_class.__init__ = construct_inner


def numba_type(type_: signature.Type) -> Any:
    """Return Numba's type for a type of `signature`."""
    if not isinstance(type_, tuple):
        return types.boolean if type_ is bool else from_dtype(np.dtype(type_))
    first, *rest = type_
    if isinstance(first, type):
        return types.BaseTuple.from_types([numba_type(item) for item in rest], first)
    dimensions, flags = rest
    order = "C" if flags & signature.C_CONTIGUOUS else "F" if flags & signature.F_CONTIGUOUS else "A"
    return types.Array(from_dtype(first), dimensions, order, readonly=not flags & signature.WRITABLE)


def _raise_shape_error(source: Any, target: Any) -> NoReturn:
    """Stand for Numba's function that makes a text of the shapes, by code longer than most kernels."""
    raise NotImplementedError


@overload(_raise_shape_error)
def _choose_shape_error(source: Any, target: Any) -> Any:
    def fail(source: Any, target: Any) -> NoReturn:
        raise ValueError("the shapes differ")

    return fail


@contextlib.contextmanager
def _short_errors() -> Iterator[None]:
    """Make an assignment of another shape raise an error without the shapes."""
    before = arrayobj.raise_with_shape_context
    arrayobj.raise_with_shape_context = _raise_shape_error
    try:
        yield
    finally:
        arrayobj.raise_with_shape_context = before


def compile_kernel(dispatcher: Any, arguments: tuple[signature.Type, ...], symbol: str | None = None) -> bytes:
    """Compile a function for arguments of these types; return what `loader.load` takes.

    `symbol` is the name of the entry of a shared kernel. TypeError if such a kernel returns anything.
    """
    numba_types = tuple(map(numba_type, arguments))
    with global_compiler_lock, _short_errors():
        dispatcher.compile(numba_types)
        compiled = dispatcher.overloads[numba_types]
        target = cpu_target.target_context
        library = _EntryLibrary(target.codegen(), f"{compiled.fndesc.qualname}.entry")
        results = entries.result_kinds(compiled.signature.return_type)
        if symbol is None:
            symbol = f"{entries.PREFIX}{compiled.fndesc.mangled_name}"
        elif results:
            raise TypeError("a shared kernel returns nothing")
        library.add_ir_module(entries.entry(target, compiled, symbol))
        library.add_ir_module(entries.runtime(target))
        library.add_linking_library(compiled.library)
        library.finalize()
        module = library._final_module
        externals = [function.name for function in module.functions if function.is_declaration]
        return loader.pack(
            target.codegen()._tm.emit_object(module),
            symbol=symbol,
            results=results,
            externals=[name for name in externals if not name.startswith("llvm.")],
        )
