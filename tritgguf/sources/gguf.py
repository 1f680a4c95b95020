"""A GGUF file as the source of a conversion."""

from __future__ import annotations

import math
import mmap
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tritgguf.architectures import keys
from tritgguf.architectures.delta_net import FURTHER_LEFT_OUT, without_further_layers
from tritgguf.architectures.dimensions import Dimensions, biased_matrices, dimensions_from_gguf
from tritgguf.architectures.key_rules import GgufKeys
from tritgguf.architectures.rope import ATTENTION_FACTOR_KEY, LONG_ROPE_TENSORS, ROPE_FREQS
from tritgguf.architectures.table import GGUF_ARCHITECTURES
from tritgguf.architectures.tensor_names import GGUF_LAYER_INDEX
from tritgguf.errors import DamagedFileError
from tritgguf.formats.dtypes import READABLE_DTYPES
from tritgguf.formats.matrix_rows import MatrixRows
from tritgguf.formats.stacks import split_matrix_name
from tritgguf.formats.trit_types import KEY_DEPTHS, KEY_ENCODER, TritType, is_trit_type
from tritgguf.sources.source import PackedMatrix, SourceTensor, check_shapes
from tritgguf.tokenization.gguf_to_hf import DEFAULT_PRE, tokenizer_json_from_gguf
from tritgguf.tokenization.hf_to_gguf import HUGGINGFACE_JSON_KEY

if TYPE_CHECKING:
    from gguf import GGUFValue

    from tritgguf.architectures.architecture import Architecture
    from tritgguf.formats.gguf_file import GgufFile
    from tritgguf.formats.gguf_header import TensorInfo

_PRE_KEY = "tokenizer.ggml.pre"
# These keys describe the tensor types; `convert` writes its own.
_TYPE_KEYS = ("general.file_type", "general.quantization_version")
# Value of general.type -> what the file is.
_OTHER_KINDS = {
    "adapter": "it is a LoRA adapter; merge it into its base model first (llama-export-lora)",
    "imatrix": "it is an importance matrix; give it with --imatrix",
    "mmproj": "it is the image encoder of a model; give the file of the text model",
    "vocab": "it is a vocabulary without weights",
}


