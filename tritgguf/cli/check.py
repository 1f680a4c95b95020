"""`tritgguf check`: check a file for damage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tritgguf.cli import terminal
from tritgguf.cli.model_file import local_file
from tritgguf.cli.options import Json, Threads, TritFile
from tritgguf.cli.terminal import print_table
from tritgguf.text_format import format_bytes

if TYPE_CHECKING:
    from tritgguf.formats.integrity import CheckReport


def print_check(report: CheckReport) -> None:
    """Print the report of an undamaged file."""
    no_checksums = "none: a stock GGUF file has none" if report.stock else "none: written by an earlier version"
    rows = [
        ("tensors", str(report.tensors)),
        ("of them in trits", str(report.trit_tensors)),
        ("checksums", str(report.checksums) if report.checksums else no_checksums),
        ("file", format_bytes(report.file_bytes)),
        ("time", f"{report.seconds:.2f} s"),
        ("speed", f"{format_bytes(report.bytes_per_second)}/s"),
    ]
    print_table(f"{report.file}: whole", ("", ">"), rows)


def check_command(file: TritFile, threads: Threads = None, as_json: Json = False) -> None:
    """Check a file for damage: its structure, every codebook and word, and the checksum of every tensor.

    Example: tritgguf check d3.gguf
    """
    report = check_file(local_file(file), threads)
    if as_json:
        terminal.print_json(vars(report))
    else:
        print_check(report)


def check_file(file: Path, threads: int | None) -> CheckReport:
    """Check a file, with progress on stderr; of a trit file also that its keys and tensors make a model."""
    from tritgguf.formats.gguf_file import GgufFile
    from tritgguf.formats.integrity import check
    from tritgguf.runtime.compiler import require_compiler
    from tritgguf.runtime.config import ModelConfig

    require_compiler()
    with terminal.progress(in_bytes=True) as report:
        found = check(file, threads=threads, progress=lambda done, total: report("checking", done, total))
    if not found.stock:
        ModelConfig.from_file(GgufFile(file))
    return found
