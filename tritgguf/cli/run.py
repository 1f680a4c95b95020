"""`tritgguf run`: answer a prompt, or chat."""

from __future__ import annotations

import contextlib
import gc
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tritgguf.cli import terminal
from tritgguf.cli.check import check_file
from tritgguf.cli.options import (
    CacheType,
    DraftMax,
    InstructionSet,
    Json,
    Lookup,
    PrefillBits,
    Threads,
    TritFile,
    option,
)
from tritgguf.cli.terminal import note
from tritgguf.errors import TritGgufError

if TYPE_CHECKING:
    from tritgguf.generation.loaded_model import LoadedModel
    from tritgguf.generation.result import Generation, Timings
    from tritgguf.generation.sampling import SamplingOptions


def print_context_note(model: LoadedModel, answer: Generation) -> None:
    """Print a note if an answer ended because the context was full."""
    if answer.finish_reason == "context":
        size = model.context
        note(f"note: the context of {size} tokens is full, the answer ends here; --ctx-size makes room")


def print_timings(timings: Timings) -> None:
    """Print a generation's speed, in one line like llama.cpp's."""
    drafts = f" | drafts {timings.drafted_tokens} tokens, {timings.acceptance_rate:.0%} accepted"
    note(
        f"load {timings.load_seconds:.2f} s"
        f" | prompt {timings.prompt_tokens} tokens, {timings.prompt_tokens_per_second:.1f} tokens/s"
        f" | decode {timings.decode_tokens} tokens, {timings.decode_tokens_per_second:.1f} tokens/s"
        f"{drafts if timings.drafted_tokens else ''}"
    )


Prompt = Annotated[str | None, option("--prompt", "-p", metavar="TEXT", help="What to answer.")]
PromptFile = Annotated[Path | None, option("--file", "-f", metavar="FILE", help="File with the prompt.")]
System = Annotated[str | None, option("--system-prompt", "-sys", metavar="TEXT", help="The system message.")]
Predict = Annotated[
    int, option("--predict", "--n-predict", "-n", help="Maximum number of tokens to generate; -1: no limit.")
]
Context = Annotated[
    int, option("--ctx-size", "-c", min=0, help="Context size in tokens; 0: the model's training context.")
]
Temperature = Annotated[float, option("--temp", help="Temperature; 0: greedy decoding.")]
TopK = Annotated[int, option("--top-k", help="Keep the k most likely tokens; 0: all.")]
TopP = Annotated[float, option("--top-p", help="Keep the most likely tokens up to this total probability.")]
MinP = Annotated[float, option("--min-p", help="Minimum probability relative to the most likely token.")]
RepeatPenalty = Annotated[float, option("--repeat-penalty", help="Penalty for recent tokens; 1: none.")]
RepeatLastN = Annotated[int, option("--repeat-last-n", help="Number of recent tokens to penalize.")]
PresencePenalty = Annotated[
    float, option("--presence-penalty", help="Penalty for tokens that the answer has already; 0: none.")
]
FrequencyPenalty = Annotated[
    float, option("--frequency-penalty", help="Penalty for each time that the answer has a token; 0: none.")
]
Seed = Annotated[int, option("--seed", "-s", help="Seed of sampling; -1: random.")]
Raw = Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without a chat template.")]
Exact = Annotated[bool, typer.Option("--exact", help="Use 31-bit activations; far slower.")]
CheckFirst = Annotated[bool, typer.Option("--check", help="Check the whole file first, as `check` does.")]


