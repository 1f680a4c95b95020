"""What the commands write: results to stdout, all else to stderr; rich on a terminal, plain text in a pipe.

A model's file is untrusted, and so are its keys, its tensors' names and what the model says: control
characters, which could reprogram a terminal, are dropped on the way there.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from tritgguf.calibrate import CalibrateReport
    from tritgguf.check import CheckReport
    from tritgguf.convert import ConvertReport
    from tritgguf.export import ExportReport
    from tritgguf.generate import Generation, LoadedModel, Timings
    from tritgguf.inspect_file import FileDescription
    from tritgguf.verify import VerifyReport

_CONTROL_CHARACTERS = dict.fromkeys({*range(32), *range(127, 160)} - {ord("\n"), ord("\t")})


def harmless(text: str) -> str:
    """Return a text without its control characters, except line feeds and tabs."""
    return text.translate(_CONTROL_CHARACTERS)


def one_line(text: str) -> str:
    """Return a text on one line, without control characters."""
    return harmless(" ".join(text.split()))


def error(message: str) -> None:
    """Print an error: one line on stderr."""
    print(f"error: {one_line(message)}", file=sys.stderr, flush=True)


def note(message: str) -> None:
    """Print what is no result, on stderr."""
    print(message, file=sys.stderr, flush=True)


def write_answer(piece: str) -> None:
    """Print a piece of a model's answer at once."""
    sys.stdout.write(harmless(piece) if sys.stdout.isatty() else piece)
    sys.stdout.flush()


def print_json(value: Any) -> None:
    """Print one JSON object."""
    print(json.dumps(value, ensure_ascii=False, default=str))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; columns whose name starts with ">" are aligned to the right."""
    names = [column.removeprefix(">") for column in columns]
    right = [column.startswith(">") for column in columns]
    cells = [[harmless(cell) for cell in row] for row in rows]
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


def format_bytes(count: float) -> str:
    """Return a size in decimal units, such as 61.3 MB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


class Report(Protocol):
    """Takes the progress of a job: its stage, what is done and what there is to do."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show it."""


