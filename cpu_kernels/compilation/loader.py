"""Machine code made ready to run, without Numba: LLVM's linker puts it into memory."""

from __future__ import annotations

import ctypes
import functools
import json
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import llvmlite.binding as llvm

_FUNCTION = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p)


class MachineCode(NamedTuple):
    """A kernel for one combination of argument types."""

    entry: Callable[[int, int], int]  # takes the addresses of the arguments' and the results' slots; 0: no error
    results: list[str]  # the kind of each: "int", "bool" or "float"


def pack(object_file: bytes, *, symbol: str, results: list[str], externals: list[str]) -> bytes:
    """Return an object file with what has to be known to load it.

    Args:
        object_file: in the format of the system.
        symbol: the name of the entry.
        results: as in `MachineCode`.
        externals: functions that it calls and that the process has to have.

    """
    header = {"symbol": symbol, "results": results, "externals": externals}
    return json.dumps(header).encode() + b"\n" + object_file


def load(content: bytes) -> MachineCode | None:
    """Load what `pack` returned; None if this process lacks a function that the machine code calls."""
    line, _, object_file = content.partition(b"\n")
    header = json.loads(line)
    engine = _engine()
    # LLVM would end the process.
    if not all(llvm.address_of_symbol(name) for name in header["externals"]):
        return None
    engine.add_object_file(llvm.ObjectFileRef.from_data(object_file))
    engine.finalize_object()
    entry = _FUNCTION(engine.get_function_address(header["symbol"]))
    return MachineCode(entry, header["results"])


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
