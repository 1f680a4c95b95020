"""A Hugging Face folder as the source of a conversion."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tritgguf.architectures import dimensions, hf_to_gguf, tensor_names
from tritgguf.architectures.rope import ROPE_FREQS
from tritgguf.errors import DamagedFileError
from tritgguf.formats.checked import is_unicode, read_json
from tritgguf.formats.dtypes import READABLE_DTYPES, to_float32
from tritgguf.formats.matrix_rows import MatrixRows
from tritgguf.formats.safetensors_reader import StoredTensor, open_shards
from tritgguf.sources.source import PackedTensor, SourceTensor, check_shapes
from tritgguf.tokenization.hf_to_gguf import tokenizer_metadata

if TYPE_CHECKING:
    from gguf import GGUFValue

# Buffers that old checkpoints store with the weights; llama.cpp's converter skips the same three.
_BUFFERS = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")


class HfFolderSource:
    """A local Hugging Face folder: config.json, safetensors, tokenizer.json."""

    def __init__(self, folder: Path, *, hub_id: str | None = None) -> None:
        self.folder = folder
        self.files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
        self.name = hub_id or str(folder)
        self.warnings: list[str] = []
        where = folder / "config.json"
        self.config = read_json(where)
        self.architecture = dimensions.find_architecture(self.config, str(where))
        if self.config.get("quantization_config"):
            method = _get(self.config["quantization_config"], "quant_method", "an unknown method")
            raise DamagedFileError(
                f"{where}: the weights are already quantized ({method}); convert the original checkpoint"
            )
        self.dimensions = dimensions.dimensions_from_config(self.config, str(where))
        self._rows: dict[str, MatrixRows] = {}
        self.tensors: list[SourceTensor] = []
        self._add_rope_factors(where)
        for name, stored in self._select_tensors().items():
            self.tensors.append(SourceTensor(name, stored.shape, stored.n_bytes))
            self._rows[name] = self._rows_of(name, stored)
        self.metadata = self._make_metadata(where, hub_id)

    def read(self, name: str) -> np.ndarray:
        """Return a tensor by its GGUF name: float32, contiguous, rows in GGUF's order.

        Raises TritGgufError if the shard was truncated or removed after it was opened.
        """
        shape = next(tensor.shape for tensor in self.tensors if tensor.name == name)
        return to_float32(self._rows[name].whole()).reshape(shape)

    def rows(self, name: str) -> MatrixRows:
        """Return a tensor's rows in their own dtype: float32, float16 or the bits of bfloat16; raises as `read`."""
        return self._rows[name]

    def packed(self, name: str) -> PackedTensor | None:
        """Return None: a folder has no packed tensors."""
        return None

    def release(self, name: str) -> None:
        """Do nothing: `read` and `rows` return copies."""

    def _add_rope_factors(self, where: Path) -> None:
        factors = hf_to_gguf.rope_factors(self.config, str(where))
        if factors is not None:
            self.tensors.append(SourceTensor(ROPE_FREQS, factors.shape, factors.nbytes))
            self._rows[ROPE_FREQS] = MatrixRows(
                (1, len(factors)), factors.dtype, lambda first, last: factors[np.newaxis].copy(), 1
            )

    def _rows_of(self, name: str, stored: StoredTensor) -> MatrixRows:
        """Return a tensor with its rows in GGUF's order, which permutes rows only within a head."""
        is_vector = len(stored.shape) == 1
        shape = (1, stored.shape[0]) if is_vector else (stored.shape[0], stored.shape[1])
        head_dim = self.dimensions.head_dim

        def read(first: int, last: int) -> np.ndarray:
            part = stored.read_rows(0, stored.shape[0]) if is_vector else stored.read_rows(first, last)
            heads = len(part) // head_dim
            return tensor_names.from_hf(self.architecture.gguf_name, name, part, heads, heads).reshape(-1, shape[1])

        return MatrixRows(shape, READABLE_DTYPES[stored.dtype], read, 1 if is_vector else head_dim)

    def _select_tensors(self) -> dict[str, StoredTensor]:
        """Return the tensors to convert by GGUF name; check their names, dtypes and shapes against config.json."""
        selected: dict[str, StoredTensor] = {}
        for hf_name, stored in open_shards(self.folder).items():
            if hf_name.endswith(_BUFFERS):
                continue
            name = tensor_names.gguf_tensor_name(self.architecture.gguf_name, hf_name)
            if name is None:
                raise DamagedFileError(
                    f"{stored.path}: tensor {hf_name} does not belong to a {self.architecture.hf_class}"
                )
            if stored.dtype not in READABLE_DTYPES:
                raise DamagedFileError(
                    f"{stored.path}: tensor {hf_name} has dtype {stored.dtype}; F32, F16 or BF16 is needed"
                )
            selected[name] = stored
        tied = hf_to_gguf.is_tied(self.config, self.architecture)
        head, embedding = selected.get("output.weight"), selected.get("token_embd.weight")
        if tied and head is not None and embedding is not None:
            # If the two differ although config.json says they are tied, transformers keeps both, and so do we.
            tied = head.equals(embedding)
            if tied:
                del selected["output.weight"]
        shapes = {name: stored.shape for name, stored in selected.items()}
        check_shapes(shapes, self.dimensions, tied=tied, where=self.name, label=self._label)
        return selected

    def _label(self, gguf_name: str) -> str:
        return tensor_names.hf_tensor_name(self.architecture.gguf_name, gguf_name)

    def _make_metadata(self, where: Path, hub_id: str | None) -> dict[str, GGUFValue]:
        weights = sum(math.prod(tensor.shape) for tensor in self.tensors)
        general = _general_metadata(self.folder, self.architecture.gguf_name, weights, hub_id)
        model = hf_to_gguf.gguf_metadata(self.config, str(where))
        tokenizer, warnings = tokenizer_metadata(
            self.folder,
            self.dimensions.vocabulary,
            add_space_prefix_key=self.architecture.writes_space_prefix,
        )
        self.warnings += warnings
        return {**general, **model, **tokenizer}


