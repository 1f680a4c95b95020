"""`tritgguf bench`: measure speed."""

from __future__ import annotations

from typing import Annotated

import typer

from tritgguf.cli import terminal
from tritgguf.cli.model_file import local_file
from tritgguf.cli.options import (
    CacheType,
    InstructionSet,
    Json,
    KeyType,
    PrefillBits,
    Threads,
    TritFile,
    ValueType,
    one_cache_type,
    option,
)


def bench_command(
    file: TritFile,
    prompt_tokens: Annotated[int, option("--n-prompt", "-p", min=0, help="Tokens of the prompt; 0: no prefill.")] = 512,
    generated_tokens: Annotated[int, option("--n-gen", "-n", min=0, help="Tokens to decode; 0: no decode.")] = 128,
    depth: Annotated[int, option("--n-depth", "-d", min=0, help="Tokens in the cache before each test.")] = 0,
    threads: Threads = None,
    repetitions: Annotated[int, option("--repetitions", "-r", min=1, help="How often each test is run.")] = 5,
    prefill_bits: PrefillBits = 8,
    cache_type: CacheType = None,
    key_type: KeyType = None,
    value_type: ValueType = None,
    isa: InstructionSet = None,
    no_kernels: Annotated[bool, typer.Option("--no-kernels", help="Leave out the time by kernel.")] = False,
    as_json: Json = False,
) -> None:
    """Measure prefill and decode, the memory's read bandwidth, and which kernels the time goes to.

    Example: tritgguf bench d3.gguf -p 512 -n 128 -t 2
    """
    from tritgguf.diagnostics.bench import bench
    from tritgguf.runtime.kv_pool import DEFAULT_CACHE_TYPE

    cache_type = one_cache_type(cache_type, key_type, value_type)
    report = bench(
        local_file(file),
        prompt_tokens=prompt_tokens,
        generated_tokens=generated_tokens,
        depth=depth,
        threads=threads,
        repetitions=repetitions,
        prefill_bits=prefill_bits,
        cache_type=cache_type or DEFAULT_CACHE_TYPE,
        isa=isa,
        by_kernel=not no_kernels,
        on_compilation=terminal.print_compilation_note,
    )
    if as_json:
        terminal.print_json(report.as_dict())
    else:
        for table in report.tables():
            terminal.print_table(*table)