class GgufSource:
    """A GGUF file of a supported architecture with trit tensors or any types that gguf-py can dequantize."""

    def __init__(self, path: Path) -> None:
        from tritgguf.formats.gguf_file import GgufFile

        self.name = str(path)
        self.files = [path]
        self.warnings: list[str] = []
        self._file = GgufFile(path)
        kind = self._file.metadata.get("general.type", "model")
        if kind != "model":
            raise DamagedFileError(f"{path}: is not a model: {_OTHER_KINDS.get(kind, f'its general.type is {kind}')}")
        if self._file.metadata.get("split.count", 0) not in (0, 1):
            raise DamagedFileError(
                f"{path}: is one part of a split model; merge the parts with llama-gguf-split --merge"
            )
        self._changes = self._without_further_layers()
        if self._changes:
            self.warnings.append(f"{path}: {FURTHER_LEFT_OUT}")
        self.dimensions = self._check_tensors()
        self.tensors = [SourceTensor(info.name, info.shape, info.n_bytes) for info in self._infos()]
        self.metadata = self._changed(_gguf_metadata(self._file))
        self.encoding: dict[str, str] = {
            key: str(self._file.metadata[key]) for key in (KEY_ENCODER, KEY_DEPTHS) if key in self._file.metadata
        }
        if HUGGINGFACE_JSON_KEY not in self._file.metadata and self._file.metadata.get(_PRE_KEY) == DEFAULT_PRE:
            self.warnings.append(
                f"{path}: {_PRE_KEY} is {DEFAULT_PRE}, so text is split as llama.cpp does, which may differ from the"
                " original tokenizer; convert the Hugging Face checkpoint if there is one"
            )

    def read(self, name: str) -> np.ndarray:
        """Return a tensor dequantized: float32, contiguous; TritGgufError if gguf-py cannot dequantize its type."""
        weights = np.ascontiguousarray(self._file.read_float32(name))
        self._file.release(name)
        return weights

    def rows(self, matrix: str) -> MatrixRows:
        """Return a matrix's rows: views of the file for F32, F16 and BF16, dequantized float32 for other types."""
        name, index = split_matrix_name(matrix)
        info = self._file.tensors[name]
        shape = info.matrix_shape
        begin = (index or 0) * shape[0]
        is_readable = info.type_name in READABLE_DTYPES
        dtype = READABLE_DTYPES.get(info.type_name, np.dtype(np.float32))

        def read(first: int, last: int) -> np.ndarray:
            if not is_readable:
                return self._file.read_rows(name, begin + first, begin + last)
            raw = self._file.raw(name).reshape(info.rows, -1)[begin + first : begin + last].reshape(-1)
            raw[:: mmap.PAGESIZE].max()  # loads the pages now, so that computing threads do not wait for the disk
            return raw.view(dtype).reshape(-1, shape[1])

        return MatrixRows(shape, dtype, read, 1)

    def packed_depth(self, name: str) -> int | None:
        """Return the depth of a trit tensor; None for other types."""
        type_id = self._file.tensors[name].type_id
        return TritType(type_id).depth if is_trit_type(type_id) else None

    def packed(self, matrix: str) -> PackedMatrix | None:
        """Return a packed matrix as views of the file; None for other types."""
        name, index = split_matrix_name(matrix)
        depth, info = self.packed_depth(name), self._file.tensors[name]
        if depth is None:
            return None
        data = self._file.raw(name).reshape(info.n_matrices, -1)
        return PackedMatrix(depth, data[index or 0], self._file.codebooks(name)[index or 0])

    def release(self, matrix: str) -> None:
        """Drop the resident pages of a matrix."""
        self._file.release(*split_matrix_name(matrix))

    def label(self, name: str) -> str:
        """Return the name itself."""
        return name

    def _without_further_layers(self) -> dict[str, Any]:
        """Return the new values of keys that leave out layers which predict further tokens."""
        architecture = GGUF_ARCHITECTURES.get(str(self._file.metadata.get("general.architecture")))
        if architecture is None:
            return {}
        return without_further_layers(self._file.metadata, architecture, self.name)

    def _changed(self, metadata: dict[str, GGUFValue]) -> dict[str, GGUFValue]:
        kept = {key: value for key, value in metadata.items() if self._changes.get(key, value) is not None}
        return {key: replace(value, value=self._changes.get(key, value.value)) for key, value in kept.items()}

    def _infos(self) -> list[TensorInfo]:
        """Return the tensors, without those of layers that are left out."""
        layers = self._changes.get(f"{self._file.metadata.get('general.architecture')}.{keys.LAYERS.gguf}", math.inf)
        found = ((GGUF_LAYER_INDEX.match(info.name), info) for info in self._file.tensors.values())
        return [info for layer, info in found if layer is None or int(layer[1]) < layers]

    def _check_tensors(self) -> Dimensions:
        shapes = {info.name: info.shape for info in self._infos()}
        biased = biased_matrices(name for name in shapes if name.startswith(("blk.0.", "output.")))
        vocabulary = shapes.get("token_embd.weight", (1,))[0]
        metadata = {**self._file.metadata, **self._changes}
        dimensions = dimensions_from_gguf(metadata, vocabulary, biased, self.name)
        architecture = GGUF_ARCHITECTURES[metadata["general.architecture"]]
        _check_keys(GgufKeys(metadata, shapes, architecture, dimensions, self.name))
        self._take_rope_factors(shapes, architecture, dimensions.head_dim // 2)
        check_shapes(shapes, dimensions, tied="output.weight" not in shapes, where=self.name, label=self.label)
        return dimensions

    def _take_rope_factors(self, shapes: dict[str, tuple[int, ...]], architecture: Architecture, half: int) -> None:
        """Remove the factors of the rotation, which may be missing, from the shapes; check theirs."""
        pair = LONG_ROPE_TENSORS if architecture.long_rope else ()
        if len(shapes.keys() & set(pair)) == 1:
            raise DamagedFileError(f"{self.name}: has only one of the tensors {' and '.join(pair)}")
        for name in (ROPE_FREQS, *pair):
            factors = shapes.pop(name, None)
            if factors not in (None, (half,)):
                raise DamagedFileError(f"{self.name}: tensor {name} has shape {factors}, not ({half},)")


def _check_keys(known: GgufKeys) -> None:
    """Raise TritGgufError for values that a converted file could not be run with."""
    for rule in (keys.CONTEXT, keys.EPSILON, keys.ROPE, keys.WINDOW):
        rule.to_hf(known)
    known.number(ATTENTION_FACTOR_KEY, 1.0)


def _gguf_metadata(file: GgufFile) -> dict[str, GGUFValue]:
    """Return a file's keys without trit and type keys, and tokenizer.huggingface.json, made if the file lacks it.

    Values are unchanged.
    """
    from gguf import GGUFValue, GGUFValueType

    metadata = {key: value for key, value in file.stock_metadata().items() if key not in _TYPE_KEYS}
    if HUGGINGFACE_JSON_KEY not in metadata:
        text = tokenizer_json_from_gguf(file.metadata, where=str(file.path))
        metadata[HUGGINGFACE_JSON_KEY] = GGUFValue(value=text, type=GGUFValueType.STRING)
    return metadata
