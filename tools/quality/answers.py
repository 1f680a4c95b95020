"""Print greedy answers of the original and its trit files to three prompts, as Markdown.

    python -m tools.quality.answers models/SmolLM2-135M-Instruct build/smollm2-d2.gguf build/smollm2-d3.gguf --tokens 64

The original runs in transformers in float32, the files in the runner, all with the same chat template.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tools import tool_command
from tritgguf.evaluation.verify import check_same_model
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.generation.generate import generate
from tritgguf.generation.loaded_model import load
from tritgguf.generation.prompt import prompt_tokens
from tritgguf.generation.sampling import SamplingOptions
from tritgguf.reference.model import ReferenceModel
from tritgguf.sources.open import open_source

PROMPTS = (
    "Name three primary colors.",
    "Explain in two sentences why the sky is blue.",
    "Write a Python function that reverses a string.",
)


def quotation(answer: str) -> str:
    """Return an answer as a fenced block; the fence is longer than the fences that models write."""
    return f"````\n{answer.strip()}\n````"


def main(
    source: Annotated[str, typer.Argument(help="What the files were converted from.")],
    files: Annotated[list[Path], typer.Argument(help="Trit files.")],
    tokens: Annotated[int, typer.Option(help="Length of an answer.", min=1)] = 64,
    threads: Annotated[int | None, typer.Option("--threads", "-t", min=1)] = None,
) -> None:
    """Print what the original and each file answer to three prompts."""
    original = open_source(source)
    reference = ReferenceModel.open(original, threads=threads)
    models = []
    for file in files:
        check_same_model(GgufFile(file), original)
        models.append(load(file, threads=threads))
    for prompt in PROMPTS:
        given = prompt_tokens(models[0], prompt)
        answer = reference.greedy(given, tokens, models[0].tokenizer.stop_tokens)
        print(f"**{prompt}**\n\nFP16:\n\n{quotation(models[0].tokenizer.decode(answer))}\n")
        for model in models:
            answered = generate(model, prompt, max_tokens=tokens, sampling=SamplingOptions(temperature=0.0))
            print(f"{model.path.name}:\n\n{quotation(answered.text)}\n")


if __name__ == "__main__":
    tool_command.run(main)
