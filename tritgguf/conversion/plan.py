"""Plan a conversion: the depth, type and order of every tensor in the file."""

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
from tritgguf.architectures.tensor_names import kept_in_float32, quantized_tensor
from tritgguf.conversion.depths import F16_DEPTH, DepthOptions, Sensitivities, apply_rules
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
from tritgguf.conversion.recovery import RecoveryPlan, named, plan_recovery
from tritgguf.errors import TritGgufError
from tritgguf.formats import trit_types
from tritgguf.formats.gguf_header import F16, F32
from tritgguf.formats.gguf_writer import PlannedTensor
from tritgguf.formats.trit_types import TritType
from tritgguf.sources.source import Source
from tritgguf.version import __version__

_EMBEDDINGS, _HEAD = "token_embd.weight", "output.weight"
_SENSITIVITY_WINDOWS = 4  # windows of the calibration text that measure sensitivities


@dataclass(frozen=True)
class ConversionPlan:
    """The decisions that are made before anything is written.

    Attributes:
        source: the model.
        tensors: the file's tensors, in order.
        depths: GGUF name of a tensor -> requested trits per weight, 0 for tensors that are not packed.
        depth: the greatest depth of the layers' matrices.
        recovery: the matrices that are recovered.
        quantizer: quantizer of the other packed matrices.
        metadata: the file's keys and values.
        windows: the calibration text; None for none.

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
        """Name of a matrix -> trits per weight, of the matrices that are packed and not recovered."""
        return {
            matrix: self.depths[tensor.name]
            for tensor in self.tensors
            if trit_types.is_trit_type(tensor.type_id)
            for matrix in tensor.matrices
            if matrix not in self.recovery.fits
        }

    @property
    def kept_unaligned(self) -> list[str]:
        """Matrices that stay in F16 because their row length is not a multiple of 64."""
        return [tensor.name for tensor in self.tensors if self.depths[tensor.name] and tensor.type_id == F16]

    @property
    def warnings(self) -> list[str]:
        """Warnings for the user, one line each."""
        return [
            *self.source.warnings,
            *_requantization_warning(self.source, self.tensors),
            *self.recovery.warnings,
            *self._importance_warning(),
        ]

    def _importance_warning(self) -> list[str]:
        """Warn if the importance matrix lacks matrices; the embeddings have no inputs that could be measured."""
        if not isinstance(self.quantizer, ImportanceSearch):
            return []
        known = self.quantizer.importance or {}
        missing = [name for name in self.quantized_depths if name not in known and name != _EMBEDDINGS]
        if not missing:
            return []
        total = sum(name != _EMBEDDINGS for name in self.quantized_depths)
        return [
            f"the importance matrix has nothing for {len(missing)} of {total} matrices ({named(missing)}), which are"
            " quantized without it; is it of this model?"
        ]

    def job(self, threads: int) -> dict[str, Any]:
        """Return everything that determines the file's bytes, for its journal: hashes and plain values."""
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
            "threads": threads
            if self.windows is not None
            else None,  # results on a text depend on the number of threads
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
    """Plan what a conversion writes.

    Args:
        source: the model.
        options: the requested depths.
        encoder: the encoder of the matrices.
        importance: an importance matrix for the encoder; None if there is none or the encoder has one.
        windows: a text for the encoder and for measuring sensitivities; None if there is none or the encoder has one.
        thread_pool: the threads to use.
        searched: called with the name of each matrix that was searched for dequantized trits, except for the probes.

    Raises:
        TritGgufError: options contradict each other or the source.

    """
    quantizer = quantizer_of(encoder, importance, windows, text_has_other_use=options.choice.needs_text)
    if isinstance(quantizer, Calibrated):
        windows = quantizer.windows
    if isinstance(quantizer, ImportanceSearch):
        _check_columns(source, quantizer.importance or {})
    depths = requested_depths(source, options)
    packable = _packable(source, depths)
    kept = apply_rules(packable, options.choice.keep)
    unpacked = [
        matrix
        for tensor in source.tensors
        if tensor.name in packable and source.packed_depth(tensor.name) is None and kept.get(tensor.name) != F16_DEPTH
        for matrix in tensor.matrices
    ]
    recovery = plan_recovery(source, unpacked, encoder, quantizer, options.max_recovered_depth, thread_pool, searched)
    recovery = recovery.limited(kept)
    remaining = {name: weights for name, weights in packable.items() if name not in recovery.depths}
    depths |= _chosen_depths(source, remaining, kept, options, windows, thread_pool)
    depths |= recovery.depths
    tensors = [planned_tensor(tensor.name, tensor.shape, depths[tensor.name]) for tensor in source.tensors]
    if quantizer.in_block_order:
        # Checkpoints may store block 10 before block 2.
        tensors.sort(key=lambda tensor: block_index(tensor.name))
    depth = max((depths[name] for name in depths if quantized_tensor(name)), default=options.layer_depth)
    metadata = file_metadata(source.metadata, tensors, recovery.encoder, options.choice.describe(options.layer_depth))
    return ConversionPlan(source, tensors, depths, depth, recovery, quantizer, metadata, windows)


