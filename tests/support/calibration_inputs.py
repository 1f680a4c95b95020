"""Token windows for the calibration of tiny models, and the error of the result."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tritgguf.architectures.tensor_names import quantized_tensor
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.reference.model import ReferenceModel
from tritgguf.sources.open import open_source

WINDOWS = np.random.default_rng(0).integers(3, 400, (48, 64)).tolist()
OTHERS = np.random.default_rng(1).integers(3, 400, (4, 64)).tolist()


def packed_names(folder: Path) -> list[str]:
    return [tensor.name for tensor in open_source(str(folder)).tensors if quantized_tensor(tensor.name)]


def logit_error(source: Path, file: Path) -> float:
    """Return the relative squared error of the logits on other text."""
    model = ReferenceModel.open(open_source(str(source)))
    expected = np.array([model.logits(window) for window in OTHERS])
    model.load_file(GgufFile(file))
    found = np.array([model.logits(window) for window in OTHERS])
    return float(np.square(found - expected).sum() / np.square(expected).sum())
