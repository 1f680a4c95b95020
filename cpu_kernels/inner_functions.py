"""Functions that only kernels call are compiled into each of them, and never by themselves.

By default Numba optimizes every function and makes machine code of it, with wrappers for Python, and then links the
result into each function that calls it, which is optimized and made machine code of again. A kernel that calls through
five levels is so compiled five times. Here a function without `nogil=True` is an inner function: its LLVM code is
linked into the kernels that call it, which are optimized once, as a whole. Compiling takes half the time.

Python cannot call an inner function: that raises TypeError. `nogil=True` makes a function a kernel, which it can.
"""

from __future__ import annotations

from typing import Any, NoReturn

from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import register_pass
from numba.core.dispatcher import Dispatcher
from numba.core.typed_passes import NativeLowering


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


def is_inner(dispatcher: Any) -> bool:
    """Return whether a function, as `numba.njit` made it, is an inner function."""
    return not dispatcher.targetoptions.get("nogil")


def make_inner(dispatcher: Any) -> None:
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
            make_inner(self)

    dispatcher_class.__init__ = construct_inner
