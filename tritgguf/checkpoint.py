"""The sources of a conversion: a Hugging Face folder, a hub id, a GGUF file.

Whatever the source, `convert` sees the same: metadata as llama.cpp's converter would write it, and tensors
under GGUF names, read one at a time, as they are stored or as float32. Everything that can be wrong with a
source short of its weights' values is found when it is opened, before a byte of output is written.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tritgguf import architectures, model_keys
from tritgguf.architectures import Dimensions, biased_matrices
from tritgguf.errors import TritGgufError
from tritgguf.hf_files import READABLE_DTYPES, StoredTensor, is_unicode, open_shards, read_json, to_float32
from tritgguf.matrix_rows import MatrixRows
from tritgguf.rope import ROPE_FREQS
from tritgguf.tokenizer_metadata import HUGGINGFACE_JSON_KEY, tokenizer_json_from_gguf, tokenizer_metadata
from tritgguf.trit_types import TritType, is_trit_type

if TYPE_CHECKING:
    from gguf import GGUFValue

    from tritgguf.gguf_file import GgufFile

# `convert` writes these for what the new file holds.
_KEYS_OF_THE_OUTPUT = ("general.file_type", "general.quantization_version")
# Buffers that old checkpoints carry beside the weights; llama.cpp's converter passes over the same three.
_BUFFERS = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_PATTERNS = ["*.safetensors", "*.json", "tokenizer.model", "*.txt", "*.jinja", "README.md"]
# Subfolders and `consolidated` files hold the same weights again in their makers' own formats.
_HUB_IGNORED = ["*/*", "consolidated*"]


@dataclass(frozen=True)
class SourceTensor:
    """A tensor that goes into the file: GGUF name, shape in NumPy order, bytes it takes in the source."""

    name: str
    shape: tuple[int, ...]
    stored_bytes: int


@dataclass(frozen=True)
class PackedTensor:
    """A tensor that the source holds in trits: packed rows, uint8, of a depth, and their scales, float32 [27]."""

    depth: int
    data: np.ndarray
    codebook: np.ndarray


class Source(Protocol):
    """What `convert` and `verify` read."""

    name: str
    """The path or hub id, for messages."""
    metadata: dict[str, GGUFValue]
    """llama.cpp's keys in its order, then tokenizer.huggingface.json; none that describes tensor types."""
    tensors: list[SourceTensor]
    """In the order of the file; `output.weight` only where the head is not the embedding."""
    warnings: list[str]
    """What the user should know although it stops nothing; a line each."""
    files: list[Path]
    """What is read; a change of one of them is a change of the source."""

    def read(self, name: str) -> np.ndarray:
        """Return a tensor by its GGUF name: float32, contiguous, rows in GGUF's order; nothing is kept."""

    def rows(self, name: str) -> MatrixRows:
        """Return it in the source's own numbers, to be read some rows at a time; a vector is a single row.

        Of a type other than F32, F16 and BF16, float32. What is read may be a view of the source, until `release`.
        """

    def packed(self, name: str) -> PackedTensor | None:
        """Return a tensor that is in trits already, as views of the source; None for any other."""

    def release(self, name: str) -> None:
        """Let go of the memory behind a tensor's views."""


def open_source(location: str | Path, *, revision: str | None = None) -> Source:
    """Open a folder, a GGUF file, or, where there is neither, an `organization/name` of the Hugging Face hub.

    `revision` is a branch, tag or commit of the hub. Raises TritGgufError for everything that is wrong with
    the source.
    """
    path = Path(location)
    if path.is_dir():
        return HfFolderSource(path)
    if path.is_file():
        return GgufSource(path)
    if _HUB_ID.fullmatch(str(location)) is None or str(location).endswith((".gguf", ".safetensors")):
        raise TritGgufError(f"{location}: no such file or folder, and no hub id (organization/name) either")
    return HfFolderSource(_download(str(location), revision), hub_id=str(location))


