"""Calls of shared kernels by other kernels: the arguments as slots, and the symbol of an object of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.np.numpy_support import as_dtype

from cpu_kernels.compilation import signature
from cpu_kernels.compilation.deferred import intrinsic_type
from cpu_kernels.compilation.machine_code import numba_type

_I32, _I64 = ir.IntType(32), ir.IntType(64)


def call_type(
    py_func: Callable[..., Any],
    any_strides: tuple[str, ...],
    symbol_of: Callable[[tuple[signature.Type, ...]], str],
) -> Any:
    """Return what Numba takes a shared kernel for where another one calls it: the type of what emits the call.

    Args:
        py_func: the kernel in Python.
        any_strides: as in `SharedKernel`.
        symbol_of: returns the symbol of the version for arguments of these types, and makes sure that it will be there.

    """
    parameters = inspect.signature(py_func).parameters
    names = list(parameters)

    def emit_call(typing_context: Any, *arguments: Any) -> Any:
        types_ = tuple(
            _signature_type(argument, any_strides=name in any_strides)
            for name, argument in zip(names, arguments, strict=True)
        )
        symbol = symbol_of(types_)

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
            slots = [
                slot for pair in zip(signature.args, values, strict=True) for slot in _slots(context, builder, *pair)
            ]
            place = cgutils.alloca_once(builder, _I64, size=len(slots))
            for number, slot in enumerate(slots):
                builder.store(slot, builder.gep(place, [_I64(number)]))
            pointer = _I64.as_pointer()
            function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_I32, [pointer] * 2), symbol)
            status = builder.call(function, [place, ir.Constant(pointer, None)])
            with builder.if_then(cgutils.is_not_null(builder, status), likely=False):
                context.call_conv.return_user_exc(builder, RuntimeError, ("a shared kernel has failed",))
            return context.get_dummy_value()

        return types.void(*map(numba_type, types_)), generate

    # Numba takes the arguments' names and number from here.
    first, _ = inspect.signature(emit_call).parameters.values()
    emit_call.__signature__ = inspect.Signature([first, *parameters.values()])  # type: ignore[attr-defined]
    return intrinsic_type(emit_call)


def _signature_type(type_: Any, *, any_strides: bool = False) -> signature.Type:
    """Return the type of `signature` for Numba's type of an argument; integers of 64 bits are all `int`."""
    type_ = types.unliteral(type_)
    if isinstance(type_, types.Array):
        layout = "A" if any_strides else type_.layout
        flags = {"C": signature.C_CONTIGUOUS, "F": signature.F_CONTIGUOUS, "A": 0}[layout]
        return as_dtype(type_.dtype), type_.ndim, flags | (signature.WRITABLE if type_.mutable else 0)
    if isinstance(type_, types.BaseTuple):
        return (getattr(type_, "instance_class", tuple), *map(_signature_type, type_.types))
    if isinstance(type_, types.Integer) and type_.bitwidth == _I64.width:
        return int
    return {types.boolean: bool, types.float64: float}.get(type_) or as_dtype(type_)


def _slots(context: Any, builder: ir.IRBuilder, type_: Any, value: ir.Value) -> list[ir.Value]:
    """Return the slots of an argument."""
    if isinstance(type_, types.BaseTuple):
        items = zip(type_.types, cgutils.unpack_tuple(builder, value), strict=True)
        return [slot for item in items for slot in _slots(context, builder, *item)]
    if isinstance(type_, types.Array):
        array = context.make_array(type_)(context, builder, value)
        numbers = cgutils.unpack_tuple(builder, array.shape)
        if type_.layout != "C":
            numbers += cgutils.unpack_tuple(builder, array.strides)
        return [builder.ptrtoint(array.data, _I64), *numbers]
    if isinstance(type_, types.Float):
        value = builder.bitcast(value, ir.IntType(type_.bitwidth))
    return [value if value.type == _I64 else builder.zext(value, _I64)]
