"""Measure the calibration of a small mixture: the KL to the FP16 model by encoder and by the length of the text.

    python -m tools.models.train_mixture
    python -m tools.quality.mixture --windows 128,32,8,2

Each expert sees only the tokens that the router sends to it, so its text is the shorter, the more experts there are.
Texts of several lengths show what the experts of a larger mixture would have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from tools import tool_command
from tools.models.fetch_model import DEFAULT_FOLDER
from tools.models.train_mixture import NAME
from tools.quality.compare_encoders import Measurement, Row
from tritgguf.architectures.experts import STACKS
from tritgguf.calibration.expert_quantizer import FEWEST_TOKENS
from tritgguf.calibration.importance import summed_squares
from tritgguf.cli import terminal
from tritgguf.errors import TritGgufError
from tritgguf.sources.open import open_source


@dataclass(frozen=True)
class Reached:
    """How many tokens of a text the router sends to the experts: int64 [layers * experts]."""

    tokens: np.ndarray

    @property
    def without_text(self) -> int:
        """Number of experts that are quantized without the text, because they see too few tokens."""
        return int((self.tokens < FEWEST_TOKENS).sum())


def reached_experts(source: Path, windows: Sequence[Sequence[int]], threads: int | None = None) -> Reached:
    """Count the tokens of a text that each expert of a model sees."""
    _, counts = summed_squares(open_source(source), windows, threads=threads)
    return Reached(_gate_counts(counts))


def _gate_counts(counts: Mapping[str, int]) -> np.ndarray:
    gates = [count for name, count in counts.items() if f".{STACKS[0]}." in name]
    return np.array(gates, np.int64)


def _line(name: str, row: Row, of_v2: float, reached: Reached | None = None) -> str:
    text = ["", "", ""]
    if reached is not None:
        least, median, most = np.percentile(reached.tokens, (0, 50, 100)).astype(int)
        text = [f"{least} / {median} / {most}", f"{reached.without_text} of {len(reached.tokens)}"]
        text.append(f"{row.seconds:.0f}")
    columns = [name, *text, f"{row.kl_mean:.4f}", f"{row.kl_p99:.2f}", f"{100 * row.top1_agreement:.1f} %"]
    return f"| {' | '.join([*columns, f'{row.kl_mean / of_v2:.2f}'])} |"


def main(
    models: Annotated[Path, typer.Option(help="Folder of the models.")] = DEFAULT_FOLDER,
    windows: Annotated[str, typer.Option(help="Numbers of windows of 512 tokens to calibrate on.")] = "128,32,8,2",
    depth: Annotated[int, typer.Option(help="Trits per weight.", min=1, max=4)] = 2,
    evaluate: Annotated[int, typer.Option(help="Windows of 512 tokens to evaluate.", min=1)] = 16,
    threads: Annotated[int | None, typer.Option("--threads", "-t", min=1)] = None,
) -> None:
    """Measure the calibration of the mixture that train_mixture has trained."""
    if not (models / NAME).is_dir():
        raise TritGgufError(f"{models / NAME}: is not there; train it with python -m tools.models.train_mixture")
    measurement = Measurement(NAME, models, threads, windows=(evaluate, 1))
    perplexity = measurement.describe()["perplexity_fp16"]
    print(f"Perplexity of the FP16 model: {perplexity:.2f}\n")
    print("| | tokens of an expert: least / median / most | experts without text | s | KL | 99th | same top | of v2 |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    plain = measurement.row(f"trit{depth}-v2")
    print(_line("v2", plain, plain.kl_mean), flush=True)
    print(_line("best", measurement.row(f"trit{depth}-best"), plain.kl_mean), flush=True)
    for count in map(int, windows.split(",")):
        measurement = Measurement(NAME, models, threads, windows=(evaluate, count))
        tokens = sum(map(len, measurement.calibration))
        reached = reached_experts(models / NAME, measurement.calibration, threads)
        for encoder in ("imatrix", "calibrated"):
            row = measurement.row(f"trit{depth}-{encoder}")
            print(_line(f"{encoder}, {tokens:,} tokens", row, plain.kl_mean, reached), flush=True)
    terminal.note(f"experts with fewer than {FEWEST_TOKENS} tokens are quantized by the error of their weights")


if __name__ == "__main__":
    tool_command.run(main)
