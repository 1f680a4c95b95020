"""Machine code made ready to run, without Numba: LLVM's linker puts it into memory."""

from __future__ import annotations

import ctypes
import functools
import json
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import llvmlite.binding as llvm

from cpu_kernels.compilation import kernel_cache

SHARED_PREFIX = "shared_kernel."  # of the symbols of kernels that other kernels call; the name of the file follows
_FUNCTION = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p)


class MachineCode(NamedTuple):
    """A kernel for one combination of argument types."""

    entry: Callable[[int, int], int]  # takes the addresses of the arguments' and the results' slots; 0: no error
    results: list[str]  # the kind of each: "int", "bool" or "float"


_loaded_shared: set[str] = set()  # symbols of the shared kernels in this process


def pack(object_file: bytes, *, symbol: str, results: list[str], externals: list[str]) -> bytes:
    """Return an object file with what has to be known to load it.

    Args:
        object_file: in the format of the system.
        symbol: the name of the entry.
        results: as in `MachineCode`.
        externals: functions that it calls: of the process, and shared kernels.

    """
    header = {"symbol": symbol, "results": results, "externals": externals}
    return json.dumps(header).encode() + b"\n" + object_file


def load(content: bytes) -> MachineCode | None:
    """Load what `pack` returned, and the shared kernels that it calls from the cache.

    Returns None if the process lacks a function that the machine code calls, or the cache a shared kernel.
    """
    line, _, object_file = content.partition(b"\n")
    header = json.loads(line)
    engine = _engine()
    # LLVM would end the process.
    if not all(map(_is_there, header["externals"])):
        return None
    symbol = header["symbol"]
    if symbol not in _loaded_shared:
        engine.add_object_file(llvm.ObjectFileRef.from_data(object_file))
        engine.finalize_object()
    if symbol.startswith(SHARED_PREFIX):
        _loaded_shared.add(symbol)
    return MachineCode(_FUNCTION(engine.get_function_address(symbol)), header["results"])


def _is_there(name: str) -> bool:
    """Tell whether machine code can call this function; a shared kernel is loaded first."""
    if not name.startswith(SHARED_PREFIX):
        return bool(llvm.address_of_symbol(name))
    if name in _loaded_shared:
        return True
    content = kernel_cache.read(name.removeprefix(SHARED_PREFIX))
    return content is not None and load(content) is not None and name in _loaded_shared


def shared_symbol(file_name: str) -> str:
    """Return the symbol of the shared kernel in a file of the cache."""
    return SHARED_PREFIX + file_name


def shared_symbols(content: bytes) -> list[str]:
    """Return the symbols of the shared kernels that what `pack` returned calls."""
    externals = json.loads(content.partition(b"\n")[0])["externals"]
    return [name for name in externals if name.startswith(SHARED_PREFIX)]


@functools.cache
def _engine() -> Any:
    """Return what holds all machine code of this process."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    triple = llvm.get_process_triple()
    if sys.platform == "win32":
        triple += "-elf"  # as Numba's
    module = llvm.parse_assembly(f'target triple = "{triple}"')
    machine = llvm.Target.from_triple(triple).create_target_machine(jit=True)
    return llvm.create_mcjit_compiler(module, machine)
