"""How much faster is decode with speculation? Tokens per second with it, over those without.

    python -m tools.speed.speculative_decode qwen-d2.gguf --tokens 300
    python -m tools.speed.speculative_decode qwen-d3.gguf --model-draft qwen-d1.gguf --seed 1

Three tasks: repeat a file with one change, write a program, write prose. Both ways answer at the same time, a few
tokens in turns, so that a machine whose speed drifts treats them alike. They must give the same tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tools import tool_command
from tritgguf.cli import terminal
from tritgguf.generation.engine import Engine
from tritgguf.generation.loaded_model import load
from tritgguf.generation.prompt import prompt_tokens
from tritgguf.generation.request import Request, RunningRequest
from tritgguf.generation.sampling import Sampler, SamplingOptions

_TURN = 8  # tokens
_CONTEXT = 4096
_SOURCE = Path("tritgguf/generation/stop_strings.py")
_TASKS = {
    "edit": "Repeat this file with one change: rename the class StopStrings to StopTexts. Answer with the file alone."
    "\n\n```python\n{source}```",
    "program": "Write a Python class for a binary search tree with insert, delete, find and an in-order iterator.",
    "prose": "Tell me a story about a lighthouse keeper and a storm.",
}


def answer_in_turns(engines: list[Engine], requests: list[Request]) -> list[RunningRequest]:
    """Run each request in its engine until the first has ended."""
    running = [engine.submit(request) for engine, request in zip(engines, requests, strict=True)]
    while not any(request.ended for request in running):
        for engine, request in zip(engines, running, strict=True):
            end = request.decoded_tokens + _TURN
            while request.decoded_tokens < end and not request.ended:
                engine.step()
    for engine, request in zip(engines, running, strict=True):
        engine.cancel(request)
    return running


def main(
    file: Annotated[Path, typer.Argument(help="A trit file.")],
    draft: Annotated[Path | None, typer.Option("--model-draft", "-md", help="A draft model; none: lookup.")] = None,
    draft_max: Annotated[int, typer.Option(help="Most tokens of a draft.", min=1)] = 16,
    tokens: Annotated[int, typer.Option(help="Most tokens of an answer.", min=1)] = 300,
    seed: Annotated[int | None, typer.Option(help="Sample with this seed; none: greedy.")] = None,
    tasks: Annotated[str, typer.Option(help="Names of tasks.")] = ",".join(_TASKS),
    threads: Annotated[int | None, typer.Option("--threads", "-t", min=1)] = None,
) -> None:
    """Measure decode with and without speculation."""
    speculation = {"lookup": True} if draft is None else {"draft": draft}
    model = load(file, context=_CONTEXT, threads=threads, parallel=2, draft_max=draft_max, **speculation)
    options = SamplingOptions(temperature=0) if seed is None else SamplingOptions(seed=seed)
    rows = []
    for name in tasks.split(","):
        prompt = prompt_tokens(model, _TASKS[name].format(source=_SOURCE.read_text("utf-8")))
        engines = [Engine(model.engine.model, context=_CONTEXT, parallel=1), model.engine]
        request = [Request(prompt, Sampler(options), tokens, model.tokenizer.stop_tokens) for _ in engines]
        plain, ours = answer_in_turns(engines, request)
        common = min(len(plain.tokens), len(ours.tokens))
        if plain.tokens[:common] != ours.tokens[:common]:
            raise AssertionError(f"speculation changes the answer to {name}")
        rates = [request.decoded_tokens / request.decode_seconds for request in (plain, ours)]
        accepted = ours.accepted_tokens / max(1, ours.drafted_tokens)
        numbers = (f"{rates[0]:.1f}", f"{rates[1]:.1f}", f"{rates[1] / rates[0]:.2f}", f"{ours.decoded_tokens}")
        rows.append((name, *numbers, f"{ours.drafted_tokens}", f"{accepted:.0%}"))
    columns = ("task", ">tokens/s", ">with drafts", ">ratio", ">tokens", ">drafted", ">accepted")
    terminal.print_table(f"{file.name}, {'lookup' if draft is None else draft.name}", columns, rows)


if __name__ == "__main__":
    tool_command.run(main)
