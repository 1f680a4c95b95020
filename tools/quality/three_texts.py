"""Measure the KL of files on three texts: package descriptions, the text that ships with `verify`, and exam questions.

Constants are chosen on the first two, and nothing is on the third (`exam_text`).

    python -m tools.quality.three_texts models/SmolLM2-135M-Instruct FILE... --windows 16,4,16

The files' weights are dequantized and run by transformers in float32, as `compare_encoders` does.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # before importing torch: else page faults take half of the time

import numpy as np
import typer
from tokenizers import Tokenizer

from tools import tool_command
from tools.quality import exam_text, package_texts
from tritgguf.evaluation.divergence import Comparison, compare_windows
from tritgguf.evaluation.text_windows import shipped_text
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.reference.model import ReferenceModel
from tritgguf.sources.open import open_source
from tritgguf.sources.source import Source

HEADER = f"{'':40}" + "      KL   99th  top-1" * 3


class ThreeTexts:
    """A model, its texts, and what it predicts for them.

    Args:
        source: the original model.
        windows: how many windows of 512 tokens of each text.

    """

    def __init__(self, source: Source, windows: Sequence[int]) -> None:
        tokenizer = Tokenizer.from_str(source.metadata["tokenizer.huggingface.json"].value)
        texts = (package_texts.texts()[1], shipped_text(), exam_text.text())
        self._windows = [
            package_texts.windows_of(text, tokenizer, count) for text, count in zip(texts, windows, strict=True)
        ]
        self.model = ReferenceModel.open(source)
        """The model; compared as it is now."""
        self._expected = [[_on_disk(self.model.logits(window)) for window in text] for text in self._windows]

    def compare(self) -> list[Comparison]:
        """Compare the model with its present weights with the original, on each text."""
        return [
            compare_windows(windows, logits, map(self.model.logits, windows))
            for windows, logits in zip(self._windows, self._expected, strict=True)
        ]


def _on_disk(logits: np.ndarray) -> np.ndarray:
    """Return logits in a temporary file that vanishes with them: those of a large vocabulary do not fit the memory."""
    with tempfile.TemporaryFile() as file:
        kept = np.memmap(file, logits.dtype, "w+", shape=logits.shape)
    kept[:] = logits
    return kept


def columns(found: Sequence[Comparison]) -> str:
    """Return mean, 99th percentile and share of equal top tokens on each text, below `HEADER`'s titles."""
    return "".join(f"  {kl.kl_mean:6.4f}  {kl.kl_p99:5.2f}  {kl.top1_agreement:5.3f}" for kl in found)


def main(
    source: Annotated[str, typer.Argument(help="HF folder or hub id")],
    files: Annotated[list[Path], typer.Argument(help="Trit files of it.")],
    windows: Annotated[str, typer.Option(help="Windows of 512 tokens, of each text.")] = "16,4,16",
) -> None:
    """Show the KL of files to their source on three texts."""
    texts = ThreeTexts(open_source(source), [int(count) for count in windows.split(",")])
    print(HEADER, flush=True)
    for file in files:
        texts.model.load_file(GgufFile(file))
        print(f"{file.name:40}{columns(texts.compare())}", flush=True)


if __name__ == "__main__":
    tool_command.run(main)
