"""`tritgguf run`: answer a prompt, or chat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tritgguf.cli import terminal
from tritgguf.cli.answer import AnswerWriter, print_context_note, print_timings
from tritgguf.cli.chat import chat_at_terminal
from tritgguf.cli.check import check_file
from tritgguf.cli.loading import load_model
from tritgguf.cli.model_file import local_file
from tritgguf.cli.options import (
    CacheType,
    DraftFile,
    DraftMax,
    InstructionSet,
    Json,
    KeyType,
    Lookup,
    PrefillBits,
    Threads,
    TritFile,
    UsageError,
    ValueType,
    check_predict,
    one_cache_type,
    option,
)
from tritgguf.cli.prompt_source import read_prompt
from tritgguf.errors import BadRequestError

if TYPE_CHECKING:
    from tritgguf.generation.loaded_model import LoadedModel
    from tritgguf.generation.sampling import SamplingOptions


Prompt = Annotated[str | None, option("--prompt", "-p", metavar="TEXT", help="What to answer.")]
PromptFile = Annotated[
    Path | None, option("--file", "-f", metavar="FILE", help="File with the prompt; -: standard input.")
]
System = Annotated[str | None, option("--system-prompt", "-sys", metavar="TEXT", help="The system message.")]
Predict = Annotated[
    int,
    option(
        "--predict",
        "--n-predict",
        "-n",
        help="Maximum number of tokens to generate; -1: no limit.",
        callback=check_predict,
    ),
]
Context = Annotated[
    int, option("--ctx-size", "-c", min=0, help="Context size in tokens; 0: the model's training context.")
]


def _temperature(value: float) -> float:
    """Return a temperature; less than 0 is greedy decoding too, as in llama.cpp."""
    return 0.0 if value < 0 else value


Temperature = Annotated[float, option("--temp", help="Temperature; 0 or less: greedy decoding.", callback=_temperature)]
TopK = Annotated[int, option("--top-k", help="Keep the k most likely tokens; 0 or -1: all.")]
TopP = Annotated[float, option("--top-p", help="Keep the most likely tokens up to this total probability.")]
MinP = Annotated[float, option("--min-p", help="Minimum probability relative to the most likely token.")]
RepeatPenalty = Annotated[float, option("--repeat-penalty", help="Penalty for recent tokens; 1: none.")]
RepeatLastN = Annotated[int, option("--repeat-last-n", help="Number of recent tokens to penalize; -1: all.")]
PresencePenalty = Annotated[
    float, option("--presence-penalty", help="Penalty for tokens that the answer has already; 0: none.")
]
FrequencyPenalty = Annotated[
    float, option("--frequency-penalty", help="Penalty for each time that the answer has a token; 0: none.")
]
Seed = Annotated[int, option("--seed", "-s", help="Seed of sampling; -1: random.")]
JsonSchema = Annotated[
    Path | None, option("--json-schema", metavar="FILE", help="File with a JSON schema that the answer follows.")
]
GrammarFile = Annotated[
    Path | None, option("--grammar", metavar="FILE", help="File with a grammar that it follows, Lark's or llama.cpp's.")
]
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
    json_schema: JsonSchema = None,
    grammar: GrammarFile = None,
    raw: Raw = False,
    prefill_bits: PrefillBits = 8,
    exact: Exact = False,
    check_first: CheckFirst = False,
    cache_type: CacheType = None,
    key_type: KeyType = None,
    value_type: ValueType = None,
    lookup: Lookup = False,
    draft: DraftFile = None,
    draft_max: DraftMax = 16,
    isa: InstructionSet = None,
    as_json: Json = False,
) -> None:
    """Answer a prompt, or chat when there is none.

    A file (-f) or a pipe follows the text of -p. Without any of them the prompt is typed: then /help shows what a chat
    can do, Ctrl-C stops an answer and Ctrl-D leaves.

    Example: tritgguf run d3.gguf -p "Name three primary colors."
    """
    from tritgguf.generation.prompt_check import check_prompt_fits
    from tritgguf.generation.sampling import SamplingOptions

    cache_type = one_cache_type(cache_type, key_type, value_type)
    penalties = (presence_penalty, frequency_penalty)
    sampling = SamplingOptions(temperature, top_k, top_p, min_p, repeat_penalty, repeat_last_n, seed, *penalties)
    text = read_prompt(prompt, prompt_file)
    if text is None and (raw or as_json):
        raise UsageError(f"{'--raw' if raw else '--json'} needs a prompt; give one with -p or -f")
    rules, file = _rules(json_schema, grammar), local_file(file)
    if text is not None:
        check_prompt_fits(file, text, system=system, raw=raw, context=context or None)
    if check_first:
        check_file(file, None)
    settings = {"threads": threads, "prefill_bits": prefill_bits, "exact": exact, "cache_type": cache_type, "isa": isa}
    guesses: dict[str, Any] = {"lookup": lookup, "draft": draft, "draft_max": draft_max}
    model = load_model(file, context=context or None, parallel=1, **settings, **guesses)
    if text is None:
        chat_at_terminal(model, system, sampling, predict, **rules)
    else:
        _answer(model, text, system, sampling, predict, rules, raw=raw, as_json=as_json)


def _answer(
    model: LoadedModel,
    text: str,
    system: str | None,
    sampling: SamplingOptions,
    max_tokens: int,
    rules: dict[str, Any],
    *,
    raw: bool,
    as_json: bool,
) -> None:
    """Answer one prompt."""
    from tritgguf.generation.grammar import compile_grammar
    from tritgguf.generation.prompt import prompt_tokens
    from tritgguf.generation.sampling import Sampler
    from tritgguf.generation.text_stream import TextStream

    tokens = prompt_tokens(model, text, system=system, raw=raw)
    grammar = compile_grammar(model, **rules)
    sampler = Sampler(sampling, constraint=None if grammar is None else grammar.constraint())
    stream = TextStream(model, tokens, sampler, max_tokens=max_tokens, continues_prompt=raw)
    if as_json:
        answer = stream.finish()
        terminal.print_json({"model": model.path, **vars(answer), "timings": answer.timings.as_dict()})
    else:
        writer = AnswerWriter()
        try:
            answer = stream.finish(writer.write)
        finally:
            writer.end()
    print_context_note(model, answer)
    print_timings(answer.timings)


def _rules(json_schema: Path | None, grammar: Path | None) -> dict[str, Any]:
    """Return what the answer has to follow as keyword arguments of `compile_grammar`."""
    from tritgguf.formats.text_file import read_text
    from tritgguf.generation.grammar import check_llguidance

    if json_schema is None and grammar is None:
        return {}
    check_llguidance()
    rules: dict[str, Any] = {"grammar": read_text(grammar)} if grammar is not None else {}
    if json_schema is not None:
        try:
            rules["json_schema"] = json.loads(read_text(json_schema))
        except ValueError as error:
            raise BadRequestError(f"{json_schema}: is no JSON ({error})") from error
    return rules
