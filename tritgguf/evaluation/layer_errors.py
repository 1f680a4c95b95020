"""Where the error comes from: what each decoder block adds to it, and how much there is behind it."""

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
    """One decoder block.

    Errors are root mean squares over tokens, in relation to the original hidden state behind the block.
    """

    block: int
    own: float
    """Of the quantized block, given the original model's hidden states."""
    accumulated: float
    """Of all blocks so far, quantized."""


def layer_errors(
    source: Source,
    file: GgufFile,
    windows: Sequence[Sequence[int]],
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[LayerError]:
    """Return the errors of every block of a trit file; transformers computes both models, one block at a time.

    Args:
        source: what the file was converted from.
        file: the trit file.
        windows: token ids in windows of equal length.
        threads: of torch.
        progress: called with the blocks done and those in all.

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
            for name in block.matrices:
                block.set(name, file.read_float32(name))
            own = relative_error(block.forward(original), expected)
            quantized = block.forward(quantized)
            errors.append(LayerError(index, own**0.5, relative_error(quantized, expected) ** 0.5))
        original = expected
        progress(index + 1, blocks.count)
    return errors
