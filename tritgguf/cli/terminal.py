"""Output of the commands: results to stdout, everything else to stderr; rich on a terminal, plain text in a pipe.

A model's file is untrusted, including its keys, tensor names and generated text. Control characters, which could
reprogram a terminal, are removed before printing.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from tritgguf.cli.layout import needs_stacking, pairs, stacked, terminal_width, wrap
from tritgguf.text_format import format_bytes, one_line, strip_control_characters

_SECONDS_BETWEEN_LINES = 1.0  # of progress that is not shown on a terminal
_WIDTH_FOR_RATES = 80  # columns
_WIDTH_BESIDE_NAME = 28  # of the shortest bar, the percentage and the time left


def error(message: str) -> None:
    """Print an error on stderr: one line, which only a terminal breaks."""
    note(f"error: {one_line(message)}")


def note(message: str, *, dim: bool = False) -> None:
    """Print a message that is not a result, on stderr; wrapped on a terminal, and faint where it can show that."""
    if sys.stderr.isatty():
        message = wrap(message, terminal_width(sys.stderr))
        if dim and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb":
            message = f"\x1b[2m{message}\x1b[0m"
    print(message, file=sys.stderr, flush=True)


def note_pairs(rows: Sequence[tuple[str, str]]) -> None:
    """Print names and what they mean, on stderr."""
    print(pairs(rows, terminal_width(sys.stderr)), file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """Print one JSON object, in ASCII where standard output has another encoding than UTF-8."""
    is_utf8 = (sys.stdout.encoding or "utf-8").lower() in ("utf-8", "utf8")
    print(json.dumps(value, ensure_ascii=not is_utf8, default=str))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; columns whose name starts with ">" are aligned to the right."""
    names = [column.removeprefix(">") for column in columns]
    right = [column.startswith(">") for column in columns]
    cells = [[strip_control_characters(cell) for cell in row] for row in rows]
    if sys.stdout.isatty() and needs_stacking(names, cells, width := terminal_width(sys.stdout)):
        print(f"{wrap(title, width)}\n\n{stacked(names, cells, width)}\n")
        return
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


@contextlib.contextmanager
def progress(*, in_bytes: bool) -> Iterator[Report]:
    """Show a job's progress on stderr, with the time left and, for bytes, the rate.

    A bar on a terminal, otherwise a line for each tenth, one a second at most. Unless progress is in bytes, it restarts
    with each stage. The bar appears with the first report, so what comes before may show a bar of its own.
    """
    if not sys.stderr.isatty():
        yield _PlainProgress(in_bytes)
        return
    from rich import progress as bars
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column

    console = Console(stderr=True)
    with_rates = in_bytes and console.width >= _WIDTH_FOR_RATES
    longest = console.width // 3 if with_rates else console.width - _WIDTH_BESIDE_NAME
    name = Column(no_wrap=True, overflow="ellipsis", max_width=max(8, longest))
    columns: list[bars.ProgressColumn] = [bars.TextColumn("{task.description}", table_column=name)]
    columns += [bars.BarColumn(max(6, min(40, console.width - 60))), bars.TaskProgressColumn()]
    if with_rates:
        columns += [bars.DownloadColumn(), bars.TransferSpeedColumn()]
    tasks: dict[str, bars.TaskID] = {}
    display = bars.Progress(*columns, bars.TimeRemainingColumn(), console=console)
    with contextlib.ExitStack() as shown:

        def report(stage: str, done: int, total: int) -> None:
            if not tasks:
                shown.enter_context(display)
            key = "" if in_bytes else stage
            if key not in tasks:
                tasks[key] = display.add_task("", total=total)
            display.update(tasks[key], completed=done, total=total, description=escape(strip_control_characters(stage)))

        yield report


@contextlib.contextmanager
def compilation_progress() -> Iterator[Callable[[int, int], None]]:
    """Show how far the kernels are compiled, which happens once."""
    with progress(in_bytes=False) as report:
        yield lambda done, total: report("compiling the kernels for this processor, once", done, total)


class _PlainProgress:
    def __init__(self, in_bytes: bool) -> None:
        self._in_bytes = in_bytes
        self._stage: str | None = None
        self._tenth = 0
        self._start = self._last_line = time.perf_counter()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if not self._in_bytes and stage != self._stage:
            self._stage, self._tenth, self._start = stage, -1, time.perf_counter()
        tenth = done * 10 // total if total else 10
        now = time.perf_counter()
        if tenth <= self._tenth or now - self._last_line < _SECONDS_BETWEEN_LINES:
            return
        self._tenth, self._last_line = tenth, now
        seconds = now - self._start
        details = [f"{tenth * 10:3d} %", one_line(stage)]
        if done and seconds:
            if self._in_bytes:
                details.append(f"{format_bytes(done / seconds)}/s")
            if tenth > 0:  # before, it would be a guess
                details.append(f"{seconds * (total - done) / done:.0f} s left")
        note("  ".join(details))


def print_compilation_note() -> None:
    """Explain why the first run on a machine takes longer."""
    note("compiling the kernels for this processor; this happens once and takes about half a minute")