class HfFolderSource:
    """A local Hugging Face folder: config.json, safetensors, tokenizer.json."""

    def __init__(self, folder: Path, *, hub_id: str | None = None) -> None:
        self.folder = folder
        self.files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
        self.name = hub_id or str(folder)
        self.warnings: list[str] = []
        where = folder / "config.json"
        self.config = read_json(where)
        self.architecture = architectures.find_architecture(self.config, str(where))
        if self.config.get("quantization_config"):
            method = _get(self.config["quantization_config"], "quant_method", "an unknown method")
            raise TritGgufError(
                f"{where}: the weights are already quantized ({method}); convert the original checkpoint"
            )
        self.dimensions = architectures.dimensions_from_config(self.config, str(where))
        self._rows: dict[str, MatrixRows] = {}
        self.tensors: list[SourceTensor] = []
        self._add_rope_factors(where)
        for name, stored in self._select_tensors().items():
            self.tensors.append(SourceTensor(name, stored.shape, stored.n_bytes))
            self._rows[name] = self._rows_of(name, stored)
        self.metadata = self._make_metadata(where, hub_id)

    def read(self, name: str) -> np.ndarray:
        """Return a tensor by its GGUF name: float32, contiguous, rows in GGUF's order.

        Raises TritGgufError when the shard has been cut short or taken away since it was opened.
        """
        shape = next(tensor.shape for tensor in self.tensors if tensor.name == name)
        return to_float32(self._rows[name].whole()).reshape(shape)

    def rows(self, name: str) -> MatrixRows:
        """Return a tensor as it is stored: float32, float16 or the bits of bfloat16; raises as `read` does."""
        return self._rows[name]

    def packed(self, name: str) -> PackedTensor | None:
        """Return None: no folder holds trits."""
        return None

    def release(self, name: str) -> None:
        """Do nothing: what was read belongs to its reader."""

    def _add_rope_factors(self, where: Path) -> None:
        factors = model_keys.rope_factors(self.config, str(where))
        if factors is not None:
            self.tensors.append(SourceTensor(ROPE_FREQS, factors.shape, factors.nbytes))
            self._rows[ROPE_FREQS] = MatrixRows(
                (1, len(factors)), factors.dtype, lambda first, last: factors[np.newaxis].copy(), 1
            )

    def _rows_of(self, name: str, stored: StoredTensor) -> MatrixRows:
        """Return a tensor with its rows in GGUF's order, which differs within a head only."""
        is_vector = len(stored.shape) == 1
        shape = (1, stored.shape[0]) if is_vector else (stored.shape[0], stored.shape[1])
        head_dim = self.dimensions.head_dim

        def read(first: int, last: int) -> np.ndarray:
            part = stored.read_rows(0, stored.shape[0]) if is_vector else stored.read_rows(first, last)
            heads = len(part) // head_dim
            return architectures.from_hf(self.architecture.gguf_name, name, part, heads, heads).reshape(-1, shape[1])

        return MatrixRows(shape, READABLE_DTYPES[stored.dtype], read, 1 if is_vector else head_dim)

    def _select_tensors(self) -> dict[str, StoredTensor]:
        """Return the tensors that go into the file by GGUF name, all of them checked against config.json."""
        selected: dict[str, StoredTensor] = {}
        for hf_name, stored in open_shards(self.folder).items():
            if hf_name.endswith(_BUFFERS):
                continue
            name = architectures.gguf_tensor_name(self.architecture.gguf_name, hf_name)
            if name is None:
                raise TritGgufError(
                    f"{stored.path}: tensor {hf_name} does not belong to a {self.architecture.hf_class}"
                )
            if stored.dtype not in READABLE_DTYPES:
                raise TritGgufError(
                    f"{stored.path}: tensor {hf_name} has dtype {stored.dtype}; F32, F16 or BF16 is needed"
                )
            selected[name] = stored
        tied = model_keys.is_tied(self.config, self.architecture)
        head, embedding = selected.get("output.weight"), selected.get("token_embd.weight")
        if tied and head is not None and embedding is not None:
            # Where the two differ in spite of what config.json says, transformers keeps both, and so do we.
            tied = head.equals(embedding)
            if tied:
                del selected["output.weight"]
        shapes = {name: stored.shape for name, stored in selected.items()}
        _check_shapes(shapes, self.dimensions, tied=tied, where=self.name, label=self._label)
        return selected

    def _label(self, gguf_name: str) -> str:
        return architectures.hf_tensor_name(self.architecture.gguf_name, gguf_name)

    def _make_metadata(self, where: Path, hub_id: str | None) -> dict[str, GGUFValue]:
        weights = sum(math.prod(tensor.shape) for tensor in self.tensors)
        general = _general_metadata(self.folder, self.architecture.gguf_name, weights, hub_id)
        model = model_keys.gguf_metadata(self.config, str(where))
        tokenizer, warnings = tokenizer_metadata(
            self.folder,
            self.dimensions.vocabulary,
            add_space_prefix_key=self.architecture.gguf_name == "llama",
        )
        self.warnings += warnings
        return {**general, **model, **tokenizer}


