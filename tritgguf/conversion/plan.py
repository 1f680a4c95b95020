"""What a conversion will write: every tensor's depth, its type and its place in the file."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from gguf import GGUFValue

from cpu_kernels.threads.thread_pool import ThreadPool
from tritgguf.architectures.tensor_names import quantized_tensor
from tritgguf.conversion.depths import DepthOptions, Sensitivities
from tritgguf.conversion.encoders import (
    Calibrated,
    Encoder,
    Importance,
    ImportanceSearch,
    Quantizer,
    Windows,
    quantizer_of,
)
from tritgguf.conversion.file_metadata import file_metadata
from tritgguf.conversion.recovery import RecoveryPlan, plan_recovery
from tritgguf.errors import TritGgufError
from tritgguf.formats import trit_types
from tritgguf.formats.gguf_header import F16, F32
from tritgguf.formats.gguf_writer import PlannedTensor
from tritgguf.formats.trit_types import TritType
from tritgguf.sources.source import Source
from tritgguf.version import __version__

_EMBEDDINGS, _HEAD = "token_embd.weight", "output.weight"
_SENSITIVITY_WINDOWS = 4  # of the calibration text


@dataclass(frozen=True)
class ConversionPlan:
    """All that is decided before anything is written.

    Attributes:
        source: the model.
        tensors: what the file will hold, in its order.
        depths: GGUF name -> wanted trits per weight, 0 for tensors that are not to be packed.
        depth: the greatest depth of the layers' matrices.
        recovery: which matrices are recovered.
        quantizer: for the other matrices that are packed.
        metadata: the file's keys and values.
        windows: the text that the file's bytes depend on; None for none.

    """

    source: Source
    tensors: list[PlannedTensor]
    depths: dict[str, int]
    depth: int
    recovery: RecoveryPlan
    quantizer: Quantizer
    metadata: dict[str, GGUFValue]
    windows: Windows | None

    @property
    def quantized_depths(self) -> dict[str, int]:
        """GGUF name -> trits per weight, of the matrices that are packed and not recovered."""
        return {
            tensor.name: self.depths[tensor.name]
            for tensor in self.tensors
            if trit_types.is_trit_type(tensor.type_id) and tensor.name not in self.recovery.fits
        }

    @property
    def kept_unaligned(self) -> list[str]:
        """Matrices that stay in F16 because their row length is no multiple of 64."""
        return [tensor.name for tensor in self.tensors if self.depths[tensor.name] and tensor.type_id == F16]

    @property
    def warnings(self) -> list[str]:
        """What the user should know, a line each."""
        return [*self.source.warnings, *_loss_warning(self.source, self.tensors), *self.recovery.warnings]

    def job(self, threads: int) -> dict[str, Any]:
        """Return all that decides about the file's bytes, for its journal: hashes and plain values."""
        importance = self.quantizer.importance if isinstance(self.quantizer, ImportanceSearch) else None
        digest = xxhash.xxh3_128()
        for name in sorted(importance or {}):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray((importance or {})[name]).data)
        for window in self.windows or ():
            digest.update(np.array(window, np.int64).data)
        for key, value in self.metadata.items():
            digest.update(f"{key}={value.type}:{value.value!r}".encode("utf-8", "surrogatepass"))
        files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self.source.files]
        return {
            "version": __version__,
            "source": sorted(files),
            "tensors": [(tensor.name, tensor.type_id, tensor.n_bytes) for tensor in self.tensors],
            "settings": digest.hexdigest(),
            "threads": threads if self.windows is not None else None,  # sums of a text depend on them
        }


