"""A trit file with random weights in the shape of a known model, written directly from random code words.

    python -m tools.models.random_packed_model qwen3-30b-a3b model.gguf --depth 2
    python -m tools.models.random_packed_model qwen3-30b-a3b model.gguf --layers 4

It is for measurements of time and memory on models whose original would not fit the disk. Every level and every scale
index is equally likely; embeddings, output head and routers are Gaussian.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import gguf
import numpy as np
import typer
from gguf import GGUFValue, GGUFValueType

from tools import tool_command
from tools.models.random_model import SHAPES, add_metadata, vector_value, with_layers
from tritgguf.architectures.dimensions import Dimensions
from tritgguf.architectures.tensor_names import quantized_tensor
from tritgguf.conversion.file_metadata import checksum_value, codebook_value, file_metadata
from tritgguf.conversion.plan import planned_tensor
from tritgguf.formats import trit_types
from tritgguf.formats.gguf_header import F32
from tritgguf.formats.gguf_writer import PlannedTensor, StreamingWriter
from tritgguf.formats.trit_types import TritType
from tritgguf.tokenization.gguf_to_hf import tokenizer_json_from_gguf
from tritgguf.tokenization.hf_to_gguf import HUGGINGFACE_JSON_KEY

_CODES = 3**10
_WORDS = (np.arange(_CODES) * 65536 + _CODES - 1) // _CODES  # docs/format.md, section 3
_AT_ONCE = 1 << 24  # weights
# Radix of the digit that is not used, by depth, and the part of a row's words that have it: of depth 1 those with odd
# numbers, of the others the last ones.
_ZERO_RADIX = {1: 3, 3: 729, 4: 9}
_SCALE_RANGE = (0.5, 1.5)  # of the codebook, before it is multiplied to give the weights their size


def write_packed_model(
    path: Path, architecture: str, sizes: Dimensions, *, depth: int, seed: int = 0, overwrite: bool = False
) -> None:
    """Write the file; it appears when it is complete. The same seed gives the same bytes.

    Raises TritGgufError if the file exists or the disk is full.
    """
    generator = np.random.default_rng(seed)
    plan = [
        planned_tensor(name, shape, depth if quantized_tensor(name) else 0) for name, shape in sizes.shapes().items()
    ]
    metadata = file_metadata(_model_metadata(architecture, sizes), plan, "random", "")
    for tensor in plan:
        if trit_types.is_trit_type(tensor.type_id):
            book = np.tile(_codebook(depth, tensor.shape[-1]), len(tensor.matrices))
            metadata[trit_types.codebook_key(tensor.name)] = codebook_value(book)
    with StreamingWriter(path, metadata, plan, overwrite=overwrite) as writer:
        for tensor in plan:
            writer.begin(tensor)
            for _ in tensor.matrices:
                for part in _matrix(tensor, generator):
                    writer.write(part)
                checksum = writer.end()
            writer.set_metadata(trit_types.checksum_key(tensor.name), checksum_value(checksum))


def _matrix(tensor: PlannedTensor, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield the rows of a random matrix in the type of its tensor, a part at a time."""
    columns = tensor.shape[-1]
    rows = tensor.shape[-2] if len(tensor.shape) > 1 else 1
    step = max(1, _AT_ONCE // columns)
    for first in range(0, rows, step):
        shape = (min(step, rows - first), columns)
        if len(tensor.shape) == 1:
            yield np.full(shape, vector_value(tensor.name), np.float32)
        elif trit_types.is_trit_type(tensor.type_id):
            yield random_words(*shape, TritType(tensor.type_id).depth, generator)
        else:
            weights = generator.standard_normal(shape, np.float32) * np.float32(columns**-0.5)
            yield weights if tensor.type_id == F32 else weights.astype(np.float16)


def random_words(rows: int, columns: int, depth: int, generator: np.random.Generator) -> np.ndarray:
    """Return packed rows of random digits, as an encoder writes them: uint16 [rows, words of a row]."""
    codes = generator.integers(0, _CODES, (rows, trit_types.row_bytes(depth, columns) // 2), np.uint16)
    if depth in _ZERO_RADIX:
        # The last plane of depths 3 and 4 has a word for four groups, 64 columns.
        with_zero = codes[:, 1::2] if depth == 1 else codes[:, -(columns // 64) :]
        with_zero -= with_zero % np.uint16(_ZERO_RADIX[depth])
    return _WORDS.astype(np.uint16)[codes]


def _codebook(depth: int, columns: int) -> np.ndarray:
    """Return 27 scales, float32, that give random digits a standard deviation of 1 / sqrt(columns)."""
    scales = np.geomspace(*_SCALE_RANGE, trit_types.CODEBOOK_SIZE)
    levels = np.arange(3**depth) - (3**depth - 1) // 2
    deviation = np.sqrt(np.mean(np.square(scales)) * np.mean(np.square(levels / levels.max())))
    return (scales / (deviation * np.sqrt(columns))).astype(np.float32)


def _model_metadata(architecture: str, sizes: Dimensions) -> dict[str, GGUFValue]:
    writer = gguf.GGUFWriter(None, architecture)
    add_metadata(writer, architecture, sizes)
    metadata = dict(writer.kv_data[0])
    text = tokenizer_json_from_gguf({key: value.value for key, value in metadata.items()}, where="random")
    return metadata | {HUGGINGFACE_JSON_KEY: GGUFValue(text, GGUFValueType.STRING)}


def main(
    shape: Annotated[str, typer.Argument(help=", ".join(SHAPES))],
    path: Annotated[Path, typer.Argument(help="The file to write.", metavar="FILE.gguf")],
    depth: Annotated[int, typer.Option(min=1, max=4, help="Trits per weight.")] = 2,
    layers: Annotated[int | None, typer.Option(min=1, help="Number of layers.", show_default="all")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
) -> None:
    """Write a trit file of random weights in the shape of a known model."""
    if shape not in SHAPES:
        raise typer.BadParameter(f"{shape} is none of {', '.join(SHAPES)}")
    architecture, sizes = SHAPES[shape]
    sizes = with_layers(sizes, layers or sizes.layers)
    write_packed_model(path, architecture, sizes, depth=depth, seed=seed, overwrite=overwrite)


if __name__ == "__main__":
    tool_command.run(main)