class GgufSource:
    """A GGUF file of an architecture in the table: a trit file, or of any types that gguf-py dequantizes."""

    def __init__(self, path: Path) -> None:
        from tritgguf.gguf_file import GgufFile

        self.name = str(path)
        self.files = [path]
        self.warnings: list[str] = []
        self._file = GgufFile(path)
        if self._file.metadata.get("split.count", 0) not in (0, 1):
            raise TritGgufError(f"{path}: is one part of a split model; merge the parts with llama-gguf-split --merge")
        self.dimensions = self._check_tensors()
        self.tensors = [SourceTensor(info.name, info.shape, info.n_bytes) for info in self._file.tensors.values()]
        self.metadata = _gguf_metadata(self._file)

    def read(self, name: str) -> np.ndarray:
        """Return a tensor dequantized: float32, contiguous; TritGgufError for a type that cannot be."""
        weights = np.ascontiguousarray(self._file.read_float32(name))
        self._file.release(name)
        return weights

    def rows(self, name: str) -> MatrixRows:
        """Return a tensor's numbers as views of the file where they are F32, F16 or BF16; otherwise dequantized."""
        info = self._file.tensors[name]
        shape = (info.n_weights // info.shape[-1], info.shape[-1])
        is_readable = info.type_name in READABLE_DTYPES
        dtype = READABLE_DTYPES.get(info.type_name, np.dtype(np.float32))

        def read(first: int, last: int) -> np.ndarray:
            if not is_readable:
                return self._file.read_rows(name, first, last)
            raw = self._file.raw(name).reshape(shape[0], -1)[first:last].reshape(-1)
            raw[:: mmap.PAGESIZE].max()  # brings the pages in, so that whoever computes need not wait for the disk
            return raw.view(dtype).reshape(-1, shape[1])

        return MatrixRows(shape, dtype, read, 1)

    def packed(self, name: str) -> PackedTensor | None:
        """Return a trit tensor as views of the file; None for any other."""
        info = self._file.tensors[name]
        if not is_trit_type(info.type_id):
            return None
        return PackedTensor(TritType(info.type_id).depth, self._file.raw(name), self._file.codebook(name))

    def release(self, name: str) -> None:
        """Let go of the pages of the file that a tensor lies in."""
        self._file.release(name)

    def _check_tensors(self) -> Dimensions:
        shapes = {info.name: info.shape for info in self._file.tensors.values()}
        biased = biased_matrices(name for name in shapes if name.startswith("blk.0."))
        vocabulary = shapes.get("token_embd.weight", (1,))[0]
        dimensions = architectures.dimensions_from_gguf(self._file.metadata, vocabulary, biased, self.name)
        factors = shapes.pop(ROPE_FREQS, None)
        if factors not in (None, (dimensions.head_dim // 2,)):
            raise TritGgufError(
                f"{self.name}: tensor {ROPE_FREQS} has shape {factors}, not ({dimensions.head_dim // 2},)"
            )
        _check_shapes(shapes, dimensions, tied="output.weight" not in shapes, where=self.name, label=str)
        return dimensions


def _general_metadata(folder: Path, arch: str, weights: int, hub_id: str | None) -> dict[str, GGUFValue]:
    """Return the `general.*` keys (name, size, licence ...) that gguf-py finds in the folder."""
    import gguf

    try:
        metadata = gguf.Metadata.load(model_path=folder, total_params=weights)
    except Exception:  # a model card that gguf-py cannot read is no reason to refuse the weights
        metadata = gguf.Metadata()
    if hub_id is not None:
        # The folder of a download is named by its commit.
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
    """Tell whether a value from a model card, which may be anything, is what its key's type says."""
    from gguf import GGUFValueType

    found = value.value
    if value.type == GGUFValueType.ARRAY:
        return isinstance(found, list) and all(isinstance(item, str) and is_unicode(item) for item in found)
    if value.type == GGUFValueType.STRING:
        return isinstance(found, str) and is_unicode(found)
    if value.type == GGUFValueType.FLOAT32:
        return isinstance(found, int | float) and abs(found) < 1e30
    return type(found) is int and 0 <= found < 1 << 31


def _gguf_metadata(file: GgufFile) -> dict[str, GGUFValue]:
    """Return a file's keys unchanged, and tokenizer.huggingface.json, made where the file has none.

    The output has its own keys of trits and of its types.
    """
    from gguf import GGUFValue, GGUFValueType

    metadata = {key: value for key, value in file.stock_metadata().items() if key not in _KEYS_OF_THE_OUTPUT}
    if HUGGINGFACE_JSON_KEY not in metadata:
        text = tokenizer_json_from_gguf(file.metadata, where=str(file.path))
        metadata[HUGGINGFACE_JSON_KEY] = GGUFValue(value=text, type=GGUFValueType.STRING)
    return metadata


def _check_shapes(
    shapes: Mapping[str, tuple[int, ...]],
    dimensions: Dimensions,
    *,
    tied: bool,
    where: str,
    label: Callable[[str], str],
) -> None:
    """Raise TritGgufError for a tensor that is missing, in excess or of another shape than the sizes demand.

    `shapes` are those found, by GGUF name; `label` turns such a name into the one the source has.
    """
    expected = dimensions.shapes()
    if tied:
        del expected["output.weight"]
    for name, shape in expected.items():
        if name not in shapes:
            raise TritGgufError(f"{where}: tensor {label(name)} is missing")
        if shapes[name] != shape:
            raise TritGgufError(
                f"{where}: tensor {label(name)} has shape {shapes[name]}, but the config demands {shape}"
            )
    for name in shapes:
        if name not in expected:
            raise TritGgufError(f"{where}: tensor {label(name)} does not belong to a model with this config")


def _get(value: Any, key: str, default: str) -> str:
    return str(value.get(key, default)) if isinstance(value, dict) else default


def _download(hub_id: str, revision: str | None) -> Path:
    """Bring a model of the hub into the local cache and return its folder."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = snapshot_download(
            hub_id, revision=revision, allow_patterns=_HUB_PATTERNS, ignore_patterns=_HUB_IGNORED
        )
    except GatedRepoError as error:
        raise TritGgufError(
            f"{hub_id}: access is gated; accept its terms on the hub and log in (`hf auth login`)"
        ) from error
    except RepositoryNotFoundError as error:
        raise TritGgufError(f"{hub_id}: no such file or folder here, and no such model on the hub") from error
    except RevisionNotFoundError as error:
        raise TritGgufError(f"{hub_id}: the hub has no revision {revision} of this model") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise TritGgufError(f"{hub_id}: the hub cannot be reached; give a local folder or go online") from error
    except Exception as error:  # which classes a transport raises depends on huggingface_hub's version
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise TritGgufError(f"{hub_id}: the download from the hub failed ({first_line})") from error
    return Path(folder)
