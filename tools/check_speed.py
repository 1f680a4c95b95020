"""How fast is `tritgguf check`, beside the speed at which this machine reads memory?

    python tools/check_speed.py build/qwen-d2.gguf [--json]

Both are measured in turns in one process, after a first turn that loads kernels and brings the file into the page
cache. A command adds what does not depend on the file's size: the start of Python, a third of a second for loading
kernels, and the header, a tenth of a second for 150,000 tokens.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Annotated

import tool_command
import typer

from cpu_kernels.bandwidth import read_bandwidth
from cpu_kernels.crew import Crew
from tritgguf import console
from tritgguf.check import check


def main(
    file: Annotated[Path, typer.Argument(help="A trit file, best of a gigabyte or more.")],
    turns: Annotated[int, typer.Option(help="Of which the median counts.", min=1)] = 9,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    threads: Annotated[int | None, typer.Option("--threads", "-t", min=1)] = None,
) -> None:
    """Measure and print."""
    crew = Crew(threads)
    check(file, threads=crew.threads)
    speeds, bandwidths = [], []
    for _ in range(turns):
        bandwidths.append(read_bandwidth(crew, repetitions=1))
        speeds.append(check(file, threads=crew.threads).bytes_per_second)
    result = {
        "threads": crew.threads,
        "bytes_per_second": median(speeds),
        "read_bandwidth": median(bandwidths),
        "share_of_read_bandwidth": median(speeds) / median(bandwidths),
    }
    if as_json:
        console.print_json(result)
        return
    print(f"check           {result['bytes_per_second'] / 1e9:.1f} GB/s on {crew.threads} threads")
    print(f"read bandwidth  {result['read_bandwidth'] / 1e9:.1f} GB/s")
    print(f"share           {result['share_of_read_bandwidth']:.2f}")


if __name__ == "__main__":
    tool_command.run(main)
