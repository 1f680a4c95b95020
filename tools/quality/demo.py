"""Compare the original model with its trit files: size, divergence, speed, and answers to the same questions.

    python -m tools.quality.demo models/SmolLM2-135M-Instruct build/d3.gguf build/d2-calibrated.gguf

The original runs in transformers, in float32. Answers are greedy. `make demo` ends with this table.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tritgguf.cli.terminal import print_table
from tritgguf.errors import TritGgufError
from tritgguf.evaluation.verify import verify_files
from tritgguf.formats import trit_types
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.generation.generate import generate
from tritgguf.generation.loaded_model import LoadedModel, load
from tritgguf.generation.sampling import SamplingOptions
from tritgguf.reference.model import ReferenceModel
from tritgguf.sources.open import open_source
from tritgguf.text_format import format_bytes, one_line

QUESTIONS = ("What is the capital of France?", "What is the opposite of hot?", "Name three primary colors.")
_ANSWER_TOKENS = 40
_VERIFIED_TOKENS = 512


@dataclass(frozen=True)
class Candidate:
    """A model as the table shows it; answers are in the order of QUESTIONS."""

    name: str
    file_bytes: int
    bits_per_weight: float
    kl_mean: float
    tokens_per_second: float
    answers: list[str]


def main() -> int:
    """Parse the command line, compare, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, help="the Hugging Face folder that the files were converted from")
    parser.add_argument("files", nargs="+", type=Path, help="trit GGUF files")
    options = parser.parse_args()
    try:
        print_candidates(compare(options.source, options.files))
    except TritGgufError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def compare(source: Path, files: Sequence[Path]) -> list[Candidate]:
    """Return the original and its files."""
    reports = verify_files(source, files, tokens=_VERIFIED_TOKENS)
    models = [load(file) for file in files]
    packed = [
        Candidate(file.name, file.stat().st_size, _bits_per_weight(file), report.kl_mean, *_ask(model))
        for file, report, model in zip(files, reports, models, strict=True)
    ]
    return [_original(source, models[0]), *packed]


def _original(source: Path, model: LoadedModel) -> Candidate:
    """Let the original answer; `model` has its tokenizer and its chat template."""
    reference = ReferenceModel.open(open_source(str(source)))
    answers, tokens, seconds = list[str](), 0, 0.0
    for question in QUESTIONS:
        prompt = generate(model, question, max_tokens=1).prompt_tokens
        start = time.perf_counter()
        answer = reference.greedy(prompt, _ANSWER_TOKENS, model.tokenizer.stop_tokens)
        seconds += time.perf_counter() - start
        tokens += len(answer)
        answers.append(model.tokenizer.decode(answer))
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    return Candidate("FP16 (transformers)", size, 16.0, 0.0, tokens / seconds, answers)


def _ask(model: LoadedModel) -> tuple[float, list[str]]:
    """Return generated tokens per second, and the answers."""
    results = [
        generate(model, question, max_tokens=_ANSWER_TOKENS, sampling=SamplingOptions(temperature=0.0))
        for question in QUESTIONS
    ]
    tokens = sum(result.timings.decode_tokens for result in results)
    seconds = sum(result.timings.decode_seconds for result in results)
    return tokens / seconds, [result.text for result in results]


def _bits_per_weight(path: Path) -> float:
    """Return the bits per weight of the packed matrices."""
    packed = [info for info in GgufFile(path).tensors.values() if trit_types.is_trit_type(info.type_id)]
    return 8 * sum(info.n_bytes for info in packed) / sum(info.n_weights for info in packed)


def print_candidates(candidates: Sequence[Candidate]) -> None:
    """Print the table of figures, then each question with all answers."""
    print_table(
        "the original and its trit files",
        ("", ">size", ">bits per weight", ">KL", ">tokens/s"),
        [
            (
                candidate.name,
                format_bytes(candidate.file_bytes),
                f"{candidate.bits_per_weight:.2f}",
                f"{candidate.kl_mean:.3f}",
                f"{candidate.tokens_per_second:.0f}",
            )
            for candidate in candidates
        ],
    )
    for number, question in enumerate(QUESTIONS):
        rows = [(candidate.name, one_line(candidate.answers[number])) for candidate in candidates]
        print_table(question, ("", ""), rows)
    print("KL: how far the predictions are from the original's, 0 for the same (the mean divergence in nats).")


if __name__ == "__main__":
    sys.exit(main())