def plan_conversion(
    source: Source,
    options: DepthOptions,
    encoder: Encoder,
    importance: Importance | None,
    windows: Windows | None,
    thread_pool: ThreadPool,
    searched: Callable[[str], None] = lambda name: None,
) -> ConversionPlan:
    """Decide what a conversion writes.

    Args:
        source: the model.
        options: the depths that are wanted.
        encoder: how matrices are encoded.
        importance: an importance matrix for the encoder; None for none, or where it has one.
        windows: a text for the encoder and for the choice of depths; None for none, or where the encoder has one.
        thread_pool: the threads to use.
        searched: called with the name of each matrix that was searched for dequantized trits, except the first few.

    Raises:
        TritGgufError: options contradict each other or the source.

    """
    quantizer = quantizer_of(encoder, importance, windows, text_has_other_use=options.choice.needs_text)
    if isinstance(quantizer, Calibrated):
        windows = quantizer.windows
    if isinstance(quantizer, ImportanceSearch):
        _check_columns(source, quantizer.importance or {})
    depths = wanted_depths(source, options)
    unpacked = [name for name in _packable(source, depths) if source.packed(name) is None]
    recovery = plan_recovery(source, unpacked, encoder, quantizer, options.deepest_recovered, thread_pool, searched)
    depths |= _chosen_depths(source, depths, recovery, options, windows, thread_pool)
    depths |= {name: fit.depth for name, fit in recovery.fits.items()}
    tensors = [planned_tensor(tensor.name, tensor.shape, depths[tensor.name]) for tensor in source.tensors]
    if quantizer.in_block_order:
        tensors.sort(key=lambda tensor: block_of(tensor.name))  # checkpoints may have the tenth block before the second
    depth = max((depths[name] for name in depths if quantized_tensor(name)), default=options.of_layers)
    metadata = file_metadata(source, tensors, recovery.encoder, options.choice.describe(options.of_layers))
    return ConversionPlan(source, tensors, depths, depth, recovery, quantizer, metadata, windows)


def wanted_depths(source: Source, options: DepthOptions) -> dict[str, int]:
    """Return the wanted depth of every tensor, 0 for those that are not to be packed."""
    packed = {tensor.name: source.packed(tensor.name) for tensor in source.tensors}
    from_trits = any(packed.values())
    wanted = {_EMBEDDINGS: options.embedding_depth, _HEAD: options.output_depth}
    if _HEAD not in packed:
        if None not in wanted.values() and options.output_depth != options.embedding_depth:
            raise TritGgufError(
                f"{source.name}: output head and embeddings are one tensor; give only one of --output-depth"
                " and --embedding-depth, or the same for both"
            )
        wanted[_EMBEDDINGS] = options.output_depth if options.embedding_depth is None else options.embedding_depth
    depths = {}
    for name, already in packed.items():
        if quantized_tensor(name):
            depths[name] = 0 if from_trits and already is None else options.of_layers
        elif (given := wanted.get(name)) is not None:
            depths[name] = given
        else:
            depths[name] = 0 if already is None else already.depth
    return depths


def _check_columns(source: Source, importance: Importance) -> None:
    """Raise TritGgufError where importance has not a number for each column of its matrix."""
    for tensor in source.tensors:
        given = importance.get(tensor.name)
        if given is not None and given.shape != tensor.shape[-1:]:
            raise TritGgufError(
                f"{source.name}: tensor {tensor.name} has {tensor.shape[-1]} columns, its importance the shape"
                f" {given.shape}; measure the importance of this model"
            )


def _packable(source: Source, depths: dict[str, int]) -> dict[str, int]:
    """Return GGUF name -> number of weights, of the layers' matrices that are to be packed and can be."""
    return {
        tensor.name: math.prod(tensor.shape)
        for tensor in source.tensors
        if quantized_tensor(tensor.name) and depths[tensor.name] and tensor.shape[-1] % trit_types.BLOCK_SIZE == 0
    }


def _chosen_depths(
    source: Source,
    depths: dict[str, int],
    recovery: RecoveryPlan,
    options: DepthOptions,
    windows: Windows | None,
    thread_pool: ThreadPool,
) -> dict[str, int]:
    """Return the depths of the layers' matrices that are packed and not recovered."""

    def measure(names: list[str], some_depths: Sequence[int]) -> Sensitivities:
        from tritgguf.calibration.sensitivity import measure_sensitivities

        if windows is None:
            raise TritGgufError("choosing depths by measurement needs a calibration text; give --text or --self")
        return measure_sensitivities(source, names, some_depths, windows[:_SENSITIVITY_WINDOWS], thread_pool)

    weights = {name: n for name, n in _packable(source, depths).items() if name not in recovery.fits}
    return options.choice.depths(weights, options.of_layers, measure)


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


def _loss_warning(source: Source, tensors: Sequence[PlannedTensor]) -> list[str]:
    """Return the warning that tensors are decoded from trits to be stored otherwise, where some are."""
    packed = [(source.packed(tensor.name), tensor.type_id) for tensor in tensors]
    decoded = [found for found, type_id in packed if found and TritType.of_depth(found.depth) != type_id]
    if not decoded:
        return []
    depths = ", ".join(map(str, sorted({found.depth for found in decoded})))
    return [
        f"{source.name}: {len(decoded)} tensors are packed already (depth {depths}); storing them otherwise adds to"
        " what that lost, so convert the original where you have it"
    ]
