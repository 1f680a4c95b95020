"""Reading safetensors shards of an untrusted Hugging Face folder.

Pickled weights are never loaded. The safetensors library checks each shard: header, shapes, types, and offsets that
cover the file exactly. We then read the bytes ourselves, because the library's NumPy interface lacks BF16. We use plain
reads instead of a memory map, so that a large checkpoint does not count as memory in use.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tritgguf.errors import DamagedFileError, TritGgufError
from tritgguf.formats.checked import check_inside, read_json
from tritgguf.formats.dtypes import STORED_DTYPES, to_float32
from tritgguf.formats.file_kinds import HEAD_BYTES, foreign_kind

_INDEX_NAME = "model.safetensors.index.json"
_SINGLE_NAME = "model.safetensors"
_SHARD_NAME = re.compile(r"model-(\d{1,6})-of-(\d{1,6})\.safetensors")
_PICKLED = ("*.bin", "*.pth", "*.pt", "*.ckpt")
_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's entry: `dtype` as safetensors names it, `offset` from the file's start."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int

    def read(self) -> np.ndarray:
        """Return the tensor as a new float32 array of its shape; exact."""
        return to_float32(self.read_stored())

    def read_stored(self) -> np.ndarray:
        """Return the tensor in its own dtype: float32, float16, uint8, or uint16 for the bits of BF16."""
        return self.read_rows(0, self.shape[0])

    def read_rows(self, first: int, last: int) -> np.ndarray:
        """Return rows (of a vector: elements) `first` to `last` (exclusive), in the dtype of `read_stored`."""
        stored = np.empty((last - first, *self.shape[1:]), STORED_DTYPES[self.dtype])
        row_bytes = self.n_bytes // self.shape[0]
        self._read_into(stored.reshape(-1).view(np.uint8), first * row_bytes)
        return stored

    def read_flat(self, first: int, last: int, step: int = 1) -> np.ndarray:
        """Return every `step`th row from `first` to before `last`, of all matrices counted through: [rows, columns]."""
        columns = self.shape[-1]
        return replace(self, shape=(math.prod(self.shape[:-1]), columns)).read_rows(first, last)[::step]

    def equals(self, other: StoredTensor) -> bool:
        """Tell whether another tensor has the same dtype, shape and bytes."""
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        mine, others = np.empty((2, min(self.n_bytes, _CHUNK_BYTES)), np.uint8)
        for start in range(0, self.n_bytes, _CHUNK_BYTES):
            length = min(_CHUNK_BYTES, self.n_bytes - start)
            self._read_into(mine[:length], start)
            other._read_into(others[:length], start)
            if not np.array_equal(mine[:length], others[:length]):
                return False
        return True

    def _read_into(self, buffer: np.ndarray, start: int) -> None:
        """Fill a uint8 buffer with the tensor's bytes, starting at `start`."""
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.offset + start)
                view = memoryview(buffer.data)
                while view:
                    # One call returns at most 2 GiB.
                    count = file.readinto(view)
                    if not count:
                        raise DamagedFileError(f"{self.path}: ends inside tensor {self.name}; fetch the file again")
                    view = view[count:]
        except OSError as error:
            raise TritGgufError(f"{self.path}: tensor {self.name} cannot be read ({error.strerror})") from error


def open_shards(folder: Path) -> dict[str, StoredTensor]:
    """Return all tensors of a folder's safetensors files by their Hugging Face names.

    Shards are sorted by name, and the tensors of a shard too, as in llama.cpp's converter. The index names the shards;
    as in transformers, it may list tensors that no shard has, such as a tied head. Raises TritGgufError for a
    folder without safetensors files, a missing, damaged or truncated shard, an index that contradicts the shards and a
    tensor that occurs twice.
    """
    tensors: dict[str, StoredTensor] = {}
    weight_map = None
    if (folder / _SINGLE_NAME).is_file():
        names = [_SINGLE_NAME]
    elif (folder / _INDEX_NAME).is_file():
        weight_map = _read_weight_map(folder / _INDEX_NAME)
        names = sorted(set(weight_map.values()))
    else:
        names = _list_shards(folder)
    for name in names:
        for tensor in _open_shard(folder / name):
            if tensor.name in tensors:
                raise DamagedFileError(
                    f"{tensor.path}: tensor {tensor.name} is also in {tensors[tensor.name].path.name}"
                )
            if weight_map is not None and weight_map.get(tensor.name, name) != name:
                raise DamagedFileError(f"{tensor.path}: {_INDEX_NAME} places tensor {tensor.name} in another shard")
            tensors[tensor.name] = tensor
    return tensors


def _read_weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DamagedFileError(f"{path}: has no `weight_map`; fetch the file again")
    for file_name in weight_map.values():
        is_plain = isinstance(file_name, str) and re.fullmatch(r"[\w.-]+\.safetensors", file_name) is not None
        if not is_plain or file_name.startswith("."):
            raise DamagedFileError(f"{path}: {file_name!r} is not the name of a safetensors file in this folder")
    return weight_map


def _list_shards(folder: Path) -> list[str]:
    """Return the names of all shards of a folder without an index; TritGgufError if one is missing."""
    parts = [match for path in folder.iterdir() if (match := _SHARD_NAME.fullmatch(path.name))]
    if not parts:
        pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
        if pickled:
            raise DamagedFileError(
                f"{folder}: has only pickled weights ({pickled[0]}), which can run code when they are loaded;"
                " save the model as safetensors (save_pretrained in transformers) and convert that"
            )
        raise DamagedFileError(
            f"{folder}: has no {_SINGLE_NAME} and no shards (model-00001-of-...); nothing to convert"
        )
    count = int(parts[0][2])
    present = {int(part[1]) for part in parts if int(part[2]) == count}
    if len(present) != len(parts) or present != set(range(1, count + 1)):
        raise DamagedFileError(
            f"{folder}: has {len(parts)} shards that are not the parts 1 to {count}; fetch the missing ones"
        )
    return sorted(part.string for part in parts)


def _open_shard(path: Path) -> list[StoredTensor]:
    from safetensors import SafetensorError, safe_open

    check_inside(path)
    if not path.is_file():
        raise DamagedFileError(f"{path}: this shard is missing; fetch it")
    head = b""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
        with safe_open(str(path), framework="np"):
            pass  # opening checks it
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_bytes))
    except (SafetensorError, ValueError) as error:
        kind = foreign_kind(head) or f"truncated or damaged ({error}); fetch the file again"
        raise DamagedFileError(f"{path}: {kind}") from error
    except OSError as error:
        raise TritGgufError(f"{path}: cannot be read ({error.strerror})") from error
    tensors = []
    for name, entry in sorted(header.items()):
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        tensors.append(StoredTensor(path, name, entry["dtype"], shape, 8 + header_bytes + begin, end - begin))
    return tensors
