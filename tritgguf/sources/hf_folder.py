"""A Hugging Face folder as the source of a conversion."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tritgguf.architectures import dimensions, hf_to_gguf, tensor_names
from tritgguf.architectures.delta_net import FURTHER_LEFT_OUT
from tritgguf.architectures.multimodal import IMAGES_LEFT_OUT, may_transpose_stacks, text_entries, text_tensor_name
from tritgguf.architectures.rope import FACTOR_TENSORS
from tritgguf.errors import DamagedFileError
from tritgguf.formats.checked import check_inside, is_unicode, read_json
from tritgguf.formats.dtypes import READABLE_DTYPES, to_float32
from tritgguf.formats.matrix_rows import MatrixRows
from tritgguf.formats.safetensors_reader import StoredTensor, open_shards
from tritgguf.formats.text_file import read_text
from tritgguf.sources.mxfp4 import Mxfp4Tensor, with_mxfp4
from tritgguf.sources.source import PackedMatrix, SourceTensor, check_shapes
from tritgguf.sources.stored_pieces import Piece, Pieces
from tritgguf.tokenization.hf_to_gguf import tokenizer_metadata

if TYPE_CHECKING:
    from gguf import GGUFValue

# Buffers that old checkpoints store with the weights; llama.cpp's converter skips the same three.
_BUFFERS = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")
_PREFIX = "model."
_FURTHER = ("mtp.", "model.mtp.")  # of layers that predict further tokens
# Tensors that bitsandbytes, GPTQ, AWQ, quanto and FP8 checkpoints have beside or in place of the weights.
_QUANTIZED = (".SCB", ".absmax", ".quant_map", ".qweight", ".qzeros", ".scales", "._scale", ".weight_scale_inv")


class HfFolderSource:
    """A local Hugging Face folder: config.json, safetensors, tokenizer.json."""

    def __init__(self, folder: Path, *, hub_id: str | None = None) -> None:
        self.folder = folder
        self.files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
        self.name = hub_id or str(folder)
        self.warnings: list[str] = []
        where = folder / "config.json"
        _check_is_model(folder)
        stored_config = read_json(where)
        text = text_entries(stored_config, str(where))
        self.is_multimodal = text is not None
        self.config = stored_config if text is None else text
        self._may_transpose_stacks = may_transpose_stacks(stored_config)
        if self.is_multimodal:
            self.warnings.append(f"{self.name}: {IMAGES_LEFT_OUT}")
        self.architecture = dimensions.find_architecture(self.config, str(where))
        self.is_mxfp4 = self._check_quantization(where)
        self.dimensions = dimensions.dimensions_from_config(self.config, str(where))
        self.tensors: list[SourceTensor] = []
        self._rope_factors = hf_to_gguf.rope_factors(self.config, str(where))
        self.tensors += [SourceTensor(name, array.shape, array.nbytes) for name, array in self._rope_factors.items()]
        self._pieces = Pieces()
        self._select_pieces()
        shapes = self.dimensions.shapes()
        for name in self._pieces.tensors:
            self.tensors.append(SourceTensor(name, shapes[name], self._pieces.n_bytes(name)))
        self.metadata = self._make_metadata(where, hub_id)
        self.warnings += [f"{self.name}: {sentence}" for sentence in hf_to_gguf.left_out(self.config, str(where))]
        self.encoding: dict[str, str] = {}
        if (folder / "adapter_config.json").is_file():
            self.warnings.append(f"{folder}: its LoRA adapter (adapter_config.json) is not applied; merge it first")

    def read(self, name: str) -> np.ndarray:
        """Return a tensor by its GGUF name: float32, contiguous, rows in GGUF's order.

        Raises TritGgufError if the shard was truncated or removed after it was opened.
        """
        tensor = next(tensor for tensor in self.tensors if tensor.name == name)
        matrices = [to_float32(self.rows(matrix).whole()) for matrix in tensor.matrices]
        return (matrices[0] if len(matrices) == 1 else np.stack(matrices)).reshape(tensor.shape)

    def rows(self, matrix: str) -> MatrixRows:
        """Return a matrix's rows in their own dtype: float32, float16 or the bits of bfloat16; raises as `read`.

        They are in GGUF's order, which permutes rows only within a head.
        """
        if matrix in self._rope_factors:
            factors = self._rope_factors[matrix]
            return MatrixRows((1, len(factors)), factors.dtype, lambda first, last: factors[np.newaxis].copy(), 1)
        piece, index = self._pieces.matrix(matrix)
        arch, head_dim = self.architecture.gguf_name, self.dimensions.head_dim
        delta_net = self.dimensions.delta_net
        rows = piece.shape[0] if tensor_names.reorders_rows(matrix, delta_net) else head_dim

        def convert(part: np.ndarray) -> np.ndarray:
            heads = len(part) // head_dim
            return tensor_names.from_hf(arch, matrix, part, heads, heads, delta_net)

        return piece.rows(index, rows, convert)

    def packed_depth(self, name: str) -> int | None:
        """Return None: a folder has no packed tensors."""
        return None

    def packed(self, matrix: str) -> PackedMatrix | None:
        """Return None: a folder has no packed matrices."""
        return None

    def release(self, matrix: str) -> None:
        """Do nothing: `read` and `rows` return copies."""

    def label(self, name: str) -> str:
        """Return the Hugging Face name of a tensor or of a matrix."""
        if name in FACTOR_TENSORS:
            return name
        return self._pieces.label(name) or tensor_names.hf_tensor_name(self.architecture.gguf_name, name)

    def _check_quantization(self, where: Path) -> bool:
        """Tell whether the experts are in MXFP4, as published; TritGgufError for weights that were quantized."""
        quantization = self.config.get("quantization_config")
        if not quantization:
            return False
        method, experts = _get(quantization, "quant_method", "an unknown method"), self.architecture.experts
        if method == "mxfp4" and experts is not None and experts.may_be_mxfp4:
            return True
        raise DamagedFileError(
            f"{where}: the weights are already quantized ({method}); convert the original checkpoint"
        )

    def _select_pieces(self) -> None:
        """Find the tensors to convert; check their names, dtypes and shapes against config.json."""
        pieces, in_folder, expected = self._pieces, open_shards(self.folder), self.dimensions.shapes()
        stored_tensors = with_mxfp4(in_folder) if self.is_mxfp4 else dict(in_folder)
        # A checkpoint of the model without its head lacks the prefix; transformers loads it all the same.
        prefix = "" if any(name.startswith(_PREFIX) for name in stored_tensors) else _PREFIX
        for hf_name, stored in stored_tensors.items():
            text_name = text_tensor_name(hf_name) if self.is_multimodal else hf_name
            if text_name is None or hf_name.endswith(_BUFFERS):
                continue
            if self.architecture.has_states and hf_name.startswith(_FURTHER):
                self._leave_out_further()
                continue
            full_name = text_name if text_name.startswith(("lm_head.", _PREFIX)) else prefix + text_name
            places = tensor_names.places_of(self.architecture.gguf_name, full_name)
            if not places and hf_name.endswith(_QUANTIZED):
                raise DamagedFileError(
                    f"{stored.path}: tensor {hf_name} belongs to quantized weights; convert the original checkpoint"
                )
            if not places:
                raise DamagedFileError(
                    f"{stored.path}: tensor {hf_name} does not belong to a {self.architecture.hf_class}"
                )
            if stored.dtype not in READABLE_DTYPES:
                raise DamagedFileError(
                    f"{stored.path}: tensor {hf_name} has dtype {stored.dtype}; F32, F16 or BF16 is needed"
                )
            for place in places:
                piece = _piece(place, stored)
                if self._may_transpose_stacks and piece.shape != expected.get(place.name):
                    piece = piece.transposed_stack()
                pieces.add(place.name, piece)
        tied = hf_to_gguf.is_tied(self.config, self.architecture)
        head, embedding = pieces.get("output.weight"), pieces.get("token_embd.weight")
        if tied and head is not None and embedding is not None:
            # If the two differ although config.json says they are tied, transformers keeps both, and so do we.
            both = [piece.stored for piece in (head, embedding) if isinstance(piece.stored, StoredTensor)]
            tied = both[0].equals(both[1])
            if tied:
                pieces.drop("output.weight")
        pieces.check_experts(expected, self.name, self.label)
        shapes = {name: pieces.shape(name) for name in pieces.tensors}
        check_shapes(shapes, self.dimensions, tied=tied, where=self.name, label=self.label)

    def _leave_out_further(self) -> None:
        warning = f"{self.name}: {FURTHER_LEFT_OUT}"
        if warning not in self.warnings:
            self.warnings.append(warning)

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


def _piece(place: tensor_names.Place, stored: StoredTensor | Mxfp4Tensor) -> Piece:
    """Return what a stored tensor has of a GGUF tensor."""
    if isinstance(stored, Mxfp4Tensor):
        return Piece(stored, replace(place.part, transposed=False))
    return Piece(replace(stored, shape=tensor_names.without_unit_axis(place.name, stored.shape)), place.part)


def _check_is_model(folder: Path) -> None:
    """Raise DamagedFileError for a LoRA adapter without its model."""
    path = folder / "adapter_config.json"
    if (folder / "config.json").is_file() or not path.is_file():
        return
    base = read_json(path).get("base_model_name_or_path") or "its base model"
    raise DamagedFileError(
        f"{folder}: is a LoRA adapter of {base}, not a model; merge it first (in peft: merge_and_unload, then"
        " save_pretrained) and convert the merged folder"
    )


def _general_metadata(folder: Path, arch: str, weights: int, hub_id: str | None) -> dict[str, GGUFValue]:
    """Return the `general.*` keys (name, size, license ...) that gguf-py finds in the folder."""
    import gguf

    try:
        with _plain_copies(folder) as copies:
            metadata = gguf.Metadata.load(model_path=copies, total_params=weights)
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


@contextlib.contextmanager
def _plain_copies(folder: Path) -> Iterator[Path]:
    """Yield a folder of the same name with the files that gguf-py reads, without byte order marks, which it rejects."""
    with tempfile.TemporaryDirectory(prefix="tritgguf-") as temporary:
        copies = Path(temporary) / (folder.resolve().name or "model")
        copies.mkdir()
        for name in ("README.md", "config.json", "generation_config.json"):
            if (folder / name).is_file():
                check_inside(folder / name)
                (copies / name).write_text(read_text(folder / name), encoding="utf-8", newline="\n")
        yield copies


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
