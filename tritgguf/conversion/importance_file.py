"""Reading an importance matrix for the matrices of a source."""

from __future__ import annotations

from pathlib import Path

from tritgguf.architectures.tensor_names import quantized_tensor
from tritgguf.conversion.encoders import Importance
from tritgguf.conversion.recovery import named
from tritgguf.formats.imatrix import read_importance
from tritgguf.sources.open import open_source


def importance_of(source: str | Path, path: Path) -> tuple[Importance, list[str]]:
    """Return the importance of a source's matrices in a file, and warnings.

    Raises TritGgufError as `read_importance` does. That matrices of the source are missing in the file, `convert` warns
    itself.
    """
    tensors = [tensor for tensor in open_source(source).tensors if len(tensor.shape) > 1]
    columns = {matrix: tensor.shape[-1] for tensor in tensors for matrix in tensor.matrices}
    unknown: list[str] = []
    importance = read_importance(path, columns, unknown)
    # llama.cpp also measures matrices that are stored otherwise here, such as the head of a tied model.
    others = [name for name in unknown if quantized_tensor(name)]
    if not others:
        return importance, []
    return importance, [
        f"{path}: {len(others)} of its matrices are not in the model ({named(others)}); is it of this model?"
    ]
