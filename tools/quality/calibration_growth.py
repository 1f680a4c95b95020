"""Measure how calibration grows with the model: one layer of several shapes, with random weights, on random tokens.

    python -m tools.quality.calibration_growth --tokens 4096

The layer of the smallest shape is calibrated once before, which loads libraries and kernels. Seconds by the clock need
a machine where nothing else runs; those of the processors hardly depend on that.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from cpu_kernels.threads.thread_pool import ThreadPool
from tools import tool_command
from tools.models import random_model, synthetic_checkpoint
from tools.quality.package_texts import WINDOW_TOKENS
from tritgguf.architectures.dimensions import Dimensions
from tritgguf.architectures.tensor_names import quantized_tensor
from tritgguf.calibration.block_quantizer import BlockQuantizer
from tritgguf.machine import peak_memory_bytes
from tritgguf.sources.open import open_source

_QWEN = random_model.SHAPES["qwen2.5-1.5b"][1]
SHAPES = {
    "SmolLM2-135M": random_model.SHAPES["smollm2-135m"],
    "Qwen2.5-0.5B": (
        "qwen2",
        dataclasses.replace(_QWEN, layers=24, hidden=896, feed_forward=4864, heads=14, kv_heads=2, head_dim=64),
    ),
    "Qwen2.5-1.5B": ("qwen2", _QWEN),
    "Qwen2.5-7B": ("qwen2", synthetic_checkpoint.SHAPES["qwen2.5-7b"]),
}
_VOCABULARY = 512  # the embeddings are no part of what is measured


@dataclass(frozen=True)
class Growth:
    """What one layer took; `memory` is the largest of the process so far, in bytes."""

    weights: int
    seconds: float
    processor_seconds: float
    memory: int


def main(
    shapes: Annotated[str, typer.Option(help="Comma-separated, the smallest first.")] = ",".join(SHAPES),
    tokens: Annotated[int, typer.Option(help="Tokens of the text, a multiple of 512.")] = 4096,
    depth: Annotated[int, typer.Option("--depth", "-d")] = 2,
    threads: Annotated[int | None, typer.Option("--threads", "-t", min=1)] = None,
) -> None:
    """Show the seconds of one layer of each shape."""
    names = shapes.split(",")
    if unknown := [name for name in names if name not in SHAPES]:
        raise typer.BadParameter(f"{unknown[0]}: choose from {', '.join(SHAPES)}", param_hint="--shapes")
    measure(*SHAPES[names[0]], WINDOW_TOKENS, depth, threads)
    print(f"| one layer, {tokens} tokens | weights | seconds | of a processor | ns per weight | GB |")
    print("|---|---|---|---|---|---|")
    for name in names:
        found = measure(*SHAPES[name], tokens, depth, threads)
        print(
            f"| {name} | {found.weights / 1e6:.1f} M | {found.seconds:.2f} | {found.processor_seconds:.2f}"
            f" | {found.processor_seconds / found.weights * 1e9:.0f} | {found.memory / 1e9:.1f} |",
            flush=True,
        )


def measure(architecture: str, sizes: Dimensions, tokens: int, depth: int, threads: int | None) -> Growth:
    """Calibrate one layer of a shape on random tokens."""
    sizes = dataclasses.replace(sizes, layers=1, vocabulary=_VOCABULARY)
    windows = np.random.default_rng(0).integers(0, 256, (tokens // WINDOW_TOKENS, WINDOW_TOKENS)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.gguf"
        random_model.write_random_model(path, architecture, sizes)
        source = open_source(path)
        shapes = {tensor.name: tensor.shape for tensor in source.tensors if quantized_tensor(tensor.name)}
        quantizer = BlockQuantizer(source, dict.fromkeys(shapes, depth), windows, ThreadPool(threads))
        clock, processor = time.perf_counter(), time.process_time()
        for name in shapes:
            quantizer.quantize(name)
        seconds, processor_seconds = time.perf_counter() - clock, time.process_time() - processor
    weights = sum(int(np.prod(shape)) for shape in shapes.values())
    return Growth(weights, seconds, processor_seconds, peak_memory_bytes())


if __name__ == "__main__":
    tool_command.run(main)
