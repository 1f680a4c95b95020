"""LLVM code around a kernel: its entry, and what arrays in kernels need of Numba's runtime."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.np.arrayobj import populate_array

_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_POINTER = _I8.as_pointer()
PREFIX = "kernel_entry."  # of the names of entries


def result_kinds(result: Any) -> list[str]:
    """Return the kinds of a kernel's results, see `loader.MachineCode`; TypeError for what it cannot return."""
    if result == types.none:
        return []
    return [_kind(item) for item in (result.types if isinstance(result, types.BaseTuple) else [result])]


def _kind(result: Any) -> str:
    for kind, kind_type in (("bool", types.Boolean), ("int", types.Integer), ("float", types.Float)):
        if isinstance(result, kind_type):
            return kind
    raise TypeError(f"a kernel returns numbers or nothing, not {result}")


def entry(context: Any, compiled: Any, name: str) -> Any:
    """Return a module with the entry of a compiled function: `int32 name(int64 *slots, int64 *results)`.

    `signature` says what slots are. The entry returns 0, or 1 after an error.
    """
    module = context.create_module(f"entry.{name}")
    descriptor = compiled.fndesc
    callee = ir.Function(
        module, context.call_conv.get_function_type(descriptor.restype, descriptor.argtypes), descriptor.llvm_func_name
    )
    function = ir.Function(module, ir.FunctionType(_I32, [_I64.as_pointer()] * 2), name)
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    slots = _Slots(context, builder, function.args[0])
    arguments = [slots.take(type_) for type_ in descriptor.argtypes]
    status, result = context.call_conv.call_function(
        builder, callee, descriptor.restype, descriptor.argtypes, arguments
    )
    with builder.if_then(status.is_error, likely=False):
        builder.ret(_I32(1))
    is_tuple = isinstance(descriptor.restype, types.BaseTuple)
    for number, kind in enumerate(result_kinds(descriptor.restype)):
        value, type_ = result, descriptor.restype
        if is_tuple:
            value, type_ = builder.extract_value(result, number), type_.types[number]
        bits = context.cast(builder, value, type_, types.float64 if kind == "float" else types.int64)
        place = builder.gep(function.args[1], [_I64(number)])
        builder.store(builder.bitcast(bits, _I64) if kind == "float" else bits, place)
    builder.ret(_I32(0))
    return module


class _Slots:
    """Emits the arguments of a kernel from its slots."""

    def __init__(self, context: Any, builder: ir.IRBuilder, slots: ir.Value) -> None:
        self._context, self._builder, self._slots = context, builder, slots
        self._next = 0

    def _load(self) -> ir.Value:
        value = self._builder.load(self._builder.gep(self._slots, [_I64(self._next)]))
        self._next += 1
        return value

    def take(self, type_: Any) -> ir.Value:
        """Return the next argument, whose type is `type_`."""
        context, builder = self._context, self._builder
        if isinstance(type_, types.BaseTuple):
            return context.make_tuple(builder, type_, [self.take(item) for item in type_.types])
        if isinstance(type_, types.Array):
            return self._take_array(type_)
        value_type = context.get_value_type(type_)
        bits = self._load()
        if isinstance(type_, types.Float):
            number = ir.IntType(type_.bitwidth)
            return builder.bitcast(bits if number == _I64 else builder.trunc(bits, number), value_type)
        return bits if value_type == _I64 else builder.trunc(bits, value_type)

    def _take_array(self, type_: Any) -> ir.Value:
        context, builder = self._context, self._builder
        array = context.make_array(type_)(context, builder)
        data = builder.inttoptr(self._load(), context.get_data_type(type_.dtype).as_pointer())
        shape = [self._load() for _ in range(type_.ndim)]
        size = context.get_abi_sizeof(context.get_data_type(type_.dtype))
        if type_.layout == "C":
            strides: list[ir.Value] = [_I64(size)]
            for length in reversed(shape[1:]):
                strides.insert(0, builder.mul(strides[0], length))
            strides = strides[: type_.ndim]
        else:
            strides = [self._load() for _ in range(type_.ndim)]
        populate_array(array, data=data, shape=shape, strides=strides, itemsize=_I64(size), meminfo=None)
        return array._getvalue()


