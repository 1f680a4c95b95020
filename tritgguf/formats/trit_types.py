"""The four trit tensor types: ids, sizes and registration with gguf-py.

The numbers are from section 1 of the specification, `docs/format.md`.
"""

from __future__ import annotations

import enum
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

DEPTHS = (1, 2, 3, 4)
GROUP_SIZE = 16
BLOCK_SIZE = 64
CODEBOOK_SIZE = 27
SCALE_DEPTH = 3
FORMAT_VERSION = 1

KEY_VERSION = "trit.version"
CHECKSUM_PREFIX = "trit.xxh3."
KEY_CODEC = "trit.codec"
KEY_ENCODER = "trit.encoder"
KEY_DEPTHS = "trit.depths"
KEY_GROUP_SIZE = "trit.group_size"
KEY_SCALE_DEPTH = "trit.scale_depth"
CODEC_NAME = "tritllm-v2"

_FIRST_TYPE_ID = 10001
_BLOCK_BYTES = {1: 16, 2: 28, 3: 42, 4: 54}


class TritType(enum.IntEnum):
    """The ggml type ids of trit tensors, far above the ids that upstream and its forks use."""

    TRIT1 = 10001
    TRIT2 = 10002
    TRIT3 = 10003
    TRIT4 = 10004

    @property
    def depth(self) -> int:
        """Trits per weight."""
        return self.value - _FIRST_TYPE_ID + 1

    @classmethod
    def of_depth(cls, depth: int) -> TritType:
        """Return the type for a depth from 1 to 4."""
        return cls(_FIRST_TYPE_ID + depth - 1)


def is_trit_type(type_id: int) -> bool:
    """Tell whether a ggml type id is one of the four trit types."""
    return type_id in TritType._value2member_map_


def block_bytes(depth: int) -> int:
    """Return the bytes of a block of 64 weights."""
    return _BLOCK_BYTES[depth]


def row_bytes(depth: int, columns: int) -> int:
    """Return the bytes of a row of `columns` weights; `columns` is a multiple of 64."""
    return columns // BLOCK_SIZE * _BLOCK_BYTES[depth]


def checksum_key(tensor_name: str) -> str:
    """Return the metadata key of a tensor's checksum: 64-bit XXH3 of its bytes in the file."""
    return f"{CHECKSUM_PREFIX}{tensor_name}"


def codebook_key(tensor_name: str) -> str:
    """Return the metadata key of a tensor's codebooks: 27 scales for each of its matrices, or 27 for all."""
    return f"trit.codebook.{tensor_name}"


def register_with_gguf() -> None:
    """Register the four types with gguf-py, so that its reader, gguf-dump and its size table know them.

    An enum cannot be extended, so this adds pseudo-members to its lookup tables. Calling it twice is safe.
    """
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    for trit_type in TritType:
        if trit_type.value in GGMLQuantizationType._value2member_map_:
            continue
        member = int.__new__(GGMLQuantizationType, trit_type.value)
        member._name_ = trit_type.name
        member._value_ = trit_type.value
        GGMLQuantizationType._member_map_[trit_type.name] = member
        GGMLQuantizationType._value2member_map_[trit_type.value] = member
        GGML_QUANT_SIZES[member] = (BLOCK_SIZE, _BLOCK_BYTES[trit_type.depth])


def register_when_gguf_is_imported() -> None:
    """Call `register_with_gguf` now if gguf-py is imported, otherwise when it is.

    Importing gguf-py takes 0.2 s, so a program that does not use it should not import it.
    """
    if "gguf.constants" in sys.modules:
        register_with_gguf()
    elif _GgufFinder not in sys.meta_path:
        sys.meta_path.insert(0, _GgufFinder)


class _GgufFinder:
    """An entry of sys.meta_path that lets Python import gguf.constants as usual and then registers the types."""

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "gguf.constants":
            return None
        from importlib.util import find_spec

        sys.meta_path.remove(cls)
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            register_with_gguf()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