def _general_metadata(folder: Path, arch: str, weights: int, hub_id: str | None) -> dict[str, GGUFValue]:
    """Return the `general.*` keys (name, size, license ...) that gguf-py finds in the folder."""
    import gguf

    try:
        metadata = gguf.Metadata.load(model_path=folder, total_params=weights)
    except Exception:  # gguf-py cannot read some model cards, whose weights are still valid
        metadata = gguf.Metadata()
    if hub_id is not None:
        # A download's folder is named after its commit, not after the model.
        fields = ("name", "organization", "basename", "finetune", "version", "size_label")
        for field, value in zip(fields, gguf.Metadata.get_model_id_components(hub_id, weights), strict=True):
            setattr(metadata, field, value)
    metadata.name = metadata.name or folder.resolve().name
    metadata.size_label = metadata.size_label or gguf.size_label(weights, 0, 0, 0)
    writer = gguf.GGUFWriter(path=None, arch=arch)
    writer.add_type(gguf.GGUFType.MODEL)
    with contextlib.suppress(Exception):
        metadata.set_gguf_meta_model(writer)
    return {key: value for key, value in writer.kv_data[0].items() if _is_well_typed(value)}


def _is_well_typed(value: GGUFValue) -> bool:
    """Tell whether a value from a model card, which can be anything, has the type of its key."""
    from gguf import GGUFValueType

    found = value.value
    if value.type == GGUFValueType.ARRAY:
        return isinstance(found, list) and all(isinstance(item, str) and is_unicode(item) for item in found)
    if value.type == GGUFValueType.STRING:
        return isinstance(found, str) and is_unicode(found)
    if value.type == GGUFValueType.FLOAT32:
        return isinstance(found, int | float) and abs(found) < 1e30
    return type(found) is int and 0 <= found < 1 << 31


def _get(value: Any, key: str, default: str) -> str:
    return str(value.get(key, default)) if isinstance(value, dict) else default