def requested_depths(source: Source, options: DepthOptions) -> dict[str, int]:
    """Return the requested depth of every tensor, 0 for tensors that are not packed."""
    packed = {tensor.name: source.packed_depth(tensor.name) for tensor in source.tensors}
    from_trits = any(packed.values())
    requested = {_EMBEDDINGS: options.embedding_depth, _HEAD: options.output_depth}
    if _HEAD not in packed:
        if None not in requested.values() and options.output_depth != options.embedding_depth:
            raise TritGgufError(
                f"{source.name}: output head and embeddings are one tensor; give only one of --output-depth"
                " and --embedding-depth, or the same for both"
            )
        requested[_EMBEDDINGS] = options.output_depth if options.embedding_depth is None else options.embedding_depth
    depths = {}
    for name, already in packed.items():
        if quantized_tensor(name):
            depths[name] = 0 if from_trits and already is None else options.layer_depth
        elif (given := requested.get(name)) is not None:
            depths[name] = given
        else:
            depths[name] = already or 0
    return depths


def _check_columns(source: Source, importance: Importance) -> None:
    """Raise TritGgufError if an importance does not have one value per column of its matrix."""
    columns = {matrix: tensor.shape[-1] for tensor in source.tensors for matrix in tensor.matrices}
    for matrix, given in importance.items():
        if matrix in columns and given.shape != (columns[matrix],):
            raise TritGgufError(
                f"{source.name}: tensor {matrix} has {columns[matrix]} columns, its importance the shape"
                f" {given.shape}; measure the importance of this model"
            )


def _packable(source: Source, depths: dict[str, int]) -> dict[str, int]:
    """Return GGUF name -> number of weights, of the layers' matrices that are packed."""
    return {
        tensor.name: math.prod(tensor.shape)
        for tensor in source.tensors
        if quantized_tensor(tensor.name) and depths[tensor.name] and tensor.shape[-1] % trit_types.BLOCK_SIZE == 0
    }


def _chosen_depths(
    source: Source,
    weights: dict[str, int],
    kept: dict[str, int],
    options: DepthOptions,
    windows: Windows | None,
    thread_pool: ThreadPool,
) -> dict[str, int]:
    """Choose the depths of matrices, name -> number of weights; `kept` are those that rules set."""

    def measure(names: list[str], some_depths: Sequence[int]) -> Sensitivities:
        from tritgguf.calibration.sensitivity import measure_sensitivities

        if windows is None:
            raise TritGgufError("choosing depths by measurement needs a calibration text; give --text or --self")
        return measure_sensitivities(source, names, some_depths, windows[:_SENSITIVITY_WINDOWS], thread_pool)

    return options.choice.depths(weights, kept, options.layer_depth, measure)


def planned_tensor(name: str, shape: tuple[int, ...], depth: int) -> PlannedTensor:
    """Choose a tensor's type in the file: F32 for vectors and routers, trits for matrices with a depth, else F16."""
    weights = int(np.prod(shape, dtype=np.int64))
    if len(shape) == 1 or kept_in_float32(name):
        return PlannedTensor(name, shape, F32, 4 * weights)
    if depth and shape[-1] % trit_types.BLOCK_SIZE == 0:
        rows = weights // shape[-1]
        return PlannedTensor(name, shape, TritType.of_depth(depth), rows * trit_types.row_bytes(depth, shape[-1]))
    return PlannedTensor(name, shape, F16, 2 * weights)


def block_index(name: str) -> int:
    """Return the index of the decoder block in a tensor's GGUF name; -1 if it is in none."""
    block = re.match(r"blk\.(\d+)\.", name)
    return int(block[1]) if block else -1


def _requantization_warning(source: Source, tensors: Sequence[PlannedTensor]) -> list[str]:
    """Warn if packed tensors are decoded and stored in another type."""
    packed = [(source.packed_depth(tensor.name), tensor.type_id) for tensor in tensors]
    decoded = [depth for depth, type_id in packed if depth and TritType.of_depth(depth) != type_id]
    if not decoded:
        return []
    depths = ", ".join(map(str, sorted(set(decoded))))
    return [
        f"{source.name}: {len(decoded)} tensors are packed already (depth {depths}); storing them otherwise adds to"
        " what that lost, so convert the original where you have it"
    ]