def run_command(
    file: TritFile,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    system: System = None,
    predict: Predict = -1,
    context: Context = 0,
    threads: Threads = None,
    temperature: Temperature = 0.8,
    top_k: TopK = 40,
    top_p: TopP = 0.95,
    min_p: MinP = 0.05,
    repeat_penalty: RepeatPenalty = 1.0,
    repeat_last_n: RepeatLastN = 64,
    presence_penalty: PresencePenalty = 0.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    seed: Seed = -1,
    raw: Raw = False,
    prefill_bits: PrefillBits = 8,
    exact: Exact = False,
    check_first: CheckFirst = False,
    cache_type: CacheType = None,
    lookup: Lookup = False,
    draft_max: DraftMax = 16,
    isa: InstructionSet = None,
    as_json: Json = False,
) -> None:
    """Answer a prompt, or chat when there is none.

    Without -p and -f the prompt is read from a pipe, or typed: then Ctrl-C stops an answer and Ctrl-D quits.

    Example: tritgguf run d3.gguf -p "Name three primary colors."
    """
    from tritgguf.generation.sampling import SamplingOptions

    penalties = (presence_penalty, frequency_penalty)
    sampling = SamplingOptions(temperature, top_k, top_p, min_p, repeat_penalty, repeat_last_n, seed, *penalties)
    text = _prompt(prompt, prompt_file)
    if text is None and (raw or as_json):
        raise TritGgufError(f"{'--raw' if raw else '--json'} needs a prompt; give one with -p or -f")
    if check_first:
        check_file(file, None)
    settings = {"threads": threads, "prefill_bits": prefill_bits, "exact": exact, "cache_type": cache_type, "isa": isa}
    model = _load(file, context=context or None, lookup=lookup, draft_max=draft_max, **settings)
    if text is None:
        _chat(model, system, sampling, predict)
    else:
        _answer(model, text, system, sampling, predict, raw=raw, as_json=as_json)


def _load(file: Path, **settings: Any) -> LoadedModel:
    """Load the model for one sequence at a time."""
    from tritgguf.generation.loaded_model import load

    gc.disable()  # loading creates a million objects and no garbage; collection would take 50 ms
    try:
        return load(file, parallel=1, on_compilation=terminal.print_compilation_note, **settings)
    finally:
        gc.enable()


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
    from tritgguf.generation.prompt import prompt_tokens
    from tritgguf.generation.sampling import Sampler
    from tritgguf.generation.text_stream import TextStream

    tokens = prompt_tokens(model, text, system=system, raw=raw)
    stream = TextStream(model, tokens, Sampler(sampling), max_tokens=max_tokens, continues_prompt=raw)
    if as_json:
        answer = stream.finish()
        terminal.print_json({"model": model.path, **vars(answer), "timings": answer.timings.as_dict()})
    else:
        try:
            answer = stream.finish(terminal.write_answer)
        finally:
            print(flush=True)
    print_context_note(model, answer)
    print_timings(answer.timings)


def _prompt(prompt: str | None, file: Path | None) -> str | None:
    """Return the prompt from the options or a pipe; None if stdin is a terminal."""
    from tritgguf.formats.text_file import read_text

    if prompt is not None and file is not None:
        raise TritGgufError("give the prompt with either -p or -f, not with both")
    if prompt is not None:
        return prompt
    if file is not None:
        text = read_text(file)
    elif sys.stdin.isatty():
        return None
    else:
        text = read_text("-")
        if not text:
            raise TritGgufError("there is no prompt on standard input; give one with -p or -f")
    return text.removesuffix("\n")


def _chat(model: LoadedModel, system: str | None, sampling: SamplingOptions, max_tokens: int) -> None:
    """Chat until Ctrl-D."""
    from tritgguf.generation.chat import Chat
    from tritgguf.generation.result import Timings

    with contextlib.suppress(ImportError):  # gives input() line editing and history; Windows lacks it
        import readline  # noqa: F401
    chat = Chat(model, system=system, sampling=sampling, max_tokens=max_tokens)
    timings: list[Timings] = []
    terminal.note("Ctrl-C stops an answer, Ctrl-D leaves, /clear starts a new chat.")
    while (text := _read_line()) is not None:
        if text.strip() == "/clear":
            chat.clear()
        elif text.strip():
            try:
                stream = chat.ask(text)
            except TritGgufError as error:
                # No room for the message, or the template refuses it: the chat can go on.
                terminal.error(str(error))
                continue
            with contextlib.suppress(KeyboardInterrupt):
                stream.finish(terminal.write_answer)
            stream.close()
            print(flush=True)
            answer = stream.result()
            timings.append(answer.timings)
            print_context_note(model, answer)
    if timings:
        print_timings(Timings.total(timings))


def _read_line() -> str | None:
    """Return a typed line, or None at end of input."""
    while True:
        try:
            if sys.stdout.isatty():
                return input("> ")
            print("> ", end="", file=sys.stderr, flush=True)
            return input()
        except KeyboardInterrupt:
            terminal.note("")
        except EOFError:
            terminal.note("")
            return None
