"""Measure an importance matrix: run the model on a text and sum the squared inputs of each matrix."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tritgguf.calibration.output_head import head_name, head_squares
from tritgguf.formats.durable_output import check_output
from tritgguf.formats.imatrix import write_importance
from tritgguf.machine import peak_memory_bytes
from tritgguf.reference.decoder_blocks import DecoderBlocks
from tritgguf.reference.process_settings import bfloat16_matmul
from tritgguf.sources.open import open_source

if TYPE_CHECKING:
    from torch import Tensor

    from tritgguf.sources.source import Source


@dataclass(frozen=True)
class ImportanceReport:
    """What `measure_importance` wrote."""

    source: str
    output: Path
    text: str
    tokens: int
    matrices: int
    seconds: float
    peak_memory_bytes: int


def measure_importance(
    source: str | Path,
    output: str | Path,
    windows: Sequence[Sequence[int]],
    *,
    text: str,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ImportanceReport:
    """Write an importance matrix in llama.cpp's format, for every matrix that `convert` packs.

    Args:
        source: a Hugging Face folder, a hub id or a GGUF file.
        output: the GGUF file to write.
        windows: token ids of the text, in windows of equal length.
        text: name of the text, stored in the file.
        threads: number of torch's threads; None keeps torch's setting.
        overwrite: whether an existing output may be replaced.
        progress: called with the number of decoder blocks done and their total.

    Raises:
        TritGgufError: bad input, torch or transformers is missing, or the output cannot be written. No file is left.

    """
    started = time.perf_counter()
    output = Path(output)
    check_output(output, overwrite, [source])
    opened = open_source(str(source))
    sums = summed_squares(opened, windows, threads=threads, progress=progress)
    tokens = sum(map(len, windows))
    write_importance(
        output,
        sums,
        dict.fromkeys(sums, tokens),
        datasets=[text],
        chunk_size=len(windows[0]),
        chunks=len(windows),
        overwrite=overwrite,
    )
    seconds = time.perf_counter() - started
    return ImportanceReport(opened.name, output, text, tokens, len(sums), seconds, peak_memory_bytes())


def summed_squares(
    source: Source,
    windows: Sequence[Sequence[int]],
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, np.ndarray]:
    """Return GGUF name -> float64 [columns], the summed squared inputs of each matrix that can be packed.

    The output head is one of them. If it is the embeddings, their name stands for it.
    """
    blocks = DecoderBlocks(source, threads=threads)
    hidden = blocks.embed(windows)
    sums: dict[str, np.ndarray] = {}

    def add(name: str, inputs: Tensor) -> None:
        squares = inputs.square().sum((0, 1)).double().numpy()
        sums[name] = sums.get(name, 0.0) + squares

    for index in range(blocks.count):
        with bfloat16_matmul(), blocks.block(index) as block:
            hidden = block.forward(hidden, {name: partial(add, name) for name in block.matrices})
        if progress is not None:
            progress(index + 1, blocks.count)
    sums[head_name(source)] = head_squares(source, hidden)
    return sums
