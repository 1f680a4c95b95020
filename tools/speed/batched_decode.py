"""How fast does the engine decode several sequences at once? Tokens per second in total, and over one sequence.

    python -m tools.speed.batched_decode build/qwen-d2.gguf --sequences 1,4,8,16 --tokens 24 --turns 3

Each turn measures every number of sequences once, so that a machine whose speed drifts treats them alike; medians are
printed. Prompts differ in length; only passes in which all sequences generate count.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from tools import tool_command
from tritgguf.cli import terminal
from tritgguf.errors import TritGgufError
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.generation.engine import Engine
from tritgguf.generation.request import Request
from tritgguf.generation.sampling import Sampler, SamplingOptions
from tritgguf.runtime.model import Model

_SHORTEST_PROMPT = 16  # tokens
_GREEDY = SamplingOptions(temperature=0)


def tokens_per_second(model: Model, sequences: int, tokens: int) -> float:
    """Return the tokens per second of so many sequences together, over `tokens` passes."""
    engine = Engine(model, context=_SHORTEST_PROMPT + sequences + tokens + 2, parallel=sequences)
    numbers = np.random.default_rng(0)
    requests = []
    for number in range(sequences):
        prompt = numbers.integers(0, model.config.vocab_size, _SHORTEST_PROMPT + number).tolist()
        requests.append(engine.submit(Request(prompt, Sampler(_GREEDY), max_tokens=tokens + 2, cache_prompt=False)))
    while any(request.is_prompt for request in requests):
        engine.step()
    if any(request.ended for request in requests):
        raise TritGgufError(f"the first of {len(requests)} sequences ends while prompts are read; use more --tokens")
    before = sum(request.decoded_tokens for request in requests)
    start = time.perf_counter()
    while not any(request.ended for request in requests):
        engine.step()
    seconds = time.perf_counter() - start
    return (sum(request.decoded_tokens for request in requests) - before) / seconds


def main(
    file: Annotated[Path, typer.Argument(help="A trit file.")],
    sequences: Annotated[str, typer.Option(help="Numbers of sequences.")] = "1,4,8,16",
    tokens: Annotated[int, typer.Option(help="Passes that count.", min=1)] = 24,
    turns: Annotated[int, typer.Option(help="How often each is measured.", min=1)] = 3,
    threads: Annotated[int | None, typer.Option("--threads", "-t", min=1)] = None,
    decode_bits: Annotated[int, typer.Option(help="Bits of generated tokens' activations: 16 or 8.")] = 16,
    isa: Annotated[str | None, typer.Option(help="The instruction set.")] = None,
    print_json: Annotated[bool, typer.Option("--json", help="Print the medians as one JSON object instead.")] = False,
) -> None:
    """Measure decode of several sequences at once."""
    model = Model(GgufFile(file), threads=threads, decode_bits=decode_bits, isa=isa)
    model.compile(terminal.print_compilation_note)
    counts = [int(count) for count in sequences.split(",")]
    rates: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(turns):
        for count in counts:
            rates[count].append(tokens_per_second(model, count, tokens))
    medians = {count: statistics.median(values) for count, values in rates.items()}
    if print_json:
        print(json.dumps(medians))
        return
    rows = [
        (str(count), f"{medians[count]:.1f}", f"{medians[count] / medians[counts[0]]:.2f}", f"{min(rates[count]):.1f}")
        for count in counts
    ]
    terminal.print_table(
        f"{file.name}, {decode_bits}-bit activations", (">sequences", ">tokens/s", ">over the first", ">slowest"), rows
    )


if __name__ == "__main__":
    tool_command.run(main)
