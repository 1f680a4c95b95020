"""The process that runs generated code; `sandbox` starts it as a file, with Python's standard library alone.

It reads one line of JSON: `program`, `token`, `memory_bytes` and `seconds`. Then it gives up what the program does not
need, for good: memory, processor time, and all system calls but those with which Python computes and reads modules. No
socket can be opened, no process or thread started, no signal sent, no file written, created or removed. What is not
named here fails with EPERM, so calls of later kernels do too.

It answers with a line: the token if the program has run to its end, `failed` if not, or `unprotected` and the reason,
without having run it.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import resource
import struct
import sys

# Numbers of the system calls that stay, by processor: as in Linux's asm/unistd_64.h and asm-generic/unistd.h.
_X86_64 = (
    0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 17, 19, 20, 21, 24, 25, 27, 28, 32, 33, 35, 39, 60, 63, 79, 89,
    96, 97, 98, 99, 100, 102, 104, 107, 108, 110, 131, 158, 186, 201, 202, 204, 217, 218, 228, 229, 230, 231, 262, 267,
    269, 270, 271, 273, 292, 318, 332, 334, 439,
)  # fmt: skip
_ARM64 = (
    17, 23, 24, 48, 57, 61, 62, 63, 64, 65, 66, 67, 72, 73, 78, 79, 80, 93, 94, 96, 98, 99, 101, 113, 114, 115, 123,
    124, 132, 134, 135, 139, 153, 160, 163, 165, 169, 172, 173, 174, 175, 176, 177, 178, 179, 214, 215, 216, 222, 226,
    232, 233, 278, 291, 293, 439,
)  # fmt: skip
_PROCESSORS = {"x86_64": (0xC000003E, 257, _X86_64), "aarch64": (0xC00000B7, 56, _ARM64)}  # audit's number, openat

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_MOST_FILES = 64
_SET_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER = 38, 22, 2  # of prctl
_ALLOW, _KILL, _FAIL = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM
_LOAD, _AND, _RETURN, _IF_EQUAL, _IF_AT_LEAST = 0x20, 0x54, 0x06, 0x15, 0x35  # of the packet filter's language
_NUMBER, _PROCESSOR, _THIRD_ARGUMENT = 0, 4, 32  # offsets in struct seccomp_data
_X32 = 0x40000000  # numbers from here on are those of another binary interface


def filter_program(machine: str) -> bytes:
    """Return the filter of system calls as the kernel takes it; KeyError for a processor that is not known."""
    audit, openat, allowed = _PROCESSORS[machine]
    steps = [
        (_LOAD, 0, 0, _PROCESSOR),
        (_IF_EQUAL, 1, 0, audit),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_IF_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _FAIL),
    ]
    for number in allowed:
        steps += [(_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    steps += [
        (_IF_EQUAL, 0, 4, openat),  # to read only
        (_LOAD, 0, 0, _THIRD_ARGUMENT),
        (_AND, 0, 0, _WRITES),
        (_IF_EQUAL, 0, 1, 0),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _FAIL),
    ]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


def restrict(memory_bytes: int, seconds: int) -> None:
    """Give up what a program does not need; OSError or KeyError if this system cannot do that."""
    for kind, most in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, 1 << 12),  # of what is open already: the answer
        (resource.RLIMIT_NOFILE, _MOST_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))
    steps = filter_program(platform.machine())
    buffer = ctypes.create_string_buffer(steps, len(steps))
    program = struct.pack("@HP", len(steps) // 8, ctypes.addressof(buffer))
    library = ctypes.CDLL(None, use_errno=True)
    for arguments in ((_SET_NO_NEW_PRIVILEGES, 1, 0), (_SET_SECCOMP, _FILTER, program)):
        if library.prctl(ctypes.c_int(arguments[0]), ctypes.c_ulong(arguments[1]), *_pointers(arguments[2])):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _pointers(value: bytes | int) -> tuple[object, ...]:
    """Return the last three arguments of prctl."""
    first = ctypes.c_char_p(value) if isinstance(value, bytes) else ctypes.c_ulong(value)
    return first, ctypes.c_ulong(0), ctypes.c_ulong(0)


def main() -> None:
    """Run the program of the request and answer."""
    request = json.loads(sys.stdin.buffer.readline())
    answer, nothing = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    try:
        restrict(request["memory_bytes"], request["seconds"])
    except (OSError, KeyError, ValueError) as error:
        os.write(answer, f"unprotected {type(error).__name__}: {error}\n".encode())
        return
    try:
        exec(compile(request["program"], "program.py", "exec"), {"__name__": "program"})
        reply = request["token"]
    except BaseException:  # whatever generated code raises, an end of the process included
        reply = "failed"
    os.write(answer, f"{reply}\n".encode())
    os._exit(0)


if __name__ == "__main__":
    main()
