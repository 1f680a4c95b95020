"""Measure the memory of many `run` processes of one file, whose pages they share.

python -m tools.memory.shared_pages build/qwen-d2.gguf --processes 8
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from tools import tool_command
from tritgguf.cli import terminal
from tritgguf.errors import TritGgufError

_SECONDS_TO_START = 300


def memory_of(process: int) -> tuple[int, int, int]:
    """Return private memory, proportional set size and pages of files of a process, in bytes; Linux only."""
    text = Path(f"/proc/{process}/smaps_rollup").read_text("ascii")
    sizes = {
        words[0].rstrip(":"): 1024 * int(words[1]) for line in text.splitlines()[1:] if len(words := line.split()) > 1
    }
    private = sizes["Private_Clean"] + sizes["Private_Dirty"]
    return private, sizes["Pss"], sizes["Rss"] - sizes["Anonymous"]


def measure(file: Path, processes: int) -> list[tuple[int, int, int]]:
    """Run the file in several processes at once and return the memory of each when all have begun to answer."""
    command = [sys.executable, "-m", "tritgguf", "run", str(file), "-p", "Count to a thousand.", "-n", "-1", "-t", "1"]
    running = [
        subprocess.Popen([*command, "-c", "2048"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for _ in range(processes)
    ]
    try:
        deadline = time.monotonic() + _SECONDS_TO_START
        for process in running:
            assert process.stdout is not None
            if not process.stdout.read(8) or time.monotonic() > deadline:
                raise TritGgufError(f"{file}: one of {processes} processes did not answer")
        return [memory_of(process.pid) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()


def main(
    file: Annotated[Path, typer.Argument(help="A trit file.")],
    processes: Annotated[int, typer.Option(min=1, help="How many at once.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Measure one process, then many."""
    rows = []
    for count in sorted({1, processes}):
        found = measure(file, count)
        private, total, of_file = (sum(column) for column in zip(*found, strict=True))
        rows.append({"processes": count, "private": private // count, "file": of_file // count, "all": total})
    if as_json:
        terminal.print_json({"file_bytes": file.stat().st_size, "rows": rows})
        return
    print("| processes | private memory of each | pages of files that each sees | all together |\n|---|---|---|---|")
    for row in rows:
        sizes = " | ".join(f"{row[name] / 1e9:.2f} GB" for name in ("private", "file", "all"))
        print(f"| {row['processes']} | {sizes} |")


if __name__ == "__main__":
    tool_command.run(main)
