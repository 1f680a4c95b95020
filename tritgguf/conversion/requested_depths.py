"""The depth of every tensor that options, recipe and source ask for, before anything is measured or recovered."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from tritgguf.architectures.tensor_names import EMBEDDINGS, HEAD, quantized_tensor
from tritgguf.conversion.depths import F16_DEPTH, DepthOptions
from tritgguf.conversion.recipes import DEFAULT
from tritgguf.errors import TritGgufError
from tritgguf.formats import trit_types
from tritgguf.sources.source import Source

TABLES = (EMBEDDINGS, HEAD)


def requested_depths(source: Source, options: DepthOptions) -> dict[str, int]:
    """Return the requested depth of every tensor, 0 for tensors that are not packed."""
    packed = {tensor.name: source.packed_depth(tensor.name) for tensor in source.tensors}
    from_trits, tied = any(packed.values()), HEAD not in packed
    given = _given_table_depths(source, options)
    recipe = options.recipe or (None if from_trits else DEFAULT)
    by_recipe = {} if recipe is None else recipe.depths(options.layer_depth, tied=tied)
    depths = {}
    for name, already in packed.items():
        if quantized_tensor(name):
            depths[name] = 0 if from_trits and already is None else options.layer_depth
        elif name in given:
            depths[name] = given[name]
        elif name in by_recipe and (already is None or options.recipe is not None):
            depths[name] = by_recipe[name]
        else:
            depths[name] = already or 0
    return depths


def packable_matrices(source: Source, depths: Mapping[str, int]) -> dict[str, int]:
    """Return GGUF name -> number of weights, of the layers' matrices that are packed."""
    return {
        tensor.name: math.prod(tensor.shape)
        for tensor in source.tensors
        if quantized_tensor(tensor.name) and depths[tensor.name] and tensor.shape[-1] % trit_types.BLOCK_SIZE == 0
    }


def unpacked_matrices(source: Source, packable: Collection[str], kept: Mapping[str, int]) -> list[str]:
    """Return the matrices to pack that are not packed in the source."""
    return [
        matrix
        for tensor in source.tensors
        if tensor.name in packable and source.packed_depth(tensor.name) is None and kept.get(tensor.name) != F16_DEPTH
        for matrix in tensor.matrices
    ]


def _given_table_depths(source: Source, options: DepthOptions) -> dict[str, int]:
    """Return the depths of the embeddings and of the output head that the user gave, by GGUF name."""
    requested = {EMBEDDINGS: options.embedding_depth, HEAD: options.output_depth}
    if all(tensor.name != HEAD for tensor in source.tensors):
        if None not in requested.values() and options.output_depth != options.embedding_depth:
            raise TritGgufError(
                f"{source.name}: output head and embeddings are one tensor; give only one of --output-depth"
                " and --embedding-depth, or the same for both"
            )
        either = options.output_depth if options.embedding_depth is None else options.embedding_depth
        requested = {EMBEDDINGS: either}
    return {name: depth for name, depth in requested.items() if depth is not None}


def free_tables(source: Source, options: DepthOptions) -> dict[str, int]:
    """Return GGUF name -> number of weights, of embeddings and head whose depth neither user nor source determine."""
    given = _given_table_depths(source, options)
    from_trits = any(source.packed_depth(tensor.name) for tensor in source.tensors)
    if options.recipe is not None or from_trits:
        return {}
    return {
        tensor.name: math.prod(tensor.shape)
        for tensor in source.tensors
        if tensor.name in TABLES and tensor.name not in given and tensor.shape[-1] % trit_types.BLOCK_SIZE == 0
    }
