"""The metadata of a packed file: the source's keys, then the trit keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from gguf import GGUFValue, GGUFValueType, LlamaFileType

from tritgguf.formats import trit_types
from tritgguf.formats.gguf_writer import PlannedTensor
from tritgguf.formats.stacks import matrix_count


def file_metadata(
    of_model: Mapping[str, GGUFValue], plan: list[PlannedTensor], encoder: str, depths: str
) -> dict[str, GGUFValue]:
    """Return the model's keys and the trit keys; codebooks and checksums are zeros until their tensor is written."""
    metadata = dict(of_model)
    # llama.cpp has no file type for this mix; GUESSED means that the tensors' types decide.
    metadata["general.file_type"] = GGUFValue(int(LlamaFileType.GUESSED), GGUFValueType.UINT32)
    metadata["general.quantization_version"] = GGUFValue(2, GGUFValueType.UINT32)
    metadata[trit_types.KEY_VERSION] = GGUFValue(trit_types.FORMAT_VERSION, GGUFValueType.UINT32)
    metadata[trit_types.KEY_CODEC] = GGUFValue(trit_types.CODEC_NAME, GGUFValueType.STRING)
    metadata[trit_types.KEY_ENCODER] = GGUFValue(encoder, GGUFValueType.STRING)
    if depths:
        metadata[trit_types.KEY_DEPTHS] = GGUFValue(depths, GGUFValueType.STRING)
    metadata[trit_types.KEY_GROUP_SIZE] = GGUFValue(trit_types.GROUP_SIZE, GGUFValueType.UINT32)
    metadata[trit_types.KEY_SCALE_DEPTH] = GGUFValue(trit_types.SCALE_DEPTH, GGUFValueType.UINT32)
    for tensor in plan:
        if trit_types.is_trit_type(tensor.type_id):
            metadata[trit_types.codebook_key(tensor.name)] = codebook_value(
                [0.0] * (trit_types.CODEBOOK_SIZE * matrix_count(tensor.shape))
            )
    for tensor in plan:
        metadata[trit_types.checksum_key(tensor.name)] = checksum_value(0)
    return metadata


def codebook_value(codebook: Sequence[float] | np.ndarray) -> GGUFValue:
    """Return codebooks, one after the other, as a metadata value."""
    return GGUFValue([float(entry) for entry in codebook], GGUFValueType.ARRAY, GGUFValueType.FLOAT32)


def checksum_value(checksum: int) -> GGUFValue:
    """Return a checksum as a metadata value."""
    return GGUFValue(checksum, GGUFValueType.UINT64)
