"""The command line: `tritgguf convert`, `calibrate`, `export`, `run` and the others. Options carry llama.cpp's names.

Each command parses, calls the function of the same name and prints. What a command needs is imported inside
it, because `run` has to show its first word within a second of being typed.
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tritgguf import __version__, console
from tritgguf.cli_convert import calibrate_command, convert_command, export_command
from tritgguf.cli_options import CacheType, InstructionSet, Json, PrefillBits, Threads, TritFile, option
from tritgguf.errors import TritGgufError

if TYPE_CHECKING:
    from types import FrameType

    from tritgguf.check import CheckReport
    from tritgguf.generate import LoadedModel
    from tritgguf.sampling import SamplingOptions

app = typer.Typer(
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _unwind_when_terminated() -> None:
    """Let SIGTERM end a command as Ctrl-C does: what can be continued stays, and nothing is half written."""

    def end(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, end)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 after an error, 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a model's text may not fit the terminal's encoding
    usage_error: type[Exception] = typer.BadParameter.__bases__[0]  # typer exports no name for it
    try:
        _unwind_when_terminated()
        command = typer.main.get_command(app)
        code = command.main(args=arguments, prog_name="tritgguf", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except TritGgufError as error:
        console.error(str(error))
    except usage_error as error:
        console.error(f"{error.format_message()} (see --help)")  # type: ignore[attr-defined]
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        # The reader has left, as `head` does. Python flushes stdout once more: let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        reason = error.strerror or str(error)
        console.error(f"{error.filename}: {reason}" if error.filename else reason)
    except MemoryError:
        console.error("not enough memory; close other programs or give a smaller --ctx-size")
    return 1


def _force_instruction_set(name: str | None) -> None:
    """Let the kernels use the instruction set of this name; None leaves the choice to them."""
    from cpu_kernels import instruction_set

    try:
        instruction_set.force(name)
    except ValueError as error:
        raise TritGgufError(str(error)) from error


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"tritgguf {__version__}")
        raise typer.Exit


for _name, _command in (("convert", convert_command), ("calibrate", calibrate_command), ("export", export_command)):
    app.command(_name)(_command)


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and leave.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Balanced-ternary language models in GGUF files: convert them, run them on the CPU, prove them right."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command("run")
def run_command(
    file: TritFile,
    prompt: Annotated[str | None, option("--prompt", "-p", metavar="TEXT", help="What to answer.")] = None,
    prompt_file: Annotated[Path | None, option("--file", "-f", metavar="FILE", help="File with the prompt.")] = None,
    system: Annotated[str | None, option("--system-prompt", "-sys", metavar="TEXT", help="The system message.")] = None,
    predict: Annotated[
        int, option("--predict", "--n-predict", "-n", help="Most tokens to generate; -1: no limit.")
    ] = -1,
    context: Annotated[
        int, option("--ctx-size", "-c", min=0, help="Tokens of context; 0: what the model was trained for.")
    ] = 0,
    threads: Threads = None,
    temperature: Annotated[float, option("--temp", help="Temperature; 0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, option("--top-k", help="Keep the k likeliest tokens; 0: all.")] = 40,
    top_p: Annotated[float, option("--top-p", help="Keep the likeliest up to this probability.")] = 0.95,
    min_p: Annotated[float, option("--min-p", help="Least probability, relative to the likeliest.")] = 0.05,
    repeat_penalty: Annotated[float, option("--repeat-penalty", help="Penalty for recent tokens; 1: none.")] = 1.0,
    repeat_last_n: Annotated[int, option("--repeat-last-n", help="How many tokens are recent.")] = 64,
    seed: Annotated[int, option("--seed", "-s", help="Seed of the draw; -1: a new one each time.")] = -1,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without template.")] = False,
    prefill_bits: PrefillBits = 8,
    exact: Annotated[bool, typer.Option("--exact", help="All activations with 31 bits; far slower.")] = False,
    check_first: Annotated[bool, typer.Option("--check", help="Check the whole file first, as `check` does.")] = False,
    cache_type: CacheType = None,
    isa: InstructionSet = None,
    as_json: Json = False,
) -> None:
    """Answer a prompt, or chat when there is none.

    Without -p and -f the prompt is read from a pipe, or typed: then Ctrl-C stops an answer and Ctrl-D leaves.

    Example: tritgguf run d3.gguf -p "Name three primary colors."
    """
    from tritgguf.generate import load
    from tritgguf.sampling import SamplingOptions

    sampling = SamplingOptions(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repeat_penalty=repeat_penalty,
        repeat_last_n=repeat_last_n,
        seed=seed,
    )
    text = _prompt(prompt, prompt_file)
    if text is None and (raw or as_json):
        raise TritGgufError(f"{'--raw' if raw else '--json'} needs a prompt; give one with -p or -f")
    if check_first:
        _check(file, None)
    _force_instruction_set(isa)
    gc.disable()  # loading makes a million objects and no garbage; looking for some takes 50 ms
    try:
        announce = console.print_compilation_note
        model = load(
            file,
            context=context or None,
            threads=threads,
            prefill_bits=prefill_bits,
            exact=exact,
            cache_type=cache_type,
            on_compilation=announce,
        )
    finally:
        gc.enable()
    if text is None:
        _chat(model, system, sampling, predict)
    else:
        _answer(model, text, system, sampling, predict, raw=raw, as_json=as_json)


def _answer(
    model: LoadedModel,
    text: str,
    system: str | None,
    sampling: SamplingOptions,
    max_tokens: int,
    *,
    raw: bool,
    as_json: bool,
) -> None:
    """Answer one prompt."""
    from tritgguf.generate import TextStream, prompt_tokens
    from tritgguf.sampling import Sampler

    tokens = prompt_tokens(model, text, system=system, raw=raw)
    stream = TextStream(model, tokens, Sampler(sampling), max_tokens=max_tokens, continues_prompt=raw)
    if as_json:
        answer = stream.finish()
        console.print_json({"model": model.path, **vars(answer), "timings": answer.timings.as_dict()})
    else:
        try:
            answer = stream.finish(console.write_answer)
        finally:
            print(flush=True)
    console.print_context_note(model, answer)
    console.print_timings(answer.timings)


def _prompt(prompt: str | None, file: Path | None) -> str | None:
    """Return the prompt that was given, or None when somebody sits there to type one."""
    if prompt is not None and file is not None:
        raise TritGgufError("give the prompt with either -p or -f, not with both")
    if prompt is not None:
        return prompt
    if file is not None:
        data = file.read_bytes()
    elif sys.stdin.isatty():
        return None
    else:
        data = sys.stdin.buffer.read()
        if not data:
            raise TritGgufError("there is no prompt on standard input; give one with -p or -f")
    return data.decode("utf-8", errors="replace").removesuffix("\n")


def _chat(model: LoadedModel, system: str | None, sampling: SamplingOptions, max_tokens: int) -> None:
    """Talk until Ctrl-D."""
    from tritgguf.generate import Chat, Timings

    with contextlib.suppress(ImportError):  # not on Windows; with it, input() edits lines and recalls them
        import readline  # noqa: F401
    chat = Chat(model, system=system, sampling=sampling, max_tokens=max_tokens)
    timings: list[Timings] = []
    console.note("Ctrl-C stops an answer, Ctrl-D leaves, /clear starts a new chat.")
    while (text := _read_line()) is not None:
        if text.strip() == "/clear":
            chat.clear()
        elif text.strip():
            try:
                stream = chat.ask(text)
            except TritGgufError as error:
                # No room for the message, or the template refuses it: the chat can go on.
                console.error(str(error))
                continue
            with contextlib.suppress(KeyboardInterrupt):
                stream.finish(console.write_answer)
            print(flush=True)
            answer = stream.result()
            chat.keep(answer)
            timings.append(answer.timings)
            console.print_context_note(model, answer)
    if timings:
        console.print_timings(Timings.total(timings))


def _read_line() -> str | None:
    """Return what is typed, or None at its end."""
    while True:
        try:
            if sys.stdout.isatty():
                return input("> ")
            print("> ", end="", file=sys.stderr, flush=True)
            return input()
        except KeyboardInterrupt:
            console.note("")
        except EOFError:
            console.note("")
            return None


@app.command("bench")
def bench_command(
    file: TritFile,
    prompt_tokens: Annotated[int, option("--n-prompt", "-p", min=0, help="Tokens of the prompt; 0: no prefill.")] = 512,
    generated_tokens: Annotated[int, option("--n-gen", "-n", min=0, help="Tokens to decode; 0: no decode.")] = 128,
    depth: Annotated[int, option("--n-depth", "-d", min=0, help="Tokens in the cache before each test.")] = 0,
    threads: Threads = None,
    repetitions: Annotated[int, option("--repetitions", "-r", min=1, help="How often each test is run.")] = 5,
    prefill_bits: PrefillBits = 8,
    cache_type: CacheType = None,
    isa: InstructionSet = None,
    no_kernels: Annotated[bool, typer.Option("--no-kernels", help="Leave out the time by kernel.")] = False,
    as_json: Json = False,
) -> None:
    """Measure prefill and decode, the memory's read bandwidth, and which kernels the time goes to.

    Example: tritgguf bench d3.gguf -p 512 -n 128 -t 2
    """
    from tritgguf.bench import bench
    from tritgguf.cache import DEFAULT_CACHE_TYPE

    _force_instruction_set(isa)
    report = bench(
        file,
        prompt_tokens=prompt_tokens,
        generated_tokens=generated_tokens,
        depth=depth,
        threads=threads,
        repetitions=repetitions,
        prefill_bits=prefill_bits,
        cache_type=cache_type or DEFAULT_CACHE_TYPE,
        by_kernel=not no_kernels,
        on_compilation=console.print_compilation_note,
    )
    if as_json:
        console.print_json(report.as_dict())
    else:
        for table in report.tables():
            console.print_table(*table)


@app.command("verify")
def verify_command(
    source: Annotated[str, typer.Argument(help="What the file was converted from.", metavar="SOURCE")],
    file: TritFile,
    text_file: Annotated[
        Path | None,
        option("--text", metavar="FILE", help="A text to measure on.", show_default="one that comes along"),
    ] = None,
    tokens: Annotated[int, option("--tokens", min=2, help="How many tokens of the text to take.")] = 512,
    layers: Annotated[bool, typer.Option("--layers", help="Show which blocks the error comes from, too.")] = False,
    threads: Threads = None,
    isa: InstructionSet = None,
    as_json: Json = False,
) -> None:
    """Compare a trit file with its source: whether the runner is right, what quantization cost.

    Needs torch and transformers: pip install "tritgguf[verify]".

    Example: tritgguf verify models/SmolLM2-135M-Instruct d3.gguf
    """
    from tritgguf.verify import verify

    _force_instruction_set(isa)
    text = None if text_file is None else text_file.read_bytes().decode("utf-8", errors="replace")
    with console.progress(in_bytes=False) as report:
        result = verify(source, file, text=text, tokens=tokens, layers=layers, threads=threads, progress=report)
    if as_json:
        console.print_json(result.as_dict())
    else:
        console.print_verification(result)


@app.command("inspect")
def inspect_command(
    file: Annotated[Path, typer.Argument(help="Any GGUF file.", metavar="FILE.gguf")], as_json: Json = False
) -> None:
    """Show what is in a GGUF file: keys, tensors, types, codebooks, bits per weight.

    Example: tritgguf inspect d3.gguf
    """
    from tritgguf.inspect_file import describe

    description = describe(file)
    if as_json:
        console.print_json(description.as_dict())
    else:
        console.print_description(description)


@app.command("check")
def check_command(file: TritFile, threads: Threads = None, as_json: Json = False) -> None:
    """Check that a file is whole: its structure, every codebook and word, and the checksum of every tensor.

    Example: tritgguf check d3.gguf
    """
    report = _check(file, threads)
    if as_json:
        console.print_json(vars(report))
    else:
        console.print_check(report)


def _check(file: Path, threads: int | None) -> CheckReport:
    from tritgguf.check import check

    with console.progress(in_bytes=True) as report:
        return check(file, threads=threads, progress=lambda done, total: report("checking", done, total))


@app.command("doctor")
def doctor_command(as_json: Json = False) -> None:
    """Show what this machine gives the kernels, what they make of it, and what would make them faster.

    Example: tritgguf doctor
    """
    from tritgguf.doctor import doctor

    diagnosis = doctor(on_compilation=console.print_compilation_note)
    if as_json:
        console.print_json(diagnosis.as_dict())
    else:
        for table in diagnosis.tables():
            console.print_table(*table)
