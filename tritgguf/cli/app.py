"""The command line: `tritgguf convert`, `calibrate`, `export`, `run` and others. Options have llama.cpp's names.

Each command parses options, calls the function of the same name and prints the result. Commands import their
dependencies inside the function to keep startup fast: `run` must print its first word within a second.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from tritgguf.cli import terminal
from tritgguf.cli.bench import bench_command
from tritgguf.cli.calibrate import calibrate_command
from tritgguf.cli.check import check_command
from tritgguf.cli.convert import convert_command
from tritgguf.cli.doctor import doctor_command
from tritgguf.cli.export import export_command
from tritgguf.cli.inspect import inspect_command
from tritgguf.cli.run import run_command
from tritgguf.cli.serve import serve_command
from tritgguf.cli.verify import verify_command
from tritgguf.errors import TritGgufError
from tritgguf.version import __version__

if TYPE_CHECKING:
    from types import FrameType


app = typer.Typer(
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _unwind_when_terminated() -> None:
    """Make SIGTERM raise SystemExit, so that a command cleans up and stays resumable as after Ctrl-C."""

    def end(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, end)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 after an error, 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # the terminal's encoding may lack characters of a model's text
    usage_error: type[Exception] = typer.BadParameter.__bases__[0]  # typer exports no name for it
    try:
        _unwind_when_terminated()
        command = typer.main.get_command(app)
        code = command.main(args=arguments, prog_name="tritgguf", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except TritGgufError as error:
        terminal.error(str(error))
    except usage_error as error:
        terminal.error(f"{error.format_message()} (see --help)")  # type: ignore[attr-defined]
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        # The reader closed the pipe, as `head` does. Python flushes stdout again at exit: redirect it to /dev/null.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        reason = error.strerror or str(error)
        terminal.error(f"{error.filename}: {reason}" if error.filename else reason)
    except MemoryError:
        terminal.error("not enough memory; close other programs or give a smaller --ctx-size")
    return 1


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"tritgguf {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Balanced-ternary language models in GGUF files: convert them, run them on the CPU, prove them right."""
    if context.invoked_subcommand is None:
        print(context.get_help())


for _name, _command in (
    ("convert", convert_command),
    ("calibrate", calibrate_command),
    ("export", export_command),
    ("run", run_command),
    ("serve", serve_command),
    ("bench", bench_command),
    ("verify", verify_command),
    ("inspect", inspect_command),
    ("check", check_command),
    ("doctor", doctor_command),
):
    app.command(_name)(_command)
