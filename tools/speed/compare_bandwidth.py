"""Do `bench` and the kernels read memory as fast as plain C? All in turns, with as many threads.

    python -m tools.speed.compare_bandwidth [--threads 2] [--turns 7] [--megabytes 1024] [--depths 2,1]

Needs gcc and a processor with AVX2. Prints GB/s of every turn and the ratio of the medians; a machine's bandwidth can
swing by a factor of two within minutes, so only turns of one run compare. The kernels are those of decode: a matrix of
float16 and packed ones of --depths, with rows of 1,536 columns, times one vector. TRITGGUF_ISA chooses their
instruction set.
"""

from __future__ import annotations

import ctypes
import functools
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from cpu_kernels.threads.bandwidth import BYTES_AHEAD, read
from cpu_kernels.threads.thread_pool import ThreadPool
from cpu_kernels.transformer.projection import Matrix, Projection
from tools import tool_command
from tools.speed.batch_kernels import HEAD, head, packed_matrix
from tritgguf.cli import terminal
from tritgguf.errors import TritGgufError

_BLOCK = 128  # bytes that the C reader takes at once
_SOURCE = Path(__file__).with_name("plain_reader.c")


def compiled(folder: Path) -> Callable[[int, int], int]:
    """Compile the C reader; return it as a function of an address and a number of bytes."""
    library = folder / "plain_reader.so"
    command = ["gcc", "-O3", "-mavx2", "-shared", "-fPIC", str(_SOURCE), "-o", str(library)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise TritGgufError(f"the C reader needs gcc and AVX2: {' '.join(command)}: {error}") from error
    function = ctypes.CDLL(str(library)).read_share  # releases the GIL while it runs
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_size_t], ctypes.c_longlong
    return function


def kernel_call(matrix: Matrix, thread_pool: ThreadPool) -> Callable[[], None]:
    """Return a call that multiplies a matrix with a vector."""
    x, out = np.ones(matrix.columns, np.float32), np.zeros(matrix.rows, np.float32)
    return functools.partial(Projection([matrix]).multiply_vector, x, out, thread_pool)


def compare(
    reader: Callable[[int, int], int], threads: int, turns: int, n_bytes: int, matrices: Mapping[str, Matrix]
) -> dict[str, list[float]]:
    """Return the bytes per second of every turn of the C reader, each of our ways to read, and of these matrices."""
    thread_pool, buffer = ThreadPool(threads), np.ones(n_bytes // 8, np.int64)
    blocks = buffer.nbytes // _BLOCK

    def c_share(thread: int, threads: int) -> int:
        first, last = blocks * thread // threads, blocks * (thread + 1) // threads
        return reader(buffer.ctypes.data + first * _BLOCK, (last - first) * _BLOCK)

    calls: dict[str, Callable[[], list[int]]] = {"C": lambda: thread_pool.run(c_share)}
    for ahead in BYTES_AHEAD:
        calls[f"ours, {ahead} bytes ahead"] = functools.partial(thread_pool.run, read, buffer, ahead)
    products = {name: kernel_call(matrix, thread_pool) for name, matrix in matrices.items()}
    rates: dict[str, list[float]] = {name: [] for name in (*calls, *products)}
    for turn in range(turns + 1):
        for name, multiply in products.items():
            start = time.perf_counter()
            multiply()
            if turn:
                rates[name].append(matrices[name].data.nbytes / (time.perf_counter() - start))
        for name, call in calls.items():
            start = time.perf_counter()
            total = sum(call())
            seconds = time.perf_counter() - start
            if total != blocks * _BLOCK // 8:
                raise RuntimeError(f"{name} read {total} ones of {len(buffer)}")
            if turn:  # the first one may compile
                rates[name].append(buffer.nbytes / seconds)
    return rates


def main(
    threads: Annotated[int, typer.Option("--threads", "-t", min=1)] = 2,
    turns: Annotated[int, typer.Option(help="How often each reads.", min=1)] = 7,
    megabytes: Annotated[int, typer.Option(help="Size of the buffer.", min=1)] = 1024,
    depths: Annotated[str, typer.Option(help="Depths of the packed matrices, with commas between.")] = "2",
) -> None:
    """Measure both and print."""
    with tempfile.TemporaryDirectory() as folder:
        matrices = {"decode, float16": head(*HEAD)}
        matrices |= {f"decode, d={depth}": packed_matrix(*HEAD, int(depth)) for depth in depths.split(",")}
        rates = compare(compiled(Path(folder)), threads, turns, megabytes << 20, matrices)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    rows = [
        (name, f"{medians[name] / 1e9:.1f}", " ".join(f"{rate / 1e9:.1f}" for rate in values))
        for name, values in rates.items()
    ]
    terminal.print_table(f"{threads} threads, GB/s", ("reader", ">median", "turns"), rows)
    best = max(rate for name, rate in medians.items() if name.startswith("ours"))
    print(f"the best of ours over C: {best / medians['C']:.2f}")
    for name, rate in medians.items():
        if name.startswith("decode"):
            print(f"{name} over C: {rate / medians['C']:.2f}")


if __name__ == "__main__":
    tool_command.run(main)