def runtime(context: Any) -> Any:
    """Return a module with the functions of Numba's runtime that kernels call."""
    module = context.create_module("runtime")
    malloc = ir.Function(module, ir.FunctionType(_POINTER, [_I64]), "malloc")
    free = ir.Function(module, ir.FunctionType(ir.VoidType(), [_POINTER]), "free")
    for name, callee in (("NRT_Allocate", malloc), ("NRT_Free", free), ("NRT_MemInfo_call_dtor", free)):
        function = ir.Function(module, callee.function_type, name)
        builder = ir.IRBuilder(function.append_basic_block())
        result = builder.call(callee, function.args)
        if callee is malloc:
            builder.ret(result)
        else:
            builder.ret_void()
    _define_allocate(context, module, malloc)
    _define_reshape(module, "numba_attempt_nocopy_reshape")
    return module


def _define_allocate(context: Any, module: Any, malloc: Any) -> None:
    """Define what allocates an array, from its size and alignment; it returns null if there is no memory.

    It begins with what Numba calls a MemInfo: number of references, destructor and its data, address of the content,
    size, allocator. The content follows in the same block.
    """
    info = ir.LiteralStructType([_I64, _POINTER, _POINTER, _POINTER, _I64, _POINTER])
    function = ir.Function(module, ir.FunctionType(_POINTER, [_I64, _I32]), "NRT_MemInfo_alloc_aligned")
    builder = ir.IRBuilder(function.append_basic_block())
    size, alignment = function.args[0], builder.zext(function.args[1], _I64)
    info_bytes = _I64(context.get_abi_sizeof(info))
    block = builder.call(malloc, [builder.add(builder.add(size, alignment), info_bytes)])
    with builder.if_then(cgutils.is_null(builder, block), likely=False):
        builder.ret(block)
    behind = builder.add(builder.ptrtoint(block, _I64), info_bytes)
    missing = builder.urem(builder.sub(alignment, builder.urem(behind, alignment)), alignment)
    content = builder.inttoptr(builder.add(behind, missing), _POINTER)
    null = ir.Constant(_POINTER, None)
    fields = builder.bitcast(block, info.as_pointer())
    for number, value in enumerate((_I64(1), null, null, content, size, null)):
        builder.store(value, cgutils.gep_inbounds(builder, fields, 0, number))
    builder.ret(block)


def _define_reshape(module: Any, name: str) -> None:
    """Define what gives the strides of a C-contiguous array in another shape; it returns 1, or 0 for any other array.

    `int32 name(int64 dimensions, int64 *shape, int64 *strides, int64 new_dimensions, int64 *new_shape,
    int64 *new_strides, int64 item_bytes, int32 in_fortran_order)`
    """
    numbers = _I64.as_pointer()
    function_type = ir.FunctionType(_I32, [_I64, numbers, numbers, _I64, numbers, numbers, _I64, _I32])
    function = ir.Function(module, function_type, name)
    builder = ir.IRBuilder(function.append_basic_block())
    dimensions, shape, strides, new_dimensions, new_shape, new_strides, item_bytes, in_fortran_order = function.args
    stride = cgutils.alloca_once_value(builder, item_bytes)
    with cgutils.for_range_slice(builder, builder.sub(dimensions, _I64(1)), _I64(-1), _I64(-1), inc=False) as (
        index,
        _,
    ):
        length, found = (builder.load(builder.gep(array, [index])) for array in (shape, strides))
        differs = builder.icmp_signed("!=", found, builder.load(stride))
        with builder.if_then(builder.and_(builder.icmp_signed("!=", length, _I64(1)), differs)):
            builder.ret(_I32(0))
        builder.store(builder.mul(builder.load(stride), length), stride)
    builder.store(item_bytes, stride)
    last = builder.sub(new_dimensions, _I64(1))
    with cgutils.for_range_slice(builder, last, _I64(-1), _I64(-1), inc=False) as (index, _):
        builder.store(builder.load(stride), builder.gep(new_strides, [index]))
        length = builder.load(builder.gep(new_shape, [index]))
        builder.store(builder.mul(builder.load(stride), length), stride)
    builder.ret(builder.zext(builder.icmp_signed("==", in_fortran_order, _I32(0)), _I32))
