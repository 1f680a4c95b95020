"""Locate the error of a quantized model: the error of each decoder block, and the accumulated error after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tritgguf.calibration.sensitivity import relative_error
from tritgguf.reference.decoder_blocks import DecoderBlocks

if TYPE_CHECKING:
    from tritgguf.formats.gguf_file import GgufFile
    from tritgguf.sources.source import Source


@dataclass(frozen=True)
class LayerError:
    """The errors of one decoder block.

    Errors are root mean squares over tokens, relative to the original hidden state after the block.
    """

    block: int
    own: float
    """Error of the quantized block for the original model's hidden states."""
    accumulated: float
    """Error of all quantized blocks up to this one."""


def layer_errors(
    source: Source,
    file: GgufFile,
    windows: Sequence[Sequence[int]],
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[LayerError]:
    """Return the errors of every block of a trit file. transformers computes both models, one block at a time.

    Args:
        source: the model that the file was converted from.
        file: the trit file.
        windows: token ids in windows of equal length.
        threads: number of torch's threads; None keeps torch's setting.
        progress: called with the number of blocks done and their total.

    Raises:
        TritGgufError: torch or transformers is missing, or cannot build the model.

    """
    blocks = DecoderBlocks(source, threads=threads)
    original = blocks.embed(windows)
    quantized = original.clone()
    errors = []
    for index in range(blocks.count):
        with blocks.block(index) as block:
            expected = block.forward(original)
            for name in block.packed:
                block.set(name, file.read_matrix(name))
            own = relative_error(block.forward(original), expected)
            quantized = block.forward(quantized)
            errors.append(LayerError(index, own**0.5, relative_error(quantized, expected) ** 0.5))
        original = expected
        progress(index + 1, blocks.count)
    return errors
