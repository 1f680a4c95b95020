"""Compare greedy answers of the runner and of another program to six prompts, on the same weights.

    python -m tools.quality.greedy_match models/SmolLM2-135M-Instruct build/smollm2-135m-d3.gguf --tokens 64
    python -m tools.quality.greedy_match llama.cpp build/smollm2-135m-d3.gguf --tokens 64

The other program is transformers, in float32 on the file's dequantized weights, with the architecture of SOURCE, from
which the file was converted; or llama.cpp, on the file's export to F16. The exit code is 1 if an answer differs. It
then prints the gap between the other program's two likeliest tokens at that position: a gap near the runner's error
(`tritgguf verify`, `tools/llama_cpp/referee.py`) is a tie that rounding decided.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Protocol

import numpy as np

from tools.llama_cpp.referee import open_export
from tritgguf.errors import TritGgufError
from tritgguf.evaluation.verify import check_same_model
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.generation.generate import generate
from tritgguf.generation.loaded_model import LoadedModel, load
from tritgguf.generation.sampling import SamplingOptions
from tritgguf.reference.model import ReferenceModel
from tritgguf.sources.open import open_source

PROMPTS = (
    "Name three primary colors.",
    "What is the capital of France?",
    "Write a Python function that reverses a string.",
    "Explain in two sentences why the sky is blue.",
    "Give me a short recipe for pancakes.",
    "Translate into German: The boat leaves at seven in the morning.",
)


LLAMA_CPP = "llama.cpp"


class Reference(Protocol):
    """Another program."""

    def greedy(self, prompt: Sequence[int], count: int, stop_tokens: Collection[int], /) -> list[int]:
        """Return up to `count` tokens, without the stop token that ends them."""

    def logits(self, tokens: Sequence[int], /) -> np.ndarray:
        """Return float32 [tokens, vocabulary]."""


@dataclass(frozen=True)
class Match:
    """Both answers to one prompt; if they differ, `differs_at` is the number of equal tokens before the difference.

    `relative_gap` is the gap between the logits of the other program's two likeliest tokens there, relative to the
    largest logit.
    """

    prompt: str
    tokens: int
    text: str
    reference_text: str
    differs_at: int | None = None
    relative_gap: float | None = None


def main() -> int:
    """Parse the command line, compare, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", help=f"what the file was converted from, or {LLAMA_CPP}")
    parser.add_argument("file", help="the trit GGUF file")
    parser.add_argument("--tokens", type=int, default=64, help="length of an answer (default 64)")
    parser.add_argument("--threads", type=int, default=None, help="threads of both (default: all cores)")
    parser.add_argument("--prefill-bits", type=int, choices=(8, 16), default=16, help="of run (default 16)")
    parser.add_argument("--exact", action="store_true", help="run with --exact: activations with 31 bits")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    try:
        matches = compare(
            options.source,
            options.file,
            tokens=options.tokens,
            threads=options.threads,
            prefill_bits=options.prefill_bits,
            exact=options.exact,
        )
    except TritGgufError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps([asdict(match) for match in matches], indent=2, ensure_ascii=False))
    else:
        print_table(matches)
    return 0 if all(match.differs_at is None for match in matches) else 1


def compare(
    source: str, file: str, *, tokens: int, threads: int | None = None, prefill_bits: int = 16, exact: bool = False
) -> list[Match]:
    """Return the comparison for every prompt."""
    with open_reference(source, GgufFile(file), threads) as reference:
        model = load(file, threads=threads, prefill_bits=prefill_bits, exact=exact)
        return [compare_prompt(model, reference, prompt, tokens) for prompt in PROMPTS]


@contextmanager
def open_reference(source: str, file: GgufFile, threads: int | None) -> Iterator[Reference]:
    """Load the weights of `file` into the other program."""
    if source == LLAMA_CPP:
        with open_export(file, threads=threads) as referee:
            yield referee
        return
    opened = open_source(source)
    check_same_model(file, opened)
    reference = ReferenceModel.open(opened, threads=threads)
    reference.load_file(file)
    yield reference


def _is_greedy(
    reference: Reference, prompt: Sequence[int], answer: Sequence[int], count: int, stop_tokens: Collection[int]
) -> bool:
    """Tell whether an answer of up to `count` tokens is the other program's: one pass is faster than a pass a token."""
    likeliest = reference.logits([*prompt, *answer])[len(prompt) - 1 :].argmax(axis=1).tolist()
    return likeliest[: len(answer)] == answer and (len(answer) == count or likeliest[-1] in stop_tokens)


def compare_prompt(model: LoadedModel, reference: Reference, prompt: str, tokens: int) -> Match:
    """Let both answer one prompt with the chat template."""
    answer = generate(model, prompt, max_tokens=tokens, sampling=SamplingOptions(temperature=0.0))
    ours, prompt_tokens = answer.tokens, answer.prompt_tokens
    stop_tokens = model.tokenizer.stop_tokens
    is_theirs = _is_greedy(reference, prompt_tokens, ours, tokens, stop_tokens)
    theirs = ours if is_theirs else reference.greedy(prompt_tokens, tokens, stop_tokens)
    match = Match(prompt, len(ours), answer.text, model.tokenizer.decode(theirs))
    if ours == theirs:
        return match
    pairs = enumerate(zip(ours, theirs, strict=False))
    equal = next((place for place, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
    logits = reference.logits([*prompt_tokens, *theirs[:equal]])[-1]
    second, first = np.sort(logits)[-2:]
    return replace(match, differs_at=equal, relative_gap=float((first - second) / np.abs(logits).max()))


def print_table(matches: list[Match]) -> None:
    """Print a line for each prompt, and both answers if they differ."""
    width = max(len(match.prompt) for match in matches)
    print(f"{'prompt':{width}}  tokens  result")
    for match in matches:
        result = "equal"
        if match.differs_at is not None:
            result = f"differs at token {match.differs_at}, relative logit gap {match.relative_gap:.1e}"
        print(f"{match.prompt:{width}}  {match.tokens:6}  {result}")
        if match.differs_at is not None:
            print(f"    runner:        {match.text!r}\n    other program: {match.reference_text!r}")


if __name__ == "__main__":
    sys.exit(main())
