"""The command line: `tritgguf convert`, `calibrate`, `export`, `run` and others. Options have llama.cpp's names.

Each command parses options, calls the function of the same name and prints the result. Commands import their
dependencies inside the function to keep startup fast: `run` must print its first word within a second.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from tritgguf.cli import terminal
from tritgguf.cli.bench import bench_command
from tritgguf.cli.calibrate import calibrate_command
from tritgguf.cli.check import check_command
from tritgguf.cli.compare import compare_command
from tritgguf.cli.convert import ConvertCommand, convert_command
from tritgguf.cli.doctor import doctor_command
from tritgguf.cli.evaluate import evaluate_command
from tritgguf.cli.export import export_command
from tritgguf.cli.inspect import inspect_command
from tritgguf.cli.list import list_command
from tritgguf.cli.options import UsageError
from tritgguf.cli.publish import PublishCommand, publish_command
from tritgguf.cli.pull import pull_command
from tritgguf.cli.rm import rm_command
from tritgguf.cli.run import run_command
from tritgguf.cli.serve import serve_command
from tritgguf.cli.verify import verify_command
from tritgguf.errors import TritGgufError
from tritgguf.runtime.compilation_display import show_with
from tritgguf.text_format import one_line
from tritgguf.version import __version__

if TYPE_CHECKING:
    from types import FrameType

_CLOSED_PIPE = 128 + 13  # as if SIGPIPE had ended the program, which is how other programs end

app = typer.Typer(
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _unwind_when_terminated() -> None:
    """Make SIGTERM and SIGHUP raise SystemExit, so that a command cleans up and stays resumable as after Ctrl-C."""

    def end(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, end)
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # not under nohup
            signal.signal(signal.SIGHUP, end)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code (docs/command_line.md).

    0; 1 after an error; 2 if the command line is wrong; 130 after Ctrl-C; 141 if the reader of the output has gone.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # the terminal's encoding may lack characters of a model's text
    try:
        _unwind_when_terminated()
        show_with(terminal.compilation_progress)
        command = typer.main.get_command(app)
        code = command.main(args=arguments, prog_name="tritgguf", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except SystemExit as end:
        if not isinstance(end.__context__, BrokenPipeError):
            raise
        return _CLOSED_PIPE  # typer has turned the error into an exit
    except BrokenPipeError:
        # The reader closed the pipe, as `head` does. Python flushes stdout again at exit: redirect it to /dev/null.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _CLOSED_PIPE
    except Exception as error:
        failure = _failure(error)
        if failure is None:
            raise
        terminal.error(failure.message)
        if "--json" in arguments:
            with contextlib.suppress(OSError):
                terminal.print_json({"error": {"type": failure.kind, "message": failure.message}})
        return failure.code


class _Failure(NamedTuple):
    """What a user is told of an exception."""

    message: str
    kind: str
    code: int


def _failure(error: Exception) -> _Failure | None:
    """Return what to tell of an exception; None for one that is a fault of the program."""
    usage_error: type[Exception] = typer.BadParameter.__bases__[0]  # typer exports no name for it
    kind = type(error).__name__
    if isinstance(error, UsageError):
        return _Failure(f"{error} (see --help)", kind, 2)
    if isinstance(error, usage_error):
        return _Failure(f"{error.format_message()} (see --help)", UsageError.__name__, 2)  # type: ignore[attr-defined]
    if isinstance(error, TritGgufError):
        return _Failure(str(error), kind, 1)
    if isinstance(error, OSError):
        reason = error.strerror or str(error)
        return _Failure(f"{error.filename}: {reason}" if error.filename else reason, kind, 1)
    if isinstance(error, MemoryError):
        return _Failure("not enough memory; close other programs or give a smaller --ctx-size", kind, 1)
    settings = [name for name in os.environ if name.startswith("NUMBA_") and name != "NUMBA_CACHE_DIR"]
    if settings and _comes_from_numba(error):
        return _Failure(f"Numba fails ({one_line(str(error))}); unset {', '.join(settings)}", kind, 1)
    return None


def _comes_from_numba(error: Exception) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return any("numba" in Path(frame.filename).parts for frame in frames)


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


_PARSERS = {"convert": ConvertCommand, "publish": PublishCommand}
for _name, _command in (
    ("convert", convert_command),
    ("calibrate", calibrate_command),
    ("export", export_command),
    ("run", run_command),
    ("serve", serve_command),
    ("bench", bench_command),
    ("verify", verify_command),
    ("compare", compare_command),
    ("evaluate", evaluate_command),
    ("inspect", inspect_command),
    ("check", check_command),
    ("doctor", doctor_command),
    ("publish", publish_command),
    ("pull", pull_command),
    ("list", list_command),
    ("rm", rm_command),
):
    app.command(_name, cls=_PARSERS.get(_name))(_command)
