"""Kernels, and how Python calls them: as machine code with the addresses of arrays, without Numba.

A kernel is compiled for each combination of argument types. The machine code is loaded from the cache when a
combination is first used, or else compiled then.
"""

from __future__ import annotations

import functools
import struct
import threading
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from cpu_kernels.compilation import kernel_cache, signature
from cpu_kernels.compilation.deferred import load_numba

if TYPE_CHECKING:
    from cpu_kernels.compilation.loader import MachineCode

Memo = dict[tuple["Kernel", int], tuple[tuple[Any, ...], signature.Type, list[int]]]
compilation_listeners: list[Callable[[], None]] = []  # called before anything is compiled
_READ: dict[str, Callable[[int], Any]] = {
    "int": int,
    "bool": bool,
    "float": lambda bits: struct.unpack("d", struct.pack("q", bits))[0],
}
_OWN_OPTIONS = ("nogil", "shared", "any_strides")  # which are not Numba's
_one_at_a_time = threading.RLock()
# The shared kernels, by their symbols, that what this process has compiled calls.
_called: dict[str, tuple[SharedKernel, tuple[signature.Type, ...]]] = {}


class InnerFunction:
    """A function that only kernels call.

    Attributes:
        py_func: the function itself.
        targetoptions: the options with which Numba compiles it.

    """

    def __init__(self, py_func: Callable[..., Any], options: dict[str, Any]) -> None:
        functools.update_wrapper(self, py_func)
        self.py_func = py_func
        self.targetoptions = {name: value for name, value in options.items() if name not in _OWN_OPTIONS}

    @functools.cached_property
    def dispatcher(self) -> Any:
        """What Numba calls a compiled function."""
        from cpu_kernels.compilation.machine_code import make_inner_function

        return make_inner_function(self.py_func, self.targetoptions)

    @property
    def _numba_type_(self) -> Any:
        return self.dispatcher._numba_type_

    def __call__(self, *arguments: Any) -> Any:
        """Raise TypeError: there is no machine code of the function alone."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        name = self.py_func.__name__
        raise TypeError(f"{name} can only be called by kernels; declare it with nogil=True to call it from Python")


class Kernel(InnerFunction):
    """A function that Python calls, and kernels too. It runs without the GIL."""

    def __init__(self, py_func: Callable[..., Any], options: dict[str, Any]) -> None:
        super().__init__(py_func, options)
        self._versions: dict[tuple[signature.Type, ...], MachineCode] = {}

    def __call__(self, *arguments: Any) -> Any:
        """Run the kernel; TypeError for arguments that kernels do not take."""
        return self.bind(arguments).run()

    def bind(self, arguments: tuple[Any, ...], memo: Memo | None = None) -> Call:
        """Return a call with these arguments, which have to outlive it.

        What tuples were found to be is kept in `memo` until the kernel is called with others.
        """
        types, slots = list[signature.Type](), list[int]()
        for number, argument in enumerate(arguments):
            if memo is None or not isinstance(argument, tuple):
                types.append(signature.describe(argument, slots))
                continue
            found = memo.get((self, number))
            if found is None or found[0] is not argument:
                own: list[int] = []
                found = memo[self, number] = argument, signature.describe(argument, own), own
            types.append(found[1])
            slots += found[2]
        return Call(self, self._version(tuple(types)), array("q", slots), arguments)

    def load(self, *arguments: Any) -> None:
        """Make the kernel ready for arguments of these types."""
        self.bind(arguments)

    def _version(self, types: tuple[signature.Type, ...]) -> MachineCode:
        version = self._versions.get(types)
        if version is None:
            with _one_at_a_time:
                version = self._versions.get(types) or self._load(types)
                self._versions[types] = version
        return version

    def _load(self, types: tuple[signature.Type, ...]) -> MachineCode:
        from cpu_kernels.compilation import loader

        content = kernel_cache.read(self.file_name(types))
        if content is not None and (code := loader.load(content)) is not None:
            return code
        for listener in compilation_listeners:
            listener()
        content = self.compile(types)
        for symbol in loader.shared_symbols(content):
            kernel, its_types = _called[symbol]
            kernel._version(its_types)
        code = loader.load(content)
        assert code is not None
        return code

    def compile(self, types: tuple[signature.Type, ...]) -> bytes:
        """Compile the kernel for arguments of these types; return the machine code and leave it in the cache.

        Raises ImportError if Numba cannot be imported, and whatever Numba raises.
        """
        load_numba()
        from cpu_kernels.compilation.machine_code import compile_kernel

        content = compile_kernel(self.dispatcher, types, self.symbol(types))
        kernel_cache.write(self.file_name(types), content)
        return content

    def symbol(self, types: tuple[signature.Type, ...]) -> str | None:
        """Return the name of the entry; None if it does not matter."""
        return None

    def is_cached(self, types: tuple[signature.Type, ...]) -> bool:
        """Tell whether the cache has the machine code for arguments of these types."""
        return kernel_cache.has(self.file_name(types))

    def file_name(self, types: tuple[signature.Type, ...]) -> str:
        """Return the name of the machine code in the cache."""
        module = self.py_func.__module__.rpartition(".")[2]
        names = ",".join(map(signature.name_of, types))
        return kernel_cache.file_name(f"{module}.{self.py_func.__name__}", names)


class SharedKernel(Kernel):
    """A kernel that other kernels call as machine code of its own, by its symbol, instead of containing it.

    So it is compiled once for all of them. It returns nothing, and a call costs some tens of nanoseconds.

    Attributes:
        any_strides: names of arguments whose arrays kernels pass as arrays of any strides, for fewer combinations.

    """

    def __init__(self, py_func: Callable[..., Any], options: dict[str, Any]) -> None:
        super().__init__(py_func, options)
        self.any_strides: tuple[str, ...] = options.get("any_strides", ())

    @functools.cached_property
    def _numba_type_(self) -> Any:
        from cpu_kernels.compilation.shared_calls import call_type

        def symbol_of(types: tuple[signature.Type, ...]) -> str:
            symbol = self.symbol(types)
            _called[symbol] = self, types
            return symbol

        return call_type(self.py_func, self.any_strides, symbol_of)

    def symbol(self, types: tuple[signature.Type, ...]) -> str:
        """Return the name of the entry: the same in all processes, and the loader finds the file in the cache by it."""
        from cpu_kernels.compilation import loader

        return loader.shared_symbol(self.file_name(types))


class Call:
    """A kernel and its arguments."""

    __slots__ = ("_arguments", "_code", "_kernel", "_slots")

    def __init__(self, kernel: Kernel, code: MachineCode, slots: array[int], arguments: tuple[Any, ...]) -> None:
        self._kernel, self._code, self._slots = kernel, code, slots
        self._arguments = arguments  # kept because the slots have their addresses

    def run(self, thread: int | None = None) -> Any:
        """Run the kernel and return its result; `thread` replaces the last argument but one."""
        slots, kinds = self._slots, self._code.results
        if thread is not None:
            slots = slots[:]
            slots[-2] = thread
        results = array("q", bytes(8 * len(kinds)))
        if self._code.entry(slots.buffer_info()[0], results.buffer_info()[0]):
            raise RuntimeError(
                f"{self._kernel.py_func.__name__} has failed, for want of memory or by a division by zero"
            )
        if not kinds:
            return None
        values = tuple(_READ[kind](number) for kind, number in zip(kinds, results, strict=True))
        return values if len(values) > 1 else values[0]
