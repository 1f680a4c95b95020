"""Output of the commands: results to stdout, everything else to stderr; rich on a terminal, plain text in a pipe.

A model's file is untrusted, including its keys, tensor names and generated text. Control characters, which could
reprogram a terminal, are removed before printing.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from tritgguf.text_format import format_bytes, one_line, strip_control_characters


def error(message: str) -> None:
    """Print an error: one line on stderr."""
    print(f"error: {one_line(message)}", file=sys.stderr, flush=True)


def note(message: str) -> None:
    """Print a message that is not a result, on stderr."""
    print(message, file=sys.stderr, flush=True)


def write_answer(piece: str) -> None:
    """Print a piece of a model's answer immediately."""
    sys.stdout.write(strip_control_characters(piece) if sys.stdout.isatty() else piece)
    sys.stdout.flush()


def print_json(value: Any) -> None:
    """Print one JSON object."""
    print(json.dumps(value, ensure_ascii=False, default=str))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; columns whose name starts with ">" are aligned to the right."""
    names = [column.removeprefix(">") for column in columns]
    right = [column.startswith(">") for column in columns]
    cells = [[strip_control_characters(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title, title_justify="left", show_header=any(names))
        for name, is_right in zip(names, right, strict=True):
            table.add_column(name, justify="right" if is_right else "left", overflow="fold")
        for row in cells:
            table.add_row(*map(Text, row))
        Console().print(table)
        return
    print(title)
    lines = [names, *cells] if any(names) else cells
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        padded = (
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(line, widths, right, strict=True)
        )
        print("  " + "  ".join(padded).rstrip())
    print()


class Report(Protocol):
    """Receives the progress of a job: its stage, the amount done and the total."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show the progress."""


@contextmanager
def progress(*, in_bytes: bool) -> Iterator[Report]:
    """Show a job's progress on stderr, with the time left and, for bytes, the rate.

    A bar on a terminal, otherwise a line for each tenth. Unless progress is in bytes, it restarts with each stage.
    """
    if not sys.stderr.isatty():
        yield _PlainProgress(in_bytes)
        return
    from rich import progress as bars
    from rich.console import Console
    from rich.markup import escape

    columns = [bars.TextColumn("{task.description}"), bars.BarColumn(), bars.TaskProgressColumn()]
    if in_bytes:
        columns += [bars.DownloadColumn(), bars.TransferSpeedColumn()]
    tasks: dict[str, bars.TaskID] = {}
    with bars.Progress(*columns, bars.TimeRemainingColumn(), console=Console(stderr=True)) as display:

        def report(stage: str, done: int, total: int) -> None:
            key = "" if in_bytes else stage
            if key not in tasks:
                tasks[key] = display.add_task("", total=total)
            display.update(tasks[key], completed=done, total=total, description=escape(strip_control_characters(stage)))

        yield report


class _PlainProgress:
    def __init__(self, in_bytes: bool) -> None:
        self._in_bytes = in_bytes
        self._stage: str | None = None
        self._tenth = 0
        self._start = time.perf_counter()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if not self._in_bytes and stage != self._stage:
            self._stage, self._tenth, self._start = stage, -1, time.perf_counter()
        tenth = done * 10 // total if total else 10
        if tenth <= self._tenth:
            return
        self._tenth = tenth
        seconds = time.perf_counter() - self._start
        details = [f"{tenth * 10:3d} %", one_line(stage)]
        if done and seconds:
            if self._in_bytes:
                details.append(f"{format_bytes(done / seconds)}/s")
            details.append(f"{seconds * (total - done) / done:.0f} s left")
        note("  ".join(details))


def print_compilation_note() -> None:
    """Explain why the first run on a machine takes longer."""
    note("compiling the kernels for this processor; this happens once and takes about half a minute")
