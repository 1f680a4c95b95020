"""What a conversion will write: every tensor's depth, its type and its place in the file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xxhash
from gguf import GGUFValue

from tritgguf.architectures.tensor_names import quantized_tensor
from tritgguf.errors import TritGgufError
from tritgguf.formats import trit_types
from tritgguf.formats.gguf_header import F16, F32
from tritgguf.formats.gguf_writer import PlannedTensor
from tritgguf.formats.trit_types import TritType
from tritgguf.sources.source import Source
from tritgguf.version import __version__

_EMBEDDINGS, _HEAD = "token_embd.weight", "output.weight"


def wanted_depths(source: Source, depth: int, output_depth: int | None, embedding_depth: int | None) -> dict[str, int]:
    """Return the wanted depth of every tensor, 0 for those that are not to be packed."""
    packed = {tensor.name: source.packed(tensor.name) for tensor in source.tensors}
    from_trits = any(packed.values())
    wanted = {_EMBEDDINGS: embedding_depth, _HEAD: output_depth}
    if _HEAD not in packed:
        if None not in wanted.values() and output_depth != embedding_depth:
            raise TritGgufError(
                f"{source.name}: output head and embeddings are one tensor; give only one of --output-depth"
                " and --embedding-depth, or the same for both"
            )
        wanted[_EMBEDDINGS] = output_depth if embedding_depth is None else embedding_depth
    depths = {}
    for name, already in packed.items():
        if quantized_tensor(name):
            depths[name] = 0 if from_trits and already is None else depth
        elif (given := wanted.get(name)) is not None:
            depths[name] = given
        else:
            depths[name] = 0 if already is None else already.depth
    return depths


def planned_tensor(name: str, shape: tuple[int, ...], depth: int) -> PlannedTensor:
    """Choose a tensor's type in the file: trits where there is a depth, F32 for vectors, F16 for the rest."""
    weights = int(np.prod(shape, dtype=np.int64))
    if len(shape) == 1:
        return PlannedTensor(name, shape, F32, 4 * weights)
    if depth and shape[-1] % trit_types.BLOCK_SIZE == 0:
        rows = weights // shape[-1]
        return PlannedTensor(name, shape, TritType.of_depth(depth), rows * trit_types.row_bytes(depth, shape[-1]))
    return PlannedTensor(name, shape, F16, 2 * weights)


def block_of(name: str) -> int:
    """Return the number of the decoder block that a tensor belongs to by its GGUF name; -1 for none."""
    block = re.match(r"blk\.(\d+)\.", name)
    return int(block[1]) if block else -1


def loss_warning(source: Source, plan: list[PlannedTensor]) -> list[str]:
    """Return what to say when tensors are decoded from trits to be stored otherwise."""
    packed = [(source.packed(tensor.name), tensor.type_id) for tensor in plan]
    decoded = [found for found, type_id in packed if found and TritType.of_depth(found.depth) != type_id]
    if not decoded:
        return []
    depths = ", ".join(map(str, sorted({found.depth for found in decoded})))
    return [
        f"{source.name}: {len(decoded)} tensors are packed already (depth {depths}); storing them otherwise adds to"
        " what that lost, so convert the original where you have it"
    ]


def job_of(
    source: Source,
    plan: Sequence[PlannedTensor],
    metadata: Mapping[str, GGUFValue],
    importance: Mapping[str, np.ndarray] | None,
    windows: Sequence[Sequence[int]] | None,
    threads: int,
) -> dict[str, Any]:
    """Return all that decides about a file's bytes, for the journal of a conversion: hashes and plain values."""
    digest = xxhash.xxh3_128()
    for name in sorted(importance or {}):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray((importance or {})[name]).data)
    for window in windows or ():
        digest.update(np.array(window, np.int64).data)
    for key, value in metadata.items():
        digest.update(f"{key}={value.type}:{value.value!r}".encode("utf-8", "surrogatepass"))
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in source.files]
    return {
        "version": __version__,
        "source": sorted(files),
        "tensors": [(tensor.name, tensor.type_id, tensor.n_bytes) for tensor in plan],
        "settings": digest.hexdigest(),
        "threads": threads if windows is not None else None,  # sums of a text depend on them
    }