@contextmanager
def progress(*, in_bytes: bool) -> Iterator[Report]:
    """Show a job's progress on stderr, with the time left and, for bytes, the rate.

    A bar on a terminal, a line for each tenth elsewhere. Steps that are no bytes start anew with each stage.
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
            display.update(tasks[key], completed=done, total=total, description=escape(harmless(stage)))

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


def print_conversion(report: ConvertReport) -> None:
    """Print what a conversion made."""
    print_table(
        f"{report.source} -> {report.output}",
        ("type", ">tensors", ">size"),
        [
            (name, str(count), format_bytes(report.bytes_by_type[name]))
            for name, count in report.tensors_by_type.items()
        ],
    )
    rows = [
        ("bits per weight, quantized matrices", f"{report.bits_per_weight_quantized:.3f}"),
        ("bits per weight, file", f"{report.bits_per_weight_file:.3f}"),
        ("relative error", f"{report.relative_error:.4f}"),
        ("file", format_bytes(report.file_bytes)),
        ("time", f"{report.seconds:.1f} s"),
        ("peak memory", format_bytes(report.peak_memory_bytes)),
    ]
    print_table(f"depth {report.depth}, encoder {report.encoder}", ("", ">"), rows)
    if report.kept_unaligned:
        names = ", ".join(report.kept_unaligned)
        note(f"note: kept in F16, because their row length is no multiple of 64: {names}")
    for warning in report.warnings:
        note(f"warning: {warning}")


def print_check(report: CheckReport) -> None:
    """Print what was checked and found whole."""
    rows = [
        ("tensors", str(report.tensors)),
        ("of them in trits", str(report.trit_tensors)),
        ("checksums", str(report.checksums) if report.checksums else "none: written by an earlier version"),
        ("file", format_bytes(report.file_bytes)),
        ("time", f"{report.seconds:.2f} s"),
        ("speed", f"{report.bytes_per_second / 1e9:.1f} GB/s"),
    ]
    print_table(f"{report.file}: whole", ("", ">"), rows)


def print_calibration(report: CalibrateReport) -> None:
    """Print what a calibration measured."""
    rows = [
        ("text", report.text),
        ("tokens", str(report.tokens)),
        ("matrices", str(report.matrices)),
        ("time", f"{report.seconds:.1f} s"),
        ("peak memory", format_bytes(report.peak_memory_bytes)),
    ]
    print_table(f"{report.source} -> {report.output}", ("", ">"), rows)


def print_export(report: ExportReport) -> None:
    """Print what an export wrote."""
    print_table(
        f"{report.source} -> {report.output}",
        ("file", ">size"),
        [(name, format_bytes(size)) for name, size in report.files.items()],
    )
    rows = [
        ("weights", str(report.weights)),
        ("source", format_bytes(report.source_bytes)),
        ("output", format_bytes(report.output_bytes)),
        ("time", f"{report.seconds:.1f} s"),
        ("peak memory", format_bytes(report.peak_memory_bytes)),
    ]
    print_table(f"format {report.to}", ("", ">"), rows)
    for warning in report.warnings:
        note(f"warning: {warning}")


def print_context_note(model: LoadedModel, answer: Generation) -> None:
    """Say so when an answer ended because the context was full."""
    if answer.finish_reason == "context":
        size = model.model.context
        note(f"note: the context of {size} tokens is full, the answer ends here; --ctx-size makes room")


def print_compilation_note() -> None:
    """Say why the first run on a machine takes longer."""
    note("compiling the kernels for this processor; this happens once and takes about half a minute")


def print_timings(timings: Timings) -> None:
    """Print a generation's speed, in one line like llama.cpp's."""
    note(
        f"load {timings.load_seconds:.2f} s"
        f" | prompt {timings.prompt_tokens} tokens, {timings.prompt_tokens_per_second:.1f} tokens/s"
        f" | decode {timings.decode_tokens} tokens, {timings.decode_tokens_per_second:.1f} tokens/s"
    )


def print_verification(report: VerifyReport) -> None:
    """Print both answers of a verification."""
    print_table(
        f"Runner: {report.file} against transformers on its dequantized weights, {report.tokens} tokens",
        ("", ">"),
        [
            ("largest logit difference, relative", f"{report.max_rel_logit_diff:.1e}"),
            ("  with 16-bit activations, as run decodes", f"{report.max_rel_logit_diff_int16:.1e}"),
            ("KL divergence of 8-bit activations, as run reads prompts", f"{report.kl_int8:.1e}"),
        ],
    )
    print_table(
        f"Quantization: {report.file} against {report.source}, {report.tokens} tokens",
        ("", ">"),
        [
            ("KL divergence, mean", f"{report.kl_mean:.4f}"),
            ("KL divergence, 99th percentile", f"{report.kl_p99:.4f}"),
            ("same top token", f"{report.top1_agreement:.1%}"),
            ("perplexity", f"{report.perplexity:.3f}"),
            ("perplexity of the source", f"{report.perplexity_reference:.3f}"),
        ],
    )
    if report.layers is not None:
        print_table(
            "Hidden states behind each block, error relative to the original",
            (">block", ">of this block", ">of all so far"),
            [(str(layer.block), f"{layer.own:.4f}", f"{layer.accumulated:.4f}") for layer in report.layers],
        )


def print_description(file: FileDescription) -> None:
    """Print what is in a file."""
    from tritgguf.inspect_file import abbreviate

    print_table("metadata", ("key", "value"), [(key, abbreviate(value)) for key, value in file.metadata.items()])
    rows = []
    for tensor in file.tensors:
        book = tensor.codebook
        shape = " x ".join(map(str, tensor.shape))
        scales = "" if book is None else f"{min(book):.3g} .. {max(book):.3g}"
        rows.append((tensor.name, tensor.type, shape, f"{tensor.bytes}", scales))
    print_table("tensors", ("name", "type", ">shape", ">bytes", "codebook"), rows)
    print_table(
        "types",
        ("type", ">tensors", ">weights", ">size", ">bits per weight"),
        [
            (
                kind.type,
                f"{kind.tensors}",
                f"{kind.weights}",
                format_bytes(kind.bytes),
                f"{kind.bits_per_weight:.3f}",
            )
            for kind in file.types
        ],
    )
    summary = [
        ("file", str(file.path)),
        ("name", file.name),
        ("architecture", file.architecture),
        ("size", format_bytes(file.file_bytes)),
        ("weights", str(file.weights)),
    ]
    for label, bits in (
        ("bits per weight, quantized matrices", file.bits_per_weight_quantized),
        ("bits per weight, file", file.bits_per_weight_file),
    ):
        if bits is not None:
            summary.append((label, f"{bits:.3f}"))
    print_table("summary", ("", ""), summary)
