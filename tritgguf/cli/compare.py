"""`tritgguf compare`: size, quality and speed of several trit files in one table."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from tritgguf.cli import terminal
from tritgguf.cli.model_file import local_file
from tritgguf.cli.options import InstructionSet, Json, Threads, option
from tritgguf.cli.quality_table import (
    Plot,
    TextToEvaluate,
    TokensToEvaluate,
    TritFiles,
    print_qualities,
    with_speeds,
    write_plot,
)


def compare_command(
    files: TritFiles,
    source: Annotated[
        str | None,
        option("--source", metavar="SOURCE", help="What the files are compared with.", show_default="the first file"),
    ] = None,
    text_file: TextToEvaluate = None,
    tokens: TokensToEvaluate = 512,
    no_speed: Annotated[bool, typer.Option("--no-speed", help="Leave out the tokens per second.")] = False,
    plot: Plot = None,
    threads: Threads = None,
    isa: InstructionSet = None,
    as_json: Json = False,
) -> None:
    """Compare trit files: size, divergence, perplexity and speed, in one table.

    With --source, the files are compared with the model they were converted from; its logits are kept on disk for the
    next time (TRITGGUF_LOGITS: at most so much, such as 4GB; 0: none), and computing them needs torch and transformers.

    Example: tritgguf compare d3.gguf d2.gguf --source models/SmolLM2-135M-Instruct
    """
    from tritgguf.evaluation.compare import compare_files
    from tritgguf.evaluation.logits_store import user_store
    from tritgguf.formats.durable_output import check_output
    from tritgguf.formats.text_file import read_text

    text = None if text_file is None else read_text(text_file)
    store = user_store()
    files = [local_file(file) for file in files]
    if plot is not None:
        check_output(plot, True, files)
    with terminal.progress(in_bytes=False) as report:
        result = compare_files(
            files, source=source, text=text, tokens=tokens, threads=threads, isa=isa, store=store, progress=report
        )
    if not no_speed:
        result = dataclasses.replace(result, files=with_speeds(result.files, threads, isa))
    title = f"Against {result.reference} with a perplexity of {result.perplexity_reference:.3f}, {result.tokens} tokens"
    if plot is not None:
        write_plot(plot, "Divergence and size", title, result.files)
    if as_json:
        terminal.print_json(result.as_dict())
    else:
        print_qualities(title, result.files)
